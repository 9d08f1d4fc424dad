"""Talking to a model: what is typed, streamed, stored and shown."""

from __future__ import annotations

import os
import signal

import msgspec
import pytest
from textual import events
from textual.widgets import Static, TextArea

from tests.backends.contract import picture as attachment
from tests.tui.conftest import wait_until
from tests.tui.scripted import STATS, ScriptedEngine
from w2c_tui.core.config import GenerationParams
from w2c_tui.core.conversation import Message, TextLine
from w2c_tui.core.errors import OutOfMemoryError
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.engine.client import EngineClient

PAGE = "<!DOCTYPE html>\n<html><body>[bold]caf\u00e9[/bold] \x1b[31m\x07</body></html>"

LINES = "".join(f"<p>Line <b>{number}</b></p>\n" for number in range(150))
LONG_PAGE = f"<!DOCTYPE html>\n<html><body>\n{LINES}</body></html>\n"


def branch(store):
    return store.branch(store.sessions()[0].id)


def foot(view):
    return str(view.query_one(".message-foot", Static).content)


async def send(pilot, text):
    screen = pilot.app.screen
    before = len(screen.transcript.messages)
    screen.prompt.text = text
    await pilot.press("enter")
    await wait_until(
        pilot, lambda: len(screen.transcript.messages) > before and not pilot.app.answers
    )


async def focus(pilot, index):
    view = pilot.app.screen.transcript.views[index]
    view.focus()
    await pilot.pause()
    return view


def answered(store, text, **finish):
    """A session with one question and one answer of this text."""
    session = store.create_session("Stored")
    store.add_message(session.id, Message("user", "Question"))
    with store.begin_answer(session.id, model="m") as answer:
        answer.append(text)
        answer.finish(**finish)
    return session


async def test_a_prompt_is_answered_shown_and_stored_byte_for_byte(start, store):
    async with start() as pilot:
        await send(pilot, "Prices?")
        question, answer = branch(store)
        assert (question.text, question.status) == ("Prices?", "complete")
        assert (answer.status, answer.finish_reason) == ("partial", "length")
        view = pilot.app.screen.transcript.views[-1]
        assert answer.text
        assert view.text == answer.text
        assert "F6 n continues it" in foot(view)
        assert pilot.app.screen.prompt.text == ""
        assert "context" in str(pilot.app.screen.query_one("#status", Static).content)


async def test_the_next_turn_is_given_what_the_model_wrote(start, store):
    async with start() as pilot:
        await send(pilot, "One")
        await send(pilot, "Two")
        first, second = (m for m in branch(store) if m.role == "assistant")
        assert second.stats["prompt_tokens"] > first.stats["context_used"]


async def test_continue_writes_on_in_place(start, store):
    async with start() as pilot:
        await send(pilot, "Prices?")
        before = branch(store)[-1].text
        await focus(pilot, -1)
        await pilot.press("n")
        await wait_until(pilot, lambda: len(branch(store)[-1].text) > len(before))
        await wait_until(pilot, lambda: not pilot.app.answers)
        assert branch(store)[-1].text.startswith(before)
        assert len(branch(store)) == 2
        view = pilot.app.screen.transcript.views[-1]
        await wait_until(pilot, lambda: view.text == branch(store)[-1].text)


async def test_regenerate_keeps_both_answers_within_reach(start, store):
    async with start() as pilot:
        await send(pilot, "Prices?")
        old = branch(store)[-1]
        await focus(pilot, -1)
        await pilot.press("r")
        await wait_until(pilot, lambda: branch(store)[-1].id != old.id)
        await wait_until(pilot, lambda: not pilot.app.answers)
        new = branch(store)[-1]
        assert new.siblings == (old.id, new.id)
        view = await focus(pilot, -1)
        assert "< 2/2 >" in str(view.query_one(".message-head", Static).content)
        await pilot.press("left")
        await wait_until(pilot, lambda: branch(store)[-1].id == old.id)
        assert pilot.app.screen.transcript.views[-1].message.id == old.id


async def test_regenerate_is_another_answer_under_a_fixed_seed_too(start, store, settings):
    chosen = GenerationParams(temperature=1.0, seed=2, max_new_tokens=20)
    async with start(settings=msgspec.structs.replace(settings, generation=chosen)) as pilot:
        await send(pilot, "Prices?")
        old = branch(store)[-1]
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: branch(store)[-1].id != old.id)
        await wait_until(pilot, lambda: not pilot.app.answers)
        new = branch(store)[-1]
        assert (old.stats["seed"], new.stats["seed"]) == (2, 3)
        assert new.text != old.text


async def test_an_edited_question_is_another_version_with_its_own_answer(start, store, picture):
    async with start() as pilot:
        await send(pilot, "First try")
        await focus(pilot, 0)
        await pilot.press("e")
        await wait_until(pilot, lambda: pilot.app.screen.prompt.text == "First try")
        await send_edited(pilot, "Second try", store)
        question = branch(store)[0]
        assert question.text == "Second try"
        assert len(question.siblings) == 2


async def send_edited(pilot, text, store):
    pilot.app.screen.prompt.text = text
    await pilot.press("enter")
    await wait_until(pilot, lambda: branch(store)[0].text == text and not pilot.app.answers)


async def test_an_edited_answer_leaves_the_old_one_alone(start, store):
    answered(store, PAGE)
    async with start() as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.transcript.views)
        await focus(pilot, -1)
        await pilot.press("e")
        await wait_until(pilot, lambda: len(pilot.app.screen_stack) == 2)
        pilot.app.screen.query_one(TextArea).text = "<p>mine</p>"
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: branch(store)[-1].text == "<p>mine</p>")
        old = branch(store)[-1].siblings[0]
        assert store.message(old).text == PAGE


async def test_delete_can_be_undone(start, store):
    answered(store, "An answer")
    async with start() as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.transcript.views)
        await focus(pilot, -1)
        await pilot.press("d")
        await wait_until(pilot, lambda: len(branch(store)) == 1)
        await pilot.press("alt+z")
        await wait_until(pilot, lambda: len(branch(store)) == 2)
        await wait_until(pilot, lambda: len(pilot.app.screen.transcript.views) == 2)


async def test_a_fork_is_a_session_of_its_own_up_to_the_message(start, store):
    stats = msgspec.structs.asdict(STATS)
    old = answered(store, PAGE, status="partial", reason="length", stats=stats)
    store.add_message(old.id, Message("user", "More"))
    async with start(loaded=False) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.transcript.views)
        await focus(pilot, 1)
        await pilot.press("f")
        await wait_until(pilot, lambda: pilot.app.screen.session.id != old.id)
        copied = store.branch(pilot.app.screen.session.id)
        assert [m.text for m in copied] == ["Question", PAGE]
        assert (copied[1].status, copied[1].finish_reason) == ("partial", "length")
        assert (copied[1].model, copied[1].stats) == ("m", stats)
        await wait_until(pilot, lambda: pilot.app.screen.page_work.has_pages)
        assert len(store.branch(old.id)) == 3


async def test_copy_gives_the_raw_text_and_only_the_page(start, store):
    answered(store, f"Here:\n\n```html\n{PAGE}\n```\n\nDone.")
    async with start() as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.transcript.views)
        await focus(pilot, -1)
        await pilot.press("p")
        await wait_until(pilot, lambda: pilot.app.clipboard == f"{PAGE}\n")
        await pilot.press("c")
        await wait_until(pilot, lambda: pilot.app.clipboard.startswith("Here:"))
        assert PAGE in pilot.app.clipboard


async def test_control_characters_and_markup_of_a_model_are_only_text(start, store):
    answered(store, f"See [red]this[/red] \x1b]0;title\x07\n\n```html\n{PAGE}\n```")
    async with start() as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.transcript.views)
        await pilot.pause()
        shown = pilot.app.export_screenshot()
        assert "[red]this[/red]" in shown.replace("&#160;", " ")
        assert "[bold]caf" in shown
        for screen_line in range(40):
            strip = pilot.app.screen._compositor.render_strips()[screen_line]
            assert not any(c in strip.text for c in "\x1b\x07")


async def test_escape_stops_and_keeps_what_came(start, store, slow_settings):
    async with start(settings=slow_settings) as pilot:
        pilot.app.screen.prompt.text = "Write"
        await pilot.press("enter")
        answer = await wait_until(pilot, lambda: next(iter(pilot.app.answers.values()), None))
        await wait_until(pilot, lambda: answer.num_pieces > 5)
        await pilot.press("escape")
        await wait_until(pilot, lambda: not pilot.app.answers)
        stored = branch(store)[-1]
        assert (stored.status, stored.finish_reason) == ("partial", "cancelled")
        assert stored.text
        view = pilot.app.screen.transcript.views[-1]
        await wait_until(pilot, lambda: "Stopped" in foot(view))
        assert view.text == stored.text


async def test_a_killed_engine_is_said_and_one_key_goes_on(start, store, slow_settings, tmp_path):
    with EngineClient(tmp_path / "engine.log") as engine:
        async with start(engine=engine, settings=slow_settings) as pilot:
            pilot.app.screen.prompt.text = "Write"
            await pilot.press("enter")
            answer = await wait_until(pilot, lambda: next(iter(pilot.app.answers.values()), None))
            await wait_until(pilot, lambda: answer.num_pieces > 5)
            os.kill(engine.pid, signal.SIGKILL)
            await wait_until(pilot, lambda: not pilot.app.answers)
            failed = branch(store)[-1]
            assert failed.status == "error"
            assert failed.text
            view = pilot.app.screen.transcript.views[-1]
            await wait_until(
                pilot, lambda: "killed" in foot(view) and "r tries again" in foot(view)
            )
            await focus(pilot, -1)
            await pilot.press("r")
            answer = await wait_until(pilot, lambda: next(iter(pilot.app.answers.values()), None))
            await wait_until(pilot, lambda: answer.num_pieces > 5, 60)
            await pilot.press("escape")
            await wait_until(pilot, lambda: not pilot.app.answers)
            assert branch(store)[-1].id != failed.id
            assert branch(store)[-1].status in ("complete", "partial")
            assert branch(store)[-1].text


async def test_a_model_that_does_not_exist_is_a_notice_with_ways_out(start, settings, tmp_path):
    missing = msgspec.structs.replace(settings.model, name=str(tmp_path / "none"))
    async with start(
        settings=msgspec.structs.replace(settings, model=missing), loaded=False
    ) as pilot:
        await wait_until(pilot, lambda: pilot.app.model_state == "failed", 60)
        notice = pilot.app.screen.query_one("#notice", Static)
        await wait_until(pilot, lambda: "No model" in str(notice.content))
        assert "Choose a model" in str(notice.content)


async def test_an_empty_prompt_with_a_picture_asks_for_the_page(start, store, settings, tiny_llava):
    model = msgspec.structs.replace(settings.model, name=str(tiny_llava))
    async with start(settings=msgspec.structs.replace(settings, model=model)) as pilot:
        pilot.app.screen.composer.add_picture(attachment("red"))
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app.screen.transcript.messages)
        await wait_until(pilot, lambda: not pilot.app.answers)
        question = branch(store)[0]
        assert question.text == PAGE_PROMPT
        assert [image.name for image in question.attachments] == ["red.png"]
        assert branch(store)[-1].text
        assert store.sessions()[0].title == "red.png"


@pytest.mark.parametrize("size", [(80, 24), (40, 12), (200, 60)])
async def test_it_resizes_while_streaming(start, slow_settings, size):
    async with start(settings=slow_settings) as pilot:
        pilot.app.screen.prompt.text = "Write"
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app.answers)
        answer = next(iter(pilot.app.answers.values()))
        await wait_until(pilot, lambda: answer.num_pieces > 3)
        await pilot.resize_terminal(*size)
        await wait_until(pilot, lambda: answer.num_pieces > 20)
        await pilot.press("escape")
        await wait_until(pilot, lambda: not pilot.app.answers)
        assert pilot.app.size == size


async def test_the_example_becomes_a_page_in_two_keys(start, store, settings, page_writer):
    """What a newcomer does: F5, Enter. The page stands in a view of code while it is written."""
    from tests.tiny import PAGE as WRITTEN

    model = msgspec.structs.replace(settings.model, name=str(page_writer))
    generation = msgspec.structs.replace(settings.generation, max_new_tokens=120)
    changed = msgspec.structs.replace(settings, model=model, generation=generation)
    async with start(settings=changed) as pilot:
        screen = pilot.app.screen
        assert "F5" in " ".join(str(s.content) for s in screen.query("#welcome Static"))
        await pilot.press("f5")
        await wait_until(pilot, lambda: screen.composer.pictures)
        await pilot.press("enter")
        await wait_until(pilot, lambda: screen.query("Code"))
        await wait_until(pilot, lambda: screen.transcript.messages and not pilot.app.answers)
        assert branch(store)[-1].text == WRITTEN
        code = screen.query_one("Code CodeArea", TextArea)
        await wait_until(pilot, lambda: code.text == WRITTEN)
        assert code.language == "html"
        assert code._highlights
        await focus(pilot, -1)
        await pilot.press("p")
        await wait_until(pilot, lambda: pilot.app.clipboard == WRITTEN)


async def test_a_model_without_eyes_says_so_before_anything_is_done(start, settings):
    model = msgspec.structs.replace(settings.model, name="smollm2-135m")
    async with start(
        settings=msgspec.structs.replace(settings, model=model), loaded=False
    ) as pilot:
        shown = " ".join(str(s.content) for s in pilot.app.screen.query("#welcome Static"))
        assert "It cannot see" in shown
        assert "Ctrl+O" in shown
        pilot.app.cancel_loading()


async def test_code_is_followed_while_it_grows_unless_the_user_looks_back(start, store):
    async with start(loaded=False, engine=ScriptedEngine(LONG_PAGE, 150)) as pilot:
        pilot.app.screen.prompt.text = "Write"
        await pilot.press("enter")
        code = await wait_until(pilot, lambda: pilot.app.screen.query("Code CodeArea"))
        area = code.first()
        await wait_until(pilot, lambda: area.max_scroll_y > 5)
        await wait_until(pilot, lambda: area.scroll_offset.y == area.max_scroll_y)
        where = area.region.center
        area.post_message(events.MouseScrollUp(area, *where, 0, -1, 0, False, False, False))
        await wait_until(pilot, lambda: area.scroll_offset.y < area.max_scroll_y)
        looked_at, before = area.scroll_target_y, area.document.line_count
        await wait_until(pilot, lambda: area.document.line_count > before + 5)
        assert area.scroll_offset.y == looked_at
        await wait_until(pilot, lambda: not pilot.app.answers)
        await wait_until(pilot, lambda: area.text == LONG_PAGE.strip())
        assert len(area._highlights) >= 150


async def test_a_failed_answer_is_tried_again_with_one_key(start, store):
    engine = ScriptedEngine("Half an ans", error=OutOfMemoryError("No memory.", hint="Buy some."))
    async with start(engine=engine) as pilot:
        await send(pilot, "Go")
        view = pilot.app.screen.transcript.views[-1]
        await wait_until(pilot, lambda: "No memory." in foot(view))
        assert "Buy some." in foot(view)
        assert "r tries again" in foot(view)
        assert (branch(store)[-1].status, branch(store)[-1].text) == ("error", "Half an ans")
        engine.error = None
        await focus(pilot, -1)
        await pilot.press("r")
        await wait_until(pilot, lambda: branch(store)[-1].status == "complete")
        assert len(branch(store)[-1].siblings) == 2


async def test_a_small_text_model_is_helped_to_its_first_page(start, store, settings):
    """It is given the words of the screenshot, and its page is begun for it."""
    lines = tuple(TextLine(f"Line {n}", (10, 60 * n, 200, 60 * n + 30)) for n in range(6))
    shot = msgspec.structs.replace(attachment("red"), page_text=lines)
    model = msgspec.structs.replace(settings.model, name="smollm2-135m")
    changed = msgspec.structs.replace(settings, model=model)
    engine = ScriptedEngine("Line 4</p>\n</body></html>", 50)
    async with start(settings=changed, engine=engine) as pilot:
        pilot.app.screen.composer.add_picture(shot)
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app.screen.transcript.messages)
        await wait_until(pilot, lambda: not pilot.app.answers)
        answer = branch(store)[-1]
        assert answer.text.startswith("<!DOCTYPE html>")
        assert "<p>Line 0</p>" in answer.text
        assert answer.text.endswith("</html>")
        # That such a model goes on after the page is the engine's to stop.
        assert engine.until == "</html>"
        assert (answer.status, answer.finish_reason) == ("complete", "stop")
        assert engine.asked[-1].role == "assistant"
        assert "Line 5" in engine.asked[1].text
