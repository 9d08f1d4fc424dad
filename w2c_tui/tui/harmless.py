"""The last thing that is done to a line before the terminal gets it: nothing in it steers.

Widgets make other people's text `printable`, which shows what was there. Here is what holds where
a widget of the library shows a text by itself: a file name in a tree, a page in an editor. Knows
nothing about widgets.
"""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from w2c_tui.core.printable import UNSAFE

# Inside of a line nothing may break it or jump on, either.
_unsafe = re.compile(rf"{UNSAFE.pattern}|[\t\n]")


class HarmlessLines(LineFilter):
    """Replaces what is not printable by as many cells as it takes, none for most of it."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        # Nearly all lines end here, at about half of what the search costs.
        if all(text.isprintable() or control for text, _, control in segments):
            return segments
        return [
            Segment(text if control else _unsafe.sub(_cells, text), style, control)
            for text, style, control in segments
        ]


def _cells(match: re.Match[str]) -> str:
    return "\ufffd" * cell_len(match[0])
