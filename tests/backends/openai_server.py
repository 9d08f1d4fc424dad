"""A server that speaks OpenAI's protocol and does as a test says: refuses, breaks off, lies."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable

Handler = Callable[[http.server.BaseHTTPRequestHandler, dict], None]


class Server(http.server.ThreadingHTTPServer):
    """Answers `/v1/models`, and each chat request by the next of `replies` (the last repeats)."""

    daemon_threads = True

    def __init__(self, *replies: Handler, models: tuple[dict, ...] = ({"id": "m"},)) -> None:
        self.replies = list(replies)
        self.models = models
        self.requests: list[dict] = []
        self.keys: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("Authorization", ""))
        rows = [{"object": "model", "created": 0, "owned_by": "", **m} for m in self.server.models]
        send(self, 200, {"object": "list", "data": rows})

    def do_POST(self) -> None:
        self.server.keys.append(self.headers.get("Authorization", ""))
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        replies = self.server.replies
        (replies.pop(0) if len(replies) > 1 else replies[0])(self, request)

    def log_message(self, *_: object) -> None:
        pass


def send(handler, status: int, body: dict) -> None:
    data = json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def refusal(status: int, message: str) -> Handler:
    return lambda handler, _: send(handler, status, {"error": {"message": message}})


def hang_up(handler, _: dict) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def stream(*pieces: str | float, finish: str | None = "stop", usage: dict | None = None) -> Handler:
    """Streams text; a number is a pause in seconds; no `finish`: breaks off."""

    def reply(handler, _: dict) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()

        def chunk(choices: list, **more: object) -> None:
            body = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
            data = json.dumps(body | {"choices": choices} | more)
            handler.wfile.write(f"data: {data}\n\n".encode())
            handler.wfile.flush()

        with contextlib.suppress(OSError):
            for piece in pieces:
                if isinstance(piece, float):
                    time.sleep(piece)
                else:
                    chunk([{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
            if finish:
                chunk([{"index": 0, "delta": {}, "finish_reason": finish}])
                chunk([], usage=usage)
                handler.wfile.write(b"data: [DONE]\n\n")
        handler.close_connection = True

    return reply
