"""The preview as a user meets it: a real server in a real headless Chromium."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from tests.core.pictures import encoded, picture
from tests.web.preview_page import PAGE, chromium, in_page, server, tab, until
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import W2CError
from w2c_tui.core.image import attachment_from_bytes
from w2c_tui.core.store import Store
from w2c_tui.core.versions import Versions, keep_answer
from w2c_tui.web import preview_sources as sources
from w2c_tui.web.preview import PreviewServer, Shown

__all__ = ["chromium", "server", "tab"]


@pytest.fixture
def shot() -> Attachment:
    return attachment_from_bytes(encoded(picture(1000, 1600)), "shot.png")


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    """Ends what follows a source on a thread."""
    event = threading.Event()
    yield event
    event.set()


# ── what a user sees ──────────────────────────────────────────────────────────────────────────


def test_the_page_is_shown_and_follows_what_is_pushed(server: PreviewServer, tab: Page) -> None:
    tab.goto(server.url)
    expect(in_page(tab).locator("h1")).to_have_text("Hello")
    expect(tab.locator("#status")).to_have_text("")
    for step in range(30):
        server.show(Shown(title="Writing it", html=PAGE.format(step), writing=True))
    expect(in_page(tab).locator("h1")).to_have_text("29")
    expect(tab.locator("#title")).to_have_text("Writing it")
    expect(tab.locator("#status")).to_have_text("Writing")


def test_an_update_keeps_the_place_and_changes_only_what_differs(
    server: PreviewServer, tab: Page
) -> None:
    tall = "<!DOCTYPE html><html><body><p>{}</p><p id=kept>kept</p><div style='height:4000px'>"
    server.show(Shown(title="t", html=tall.format("one")))
    tab.goto(server.url)
    expect(in_page(tab).locator("p").first).to_have_text("one")
    inner = tab.frames[1]
    inner.evaluate("() => { scrollTo(0, 900); document.getElementById('kept').mark = 1 }")
    server.show(Shown(title="t", html=tall.format("two") + "<p>more"))
    expect(in_page(tab).locator("p").first).to_have_text("two")
    assert inner.evaluate("[scrollY, document.getElementById('kept').mark]") == [900, 1]


def test_an_answer_is_shown_while_it_is_written(server: PreviewServer, tab: Page) -> None:
    server.show(Shown(title="t", answer="Sure, here is", writing=True))
    tab.goto(server.url)
    expect(tab.locator("#empty")).to_be_visible()
    answer = "Sure, here is\n```html\n<!DOCTYPE html><html><body><h1>Fir"
    server.show(Shown(title="t", answer=answer, writing=True))
    expect(in_page(tab).locator("h1")).to_have_text("Fir")
    expect(tab.locator("#empty")).to_be_hidden()
    expect(tab.locator("#notes")).to_have_text("")
    server.show(Shown(title="t", answer=answer))
    expect(tab.locator("#notes")).to_contain_text("closed here")


def test_a_page_without_a_doctype_is_laid_out_in_quirks_mode(
    server: PreviewServer, tab: Page
) -> None:
    tab.goto(server.url)
    expect(in_page(tab).locator("h1")).to_have_text("Hello")
    assert tab.frames[1].evaluate("document.compatMode") == "CSS1Compat"
    server.show(Shown(title="t", html="<h1>Old</h1>"))
    expect(in_page(tab).locator("h1")).to_have_text("Old")
    assert tab.frames[1].evaluate("document.compatMode") == "BackCompat"


def test_screenshot_and_page_stand_beside_and_over_each_other(
    server: PreviewServer, tab: Page, shot: Attachment
) -> None:
    tall = "<!DOCTYPE html><html><body style='margin:0'><div style='height:1600px'>"
    server.show(Shown(title="t", html=tall, original=shot))
    tab.goto(server.url)
    expect(tab.locator("#stage")).to_have_attribute("data-layout", "beside")
    expect(tab.locator("#page-size")).to_contain_text("1000 px")
    expect(in_page(tab).locator("div")).to_be_attached()
    image, frame = (tab.locator(name).bounding_box() for name in ("#original", "#frame"))
    assert image is not None
    assert frame is not None
    assert abs(image["width"] - frame["width"]) <= 1
    # They scroll together, by the same pixels.
    zoom = frame["width"] / 1000
    tab.frames[1].evaluate("scrollTo(0, 200)")
    top = "document.getElementById('original-view').scrollTop"
    until(lambda: abs(tab.evaluate(top) - 200 * zoom) <= 1)
    tab.evaluate(f"{top} = 50")
    until(lambda: abs(tab.frames[1].evaluate("scrollY") - 50 / zoom) <= 2)
    tab.keyboard.press("o")
    handle = tab.locator("#handle")
    expect(handle).to_have_attribute("aria-valuenow", "50")
    handle.focus()
    tab.keyboard.press("ArrowRight")
    expect(handle).to_have_attribute("aria-valuenow", "52")
    box, cover = handle.bounding_box(), tab.locator("#cover").bounding_box()
    assert box is not None
    assert cover is not None
    tab.mouse.move(box["x"] + 16, box["y"] + 40)
    tab.mouse.down()
    tab.mouse.move(cover["x"] + cover["width"] / 4, 400)
    tab.mouse.up()
    expect(handle).to_have_attribute("aria-valuenow", "25")
    tab.get_by_role("button", name="Phone").click()
    assert tab.frames[1].evaluate("innerWidth") == 390


def test_the_page_is_as_wide_as_the_device_and_lays_itself_out_for_it(
    server: PreviewServer, tab: Page, shot: Attachment
) -> None:
    html = (
        "<!DOCTYPE html><meta name=viewport content='width=device-width'><style>"
        "p::after { content: 'wide' } @media (max-width: 1100px) { p::after { content: 'middle' } }"
        "@media (max-width: 400px) { p::after { content: 'narrow' } }</style><p>"
    )
    seen = "[innerWidth, getComputedStyle(document.querySelector('p'), '::after').content]"
    server.show(Shown(title="t", html=html))
    tab.goto(server.url)
    expect(in_page(tab).locator("p")).to_be_attached()

    def widths(desktop: int) -> None:
        for key, name, width, layout in (
            ("2", "Tablet", 768, "middle"),
            ("3", "Phone", 390, "narrow"),
            ("1", "Desktop", desktop, "wide" if desktop > 1100 else "middle"),
        ):
            for choose in (
                lambda key=key: tab.keyboard.press(key),
                lambda name=name: tab.get_by_role("button", name=name).click(),
            ):
                choose()
                expect(tab.locator("#page-size")).to_contain_text(f"{width} px")
                until(lambda: tab.frames[1].evaluate(seen) == [width, f'"{layout}"'])  # noqa: B023
                frame = tab.locator("#frame").bounding_box()
                assert frame is not None
                # What does not fit is shown smaller, not cut.
                assert frame["x"] + frame["width"] <= 1200 + 1

    widths(1280)
    # A desktop is as wide as the screenshot.
    server.show(Shown(title="t", html=html, original=shot))
    expect(tab.locator("#layouts")).to_be_visible()
    widths(1000)


def test_versions_can_be_picked_and_the_one_in_sight_is_followed(
    server: PreviewServer, tab: Page, shot: Attachment, tmp_path: Path
) -> None:
    versions = Versions(tmp_path / "session")
    versions.add(PAGE.format("First"), original=shot, prompt="Build", model="tiny")
    versions.add(PAGE.format("Second"), origin="edit")
    shown = Shown(title="t", versions=versions)
    server.show(shown)
    tab.goto(server.url)
    expect(in_page(tab).locator("h1")).to_have_text("Second")
    expect(tab.locator("#facts")).to_contain_text("v002 from v001 · edit")
    expect(tab.locator("#layouts")).to_be_hidden()
    tab.get_by_role("button", name="Older version").click()
    expect(in_page(tab).locator("h1")).to_have_text("First")
    expect(tab.locator("#facts")).to_contain_text("“Build”")
    expect(tab.locator("#layouts")).to_be_visible()
    tab.reload()
    expect(in_page(tab).locator("h1")).to_have_text("Second")
    versions.undo()
    server.show(shown)
    expect(in_page(tab).locator("h1")).to_have_text("First")
    server.show(Shown(title="t", versions=versions, html=PAGE.format("Third"), writing=True))
    expect(in_page(tab).locator("h1")).to_have_text("Third")
    assert tab.evaluate("document.getElementById('version').selectedOptions[0].text") == (
        "being written"
    )


def test_another_session_takes_the_place_of_the_one_before(
    server: PreviewServer, tab: Page, shot: Attachment, tmp_path: Path
) -> None:
    small = attachment_from_bytes(encoded(picture(60, 40)), "small.png")
    for name, image in (("one", shot), ("two", small)):
        versions = Versions(tmp_path / name)
        for count in (1, 2):
            versions.add(PAGE.format(f"{name} {count}"), original=image)
    server.show(Shown(title="One", versions=Versions(tmp_path / "one")))
    tab.goto(server.url)
    tab.get_by_role("button", name="Older version").click()
    expect(in_page(tab).locator("h1")).to_have_text("one 1")
    expect(tab.locator("#original-size")).to_have_text("1000 × 1600 px")
    server.show(Shown(title="Two", versions=Versions(tmp_path / "two")))
    expect(in_page(tab).locator("h1")).to_have_text("two 2")
    expect(tab.locator("#original-size")).to_have_text("60 × 40 px")
    tab.get_by_role("button", name="Older version").click()
    expect(in_page(tab).locator("h1")).to_have_text("two 1")


def test_images_beside_the_page_are_shown_and_those_above_it_are_not(
    server: PreviewServer, tab: Page, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(picture(7, 5)))
    (tmp_path / "site" / "img").mkdir(parents=True)
    (tmp_path / "site" / "img" / "a b.png").write_bytes(encoded(picture(9, 6)))
    html = (
        "<!DOCTYPE html><img id=there src='img/a%20b.png?v=1'><img id=above src='../secret.png'>"
        "<img id=gone src=gone.jpg width=60 height=50>"
    )
    server.show(Shown(title="t", html=html, folder=tmp_path / "site"))
    tab.goto(server.url)
    expect(tab.locator("#notes")).to_contain_text("2 images do not exist")
    found = "[...document.images].map(i => [i.id, i.naturalWidth, i.naturalHeight])"
    expected = [["there", 9, 6], ["above", 320, 180], ["gone", 60, 50]]
    assert tab.frames[1].evaluate(found) == expected


def test_images_are_cut_out_of_the_screenshot_only_when_asked_for(tab: Page) -> None:
    image = picture(100, 80)
    shot = attachment_from_bytes(encoded(image), "shot.png")
    html = "<!DOCTYPE html><img src=logo.png data-bbox='10 20 40 70'>"
    size = "[document.images[0].naturalWidth, document.images[0].naturalHeight]"
    for cut_out, note, expected in (
        (True, "1 image is cut out", [30, 50]),
        (False, "1 image does not exist", [320, 180]),
    ):
        shown = Shown(title="t", html=html, original=shot)
        with PreviewServer(shown, cut_out=cut_out) as server:
            tab.goto(server.url)
            expect(tab.locator("#notes")).to_contain_text(note)
            assert tab.frames[1].evaluate(size) == expected


# ── sources ───────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_followed_through_any_way_of_saving(
    server: PreviewServer, tab: Page, tmp_path: Path, stop: threading.Event, shot: Attachment
) -> None:
    path = tmp_path / "page.html"
    path.write_text(PAGE.format("Disk"))
    (tmp_path / "page.png").write_bytes(shot.data)
    original = sources.screenshot_beside(path)
    server.show(sources.shown_file(path, original))
    thread = threading.Thread(
        target=sources.follow_file, args=(server.show, path, original), kwargs={"stop": stop}
    )
    thread.start()
    tab.goto(server.url)
    expect(in_page(tab).locator("h1")).to_have_text("Disk")
    expect(tab.locator("#stage")).to_have_attribute("data-layout", "beside")
    path.write_text(PAGE.format("Changed"))
    expect(in_page(tab).locator("h1")).to_have_text("Changed")
    other = tmp_path / "page.html.tmp"
    other.write_text(PAGE.format("Renamed"))
    other.rename(path)
    expect(in_page(tab).locator("h1")).to_have_text("Renamed")
    path.unlink()
    time.sleep(0.2)
    path.write_text(PAGE.format("Back"))
    expect(in_page(tab).locator("h1")).to_have_text("Back")
    stop.set()
    thread.join(5)
    assert not thread.is_alive()


def test_a_session_is_followed_while_another_window_writes_it(
    server: PreviewServer, tab: Page, tmp_path: Path, stop: threading.Event, shot: Attachment
) -> None:
    pages = tmp_path / "pages"
    with Store.open(tmp_path / "s.sqlite") as writer, Store.open(tmp_path / "s.sqlite") as reader:
        session = writer.create_session("My session").id
        writer.add_message(session, Message("user", "Build it", (shot,)))
        server.show(sources.shown_session(reader, session, pages))
        thread = threading.Thread(
            target=sources.follow_session,
            args=(server.show, reader, session, pages),
            kwargs={"stop": stop},
        )
        thread.start()
        tab.goto(server.url)
        expect(tab.locator("#title")).to_have_text("My session")
        expect(tab.locator("#empty")).to_be_visible()
        answer = writer.begin_answer(session)
        answer.append("```html\n<!DOCTYPE html><html><body><h1>Half")
        expect(in_page(tab).locator("h1")).to_have_text("Half")
        expect(tab.locator("#status")).to_have_text("Writing")
        answer.append(" and whole</h1></body></html>\n```")
        answer.finish()
        keep_answer(writer, answer.message_id, pages)
        expect(in_page(tab).locator("h1")).to_have_text("Half and whole")
        expect(tab.locator("#facts")).to_contain_text("v001")
        expect(tab.locator("#status")).to_have_text("")
        stop.set()
        thread.join(5)
        assert not thread.is_alive()


def test_the_screenshot_of_a_page_is_found_beside_it(tmp_path: Path, shot: Attachment) -> None:
    version = Versions(tmp_path).add(PAGE, original=shot)
    assert sources.screenshot_beside(version.html_path) == attachment_from_bytes(
        shot.data, "original.png", str(version.original_path)
    )
    (tmp_path / "a.webp").write_bytes(encoded(picture(), "WEBP"))
    beside = sources.screenshot_beside(tmp_path / "a.html")
    assert beside is not None
    assert beside.name == "a.webp"
    assert sources.screenshot_beside(tmp_path / "b.html") is None


def test_a_page_too_large_for_a_preview_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "huge.html"
    with path.open("wb") as file:
        file.truncate(sources.LARGEST_FILE_BYTES + 1)
    with pytest.raises(W2CError, match="too large"):
        sources.shown_file(path)
    with pytest.raises(W2CError, match=r"missing\.html"):
        sources.shown_file(tmp_path / "missing.html")


# ── the server ────────────────────────────────────────────────────────────────────────────────


def get(server: PreviewServer, path: str | None = None, **headers: str) -> tuple[int, str]:
    """Status and body; of a redirect, where it leads."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET", urlsplit(server.url).path if path is None else path, headers=named)
    reply = connection.getresponse()
    body = reply.read().decode()
    connection.close()
    return reply.status, reply.headers.get("location") or body


def test_only_requests_that_name_this_server_are_answered(server: PreviewServer) -> None:
    own = f"127.0.0.1:{server.port}"
    page = urlsplit(server.url).path + "page"
    assert get(server)[0] == 200
    assert get(server, Host=f"localhost:{server.port}")[0] == 200
    # Through an SSH tunnel the port is another one.
    assert get(server, Host="127.0.0.1:9000")[0] == 200
    assert get(server, page, Origin=f"http://{own}", Sec_Fetch_Site="same-origin")[0] == 200
    wrong: dict[str, str]
    for wrong in (
        {"Host": f"evil.example:{server.port}"},
        {"Host": f"127.0.0.1.evil.example:{server.port}"},
        {"Host": f"127.0.0.1:{server.port}@evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"https://{own}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ):
        assert get(server, page, **wrong) == (404, "Not found"), wrong
    for path in ("/", "/page", "/x/page", "/x/", page[:-6] + "x/page"):
        assert get(server, path) == (404, "Not found"), path
    assert len(urlsplit(server.url).path.strip("/")) >= 32
    assert urlsplit(PreviewServer().url).path != urlsplit(server.url).path


def test_requests_that_are_no_pages_are_refused_without_a_word(
    server: PreviewServer, caplog: pytest.LogCaptureFixture
) -> None:
    path = urlsplit(server.url).path
    for line in (
        "OPTIONS *",
        f"POST {path}",
        f"GET http://evil.example{path}",
        f"DELETE {path}page",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            request = f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 404"), line
    assert caplog.records == []


def test_the_address_for_the_command_line_works_once(server: PreviewServer) -> None:
    path = urlsplit(server.open_url).path
    assert get(server, "/open/guess")[0] == 404
    assert get(server, path) == (303, urlsplit(server.url).path)
    assert get(server, path)[0] == 404
    again = urlsplit(server.open_url).path
    assert again != path
    assert get(server, again)[0] == 303


def test_only_loopback_listens(server: PreviewServer) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing; asks which address this machine has towards others.
        probe.connect(("192.0.2.1", 9))
        outside = probe.getsockname()[0]
    if outside.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((outside, server.port), timeout=2)


def test_a_port_in_use_is_said_and_a_closed_server_frees_its_own(server: PreviewServer) -> None:
    with pytest.raises(W2CError, match=str(server.port)) as caught:
        PreviewServer(port=server.port).start()
    assert "--port" in caught.value.hint
    # A browser that listens does not keep it from closing.
    with socket.create_connection(("127.0.0.1", server.port)) as events:
        path = urlsplit(server.url).path
        events.sendall(f"GET {path}events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert b"text/event-stream" in events.recv(4096)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 10
    assert not any(thread.name == "preview" for thread in threading.enumerate())
    with PreviewServer(port=server.port) as again:
        assert get(again)[0] == 200


def test_what_is_missing_is_missing_and_no_failure(server: PreviewServer, tmp_path: Path) -> None:
    base = urlsplit(server.url).path
    server.show(Shown(title="t", versions=Versions(tmp_path)))
    for path in ("page?version=1", "page?version=x", "page?version=../1", "original?version=1"):
        assert get(server, base + path)[0] == 404, path
    assert get(server, base + "original")[0] == 404
    assert get(server, base + "preview.py")[0] == 404
