"""Pages in the application: kept as versions, compared, corrected, made better, shown live."""

from __future__ import annotations

import contextlib
import io
import urllib.request

import msgspec
import pytest
from PIL import Image, ImageDraw
from textual.widgets import Input, Static, TextArea

from tests.backends.test_hf_families import save_idefics3
from tests.tiny import PAGE
from tests.tui.conftest import wait_until
from tests.tui.scripted import STATS, ScriptedEngine
from w2c_tui.backends.base import Text
from w2c_tui.core.config import GenerationParams, paths
from w2c_tui.core.context_cost import Meter
from w2c_tui.core.conversation import Message, TextLine
from w2c_tui.core.errors import RenderError
from w2c_tui.core.image import attachment_from_bytes
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.core.versions import Versions, keep_answer, screenshot_above
from w2c_tui.tui.answer import Answer
from w2c_tui.tui.app import W2CApp
from w2c_tui.tui.picture import HalfCells

NEAR = """<!DOCTYPE html>
<html><body style="margin:0;background:#fff;font:20px sans-serif">
<div style="background:#036;color:#fff;padding:20px">Welcome</div></body></html>
"""
FAR = NEAR.replace("#036", "#c30").replace("Welcome", "Hello")


@pytest.fixture
def browser():
    """Real renders need a Chromium."""
    from w2c_tui.web.render import find_browser

    try:
        return find_browser()
    except RenderError as error:
        pytest.skip(str(error))


def screenshot():
    image = Image.new("RGB", (400, 300), "white")
    image.paste("#003366", (0, 0, 400, 63))
    ImageDraw.Draw(image).text((20, 20), "Welcome", fill="white", font_size=20)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    shot = attachment_from_bytes(buffer.getvalue(), "welcome.png")
    return msgspec.structs.replace(shot, page_text=(TextLine("Welcome", (20, 20, 105, 43)),))


@pytest.fixture
def two_pages(store):
    """A session with a screenshot, a page far from it and one that is near."""
    session = store.create_session("welcome.png")
    store.add_message(session.id, Message("user", "Make this", (screenshot(),)))
    for request, page in ((None, FAR), ("Bluer", NEAR)):
        if request:
            store.add_message(session.id, Message("user", request))
        with store.begin_answer(session.id, model="m") as answer:
            answer.append(f"Here:\n```html\n{page}```\n")
            answer.finish()
        keep_answer(store, answer.message_id, paths().pages)
    return session


def versions_of(session):
    return Versions(paths().pages / session.id)


def scores(pilot):
    return str(pilot.app.screen.query_one("#scores", Static).content)


async def opened(pilot):
    await wait_until(pilot, lambda: pilot.app.screen.transcript.messages)
    await pilot.press("f4")
    await wait_until(pilot, lambda: pilot.app.screen.query("VersionList"))
    return pilot.app.screen


async def test_an_answer_becomes_a_version(start, store, settings, page_writer):
    settings = msgspec.structs.replace(
        settings,
        model=msgspec.structs.replace(settings.model, name=str(page_writer)),
        generation=GenerationParams(temperature=0, max_new_tokens=120),
    )
    # As it learnt it: without the words on the picture.
    shot = msgspec.structs.replace(screenshot(), page_text=None)
    async with start(settings=settings) as pilot:
        pilot.app.screen.composer.add_picture(shot)
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app.screen.page_work.has_pages)
        (version,) = versions_of(store.sessions()[0]).all()
        assert version.html == PAGE
        assert version.meta.prompt == PAGE_PROMPT
        assert version.meta.params["max_new_tokens"] == 120
        assert "compare" in {b.binding.id for b in pilot.app.screen.active_bindings.values()}


async def test_versions_are_shown_beside_the_screenshot_with_scores(
    start, store, two_pages, browser
):
    async with start(loaded=False) as pilot:
        screen = await opened(pilot)
        await wait_until(pilot, lambda: len(screen.query("#looks HalfCells")) == 3, 60)
        original, render, difference = (w.image for w in screen.query(HalfCells))
        assert original.size == (400, 300)
        assert render.width == difference.width == 400
        await wait_until(pilot, lambda: "Score" in scores(pilot))
        assert "color" in scores(pilot)
        await pilot.press("a")
        versions = versions_of(two_pages)
        await wait_until(pilot, lambda: all(v.meta.score for v in versions.all()), 60)
        far, near = (v.meta.score for v in versions.all())
        assert near > far + 0.1
        await wait_until(pilot, lambda: "Versions ▁█" in scores(pilot))
        lines = [str(o.prompt) for o in screen.query_one("VersionList").options]
        assert "> v002" in lines[0]
        assert "from v001" in lines[0]
        assert "first" in lines[1]
        await pilot.press("3")
        assert [look.display for look in screen.query(".look")] == [False, False, True]
        await pilot.press("0", "escape")
        assert pilot.app.screen.transcript


async def test_a_version_is_picked_undone_and_what_comes_next_follows_it(start, store, two_pages):
    async with start(loaded=False) as pilot:
        screen = await opened(pilot)
        versions = versions_of(two_pages)
        await pilot.press("u")
        assert versions.current().number == 1
        await pilot.press("ctrl+y")
        assert versions.current().number == 2
        await pilot.press("down", "enter")
        assert versions.current().number == 1
        assert screen.version.number == 1
        await pilot.press("escape")
        await wait_until(pilot, lambda: len(pilot.app.screen.transcript.messages) == 2)
        assert FAR in store.branch(two_pages.id)[-1].text
        await pilot.press("f4", "up", "enter", "escape")
        await wait_until(pilot, lambda: len(pilot.app.screen.transcript.messages) == 4)


async def test_a_version_is_diffed_copied_and_saved(start, store, two_pages, tmp_path):
    async with start(loaded=False) as pilot:
        await opened(pilot)
        await pilot.press("d")
        text = await wait_until(pilot, lambda: pilot.app.screen.query("ShowText TextArea"))
        assert "-<div" in text.first(TextArea).text
        assert "Hello" in text.first(TextArea).text
        await pilot.press("escape", "c")
        await wait_until(pilot, lambda: pilot.app.clipboard == NEAR)
        await pilot.press("s")
        box = await wait_until(pilot, lambda: pilot.app.screen.query("AskLine Input"))
        box.first(Input).value = str(tmp_path / "page.html")
        await pilot.press("enter")
        await wait_until(pilot, (tmp_path / "page.html").exists)
        assert (tmp_path / "page.html").read_text() == NEAR


async def test_an_edit_outside_is_a_version_and_what_the_next_turn_follows(
    start, store, two_pages, tmp_path, monkeypatch
):
    editor = tmp_path / "editor.sh"
    editor.write_text('#!/bin/sh\nsed -i s/Welcome/Bonjour/ "$1"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    # A terminal that is given away: there is none in a test.
    monkeypatch.setattr(W2CApp, "suspend", lambda self: contextlib.nullcontext())
    async with start(loaded=False) as pilot:
        await opened(pilot)
        await pilot.press("e")
        versions = versions_of(two_pages)
        await wait_until(pilot, lambda: len(versions.all()) == 3)
        made = versions.current()
        assert (made.meta.origin, made.meta.parent) == ("edit", 2)
        assert "Bonjour" in made.html
        await pilot.press("escape")
        answer = store.branch(two_pages.id)[-1]
        assert answer.text == f"Here:\n```html\n{made.html}```\n"
        assert len(answer.siblings) == 2
        assert made.meta.message_id == answer.id


async def test_one_key_asks_to_correct_what_differs(start, store, two_pages, browser, tiny_llama):
    store.delete_message(store.branch(two_pages.id)[2].id)
    versions_of(two_pages).select(1)
    async with start() as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.transcript.messages)
        pilot.app.screen.prompt.text = "my draft"
        await pilot.press("f8")
        await wait_until(pilot, lambda: len(store.branch(two_pages.id)) == 4, 60)
        await wait_until(pilot, lambda: not pilot.app.answers)
        request = store.branch(two_pages.id)[2]
        assert '"Hello" should read "Welcome"' in request.text or '"Welcome"' in request.text
        assert "#cc3300" in request.text
        assert not request.attachments
        assert pilot.app.screen.prompt.text == "my draft"


@pytest.fixture(scope="module")
def sees_several(tmp_path_factory):
    """A tiny model of a family that takes several pictures; 1,024 tokens of context."""
    return save_idefics3(tmp_path_factory.mktemp("models") / "idefics3")


@pytest.mark.parametrize("room", [True, False])
async def test_a_model_that_takes_several_pictures_is_shown_its_page(
    start, store, settings, browser, sees_several, room
):
    session = store.create_session("welcome.png")
    question = store.add_message(session.id, Message("user", "Make this", (screenshot(),)))
    with store.begin_answer(session.id, model="m") as answer:
        answer.append(FAR)
        # A token to three letters, and pictures of 20 or of 480 tokens.
        tokens = len(FAR) // 3
        used = tokens + 3 + (20 if room else 480)
        stats = msgspec.structs.replace(
            STATS, context_used=used, new_tokens=tokens, context_length=1024
        )
        answer.finish(stats=msgspec.structs.asdict(stats))
    keep_answer(store, answer.message_id, paths().pages)
    model = msgspec.structs.replace(settings.model, name=str(sees_several))
    async with start(settings=msgspec.structs.replace(settings, model=model)) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.transcript.messages)
        await pilot.press("f8")
        await wait_until(pilot, lambda: len(store.branch(session.id)) == 4, 60)
        await wait_until(pilot, lambda: not pilot.app.answers)
        request, answer = store.branch(session.id)[2:]
        assert "#cc3300" in request.text
        assert answer.status != "error", answer.error
        # The original is in the question and not sent again.
        (version,) = versions_of(session).all()
        shown = [store.image(image.sha256) for image in request.attachments]
        assert shown == ([version.render_path.read_bytes()] if room else [])
        assert ("how your page looks" in request.text) == room
        assert screenshot_above(store, store.branch(session.id)).sha256 == (
            question.attachments[0].sha256
        )


async def test_the_model_can_be_given_the_latest_page_only(start, store, two_pages):
    async with start() as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.transcript.messages)
        spent, told = {}, {}
        for mode in ("history", "latest"):
            if mode == "latest":
                await pilot.press("alt+i")
                said = [n.message for n in pilot.app._notifications]
                assert any("latest page only" in text for text in said)
            before = len(store.branch(two_pages.id))
            meter = Meter(store.branch(two_pages.id))
            told[mode] = meter.tokens(mode, Message("user", "Now red"))
            pilot.app.screen.prompt.text = "Now red"
            await pilot.press("enter")
            await wait_until(pilot, lambda n=before: len(store.branch(two_pages.id)) > n)
            await wait_until(pilot, lambda: not pilot.app.answers)
            spent[mode] = store.branch(two_pages.id)[-1].stats["prompt_tokens"]
        assert spent["latest"] < spent["history"]
        assert told["history"] == 0
        assert told["latest"] == pytest.approx(spent["latest"], rel=0.3)
        status = pilot.app.screen.query_one("#status", Static)
        assert "latest page only" in str(status.content)
        assert store.session(two_pages.id).params["iteration"] == "latest"
        await pilot.press("f2")
        costs = await wait_until(pilot, lambda: pilot.app.screen.query("#costs"))
        before = str(costs.first(Static).content)
        assert "with the whole conversation" in before
        # It follows the conversation while it is open.
        pilot.app.screen.prompt.text = "Now green"
        pilot.app.screen.prompt.focus()
        await pilot.press("enter")
        await wait_until(pilot, lambda: str(costs.first(Static).content) != before)
        assert str(costs.first(Static).content) == str(Meter(store.branch(two_pages.id)))


@pytest.fixture
def writer_settings(settings, page_writer):
    return msgspec.structs.replace(
        settings,
        model=msgspec.structs.replace(settings.model, name=str(page_writer)),
        generation=GenerationParams(temperature=0.3, max_new_tokens=120, seed=1),
    )


async def ask_for_tries(pilot, best_of, refine):
    """The run that begins; it may be over before it can be seen in the application."""
    begun = []
    begin = pilot.app.begin_better

    def watched(run):
        begun.append(run)
        begin(run)

    pilot.app.begin_better = watched
    await pilot.press("f9")
    box = await wait_until(pilot, lambda: pilot.app.screen.query("#best-of"))
    box.first(Input).value = str(best_of)
    pilot.app.screen.query_one("#refine", Input).value = str(refine)
    await pilot.press("enter")
    return await wait_until(pilot, lambda: begun and begun[0])


async def test_the_nearest_of_several_tries_stays(start, store, writer_settings, browser):
    async with start(settings=writer_settings) as pilot:
        screen = pilot.app.screen
        screen.composer.add_picture(screenshot())
        run = await ask_for_tries(pilot, 2, 1)
        await wait_until(pilot, lambda: "Try " in str(screen.query_one("#page-work").content))
        await wait_until(pilot, lambda: pilot.app.better is None, 120)
        assert run.outcome == "done", run.error
        assert [step.kind for step in run.steps] == ["candidate", "candidate", "correction"]
        session = store.sessions()[0]
        made = versions_of(session).all()
        assert [v.meta.origin for v in made][:2] == ["candidate", "candidate"]
        scored = [v.meta.score for v in made if v.meta.score is not None]
        assert versions_of(session).current().meta.score == max(scored)
        assert all(v.render_path.exists() for v in made if v.meta.score)
        # The second answer's siblings are reached by the keys for versions.
        question = store.branch(session.id)[0]
        assert len(store.children(question.id)) == 2
        await wait_until(pilot, lambda: not screen.query_one("#page-work").display)
        assert screen.transcript.messages[-1].id == run.best.message_id


async def test_tries_ask_as_a_plain_answer_does(start, store, two_pages, writer_settings, browser):
    async with start(settings=writer_settings) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.transcript.messages)
        await pilot.press("alt+i")
        pilot.app.screen.prompt.text = "Now red"
        await pilot.press("enter")
        await wait_until(pilot, lambda: len(store.branch(two_pages.id)) == 6)
        await wait_until(pilot, lambda: not pilot.app.answers)
        plain = store.branch(two_pages.id)[-1]
        assert plain.stats["iteration"] == "latest"
        run = await ask_for_tries(pilot, 2, 0)
        await wait_until(pilot, lambda: pilot.app.better is None, 120)
        first, second = (store.message(step.message_id) for step in run.steps)
        assert first.stats["prompt_tokens"] == plain.stats["prompt_tokens"]
        assert first.stats["iteration"] == second.stats["iteration"] == "latest"
        # A try is over where its page is.
        assert plain.text.startswith(first.text)


async def test_tries_help_a_small_text_model_to_its_page(start, store, settings, browser):
    model = msgspec.structs.replace(settings.model, name="smollm2-135m")
    params = GenerationParams(temperature=0.3, max_new_tokens=400)
    changed = msgspec.structs.replace(settings, model=model, generation=params)
    engine = ScriptedEngine(" to you</p>\n</body></html>")
    async with start(settings=changed, engine=engine) as pilot:
        pilot.app.screen.composer.add_picture(screenshot())
        run = await ask_for_tries(pilot, 2, 0)
        await wait_until(pilot, lambda: pilot.app.better is None, 120)
        assert run.outcome == "done", run.error
        assert engine.asked[-1].role == "assistant"
        for step in run.steps:
            text = store.message(step.message_id).text
            assert text == engine.asked[-1].text + " to you</p>\n</body></html>"
            assert step.score > 0
        assert all(v.html == text for v in versions_of(store.sessions()[0]).all())


async def test_escape_stops_the_answer_in_sight(start, store, slow_settings, browser):
    async with start(settings=slow_settings) as pilot:
        pilot.app.screen.composer.add_picture(screenshot())
        await pilot.press("f9")
        await wait_until(pilot, lambda: pilot.app.screen.query("#best-of"))
        await pilot.press("enter")
        await wait_until(pilot, lambda: any(a.num_pieces > 5 for a in pilot.app.answers.values()))
        run, (tried,) = pilot.app.better, pilot.app.answers.values()
        await pilot.press("ctrl+n")
        pilot.app.screen.prompt.text = "Another question"
        await pilot.press("enter")
        await wait_until(pilot, lambda: len(pilot.app.answers) == 2)
        waiting = next(a for a in pilot.app.answers.values() if a is not tried)
        await pilot.press("escape")
        await wait_until(pilot, lambda: waiting.stopping)
        assert not tried.stopping
        assert not run.stopped()
        pilot.app.better.cancel()
        await wait_until(pilot, lambda: pilot.app.better is None, 60)
        await wait_until(pilot, lambda: not pilot.app.answers)
        assert store.message(waiting.message_id).finish_reason == "cancelled"


async def test_tries_are_stopped_with_escape_and_the_best_stays(
    start, store, slow_settings, browser, tiny_llava
):
    async with start(settings=slow_settings) as pilot:
        screen = pilot.app.screen
        screen.composer.add_picture(screenshot())
        await pilot.press("f9")
        await wait_until(pilot, lambda: pilot.app.screen.query("#best-of"))
        await pilot.press("enter")
        await wait_until(pilot, lambda: any(a.num_pieces > 5 for a in pilot.app.answers.values()))
        await pilot.press("escape")
        await wait_until(pilot, lambda: pilot.app.better is None, 60)
        await wait_until(pilot, lambda: not pilot.app.answers)
        answer = store.branch(store.sessions()[0].id)[-1]
        assert (answer.status, answer.finish_reason) == ("partial", "cancelled")
        assert answer.text


def test_a_try_that_is_being_looked_at_stops_no_other_answer(store, shared_engine, slow_settings):
    """While it is rendered the engine may write for another session."""
    session = store.create_session("m")
    store.add_message(session.id, Message("user", "Question"))
    writer = store.begin_answer(session.id, model="m")
    one = Answer(writer, store.message(writer.message_id))
    shared_engine.load(slow_settings.model)
    params = GenerationParams(temperature=0.0, max_new_tokens=30)
    events = shared_engine.stream([Message("user", "Write")], params)
    one.take(Text("some"), shared_engine)
    one.written()
    next(events)
    one.cancel()
    assert list(events)[-1].reason == "length"
    one.finish("cancelled", None)


async def test_the_session_is_live_in_the_browser(start, store, slow_settings, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    async with start(settings=slow_settings) as pilot:
        pilot.app.screen.prompt.text = "Go"
        await pilot.press("enter")
        answer = await wait_until(pilot, lambda: next(iter(pilot.app.answers.values()), None))
        await wait_until(pilot, lambda: answer.num_pieces > 20)
        await pilot.press("f7")
        url = await wait_until(pilot, lambda: pilot.app.preview.url)
        await wait_until(pilot, lambda: pilot.app.clipboard == url)
        with urllib.request.urlopen(url) as page:
            assert page.status == 200
        shown = await wait_until(pilot, lambda: pilot.app.preview._server._shown.answer)
        state = pilot.app.preview._server._shown
        assert state.writing
        await wait_until(pilot, lambda: len(pilot.app.preview._server._shown.answer) > len(shown))
        await pilot.press("escape")
        await wait_until(pilot, lambda: not pilot.app.answers)
        await wait_until(pilot, lambda: not pilot.app.preview._server._shown.writing)
        assert pilot.app.preview._server._shown.answer == store.branch(answer.session_id)[-1].text
