"""Areas of one colour on a screenshot: bands, cards, buttons, fields, pictures' place holders.

Owns how they are found, by connected pixels of one colour, and where exactly lines of text are, by
their ink. Knows nothing about how text is recognised and nothing about prompts; what is made of
lines and areas is `core.page_layout`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from w2c_tui.core.colors import RGB
from w2c_tui.core.conversation import TextLine
from w2c_tui.core.page_layout import LINE_HEIGHT
from w2c_tui.models.page_text import with_colors

Box = tuple[int, int, int, int]

MAX_COLORS = 16
"""Colours whose areas are looked for, the commonest first; photos have too many to be areas."""

MIN_SHARE = 0.0004
"""Of the page, that a colour covers at least."""

MAX_PIXELS = 8_000_000
"""Of larger screenshots every second, third, ... pixel is looked at."""

MIN_SIDE_PX, MIN_THIN_PX = 12, 3
"""Sides of the smallest area; of stripes the shorter one, where the other is `MIN_STRIPE_PX`."""
MIN_STRIPE_PX = 48

MIN_FILLED, MIN_EDGE = 0.7, 0.7
"""An area fills its box by the first share, or runs along its edges by the second: what it then
does not fill are the things that lie on it."""

NOISE, MAX_NOISY = 10, 0.015
"""Difference, in any channel, that a lossy format makes of one colour; and the share of pixels that
differ so little, but at all, from their neighbours in pictures that went through one."""

SHADOW = 20
"""Difference, in any channel, up to which a stripe as thin as a border and what it lies on are a
shadow's edge; thicker ones are the tracks of bars."""

MIN_PEAK = 0.1
"""Of the count of a colour, that a colour near to it has if it is one of its own."""

MIN_AREA_PIXELS = 40
"""Areas have more pixels, whatever lies on them."""

MAX_FRAME = 0.3
"""What fills less of its box than that, and next to nothing within its edges, is a border."""

MAX_AREAS = 64

MAX_BORDER_PX = 5


def with_layout(image: Image.Image, lines: Sequence[TextLine]) -> tuple[TextLine, ...]:
    """`areas_of` the image, then its `lines` as `in_place` makes them. Boxes are pixels of `image`.

    About 0.1 s for a page of 1280 × 1000 px.
    """
    areas = areas_of(image, lines)
    return (*areas, *in_place(image, lines, areas))


def areas_of(image: Image.Image, lines: Sequence[TextLine]) -> tuple[TextLine, ...]:
    """The areas of one colour on `image`, the larger before the smaller.

    An area is a line without text: `ground` is its colour, `ink` that of its border, if it has one,
    which then belongs to its box, and `radius` is that of its corners. The first is the whole page
    in the colour of its edges. What are letters of `lines` are no areas.
    """
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    step = max(math.ceil(math.sqrt(width * height / MAX_PIXELS)), 1)
    found = []
    at_edges: dict[RGB, int] = {}
    colors = _commonest(pixels[::step, ::step])
    for color, mask in colors:
        for left, top, right, bottom in _boxes(mask, step):
            box = (left, top, min(right, width), min(bottom, height))
            radius = _radius(pixels, box, color)
            found.append(TextLine("", box, ground=color, radius=radius))
            if left == 0 or right >= width:
                at_edges[color] = at_edges.get(color, 0) + _size(box)
    found.sort(key=lambda area: (-_size(area.box), area.box))
    found = [
        area
        for area in found[: 4 * MAX_AREAS]
        if not any(_is_of_letter(area.box, line.box) for line in lines)
    ]
    ground = max(at_edges, key=lambda color: at_edges[color]) if at_edges else colors[0][0]
    page = TextLine("", (0, 0, width, height), ground=ground)
    return (page, *_with_borders(pixels, [page, *found[:MAX_AREAS]]))


def _commonest(pixels: NDArray[np.uint8]) -> list[tuple[RGB, NDArray[np.bool_]]]:
    """Colours and where they are, the commonest first; at least one.

    In pictures that went through a lossy format a colour is what is nearest to it.
    """
    packed = np.zeros(pixels.shape[:2], dtype=np.int32)
    for channel in range(3):
        packed <<= 8
        packed |= pixels[..., channel]
    values, counts = np.unique(packed, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    if not _is_lossy(pixels):
        enough = [at for at in order[:MAX_COLORS] if counts[at] >= MIN_SHARE * packed.size]
        return [(_unpacked(values[at]), packed == values[at]) for at in enough or order[:1]]
    peaks: list[tuple[RGB, int]] = []
    for at in order:
        if (counts[at] < MIN_SHARE * packed.size and peaks) or len(peaks) == MAX_COLORS:
            break
        color = _unpacked(values[at])
        # What a lossy format makes of a colour is far rarer than the colour.
        if not any(
            _apart_by(color, other) <= NOISE and counts[at] < MIN_PEAK * count
            for other, count in peaks
        ):
            peaks.append((color, int(counts[at])))
    nearest = np.full(packed.shape, -1, dtype=np.int8)
    best = np.full(packed.shape, NOISE + 1, dtype=np.int16)
    for number, (color, _) in enumerate(peaks):
        apart = np.abs(pixels.astype(np.int16) - np.array(color, dtype=np.int16)).max(axis=-1)
        nearest[apart < best] = number
        np.minimum(best, apart, out=best)
    return [(color, nearest == number) for number, (color, _) in enumerate(peaks)]


def _is_lossy(pixels: NDArray[np.uint8]) -> bool:
    """Whether many neighbours differ a little, both to the side and downwards.

    Gradients along one side do so in one direction only.
    """
    if min(pixels.shape[:2]) < 2:
        return False
    little = [
        (steps > 0) & (steps <= NOISE)
        for steps in (
            np.abs(np.diff(pixels.astype(np.int16), axis=axis)).max(axis=-1) for axis in (0, 1)
        )
    ]
    return bool((little[0][:, 1:] & little[1][1:]).mean() > MAX_NOISY)


def _apart_by(one: RGB, other: RGB) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _boxes(mask: NDArray[np.bool_], step: int) -> Iterator[Box]:
    """Box of each rectangle of `mask`."""
    labels, _ = ndimage.label(mask)
    # Most are specks: they would each become a place.
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    large = sizes >= MIN_AREA_PIXELS / step
    labels = np.where(large, np.cumsum(large), 0).astype(np.int32)[labels]
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
    """All but the first of `areas`, larger by the borders that they have; without shadows.

    A border has one colour on three sides at least and is thin. Round corners are mixtures, so that
    borders are not areas themselves.
    """
    for at, area in enumerate(areas[1:], start=1):
        around = next(other for other in reversed(areas[:at]) if _covers(other.box, area.box))
        left, top, right, bottom = area.box
        if min(right - left, bottom - top) <= MAX_BORDER_PX and _is_shadow(area, around):
            continue
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
        radius = area.radius + max(thick) if area.radius else 0
        yield msgspec.structs.replace(area, box=box, ink=color, radius=radius)


def _is_shadow(stripe: TextLine, around: TextLine) -> bool:
    assert stripe.ground is not None
    assert around.ground is not None
    return _apart_by(stripe.ground, around.ground) <= SHADOW


def _radius(pixels: NDArray[np.uint8], box: Box, color: RGB) -> int:
    """Of the corners of an area, by how far from them its first row and first column begin.

    0 unless three of these agree: corners may have something on them.
    """
    left, top, right, bottom = box
    most = min(right - left, bottom - top) // 2
    sides = (
        pixels[top, left : left + most],
        pixels[top:, left][:most],
        pixels[top, right - most : right][::-1],
        pixels[top:bottom, right - 1][:most],
    )
    begin = sorted(_begin(side, color) for side in sides)
    if begin[2] - begin[1] > 1 or begin[1] < 1:
        return 0
    # Of the pixels at the very top of an arc those near its end are covered whole.
    return min(begin[1] + round(math.sqrt(begin[1] / 10)), most)


def _begin(side: NDArray[np.uint8], color: RGB) -> int:
    alike = np.abs(side.astype(np.int16) - np.array(color, dtype=np.int16)).max(axis=-1) <= NOISE
    return int(alike.argmax()) if alike.any() else len(side)


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

MIN_APART_EM, SURELY_APART_EM, TIMES_APART = 0.7, 1.05, 1.5
"""The smallest gap between two entries of a menu, and that which needs not be so many times wider
than the other gaps of the line: spaces have half as much, but those of typewriter fonts more."""

MAX_INKED = 0.9
"""Of a row of pixels; more is no letter but the edge of something."""

CLEAR_PX, CLEAR_SHARE = 4, 8
"""What is this near to the edge of an area is its frame, or a round corner of it; in low areas the
second, as a divisor of their height."""


def in_place(
    image: Image.Image, lines: Sequence[TextLine], areas: Sequence[TextLine]
) -> tuple[TextLine, ...]:
    """`lines` with their colours, in the boxes that their fonts give them.

    Recognisers draw boxes that are too wide, and read neighbours as one line, which are lines of
    their own again. `areas` are those of the image.
    """
    pixels = np.asarray(image.convert("RGB"))
    smallest_first = sorted(areas[1:], key=lambda area: _size(area.box))
    colored = with_colors(image, [_inside(line, areas[0], smallest_first) for line in lines])
    return tuple(part for line in colored for part in _refined(pixels, line))


def _inside(line: TextLine, page: TextLine, areas: Sequence[TextLine]) -> TextLine:
    """`line` without what of its box is beyond the first of `areas` that it is on."""
    left, top, right, bottom = line.box
    x, y = (left + right) / 2, (top + bottom) / 2
    for area in areas:
        around = area.box
        if around[0] < x < around[2] and around[1] < y < around[3]:
            clear = min(CLEAR_PX, (around[3] - around[1]) // CLEAR_SHARE)
            # The edges of the page are no frames.
            box = (
                max(left, around[0] + clear) if around[0] else left,
                max(top, around[1] + clear) if around[1] else top,
                min(right, around[2] - clear) if around[2] < page.box[2] else right,
                min(bottom, around[3] - clear) if around[3] < page.box[3] else bottom,
            )
            if box[0] < box[2] and box[1] < box[3]:
                return msgspec.structs.replace(line, box=box)
            break
    return line


def _refined(pixels: NDArray[np.uint8], line: TextLine) -> list[TextLine]:
    if line.ground is None or line.ink is None:
        return [line]
    left, top, right, bottom = line.box
    left, top = max(left, 0), max(top, 0)
    part = pixels[top:bottom, left:right].astype(np.int32)
    apart = np.abs(part - np.array(line.ground)).sum(axis=-1)
    whole = int(np.abs(np.subtract(line.ink, line.ground)).sum())
    ink = apart >= max(min(MIN_INK, whole // 2), 1)
    rows = _letters(ink)
    if rows is None:
        return [line]
    em = _em(line.text, rows.stop - rows.start)
    found = []
    for text, start, stop in _entries(line.text.split(), ink[rows].any(axis=0), em):
        # An entry without high letters is lower than its neighbours.
        inside = _letters(ink[rows, start:stop]) or slice(0, rows.stop - rows.start)
        above = top + rows.start
        box = (left + start, above + inside.start, left + stop, above + inside.stop)
        found.append(msgspec.structs.replace(line, text=text, box=_as_set(text, box, len(pixels))))
    return found or [line]


def _letters(ink: NDArray[np.bool_]) -> slice | None:
    """The rows of `ink` in which the letters of one line are; None without any."""
    return _main_run(np.where(ink.mean(axis=1) <= MAX_INKED, ink.sum(axis=1), 0))


def _entries(
    words: list[str], inked: NDArray[np.bool_], em: float
) -> Iterator[tuple[str, int, int]]:
    """Texts with their first and last column: the words of a line, in as many groups as there are.

    The widest gaps are those between words, and of these such as are wider than any space are
    between the entries of a menu, which recognisers read as one line.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inked, [0]]).astype(int)))
    runs = edges.reshape(-1, 2).tolist()
    if not runs:
        return
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(runs)]
    between = sorted(sorted(range(len(gaps)), key=lambda at: -gaps[at])[: len(words) - 1])
    start, first = runs[0][0], 0
    if len(words) > 1 and len(between) == len(words) - 1:
        usual = statistics.median(gaps[gap] for gap in between)
        for word, gap in enumerate(between, start=1):
            stands_out = gaps[gap] >= min(TIMES_APART * usual, SURELY_APART_EM * em)
            goes_on = words[word - 1].endswith((",", ";"))
            if gaps[gap] >= MIN_APART_EM * em and stands_out and not goes_on:
                yield " ".join(words[first:word]), start, runs[gap][1]
                start, first = runs[gap + 1][0], word
    yield " ".join(words[first:]), start, runs[-1][1]


def _em(text: str, ink_height: int) -> float:
    """The size of letters whose ink is so high: they differ in height."""
    letters = {letter for letter in text if not letter.isspace()}
    low = BELOW_EM if letters & LOW else 0
    return ink_height / ((SMALL_EM if letters <= SMALL else CAP_EM) + low)


def _as_set(text: str, ink: Box, page_height: int) -> Box:
    """The box of a whole line as its font sets it, by that of its ink."""
    em = _em(text, ink[3] - ink[1])
    foot = ink[3] - (BELOW_EM * em if set(text) & LOW else 0)
    top = round(foot - ABOVE_EM * em)
    return ink[0], max(top, 0), ink[2], min(top + round(LINE_HEIGHT * em), page_height)


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
