"""What differs between two pages: as a picture, and as words that a model can act upon.

Owns how a difference is said and drawn. Knows nothing about browsers, models or files.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from PIL import Image, ImageChops

from w2c_tui.web.color import similarity
from w2c_tui.web.score import Block, Comparison, Pair, at_width
from w2c_tui.web.view import Box, Color, View

Kind = Literal["missing", "surplus", "text", "position", "color", "background", "length", "failed"]

MAX_HEIGHT = 20_000
"""Most rows of a difference picture beyond the reference's."""

_RED, _PINK = (214, 0, 28), (255, 120, 160)
# How much red there is for a difference of so many levels: anti-aliasing and rounding differ by a
# few where nobody sees it.
_TINT = [
    0 if level <= 8 else min(round(255 * (0.4 + (level - 8) / 200)), 255) for level in range(256)
]

MAX_QUOTE = 160
"""Longest text that is quoted, in characters."""

SHOWS_RENDER = (
    "The picture is how your page looks now; the original is the screenshot that you made it from."
)
"""What stands above a request that comes with that picture."""


class Difference(msgspec.Struct, frozen=True):
    """One thing that is not as it should be.

    `weight` orders them: the share of the reference's text area that it concerns, times how wrong
    it is. `box` is on the reference's picture (of the surplus: on the candidate's).
    """

    kind: Kind
    message: str
    weight: float
    box: Box | None = None


def differences(
    reference: View, candidate: View | None, comparison: Comparison
) -> list[Difference]:
    """What differs, the worst first; places and sizes in pixels of the reference."""
    found: list[Difference] = []
    if comparison.failed:
        found.append(Difference("failed", comparison.failed, 1000.0))
    blocks = [*comparison.missing, *(pair.reference for pair in comparison.pairs)]
    total = sum(block.area for block in blocks) or 1
    for block in comparison.missing:
        message = f'"{_quote(block.text)}" is missing; it belongs {_place(block.box)}'
        message += f", in {_hex(block.color)} on {_hex(block.background)}."
        found.append(Difference("missing", message, block.area / total, block.box))
    for block in comparison.surplus:
        share = block.area * comparison.scale**2 / total
        message = f'"{_quote(block.text)}" is not on the original; take it out.'
        found.append(Difference("surplus", message, 0.8 * share, block.box))
    for pair in comparison.pairs:
        found += _of_pair(pair, pair.reference.area / total, comparison.scale)
    if candidate is not None:
        found += _of_length(reference, candidate, comparison.scale)
    return sorted(found, key=lambda difference: -difference.weight)


def _of_pair(pair: Pair, share: float, scale: float) -> list[Difference]:
    ours, theirs = pair.reference, pair.candidate
    name, box = f'"{_quote(ours.text)}"', ours.box
    found = []
    if pair.text < 1:
        message = f'"{_quote(theirs.text)}" should read {name}.'
        found.append(Difference("text", message, share * 2 * (1 - pair.text), box))
    moved = _moved(ours, theirs, scale)
    if moved:
        message = f"{name} is {moved}; it belongs {_place(box)}."
        found.append(Difference("position", message, share * (1 - pair.position), box))
    for kind, wanted, is_now in (
        ("color", ours.color, theirs.color),
        ("background", ours.background, theirs.background),
    ):
        wrong = _apart(wanted, is_now)
        if wrong > 0.04:
            what = "The text" if kind == "color" else "The background of"
            message = f"{what} {name} is {_hex(is_now)} and should be {_hex(wanted)}."
            found.append(Difference(kind, message, share * wrong, box))  # type: ignore[arg-type]
    return found


def _of_length(reference: View, candidate: View, scale: float) -> list[Difference]:
    wanted, height = reference.page_height, round(candidate.page_height * scale)
    wrong = abs(wanted - height) / max(wanted, height, 1)
    if wrong < 0.05:
        return []
    word = "longer" if height > wanted else "shorter"
    message = f"The page is {abs(height - wanted)} px {word} than the original, of {wanted} px."
    return [Difference("length", message, wrong * 0.3)]


def _moved(ours: Block, theirs: Block, scale: float) -> str:
    left, top = (round(theirs.box[i] * scale) - ours.box[i] for i in (0, 1))
    parts = []
    if abs(top) >= 12:
        parts.append(f"{abs(top)} px too {'low' if top > 0 else 'high'}")
    if abs(left) >= 12:
        parts.append(f"{abs(left)} px too far {'right' if left > 0 else 'left'}")
    return " and ".join(parts)


def _apart(first: Color, second: Color) -> float:
    return float(1 - similarity(first, second))


def _place(box: Box) -> str:
    left, top, right, bottom = box
    return f"at left {left}, top {top} ({right - left} × {bottom - top} px)"


def _quote(text: str) -> str:
    return text if len(text) <= MAX_QUOTE else f"{text[: MAX_QUOTE - 1]}…"


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def fix_request(
    reference: View,
    candidate: View | None,
    comparison: Comparison,
    *,
    limit: int = 12,
) -> str:
    """What to ask a model next, so that its page comes nearer; empty when nothing differs."""
    found = differences(reference, candidate, comparison)[:limit]
    if not found:
        return ""
    width = reference.picture.width
    lines = "\n".join(f"- {difference.message}" for difference in found)
    return (
        f"Your page differs from the original (in pixels, at a width of {width}):\n{lines}\n"
        "Correct this, keep what is right, and write the whole page again."
    )


def difference_picture(reference: View, candidate: View) -> Image.Image:
    """The reference, faded, with what differs in red; what only one page has below is pink.

    As wide as the reference and as high as the higher page.
    """
    ours, theirs = reference.picture, candidate.picture
    height = max(round(theirs.height * ours.width / theirs.width), 1)
    height = min(height, max(ours.height, MAX_HEIGHT))
    theirs = at_width(theirs, ours.width, height)
    common, tallest = min(ours.height, theirs.height), max(ours.height, theirs.height)
    first, second = (image.crop((0, 0, ours.width, common)) for image in (ours, theirs))
    bands = ImageChops.difference(first, second).split()
    distance = ImageChops.lighter(ImageChops.lighter(bands[0], bands[1]), bands[2])
    longer = ours if ours.height >= theirs.height else theirs
    out = _faded(longer)
    out.paste(_faded(ours).crop((0, 0, ours.width, common)))
    out.paste(_RED, (0, 0), distance.point(_TINT))
    if tallest > common:
        below = out.crop((0, common, ours.width, tallest))
        out.paste(Image.blend(below, Image.new("RGB", below.size, _PINK), 0.4), (0, common))
    return out


def _faded(picture: Image.Image) -> Image.Image:
    grey = picture.convert("L").point([170 + level // 3 for level in range(256)])
    return Image.merge("RGB", (grey, grey, grey))
