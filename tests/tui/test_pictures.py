"""Pictures: how they get into the prompt, what stands for them, and how they are shown."""

from __future__ import annotations

import msgspec
import pytest
from PIL import Image
from textual import events
from textual.app import App
from textual.widgets import Input, Static

from tests.backends.contract import picture as attachment
from tests.tui.conftest import wait_until
from w2c_tui.core.conversation import TextLine
from w2c_tui.tui.picture import HalfCells, half_cells, protocol_for
from w2c_tui.tui.prompt_box import (
    PromptBox,
    pasted_references,
    tokens_in,
    without_outer_tokens,
)


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("[Image #1] make it blue", "make it blue"),
        ("[Image #1] [Image #2]\nmake it blue", "make it blue"),
        ("make it blue [Image #1] ", "make it blue"),
        ("like [Image #2] but as [Image #1] is", "like [Image #2] but as [Image #1] is"),
        ("[Image #1]", ""),
    ],
)
def test_tokens_around_the_words_are_not_part_of_them(typed, sent):
    assert without_outer_tokens(typed) == sent


def test_pasted_paths_are_pictures_and_prose_is_prose(picture):
    plain, spaced = picture("a.png"), picture("b c é.png")
    assert pasted_references(str(plain)) == [str(plain)]
    for spelling in (
        f"'{spaced}'",
        f'"{spaced}"',
        str(spaced).replace(" ", "\\ "),
        spaced.as_uri(),
    ):
        assert pasted_references(spelling) == [str(spaced)]
    assert pasted_references(f"{plain}\n'{spaced}'") == [str(plain), str(spaced)]
    assert pasted_references("https://example.org/x.png?y=1") == ["https://example.org/x.png?y=1"]
    for text in ("see a.png", f"{plain} is wrong", "/no/such.png", "", "https://example.org/"):
        assert pasted_references(text) == []


class Box(App[None]):
    def compose(self):
        yield PromptBox()


async def test_a_token_is_one_piece_for_cursor_and_deletion():
    async with Box().run_test() as pilot:
        box = pilot.app.query_one(PromptBox)
        box.focus()
        box.put_token(1)
        box.put("blue")
        assert box.text == "[Image #1] blue"
        await pilot.press("home", "right")
        assert box.cursor_location == (0, 10)
        await pilot.press("left")
        assert box.cursor_location == (0, 0)
        await pilot.press("delete")
        assert box.text == " blue"
        box.put_token(2)
        await pilot.press("backspace", "backspace")
        assert tokens_in(box.text) == []


async def test_history_goes_back_and_returns_to_the_draft():
    async with Box().run_test() as pilot:
        box = pilot.app.query_one(PromptBox)
        box.focus()
        box.prompts = ["newest", "oldest"]
        await pilot.press("up")
        assert box.text == "newest"
        await pilot.press("up", "up")
        assert box.text == "oldest"
        await pilot.press("down", "down")
        assert box.text == ""
        box.text = "draft"
        await pilot.press("ctrl+up", "ctrl+down")
        assert box.text == "draft"


async def test_a_dropped_quoted_path_becomes_a_picture(start, picture):
    path = picture("my shot.png")
    async with start() as pilot:
        screen = pilot.app.screen
        screen.prompt.post_message(events.Paste(f"'{path}'"))
        await wait_until(pilot, lambda: screen.draft)
        assert screen.prompt.text.strip() == "[Image #1]"
        assert screen.draft[0].name == "my shot.png"
        await pilot.press("backspace", "backspace")
        assert screen.draft == []


async def test_a_typed_path_becomes_a_picture(start, picture):
    path = picture()
    async with start() as pilot:
        screen = pilot.app.screen
        screen.prompt.text = str(path)
        await pilot.press("enter")
        await wait_until(pilot, lambda: screen.draft)
        assert not screen.transcript.messages


async def test_an_unreadable_picture_is_a_message_and_not_the_end(start, tmp_path):
    path = tmp_path / "not.png"
    path.write_text("hello")
    async with start() as pilot:
        pilot.app.screen.attach(str(path))
        await wait_until(pilot, lambda: pilot.app._notifications)
        assert "not.png" in next(iter(pilot.app._notifications)).message


async def test_images_of_the_command_line_are_attached_to_a_new_session(start, store, picture):
    store.create_session("Old")
    async with start(images=[str(picture())]) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.draft)
        assert pilot.app.screen.session is None


async def test_a_thumbnail_and_the_picture_in_full(start, picture, tiny_llava, settings):
    model = msgspec.structs.replace(settings.model, name=str(tiny_llava))
    async with start(settings=msgspec.structs.replace(settings, model=model)) as pilot:
        screen = pilot.app.screen
        screen.add_picture(attachment("red", (1280, 1000)))
        await wait_until(
            pilot, lambda: "too small to read" in str(screen.query_one("#hint").content)
        )
        await pilot.press("enter")
        await wait_until(pilot, lambda: screen.transcript.messages and not pilot.app.answers)
        await wait_until(pilot, lambda: screen.query("Thumbnail HalfCells").first().image)
        await pilot.press("f3")
        await wait_until(pilot, lambda: screen.query("#picture-frame HalfCells"))
        full = screen.query_one("#picture-frame HalfCells", HalfCells).image
        assert full.size == (1280, 1000)
        await pilot.press("m")
        await wait_until(
            pilot, lambda: screen.query_one("#picture-frame HalfCells").image.size == (56, 56)
        )
        assert "too small" in str(screen.query_one("#picture-note", Static).content)
        await pilot.press("escape")
        assert not screen.query("#picture")


async def test_a_model_without_eyes_shows_what_it_is_given(start, settings):
    async with start() as pilot:
        screen = pilot.app.screen
        lines = (TextLine("A warm welcome!", (10, 10, 80, 30)),)
        screen.add_picture(msgspec.structs.replace(attachment("red"), page_text=lines))
        await pilot.press("f3")
        await wait_until(pilot, lambda: screen.query("#picture-frame HalfCells"))
        await pilot.press("m")
        await wait_until(pilot, lambda: screen.query("#picture-frame Static"))
        shown = str(screen.query("#picture-frame Static").first().content)
        assert "A warm welcome!" in shown


async def test_the_picker_returns_the_file_that_is_chosen(start, picture, monkeypatch, tmp_path):
    picture("one.png")
    monkeypatch.chdir(tmp_path)
    async with start() as pilot:
        await pilot.press("ctrl+t")
        await wait_until(pilot, lambda: len(pilot.app.screen_stack) == 2)
        box = pilot.app.screen.query_one(Input)
        box.value = "one.png"
        box.focus()
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app.screen_stack[0].draft)


def test_half_cells_keep_proportions_and_colours():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 10, 40, 20))
    strips = half_cells(image, 20, 20)
    assert len(strips) == 5
    assert strips[0].cell_length == 20
    assert strips[0]._segments[0].style.color.triplet.hex == "#ff0000"
    assert strips[-1]._segments[0].style.bgcolor.triplet.hex == "#0000ff"
    assert len(half_cells(Image.new("RGB", (1, 5000)), 20, 20)) == 20


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "sixel"),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1"}, "half-cells"),
        ({"TERM": "dumb"}, "none"),
    ],
)
def test_the_protocol_is_guessed_and_can_be_set(environment, protocol, monkeypatch):
    monkeypatch.setattr("os.environ", environment)
    assert protocol_for("auto") == protocol
    assert protocol_for("kitty") == "kitty"
