"""Kept views: when one is taken again, and when the page is rendered anew."""

from __future__ import annotations

import os

import msgspec
from PIL import Image

from w2c_tui.web.render import PageSource, Renderer
from w2c_tui.web.render_cache import RenderCache


def test_a_page_is_rendered_again_only_when_something_changed(renderer, tmp_path):
    folder = tmp_path / "page"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    page = PageSource(
        "<h1>Title</h1><p>Some text</p><img src='a.png'><img src='b.png'>", folder, width=400
    )
    first = RenderCache(tmp_path / "kept", renderer)
    made = first.render(page)
    assert made.asked == ("a.png", "b.png")

    again = RenderCache(tmp_path / "kept", renderer)
    found = again.render(msgspec.structs.replace(page, name="other name"))
    assert again.num_found == 1
    assert found.picture.tobytes() == made.picture.tobytes()
    for field in ("lines", "tree", "page_height", "refused", "asked"):
        assert getattr(found, field) == getattr(made, field)

    def is_new(changed: PageSource) -> bool:
        before = again.num_found
        again.render(changed)
        return again.num_found == before

    assert is_new(msgspec.structs.replace(page, width=500))
    assert is_new(msgspec.structs.replace(page, html=page.html + "<p>more"))
    assert not is_new(page)
    Image.new("RGB", (40, 30), "blue").save(folder / "a.png")
    assert is_new(page)
    assert not is_new(page)
    # A file that was missing and now is there.
    Image.new("RGB", (40, 30), "green").save(folder / "b.png")
    assert is_new(page)


def test_damaged_views_are_made_again_and_the_oldest_are_removed(renderer, tmp_path):
    cache = RenderCache(tmp_path, renderer)
    for number in range(3):
        cache.render(PageSource(f"<p>{number}", width=320))
        newest = max(tmp_path.glob("*.view"), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1000 * number, 1000 * number))
    oldest, middle, newest = sorted(tmp_path.glob("*.view"), key=lambda p: p.stat().st_mtime_ns)
    cache.trim(middle.stat().st_size + newest.stat().st_size)
    assert set(tmp_path.glob("*.view")) == {middle, newest}
    assert oldest not in tmp_path.glob("*.view")
    newest.write_bytes(newest.read_bytes()[:-100])
    made = cache.render(PageSource("<p>2", width=320))
    assert cache.num_found == 0
    assert made.lines is not None


def test_pages_with_scripts_are_not_kept(tmp_path, renderer):
    settings = msgspec.structs.replace(renderer.settings, javascript=True)
    with Renderer(settings) as scripted:
        cache = RenderCache(tmp_path, scripted)
        cache.render(PageSource("<p>Text", width=320))
    assert not list(tmp_path.iterdir())
