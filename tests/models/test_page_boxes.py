"""Areas and lines of drawn pictures whose places are known."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from w2c_tui.core.conversation import TextLine
from w2c_tui.models.page_boxes import with_layout

PAGE, CARD, NAVY, LINE = (245, 245, 245), (255, 255, 255), (0, 0, 128), (204, 204, 204)


def page(size: tuple[int, int] = (800, 500)) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", size, PAGE)
    return picture, ImageDraw.Draw(picture)


def areas(picture: Image.Image, *lines: TextLine) -> list[tuple]:
    found = with_layout(picture, lines)
    return [(line.box, line.ground, line.ink) for line in found if not line.text]


def written(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int = 16, fill="black"
) -> TextLine:
    """Writes `text` and returns what a recogniser would say: a box that is too wide."""
    font = ImageFont.load_default(size)
    draw.text(place, text, fill=fill, font=font)
    left, top, right, bottom = (round(value) for value in draw.textbbox(place, text, font=font))
    return TextLine(text, (left - 7, top - 5, right + 6, bottom + 4))


def test_bands_cards_and_buttons_are_found_to_the_pixel() -> None:
    picture, draw = page()
    draw.rectangle((0, 0, 799, 59), fill=NAVY)
    draw.rectangle((20, 100, 379, 299), fill=CARD)
    draw.rectangle((40, 240, 139, 279), fill=NAVY)
    line = written(draw, (40, 120), "A card")
    assert areas(picture, line) == [
        ((0, 0, 800, 500), PAGE, None),
        ((0, 60, 800, 500), PAGE, None),
        ((20, 100, 380, 300), CARD, None),
        ((0, 0, 800, 60), NAVY, None),
        ((40, 240, 140, 280), NAVY, None),
    ]


@pytest.mark.parametrize("radius", [0, 12])
@pytest.mark.parametrize("width", [1, 2])
def test_a_border_belongs_to_its_box_even_with_round_corners(radius: int, width: int) -> None:
    picture, draw = page()
    draw.rounded_rectangle((50, 50, 349, 99), radius, fill=CARD, outline=LINE, width=width)
    assert ((50, 50, 350, 100), CARD, LINE) in areas(picture)


def test_a_box_with_nothing_but_a_border_is_one() -> None:
    picture, draw = page()
    draw.rounded_rectangle((50, 50, 199, 89), 8, outline=NAVY, width=2)
    assert ((50, 50, 200, 90), PAGE, NAVY) in areas(picture)


def test_the_edge_of_a_shadow_is_no_area_but_a_bar_is() -> None:
    picture, draw = page()
    draw.rectangle((20, 100, 379, 299), fill=CARD)
    draw.rectangle((40, 300, 359, 303), fill=(236, 236, 236))
    draw.rectangle((40, 200, 359, 203), fill=NAVY)
    draw.rectangle((40, 220, 359, 229), fill=(238, 238, 238))
    found = [box for box, *_ in areas(picture)]
    assert (40, 200, 360, 204) in found
    assert (40, 220, 360, 230) in found
    assert (40, 300, 360, 304) not in found


def test_letters_and_what_is_in_them_are_no_areas() -> None:
    picture, draw = page()
    line = written(draw, (40, 40), "BOOM", 120)
    assert areas(picture, line) == [((0, 0, 800, 500), PAGE, None)] * 2


def test_the_page_has_the_colour_of_its_edges_not_the_commonest() -> None:
    picture, draw = page()
    draw.rectangle((10, 10, 789, 489), fill=CARD)
    assert areas(picture)[0] == ((0, 0, 800, 500), PAGE, None)


def test_a_line_has_the_box_of_its_font_whatever_its_letters() -> None:
    picture, draw = page()
    lines = [
        written(draw, (40, 40 + 60 * at), text, 20)
        for at, text in enumerate(("Tall", "happy gap", "sear", "Quality"))
    ]
    found = [line for line in with_layout(picture, lines) if line.text]
    tops = [line.box[1] - 60 * at for at, line in enumerate(found)]
    heights = [line.box[3] - line.box[1] for line in found]
    assert max(tops) - min(tops) <= 3
    assert max(heights) - min(heights) <= 3
    assert 22 <= min(heights) <= max(heights) <= 28


def test_a_box_that_reaches_beyond_its_field_is_cut_to_it() -> None:
    picture, draw = page()
    draw.rounded_rectangle((50, 50, 349, 85), 12, fill=CARD, outline=LINE)
    line = written(draw, (62, 58), "Name", 16, (117, 117, 117))
    wide = TextLine("Name", (45, 44, 120, 92))
    exact, cut = (
        next(found for found in with_layout(picture, [each]) if found.text) for each in (line, wide)
    )
    assert cut == exact
    assert cut.ground == CARD


def test_a_line_above_does_not_make_a_line_higher() -> None:
    picture, draw = page()
    above = written(draw, (40, 40), "gypsy", 16)
    below = written(draw, (40, 60), "Address", 16)
    reaching = TextLine("Address", (33, above.box[1] + 8, below.box[2], below.box[3]))
    exact, found = (
        [line for line in with_layout(picture, [above, each]) if line.text][1]
        for each in (below, reaching)
    )
    assert found.box == exact.box


def test_entries_of_a_menu_that_were_read_as_one_line_are_told_apart() -> None:
    picture, draw = page()
    parts = [written(draw, (left, 40), text) for left, text in ((40, "Our team"), (130, "Blog"))]
    joined = TextLine(
        "Our team Blog", (parts[0].box[0], parts[0].box[1], parts[1].box[2], parts[1].box[3])
    )
    found = [line for line in with_layout(picture, [joined]) if line.text]
    apart = [line for line in with_layout(picture, parts) if line.text]
    assert [line.text for line in found] == ["Our team", "Blog"]
    assert [line.box for line in found] == [line.box for line in apart]


def test_an_entry_without_high_letters_is_as_large_as_its_neighbours() -> None:
    picture, draw = page()
    parts = [written(draw, (left, 40), text) for left, text in ((40, "news"), (130, "Gallery"))]
    joined = TextLine("news Gallery", (*parts[0].box[:2], *parts[1].box[2:]))
    first, second = (line for line in with_layout(picture, [joined]) if line.text)
    assert abs(first.box[3] - first.box[1] - second.box[3] + second.box[1]) <= 3


@pytest.mark.parametrize("font", [None, "DejaVuSansMono.ttf", "LiberationSans-Regular.ttf"])
@pytest.mark.parametrize(
    "text",
    [
        *("A sentence with words in it, and more.", "we can use an iron saw as we run on"),
        *("npm install the package", "i l i l i l"),
    ],
)
def test_a_sentence_is_not_taken_apart(text: str, font: str | None) -> None:
    picture, draw = page()
    try:
        loaded = ImageFont.truetype(font, 16) if font else ImageFont.load_default(16)
    except OSError:
        pytest.skip(f"{font} is not installed")
    draw.text((40, 40), text, fill="black", font=loaded)
    box = tuple(round(value) for value in draw.textbbox((40, 40), text, font=loaded))
    line = TextLine(text, (box[0] - 7, box[1] - 5, box[2] + 6, box[3] + 4))
    assert [each.text for each in with_layout(picture, [line]) if each.text] == [text]


@pytest.mark.parametrize("height", [18, 20, 24, 40])
def test_text_in_a_low_badge_and_at_the_edge_of_the_page_keeps_its_size(height: int) -> None:
    picture, draw = page()
    free = written(draw, (40, 200), "Type")
    top = 300 + (height - 16) // 2 - 2
    draw.rectangle((90, 300, 160, 300 + height - 1), fill=NAVY)
    badge = written(draw, (100, top), "Type", fill="white")
    corner = written(draw, (0, -3), "Type")
    found = [line.box for line in with_layout(picture, [free, badge, corner]) if line.text]
    heights = [bottom - top for _, top, _, bottom in found]
    assert abs(heights[1] - heights[0]) <= 3
    assert found[2][0] <= 1
    assert all(0 <= top < bottom for _, top, _, bottom in found)


def test_photographs_and_noise_do_no_harm() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    lines = [TextLine("On a photo", (100, 100, 300, 130)), TextLine("outside", (700, 0, 800, 9))]
    found = with_layout(picture, lines)
    assert [line.text for line in found if line.text] == ["On a photo", "outside"]
    assert len(found) <= 2 + 65


@pytest.mark.parametrize("quality", [75, 90])
def test_areas_of_a_jpeg_are_found(quality: int) -> None:
    picture, draw = page()
    draw.rectangle((99, 101, 401, 299), fill=NAVY)
    for top in range(20, 500, 40):
        written(draw, (420, top), "Letters that leave their traces around them")
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    found = areas(Image.open(data).convert("RGB"))
    assert any(
        max(abs(a - b) for a, b in zip(box, (99, 101, 402, 300), strict=True)) <= 3
        and max(abs(a - b) for a, b in zip(ground, NAVY, strict=True)) <= 10
        for box, ground, _ in found[1:]
    )


@pytest.mark.parametrize("quality", [75, 95])
def test_colours_near_to_each_other_stay_apart_in_a_jpeg(quality: int) -> None:
    picture, draw = page()
    for left in (40, 280, 520):
        draw.rectangle((left, 100, left + 199, 299), fill=CARD)
        written(draw, (left + 20, 120), "A white card on a pale page")
    for top in range(320, 500, 20):
        written(draw, (40, top), "Letters that leave their traces around them and more of them")
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    found = areas(Image.open(data).convert("RGB"))
    cards = [box for box, ground, _ in found if min(ground) >= 253 and box[2] - box[0] < 300]
    assert len([box for box in cards if box[2] - box[0] > 190]) == 3


def test_a_gradient_is_no_sign_of_a_lossy_format() -> None:
    picture, draw = page()
    for left in range(800):
        draw.line((left, 0, left, 149), fill=(left * 255 // 800, 80, 200))
    draw.rectangle((40, 200, 300, 400), fill=CARD)
    assert ((40, 200, 301, 401), CARD, None) in areas(picture)


def test_single_dots_are_no_areas() -> None:
    board = np.indices((1000, 1000)).sum(axis=0) % 2 * 255
    found = areas(Image.fromarray(board.astype(np.uint8)))
    assert [box for box, _, _ in found] == [(0, 0, 1000, 1000)]


def test_the_smallest_picture_has_a_page() -> None:
    assert areas(Image.new("RGB", (1, 1), "red"))[0] == ((0, 0, 1, 1), (255, 0, 0), None)


@pytest.mark.parametrize("border", [0, 2])
@pytest.mark.parametrize("radius", [0, 4, 8, 12, 20])
def test_round_corners_are_measured(radius: int, border: int) -> None:
    # Smooth edges, as browsers draw them.
    large = Image.new("RGB", (3200, 2000), PAGE)
    box = (200, 200, 1399, 599)
    outline = LINE if border else None
    drawn = ImageDraw.Draw(large)
    drawn.rounded_rectangle(box, 4 * radius, fill=NAVY, outline=outline, width=4 * border)
    picture = large.resize((800, 500), Image.Resampling.BOX)
    (found,) = [area for area in with_layout(picture, []) if not area.text and area.ground == NAVY]
    assert found.box == (50, 50, 350, 150)
    assert abs(found.radius - radius) <= 1


def test_what_lies_on_corners_does_not_make_them_round() -> None:
    picture, draw = page()
    draw.rectangle((50, 50, 349, 249), fill=CARD)
    draw.rectangle((50, 50, 149, 69), fill=NAVY)
    draw.rectangle((250, 50, 349, 69), fill=NAVY)
    assert [area.radius for area in with_layout(picture, []) if area.ground == CARD] == [0]
