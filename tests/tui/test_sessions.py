"""Sessions: kept, found, renamed, deleted, exported and resumed."""

from __future__ import annotations

import json

import msgspec
import pytest
from textual.widgets import Input, OptionList, Static

from tests.backends.contract import picture as attachment
from tests.tui.conftest import wait_until
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import W2CError
from w2c_tui.core.store import Store
from w2c_tui.tui.export import export

PAGE = "<!DOCTYPE html>\n<html><script>alert(1)</script>```</html>\n"


@pytest.fixture
def three(store):
    """Three sessions, the last one in use last."""
    made = []
    for name in ("Alpha", "Beta", "Gamma"):
        session = store.create_session(name, system_prompt=f"Be {name}.")
        store.add_message(session.id, Message("user", f"About {name.lower()} rays"))
        with store.begin_answer(session.id, model="m") as answer:
            answer.append(f"Answer on {name}\n\n```html\n{PAGE}```\n")
            answer.finish()
        made.append(session)
    return made


def listed(pilot):
    options = pilot.app.screen.query_one("#sessions", OptionList)
    return [str(options.get_option_at_index(i).prompt) for i in range(options.option_count)]


async def test_the_last_session_is_resumed_with_its_draft_and_pictures(start, store, three):
    store.set_draft(three[2].id, "[Image #1] half a tho", [attachment("red")])
    async with start() as pilot:
        screen = pilot.app.screen
        await wait_until(pilot, lambda: screen.session and screen.session.id == three[2].id)
        assert screen.prompt.text == "[Image #1] half a tho"
        assert [image.name for image in screen.composer.pictures] == ["red.png"]
        assert len(screen.transcript.messages) == 2


async def test_a_damaged_database_is_said_and_the_session_is_there(start, store, three):
    store.close()
    with store.path.open("r+b") as file:
        file.write(b"garbage" * 100)
    with Store.open(store.path) as recovered:
        async with start(store=recovered, loaded=False) as pilot:
            await wait_until(pilot, lambda: pilot.app.screen.session)
            assert pilot.app.screen.session.id == three[2].id
            said = [notice.message for notice in pilot.app._notifications]
            assert any("6 messages were saved" in text for text in said)


async def test_a_draft_survives_leaving(start, store):
    async with start() as pilot:
        pilot.app.screen.prompt.text = "not sent"
        pilot.app.screen.composer.add_picture(attachment("red"))
        await pilot.press("ctrl+q")
    session = store.sessions()[0]
    assert session.draft == "[Image #1] not sent"
    assert [image.name for image in store.draft_attachments(session.id)] == ["red.png"]


async def test_new_begins_an_empty_session_that_leaves_no_trace(start, store, three):
    async with start(new=True) as pilot:
        assert pilot.app.screen.session is None
        assert pilot.app.screen.query_one("#welcome").display
    assert len(store.sessions()) == 3


async def test_the_sidebar_lists_searches_and_opens_a_message(start, store, three):
    async with start() as pilot:
        await pilot.press("ctrl+b")
        await wait_until(pilot, lambda: listed(pilot))
        assert ["Gamma" in listed(pilot)[0], "Alpha" in listed(pilot)[2]] == [True, True]
        pilot.app.screen.query_one("#search", Input).value = "beta ra"
        await wait_until(pilot, lambda: any("rays" in line for line in listed(pilot)))
        assert "Beta" in listed(pilot)[0]
        pilot.app.screen.query_one("#search", Input).focus()
        await pilot.press("down", "down", "enter")
        await wait_until(pilot, lambda: pilot.app.screen.session.id == three[1].id)


async def test_rename_and_delete_with_undo(start, store, three):
    async with start() as pilot:
        await pilot.press("ctrl+b")
        await wait_until(pilot, lambda: listed(pilot))
        await pilot.press("r")
        await wait_until(pilot, lambda: len(pilot.app.screen_stack) == 2)
        pilot.app.screen.query_one(Input).value = "Gamma rays"
        await pilot.press("enter")
        await wait_until(pilot, lambda: "Gamma rays" in listed(pilot)[0])
        await pilot.press("d")
        await wait_until(pilot, lambda: len(store.sessions()) == 2)
        assert pilot.app.screen.session is None
        await pilot.press("alt+z")
        await wait_until(pilot, lambda: len(store.sessions()) == 3)
        await wait_until(pilot, lambda: pilot.app.screen.session.id == three[2].id)


async def test_export_writes_a_file_and_never_over_another(start, store, three, tmp_path):
    target = tmp_path / "out.md"
    async with start() as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.session)
        pilot.app.screen._export(three[2].id)
        await wait_until(pilot, lambda: len(pilot.app.screen_stack) == 2)
        box = pilot.app.screen.query_one(Input)
        box.value = str(tmp_path / "out.pdf")
        await pilot.press("enter")
        assert ".md" in str(pilot.app.screen.query_one(".dialog-note", Static).content)
        box.value = str(target)
        await pilot.press("enter")
        await wait_until(pilot, target.exists)
        pilot.app.screen._export(three[2].id)
        await wait_until(pilot, lambda: len(pilot.app.screen_stack) == 2)
        pilot.app.screen.query_one(Input).value = str(target)
        await pilot.press("enter")
        assert "exists already" in str(pilot.app.screen.query_one(".dialog-note", Static).content)


def test_every_export_holds_what_was_written(store, three):
    session = three[0]
    store.add_message(session.id, Message("user", "And <b>this</b>", (attachment("red"),)))
    markdown = export(store, session.id, ".md")
    assert PAGE in markdown
    assert "````html\n" in markdown
    document = json.loads(export(store, session.id, ".json"))
    assert document["messages"][1]["text"].endswith(f"```html\n{PAGE}```\n")
    page = export(store, session.id, ".html")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "data:image/png;base64," in page
    with pytest.raises(W2CError, match="pdf"):
        export(store, session.id, ".pdf")


async def test_a_long_session_has_few_views_and_all_of_it_can_be_reached(start, store):
    session = store.create_session("Long")
    for number in range(120):
        store.add_message(session.id, Message("user", f"Question {number}"))
        with store.begin_answer(session.id) as answer:
            answer.append(f"Answer {number}")
            answer.finish()
    async with start() as pilot:
        transcript = pilot.app.screen.transcript
        await wait_until(pilot, lambda: transcript.views)
        assert len(transcript.views) < 30
        transcript.views[-1].focus()
        await pilot.press("home")
        await wait_until(pilot, lambda: transcript.views[0].message.text == "Question 0")
        assert len(transcript.views) < 30
        await pilot.press("end")
        await wait_until(pilot, lambda: transcript.views[-1].message.text == "Answer 119")
        for _ in range(40):
            await pilot.press("up")
        await wait_until(pilot, lambda: transcript.views[0].message.text < "Question 119")
        assert len(transcript.views) < 40
        pilot.app.screen.prompt.focus()
        for key, text in (("pageup", "Question 0"), ("pagedown", "Answer 119")):
            seen = set()
            while text not in seen:
                await pilot.press(key)
                await pilot.pause()
                shown = {view.message.text for view in transcript.views}
                assert not seen or shown & seen, "a page was skipped"
                seen = shown


async def test_the_settings_panel_changes_this_session_only(start, store, three):
    async with start() as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.session)
        await pilot.press("f2")
        await wait_until(pilot, lambda: pilot.app.screen.query("#settings"))
        pilot.app.screen.query_one("#field-temperature", Input).value = "0.7"
        pilot.app.screen.query_one("#field-stop", Input).value = "</html>, a\\nb"
        await wait_until(pilot, lambda: pilot.app.screen.params.temperature == 0.7)
        pilot.app.screen.query_one("#field-top_p", Input).value = "7"
        await wait_until(pilot, lambda: pilot.app.screen.query(".-invalid"))
        await pilot.press("escape")
    saved = store.session(three[2].id).params["generation"]
    assert saved["temperature"] == 0.7
    assert saved["stop"] == ["</html>", "a\nb"]
    assert "max_new_tokens" not in saved
    assert "temperature" not in store.session(three[1].id).params.get("generation", {})


async def test_what_a_session_does_not_set_follows_the_settings(start, store, three):
    store.update_session(three[2].id, params={"generation": {"temperature": 0.7}})
    async with start() as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.session)
        assert pilot.app.screen.params.temperature == 0.7
        assert pilot.app.screen.params.max_new_tokens == 40


async def test_keys_can_be_changed_in_the_configuration(start, settings, store):
    changed = msgspec.structs.replace(settings.interface, keys={"new-session": "f9"})
    async with start(settings=msgspec.structs.replace(settings, interface=changed)) as pilot:
        pilot.app.screen.prompt.text = "hello"
        await pilot.press("f9")
        await wait_until(pilot, lambda: not pilot.app.screen.prompt.text)
        await pilot.press("f1")
        await wait_until(pilot, lambda: len(pilot.app.screen_stack) == 2)
        shown = " ".join(str(s.content) for s in pilot.app.screen.query(Static))
        assert "f9" in shown


@pytest.mark.parametrize(
    ("keys", "pressed"), [({"send": "f8"}, "f8"), ({"send": "ctrl+s,f8"}, "ctrl+s")]
)
async def test_the_key_that_sends_can_be_another(start, settings, store, keys, pressed):
    changed = msgspec.structs.replace(settings.interface, keys=keys)
    async with start(settings=msgspec.structs.replace(settings, interface=changed)) as pilot:
        pilot.app.screen.prompt.text = "hello"
        await pilot.press("enter")
        assert not pilot.app.screen.transcript.messages
        await pilot.press(pressed)
        await wait_until(pilot, lambda: pilot.app.screen.transcript.messages)


async def test_a_key_for_no_command_is_said(start, settings):
    changed = msgspec.structs.replace(settings.interface, keys={"sned": "f8"})
    async with start(settings=msgspec.structs.replace(settings, interface=changed)) as pilot:
        await wait_until(pilot, lambda: pilot.app._notifications)
        said = next(iter(pilot.app._notifications)).message
        assert "sned" in said
        assert "send" in said.split("There are:")[1]


async def at_rest(pilot, transcript):
    """Until no messages come into view or leave it, and nothing scrolls."""
    place = None
    while transcript._moving or place != (place := (transcript.scroll_y, transcript.in_sight())):
        await pilot.pause(0.2)


async def test_the_place_in_a_session_is_found_again(start, store):
    session = store.create_session("Long")
    for number in range(40):
        store.add_message(session.id, Message("user", f"Question {number}\n\n{'and more ' * 60}"))
        with store.begin_answer(session.id) as answer:
            answer.append(f"Answer {number}")
            answer.finish()
    async with start() as pilot:
        transcript = pilot.app.screen.transcript
        await wait_until(pilot, lambda: transcript.views)
        for _ in range(4):
            before = transcript.scroll_y
            await pilot.press("pageup")
            await at_rest(pilot, transcript)
            assert transcript.scroll_y != before
        assert transcript.in_sight() is not None
        left_at = transcript.in_sight()
        await pilot.press("ctrl+q")
    async with start() as pilot:
        transcript = pilot.app.screen.transcript
        await wait_until(pilot, lambda: transcript.in_sight() == left_at)
        # And it stays there.
        await pilot.pause(0.3)
        assert transcript.in_sight() == left_at


async def test_the_system_prompt_of_a_session_reaches_the_model(start, store):
    async with start() as pilot:
        await pilot.press("f2")
        await wait_until(pilot, lambda: pilot.app.screen.query("#settings"))
        pilot.app.screen.query_one("#system").text = "Write nothing but HTML, please. " * 4
        await wait_until(pilot, lambda: pilot.app.screen.place.system.startswith("Write"))
        await pilot.press("escape")
        for words, new in (("With", False), ("Without", True)):
            if new:
                await pilot.press("ctrl+n")
            pilot.app.screen.prompt.text = words
            await pilot.press("enter")
            await wait_until(pilot, lambda: pilot.app.screen.transcript.messages)
            await wait_until(pilot, lambda: not pilot.app.answers)
    without, given = store.sessions()
    assert given.system_prompt.startswith("Write nothing")
    assert without.system_prompt == ""
    first, second = (store.branch(s.id)[-1].stats["prompt_tokens"] for s in (given, without))
    assert first > second + 20


def chosen_command(pilot):
    commands = pilot.app.screen.query_one("CommandList", OptionList)
    option = commands.highlighted_option
    return str(option.prompt) if option is not None else ""


async def test_the_palette_finds_commands_by_name(start, store, three):
    async with start() as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.session)
        offered = {c.title for c in pilot.app.get_system_commands(pilot.app.screen)}
        assert {
            *("New session", "Sessions", "Attach a picture", "Model", "Settings", "Regenerate"),
            *("Copy page", "Rename session", "Export session", "Delete session", "Undo delete"),
            *("Edit the prompt outside", "Paste from the clipboard", "Theme", "Quit"),
        } <= offered
        await pilot.press("ctrl+p")
        await wait_until(pilot, lambda: len(pilot.app.screen_stack) == 2)
        await pilot.press(*"rename")
        await wait_until(pilot, lambda: "Rename session" in chosen_command(pilot))
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app.screen.query("AskLine Input"))
        assert pilot.app.screen.query_one(Input).value == "Gamma"


async def test_the_status_line_says_how_it_goes(start, store):
    async with start(size=(160, 40)) as pilot:
        status = pilot.app.screen.query_one("#status", Static)
        assert "tiny-llama float32 cpu" in str(status.content)
        pilot.app.screen.prompt.text = "Prices?"
        await pilot.press("enter")
        await wait_until(pilot, lambda: "tokens/s" in str(status.content))
        await wait_until(pilot, lambda: "engine" in str(status.content))
        stats = store.branch(store.sessions()[0].id)[-1].stats
        shown = str(status.content)
        assert f"context {stats['context_used']:,}/1,024" in shown
        assert f"{stats['tokens_per_s']:.0f} tokens/s" in shown
        assert f"first {stats['time_to_first_token_s']:.1f} s" in shown
        await pilot.resize_terminal(60, 24)
        await wait_until(pilot, lambda: len(str(status.content)) <= 58)
        assert "tiny-llama" in str(status.content)


async def test_the_theme_is_remembered(start, store, own_folders):
    async with start() as pilot:
        pilot.app.theme = "textual-light"
        await pilot.pause()
    async with start() as pilot:
        assert pilot.app.theme == "textual-light"


async def test_an_answer_goes_on_while_another_session_is_open(start, store, slow_settings):
    async with start(settings=slow_settings) as pilot:
        screen = pilot.app.screen
        screen.prompt.text = "Write"
        await pilot.press("enter")
        answer = await wait_until(pilot, lambda: next(iter(pilot.app.answers.values()), None))
        first = screen.session.id
        await pilot.press("ctrl+n")
        assert screen.session is None
        await wait_until(pilot, lambda: answer.num_pieces > 10)
        await screen.open_session(first)
        view = await wait_until(pilot, lambda: screen.transcript.view(answer.message_id))
        length = len(view.text)
        assert length
        await wait_until(pilot, lambda: len(view.text) > length)
        await pilot.press("escape")
        await wait_until(pilot, lambda: not pilot.app.answers)
        assert view.text == store.message(answer.message_id).text


def test_one_database_for_two_windows(own_folders, store, three):
    with Store.open(store.path) as other:
        assert len(other.sessions()) == 3
