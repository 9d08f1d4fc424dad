"""The conversation on the screen.

Owns which messages have a view: only those around the place in sight do, so that length costs
nothing. Knows nothing about the engine, and of the store only the messages it is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from textual import events
from textual.containers import VerticalScroll
from textual.message import Message

from w2c_tui.core.store import StoredMessage

if TYPE_CHECKING:
    from w2c_tui.tui.answer import Answer
    from w2c_tui.tui.message_view import MessageView

FIRST, BATCH, MOST = 8, 6, 20
"""Messages that get a view on opening, on scrolling to an end, and at most."""


class Transcript(VerticalScroll, can_focus=False):
    """The messages of one branch, of which a window has views."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.messages: list[StoredMessage] = []
        self._answers: Callable[[int], Answer | None] = lambda _: None
        self._first = 0
        self._last = 0
        self._moving = False
        self._building = asyncio.Lock()

    @property
    def views(self) -> list[MessageView]:
        return list(self.children)  # type: ignore[arg-type]

    def view(self, message_id: int) -> MessageView | None:
        return next((view for view in self.views if view.message.id == message_id), None)

    async def show(
        self,
        messages: Sequence[StoredMessage],
        answers: Callable[[int], Answer | None],
        *,
        at: int | None = None,
        keep: bool = False,
    ) -> None:
        """Show `messages`, the end in sight, or the message with the id `at`.

        With `keep`, views of messages that are still there stay as they are.
        """
        async with self._building:
            await self._show(messages, answers, at=at, keep=keep)

    async def _show(
        self,
        messages: Sequence[StoredMessage],
        answers: Callable[[int], Answer | None],
        *,
        at: int | None,
        keep: bool,
    ) -> None:
        self._answers = answers
        old = {view.message.id: view for view in self.views}
        self.messages = list(messages)
        ids = [message.id for message in self.messages]
        index = ids.index(at) if at in ids else None
        num = self._num_first
        end = len(ids) if index is None else min(len(ids), max(index + num // 2, num))
        start = max(0, end - num)
        if keep and index is None and old:
            kept = [ids.index(i) for i in old if i in ids]
            start = min([start, *kept])
            start = max(start, end - self._num_most)
        self._moving = True
        try:
            self._first, self._last = start, end
            wanted = self.messages[start:end]
            async with self.batch():
                if not keep:
                    old = {}
                    await self.remove_children()
                else:
                    wanted_ids = {message.id for message in wanted}
                    for ident, view in list(old.items()):
                        if ident not in wanted_ids:
                            del old[ident]
                            await view.remove()
                previous: MessageView | None = None
                for message in wanted:
                    known = old.get(message.id)
                    if known is not None:
                        known.message = message
                        known.tell()
                        previous = known
                        continue
                    view = _view(message, answers(message.id))
                    first = 0 if previous is None and self.children else None
                    await self.mount(view, before=first, after=previous)
                    previous = view
            if index is None:
                self.anchor()
            else:
                self._anchor_only_at_the_end()
                target = self.view(self.messages[index].id)
                if target is not None:
                    # Forced: the scrollbar, without which it is dropped, may not be there yet.
                    self.call_after_refresh(
                        self.scroll_to_widget, target, animate=False, top=True, force=True
                    )
        finally:
            self.call_after_refresh(self._settled)

    async def append(self, messages: Sequence[StoredMessage]) -> None:
        """New messages at the end, which comes into sight."""
        if self._last != len(self.messages) or not self.messages:
            await self.show([*self.messages, *messages], self._answers)
            return
        async with self._building:
            self.messages += messages
            self._last = len(self.messages)
            await self.mount(*self._views_of(self._last - len(messages), self._last))
            await self._take_surplus()
            self.anchor()

    def replace(self, message: StoredMessage) -> None:
        """`message` as it is now."""
        self.messages = [message if m.id == message.id else m for m in self.messages]

    def _settled(self) -> None:
        self._moving = False

    # ── the window ────────────────────────────────────────────────────────────────────────────

    @property
    def _num_first(self) -> int:
        """How many views are more than fill the screen."""
        return max(FIRST, self.app.size.height // 3)

    @property
    def _num_most(self) -> int:
        return max(MOST, self._num_first + 2 * BATCH)

    def watch_scroll_y(self, old: float, new: float) -> None:
        super().watch_scroll_y(old, new)
        if new != old:
            self._look_ahead(1 if new > old else -1)

    def _look_ahead(self, step: int) -> None:
        """Near an end of the window in the direction `step`, move the window on."""
        if self._moving or not self.is_mounted:
            return
        if step < 0:
            wanted = self._first > 0 and self.scroll_y < self.size.height
        else:
            more = self._last < len(self.messages)
            wanted = more and self.scroll_y > self.max_scroll_y - self.size.height
        if wanted:
            self._moving = True
            self.run_worker(self._shift(step), group="window")

    async def _shift(self, step: int) -> None:
        """Views for more messages in that direction and fewer at the other end; what is in sight
        stays where it is."""
        async with self._building:
            views = self.views
            fixed = next((v for v in views if v.virtual_region.bottom > self.scroll_y), views[-1])
            place = fixed.virtual_region.y - self.scroll_y
            async with self.batch():
                if step < 0:
                    start = max(0, self._first - BATCH)
                    await self.mount(*self._views_of(start, self._first), before=0)
                    self._first = start
                    surplus = max(0, len(self.children) - self._num_most)
                    await self.remove_children(self.views[len(self.children) - surplus :])
                    self._last -= surplus
                else:
                    end = min(len(self.messages), self._last + BATCH)
                    await self.mount(*self._views_of(self._last, end))
                    self._last = end
                    await self._take_surplus()
                self._anchor_only_at_the_end()

        def stay() -> None:
            y = fixed.virtual_region.y - place
            self.scroll_to(y=y, animate=False, force=True, immediate=True)
            self._moving = False
            # Who holds a key down may be at the end already.
            self._look_ahead(step)

        self.call_after_refresh(stay)

    def _views_of(self, start: int, end: int) -> list[MessageView]:
        return [_view(message, self._answers(message.id)) for message in self.messages[start:end]]

    async def _take_surplus(self) -> None:
        """Take away the first views when there are too many."""
        surplus = max(0, len(self.children) - self._num_most)
        await self.remove_children(self.views[:surplus])
        self._first += surplus

    def _anchor_only_at_the_end(self) -> None:
        """Whoever scrolls to the end of the conversation stays there, to no other end."""
        at_end = self._last == len(self.messages)
        self.anchor(at_end)
        if at_end:
            self.release_anchor()

    # ── moving ────────────────────────────────────────────────────────────────────────────────

    def on_message_view_step(self, event: MessageView.Step) -> None:
        event.stop()
        views, step = self.views, event.step
        at = views.index(event.view) + step
        if 0 <= at < len(views):
            views[at].focus()
        elif at >= len(views):
            self.post_message(self.Left())

    def on_message_view_far(self, event: MessageView.Far) -> None:
        event.stop()
        self.run_worker(self._go_far(event.step), exclusive=True, group="window")

    async def _go_far(self, step: int) -> None:
        message = self.messages[0 if step < 0 else -1]
        if self.view(message.id) is None:
            await self.show(self.messages, self._answers, at=message.id)
        view = self.view(message.id)
        if view is not None:
            view.focus()

    class Left(Message):
        """The user moved down beyond the last message."""

    def in_sight(self) -> int | None:
        """The id of the message at the top edge, None at the end: what to come back to."""
        at_end = self.scroll_y >= self.max_scroll_y and self._last == len(self.messages)
        if at_end or not self.views:
            return None
        for view in self.views:
            if view.virtual_region.bottom > self.scroll_y:
                return view.message.id
        return None

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self.release_anchor()


def _view(message: StoredMessage, answer: Answer | None) -> MessageView:
    # Imported late: the first frame of an empty session does without Markdown.
    from w2c_tui.tui.message_view import MessageView

    return MessageView(message, answer)
