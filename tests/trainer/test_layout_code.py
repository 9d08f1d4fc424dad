"""Pages written with the numbers of their layout look like the pages that were laid out."""

from __future__ import annotations

import json

import pytest

from trainer.pages.layout_code import Elements, page_of, plain_element
from trainer.pages.write import (
    Plan,
    make_pages,
    read_pages,
    write_page_records,
    write_records,
)
from w2c_tui.core.config import RenderSettings
from w2c_tui.core.conversation import TextLine
from w2c_tui.core.errors import ConfigError
from w2c_tui.core.page_layout import HEADER, layout_of
from w2c_tui.web.render import PageSource, Renderer
from w2c_tui.web.score import compare

WHITE, DARK, NAVY, GREY = (255, 255, 255), (34, 34, 34), (0, 0, 128), (204, 204, 204)
SIZE = (800, 600)


def area(left: int, top: int, right: int, bottom: int, ground=WHITE, border=None, radius=0):
    return TextLine("", (left, top, right, bottom), ink=border, ground=ground, radius=radius)


def text(words: str, left: int, top: int, *, em: int = 16, ink=DARK) -> TextLine:
    box = (left, top, left + round(len(words) * em / 2), top + round(1.2 * em))
    return TextLine(words, box, ink=ink, ground=WHITE)


LINES = [
    area(0, 0, 800, 60, NAVY),
    *(text("Home", 24, 20, ink=WHITE), text("Blog & more", 80, 20, ink=WHITE)),
    text("Write to us", 24, 100, em=32),
    *(area(24, 160, 424, 200, WHITE, GREY, 8), text("Your name", 36, 170)),
    *(area(24, 220, 144, 256, NAVY, None, 8), text("Send", 68, 228, ink=WHITE)),
]
SOURCE = """<nav><a>Home</a><a>Blog &amp; more</a></nav><h1>Write to us</h1>
<form><input placeholder="Your name"><button>Send</button></form>"""


def written(lines: list[TextLine], source: str | None) -> list[str]:
    page = layout_of([area(0, 0, *SIZE), *lines], SIZE)
    element = plain_element if source is None else Elements(source)
    code = page_of(page, element, language="en", font="serif")
    return code.split("<body>\n")[1].split("\n</body>")[0].split("\n")


def test_elements_are_those_of_the_source_with_the_numbers_of_the_layout() -> None:
    assert written(LINES, SOURCE) == [
        '<nav style="height:60px;background:navy;color:white;padding:20px 0 0 24px">',
        '<div class="row" style="gap:24px">',
        "<a>Home</a>",
        "<a>Blog &amp; more</a>",
        "</div>",
        "</nav>",
        '<h1 style="margin-top:40px;margin-left:24px;font-size:32px">Write to us</h1>',
        '<input style="margin-top:22px;margin-left:24px;width:400px;height:40px;background:white;'
        'border:1px solid #ccc;border-radius:8px;padding-left:11px" placeholder="Your name">',
        '<button style="margin-top:20px;margin-left:24px;width:120px;height:36px;'
        'background:navy;color:white;border-radius:8px">Send</button>',
    ]


def test_paddings_begin_alike_with_and_without_a_left_one() -> None:
    box = area(0, 0, 800, 200, NAVY)
    assert 'padding:50px 0 0 24px">' in written([box, text("Home", 24, 50, ink=WHITE)], None)[0]
    centred = [box, text("Home", 384, 50, ink=WHITE)]
    assert 'padding:50px 0 0;text-align:center">' in written(centred, None)[0]
    two = [box, text("Home", 384, 50, ink=WHITE), text("Home and more", 348, 90, ink=WHITE)]
    assert written(two, None)[0].endswith(';padding:50px 0 0">')


def test_without_a_source_there_are_blocks() -> None:
    rows = written(LINES, None)
    assert not any(name in row for row in rows for name in ("<nav", "<h1", "<input", "<button"))
    assert sum("Send</div>" in row for row in rows) == 1


def test_fields_without_words_are_fields_where_the_page_has_such() -> None:
    field = [text("Name", 24, 20), area(24, 50, 424, 90, WHITE, GREY), area(24, 120, 70, 160, GREY)]
    rows = written(field, "<form><label>Name</label><input></form><div></div>")
    assert [row.split(" ")[0] for row in rows] == ["<label>Name</label>", "<input", "<div"]
    assert "<input" not in "".join(written(field, "<label>Name</label><div></div>"))


def test_what_was_read_wrongly_or_is_not_in_the_source_is_written_too() -> None:
    rows = written([text("Wrjte <to> us", 24, 20)], SOURCE)
    assert rows == ["<div>Wrjte &lt;to&gt; us</div>"]


def test_a_composed_page_looks_the_same_when_it_is_written_so(tmp_path) -> None:
    with Renderer(RenderSettings(timeout_s=120)) as renderer:
        plan = Plan(seed=5, widths=(1024,), inline_share=1.0)
        make_pages(tmp_path, plan, 4, renderer)
        write_records(tmp_path, plan, 4, "layout", "layout", {})
        records = json.loads((tmp_path / "pages.json").read_text("utf-8"))
        assert len(records) >= 3
        pages = sorted((m for m in read_pages(tmp_path) if m.image), key=lambda made: made.index)
        for made, record in zip(pages, records, strict=True):
            question, answer = (turn["value"] for turn in record["conversations"])
            assert HEADER in question
            original, again = (
                renderer.render(PageSource(code, None, "", made.width, made.height))
                for code in (made.html, answer)
            )
            found = compare(original, again).score
            assert found.score > 0.9, answer


def test_layouts_that_are_not_told_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be read off questions with text hints"):
        write_page_records(tmp_path, [], "text", "p", "layout")
