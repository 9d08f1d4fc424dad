"""Talking to a model: what is typed, streamed, stored and shown."""

from __future__ import annotations

from textual.widgets import Static

from tests.tui.conftest import wait_until
from w2c_tui.tui.message_view import MessageView


def statuses(store):
    session = store.sessions()[0]
    return [(m.role, m.status) for m in store.branch(session.id)]


async def send(pilot, text):
    app = pilot.app
    app.screen.prompt.text = text
    await pilot.press("enter")
    await wait_until(pilot, lambda: app.screen.transcript.messages and not app.answers)


async def test_a_prompt_is_answered_shown_and_stored_byte_for_byte(start, store):
    async with start() as pilot:
        await send(pilot, "Prices?")
        assert statuses(store) == [("user", "complete"), ("assistant", "partial")]
        stored = store.branch(store.sessions()[0].id)[-1]
        assert stored.text
        assert stored.finish_reason == "length"
        view = pilot.app.screen.transcript.views[-1]
        assert view.text == stored.text
        assert "n continues it" in str(view.query_one(".message-foot", Static).content)
        assert pilot.app.screen.prompt.text == ""
        await pilot.pause()
        assert isinstance(pilot.app.screen.transcript.views[0], MessageView)
