"""What parts an answer has for the eye: prose, pages and other code.

Owns the division of raw text into blocks, also of an answer that is still being written. Knows
nothing about widgets. Blocks are offsets into the raw text; the lines of the fences belong to none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import msgspec

from w2c_tui.core.artifact import find_pages

_fence_line = re.compile(r"^[ \t]*(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)(?:\n|\Z)", re.M)
_opening = re.compile(r"[ \t]*(?:`{3,}|~{3,})[^`\n]*\n?\Z")
_closing = re.compile(r"\s*(?:`{3,}|~{3,})[ \t\r]*(?:\n|\Z)")
_may_become_code = re.compile(r"[ \t]*(?:[`~]{1,3}[^`]*|<.{0,300})\Z")


class Block(msgspec.Struct, frozen=True):
    """`text[start:end]` of an answer; `language` is a fence's, 'html' for pages."""

    kind: Literal["prose", "page", "code"]
    start: int
    end: int
    language: str = ""


def split(text: str, *, growing: bool = False) -> list[Block]:
    """The blocks of `text` in order. In a `growing` text the end that may yet turn out to be a
    fence or a page is left out, since prose that was shown is not easily taken back."""
    blocks: list[Block] = []
    position = 0
    for page in find_pages(text):
        before = text[position : page.start]
        if page.kind == "fenced":
            before = _opening.sub("", before)
        blocks += _outside(text, position, position + len(before))
        blocks.append(Block("page", page.start, page.end, "html"))
        position = page.end
        if closing := _closing.match(text, position):
            position = closing.end()
    end = len(text)
    if growing:
        last_line = max(position, text.rfind("\n", position) + 1)
        if _may_become_code.match(text, last_line):
            end = last_line
    blocks += _outside(text, position, end)
    return blocks


def _outside(text: str, start: int, end: int) -> Iterator[Block]:
    """Prose and fenced code between pages."""
    position = start
    while found := _fence_line.search(text, position, end):
        yield from _prose(text, position, found.start())
        fence = found["fence"]
        closing = re.compile(rf"^[ \t]*{fence[0]}{{{len(fence)},}}[ \t\r]*(?:\n|\Z)", re.M)
        close = closing.search(text, found.end(), end)
        stop = close.start() if close else end
        words = found["info"].split()
        yield Block("code", found.end(), stop, words[0].lower() if words else "")
        position = close.end() if close else end
    yield from _prose(text, position, end)


def _prose(text: str, start: int, end: int) -> Iterator[Block]:
    if text[start:end].strip():
        yield Block("prose", start, end)
