"""Pictures by address: nothing inside this machine or network is asked unless the user said so.

Which addresses count as inside, redirects and names that change their address are tested in
tests/core/test_reference.py; here the commands ask a service on loopback that notes who comes.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from tests.core.pictures import encoded, picture
from tests.security.terminal import piped

pytest.importorskip("openai")

from tests.backends.openai_server import Server, stream

PAGE = "<!DOCTYPE html><html><body>x</body></html>"


@pytest.fixture
def inside() -> Iterator[http.server.HTTPServer]:
    """A service on loopback; `asked` are the paths that were asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)  # type: ignore[attr-defined]
            data = encoded(picture())
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433"])
def test_a_service_on_this_machine_is_not_asked(own_folders, inside, host: str) -> None:
    address = f"http://{host}:{inside.server_port}/shot.png"
    for arguments in (
        ("generate", address, "--out", "-"),
        ("chat", "--image", address),
        ("preview", "page.html", "--image", address),
        ("compare", address, address),
    ):
        if host != "127.0.0.1" and arguments[0] != "generate":
            continue
        with Server(stream(PAGE)) as server:
            flags = ["--base-url", server.url] if arguments[0] in ("generate", "chat") else []
            output, status = piped(*arguments, *flags, no_proxy="*")
            assert status == 1, output
            assert "inside this machine or network" in output
            assert server.requests == []
    assert inside.asked == []


def test_the_address_of_a_clouds_keys_is_not_asked(own_folders) -> None:
    for address in ("http://169.254.169.254/latest/meta-data/iam", "http://[fe80::1]/a.png"):
        output, status = piped("generate", address, "--out", "-", no_proxy="*")
        assert status == 1, output
        assert "inside this machine or network" in output


def test_a_service_on_this_machine_is_asked_where_the_user_allowed_it(own_folders, inside) -> None:
    address = f"http://127.0.0.1:{inside.server_port}/shot.png"
    with Server(stream(f"```html\n{PAGE}\n```")) as server:
        output, status = piped(
            *("generate", address, "--out", "-", "--base-url", server.url, "--no-ocr"),
            no_proxy="*",
            W2C_IMAGES_ALLOW_PRIVATE_HOSTS="true",
        )
    assert status == 0, output
    assert PAGE in output
    assert "/shot.png" in inside.asked
