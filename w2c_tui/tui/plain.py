"""Everything that is drawn, in ASCII, for terminals and fonts that have nothing else.

Works on what is about to be shown, so that the frames, marks and scroll bars of Textual are covered
like our own words. Widths stay, and what is stored or copied is not touched.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

_MARKS = {
    **dict.fromkeys("─━┄┅┈┉═╌╍╴╶╸╺╼╾▔▀", "-"),
    **dict.fromkeys("│┃┆┇┊┋║╎╏╵╷╹╻╽╿▉▊▋▌▍▎▏▐▕", "|"),
    **dict.fromkeys("▁▂▃▄▅▆▇", "_"),
    **dict.fromkeys("█▓▒▙▛▜▟", "#"),
    **dict.fromkeys("•●◉▪■⭑★✱∙·⬤", "*"),
    **dict.fromkeys("○◦□▫░", "o"),
    **dict.fromkeys("–—―−‐‑‣", "-"),
    **dict.fromkeys("▼▾↓⌄", "v"),
    **dict.fromkeys("▲▴↑⌃", "^"),
    **dict.fromkeys("▶▸→›»", ">"),
    **dict.fromkeys("◀◂←‹«⏎⌫", "<"),
    **dict.fromkeys("‘’‚′", "'"),
    **dict.fromkeys("“”„″", '"'),
    **dict.fromkeys("✓✔✅", "+"),
    **dict.fromkeys("✗✘✖×", "x"),
    "…": ".",
    "🔎": "/",
    "\u00a0": " ",
}
KEYS = {"↑": "up", "↓": "down", "←": "left", "→": "right", "⏎": "enter", "⌫": "backspace"}
"""What Textual's signs for keys are called."""


class PlainAscii(LineFilter):
    """See the module."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [
            Segment(plain(text), style, control) if not text.isascii() else segment
            for segment in segments
            for text, style, control in [segment]
        ]


@lru_cache(4096)
def plain(text: str) -> str:
    """`text` in ASCII and as many cells wide."""
    return "".join(map(_plain_character, text))


@lru_cache(4096)
def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    width = cell_len(character)
    if not width:
        return ""
    found = _MARKS.get(character)
    if found is None and 0x2500 <= ord(character) < 0x2580:
        found = "+"
    if found is None:
        letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        found = letters[:width] or "?"
    return found.ljust(width)
