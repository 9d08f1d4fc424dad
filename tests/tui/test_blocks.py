"""An answer as prose, pages and code; nothing of the raw text is lost or doubled."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2c_tui.core.printable import printable
from w2c_tui.tui.blocks import split

PAGE = "<!DOCTYPE html>\n<html><body><p>x</p></body></html>\n"


def parts(text, **options):
    return [(block.kind, text[block.start : block.end]) for block in split(text, **options)]


def test_prose_page_and_code_are_told_apart():
    text = f"Here:\n\n```html\n{PAGE}```\n\nAnd:\n\n~~~css\na {{}}\n~~~\nDone."
    assert parts(text) == [
        ("prose", "Here:\n\n"),
        ("page", PAGE),
        ("prose", "\nAnd:\n\n"),
        ("code", "a {}\n"),
        ("prose", "Done."),
    ]
    assert [block.language for block in split(text)] == ["", "html", "", "css", ""]


@pytest.mark.parametrize("text", ["", " \n ", "```", "```html", "Just words."])
def test_there_is_no_block_without_content(text):
    assert all(content.strip() for kind, content in parts(text) if kind == "prose")


def test_a_growing_text_shows_no_half_fence_and_nothing_is_taken_back():
    text = f"Here:\n\n```html\n{PAGE}```\nDone, and *that* is all.\n"
    shown = ""
    for end in range(len(text) + 1):
        prose = "".join(c for kind, c in parts(text[:end], growing=True) if kind == "prose")
        assert prose.startswith(shown.rstrip())
        assert "```" not in prose
        assert "<html" not in prose
        shown = prose
    assert parts(text, growing=True) == parts(text)


@given(
    st.lists(st.sampled_from(["```", "~~~", "html\n", "\n", "<html>", "</html>", "<p>", "word "]))
)
def test_blocks_are_in_order_and_do_not_overlap(pieces):
    text = "".join(pieces)
    end = 0
    for block in split(text):
        assert end <= block.start <= block.end <= len(text)
        end = block.end


@given(st.text())
def test_printable_text_steers_nothing(text):
    shown = printable(text)
    assert not any(ord(c) < 32 and c not in "\t\n" for c in shown)
    assert not any(127 <= ord(c) < 160 for c in shown)
    shown.encode()
    assert printable(shown) == shown
