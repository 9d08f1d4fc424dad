"""Areas of one colour on a screenshot: bands, cards, buttons, fields, pictures' place holders.

Owns how they are found, by connected pixels of one colour, and where exactly recognised lines are,
by their ink. Knows nothing about recognition and nothing about prompts;
what is made of lines and areas is `core.page_layout`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from w2c_tui.core.colors import RGB
from w2c_tui.core.conversation import Hints, TextLine
from w2c_tui.core.page_layout import LINE_HEIGHT
from w2c_tui.models.page_text import read_page_text, with_colors

Box = tuple[int, int, int, int]

MAX_COLORS = 16
"""Colours whose areas are looked for, the commonest first; photos have too many to be areas."""

MIN_SHARE = 0.0004
"""Of the page, that a colour covers at least."""

MAX_WIDTH_PX = 2000
"""Wider screenshots are looked at with every second, third, ... pixel."""

MIN_SIDE_PX, MIN_THIN_PX = 12, 3
"""Sides of the smallest area; of stripes the shorter one, where the other is `MIN_STRIPE_PX`."""
MIN_STRIPE_PX = 48

MIN_FILLED, MIN_EDGE = 0.7, 0.7
"""An area fills its box by the first share, or runs along its edges by the second: what it then
does not fill are the things that lie on it."""

NOISE, MAX_NOISY = 10, 0.03
"""Difference, in any channel, that a lossy format makes of one colour; and the share of neighbours
that differ so little, but at all, up to which a picture did not go through one."""

MAX_FRAME = 0.3
"""What fills less of its box than that, and next to nothing within its edges, is a border."""

MAX_AREAS = 64

MAX_BORDER_PX = 5


def read_hints(image: Image.Image, hints: Hints) -> tuple[TextLine, ...]:
    """What a model is told about `image`, by text recognition. Raises as `read_page_text` does."""
    lines = read_page_text(image)
    if hints == "layout":
        return with_layout(image, lines)
    return with_colors(image, lines) if hints == "colors" else lines


def with_layout(image: Image.Image, lines: Sequence[TextLine]) -> tuple[TextLine, ...]:
    """The areas of one colour on `image`, then `lines` with their colours and in the boxes that
    their fonts give them.

    An area is a line without text: `ground` is its colour and `ink` that of its border, if it has
    one, which then belongs to its box. Boxes are pixels of `image`. The first area is the whole
    page in the colour of its edges, then come the larger before the smaller. About 0.1 s for a page
    of 1280 × 1000 px.
    """
    pixels = np.asarray(image.convert("RGB"))
    areas = _areas(pixels, lines)
    smallest_first = sorted(areas, key=lambda area: _size(area.box))
    inside = [_inside(line, smallest_first) for line in lines]
    colored = with_colors(image, inside)
    return (*areas, *(part for line in colored for part in _drawn_in(pixels, line)))


def _areas(pixels: NDArray[np.uint8], lines: Sequence[TextLine]) -> list[TextLine]:
    height, width = pixels.shape[:2]
    step = -(-width // MAX_WIDTH_PX)
    found = []
    at_edges: dict[RGB, int] = {}
    colors = list(_commonest(pixels[::step, ::step]))
    for color, mask in colors:
        for left, top, right, bottom in _boxes(mask, step):
            box = (left, top, min(right, width), min(bottom, height))
            if any(_is_of_letter(box, line.box) for line in lines):
                continue
            if left == 0 or right >= width:
                at_edges[color] = at_edges.get(color, 0) + _size(box)
            found.append(TextLine("", box, ground=color))
    found.sort(key=lambda area: (-_size(area.box), area.box))
    ground = max(at_edges, key=lambda color: at_edges[color]) if at_edges else colors[0][0]
    page = TextLine("", (0, 0, width, height), ground=ground)
    return [page, *_with_borders(pixels, [page, *found[:MAX_AREAS]])]


def _commonest(pixels: NDArray[np.uint8]) -> Iterator[tuple[RGB, NDArray[np.bool_]]]:
    """Colours and where they are, the commonest first; at least one.

    In pictures that went through a lossy format a colour is what is near to it.
    """
    signed = pixels.astype(np.int32)
    packed = signed[..., 0] << 16 | signed[..., 1] << 8 | signed[..., 2]
    steps = np.abs(np.diff(signed, axis=1)).max(axis=-1)
    noisy = steps.size > 0 and ((steps > 0) & (steps <= NOISE)).mean() > MAX_NOISY
    values, counts = np.unique(packed, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    if not noisy:
        for at in order[:MAX_COLORS].tolist():
            if counts[at] < MIN_SHARE * packed.size and at != order[0]:
                break
            yield _unpacked(values[at]), packed == values[at]
        return
    free = np.ones(packed.shape, dtype=bool)
    taken: list[RGB] = []
    for at in order.tolist():
        color = _unpacked(values[at])
        if (counts[at] < MIN_SHARE * packed.size and taken) or len(taken) == MAX_COLORS:
            break
        if any(
            max(abs(a - b) for a, b in zip(color, other, strict=True)) <= NOISE for other in taken
        ):
            continue
        near = free & (np.abs(signed - np.array(color)).max(axis=-1) <= NOISE)
        free &= ~near
        taken.append(color)
        yield color, near


def _boxes(mask: NDArray[np.bool_], step: int) -> Iterator[Box]:
    """Box of each rectangle of `mask`."""
    labels, _ = ndimage.label(mask)
    side, thin, stripe = (max(px // step, 1) for px in (MIN_SIDE_PX, MIN_THIN_PX, MIN_STRIPE_PX))
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = place
        height, width = rows.stop - rows.start, columns.stop - columns.start
        short, long = min(height, width), max(height, width)
        if short < thin or (short < side and long < stripe):
            continue
        part = labels[place] == number
        filled = part.mean()
        # What lies on an area, even at its sides, hides some of it.
        if filled < MIN_FILLED and _along(part, 0) < MIN_EDGE:
            continue
        if filled < MAX_FRAME and _along(part, MAX_BORDER_PX // step + 1) < MAX_FRAME:
            continue  # The border of another area.
        yield columns.start * step, rows.start * step, columns.stop * step, rows.stop * step


def _along(part: NDArray[np.bool_], inset: int) -> float:
    """The share of a frame, `inset` from the edges of `part`, that is part of it."""
    inner = part[inset : part.shape[0] - inset, inset : part.shape[1] - inset]
    if not inner.size:
        return 1.0
    return float(np.concatenate([inner[0], inner[-1], inner[:, 0], inner[:, -1]]).mean())


def _with_borders(pixels: NDArray[np.uint8], areas: list[TextLine]) -> Iterator[TextLine]:
    """All but the first of `areas`, larger by the borders that they have.

    A border has one colour on three sides at least and is thin. Round corners are mixtures, so that
    borders are not areas themselves.
    """
    for at, area in enumerate(areas[1:], start=1):
        around = next(other for other in reversed(areas[:at]) if _covers(other.box, area.box))
        left, top, right, bottom = area.box
        x, y = (left + right) // 2, (top + bottom) // 2
        outward = [
            pixels[y, max(left - MAX_BORDER_PX - 1, 0) : left][::-1],
            pixels[max(top - MAX_BORDER_PX - 1, 0) : top, x][::-1],
            pixels[y, right : right + MAX_BORDER_PX + 1],
            pixels[bottom : bottom + MAX_BORDER_PX + 1, x],
        ]
        nearest = [tuple(side[0].tolist()) for side in outward if len(side)]
        color = max(nearest, key=nearest.count, default=None)
        if color is None or nearest.count(color) < 3 or color in (area.ground, around.ground):
            yield area
            continue
        thick = [_run(side, color) for side in outward]
        if max(thick) > MAX_BORDER_PX:
            yield area
            continue
        box = (left - thick[0], top - thick[1], right + thick[2], bottom + thick[3])
        yield msgspec.structs.replace(area, box=box, ink=color)


def _run(side: NDArray[np.uint8], color: tuple[int, ...]) -> int:
    other = np.flatnonzero((side != np.array(color)).any(axis=1))
    return int(other[0]) if len(other) else len(side)


def _is_of_letter(box: Box, line: Box) -> bool:
    """Whether an area is part of a letter of a line, or what is between letters."""
    return _covers(line, box) and _size(box) < 0.5 * _size(line)


def _covers(box: Box, other: Box) -> bool:
    return box[0] <= other[0] and box[1] <= other[1] and other[2] <= box[2] and other[3] <= box[3]


def _size(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _unpacked(value: int) -> RGB:
    return int(value) >> 16, int(value) >> 8 & 255, int(value) & 255


# --- Lines ----------------------------------------------------------------------------------------

MIN_INK = 60
"""Difference to the ground, summed over the channels, that counts as ink."""

CAP_EM, SMALL_EM, BELOW_EM, ABOVE_EM = 0.72, 0.54, 0.21, 0.95
"""Heights of tall and of small letters, what low ones have below the line they stand on, and what a
line has above it, in em, as most fonts of pages have them."""
LOW = frozenset("gjpqyQ,;()[]{}|@$çş_/")
SMALL = frozenset("acegmnopqrsuvwxyz")

MIN_APART = 0.7
"""Gap between two entries of a menu, in heights of their letters; spaces have half as much."""

MAX_INKED = 0.9
"""Of a row of pixels; more is no letter but the edge of something."""


CLEAR_PX = 4
"""What is this near to the edge of an area is its frame, or a round corner of it."""


def _inside(line: TextLine, areas: Sequence[TextLine]) -> TextLine:
    """`line` without what of its box is beyond the smallest of `areas` that it is on."""
    left, top, right, bottom = line.box
    x, y = (left + right) / 2, (top + bottom) / 2
    for area in areas:
        around = area.box
        if around[0] < x < around[2] and around[1] < y < around[3]:
            box = (
                max(left, around[0] + CLEAR_PX),
                max(top, around[1] + CLEAR_PX),
                min(right, around[2] - CLEAR_PX),
                min(bottom, around[3] - CLEAR_PX),
            )
            if box[0] < box[2] and box[1] < box[3]:
                return msgspec.structs.replace(line, box=box)
            break
    return line


def _drawn_in(pixels: NDArray[np.uint8], line: TextLine) -> list[TextLine]:
    if line.ground is None or line.ink is None:
        return [line]
    left, top, right, bottom = line.box
    left, top = max(left, 0), max(top, 0)
    part = pixels[top:bottom, left:right].astype(np.int32)
    apart = np.abs(part - np.array(line.ground)).sum(axis=-1)
    whole = int(np.abs(np.subtract(line.ink, line.ground)).sum())
    ink = apart >= max(min(MIN_INK, whole // 2), 1)
    # A row or column of nothing but ink is an edge of something and no letter.
    rows = _main_run(np.where(ink.mean(axis=1) < MAX_INKED, ink.sum(axis=1), 0))
    if rows is None:
        return [line]
    inked = ink[rows].any(axis=0)
    if not inked.any():
        return [line]
    top, bottom = top + rows.start, top + rows.stop
    return [
        msgspec.structs.replace(
            line, text=text, box=_as_set(text, (left + start, top, left + stop, bottom))
        )
        for text, start, stop in _apart(
            line.text.split(), inked, MIN_APART * (rows.stop - rows.start)
        )
    ]


def _as_set(text: str, ink: Box) -> Box:
    """The box of a whole line as its font sets it, by that of its ink: letters differ in height."""
    letters = [letter for letter in text if not letter.isspace()]
    low = BELOW_EM if any(letter in LOW for letter in letters) else 0
    em = (ink[3] - ink[1]) / ((SMALL_EM if SMALL.issuperset(letters) else CAP_EM) + low)
    top = round(ink[3] - (low + ABOVE_EM) * em)
    return ink[0], top, ink[2], top + round(LINE_HEIGHT * em)


def _apart(
    words: list[str], inked: NDArray[np.bool_], min_apart: float
) -> Iterator[tuple[str, int, int]]:
    """Texts with their first and last column: the words of a line, in as many groups as there are.

    Recognisers read the entries of a menu as one line. The widest gaps are those between words, and
    of these such as are wider than any space are between entries.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inked, [0]]).astype(int)))
    runs = edges.reshape(-1, 2).tolist()
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(runs)]
    between = sorted(sorted(range(len(gaps)), key=lambda at: -gaps[at])[: len(words) - 1])
    start, first = runs[0][0], 0
    if len(between) == len(words) - 1:
        for word, gap in enumerate(between, start=1):
            if gaps[gap] > min_apart:
                yield " ".join(words[first:word]), start, runs[gap][1]
                start, first = runs[gap + 1][0], word
    yield " ".join(words[first:]), start, runs[-1][1]


def _main_run(inked: NDArray[np.int64]) -> slice | None:
    """The rows of a line, of which `inked` says how much ink each has.

    Boxes of recognisers reach into the lines above and below; what is apart from the rows with most
    ink is theirs, unless it is as near as the dot of an i.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inked > 0, [0]]).astype(int)))
    runs = edges.reshape(-1, 2).tolist()
    if not runs:
        return None
    main = max(range(len(runs)), key=lambda at: int(inked[slice(*runs[at])].sum()))
    start, stop = runs[main]
    near = max(0.12 * (stop - start), 1)
    for before, after in reversed(runs[:main]):
        if start - after > near:
            break
        start = before
    for before, after in runs[main + 1 :]:
        if before - stop > near:
            break
        stop = after
    return slice(start, stop)
