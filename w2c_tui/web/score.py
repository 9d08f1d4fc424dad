"""How near one page is to another, as a number with its parts.

Owns the visual score. Its parts follow Design2Code (arXiv 2403.03163, `metrics/visual_score.py`),
with three differences: blocks of text come from the browser's layout or from text recognition,
where Design2Code paints each letter; the colour behind the text counts beside the text's own; and
SSIM stands in the place of CLIP similarity, as it needs no model. The score is the mean of the
parts that there are, each in 0..1:

- `block_match`: the area of blocks that have a partner, of the area of all blocks of both pages
- `text`: mean likeness of partners' texts
- `position`: mean of 1 - the larger of the horizontal and vertical shift of partners' centres
- `color`: mean of 1 - CIEDE2000 / 100 of partners' text and background colours
- `ssim`: structural similarity of the pictures (Wang et al. 2004, at its usual scale)

`structure` (TreeBLEU, arXiv 2404.06369) says how alike the elements are; pages can look the same
without, so it is no part of the mean. Knows nothing about browsers, files or models.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rapidfuzz import process
from rapidfuzz.distance import Indel
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment

from w2c_tui.core.conversation import TextLine
from w2c_tui.core.page_text import paragraphs
from w2c_tui.web.color import similarity as color_similarity
from w2c_tui.web.view import Box, Color, Line, Tree, View

MIN_LIKENESS = 0.5
"""Blocks whose texts are less alike are no partners (Design2Code)."""

MERGE_GAIN = 0.05
"""Blocks are joined when that makes them this much more like their partner (Design2Code)."""

NEARNESS = 0.1
"""How much nearness counts when blocks of like texts, as a row of "Read more", find partners."""

MAX_BLOCKS = 1_500
"""Blocks of a page that are looked at; their partners take time that grows with the square."""


class Block(msgspec.Struct, frozen=True):
    """A paragraph, heading or label. `box` is in pixels of its own page's picture."""

    text: str
    box: Box
    color: Color
    background: Color

    @property
    def area(self) -> int:
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


class Pair(msgspec.Struct, frozen=True):
    """A block of the reference and its partner, and how alike they are."""

    reference: Block
    candidate: Block
    text: float
    position: float
    color: float


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """`score` and its parts, in 0..1; parts that cannot be told are None and not in the mean."""

    score: float
    block_match: float | None = None
    text: float | None = None
    position: float | None = None
    color: float | None = None
    ssim: float | None = None
    structure: float | None = None

    @property
    def parts(self) -> dict[str, float]:
        """The parts that the mean is of."""
        values = {name: getattr(self, name) for name in PARTS}
        return {name: value for name, value in values.items() if value is not None}


PARTS = ("block_match", "text", "position", "color", "ssim")


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A score with what it was made of. `scale` is the reference's pixels per candidate's pixel.

    `failed` says why the score is 0 without a look at the parts.
    """

    score: Score
    pairs: tuple[Pair, ...] = ()
    missing: tuple[Block, ...] = ()
    surplus: tuple[Block, ...] = ()
    scale: float = 1.0
    failed: str = ""


def score(reference: View, candidate: View | None) -> Score:
    """How near `candidate` is to `reference`; None is a page that could not be rendered: 0."""
    return compare(reference, candidate).score


def compare(reference: View, candidate: View | None) -> Comparison:
    """As `score`, with the partners and those that have none. Never fails.

    A blank page scores 0 unless the reference is as blank. Pages of other widths are scaled to
    the reference's; what one page has below the other's end counts as different.
    """
    if candidate is None:
        return _nothing(reference, None, "The page could not be rendered.")
    if is_blank(candidate) and not is_blank(reference):
        return _nothing(reference, candidate, "The page is blank.")
    scale = reference.picture.width / candidate.picture.width
    height = max(reference.picture.height, candidate.picture.height * scale)
    canvas = (reference.picture.width, height)
    similar = ssim(reference.picture, candidate.picture)
    structure = None
    if reference.tree is not None and candidate.tree is not None:
        structure = tree_bleu(reference.tree, candidate.tree)
    if reference.lines is None or candidate.lines is None:
        return Comparison(score=_score(ssim=similar, structure=structure), scale=scale)
    exact = _has_colors(reference) and _has_colors(candidate)
    ours, theirs = blocks_of(reference, exact=exact), blocks_of(candidate, exact=exact)
    if not ours and not theirs:
        return Comparison(score=_score(ssim=similar, structure=structure), scale=scale)
    pairs, missing, surplus = _partners(ours, theirs, scale, canvas)
    matched = sum(p.reference.area + p.candidate.area * scale**2 for p in pairs)
    alone = sum(b.area for b in missing) + sum(b.area * scale**2 for b in surplus)
    total = _score(
        block_match=matched / (matched + alone) if pairs else 0.0,
        text=_mean([pair.text for pair in pairs]),
        position=_mean([pair.position for pair in pairs]),
        color=_mean([pair.color for pair in pairs]),
        ssim=similar,
        structure=structure,
    )
    return Comparison(
        score=total,
        pairs=tuple(pairs),
        missing=tuple(missing),
        surplus=tuple(surplus),
        scale=scale,
    )


def _nothing(reference: View, candidate: View | None, why: str) -> Comparison:
    readable = reference.lines is not None and (candidate is None or candidate.lines is not None)
    none = 0.0 if readable else None
    structure = None
    if reference.tree is not None and (candidate is None or candidate.tree is not None):
        structure = 0.0
    total = Score(
        score=0.0,
        block_match=none,
        text=none,
        position=none,
        color=none,
        ssim=0.0,
        structure=structure,
    )
    missing = tuple(blocks_of(reference, exact=True)) if reference.lines else ()
    return Comparison(score=total, missing=missing, failed=why)


def _score(**parts: float | None) -> Score:
    given = Score(score=0.0, **parts)
    return msgspec.structs.replace(given, score=_mean(list(given.parts.values())))


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0


def is_blank(view: View) -> bool:
    """Whether there is nothing on the page but one colour."""
    # Stops at the second colour.
    return view.picture.getcolors(maxcolors=1) is not None


# --- blocks --------------------------------------------------------------------------------------


def blocks_of(view: View, *, exact: bool) -> list[Block]:
    """The view's lines joined into paragraphs, without those that nothing is to be seen of.

    `exact` takes the text's colour from the lines where they know it, else from the picture.
    """
    pixels = np.asarray(view.picture)
    seen: list[TextLine] = []
    colors: dict[int, tuple[Color, Color]] = {}
    for line in (view.lines or ())[:MAX_BLOCKS]:
        found = _colors(pixels, line)
        if found is None:
            continue
        color, background = found
        if exact and line.color is not None:
            color = line.color
        text_line = TextLine(line.text, line.box)
        colors[id(text_line)] = color, background
        seen.append(text_line)
    return [Block(b.text, b.box, *colors[id(b.last)]) for b in paragraphs(seen)]


def _colors(pixels: NDArray[np.uint8], line: Line) -> tuple[Color, Color] | None:
    """The text's colour and the one behind it: the commonest, and what differs from it most."""
    left, top, right, bottom = line.box
    part = pixels[top:bottom, left:right].reshape(-1, 3)
    if len(part) == 0:
        return None
    if len(part) > 20_000:
        part = part[:: len(part) // 10_000]
    packed = part.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    values, counts = np.unique(packed, return_counts=True)
    found = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1)
    background = found[counts.argmax()]
    distance = np.abs(found - background).sum(axis=1)
    farthest = int(distance.max())
    if farthest < 12:
        return None
    # Edges of letters are blends; their cores are what is farthest from the background.
    core = distance >= 0.9 * farthest
    color = np.average(found[core], axis=0, weights=counts[core])
    return _rgb(color), _rgb(background)


def _rgb(values: NDArray[np.float64] | NDArray[np.int64]) -> Color:
    red, green, blue = (round(float(value)) for value in values)
    return red, green, blue


def _has_colors(view: View) -> bool:
    return view.tree is not None


# --- partners ------------------------------------------------------------------------------------


def _partners(
    ours: list[Block], theirs: list[Block], scale: float, canvas: tuple[float, float]
) -> tuple[list[Pair], list[Block], list[Block]]:
    """Each block's partner: the assignment with the greatest sum of likeness (Hungarian method).

    Blocks that are one on one page and two on the other are joined first.
    """
    for _ in range(3):
        likeness, found = _assigned(ours, theirs, scale, canvas)
        joined_ours = _joined(ours, theirs, likeness, found)
        joined_theirs = _joined(theirs, ours, likeness.T, {j: i for i, j in found.items()})
        if len(joined_ours) == len(ours) and len(joined_theirs) == len(theirs):
            break
        # One page at a time: both halves of one seam must not be mended.
        if len(joined_ours) < len(ours):
            ours = joined_ours
        else:
            theirs = joined_theirs
    likeness, found = _assigned(ours, theirs, scale, canvas)
    chosen = [(i, j) for i, j in found.items() if likeness[i, j] >= MIN_LIKENESS]
    shifts = _shifts(ours, theirs, scale, canvas)
    pairs = []
    if chosen:
        text = color_similarity(
            [ours[i].color for i, _ in chosen], [theirs[j].color for _, j in chosen]
        )
        behind = color_similarity(
            [ours[i].background for i, _ in chosen], [theirs[j].background for _, j in chosen]
        )
        colors = ((text + behind) / 2).tolist()
        for (i, j), color in zip(chosen, colors, strict=True):
            position = max(1 - float(shifts[i, j]), 0.0)
            pairs.append(Pair(ours[i], theirs[j], float(likeness[i, j]), position, color))
    taken_ours, taken_theirs = {i for i, _ in chosen}, {j for _, j in chosen}
    missing = [block for i, block in enumerate(ours) if i not in taken_ours]
    surplus = [block for j, block in enumerate(theirs) if j not in taken_theirs]
    return pairs, missing, surplus


def _assigned(
    ours: list[Block], theirs: list[Block], scale: float, canvas: tuple[float, float]
) -> tuple[NDArray[np.float32], dict[int, int]]:
    if not ours or not theirs:
        return np.zeros((len(ours), len(theirs)), dtype=np.float32), {}
    likeness = process.cdist(
        [block.text for block in ours],
        [block.text for block in theirs],
        scorer=Indel.normalized_similarity,
        dtype=np.float32,
    )
    gain = likeness - NEARNESS * _shifts(ours, theirs, scale, canvas)
    # A pair below the threshold is none, and must not keep others from theirs.
    gain = np.where(likeness >= MIN_LIKENESS, gain, 0.0)
    rows, columns = linear_sum_assignment(gain, maximize=True)
    return likeness, dict(zip(rows.tolist(), columns.tolist(), strict=True))


def _shifts(
    ours: list[Block], theirs: list[Block], scale: float, canvas: tuple[float, float]
) -> NDArray[np.float64]:
    """(ours, theirs): the larger of the horizontal and vertical shift, as shares of the canvas."""
    first = _centres(ours) / canvas
    second = _centres(theirs) * scale / canvas
    shifts: NDArray[np.float64] = np.abs(first[:, None] - second[None]).max(axis=-1, initial=0.0)
    return shifts


def _centres(blocks: list[Block]) -> NDArray[np.float64]:
    boxes = np.array([block.box for block in blocks], dtype=np.float64).reshape(-1, 4)
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _joined(
    blocks: list[Block], others: list[Block], likeness: NDArray[np.float32], found: dict[int, int]
) -> list[Block]:
    """`blocks` with each block that has no partner put to the neighbour that it completes."""
    result: list[Block] = []
    into: set[int] = set()
    for at in range(len(blocks)):
        if at in into:
            continue
        block = blocks[at]
        following = at + 1
        while following < len(blocks):
            near = [k for k in (following - 1, following) if _is_partner(k, likeness, found)]
            if len(near) != 1:
                break
            partner = found[near[0]]
            merged = _merge(block, blocks[following])
            before = float(likeness[near[0], partner])
            after = Indel.normalized_similarity(merged.text, others[partner].text)
            if after < before + MERGE_GAIN:
                break
            block = merged
            into.add(following)
            likeness = likeness.copy()
            likeness[near[0], partner] = after
            if near[0] == following:
                break
            # The next one joins the same partner.
            found = {**found, following: partner}
            likeness[following, partner] = after
            following += 1
        result.append(block)
    return result


def _is_partner(at: int, likeness: NDArray[np.float32], found: dict[int, int]) -> bool:
    return at in found and bool(likeness[at, found[at]] >= MIN_LIKENESS)


def _merge(first: Block, second: Block) -> Block:
    box = (
        min(first.box[0], second.box[0]),
        min(first.box[1], second.box[1]),
        max(first.box[2], second.box[2]),
        max(first.box[3], second.box[3]),
    )
    larger = first if len(first.text) >= len(second.text) else second
    return Block(f"{first.text} {second.text}", box, larger.color, larger.background)


# --- pictures ------------------------------------------------------------------------------------


def ssim(reference: Image.Image, candidate: Image.Image) -> float:
    """Structural similarity in 0..1, of RGB pictures on the reference's width.

    Wang, Bovik, Sheikh, Simoncelli 2004, with its window (11 x 11, sigma 1.5) and at its usual
    scale: reduced by a whole factor until the shorter side of the reference is about 256 pixels.
    What lies below the end of the shorter picture counts as 0.
    """
    scaled_height = max(round(candidate.height * reference.width / candidate.width), 1)
    common = min(reference.height, scaled_height)
    tallest = max(reference.height, scaled_height)
    candidate = at_width(candidate, reference.width, common)
    factor = max(1, round(min(reference.width, tallest) / 256))
    first, second = (_reduced(image, common, factor) for image in (reference, candidate))
    if np.array_equal(first, second):
        return common / tallest
    blurred = [_blur(values) for values in (first, second, first**2, second**2, first * second)]
    mean1, mean2, square1, square2, product = blurred
    variance1, variance2 = square1 - mean1**2, square2 - mean2**2
    covariance = product - mean1 * mean2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = ((2 * mean1 * mean2 + c1) * (2 * covariance + c2)) / (
        (mean1**2 + mean2**2 + c1) * (variance1 + variance2 + c2)
    )
    return float(np.clip(values.mean(), 0, 1)) * common / tallest


def at_width(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The top `height` rows of `picture` as they are when it is scaled to `width`."""
    if picture.width == width:
        return picture
    scale = width / picture.width
    # Cut first: a narrow picture may be scaled to any height.
    rows = min(height / scale, picture.height)
    return picture.resize(
        (width, height),
        Image.Resampling.BILINEAR,
        box=(0, 0, picture.width, rows),
        reducing_gap=2,
    )


def _reduced(image: Image.Image, height: int, factor: int) -> NDArray[np.float32]:
    if height < image.height:
        image = image.crop((0, 0, image.width, height))
    if factor > 1:
        image = image.reduce(factor)
    return np.asarray(image, dtype=np.float32)


def _blur(values: NDArray[np.float32]) -> NDArray[np.float32]:
    blurred: NDArray[np.float32] = gaussian_filter(
        values, sigma=(1.5, 1.5, 0), radius=(5, 5, 0), mode="nearest"
    )
    return blurred


# --- elements ------------------------------------------------------------------------------------


def tree_bleu(reference: Tree, candidate: Tree) -> float:
    """TreeBLEU: the share of the reference's subtrees of height 1 that the candidate has, too.

    A subtree is an element with its children, all by tag name; equal ones count once, as in the
    published code (arXiv 2404.06369). A reference without any is matched by the same.
    """
    wanted, found = _subtrees(reference), _subtrees(candidate)
    return len(wanted & found) / len(wanted) if wanted else float(not found)


def _subtrees(tree: Tree) -> set[tuple[str, ...]]:
    children: dict[int, list[str]] = {}
    for tag, parent in zip(tree.tags, tree.parents, strict=True):
        if parent >= 0:
            children.setdefault(parent, []).append(tag)
    return {(tree.tags[at], *tags) for at, tags in children.items()}
