"""A model hub on this machine, for what huggingface_hub asks of one."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import urllib.parse

import pytest


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A model hub on this machine that offers the folders put into it as owner/name."""
    root = tmp_path / "served"

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = urllib.parse.urlparse(self.path).path.strip("/")
            parts = path.removeprefix("api/models/").split("/")
            folder = root / parts[0] / parts[1]
            if (refusal := folder / "refusal.json").is_file():
                # A status, and what the hub calls the reason.
                status, code = json.loads(refusal.read_text())
                return self.answer(status, b"{}", {"X-Error-Code": code})
            if not folder.is_dir():
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if not path.startswith("api/"):
                content = (folder / "/".join(parts[4:])).read_bytes()
                tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "a" * 40}
                return self.answer(200, content, tag)
            if "tree" in parts:
                files = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"}
                    for file in folder.iterdir()
                ]
                return self.answer(200, json.dumps(files).encode(), {})
            files = [{"rfilename": file.name} for file in folder.iterdir()]
            info = {"id": "/".join(parts[:2]), "sha": "a" * 40, "siblings": files}
            return self.answer(200, json.dumps(info).encode(), {})

        def answer(self, status, content, headers):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield root
    server.shutdown()
    server.server_close()
    thread.join()


def offer(hub, *names):
    folder = hub / "someone" / "files"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"GGUF" + name.encode())
