"""The outline of a page, from lines and areas whose places are known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from w2c_tui.core.conversation import TextLine
from w2c_tui.core.page_layout import HEADER, described, format_layout

WHITE, DARK, NAVY, GREY = (255, 255, 255), (34, 34, 34), (0, 0, 128), (204, 204, 204)


def area(left: int, top: int, right: int, bottom: int, ground=WHITE, border=None) -> TextLine:
    return TextLine("", (left, top, right, bottom), ink=border, ground=ground)


def text(words: str, left: int, top: int, *, em: int = 16, ink=DARK, ground=WHITE) -> TextLine:
    """A line of letters half as wide as high."""
    box = (left, top, left + round(len(words) * em / 2), top + round(1.2 * em))
    return TextLine(words, box, ink=ink, ground=ground)


def outline(*lines: TextLine, size: tuple[int, int] = (800, 600)) -> list[str]:
    header, *rows = format_layout([area(0, 0, *size), *lines], size).split("\n")
    assert header == HEADER
    return rows


def test_a_bar_holds_its_entries_in_a_row_with_their_distances() -> None:
    bar = [text("Home", 24, 20, ink=WHITE, ground=NAVY), text("Blog", 80, 22, ink=WHITE)]
    assert outline(area(0, 0, 800, 60, NAVY), *bar, text("Welcome", 24, 100, em=32)) == [
        "page 800 600 white #222",
        " box 0 0 full 60 navy white pad 20 24",
        "  row 0 0 gap 24",
        "   0 0 Home",
        "   0 0 Blog",
        " 24 40 s32 Welcome",
    ]


def test_the_usual_size_is_that_of_most_letters_and_is_not_repeated() -> None:
    lines = [text("A head", 20, 20, em=24), text("What stands below it is longer", 20, 60)]
    assert outline(*lines) == [
        "page 800 600 white #222 pad 20 20",
        " 0 0 s24 A head",
        " 0 11 What stands below it is longer",
    ]


def test_cards_are_columns_and_what_is_on_them_counts_from_their_corner() -> None:
    lines = []
    for left in (20, 420):
        lines += [area(left, 100, left + 360, 200, GREY, DARK), text("Plan", left + 16, 116)]
        lines.append(text("Free", left + 16, 145))
    assert outline(text("Prices", 20, 40), *lines) == [
        "page 800 600 white #222 pad 40 20",
        " 0 0 Prices",
        " row 0 41 gap 40",
        "  box 0 0 360 100 #ccc line #222 pad 15 15",
        "   0 0 Plan",
        "   0 10 Free",
        "  box 0 0 360 100 #ccc line #222 pad 15 15",
        "   0 0 Plan",
        "   0 10 Free",
    ]


def test_columns_without_areas_are_read_one_after_the_other() -> None:
    lines = [
        *(text("One", 20, 20, em=24), text("Two", 420, 20, em=24)),
        *(text("below one", 20, 60), text("below two", 420, 60)),
    ]
    assert outline(*lines) == [
        "page 800 600 white #222 pad 20 20",
        " row 0 0",
        "  col 0 0 400",
        "   0 0 s24 One",
        "   0 11 below one",
        "  col 0 0 72",
        "   0 0 s24 Two",
        "   0 11 below two",
    ]


def test_a_table_is_read_row_by_row() -> None:
    lines = [
        text(words, left, top)
        for top, row in ((20, ("Ann", "Oslo")), (50, ("Bo", "Rome")), (80, ("Cy", "Bonn")))
        for left, words in zip((20, 420), row, strict=True)
    ]
    rows = outline(*lines)
    assert [row.split(" ")[-1] for row in rows if not row.startswith((" row", "page"))] == [
        *("Ann", "Oslo", "Bo", "Rome", "Cy", "Bonn")
    ]
    assert sum(row.startswith(" row") for row in rows) == 3


def test_a_menu_beside_a_page_is_a_column_of_its_own() -> None:
    menu = [text(words, 20, top) for words, top in (("Inbox", 20), ("Tasks", 61), ("Team", 105))]
    page = [
        text("What there is to say about it", 300, 30),
        text("More of that", 300, 80),
        text("The end", 300, 140),
    ]
    rows = outline(*menu, *page)
    words = [row.split(" ", 5)[-1] for row in rows[3:]]
    assert rows[1:3] == [" row 0 0", "  col 0 0 280"]
    assert "".join(words).index("Team") < "".join(words).index("What there")


def test_lines_of_a_paragraph_are_one_with_its_width_and_the_height_of_its_lines() -> None:
    lines = [
        text("This is a long line of text that", 100, 100),
        text("goes on in the next one, too", 100, 124),
    ]
    # 24 px for each line: 2 px above and below letters of 16 px, and a little room at the right.
    assert outline(*lines) == [
        "page 800 600 white #222 pad 98 100",
        " 0 0 w262/24 This is a long line of text that goes on in the next one, too",
    ]


def test_what_is_in_the_middle_is_said_to_be() -> None:
    rows = outline(text("Welcome!", 336, 50, em=32), text("Left of it", 20, 120))
    assert rows[1:] == [" mid 0 s32 Welcome!", " 20 32 Left of it"]


def test_a_box_with_a_line_and_nothing_else_has_it_in_its_own_line() -> None:
    button = TextLine("", (20, 100, 136, 136), ground=NAVY, radius=8)
    label = text("Send it", 50, 108, ink=WHITE, ground=NAVY)
    field = [area(20, 160, 420, 200, border=GREY), text("Name", 32, 170, em=13)]
    assert outline(text("What do you want to say?", 20, 40), button, label, *field)[2:] == [
        " box 0 41 116 36 navy white round 8 mid 8: Send it",
        " box 0 24 400 40 white line #ccc pad 9 11: s13 Name",
    ]


def test_gaps_of_a_row_are_said_once_and_what_stands_farther_has_room_before_it() -> None:
    entries = [text(words, left, 20) for words, left in (("Us", 0), ("Go", 500), ("No", 540))]
    assert outline(*entries, text("Yes", 580, 20))[1:] == [
        *(" row 0 0 gap 24", "  0 0 w476 Us", "  0 0 Go", "  0 0 No", "  0 0 Yes")
    ]


def test_what_is_in_the_middle_of_a_row_of_several_heights_is_level() -> None:
    picture = area(20, 20, 120, 120, NAVY)
    assert outline(picture, text("Ann", 140, 60))[1:] == [
        *(" row 0 0 gap 20 level", "  box 0 0 100 100 navy", "  0 0 Ann")
    ]


def test_ink_is_only_named_where_it_differs() -> None:
    lines = [text("Black", 20, 20), text("Grey", 20, 60, ink=(119, 119, 119))]
    assert outline(*lines, text("Black", 20, 100))[1:] == [
        *(" 0 0 Black", " 0 21 =#777 Grey", " 0 21 Black")
    ]


def test_an_area_like_what_it_lies_on_is_none() -> None:
    assert outline(area(50, 50, 200, 200), text("In it", 60, 60))[1:] == [" 0 0 In it"]


def test_without_areas_it_is_a_list_of_lines() -> None:
    assert described([text("Hello", 10, 10)], (100, 100)).startswith("Text on the page")
    assert described([area(0, 0, 9, 9), text("Hello", 1, 1)], (100, 100)).startswith(HEADER)
    assert described([], (100, 100)) == ""


numbers = st.integers(-50, 900)
boxes = st.tuples(numbers, numbers, numbers, numbers)
anything = st.builds(
    TextLine,
    st.sampled_from(["", "a", "Some words of text that are long", "x\ny"]),
    boxes,
    ink=st.sampled_from([None, DARK, WHITE]),
    ground=st.sampled_from([None, WHITE, NAVY, GREY]),
)


@given(st.lists(anything, max_size=40))
def test_every_line_is_told_once_whatever_the_boxes(lines: list[TextLine]) -> None:
    rows = described(lines, (800, 600)).split("\n")
    told = " ".join(rows[1:]).split()
    expected = [word for line in lines for word in line.text.split()]
    assert sum(word == "long" for word in told) == expected.count("long")
    assert sum(word == "y" for word in told) == expected.count("y")
