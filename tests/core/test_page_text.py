"""The text block of a prompt: its exact form is what models are trained on."""

from __future__ import annotations

import msgspec
import pytest

from w2c_tui.core.conversation import TextLine
from w2c_tui.core.page_text import HEADER, format_page_text


def line(text: str, left: int, top: int, right: int, bottom: int) -> TextLine:
    return TextLine(text=text, box=(left, top, right, bottom))


def rows(*lines: TextLine, size: tuple[int, int] = (1000, 2000)) -> list[str]:
    header, *rest = format_page_text(lines, size).split("\n")
    assert header == HEADER.format(width=size[0], height=size[1], colors="")
    return rest


def test_block_has_this_exact_form() -> None:
    text = format_page_text(
        [line("Start Bootstrap", 113, 14, 266, 42), line("Home", 967, 16, 1158, 39)], (1280, 1460)
    )
    assert text == (
        "Text on the page, 1280 px wide, 1460 px high (left top width size text):\n"
        "9 1 12 22 Start Bootstrap\n76 1 15 18 Home"
    )


def test_no_lines_make_no_block() -> None:
    assert format_page_text([], (1280, 720)) == ""


def test_one_unit_is_the_same_length_in_both_directions_on_any_height() -> None:
    low = line("Footer", 100, 5000, 300, 5020)
    assert rows(low, size=(1000, 800)) == rows(low, size=(1000, 9000)) == ["10 500 20 20 Footer"]


def test_wrapped_lines_become_one_paragraph() -> None:
    assert rows(
        line("Bootstrap utility classes are used to create", 100, 100, 800, 130),
        line("this jumbotron since the old component was", 100, 136, 780, 166),
        line("removed.", 100, 172, 240, 202),
    ) == [
        "10 10 70 30 Bootstrap utility classes are used to create "
        "this jumbotron since the old component was removed."
    ]


def test_centred_columns_that_interleave_stay_apart() -> None:
    assert rows(
        line("With Bootstrap 5 we made a fresh layout", 100, 100, 500, 120),
        line("As always there is a powerful collection", 600, 100, 1000, 120),
        line("for this template!", 220, 121, 380, 141),
        line("of free templates.", 720, 121, 880, 141),
    ) == [
        "10 10 40 20 With Bootstrap 5 we made a fresh layout for this template!",
        "60 10 40 20 As always there is a powerful collection of free templates.",
    ]


@pytest.mark.parametrize(
    "below",
    [
        line("Dedicated support", 100, 160, 300, 180),  # too far down
        line("A heading in larger letters", 100, 122, 400, 160),
        line("Another column starts here", 700, 122, 900, 142),
        line("A line that is much longer than the one above it is no part", 100, 122, 900, 142),
    ],
    ids=["gap", "size", "column", "longer"],
)
def test_other_lines_below_stay_apart(below: TextLine) -> None:
    assert len(rows(line("Unlimited private projects", 100, 100, 400, 120), below)) == 2


def test_short_list_items_stay_apart() -> None:
    items = [line(f"Item {at}", 100, 100 + 20 * at, 200, 120 + 20 * at) for at in range(5)]
    assert len(rows(*items)) == 5


def test_line_breaks_and_blank_lines_in_text_cannot_break_the_form() -> None:
    assert rows(line("two\nlines\t here", 0, 0, 100, 20), line("  ", 0, 50, 100, 70)) == [
        "0 0 10 20 two lines here"
    ]


def test_page_without_size_is_no_division_by_zero() -> None:
    assert rows(line("x", 0, 0, 1, 1), size=(0, 0)) == ["0 0 100 1000 x"]


def test_colours_stand_before_the_text_where_every_line_has_them() -> None:
    def colored(text: str, top: int, ink: tuple, ground: tuple) -> TextLine:
        return TextLine(text, (100, top, 300, top + 20), ink=ink, ground=ground)

    lines = [
        colored("Sign in", 100, (254, 255, 253), (65, 105, 225)),
        colored("Read more", 200, (30, 33, 35), (255, 254, 255)),
    ]
    header, *rest = format_page_text(lines, (1000, 500)).split("\n")
    assert header == HEADER.format(width=1000, height=500, colors=" ink ground")
    assert rest == ["10 10 20 20 white royalblue Sign in", "10 20 20 20 #222 white Read more"]
    without = [*lines, line("Plain", 10, 300, 90, 320)]
    assert "royalblue" not in format_page_text(without, (1000, 500))


def test_lines_on_different_backgrounds_are_no_paragraph() -> None:
    first = line("Bootstrap utility classes are used to create", 100, 100, 800, 130)
    second = line("this jumbotron since the old component was", 100, 136, 780, 166)
    ink, white, red = (0, 0, 0), (255, 255, 255), (220, 20, 60)

    def text(ground: tuple[int, int, int]) -> str:
        lines = [
            msgspec.structs.replace(first, ink=ink, ground=white),
            msgspec.structs.replace(second, ink=ink, ground=ground),
        ]
        return format_page_text(lines, (1000, 2000))

    assert text(white).count("\n") == 1
    assert text(red).count("\n") == 2
