"""Sections cut out of a page with a style sheet: they stand alone and look as they did."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

from trainer.pages.real import MAX_CHARACTERS, TEMPLATES, _short, section_html, sections_of
from w2c_tui.core.config import RenderSettings
from w2c_tui.web.render import PageSource, Renderer, find_browser

PAGE = """<!DOCTYPE html><html><head><link rel="stylesheet" href="css/site.css"></head><body>
<section class="hero"><h2>A heading that is large</h2>
<p>Some words that explain what this page of a template shows to people.</p>
<a class="button" href="#"><i class="icon">\ue001</i>Sign up now</a>
<script>document.title = 'ran'</script></section>
<section class="list"><img src="photo.png" class="photo"><p>Other words stand beside a picture
in this section of the page.</p><p class="hidden">Nobody sees this text.</p></section>
<p class="long">WORDS</p></body></html>""".replace("WORDS", "Very many words. " * 300)
STYLE = """
body { margin: 0; font-family: serif; color: #334455 }
.hero { background: rgb(10, 20, 120); color: white; padding: 40px; text-align: center }
.button { display: inline-block; background: #e67e22; padding: 10px 30px; border-radius: 20px;
  color: white; text-decoration: none }
.list { display: flex; gap: 20px; padding: 30px; background: #eeeeee }
.photo { width: 200px; height: 120px } .hidden { display: none }
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("site")
    (root / "css").mkdir()
    (root / "index.html").write_text(PAGE, encoding="utf-8")
    (root / "css" / "site.css").write_text(STYLE, encoding="utf-8")
    picture = Image.new("RGB", (400, 240), "red")
    ImageDraw.Draw(picture).rectangle((50, 50, 100, 100), fill="blue")
    picture.save(root / "photo.png")
    return root


def test_sections_stand_alone_and_look_as_they_did(site: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox"], chromium_sandbox=False
        )
        sections = list(sections_of(browser, site / "index.html", site))
        browser.close()
    assert len(sections) == 2
    hero, listed = (section_html(section) for section in sections)
    for html in (hero, listed):
        assert len(html) < MAX_CHARACTERS + 300
        for gone in ("class=", "<script", "<link", "<img", "\ue001", "ran"):
            assert gone not in html.replace("transparent", "")
    assert "Nobody sees" not in listed
    assert "background:#0a1478" in hero
    with Renderer(RenderSettings(height=16)) as renderer:
        first, second = (
            renderer.render(PageSource(html, width=section["width"]))
            for html, section in zip((hero, listed), sections, strict=True)
        )
    # Height, colours and text are those of the page.
    for view, section in zip((first, second), sections, strict=True):
        assert abs(view.picture.height - section["height"]) <= 8
        assert view.picture.width == section["width"] == 1280
    assert first.picture.getpixel((5, 5)) == (10, 20, 120)
    assert next(line.text for line in first.lines or ()) == "A heading that is large"
    assert {color for _, color in first.picture.getcolors(100_000)} >= {(230, 126, 34)}
    assert second.picture.getpixel((5, 5)) == (238, 238, 238)
    # The picture became a grey box of its size.
    assert second.picture.getpixel((130, 90)) == (204, 204, 204)


@pytest.mark.parametrize(
    ("css", "expected"),
    [
        ("color: rgb(255, 255, 255); padding: 8px 16px;", "color:#fff;padding:8px 16px"),
        ("background-color: rgba(0, 0, 0, 0.5)", "background:#808080"),
        ("font-size: 14.4px", "font-size:14px"),
        (
            "border-width: 1px; border-style: solid; border-color: rgb(204, 204, 204)",
            "border:1px solid #ccc",
        ),
    ],
)
def test_declarations_are_written_shortly(css: str, expected: str) -> None:
    assert _short(css) == expected


def test_every_template_is_pinned() -> None:
    assert len({template.package for template in TEMPLATES}) == len(TEMPLATES) >= 8
    assert all(len(template.sha256) == 64 and template.version for template in TEMPLATES)
