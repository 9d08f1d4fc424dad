"""Lines of text and elements from the browser's own layout (CDP `DOMSnapshot.captureSnapshot`).

The browser tells where each piece of text was drawn, without a script in the page that the page
could deceive or that would need scripts to be on. Knows nothing about processes or pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from w2c_tui.web.view import Box, Color, Line, Tree

PARAMETERS = {"computedStyles": ["color", "visibility", "opacity"]}
"""Parameters of `captureSnapshot` that the functions below rely on."""

MAX_LINES, MAX_ELEMENTS = 5_000, 100_000
"""What of an endless page is looked at."""

_TEXT_FIELDS = frozenset(("text", "search", "email", "url", "tel", "number", "date", ""))
_BUTTONS = frozenset(("submit", "button", "reset"))
_MAX_GAP = 0.6
"""Pieces further apart than this share of their height are two lines, as text recognition has it:
a menu's entries, not the words of a sentence."""


class _Piece(NamedTuple):
    text: str
    left: float
    top: float
    right: float
    bottom: float
    color: Color | None
    is_field: bool = False


def lines_of(snapshot: dict[str, Any], size: tuple[int, int]) -> tuple[Line, ...]:
    """The lines of text that lie on a picture of `size` (width, height), in document order.

    Text is as drawn (after `text-transform`), white space collapsed; hidden and empty text, list
    marks and what lies outside of the picture are left out.
    """
    found: list[Line] = []
    run: list[_Piece] = []
    for piece in _pieces(snapshot["documents"][0], snapshot["strings"]):
        if run and not _goes_on(run[-1], piece):
            found += _line(run, size)
            run = []
            if len(found) >= MAX_LINES:
                break
        run.append(piece)
    found += _line(run, size)
    return tuple(found)


def tree_of(snapshot: dict[str, Any]) -> Tree:
    """The page's elements. What browsers add by themselves (html, head, body) is among them."""
    nodes, strings = snapshot["documents"][0]["nodes"], snapshot["strings"]
    tags: list[str] = []
    parents: list[int] = []
    number: dict[int, int] = {}
    pseudo = set(nodes.get("pseudoType", {}).get("index", ()))
    for at, (kind, parent) in enumerate(zip(nodes["nodeType"], nodes["parentIndex"], strict=True)):
        if kind != 1 or at in pseudo or len(tags) >= MAX_ELEMENTS:
            continue
        number[at] = len(tags)
        tags.append(strings[nodes["nodeName"][at]].lower())
        parents.append(number.get(parent, -1))
    return Tree(tuple(tags), tuple(parents))


def _pieces(document: dict[str, Any], strings: list[str]) -> Iterator[_Piece]:
    layout, boxes, nodes = document["layout"], document["textBoxes"], document["nodes"]
    by_layout: dict[int, list[int]] = {}
    for at, index in enumerate(boxes["layoutIndex"]):
        by_layout.setdefault(index, []).append(at)
    fields = _fields(nodes, strings)
    unseen = _unseen(document, strings)
    for index, node in enumerate(layout["nodeIndex"]):
        styles = layout["styles"][index]
        if index not in by_layout and node not in fields:
            continue
        color, visibility, _ = (strings[at] for at in styles)
        if visibility != "visible" or node in unseen:
            continue
        shade = _color(color)
        if node in fields:
            left, top, width, height = layout["bounds"][index]
            yield _Piece(fields[node], left, top, left + width, top + height, shade, True)
            continue
        text = strings[layout["text"][index]]
        for at in by_layout[index]:
            left, top, width, height = boxes["bounds"][at]
            # Offsets count UTF-16 units.
            part = _utf16_slice(text, boxes["start"][at], boxes["length"][at])
            yield _Piece(part, left, top, left + width, top + height, shade)


def _unseen(document: dict[str, Any], strings: list[str]) -> set[int]:
    """The nodes inside of elements that are fully transparent, as closed menus often are."""
    layout = document["layout"]
    found = {
        node
        for node, styles in zip(layout["nodeIndex"], layout["styles"], strict=True)
        if styles and strings[styles[2]] == "0"
    }
    # Parents come before their children.
    for node, parent in enumerate(document["nodes"]["parentIndex"]):
        if parent in found:
            found.add(node)
    return found


def _utf16_slice(text: str, start: int, length: int) -> str:
    if text.isascii():
        return text[start : start + length]
    units = text.encode("utf-16-le", "surrogatepass")[2 * start : 2 * (start + length)]
    return units.decode("utf-16-le", "replace")


def _fields(nodes: dict[str, Any], strings: list[str]) -> dict[int, str]:
    """What stands in form fields, which have no text of their own in the layout."""
    values = nodes.get("inputValue", {"index": [], "value": []})
    typed = dict(zip(values["index"], values["value"], strict=True))
    found = {}
    for at, name in enumerate(nodes["nodeName"]):
        if strings[name] != "INPUT":
            continue
        pairs = [strings[part] for part in nodes["attributes"][at]]
        attributes = dict(zip(pairs[::2], pairs[1::2], strict=True))
        kind = attributes.get("type", "").lower()
        text = strings[typed[at]] if typed.get(at, -1) >= 0 else attributes.get("value", "")
        if kind in _TEXT_FIELDS:
            text = text or attributes.get("placeholder", "")
        elif kind not in _BUTTONS:
            continue
        if text.strip():
            found[at] = text
    return found


def _goes_on(before: _Piece, piece: _Piece) -> bool:
    """Whether `piece` stands on the same line, as the next word."""
    height = min(before.bottom - before.top, piece.bottom - piece.top)
    shared = min(before.bottom, piece.bottom) - max(before.top, piece.top)
    gap = piece.left - before.right
    if before.is_field or piece.is_field:
        return False
    return height > 0 and shared >= 0.5 * height and -height <= gap <= _MAX_GAP * height


def _line(run: list[_Piece], size: tuple[int, int]) -> list[Line]:
    # Icon fonts draw private-use characters, which nobody reads.
    drawn = "".join(_joined(run))
    text = " ".join("".join(c if c.isprintable() else " " for c in drawn).split())
    if not any(character.isalnum() or character in "$€£¥+" for character in text):
        return []
    left, top = min(p.left for p in run), min(p.top for p in run)
    right, bottom = max(p.right for p in run), max(p.bottom for p in run)
    box: Box = (
        max(round(left), 0),
        max(round(top), 0),
        min(round(right), size[0]),
        min(round(bottom), size[1]),
    )
    if box[2] <= box[0] or box[3] <= box[1]:
        return []
    # The longest piece speaks for the line.
    longest = max(run, key=lambda piece: len(piece.text))
    return [Line(text, box, longest.color)]


def _joined(run: list[_Piece]) -> Iterator[str]:
    for before, piece in zip([None, *run], run, strict=False):
        if before is not None and piece.left - before.right > 1:
            yield " "
        yield piece.text


def _color(css: str) -> Color | None:
    """The colour of an opaque `rgb()`; None for all else, which is then read off the picture."""
    found = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", css)
    if found is None:
        return None
    red, green, blue = (int(number) for number in found.groups())
    return red, green, blue
