"""Block match, position and colour against a plain implementation of their published description.

Design2Code (arXiv 2403.03163, section 3.2): blocks find partners by the likeness of their texts
(difflib's ratio, `linear_sum_assignment`, at least 0.5); block match is the partners' share of the
blocks' area; position is 1 - max(|dx|, |dy|) of centres as shares of the page; colour is
1 - CIEDE2000 / 100. As `w2c_tui.web.score` says, the colour is the mean of the text's and the one
behind it. Nothing below uses that module's functions but `compare`, which is what is tested.
"""

from __future__ import annotations

import difflib
import math
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment

from tests.web.pages import shop
from w2c_tui.web.render import PageSource
from w2c_tui.web.score import compare
from w2c_tui.web.view import Line, Tree, View

SIZE = WIDTH, HEIGHT = 1280, 2000
WORDS = (  # noqa: SIM905
    "amber basket candle dragon engine forest garden harbor island jacket kernel ladder magnet "
    "needle orchid pepper quartz ribbon saddle temple umbra velvet walnut xenon yellow zephyr"
).split()
TOLERANCE = 1e-6
"""Pairs, areas, places and colours are known exactly; only the rounding of sums may differ."""


# --- the plain implementation ---


def plain_lab(rgb):
    linear = []
    for level in rgb:
        c = level / 255
        linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    r, g, b = linear
    x = (0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047
    y = 0.2126729 * r + 0.7151522 * g + 0.0721750 * b
    z = (0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883

    def f(t):
        return t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116

    return 116 * f(y) - 16, 500 * (f(x) - f(y)), 200 * (f(y) - f(z))


def plain_ciede2000(first, second):
    (l1, a1, b1), (l2, a2, b2) = plain_lab(first), plain_lab(second)
    c = (math.hypot(a1, b1) + math.hypot(a2, b2)) / 2
    g = 0.5 * (1 - math.sqrt(c**7 / (c**7 + 25**7)))
    a1, a2 = a1 * (1 + g), a2 * (1 + g)
    c1, c2 = math.hypot(a1, b1), math.hypot(a2, b2)
    h1, h2 = math.degrees(math.atan2(b1, a1)) % 360, math.degrees(math.atan2(b2, a2)) % 360
    if c1 * c2 == 0:
        dh, h = 0.0, h1 + h2
    elif abs(h2 - h1) <= 180:
        dh, h = h2 - h1, (h1 + h2) / 2
    else:
        dh = h2 - h1 - 360 if h2 > h1 else h2 - h1 + 360
        h = (h1 + h2 + 360) / 2 if h1 + h2 < 360 else (h1 + h2 - 360) / 2
    c, lightness = (c1 + c2) / 2, (l1 + l2) / 2
    t = 1 - 0.17 * math.cos(math.radians(h - 30)) + 0.24 * math.cos(math.radians(2 * h))
    t += 0.32 * math.cos(math.radians(3 * h + 6)) - 0.2 * math.cos(math.radians(4 * h - 63))
    d_l = (l2 - l1) / (1 + 0.015 * (lightness - 50) ** 2 / math.sqrt(20 + (lightness - 50) ** 2))
    d_c = (c2 - c1) / (1 + 0.045 * c)
    d_h = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(dh / 2)) / (1 + 0.015 * c * t)
    turn = math.sin(math.radians(60 * math.exp(-(((h - 275) / 25) ** 2))))
    r_t = -2 * math.sqrt(c**7 / (c**7 + 25**7)) * turn
    return math.sqrt(max(d_l**2 + d_c**2 + d_h**2 + r_t * d_c * d_h, 0))


def plain_scores(ours, theirs, size):
    """Blocks are (text, box, colour, colour behind), all on pages of one `size`."""
    likeness = np.array(
        [[difflib.SequenceMatcher(None, a[0], b[0]).ratio() for b in theirs] for a in ours]
    )
    rows, columns = linear_sum_assignment(-likeness)
    pairs = [
        (ours[i], theirs[j]) for i, j in zip(rows, columns, strict=True) if likeness[i, j] >= 0.5
    ]

    def area(block):
        left, top, right, bottom = block[1]
        return (right - left) * (bottom - top)

    def centre(block, axis):
        return (block[1][axis] + block[1][axis + 2]) / 2 / size[axis]

    matched = sum(area(a) + area(b) for a, b in pairs)
    places = [1 - max(abs(centre(a, k) - centre(b, k)) for k in (0, 1)) for a, b in pairs]
    colors = [
        sum(max(1 - plain_ciede2000(a[k], b[k]) / 100, 0) for k in (2, 3)) / 2 for a, b in pairs
    ]
    return {
        "block_match": matched / sum(area(block) for block in [*ours, *theirs]),
        "position": sum(places) / len(places),
        "color": sum(colors) / len(colors),
    }


# --- composed pages ---


def some_color(some, dark):
    return tuple(some.randrange(*((0, 90) if dark else (150, 256))) for _ in range(3))


def composed(seed):
    """Two pages as lists of blocks: some are lost, moved, reworded, recoloured or new."""
    some = random.Random(seed)
    words = some.sample(WORDS, len(WORDS))
    slots = [(40 + 640 * (at % 2), 30 + 130 * (at // 2)) for at in range(24)]
    some.shuffle(slots)
    ours, theirs = [], []
    for at in range(some.randrange(6, 12)):
        # Two words that no other block has: its likeness to others is far below the threshold.
        text = f"{words[2 * at]} {words[2 * at + 1]}"
        left, top = slots[at]
        box = (left, top, left + some.randrange(80, 400), top + some.randrange(16, 48))
        color, behind = some_color(some, True), some_color(some, False)
        ours.append((text, box, color, behind))
        fate = some.random()
        if fate < 0.2:
            continue
        if fate < 0.5:
            right, down = some.randrange(0, 100), some.randrange(0, 40)
            box = (box[0] + right, box[1] + down, box[2] + right, box[3] + down)
        if 0.4 < fate < 0.7:
            color = some_color(some, True)
        if 0.6 < fate < 0.8:
            behind = some_color(some, False)
        if fate > 0.7:
            text = text[:-1]
        theirs.append((text, box, color, behind))
    theirs.append(("@@@@ 0123456789", (700, 1700, 900, 1740), (0, 0, 0), (255, 255, 255)))
    some.shuffle(theirs)
    return ours, theirs


def view_of(blocks):
    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    for _, (left, top, right, bottom), color, behind in blocks:
        draw.rectangle((left, top, right - 1, bottom - 1), behind)
        draw.rectangle((left + 4, top + 4, left + 20, top + 10), color)
    lines = tuple(Line(text, box, color) for text, box, color, _ in blocks)
    return View(picture=picture, lines=lines, tree=Tree((), ()), page_height=HEIGHT)


@pytest.mark.parametrize("seed", range(20))
def test_composed_pages_score_as_the_published_description_says(seed):
    ours, theirs = composed(seed)
    found = compare(view_of(ours), view_of(theirs)).score
    expected = plain_scores(ours, theirs, SIZE)
    assert expected["block_match"] < 0.99
    for part, value in expected.items():
        assert getattr(found, part) == pytest.approx(value, abs=TOLERANCE), part


@pytest.mark.parametrize(
    "damage",
    [
        "h1 { color: #c2185b }",
        ".card { position: relative; left: 90px }",
        "footer { display: none }",
    ],
)
def test_rendered_pages_score_as_the_published_description_says(renderer, damage):
    """Of the blocks that were found; the texts' own likeness decides nothing here."""
    reference, candidate = renderer.render_all(
        PageSource(html) for html in (shop(), shop(style=damage))
    )
    found = compare(reference, candidate)

    def plain(blocks):
        return [(block.text, block.box, block.color, block.background) for block in blocks]

    ours = plain([*(pair.reference for pair in found.pairs), *found.missing])
    theirs = plain([*(pair.candidate for pair in found.pairs), *found.surplus])
    size = reference.picture.width, max(reference.picture.height, candidate.picture.height)
    expected = plain_scores(ours, theirs, size)
    assert min(expected.values()) < 1
    for part, value in expected.items():
        assert getattr(found.score, part) == pytest.approx(value, abs=TOLERANCE), part
