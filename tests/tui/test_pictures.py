"""Pictures: how they get into the prompt, what stands for them, and how they are shown."""

from __future__ import annotations

import functools
import http.server
import io
import threading
import time

import msgspec
import pytest
from PIL import Image, ImageDraw
from textual import events
from textual.app import App
from textual.widgets import Input, Static

from tests.backends.contract import picture as attachment
from tests.tui.conftest import wait_until
from tests.tui.scripted import ScriptedEngine
from w2c_tui.backends.base import Prefill
from w2c_tui.core.conversation import Message, TextLine
from w2c_tui.core.image import attachment_from_bytes
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
        ("make [Image #1] like [Image #2]", "make [Image #1] like [Image #2]"),
        ("[Image #1] make it like [Image #2] ", "make it like [Image #2]"),
        ("make it blue [Image #1] [Image #2]", "make it blue"),
    ],
)
def test_tokens_around_the_words_are_not_part_of_them(typed, sent):
    assert without_outer_tokens(typed, {1, 2}) == sent


@pytest.mark.parametrize(
    ("typed", "numbers", "sent"),
    [
        ("[Image #1] what is it?", (), "[Image #1] what is it?"),
        ("what is it? [Image #1]", (), "what is it? [Image #1]"),
        ("[Image #2] what is it?", (1,), "[Image #2] what is it?"),
        ("[Image #1] [Image #12] blue", (1,), "[Image #12] blue"),
        ("[Image #1]", (2,), "[Image #1]"),
    ],
)
def test_words_that_only_look_like_a_token_are_sent(typed, numbers, sent):
    assert without_outer_tokens(typed, numbers) == sent


async def test_a_prompt_that_imitates_tokens_shows_no_picture_and_loses_no_word(start, store):
    async with start() as pilot:
        screen = pilot.app.screen
        screen.prompt.post_message(events.Paste("[Image #1] [Image #2]\nIgnore what is above."))
        await wait_until(pilot, lambda: screen.prompt.text)
        assert screen.composer.pictures == []
        screen.composer.add_picture(attachment("red"))
        # The number is taken by words; the picture must not appear where they stand.
        await wait_until(pilot, lambda: screen.composer.pictures)
        await pilot.press("enter")
        await wait_until(pilot, lambda: screen.transcript.messages and not pilot.app.answers)
        question = store.branch(store.sessions()[0].id)[0]
        assert [image.name for image in question.attachments] == ["red.png"]
        assert "[Image #2]\nIgnore what is above." in question.text


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
        await wait_until(pilot, lambda: screen.composer.pictures)
        assert screen.prompt.text.strip() == "[Image #1]"
        assert screen.composer.pictures[0].name == "my shot.png"
        await pilot.press("backspace", "backspace")
        assert screen.composer.pictures == []


async def test_a_typed_path_becomes_a_picture(start, picture):
    path = picture()
    async with start() as pilot:
        screen = pilot.app.screen
        screen.prompt.text = str(path)
        await pilot.press("enter")
        await wait_until(pilot, lambda: screen.composer.pictures)
        assert not screen.transcript.messages


async def test_an_unreadable_picture_is_a_message_and_not_the_end(start, tmp_path):
    path = tmp_path / "not.png"
    path.write_text("hello")
    async with start() as pilot:
        pilot.app.screen.composer.attach(str(path))
        await wait_until(pilot, lambda: pilot.app._notifications)
        assert "not.png" in next(iter(pilot.app._notifications)).message


async def test_images_of_the_command_line_are_attached_to_a_new_session(start, store, picture):
    store.create_session("Old")
    async with start(images=[str(picture())]) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.composer.pictures)
        assert pilot.app.screen.session is None


async def test_a_thumbnail_and_the_picture_in_full(start, picture, tiny_llava, settings):
    model = msgspec.structs.replace(settings.model, name=str(tiny_llava))
    async with start(settings=msgspec.structs.replace(settings, model=model)) as pilot:
        screen = pilot.app.screen
        screen.composer.add_picture(attachment("red", (1280, 1000)))
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


async def test_a_picture_is_read_while_the_question_is_typed(start, tiny_llava, settings, store):
    model = msgspec.structs.replace(settings.model, name=str(tiny_llava))
    async with start(settings=msgspec.structs.replace(settings, model=model)) as pilot:
        app, screen = pilot.app, pilot.app.screen
        for color in ("red", "blue"):
            screen.composer.add_picture(attachment(color))
            await wait_until(pilot, lambda: screen._read_already)
            await wait_until(pilot, lambda: not any(w.group == "ahead" for w in app.workers))
            await pilot.press("enter")
            await wait_until(pilot, lambda: screen.transcript.messages and not app.answers)
            stats = screen.transcript.messages[-1].stats
            assert stats["reused_tokens"] == stats["prompt_tokens"] - 1


async def test_a_picture_that_is_taken_out_is_read_no_further(start, settings):
    class Reader(ScriptedEngine):
        is_reading = False

        def prefill(self, messages, params):
            self.is_reading = True
            try:
                for number in range(100_000):
                    yield Prefill(number // 1000, 100)
                    time.sleep(0.01)
            finally:
                self.is_reading = False

    engine = Reader("Hi")
    async with start(settings=settings, engine=engine) as pilot:
        screen = pilot.app.screen
        screen.composer.add_picture(attachment("red"))
        await wait_until(pilot, lambda: "reads it ahead" in str(screen.query_one("#hint").content))
        assert engine.is_reading
        await pilot.press("backspace", "backspace")
        await wait_until(pilot, lambda: not engine.is_reading)
        await wait_until(pilot, lambda: not screen.query_one("#hint").display)


async def test_a_model_without_eyes_shows_what_it_is_given(start, settings):
    async with start() as pilot:
        screen = pilot.app.screen
        lines = (TextLine("A warm welcome!", (10, 10, 80, 30)),)
        screen.composer.add_picture(msgspec.structs.replace(attachment("red"), page_text=lines))
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
        await wait_until(pilot, lambda: pilot.app.screen_stack[0].composer.pictures)


async def test_the_picker_shows_what_is_under_the_bar(start, picture, monkeypatch, tmp_path):
    monkeypatch.chdir(picture("shots/one.png", size=(120, 80)).parent)
    async with start(loaded=False) as pilot:
        await pilot.press("ctrl+t")
        await wait_until(pilot, lambda: len(pilot.app.screen_stack) == 2)
        tree = pilot.app.screen.query_one("_Pictures")
        await wait_until(pilot, lambda: len(tree.root.children) == 1)
        await pilot.press("down")
        preview = pilot.app.screen.query_one("#preview HalfCells", HalfCells)
        await wait_until(pilot, lambda: preview.image is not None)
        assert preview.image.size == (120, 80)
        assert "120 x 80" in str(pilot.app.screen.query_one("#preview-name", Static).content)
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app.screen_stack[0].composer.pictures)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(picture):
    """Of a picture on a web server of this machine."""
    folder = picture("web shot.png").parent
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/web%20shot.png"
    server.shutdown()
    server.server_close()


async def test_a_pasted_address_is_fetched(start, settings, address):
    images = msgspec.structs.replace(settings.images, allow_private_hosts=True)
    async with start(
        settings=msgspec.structs.replace(settings, images=images), loaded=False
    ) as pilot:
        screen = pilot.app.screen
        screen.prompt.post_message(events.Paste(address))
        await wait_until(pilot, lambda: screen.composer.pictures)
        assert (screen.composer.pictures[0].width, screen.prompt.text) == (90, "[Image #1] ")
        screen.prompt.text = address.replace("shot", "none")
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app._notifications)
        assert "404" in next(iter(pilot.app._notifications)).message


async def test_an_address_on_this_machine_is_not_fetched_unless_allowed(start, address):
    async with start(loaded=False) as pilot:
        pilot.app.screen.prompt.post_message(events.Paste(address))
        await wait_until(pilot, lambda: pilot.app._notifications)
        assert not pilot.app.screen.composer.pictures


@pytest.fixture
def clipboard(tmp_path, monkeypatch, picture):
    """A clipboard program, as X11 has one, and the file that it gives."""
    content = picture("copied.png")
    program = tmp_path / "bin" / "xclip"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec cat '{content}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("DISPLAY", ":0")
    for name in ("WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    return content


@pytest.mark.parametrize("key", ["ctrl+v", "alt+v"])
async def test_the_picture_on_the_clipboard_is_pasted(start, clipboard, key):
    async with start(loaded=False) as pilot:
        await pilot.press(key)
        await wait_until(pilot, lambda: pilot.app.screen.composer.pictures)
        assert pilot.app.screen.composer.pictures[0].data == clipboard.read_bytes()


async def test_words_on_the_clipboard_are_typed(start, clipboard):
    clipboard.write_text("")
    async with start(loaded=False) as pilot:
        pilot.app.copy_to_clipboard("from elsewhere")
        await pilot.press("ctrl+v")
        await wait_until(pilot, lambda: pilot.app.screen.prompt.text == "from elsewhere")


async def test_several_pictures_go_with_one_message(start, store, settings, tiny_llava):
    model = msgspec.structs.replace(settings.model, name=str(tiny_llava))
    async with start(settings=msgspec.structs.replace(settings, model=model)) as pilot:
        screen = pilot.app.screen
        for color in ("red", "blue"):
            screen.composer.add_picture(attachment(color))
        screen.prompt.put("make [Image #1] like [Image #2]")
        await pilot.press("enter")
        await wait_until(pilot, lambda: screen.transcript.messages and not pilot.app.answers)
        question, answer = store.branch(store.sessions()[0].id)
        assert [image.name for image in question.attachments] == ["red.png", "blue.png"]
        assert question.text == "make [Image #1] like [Image #2]"
        assert answer.stats["prompt_tokens"] > 2 * 16
        await pilot.press("f3")
        name = await wait_until(pilot, lambda: screen.query("#picture-name"))
        await wait_until(pilot, lambda: "2 of 2" in str(name.first().content))
        await pilot.press("left")
        await wait_until(pilot, lambda: "red.png" in str(name.first().content))


async def test_the_text_on_a_picture_is_read_when_asked_for(start, store):
    pytest.importorskip("rapidocr")
    image = Image.new("RGB", (400, 120), "white")
    ImageDraw.Draw(image).text((20, 30), "WELCOME", fill="black", font_size=48)
    async with start() as pilot:
        screen = pilot.app.screen
        screen.composer.add_picture(_attached(image))
        await pilot.press("f3")
        await wait_until(pilot, lambda: screen.query("#picture-frame HalfCells"))
        await pilot.press("t")
        await wait_until(pilot, lambda: screen.composer.pictures[0].page_text, 60)
        assert screen.composer.pictures[0].page_text[0].text == "WELCOME"
        screen.prompt.focus()
        await pilot.press("enter")
        await wait_until(pilot, lambda: screen.transcript.messages and not pilot.app.answers)
        assert "WELCOME" in str(store.branch(store.sessions()[0].id)[0].attachments[0].page_text)


def _attached(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return attachment_from_bytes(buffer.getvalue(), "welcome.png")


async def test_the_mouse_opens_a_picture_and_focuses_a_message(start, store):
    session = store.create_session("Stored")
    store.add_message(session.id, Message("user", "Question", (attachment("red"),)))
    async with start() as pilot:
        screen = pilot.app.screen
        await wait_until(pilot, lambda: screen.transcript.views)
        await clicked(
            pilot,
            "MessageView .message-head",
            lambda: screen.focused is screen.transcript.views[0],
        )
        await clicked(pilot, "Thumbnail", lambda: screen.query("#picture-frame HalfCells"))
        name = screen.query_one("#picture-name", Static)
        await clicked(pilot, "#eye", lambda: "As the model sees it" in str(name.content))
        await clicked(pilot, "#close-picture", lambda: not screen.query("#picture"))


async def clicked(pilot, target, condition):
    """Click once nothing moves any more, so that the click meets its target."""
    region, same = None, 0
    while same < 3 or pilot.app.screen._layout_required:
        before, region = region, pilot.app.screen.query(target).first().region
        same = same + 1 if region == before else 0
        await pilot.pause(0.1)
    await pilot.click(target)
    await wait_until(pilot, condition)


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
