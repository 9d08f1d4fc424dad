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
        end = len(ids) if index is None else min(len(ids), max(index + FIRST // 2, FIRST))
        start = max(0, end - FIRST)
        if keep and index is None and old:
            kept = [ids.index(i) for i in old if i in ids]
            start = min([start, *kept])
            start = max(start, end - MOST)
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
                self.anchor(False)
                target = self.view(self.messages[index].id)
                if target is not None:
                    self.call_after_refresh(self.scroll_to_widget, target, animate=False, top=True)
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
            await self.mount(*(_view(message, self._answers(message.id)) for message in messages))
            self.anchor()
            await self._prune(earlier=True)

    def replace(self, message: StoredMessage) -> None:
        """`message` as it is now."""
        self.messages = [message if m.id == message.id else m for m in self.messages]

    def _settled(self) -> None:
        self._moving = False

    # ── the window ────────────────────────────────────────────────────────────────────────────

    def watch_scroll_y(self, old: float, new: float) -> None:
        super().watch_scroll_y(old, new)
        if self._moving or not self.is_mounted:
            return
        if new < old and new < self.size.height and self._first > 0:
            self._moving = True
            self.run_worker(self._earlier(), group="window")
        elif (
            new > old
            and new > self.max_scroll_y - self.size.height
            and self._last < len(self.messages)
        ):
            self._moving = True
            self.run_worker(self._later(), group="window")

    async def _earlier(self) -> None:
        async with self._building:
            await self._mount_earlier()

    async def _mount_earlier(self) -> None:
        start = max(0, self._first - BATCH)
        height = self.virtual_size.height
        views = [_view(m, self._answers(m.id)) for m in self.messages[start : self._first]]
        async with self.batch():
            await self.mount(*views, before=0)
            self._first = start

        def stay() -> None:
            self.scroll_to(
                y=self.scroll_y + self.virtual_size.height - height, animate=False, force=True
            )
            self._moving = False
            self.run_worker(self._prune(earlier=False), group="prune")

        self.call_after_refresh(stay)

    async def _later(self) -> None:
        async with self._building:
            await self._mount_later()

    async def _mount_later(self) -> None:
        end = min(len(self.messages), self._last + BATCH)
        views = [_view(m, self._answers(m.id)) for m in self.messages[self._last : end]]
        await self.mount(*views)
        self._last = end
        self._moving = False
        await self._prune(earlier=True)

    async def _prune(self, *, earlier: bool) -> None:
        """Take away views at the far end when there are too many."""
        views = self.views
        if len(views) <= MOST:
            return
        surplus = len(views) - MOST + BATCH
        if earlier:
            height = self.virtual_size.height
            self._moving = True
            async with self.batch():
                await self.remove_children(views[:surplus])
                self._first += surplus

            def stay() -> None:
                if not self.is_vertical_scroll_end:
                    y = self.scroll_y + self.virtual_size.height - height
                    self.scroll_to(y=max(0, y), animate=False, force=True)
                self._moving = False

            self.call_after_refresh(stay)
        else:
            await self.remove_children(views[-surplus:])
            self._last -= surplus

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
        if self.is_vertical_scroll_end or not self.views:
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
