"""The live preview: one page beside its screenshot, in the user's own browser, while it is written.

Owns the server on the loopback interface, its defences and the page that it serves
(`preview_page/`). Knows nothing about where pages come from: whoever has one calls `show`
(`preview_sources` watches files and sessions).

A `PreviewServer` runs on a thread of its own with an event loop of its own; every method may be
called from any thread. Nothing is computed until a browser asks.

The page of a model is hostile until proven otherwise. Its preview stands in a frame
  - of an opaque origin (`sandbox` without allow-same-origin), so it reaches neither the page around
    it nor cookies nor storage, opens no windows, sends no forms and cannot leave;
  - whose policy (`default-src 'none'`) lets it load nothing but data: URIs;
  - in which no script runs but our own, named by its hash. There is no switch for the others:
    pages made from screenshots need none, and a script could reach the network where no policy
    stops it (WebRTC), or never end.
The frame's script parses the page without a browsing context and takes out what would act without
scripts: refreshes, links to resources, a base address.

Others on this machine and pages in the same browser are kept away by a path that cannot be
guessed, by the Host header (a name that was rebound to 127.0.0.1 is not ours) and by the Origin
and Sec-Fetch-Site headers.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from w2c_tui.core.artifact import best_page, find_pages
from w2c_tui.core.conversation import Attachment, content_hash
from w2c_tui.core.errors import ImageError, StoreError, W2CError
from w2c_tui.core.image import attachment_from_bytes, media_type, open_image
from w2c_tui.core.stand_in import Find, StandIn, stand_in
from w2c_tui.core.versions import Version, Versions

_log = logging.getLogger(__name__)

HOST = "127.0.0.1"
UPDATE_INTERVAL_S = 0.08
"""Shortest time between two updates of a browser: faster is not seen, and costs the model time."""

_KEEP_ALIVE_S = 15.0
_host = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?").fullmatch
_SHOWN_BY_BROWSERS = ("image/png", "image/jpeg", "image/gif", "image/webp")
_LARGEST_IMAGE_BESIDE_A_PAGE = 20_000_000


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What the preview shows. All of it may change from one moment to the next.

    The page is `html`, or else the page found in `answer`, the raw text of an answer. With
    `versions` the user can pick one; the page of this struct is then the newest entry, unless it
    is empty. Relative images of a page are looked for in `folder`, if given.
    """

    title: str
    html: str = ""
    answer: str = ""
    writing: bool = False
    original: Attachment | None = None
    versions: Versions | None = None
    folder: Path | None = None


class PreviewServer:
    """See the module. `start` it, `show` something, `close` it; or use it as a context manager."""

    def __init__(self, shown: Shown | None = None, *, port: int = 0, cut_out: bool = False) -> None:
        """`port` 0 takes a free one. `cut_out` cuts images out of the screenshot where the page
        says where they were (`stand_in`)."""
        self._shown = shown or Shown(title="w2c-tui")
        self._port = port
        self._cut_out = cut_out
        self._revision = 0
        self._token = secrets.token_urlsafe(24)
        self._ticket: str | None = None
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: asyncio.Event | None = None
        self._uvicorn: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None
        self._prepared: tuple[object, bytes] | None = None
        self._preparing = threading.Lock()

    # ── from any thread ───────────────────────────────────────────────────────────────────────

    @property
    def url(self) -> str:
        """The address, for as long as the server runs."""
        return f"http://{HOST}:{self._port}/{self._token}/"

    @property
    def open_url(self) -> str:
        """An address for the browser's command line, which others on this machine can read: it
        leads to `url` once. There is a new one after that."""
        self._ticket = self._ticket or secrets.token_urlsafe(24)
        return f"http://{HOST}:{self._port}/open/{self._ticket}"

    @property
    def port(self) -> int:
        return self._port

    def start(self) -> None:
        """Listen. Raises W2CError when the port is taken."""
        server_socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if os.name != "nt":
            # Windows means something else by it: that two may listen on one port.
            server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server_socket.bind((HOST, self._port))
            server_socket.listen(64)
        except OSError as error:
            server_socket.close()
            raise W2CError(
                f"The preview cannot listen on port {self._port}: {error.strerror or error}.",
                hint="Leave out --port, so that a free one is taken, or name another.",
            ) from error
        self._socket = server_socket
        self._port = server_socket.getsockname()[1]
        config = uvicorn.Config(
            _Guard(self._app(), self._token),
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
        # Without a handler it would write to standard error, across a full-screen application.
        logging.getLogger("uvicorn.error").handlers = [_ToOwnLog()]
        logging.getLogger("uvicorn.error").propagate = False
        self._uvicorn = uvicorn.Server(config)
        listening = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(listening,), name="preview", daemon=True
        )
        self._thread.start()
        listening.wait()

    def show(self, shown: Shown) -> None:
        """Show this from now on. Returns at once."""
        self._shown = shown
        self._revision += 1
        self._wake()

    def close(self) -> None:
        """Stop serving; returns when the port is free. Harmless when repeated."""
        self._closing = True
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
        self._wake()
        if self._thread is not None:
            self._thread.join(10)
        if self._socket is not None:
            self._socket.close()

    def __enter__(self) -> PreviewServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ── on the server's thread ────────────────────────────────────────────────────────────────

    def _run(self, listening: threading.Event) -> None:
        assert self._uvicorn is not None
        assert self._socket is not None

        async def serve(server: uvicorn.Server, listener: socket.socket) -> None:
            self._loop = asyncio.get_running_loop()
            self._changed = asyncio.Event()
            listening.set()
            await server.serve(sockets=[listener])

        with asyncio.Runner() as runner:
            runner.run(serve(self._uvicorn, self._socket))

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None:
            # The loop may have closed meanwhile: then nobody is waiting.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._announce)

    def _announce(self) -> None:
        assert self._changed is not None
        self._changed.set()
        self._changed = asyncio.Event()

    def _app(self) -> Starlette:
        at = f"/{self._token}"
        return Starlette(
            routes=[
                Route("/open/{ticket}", self._open),
                Route(f"{at}/", self._shell),
                Route(f"{at}/frame", self._frame),
                Route(f"{at}/events", self._events),
                Route(f"{at}/page", self._page),
                Route(f"{at}/original", self._original),
                Route(f"{at}/preview.js", _asset),
                Route(f"{at}/preview.css", _asset),
            ]
        )

    async def _open(self, request: Request) -> Response:
        given = request.path_params["ticket"]
        if self._ticket is None or not secrets.compare_digest(
            given.encode(), self._ticket.encode()
        ):
            return Response("Not found", 404)
        self._ticket = None
        return RedirectResponse(f"/{self._token}/", 303)

    async def _shell(self, request: Request) -> Response:
        # The policy for frames holds for wherever a frame goes later, too.
        frame = f"http://{request.headers['host']}/{self._token}/frame"
        policy = (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
            f" connect-src 'self'; frame-src {frame}; base-uri 'none'; form-action 'none';"
            " frame-ancestors 'none'"
        )
        return _text(_file("index.html"), "text/html", policy)

    async def _frame(self, request: Request) -> Response:
        script, script_hash = _frame_script()
        # A page without a doctype is laid out by other rules, which a document cannot change to.
        doctype = "" if "quirks" in request.query_params else "<!DOCTYPE html>\n"
        html = f"{doctype}<title>Page</title>\n<script>{script}</script>\n"
        policy = (
            f"sandbox allow-scripts; default-src 'none'; script-src '{script_hash}';"
            " style-src 'unsafe-inline'; img-src data:; font-src data:; base-uri 'none';"
            " form-action 'none';"
            f" frame-ancestors http://{request.headers['host']}"
        )
        return _text(html, "text/html", policy)

    async def _events(self, request: Request) -> Response:
        return StreamingResponse(self._states(), media_type="text/event-stream")

    async def _states(self) -> AsyncIterator[bytes]:
        seen: bytes | None = None
        while not self._closing:
            assert self._changed is not None
            changed = self._changed
            state = await run_in_threadpool(self._state)
            if state != seen:
                seen = state
                yield b"data: " + state + b"\n\n"
                await asyncio.sleep(UPDATE_INTERVAL_S)
            if self._closing:
                return
            try:
                async with asyncio.timeout(_KEEP_ALIVE_S):
                    await changed.wait()
            except TimeoutError:
                yield b": still here\n\n"

    def _state(self) -> bytes:
        """What the shell needs to know before it asks for a page, as one line of JSON."""
        revision, shown = self._revision, self._shown
        versions, current, of = [], None, ""
        if shown.versions is not None:
            of = content_hash(os.fsencode(shown.versions.folder))[:16]
            with contextlib.suppress(StoreError):
                versions = [_described(version) for version in shown.versions.all()]
                here = shown.versions.current()
                current = here.number if here else None
        return msgspec.json.encode(
            {
                "revision": revision,
                "title": shown.title,
                "live": bool(shown.html or shown.answer) or not versions,
                "writing": shown.writing,
                "original": _pixels(shown.original),
                "versions": versions,
                "versions_of": of,
                "current": current,
            }
        )

    async def _page(self, request: Request) -> Response:
        number = request.query_params.get("version", "")
        try:
            content = await run_in_threadpool(self._prepare, number)
        except (StoreError, ValueError):
            return Response("There is no such version.", 404)
        return Response(content, media_type="application/json")

    def _prepare(self, number: str) -> bytes:
        # Several tabs ask for the same page: it is made once.
        with self._preparing:
            revision, shown = self._revision, self._shown
            version = shown.versions.get(int(number)) if number and shown.versions else None
            key = version.folder if version else revision
            if self._prepared is None or self._prepared[0] != key:
                original = _original_of(version) if version else shown.original
                writing = shown.writing and not version
                html = version.html if version else _page_of(shown)
                view = stand_in(
                    html,
                    find=_beside(shown.folder) if shown.folder and not version else _nothing,
                    screenshot=original if self._cut_out else None,
                    close=not writing,
                )
                self._prepared = key, _encoded(view, revision, writing, html)
            return self._prepared[1]

    async def _original(self, request: Request) -> Response:
        number = request.query_params.get("version", "")
        try:
            data = await run_in_threadpool(self._original_data, number)
        except (StoreError, ImageError, ValueError, OSError):
            data = None
        if data is None:
            return Response("There is no screenshot.", 404)
        return Response(data, media_type=media_type(data))

    def _original_data(self, number: str) -> bytes | None:
        shown = self._shown
        if number and shown.versions:
            path = shown.versions.get(int(number)).original_path
            data = path.read_bytes() if path else None
        else:
            data = shown.original.data if shown.original else None
        if data is None or media_type(data) in _SHOWN_BY_BROWSERS:
            return data
        buffer = io.BytesIO()
        open_image(data).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


class _ToOwnLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _log.handle(record)


def open_browser(server: PreviewServer) -> bool:
    """Show the preview in the user's browser; False where there is none to be seen.

    On a machine without a display a text browser would take over the terminal.
    """
    seen = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    if sys.platform.startswith("linux") and not any(os.environ.get(name) for name in seen):
        return False
    # A process of its own: what browsers print would land on the screen of the application.
    nowhere = subprocess.DEVNULL
    threading.Thread(
        target=subprocess.run,
        args=([sys.executable, "-m", "webbrowser", server.open_url],),
        kwargs={"stdin": nowhere, "stdout": nowhere, "stderr": nowhere},
        name="browser",
        daemon=True,
    ).start()
    return True


class _Guard:
    """Answers only requests that name this server, come from its own pages, and know the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        headers = Headers(scope=scope)
        first = scope["path"].removeprefix("/").partition("/")[0].encode()
        opening = first == b"open"
        # A link in another program's page may lead to the preview; nothing else may.
        arriving = opening or (scope["path"].count("/") == 2 and scope["path"].endswith("/"))
        site = headers.get("sec-fetch-site", "none")
        refused = (
            _host(headers.get("host", "")) is None
            or headers.get("origin", f"http://{headers.get('host')}")
            != f"http://{headers.get('host')}"
            or (site not in ("same-origin", "none") and not arriving)
            or scope["method"] != "GET"
        )
        if refused or not (opening or secrets.compare_digest(first, self._token)):
            # One answer for all of these: it tells nobody which was wrong.
            await Response("Not found", 404)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)


_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-dns-prefetch-control", b"off"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


async def _asset(request: Request) -> Response:
    name = request.url.path.rpartition("/")[2]
    return _text(_file(name), "text/javascript" if name.endswith(".js") else "text/css")


def _text(content: str, kind: str, policy: str = "") -> Response:
    headers = {"content-security-policy": policy} if policy else None
    return Response(content, media_type=kind, headers=headers)


def _file(name: str) -> str:
    return (resources.files("w2c_tui.web") / "preview_page" / name).read_text(encoding="utf-8")


def _frame_script() -> tuple[str, str]:
    """The one script that the frame's policy allows, and the hash by which it does."""
    script = _file("frame.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return script, f"sha256-{digest}"


def _page_of(shown: Shown) -> str:
    if shown.html or not shown.answer:
        return shown.html
    if shown.writing:
        pages = find_pages(shown.answer)
        # The document that is being written, though a finished one stands above it.
        if pages and pages[-1].is_document and not pages[-1].complete:
            return pages[-1].html
    page = best_page(shown.answer)
    return page.html if page else ""


def _encoded(view: StandIn, revision: int, writing: bool, html: str) -> bytes:
    notes = list(view.notes)
    if view.num_style_sheets:
        notes.append("Style sheets from elsewhere are not loaded.")
    if view.num_scripts:
        notes.append("Scripts do not run here.")
    if not html or writing:
        # What is missing in a page that is being written may still come.
        notes = []
    return msgspec.json.encode(
        {"revision": revision, "html": view.html, "notes": notes, "characters": len(html)}
    )


def _described(version: Version) -> dict[str, Any]:
    meta = version.meta
    return {
        "number": version.number,
        "name": version.name,
        "parent": meta.parent,
        "origin": meta.origin,
        "created_at": meta.created_at,
        "model": meta.model,
        "prompt": meta.prompt[:300],
        "complete": meta.complete,
        "score": meta.score,
        "original": version.original_path is not None,
    }


def _pixels(original: Attachment | None) -> dict[str, Any] | None:
    if original is None:
        return None
    return {
        "key": original.sha256[:16],
        "width": original.width,
        "height": original.height,
        "name": original.name,
    }


def _original_of(version: Version) -> Attachment | None:
    path = version.original_path
    if path is None:
        return None
    try:
        return attachment_from_bytes(path.read_bytes(), path.name)
    except (OSError, ImageError):
        return None


def _nothing(reference: str) -> bytes | None:
    return None


def _beside(folder: Path) -> Find:
    """Finds the images that lie beside a page or below it; never above: the page is untrusted."""
    root = folder.resolve()

    def find(reference: str) -> bytes | None:
        name = unquote(re.split(r"[?#]", reference)[0])
        try:
            path = (root / name).resolve()
            if not path.is_relative_to(root) or not path.is_file():
                return None
            if path.stat().st_size > _LARGEST_IMAGE_BESIDE_A_PAGE:
                return None
            return path.read_bytes()
        except (OSError, ValueError):
            return None

    return find
