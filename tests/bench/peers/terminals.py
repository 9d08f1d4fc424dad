"""The application beside other chat applications for the terminal: cold start and streaming.

Each is started in a pseudo-terminal of 120 x 40 with folders of its own. Started: an output of
more than 1,000 bytes is out and none follows for three seconds, as cursors blink for ever.
Streaming: a local server sends one answer in small pieces to each.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.bench.bench_tui import PAGE, Terminal
from tests.bench.peers.rows import Row

PIECES_PER_S = 200
ANSWER = PAGE[:3000].replace("<!DOCTYPE", "```html\n<!DOCTYPE") + "\n```\n\nENDOFANSWER\n"
_ENTER, _CTRL_J = b"\r", b"\n"
INSTALL_S = 900
QUIET_S, MOST_S = 3.0, 120.0


def measure(folder: Path, runs: int) -> list[Row]:
    """Rows for oterm and elia."""
    found = []
    with serving() as url:
        ours = [sys.executable, "-m", "w2c_tui", "--base-url", url, "--no-ocr"]
        for name in ("oterm", "elia"):
            command, why_not = install(folder, {"elia": "elia-chat"}.get(name, name), name)
            title = name
            if command is None:
                found.append(Row("cold start", title, missing=why_not))
                continue
            title = f"{name} {version(command, {'elia': 'elia-chat'}.get(name, name))}"
            try:
                # Not counted: Python compiles what it has just installed.
                start([command], folder / f"{name}-warm", url)
                starts = [
                    (
                        start(ours, folder / f"ours-{name}-{n}", url),
                        start([command], folder / f"{name}-{n}", url),
                    )
                    for n in range(runs)
                ]
            except AssertionError as error:
                found.append(Row("cold start", title, missing=f"not measured: {error}"))
                continue
            for at, (what, unit) in enumerate(
                (("cold start", "s"), ("cold start, CPU time", "s"), ("memory then", "MiB"))
            ):
                mine, other = ([pair[side][at] for pair in starts] for side in (0, 1))
                found.append(Row(what, title, unit, mine, other))
            what = f"CPU time to show {len(ANSWER):,} characters at {PIECES_PER_S} pieces/s"
            if name == "oterm":
                found.append(Row(what, title, missing="not measured: a chat is set up by hand"))
                continue
            mine, other = [], []
            try:
                for n in range(runs):
                    mine.append(stream(ours, folder / f"ours-s{n}", url, _ENTER))
                    other.append(stream([command], folder / f"{name}-s{n}", url, _CTRL_J))
                found.append(Row(what, title, "s", mine, other))
            except AssertionError as error:
                shown = re.sub(r"[^ -~]+", " ", str(error))[-100:]
                found.append(
                    Row(what, title, missing=f"not measured: no answer appeared ({shown})")
                )
    return found


def install(folder: Path, package: str, program: str) -> tuple[str | None, str]:
    """The program's path in an environment of its own, or why it cannot be installed."""
    home = folder / f"env-{package}"
    try:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True)
        command = [str(home / "bin" / "python"), "-m", "pip", "install", "-q", package]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        return None, f"not installed: pip took over {INSTALL_S} s"
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        return None, f"not installed: {said[-1][:120] if said else 'pip failed'}"
    return str(home / "bin" / program), ""


def version(command: str, package: str) -> str:
    script = f"import importlib.metadata as m; print(m.version({package!r}))"
    python = str(Path(command).with_name("python"))
    return subprocess.run(
        [python, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()


def opened(command: list[str], folder: Path, url: str) -> Terminal:
    """`command` in a terminal, with configuration that points to the scripted server."""
    config = folder / "config"
    (config / "elia").mkdir(parents=True)
    (config / "elia" / "config.toml").write_text(
        f'default_model = "openai/scripted"\n[[models]]\nname = "openai/scripted"\n'
        f'api_base = "{url}"\napi_key = "none"\n'
    )
    os.environ |= {
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(config),
        "XDG_DATA_HOME": str(folder / "share"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OPENAI_API_KEY": "none",
    }
    return Terminal(command, str(folder))


def start(command: list[str], folder: Path, url: str) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of CPU and MiB of the process when it has started."""
    terminal = opened(command, folder, url)
    try:
        return started(terminal)
    finally:
        close(terminal)


def started(terminal: Terminal) -> tuple[float, float, float]:
    began = time.monotonic()
    found = (0.0, 0.0, 0.0)
    while time.monotonic() - began < (found[0] + QUIET_S if found[0] else MOST_S):
        if len(terminal.read(0.02)) > 1000:
            found = (time.monotonic() - began, terminal.cpu_s(), terminal.mib())
    assert found[0], f"nothing was drawn in {MOST_S} s"
    return found


def stream(command: list[str], folder: Path, url: str, send: bytes) -> float:
    """Seconds of CPU, its children's included, from the question to the end of the answer."""
    terminal = opened(command, folder, url)
    try:
        started(terminal)
        before = tree_cpu_s(terminal.process)
        terminal.type(b"Write a page")
        terminal.idle(0.5)
        terminal.type(send)
        terminal.until(b"ENDOFANSWER", 90)
        terminal.idle(1.0)
        return tree_cpu_s(terminal.process) - before
    finally:
        close(terminal)


def tree_cpu_s(process: psutil.Process) -> float:
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def close(terminal: Terminal) -> None:
    children = terminal.process.children(recursive=True)
    terminal.close()
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()


class Scripted(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server with one model and one answer."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": "scripted", "object": "model"}]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        pieces = [ANSWER[at : at + 4] for at in range(0, len(ANSWER), 4)]
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for number, piece in enumerate(pieces):
                time.sleep(max(0.0, began + number / PIECES_PER_S - time.monotonic()))
                self._send({"content": piece}, None)
            self._send({}, "stop")
            self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, delta: dict[str, str], reason: str | None) -> None:
        choice = {"index": 0, "delta": {"role": "assistant", **delta}, "finish_reason": reason}
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "scripted"}
        self.wfile.write(b"data: " + json.dumps({**chunk, "choices": [choice]}).encode() + b"\n\n")
        self.wfile.flush()


@contextlib.contextmanager
def serving() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
