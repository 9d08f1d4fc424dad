"""What text recognition would say of a composed page, made from the browser's own lines.

The browser knows every line exactly and costs nothing extra; recognition takes seconds for a page.
So that a model does not learn to rely on exactness, the lines get the faults that `rapidocr` was
measured to make on such pages: neighbours joined, boxes too wide, now and then a letter wrong
(`python -m tests.bench.bench_page_text`). Owns the faults; the forms in which lines are put before
a model are `core.page_text` and `core.page_layout`, in training as in use.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from w2c_tui.core.conversation import TextLine

_ALIKE = {
    "0": "O",
    "O": "0",
    "l": "I",
    "I": "l",
    "1": "l",
    "S": "5",
    "5": "S",
    "B": "8",
    "o": "0",
    "e": "c",
    "c": "e",
    "n": "r",
    "i": "l",
    "é": "e",
    "ü": "u",
    "ö": "o",
    "ä": "a",
    "è": "e",
    "à": "a",
    "ç": "c",
    "ñ": "n",
    "ó": "o",
    "í": "i",
    ".": ",",
    "u": "v",
    "rn": "m",
}

MISSED, LOST_SPACE, WRONG_LETTER, LOST_STOP = 0.003, 0.004, 0.001, 0.01
"""Shares of lines not found, spaces left out, letters confused, final stops lost."""


def as_recognised(lines: Sequence[TextLine], rng: random.Random) -> tuple[TextLine, ...]:
    """`lines` with a recogniser's faults, in the same order."""
    found = _joined(lines, rng)
    return tuple(_faulty(line, rng) for line in found if rng.random() >= MISSED)


def _joined(lines: Sequence[TextLine], rng: random.Random) -> list[TextLine]:
    """Neighbours that are near each other become one line, as the entries of many menus do."""
    joined: list[TextLine] = []
    for line in lines:
        if joined and rng.random() < _share_joined(joined[-1], line):
            last = joined[-1]
            box = (
                last.box[0],
                min(last.box[1], line.box[1]),
                line.box[2],
                max(last.box[3], line.box[3]),
            )
            joined[-1] = msgspec.structs.replace(last, text=f"{last.text} {line.text}", box=box)
        else:
            joined.append(line)
    return joined


def _share_joined(one: TextLine, other: TextLine) -> float:
    height = min(line.box[3] - line.box[1] for line in (one, other))
    gap = (other.box[0] - one.box[2]) / max(height, 1)
    if gap < 0 or abs(one.box[1] - other.box[1]) > 0.3 * height or one.ground != other.ground:
        return 0.0
    return next((share for most, share in _JOINED if gap <= most), 0.0)


_JOINED = ((0.7, 0.95), (0.9, 0.75), (1.1, 0.25), (1.5, 0.2))
"""Gaps in heights of a line, and the share of neighbours at most that far apart that are joined."""


def _faulty(line: TextLine, rng: random.Random) -> TextLine:
    text = ""
    for letter in line.text:
        chance = rng.random()
        if letter == " " and chance < LOST_SPACE:
            continue
        text += _ALIKE.get(letter, letter) if chance < WRONG_LETTER else letter
    if text[-1:] == "." and rng.random() < LOST_STOP:
        text = text[:-1]
    left, top, right, bottom = line.box
    # A recogniser's boxes are wider than the ink; large lines of a browser have empty space above
    # and below that recognisers leave out.
    large = bottom - top >= 30
    above, below = ((-4, 8), (-8, 5)) if large else ((-7, -1), (1, 6))
    top = max(top + rng.randint(*above), 0)
    box = (
        max(left - rng.randint(3, 9), 0),
        top,
        right + rng.randint(2, 8),
        max(bottom + rng.randint(*below), top + 4),
    )
    score = round(rng.uniform(0.9, 1.0), 3)
    return TextLine(text=text or line.text, box=box, score=score, ink=line.ink, ground=line.ground)
