"""Pages into pictures, in one headless Chromium or Chrome for many pages.

Owns the browser: finding it, starting it, its tabs, its limits and its end. Pages are untrusted:
they reach no network and no file outside of their own folder, and by default their scripts do not
run, which also makes two renders of one page the same to the pixel (scripts see clocks and random
numbers). Knows nothing about models, scores or sessions.

    with Renderer() as renderer:
        view = renderer.render(PageSource("<h1>Hello</h1>"))
        for view in renderer.render_all(sources): ...   # in order, several at a time
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import itertools
import mimetypes
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit

import msgspec
import psutil
from playwright.async_api import (
    Browser,
    BrowserContext,
    CDPSession,
    Error,
    Page,
    Playwright,
    Request,
    Route,
    async_playwright,
)
from playwright.async_api import (
    TimeoutError as LoadTimeout,
)

from w2c_tui import machine
from w2c_tui.core.config import RenderSettings
from w2c_tui.core.errors import BrowserNotFoundError, RenderError, W2CError
from w2c_tui.core.printable import one_line, quoted
from w2c_tui.core.stand_in import SIZE_WITHOUT_ONE, placeholder, sizes
from w2c_tui.web import snapshot
from w2c_tui.web.view import View, picture_from_png

MAX_PAGE_BYTES, MAX_FILE_BYTES = 30_000_000, 30_000_000
"""Largest page, and largest file of its folder that it gets."""

USUAL_WIDTHS, HIGHEST_WINDOW = (320, 2000), 1440
"""Of windows that screenshots are taken in, in CSS pixels: phones to large screens."""

_ORIGIN = "http://page.invalid"
_ARGUMENTS = (
    # The same pixels each time, on any screen.
    "--disable-gpu",
    "--disable-software-rasterizer",
    # A page of usual width is drawn in one or two pieces, which takes a quarter less time.
    "--default-tile-width=2048",
    "--default-tile-height=4096",
    "--force-color-profile=srgb",
    "--font-render-hinting=none",
    "--disable-lcd-text",
    "--hide-scrollbars",
    # What was animated is drawn anew, not blended from what was there before.
    "--disable-partial-raster",
    "--disable-threaded-animation",
    "--disable-checker-imaging",
    "--blink-settings=imageAnimationPolicy=2,lazyLoadEnabled=false",
    # No way out that the interception of requests would not see: lookups, preconnects, WebRTC.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--proxy-server=http://0.0.0.0:0",
    "--proxy-bypass-list=<-loopback>",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--disable-quic",
    # Containers often give /dev/shm 64 MB.
    "--disable-dev-shm-usage",
)
# Fonts that are still being read, no blinking caret, and the end state of what moves: also of what
# the picture itself sets in motion, as it makes the window larger.
_SETTLE = """() => document.fonts.ready.then(() => {
  const still = new CSSStyleSheet()
  still.replaceSync(`*, ::before, ::after { caret-color: transparent !important;
    transition: none !important; animation-duration: 0s !important;
    animation-delay: 0s !important; animation-iteration-count: 1 !important }`)
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, still]
  for (const a of document.getAnimations()) {
    try { a.effect.getComputedTiming().endTime === Infinity ? a.cancel() : a.finish() } catch {}
  }
  for (const m of document.querySelectorAll('marquee')) {
    const box = document.createElement('div')
    box.className = m.className
    box.style.cssText = m.style.cssText
    box.append(...m.childNodes)
    m.replaceWith(box)
  }
})"""
_URL_MARKS = "%/:?#[]@!$&'()*+,;=~"
_USES_PER_TAB = 200
_ATTEMPTS = 3
_CLOSE_WAIT_S = 5.0
_MEMORY_CHECK_S = 0.3


class PageSource(msgspec.Struct, frozen=True):
    """A page to render. Bytes are decoded as a browser does, by the page's own `<meta charset>`.

    `folder` is what relative references may reach; None: nothing. `width` and `height` in CSS
    pixels are the window's; 0: those of the settings. A page that is to be compared with a picture
    takes them from `window_for`.
    """

    html: str | bytes
    folder: Path | None = None
    name: str = "page"
    width: int = 0
    height: int = 0


class BrowserInfo(msgspec.Struct, frozen=True):
    """What pictures depend on, for reports. `fonts` are those behind CSS's generic families."""

    path: str
    version: str
    sandboxed: bool
    fonts: dict[str, str]


def find_browser(setting: str = "") -> Path:
    """The browser's program: `setting` (a path or a name), or the first one that is found.

    Raises BrowserNotFoundError.
    """
    if setting:
        found = shutil.which(os.path.expanduser(setting))
        if found is None:
            raise BrowserNotFoundError(
                f"The browser {quoted(setting)} is not a program that can be run.",
                hint="Give the path of Chromium or Chrome as [render] browser, or leave it empty.",
            )
        return Path(found)
    if place := machine.find_browser():
        return place
    install = {
        "darwin": "brew install --cask chromium",
        "win32": "winget install Google.Chrome",
    }.get(sys.platform, "sudo apt install chromium-headless-shell (or chromium)")
    raise BrowserNotFoundError(
        "No Chromium or Chrome was found, and pages cannot be rendered without one.",
        hint=f"Install one: {install}; or name it as [render] browser in the settings.",
    )


def window_for(picture_size: tuple[int, int], settings: RenderSettings) -> tuple[int, int]:
    """Width and height of the window in which a page is compared with a picture of that size.

    A picture wider than usual windows was taken of a dense screen, and a very narrow one was made
    smaller: then the width is the settings'. The picture at that width is as high as the window,
    since a picture of a page is never lower than the window it was taken in, and what a page draws
    below its own end to fill a higher one would be compared with nothing. One that is higher than
    usual windows shows a whole long page; what such a page sizes by its window (`100vh`) was drawn
    for a usual one, the settings'.
    """
    picture_width, picture_height = picture_size
    narrowest, widest = USUAL_WIDTHS
    width = picture_width if narrowest <= picture_width <= widest else settings.width
    height = max(round(picture_height * width / picture_width), 1)
    return width, height if height <= HIGHEST_WINDOW else settings.height


def can_be_sandboxed() -> bool:
    """Whether Chromium's own sandbox is used: it refuses to run as root, as in most containers."""
    return not (hasattr(os, "geteuid") and os.geteuid() == 0)


class Renderer:
    """One browser, started by the first page and again after a crash. Use from any thread."""

    def __init__(self, settings: RenderSettings | None = None) -> None:
        self.settings = settings or RenderSettings()
        self.num_tabs = self.settings.tabs or min(os.cpu_count() or 1, 8)
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(self, page: PageSource, *, full_page: bool = True) -> View:
        """The page as it looks: all of it, or what the window shows. Raises RenderError."""
        return self.submit(page, full_page=full_page).result()

    def submit(self, page: PageSource, *, full_page: bool = True) -> Future[View]:
        """As `render`, without waiting for it."""
        return self._run(lambda fleet: fleet.render(page, full_page))

    def render_all(
        self, pages: Iterable[PageSource], *, full_page: bool = True
    ) -> Iterator[View | RenderError]:
        """Each page's view, or why there is none, in order; several are rendered at a time.

        Only a few pages ahead are in memory, however many there are.
        """
        waiting: deque[Future[View]] = deque()
        rest = iter(pages)
        while True:
            for page in itertools.islice(rest, 2 * self.num_tabs - len(waiting)):
                waiting.append(self.submit(page, full_page=full_page))
            if not waiting:
                return
            try:
                yield waiting.popleft().result()
            except RenderError as error:
                yield error

    def info(self) -> BrowserInfo:
        """The browser in use and its fonts. Raises RenderError."""
        info: BrowserInfo = self._run(lambda fleet: fleet.info()).result()
        return info

    def close(self) -> None:
        """End the browser. Pages that are being rendered fail."""
        with self._starting:
            self._closed = True
            thread, loop = self._thread, self._loop
        if thread is not None and loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._stop.set)
            thread.join()

    def _run(self, make: Any) -> Future[Any]:
        with self._starting:
            if self._closed:
                raise RenderError("The renderer was closed.")
            if self._thread is None:
                started: Future[None] = Future()
                # A thread of its own, as the interface has an event loop that must not wait.
                self._thread = threading.Thread(
                    target=lambda: asyncio.run(self._serve(started)),
                    name="w2c-render",
                    daemon=True,
                )
                self._thread.start()
                try:
                    started.result()
                except BaseException:
                    self._thread = None
                    raise
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self._job(make), self._loop)

    async def _job(self, make: Any) -> Any:
        task = asyncio.ensure_future(make(self._fleet))
        self._jobs.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            raise RenderError("The renderer was closed.") from None
        finally:
            self._jobs.discard(task)

    async def _serve(self, started: Future[None]) -> None:
        self._stop = asyncio.Event()
        self._jobs: set[asyncio.Future[Any]] = set()
        try:
            browser = find_browser(self.settings.browser)
            driver = await async_playwright().start()
        except W2CError as error:
            started.set_exception(error)
            return
        except Exception as error:  # noqa: BLE001 - whatever a foreign program's start may raise
            started.set_exception(RenderError(f"The browser's driver did not start: {error}"))
            return
        self._fleet = _Fleet(driver, browser, self.settings, self.num_tabs)
        self._loop = asyncio.get_running_loop()
        started.set_result(None)
        try:
            await self._stop.wait()
        finally:
            for job in self._jobs:
                job.cancel()
            await asyncio.gather(*self._jobs, return_exceptions=True)
            await self._fleet.close()
            with contextlib.suppress(Exception):
                await asyncio.wait_for(driver.stop(), _CLOSE_WAIT_S)


class _Job:
    """One page on its way through a tab."""

    _numbers = itertools.count(1)

    def __init__(self, page: PageSource) -> None:
        self.page = page
        # An address of its own, so that nothing is taken from a cache.
        self.prefix = f"/{next(self._numbers)}/"
        self.url = f"{_ORIGIN}{self.prefix}"
        self.refused = 0
        self.asked: set[str] = set()

    async def answer(self, route: Route, request: Request) -> None:
        if request.url == self.url:
            html = self.page.html
            charset = "; charset=utf-8" if isinstance(html, str) else ""
            headers = {"content-type": f"text/html{charset}", "cache-control": "no-store"}
            await route.fulfill(body=html, headers=headers)
            return
        content = await asyncio.to_thread(self._file, request.url)
        if content is not None:
            kind = mimetypes.guess_type(urlsplit(request.url).path)[0] or "text/plain"
            headers = {"content-type": kind, "cache-control": "no-store"}
            await route.fulfill(body=content, headers=headers)
            return
        self.refused += 1
        if request.resource_type == "image":
            sizes = await asyncio.to_thread(lambda: self._sizes)
            picture = placeholder(size=sizes.get(request.url, SIZE_WITHOUT_ONE))
            await route.fulfill(body=picture, content_type="image/svg+xml")
        elif request.is_navigation_request():
            # "No content" leaves a page where it is; a refusal would replace it.
            await route.fulfill(status=204)
        else:
            await route.abort()

    @functools.cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        """How large the page says that its images are, by address. A picture that is missing has
        that size, and so keeps its proportions under `height: auto`."""
        html = self.page.html
        text = html if isinstance(html, str) else html.decode("utf-8", "replace")
        return {
            urldefrag(urljoin(self.url, quote(reference, safe=_URL_MARKS))).url: size
            for reference, size in sizes(text).items()
        }

    def _file(self, url: str) -> bytes | None:
        """The file of the page's folder that `url` means."""
        if self.page.folder is None or not url.startswith(_ORIGIN + "/"):
            return None
        path = unquote(urlsplit(url).path).removeprefix(self.prefix).lstrip("/")
        self.asked.add(path)
        return file_of(self.page.folder, path)


def file_of(folder: Path, path: str) -> bytes | None:
    """What a page in `folder` gets that asks for `path`; None: it gets nothing."""
    try:
        folder = folder.resolve(strict=True)
        file = (folder / path).resolve(strict=True)
        if not file.is_relative_to(folder) or not file.is_file():
            return None
        return file.read_bytes() if file.stat().st_size <= MAX_FILE_BYTES else None
    except (OSError, ValueError):
        return None


class _Tab:
    def __init__(
        self, context: BrowserContext, page: Page, cdp: CDPSession, window: tuple[int, int]
    ) -> None:
        self.window = window
        self.context = context
        self.page = page
        self.cdp = cdp
        self.job: _Job | None = None
        self.uses = 0
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        page.on("crash", lambda _: self.lose())
        page.on("close", lambda _: self.lose())

    def lose(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)

    async def answer(self, route: Route, request: Request) -> None:
        # The tab may be gone before the answer is there.
        with contextlib.suppress(Error):
            if self.job is None:
                await route.abort()
            else:
                await self.job.answer(route, request)


class _Fleet:
    """The browser and its tabs, on the event loop's thread."""

    def __init__(
        self, driver: Playwright, path: Path, settings: RenderSettings, num_tabs: int
    ) -> None:
        self._driver = driver
        self._path = path
        self._settings = settings
        self._places = asyncio.Semaphore(num_tabs)
        self._launching = asyncio.Lock()
        self._browser: Browser | None = None
        self._process: psutil.Process | None = None
        self._sandboxed = can_be_sandboxed()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._scratch: list[str] = []
        self._idle: list[_Tab] = []
        self._leaving: set[asyncio.Future[None]] = set()
        self._watch: asyncio.Future[None] | None = None
        self._killed_at = 0.0

    # --- one page --------------------------------------------------------------------------------

    async def render(self, page: PageSource, full_page: bool) -> View:
        if len(page.html) > MAX_PAGE_BYTES:
            raise RenderError(
                f"{quoted(page.name)} is too large to render: {len(page.html) / 1e6:.0f} MB.",
                hint=f"At most {MAX_PAGE_BYTES / 1e6:.0f} MB are rendered.",
            )
        async with self._places:
            for attempt in range(_ATTEMPTS):
                browser = await self._launched()
                try:
                    return await self._bounded(self._render(browser, page, full_page), page)
                except Error as error:
                    # When the browser is gone it may have been another page that took it down.
                    if browser.is_connected() or attempt + 1 == _ATTEMPTS:
                        raise RenderError(
                            f"{quoted(page.name)} cannot be rendered: {_first_line(error)}."
                        ) from error
        raise AssertionError("the last attempt returns or raises")

    async def _bounded(self, work: Coroutine[Any, Any, View], page: PageSource) -> View:
        """`work` within the time limit and the life of the browser, which a call may outwait."""
        task, gone = asyncio.ensure_future(work), self._gone
        try:
            await asyncio.wait(
                (task, gone),
                timeout=self._settings.timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if task.done():
                return await task
            if gone.done():
                raise Error("the browser ended")
            raise RenderError(
                f"{quoted(page.name)} was not rendered within {self._settings.timeout_s:g} s.",
                hint="Raise [render] timeout_s, or simplify the page.",
            )
        finally:
            task.cancel()
            await asyncio.wait((task,))

    async def _render(self, browser: Browser, page: PageSource, full_page: bool) -> View:
        tab = self._idle.pop() if self._idle else await self._new_tab(browser)
        job = tab.job = _Job(page)
        window = page.width or self._settings.width, page.height or self._settings.height
        work = asyncio.ensure_future(self._capture(tab, job, window, full_page))
        try:
            await asyncio.wait((work, tab.gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                # Tabs end first when the browser does.
                await asyncio.wait((self._gone,), timeout=0.5)
                raise Error("the browser ended") if self._gone.done() else self._lost(page)
            png, layout, page_height = await work
        except BaseException:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            self._leave(tab)
            raise
        tab.job = None
        tab.uses += 1
        # Scripts may leave things behind, in storage and in workers.
        if self._settings.javascript or tab.uses >= _USES_PER_TAB:
            self._leave(tab)
        else:
            self._idle.append(tab)
        return await asyncio.to_thread(_view, png, layout, page_height, job)

    async def _capture(
        self, tab: _Tab, job: _Job, window: tuple[int, int], full_page: bool
    ) -> tuple[str, dict[str, Any], int]:
        width, height = window
        if tab.window != window:
            await tab.page.set_viewport_size({"width": width, "height": height})
            tab.window = window
        await tab.page.goto(job.url, wait_until="commit", timeout=0)
        # A page that goes on loading, as scripts can make it, is shown as far as it came.
        with contextlib.suppress(LoadTimeout):
            wait_ms = 1000 * min(self._settings.timeout_s / 2, 5)
            await tab.page.wait_for_load_state("load", timeout=wait_ms)
        await tab.page.evaluate(_SETTLE)
        metrics = await tab.cdp.send("Page.getLayoutMetrics")
        page_height = max(int(metrics["cssContentSize"]["height"]), 1)
        if full_page:
            height = min(page_height, self._settings.max_page_height)
        layout = await tab.cdp.send("DOMSnapshot.captureSnapshot", snapshot.PARAMETERS)
        size = {"width": width, "height": height}
        shot = await tab.cdp.send(
            "Page.captureScreenshot",
            {
                "format": "png",
                "optimizeForSpeed": True,
                "captureBeyondViewport": True,
                "clip": {"x": 0, "y": 0, "scale": 1, **size},
            },
        )
        return shot["data"], layout, page_height

    def _lost(self, page: PageSource) -> Exception:
        if time.monotonic() - self._killed_at < 2:
            return RenderError(
                f"{quoted(page.name)} took more than {self._settings.memory_mib} MiB of memory.",
                hint="Raise [render] memory_mib, or simplify the page.",
            )
        return RenderError(f"{quoted(page.name)} crashed its tab of the browser.")

    # --- tabs ------------------------------------------------------------------------------------

    async def _new_tab(self, browser: Browser) -> _Tab:
        context = await browser.new_context(
            viewport={"width": self._settings.width, "height": self._settings.height},
            device_scale_factor=1,
            java_script_enabled=self._settings.javascript,
            service_workers="block",
            accept_downloads=False,
            color_scheme="light",
            locale="en-US",
            timezone_id="UTC",
        )
        page = await context.new_page()
        cdp = await context.new_cdp_session(page)
        tab = _Tab(context, page, cdp, (self._settings.width, self._settings.height))
        await context.route("**/*", tab.answer)
        return tab

    def _leave(self, tab: _Tab) -> None:
        """Close a tab without waiting for it."""
        leaving = asyncio.ensure_future(self._close_tab(tab))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _close_tab(self, tab: _Tab) -> None:
        closing = asyncio.ensure_future(tab.context.close())
        done, _ = await asyncio.wait({closing}, timeout=1)
        if not done:
            # A tab that is busy does not close; one that is dead does.
            crash = asyncio.ensure_future(tab.cdp.send("Page.crash"))
            done, _ = await asyncio.wait({closing}, timeout=_CLOSE_WAIT_S)
            crash.cancel()
            await asyncio.gather(crash, return_exceptions=True)
            if not done:
                self._kill()
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)

    # --- the browser -----------------------------------------------------------------------------

    async def _launched(self) -> Browser:
        async with self._launching:
            if self._browser is None or not self._browser.is_connected():
                self._idle.clear()
                self._browser = await self._launch()
                if self._watch is None:
                    self._watch = asyncio.ensure_future(self._watch_memory())
            return self._browser

    async def _launch(self) -> Browser:
        # Playwright's own folders stay behind when the browser is killed.
        folder = tempfile.mkdtemp(prefix="w2c-render-")
        self._scratch.append(folder)
        try:
            browser = await self._driver.chromium.launch(
                executable_path=self._path,
                artifacts_dir=folder,
                args=_ARGUMENTS,
                chromium_sandbox=self._sandboxed,
                # Ctrl-C is the front end's; it closes the browser when it wants to.
                handle_sigint=False,
                handle_sigterm=False,
                handle_sighup=False,
                timeout=60_000,
            )
        except Error as error:
            hint = "Check that it starts: " + f"{self._path} --headless --dump-dom about:blank"
            if "no usable sandbox" in str(error).lower():
                hint = (
                    "Chromium's sandbox needs user namespaces, which this system forbids to "
                    "programs that it does not know. Allow them, or use the browser of the "
                    "distribution's package."
                )
            raise RenderError(
                f"The browser {self._path} did not start: {_first_line(error)}.", hint=hint
            ) from error
        gone = self._gone = asyncio.get_running_loop().create_future()
        browser.on("disconnected", lambda _: None if gone.done() else gone.set_result(None))
        with contextlib.suppress(Error, TimeoutError, psutil.Error):
            async with asyncio.timeout(_CLOSE_WAIT_S):
                session = await browser.new_browser_cdp_session()
                processes = await session.send("SystemInfo.getProcessInfo")
            pids = [p["id"] for p in processes["processInfo"] if p["type"] == "browser"]
            self._process = psutil.Process(pids[0])
            for argument in self._process.cmdline():
                if argument.startswith("--user-data-dir="):
                    self._scratch.append(argument.partition("=")[2])
        return browser

    async def _watch_memory(self) -> None:
        """End tabs that take too much; the system would otherwise choose what to end."""
        while True:
            await asyncio.sleep(_MEMORY_CHECK_S)
            if len(self._idle) < self._num_open():
                await asyncio.to_thread(self._end_large_tabs)

    def _num_open(self) -> int:
        browser = self._browser
        return len(browser.contexts) if browser is not None and browser.is_connected() else 0

    def _end_large_tabs(self) -> None:
        with contextlib.suppress(psutil.Error):
            for child in self._process.children(recursive=True) if self._process else ():
                with contextlib.suppress(psutil.Error):
                    large = child.memory_info().rss > self._settings.memory_mib * 2**20
                    if large and "--type=renderer" in child.cmdline():
                        self._killed_at = time.monotonic()
                        child.kill()

    def _kill(self) -> None:
        with contextlib.suppress(psutil.Error):
            if self._process is not None:
                for process in (*self._process.children(recursive=True), self._process):
                    with contextlib.suppress(psutil.Error):
                        process.kill()

    async def info(self) -> BrowserInfo:
        browser = await self._launched()
        tab = await self._new_tab(browser)
        try:
            fonts = await _fonts(tab)
        finally:
            self._leave(tab)
        return BrowserInfo(str(self._path), browser.version, self._sandboxed, fonts)

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await asyncio.gather(*self._leaving, return_exceptions=True)
        if self._browser is not None:
            try:
                await asyncio.wait_for(self._browser.close(), _CLOSE_WAIT_S)
            except Exception:  # noqa: BLE001 - whatever keeps it from closing, it must end
                self._kill()
        for folder in self._scratch:
            shutil.rmtree(folder, ignore_errors=True)


async def _fonts(tab: _Tab) -> dict[str, str]:
    families = ("sans-serif", "serif", "monospace")
    html = "".join(f"<p style='font-family:{name}'>Text</p>" for name in families)
    tab.job = _Job(PageSource(html))
    await tab.page.goto(tab.job.url)
    await tab.cdp.send("DOM.enable")
    await tab.cdp.send("CSS.enable")
    root = (await tab.cdp.send("DOM.getDocument"))["root"]["nodeId"]
    query = {"nodeId": root, "selector": "p"}
    found = {}
    nodes = (await tab.cdp.send("DOM.querySelectorAll", query))["nodeIds"]
    for name, node in zip(families, nodes, strict=True):
        used = await tab.cdp.send("CSS.getPlatformFontsForNode", {"nodeId": node})
        found[name] = ", ".join(font["familyName"] for font in used["fonts"])
    return found


def _view(screenshot: str, layout: dict[str, Any], page_height: int, job: _Job) -> View:
    png = base64.b64decode(screenshot)
    picture = picture_from_png(png)
    return View(
        picture=picture,
        png=png,
        lines=snapshot.lines_of(layout, picture.size),
        tree=snapshot.tree_of(layout),
        page_height=page_height,
        refused=job.refused,
        asked=tuple(sorted(job.asked)),
    )


def _first_line(error: Error) -> str:
    # What follows are pages of log.
    return one_line(str(error).partition("\n")[0], 160).removesuffix(".")
