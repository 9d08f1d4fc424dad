"""The text of a screenshot as a block in the prompt: which words stand where, and how large.

Owns the form in which recognised lines alone are put before a model, in training and in use alike,
so that every change here changes what trained models see (with the areas on which they lie:
`core.page_layout`), and how lines become paragraphs. Knows nothing about how lines are recognised,
about tokens or about templates.
"""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Sequence

import msgspec

from w2c_tui.core.colors import name_of
from w2c_tui.core.conversation import Attachment, Message, TextLine

HEADER = "Text on the page, {width} px wide, {height} px high (left top width size{colors} text):"
"""The first line of the block; the words in brackets name the columns below it."""
COLOR_COLUMNS = " ink ground"

MIN_WRAPPED_CHARS = 25
"""Shorter lines (menus, list items, table cells) are never taken for the start of a paragraph."""


WITHOUT_TEXT = (
    "was trained with the text of the page, and text recognition is not installed "
    "(pip install 'w2c-tui[ocr]'): it will make up words."
)
"""What is said of a model that has to do without."""


def recognises_text() -> bool:
    """Whether text recognition is installed."""
    return importlib.util.find_spec("rapidocr") is not None


def format_page_text(lines: Sequence[TextLine], image_size: tuple[int, int]) -> str:
    """The text block for a prompt: `HEADER`, then a line `left top width size text` for each.

    Where the colours of lines are known, `ink ground` stand before the text: the names in
    `core.colors` of the letters' colour and of what is behind them.

    `image_size` is (width, height) in pixels. `left`, `top` and `width` are whole percent of the
    image's *width* (so that one unit is the same length in both directions, as CSS `vw`, and a
    page of any height keeps its resolution); `size` is the height of a text line in per mille of
    the width. Lines that continue each other are joined into one paragraph, whose box is their
    common box. Order is kept: reading order in, reading order out. No lines: an empty string.

    Small numbers without punctuation are meant: Llama, Qwen and SmolLM2 tokenizers spend one token
    per digit, and a line costs about 12 tokens beside its text.
    """
    if not lines:
        return ""
    unit = max(image_size[0], 1) / 100
    colored = all(line.ink is not None and line.ground is not None for line in lines)
    colors = COLOR_COLUMNS if colored else ""
    rows = [HEADER.format(width=image_size[0], height=image_size[1], colors=colors)]
    for block in paragraphs(lines):
        left, top, right, _ = block.box
        numbers = (left / unit, top / unit, (right - left) / unit, block.size / unit * 10)
        row = [str(round(number)) for number in numbers]
        if colored and block.first.ink is not None and block.first.ground is not None:
            row += [name_of(block.first.ink), name_of(block.first.ground)]
        rows.append(" ".join([*row, block.text]))
    return "\n".join(rows)


def begun_page(image: Attachment) -> list[Message]:
    """A conversation that lets a small text-only model write down the page of `image`.

    For models that were not trained on pages. They cannot use positions, and begin to write only
    when shown how: the question gives the text alone, and the answer is begun with a head and the
    first lines, from where the model goes on. The page is then that beginning with what the model
    wrote. Measured on SmolLM2-135M: without the beginning it repeats itself without end.
    """
    blocks = [block.text for block in paragraphs(image.page_text or ())]
    title = html.escape(blocks[0] if blocks else image.name)
    begun = "".join(f"<p>{html.escape(text)}</p>\n" for text in blocks[:_NUM_BEGUN])
    question = "Write the HTML of this page. Keep the text and its order."
    return [
        # Empty on purpose: it keeps the chat template's own system text away.
        Message("system", ""),
        Message("user", "\n".join([question, "", *blocks])),
        Message("assistant", f"{_HEAD.format(title=title)}{begun}<p>"),
    ]


_NUM_BEGUN = 3
_HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 60rem; margin: 2rem auto; }}
</style>
</head>
<body>
"""


class TextBlock(msgspec.Struct):
    """Lines that continue each other; `last` is the lowest of them."""

    text: str
    box: tuple[int, int, int, int]
    first: TextLine
    last: TextLine
    size: int
    """Height of one text line in pixels."""
    num_lines: int = 1


def paragraphs(
    lines: Sequence[TextLine], *, large_px: int | None = None, most_apart: float = 0.35
) -> list[TextBlock]:
    """The lines joined into paragraphs, in the order of their first lines.

    Lines that are `large_px` high or higher are those of headings: there is no menu so large, so
    that they continue each other however short they are. `most_apart` is the largest distance
    between lines that continue each other, in heights of a line.
    """
    blocks: list[TextBlock] = []
    for line in lines:
        text = " ".join(line.text.split())
        if not text:
            continue
        # The latest blocks are the nearest above; two columns interleave in reading order.
        block = next(
            (b for b in reversed(blocks[-8:]) if _continues(b, line, large_px, most_apart)), None
        )
        if block is None:
            blocks.append(TextBlock(text, line.box, line, line, line.box[3] - line.box[1]))
            continue
        block.text += f" {text}"
        block.box = (
            min(block.box[0], line.box[0]),
            block.box[1],
            max(block.box[2], line.box[2]),
            max(block.box[3], line.box[3]),
        )
        block.last = line
        block.num_lines += 1
    return blocks


def _continues(block: TextBlock, line: TextLine, large_px: int | None, most_apart: float) -> bool:
    """Whether `line` looks like the next line of a wrapped paragraph that ends in `block.last`."""
    left, top, right, bottom = block.last.box
    height = line.box[3] - line.box[1]
    is_large = large_px is not None and block.size >= large_px
    return (
        (len(block.last.text) >= MIN_WRAPPED_CHARS or is_large)
        and abs(height - block.size) <= 0.2 * block.size
        and -0.4 * block.size <= line.box[1] - bottom <= most_apart * block.size
        # A line that was wrapped fills its paragraph; a longer one below it is another thing.
        and line.box[2] - line.box[0] <= 1.15 * (block.box[2] - block.box[0])
        and _alike(block.last, line)
        and (
            abs(line.box[0] - left) <= height
            or abs(line.box[0] + line.box[2] - left - right) <= 2 * height
        )
        and top < line.box[1]
    )


def _alike(one: TextLine, other: TextLine) -> bool:
    """Whether two lines have the same colours, as far as they are known."""
    pairs = ((one.ground, other.ground),)
    return all(a is None or b is None or name_of(a) == name_of(b) for a, b in pairs)
