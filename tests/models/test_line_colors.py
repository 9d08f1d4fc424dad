"""Colours of lines, read off a picture whose colours are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from w2c_tui.core.colors import distance
from w2c_tui.core.conversation import TextLine
from w2c_tui.models.page_text import with_colors

PAIRS = [
    ((255, 255, 255), (65, 105, 225)),
    ((34, 34, 34), (255, 255, 255)),
    ((119, 119, 119), (245, 245, 245)),
    ((255, 215, 0), (25, 25, 112)),
    ((220, 20, 60), (255, 228, 225)),
]


@pytest.mark.parametrize(("ink", "ground"), PAIRS)
@pytest.mark.parametrize("size", [13, 16, 40])
def test_ink_and_ground_are_found(
    ink: tuple[int, int, int], ground: tuple[int, int, int], size: int
) -> None:
    picture = Image.new("RGB", (600, 120), (200, 200, 200))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((20, 20, 580, 100), fill=ground)
    draw.text((40, 40), "Sign up today", fill=ink, font=ImageFont.load_default(size))
    left, top, right, bottom = draw.textbbox(
        (40, 40), "Sign up today", font=ImageFont.load_default(size)
    )
    # Recognisers' boxes are wider than the ink.
    box = (int(left) - 6, int(top) - 4, int(right) + 5, int(bottom) + 2)
    (line,) = with_colors(picture, [TextLine("Sign up today", box)])
    assert line.ground == ground
    assert line.ink is not None
    assert distance(line.ink, ink) < 8


def test_a_box_without_letters_has_no_ink_and_one_outside_has_nothing() -> None:
    picture = Image.new("RGB", (100, 100), "navy")
    lines = with_colors(
        picture, [TextLine("a", (10, 10, 50, 30)), TextLine("b", (200, 10, 250, 30))]
    )
    assert [(line.ink, line.ground) for line in lines] == [(None, (0, 0, 128)), (None, None)]


def test_recognition_brings_colours_when_asked(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr", reason="text recognition is not installed")
    from w2c_tui.models.page_text import read_hints

    picture = Image.new("RGB", (800, 200), "maroon")
    font = ImageFont.load_default(36)
    ImageDraw.Draw(picture).text((60, 70), "Subscribe now", fill="gold", font=font)
    (line,) = read_hints(picture, "colors")
    assert line.text == "Subscribe now"
    assert line.ground == (128, 0, 0)
    assert line.ink is not None
    assert distance(line.ink, (255, 215, 0)) < 8
    assert read_hints(picture, "text")[0].ink is None
