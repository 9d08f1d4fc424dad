"""The text area shows its lines where they are broken."""

from __future__ import annotations

from textual.app import App, ComposeResult
from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.widgets import Static

from tests.tui.conftest import wait_until
from w2c_tui.tui.text_area import WrappedArea

# At 41 columns "eight" just fits into the first of two lines, with a scrollbar it does not.
TEXT = "one two three four five six seven eight nine ten"


class Column(App[None]):
    CSS = """
    VerticalScroll { scrollbar-size-vertical: 1; }
    WrappedArea { height: auto; border: none; padding: 0; scrollbar-gutter: auto; }
    """

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield WrappedArea(TEXT, soft_wrap=True, show_line_numbers=False, show_cursor=False)


def drawn(app):
    lines = (strip.text.rstrip() for strip in app.screen._compositor.render_strips())
    return [line for line in lines if line[:1].isalpha()]


def broken(area):
    return [line.rstrip() for line in area.wrapped_document.get_sections(0)]


async def test_words_that_move_within_as_many_lines_are_drawn_again():
    async with Column().run_test(size=(40, 10)) as pilot:
        area = pilot.app.query_one(WrappedArea)
        await wait_until(pilot, lambda: drawn(pilot.app) == broken(area))
        before = drawn(pilot.app)
        for width in (38, 41, 40, 41, 35, 40):
            await pilot.resize_terminal(width, 10)
            await wait_until(pilot, lambda: area.wrapped_document._width == area.wrap_width)
            await pilot.pause(0.1)
            assert drawn(pilot.app) == broken(area)
            assert len(drawn(pilot.app)) == 2
        assert drawn(pilot.app) == before


async def test_a_text_that_is_loaded_between_two_layouts_has_the_lines_of_the_last():
    async with Column().run_test(size=(41, 10)) as pilot:
        area = pilot.app.query_one(WrappedArea)
        await wait_until(pilot, lambda: drawn(pilot.app) == broken(area))
        before = broken(area)
        column = pilot.app.query_one(VerticalScroll)
        column.show_vertical_scrollbar = True
        pilot.app.screen._compositor._full_map_invalidated = True
        area.load_text(TEXT)
        column.show_vertical_scrollbar = False
        await pilot.pause(0.1)
        assert broken(area) == before == drawn(pilot.app)


async def test_it_makes_room_for_line_numbers_scrollbars_and_padding():
    async with Column().run_test(size=(40, 10)) as pilot:
        area = pilot.app.query_one(WrappedArea)
        for change in ("padding", "numbers", "bar", "endless"):
            if change == "padding":
                area.styles.padding = (0, 2, 0, 3)
            elif change == "numbers":
                area.show_line_numbers = True
            elif change == "bar":
                await pilot.app.query_one(VerticalScroll).mount(Static("\n" * 30))
            else:
                area.soft_wrap = False
            await pilot.pause(0.1)
            assert area.wrap_width == super(WrappedArea, area).wrap_width
            assert area.outer_size == Size(
                39 if change in ("bar", "endless") else 40, area.outer_size.height
            )
