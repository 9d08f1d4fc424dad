"""Short descriptions of composed pages: which blocks, where, in which colours.

What stage 1 learns to say of a picture, in about sixty tokens: colours first, as they are what text
hints cannot tell. Computed from the page's own HTML, structure and lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from trainer.pages.compose import Block
from trainer.pages.palette import Theme
from w2c_tui.core.colors import COLORS
from w2c_tui.core.conversation import TextLine


class _Seen(Protocol):
    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def html(self) -> str: ...

    @property
    def lines(self) -> Sequence[TextLine]: ...


def caption_of(theme: Theme, blocks: Sequence[Block], seen: _Seen) -> str:
    """One line for the page and one for each block: place, kind, colour, what is in it.

    Places are whole percent of the picture's height and width at which the first text of a block
    begins. Blocks whose text is not seen have no place.
    """
    others = [c for c in colors_of(seen.html) if c not in (theme.page, theme.text)]
    rows = [", ".join([f"page {theme.page}", f"text {theme.text}", *others])]
    at = 0
    for block in blocks:
        row = f"{block.kind} {block.color}" + (f", {block.detail}" if block.detail else "")
        found = _find(block.first_text, seen.lines, at)
        if found is not None:
            left, top = seen.lines[found].box[:2]
            row = f"{round(100 * top / seen.height)} {round(100 * left / seen.width)} {row}"
        rows.append(row)
    return "\n".join(rows)


_COLOR = re.compile(
    r"(?<=[: ])("
    + "|".join(sorted(map(re.escape, COLORS), key=len, reverse=True))
    + r")(?=[;}\" ])"
)


def colors_of(html: str) -> list[str]:
    """The colours that the styles of a composed page name, each once, in the order of the page."""
    styles = re.findall(r"<style>(.*?)</style>|style=\"(.*?)\"", html, re.DOTALL)
    return list(dict.fromkeys(c for pair in styles for part in pair for c in _COLOR.findall(part)))


def _find(text: str, lines: Sequence[TextLine], start: int) -> int | None:
    """The line with which `text` begins; lines may be parts of a longer text."""
    begun = " ".join(text.split())[:24].casefold()
    if not begun:
        return None
    for at in range(start, len(lines)):
        if lines[at].text.casefold().startswith(begun[: len(lines[at].text)]):
            return at
    return None
