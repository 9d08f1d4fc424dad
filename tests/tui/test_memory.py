"""A session that goes on all day takes no more memory than one that has filled the screen."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

from textual.message_pump import MessagePump

from tests.tui.conftest import wait_until
from tests.tui.scripted import ScriptedEngine
from w2c_tui.core.config import Settings, paths
from w2c_tui.tui.app import W2CApp

ANSWER = "Here:\n\n```html\n" + "<p>One line of the page.</p>\n" * 20 + "```\nDone.\n"


async def test_turns_leave_nothing_behind(own_folders, store):
    app = W2CApp(Settings(ocr="off"), paths(), store, engine=ScriptedEngine(ANSWER), new=True)
    async with app.run_test(size=(100, 40)) as pilot:
        await wait_until(pilot, lambda: app.model_state == "ready")
        await _turns(pilot, 16)
        first, widgets = _living(app)
        await _turns(pilot, 12)
        last, more = _living(app)
        # A message in the list, a task that has ended: some hundreds a turn.
        assert last < first + 12 * 1000, (more - widgets).most_common(5)
        assert sum((more - widgets).values()) < 40, (more - widgets).most_common(5)


async def _turns(pilot, count):
    screen = pilot.app.screen
    for _ in range(count):
        known = len(screen.transcript.messages)
        screen.prompt.put("Question")
        screen.prompt.action_send()
        await wait_until(
            pilot,
            lambda known=known: (
                len(screen.transcript.messages) == known + 2 and not pilot.app.answers
            ),
        )
    await pilot.pause()
    await asyncio.sleep(0.2)


def _living(app):
    """How many objects there are, and how many widgets of each kind."""
    gc.collect()
    objects = gc.get_objects()
    widgets = Counter(
        type(each).__name__ for each in objects if issubclass(type(each), MessagePump)
    )
    return len(objects), widgets
