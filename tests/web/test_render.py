"""Rendering in a real browser: what is on the picture, what a page cannot do, what is left over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from PIL import Image

from tests.web.pages import shop
from w2c_tui.core.config import RenderSettings
from w2c_tui.core.errors import BrowserNotFoundError, RenderError
from w2c_tui.core.stand_in import stand_in
from w2c_tui.web.render import PageSource, Renderer, find_browser, window_for


def page(html: str, **fields) -> PageSource:
    return PageSource(f"<!DOCTYPE html><meta charset=utf-8>{html}", **fields)


def text_of(view) -> list[str]:
    return [line.text for line in view.lines]


def test_two_renders_of_a_page_are_the_same_to_the_pixel(renderer):
    moving = (
        "<style>@keyframes a{from{opacity:0}to{opacity:1}} p{animation:a 5s} b{animation:a 1s "
        "infinite} i{transition:all 9s}</style><p>fades in <b>blinks</b> <i>rests</i>"
        "<marquee>runs along</marquee><input autofocus value='caret'>"
    )
    for source in (page(moving), PageSource(shop())):
        first, *others = renderer.render_all([source] * 4)
        assert all(view.picture.tobytes() == first.picture.tobytes() for view in others)
        assert all(view.lines == first.lines and view.tree == first.tree for view in others)
    # What fades in is shown as it ends.
    assert "fades in blinks rests" in text_of(renderer.render(page(moving)))


def test_the_whole_page_or_one_window(renderer):
    tall = page("<body style='margin:0;background:#00f'><div style='height:3000px'>top</div>end")
    whole = renderer.render(tall)
    assert whole.picture.size[0] == 1280
    assert whole.picture.height == whole.page_height > 3000
    assert not whole.is_cut
    assert whole.picture.getpixel((640, 2900)) == (0, 0, 255)
    window = renderer.render(tall, full_page=False)
    assert window.picture.size == (1280, 800)
    assert window.is_cut
    narrow = renderer.render(page("<p>narrow", width=390))
    assert narrow.picture.width == 390


def test_lines_say_what_is_drawn_and_where(renderer):
    view = renderer.render(
        page(
            "<body style='margin:0;font:20px/30px sans-serif'>"
            "<div style='position:absolute;left:100px;top:60px;color:#c00'>One <b>two</b> three"
            "</div><div style='position:absolute;left:100px;top:120px;width:120px'>words that wrap"
            " here</div>"
            "<nav style='position:absolute;left:500px;top:60px'>Home<span style='margin:0 40px'>"
            "Shop</span>About</nav><p style='text-transform:uppercase'>shout"
            "<p style='visibility:hidden'>hidden<div style='opacity:0'><p>faint</p></div>"
            "<script>no</script>"
            "<p style='position:absolute;left:-900px'>outside</p>"
            "<input value='typed' style='position:absolute;top:300px'>日本語 🎉 naïve"
        )
    )
    lines = {line.text: line for line in view.lines}
    assert lines["One two three"].color == (204, 0, 0)
    left, top, right, bottom = lines["One two three"].box
    assert left == 100
    assert 58 < top < bottom < 92
    assert 190 < right < 280
    assert {"words that", "wrap here"} <= lines.keys()
    assert {"Home", "Shop", "About", "SHOUT", "typed", "日本語 🎉 naïve"} <= lines.keys()
    assert not {"hidden", "faint", "outside", "no"} & lines.keys()


def test_elements_of_the_page(renderer):
    tree = renderer.render(page("<body><ul><li>a<li>b</ul>")).tree
    assert tree.tags == ("html", "head", "meta", "body", "ul", "li", "li")
    assert [tree.tags[p] if p >= 0 else "" for p in tree.parents[4:]] == ["body", "ul", "ul"]


def test_bytes_are_decoded_as_the_page_says(renderer):
    text = '<!DOCTYPE html><meta charset="iso-8859-1"><p>Caf\u00e9 M\u00fcller'
    assert text_of(renderer.render(PageSource(text.encode("latin-1")))) == ["Café Müller"]


def test_a_page_gets_files_of_its_folder_and_nothing_above(renderer, tmp_path):
    site = tmp_path / "site"
    (site / "css").mkdir(parents=True)
    (site / "css" / "main.css").write_text("body { background: #0a0; margin: 0 }")
    Image.new("RGB", (50, 50), "#f00").save(site / "red.png")
    (tmp_path / "secret.css").write_text("body { background: #00f !important }")
    (site / "link.css").symlink_to(tmp_path / "secret.css")
    view = renderer.render(
        page(
            "<link rel=stylesheet href='css/main.css'><link rel=stylesheet href='../secret.css'>"
            "<link rel=stylesheet href='link.css'><link rel=stylesheet href='%2e%2e/secret.css'>"
            f"<link rel=stylesheet href='file://{tmp_path}/secret.css'>"
            f"<iframe src='file://{tmp_path}/secret.css'></iframe><img src='/red.png'>",
            folder=site,
        )
    )
    assert view.picture.getpixel((1200, 700)) == (0, 170, 0)
    colors = {color for _, color in view.picture.getcolors(1 << 20)}
    assert (255, 0, 0) in colors
    assert view.refused >= 2


def test_pictures_that_are_not_there_are_grey(renderer):
    view = renderer.render(
        page("<body style='margin:0'><img src='https://example.org/a.jpg' width=200 height=100>")
    )
    assert view.picture.getpixel((100, 50)) == (229, 231, 235)
    assert view.refused == 1


def test_a_missing_picture_looks_the_same_with_and_without_a_stand_in(renderer):
    html = (
        "<body style='margin:0'><img src=a.png><img src=b.png width=90><img src=c.png height=40>"
        "<img src=d.png width=50 height=70 alt='some words'><img src=e.png style='width:60px'>"
        "<div style='height:60px;background:url(f.png)'></div><input type=image src=g.png>"
        "<style>.fluid { max-width: 100%; height: auto } .own { width: auto; height: auto }</style>"
        "<img class=fluid src='im Ü/h.png?a=1&amp;b=2#c' width=300 height=300>"
        "<img class=fluid src='https://example.org/i.png' width=2000 height=400>"
        "<img class=own src=j.png height=90>"
    )
    replaced = stand_in(html, labels=False)
    assert replaced.num_placeholders == 10
    plain, stood_in = renderer.render_all([page(html), page(replaced.html)])
    assert (plain.refused, stood_in.refused) == (10, 0)
    assert plain.picture.tobytes() == stood_in.picture.tobytes()


def test_a_missing_picture_keeps_the_proportions_that_its_tag_names(renderer):
    view = renderer.render(
        page(
            "<style>* { margin: 0 } img { width: 100px; height: auto; display: block }</style>"
            "<img src=a.png width=300 height=600>"
        )
    )
    assert view.picture.getpixel((50, 190)) == (229, 231, 235)
    assert view.picture.getpixel((50, 210)) == (255, 255, 255)


@contextlib.contextmanager
def listening():
    """A server on loopback that counts who connects."""
    met = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        stop = threading.Event()

        def accept():
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    met.append(connection.recv(200) if not connection.settimeout(0.5) else b"")
                    connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1], met
        finally:
            time.sleep(0.3)
            stop.set()
            thread.join()


@pytest.mark.parametrize("javascript", [False, True])
def test_nothing_of_a_page_reaches_the_network(browser_path, javascript):
    with listening() as (port, met):
        at = f"127.0.0.1:{port}"
        tags = "".join(
            f"<link rel={rel} href='http://{at}/{rel}'>"
            for rel in ("stylesheet", "preconnect", "dns-prefetch", "prefetch", "icon", "preload")
        )
        html = (
            f"<meta http-equiv=refresh content='0;url=http://{at}/refresh'>{tags}"
            f"<img src='http://{at}/img'><iframe src='http://{at}/frame'></iframe>"
            f"<object data='http://{at}/object'></object><video src='http://{at}/video'></video>"
            f"<style>@import 'http://{at}/import'; @font-face {{font-family:f; "
            f"src:url(http://{at}/font)}} p {{font-family:f; background:url(http://{at}/bg)}}</style>"
            "<p>still here</p><script>"
            f"fetch('http://{at}/fetch').catch(()=>0); navigator.sendBeacon('http://{at}/beacon');"
            f"new WebSocket('ws://{at}/ws'); new EventSource('http://{at}/events');"
            f"try {{ new RTCPeerConnection({{iceServers:[{{urls:'stun:{at}'}}]}})"
            ".createDataChannel('x') } catch {}"
            f"setTimeout(() => location = 'http://{at}/gone', 1)</script>"
        )
        with Renderer(RenderSettings(tabs=1, javascript=javascript)) as renderer:
            view = renderer.render(page(html))
            assert "still here" in text_of(view)
            assert renderer.render(page("<p>next")).lines[0].text == "next"
    assert met == []
    assert view.refused >= 5


def test_scripts_run_only_when_asked(renderer, browser_path):
    html = "<p id=a>plain</p><script>a.textContent = 'scripted'</script><noscript>off</noscript>"
    assert text_of(renderer.render(page(html))) == ["plain", "off"]
    with Renderer(RenderSettings(tabs=1, javascript=True)) as scripted:
        assert text_of(scripted.render(page(html))) == ["scripted"]


def test_a_page_that_does_not_end_costs_only_itself(browser_path):
    with Renderer(RenderSettings(tabs=2, javascript=True, timeout_s=8)) as renderer:
        loop, good = page("<script>for(;;);</script>", name="loop"), page("<p>fine")
        outcomes = list(renderer.render_all([good, loop, good, good]))
        assert isinstance(outcomes[1], RenderError)
        assert "loop" in outcomes[1].message
        assert "8 s" in outcomes[1].message
        assert all(text_of(outcomes[at]) == ["fine"] for at in (0, 2, 3))


def test_a_page_that_takes_too_much_memory_is_ended(browser_path):
    with Renderer(RenderSettings(tabs=1, javascript=True, memory_mib=400)) as renderer:
        renderer.render(page("<p>warm"))
        hungry = "<script>a=[];for(;;)a.push(new Array(1e5).fill(Math.random()))</script>"
        with pytest.raises(RenderError, match=r"400 MiB|crashed its tab"):
            renderer.render(page(hungry))
        assert text_of(renderer.render(page("<p>after"))) == ["after"]


def test_a_huge_page_is_cut_or_refused(renderer, browser_path):
    with pytest.raises(RenderError, match="31 MB"):
        renderer.render(PageSource("x" * 31_000_000))
    with Renderer(RenderSettings(tabs=1, max_page_height=1000)) as short:
        view = short.render(page("<div style='height:90000px'>long"))
        assert view.picture.size == (1280, 1000)
        assert view.page_height > 90_000
        assert view.is_cut


def browsers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            named = any(name in command[0] for name in ("chrom", "msedge")) if command else False
            if named and not any(argument.startswith("--type=") for argument in command):
                found.append(process)
    return found


def scratch() -> set[str]:
    marks = ("playwright", "w2c-render")
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(marks)}


def test_a_crashed_browser_is_started_again_and_leaves_nothing_behind(browser_path):
    already, others = scratch(), {process.pid for process in browsers()}
    with Renderer(RenderSettings(tabs=2)) as renderer:
        renderer.render(page("<p>one"))
        waiting = [renderer.submit(PageSource(shop())) for _ in range(4)]
        for process in browsers():
            if process.pid not in others:
                process.send_signal(signal.SIGKILL)
        assert all(text_of(future.result())[0] == "Northwind" for future in waiting)
    assert {process.pid for process in browsers()} == others
    assert scratch() - already == set()
    with pytest.raises(RenderError, match="closed"):
        renderer.render(page("late"))


def test_killing_the_program_ends_its_browser(browser_path, tmp_path):
    program = (
        "import time\nfrom w2c_tui.web.render import PageSource, Renderer\n"
        "renderer = Renderer()\nrenderer.render(PageSource('<p>x'))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 2
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []


def test_many_pages_come_in_order(renderer):
    pages = (page(f"<p>number {number}") for number in range(20))
    for number, view in enumerate(renderer.render_all(pages)):
        assert text_of(view) == [f"number {number}"]


def test_which_browser_is_found(browser_path, tmp_path, monkeypatch):
    assert find_browser(str(browser_path)) == browser_path
    with pytest.raises(BrowserNotFoundError, match="no-such-browser") as caught:
        find_browser("no-such-browser")
    assert "[render] browser" in caught.value.hint
    named = tmp_path / "chromium"
    named.write_text("#!/bin/sh\n")
    named.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_browser() == named
    named.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    with Renderer(RenderSettings(browser=str(named))) as broken, pytest.raises(RenderError):
        broken.render(page("x"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr("w2c_tui.machine.sys.platform", "linux")
    with pytest.raises(BrowserNotFoundError) as caught:
        Renderer().render(page("x"))
    assert "install" in caught.value.hint.lower()


def test_what_the_pictures_depend_on_is_told(renderer, browser_path):
    info = renderer.info()
    assert info.path == str(browser_path)
    assert int(info.version.split(".")[0]) > 100
    assert set(info.fonts) == {"sans-serif", "serif", "monospace"}
    assert all(info.fonts.values())
    assert msgspec.json.encode(info)


def test_a_window_like_that_of_a_screenshot():
    settings = RenderSettings(width=1000, height=700)
    expected = {
        (375, 812): (375, 812),
        (1440, 900): (1440, 900),
        (1280, 400): (1280, 400),
        # Of a dense screen, and a small picture of a page.
        (2880, 1800): (1000, 625),
        (60, 30): (1000, 500),
        # Of whole pages.
        (1280, 5000): (1280, 700),
        (100, 9000): (1000, 700),
        (9000, 1): (1000, 1),
    }
    assert {size: window_for(size, settings) for size in expected} == expected


@pytest.mark.parametrize("page_height", [240, 400, 900])
def test_a_page_shorter_or_longer_than_the_screenshot_is_not_padded(renderer, page_height):
    html = f"<body style='margin:0'><main style='height:{page_height}px;background:#06c'>Text"
    width, height = window_for((500, 400), renderer.settings)
    view = renderer.render(page(html, width=width, height=height))
    # The window is 800 px high by default, and half of the picture would be blank.
    assert view.picture.size == (500, max(page_height, 400))
    assert view.page_height == view.picture.height
    assert view.picture.getpixel((499, page_height - 1)) == (0, 102, 204)
    assert renderer.render(page(html, width=width), full_page=False).picture.size == (500, 800)
    window = renderer.render(page(html, width=width, height=height), full_page=False)
    assert window.picture.size == (500, 400)


def test_a_page_that_fills_its_window_fills_that_of_a_long_screenshot_once(renderer):
    width, height = window_for((900, 3000), renderer.settings)
    html = "<body style='margin:0'><header style='height:100vh'>Hero</header><p>Below"
    (below,) = (
        line
        for line in renderer.render(page(html, width=width, height=height)).lines
        if line.text == "Below"
    )
    assert 800 <= below.box[1] < 850


def test_the_command_writes_pictures(browser_path, tmp_path):
    (tmp_path / "one.html").write_text(shop())
    (tmp_path / "two.html").write_text("<p>two")

    def w2c(*arguments, **options):
        return subprocess.run(
            [sys.executable, "-m", "w2c_tui.cli", *map(str, arguments)],
            capture_output=True,
            check=False,
            timeout=120,
            cwd=tmp_path,
            **options,
        )

    done = w2c("render", "one.html", "two.html", "missing.html")
    assert done.returncode == 1
    assert b"missing.html cannot be read" in done.stderr
    done = w2c("render", "one.html", "two.html", "--out", "pictures", "--width", 600)
    assert done.returncode == 0, done.stderr
    for name in ("one.png", "two.png"):
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert picture.size == (600, 800)
    done = w2c("render", "-", "--out", "-", "--full-page", input=shop().encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\x89PNG")
    assert Path(tmp_path / "one.png").exists() is False
