"""What a browser is shown of a page: closed, with images that exist, and what is said of it."""

from __future__ import annotations

import base64
import html
import io
import re
import time
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.core.pictures import encoded, picture
from w2c_tui.core.artifact import repaired
from w2c_tui.core.image import attachment_from_bytes
from w2c_tui.core.stand_in import LARGEST_PAGE, stand_in


def source_of(text: str) -> str:
    """The first image reference of a page."""
    found = re.search(r'(?:src|href|poster|background)="([^"]*)"', text, re.I)
    assert found is not None
    return html.unescape(found[1])


def cut_out(uri: str) -> Image.Image:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_page_with_nothing_missing_is_shown_as_it_is() -> None:
    page = (
        "<!DOCTYPE html>\r\n<html><body class='a'><p>1 < 2 &amp; 3</p>"
        '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw="><a href="other.html">x</a>'
        "<style>p { background: url(#paint) }</style></body></html>\n"
    )
    view = stand_in(page)
    assert view.html == page
    assert view.notes == ()


def test_what_is_left_open_is_closed_and_said() -> None:
    view = stand_in("<html><body><ul><li>one<li>tw")
    assert view.html == "<html><body><ul><li>one<li>tw</li></ul></body></html>"
    assert view.notes == ("The page ends early; its open tags are closed here.",)


@pytest.mark.parametrize(
    ("tag", "size"),
    [
        ('<img src="a.png" width="420" height="260">', ("420", "260")),
        ("<IMG SRC=a.png WIDTH=90>", ("90", "51")),
        ("<img height='18px' src='a.png'>", ("32", "18")),
        ('<img src="a.png" style="max-width: 5px; width: 64px; height:48.5px">', ("64", "48")),
        ('<img src="//cdn.example/a.png">', ("320", "180")),
        ('<img src="https://example.org/a.png" width="100%">', ("320", "180")),
        ('<img src="file:///etc/passwd">', ("320", "180")),
        ('<input type=image src="go.png" width=20 height=20>', ("20", "20")),
        ('<video poster="a.jpg" width="30" height="40"></video>', ("30", "40")),
        ('<svg><image href="a.png" width="30" height="40"/></svg>', ("30", "40")),
    ],
)
def test_an_image_that_does_not_exist_is_a_placeholder_of_its_size(tag, size) -> None:
    view = stand_in(tag)
    svg = unquote(source_of(view.html).removeprefix("data:image/svg+xml,"))
    assert re.search(r'<svg [^>]*width="(\d+)" height="(\d+)"', svg).groups() == size
    assert view.num_placeholders == 1
    assert view.notes == ("1 image does not exist, shown as a placeholder.",)


def test_a_placeholder_says_what_the_image_would_show() -> None:
    hostile = "A \"<b>logo</b>\" & 'more'"
    view = stand_in(f'<img src=x.png width=600 height=90 alt="{html.escape(hostile)}">')
    svg = unquote(source_of(view.html).removeprefix("data:image/svg+xml,"))
    assert html.escape(hostile) in svg
    assert "<b>" not in svg


def test_every_kind_of_reference_is_found_and_nothing_else_is_touched() -> None:
    page = (
        "<style>@import url(a.css); @font-face { src: url('f.woff2') }"
        " .a { background: #fff url( 'b.png' ) no-repeat }</style>"
        '<div style="color:red;background-image:url(c.png)">url(d.png)</div><!--<img src=e.png>-->'
        "<table background=f.png></table>"
        '<picture><source srcset="g.webp"><img src="h.png" srcset="i.png 2x" class="k"></picture>'
        "<textarea><img src=j.png></textarea>"
    )
    view = stand_in(page)
    assert view.num_placeholders == 4
    kept = (
        "a.css",
        "f.woff2",
        "url(d.png)",
        "<!--<img src=e.png>-->",
        "<img src=j.png>",
        "color:red",
    )
    for text in (*kept, 'class="k"', "no-repeat"):
        assert text in view.html, text
    for text in ("b.png", "c.png", "f.png", "g.webp", "h.png", "i.png"):
        assert text not in view.html, text


def test_scripts_and_style_sheets_are_counted_and_left_as_they_are() -> None:
    page = (
        "<link rel=stylesheet href=a.css><LINK REL='StyleSheet' href=b.css><link rel=icon href=c>"
        "<script src=d.js></script><script>'<script>'</script>"
    )
    view = stand_in(page)
    assert view.html == page
    assert (view.num_style_sheets, view.num_scripts) == (2, 2)


def test_images_that_exist_are_carried_along() -> None:
    data = encoded(picture(9, 6))
    asked = []

    def find(reference: str) -> bytes | None:
        asked.append(reference)
        return data if reference == "img/a.png" else b"<svg onload=alert(1)>"

    view = stand_in("<img src=' img/a.png '><img src=b.svg><img src=http://x/y.png>", find=find)
    assert asked == ["img/a.png", "b.svg"]
    assert cut_out(source_of(view.html)).size == (9, 6)
    assert view.num_placeholders == 2


def test_a_page_cannot_multiply_a_large_image_without_end() -> None:
    data = b"\x89PNG" + bytes(20_000_000)
    view = stand_in("<img src=a.png>" * 1000, find=lambda reference: data)
    assert len(view.html) < 100_000_000
    assert view.num_placeholders == 998


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ("10 20 40 70", (30, 50)),
        ("10,20,40,70", (30, 50)),
        ("[10, 20, 40, 70]", (30, 50)),
        ("0 0 0.5 0.25", (50, 20)),
        ("0 0 100 80", (100, 80)),
        ("40 20 10 70", None),
        ("10 20 40 700", None),
        ("10 20 40", None),
        ("a b c d", None),
        ("nan nan nan nan", None),
        ("-5 0 10 10", None),
    ],
)
def test_a_box_is_cut_out_of_the_screenshot_where_it_makes_sense(box, size) -> None:
    image = picture(100, 80)
    shot = attachment_from_bytes(encoded(image), "shot.png")
    page = f'<img src="logo.png" data-bbox="{box}">'
    view = stand_in(page, screenshot=shot)
    if size is None:
        assert (view.num_placeholders, view.num_cut_out) == (1, 0)
        return
    piece = cut_out(source_of(view.html))
    assert piece.size == size
    assert view.notes == ("1 image is cut out of the screenshot.",)
    left, top = (10, 20) if size == (30, 50) else (0, 0)
    box_px = (left, top, left + size[0], top + size[1])
    assert piece.tobytes() == image.crop(box_px).tobytes()
    # Without the screenshot a box is nothing to go by.
    assert stand_in(page).num_placeholders == 1


def test_a_page_too_large_to_be_read_is_shown_as_it_is() -> None:
    view = stand_in("<p>" * (LARGEST_PAGE // 3 + 1))
    assert view.html.startswith("<p><p>")
    assert "too large" in view.notes[0]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.sampled_from(
            [
                "<img",
                " src",
                "=",
                "'",
                '"',
                ">",
                "<style>",
                "url(",
                ")",
                " a.png",
                "</",
                "<!--",
                "x",
                " style=",
                "&#",
                "9" * 30,
                " data-bbox='1 2 3 4'",
                "\n",
                "<svg>",
                "/",
            ]
        ),
        max_size=30,
    ).map("".join)
)
def test_any_text_is_closed_as_repaired_does_it_and_stands_in_for_itself(text: str) -> None:
    if not re.search(r"src|url|background|style", text):
        assert stand_in(text).html == repaired(text)
    once = stand_in(text)
    assert stand_in(once.html).num_placeholders == 0


@pytest.mark.parametrize(
    "piece", ["<img src=a ", "url(", "<img src='", '<p style="url( ', "background= ", "url(\t\t\t"]
)
def test_a_view_takes_linear_time(piece: str) -> None:
    def seconds(length: int) -> float:
        began = time.process_time()
        stand_in("<style>" * (piece[0] == "u") + piece * (length // len(piece)))
        return time.process_time() - began

    short, long = 50_000, 800_000
    assert min(seconds(long) for _ in range(2)) < 16 * 6 * max(seconds(short), 0.002)
