"""The branch in sight: its messages, the answers that are being written, and what is done to them.

Owns bringing the transcript in line with the store and every action on a message. Knows nothing
about how the next message is written (`composer`) or how messages look (`message_view`).
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import msgspec
from textual import work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message as Event

from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import W2CError
from w2c_tui.core.store import StoredAttachment, StoredMessage
from w2c_tui.tui.answer import Answer
from w2c_tui.tui.app import W2CApp, guarded
from w2c_tui.tui.open_session import OpenSession
from w2c_tui.tui.transcript import Transcript
from w2c_tui.tui.welcome import Welcome

if TYPE_CHECKING:
    from w2c_tui.tui.message_view import MessageView, PictureWanted

FRAME_S = 1 / 10
"""How often an answer that is being written is drawn."""
FRAME_WHILE_TYPING_S = 1 / 3
"""The same shortly after a key: what is typed comes first."""


class BranchView(Vertical):
    """See the module."""

    app: W2CApp

    class Shown(Event):
        """What is in sight, or what is known about it, is another."""

    class EditWanted(Event):
        """A question is to be written anew, beginning with these words and pictures."""

        def __init__(
            self, message: StoredMessage, text: str, pictures: tuple[Attachment, ...]
        ) -> None:
            super().__init__()
            self.message = message
            self.text = text
            self.pictures = pictures

    class PictureAsked(Event):
        """A picture is to be shown in full."""

        def __init__(self, picture: StoredAttachment) -> None:
            super().__init__()
            self.picture = picture

    class Deleted(Event):
        """A message is gone, with all below it."""

        def __init__(self, message_id: int) -> None:
            super().__init__()
            self.message_id = message_id

    class Forked(Event):
        """There is a new session that goes on from a message."""

        def __init__(self, session_id: str) -> None:
            super().__init__()
            self.session_id = session_id

    def __init__(self, place: OpenSession) -> None:
        super().__init__(id="branch")
        self._place = place
        self._typed_at = self._drawn_at = 0.0

    def compose(self) -> ComposeResult:
        yield Welcome()
        yield Transcript(id="transcript")

    def on_mount(self) -> None:
        self._clock = self.set_interval(FRAME_S, self._follow, pause=True)

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def answer(self) -> Answer | None:
        """The one that is being written in the session in sight, if any."""
        answers = self.app.answers.values()
        return next((a for a in answers if a.session_id == self._place.id), None)

    @property
    def message_focused(self) -> bool:
        focused = self.screen.focused
        return focused is not None and focused.parent is self.transcript

    # ── showing ───────────────────────────────────────────────────────────────────────────────

    async def show(self, *, at: int | None = None, keep: bool = False) -> None:
        """Bring the transcript in line with the store; see `Transcript.show`."""
        messages = self._place.branch()
        self.query_one(Welcome).display = not messages
        self.transcript.display = bool(messages)
        await self.transcript.show(messages, self.app.answers.get, at=at, keep=keep)
        await self._catch_up()
        self.app.preview.show(self._place.id)

    async def append(self, messages: list[StoredMessage]) -> None:
        """New messages at the end."""
        await self.transcript.append(messages)
        await self._catch_up()

    async def _catch_up(self) -> None:
        """Follow what is being written; answers may have ended while their views were made."""
        for view in self.transcript.views:
            if view.message.status == "streaming" and view.message.id not in self.app.answers:
                await self._finish(view.message.id)
        if self.app.answers:
            self._clock.resume()
        else:
            self._clock.pause()
        self.post_message(self.Shown())

    def typed(self) -> None:
        """The user is typing: drawing steps back for a moment."""
        self._typed_at = time.monotonic()

    async def _follow(self) -> None:
        """Draw what has come of the answers."""
        now = time.monotonic()
        if now - self._typed_at < 0.15 and now - self._drawn_at < FRAME_WHILE_TYPING_S:
            return
        self._drawn_at = now
        for answer in list(self.app.answers.values()):
            changed = answer.fetch()
            if changed:
                self.app.preview.follow(answer)
            view = self.transcript.view(answer.message_id)
            if view is not None and view.answer is answer:
                if changed:
                    await view.follow()
                else:
                    view.tell()

    async def answer_over(self, answer: Answer) -> None:
        """Show an answer as it was stored."""
        await self._finish(answer.message_id)
        if answer.session_id == self._place.id:
            self.app.preview.show(answer.session_id)
        if not self.app.answers:
            self._clock.pause()
        self.post_message(self.Shown())

    async def _finish(self, message_id: int) -> None:
        message = self.app.store.message(message_id)
        self.transcript.replace(message)
        view = self.transcript.view(message_id)
        if view is not None:
            await view.finish(message)

    def on_picture_wanted(self, event: PictureWanted) -> None:
        self._decode_thumbnail(event.thumbnail)

    @work(thread=True, group="thumbnails", exit_on_error=False)
    def _decode_thumbnail(self, thumbnail: Any) -> None:
        from w2c_tui.tui.picture import thumbnail_of

        with contextlib.suppress(W2CError):
            image = thumbnail_of(thumbnail.picture, self.app.store)
            self.call_later(thumbnail.show, image)

    # ── answers ───────────────────────────────────────────────────────────────────────────────

    def busy(self) -> bool:
        """Whether an answer is being written here, which is then said."""
        if self.answer is None:
            return False
        self.notify("Esc stops the answer first.", timeout=3)
        return True

    async def regenerate(self, message: StoredMessage | None = None) -> None:
        """Another answer to, or beside, `message`; by default the last one."""
        messages = self.transcript.messages
        message = message or (messages[-1] if messages else None)
        if message is None or self.busy():
            return
        parent = message.id if message.role == "user" else message.parent_id
        place = self._place
        params = place.params
        if params.seed is not None and parent is not None:
            # With the same seed it would be the same answer.
            seed = (params.seed + len(self.app.store.children(parent))) % 2**63
            params = msgspec.structs.replace(params, seed=seed)
        answer = self.app.begin_answer(message.session_id, params, place.iteration, parent=parent)
        await self.show(keep=True)
        view = self.transcript.view(answer.message_id)
        if view is not None and self.message_focused:
            view.focus(scroll_visible=False)

    # ── messages ──────────────────────────────────────────────────────────────────────────────

    @guarded
    async def on_message_view_version_wanted(self, event: MessageView.VersionWanted) -> None:
        self.app.store.select_branch(event.message_id)
        await self.show(at=event.message_id)
        view = self.transcript.view(event.message_id)
        if view is not None:
            view.focus(scroll_visible=False)

    @guarded
    async def on_message_view_asked(self, event: MessageView.Asked) -> None:
        message = event.message
        if event.action == "picture":
            if event.picture is not None:
                self.post_message(self.PictureAsked(event.picture))
            return
        assert message is not None
        match event.action:
            case "copy":
                self.app.copy(self._text(message), "the message")
            case "copy_page":
                self._copy_page(message)
            case "edit":
                self._edit(message)
            case "editor":
                await self._edit_outside(message)
            case "delete":
                await self._delete(message)
            case "regenerate":
                await self.regenerate(message)
            case "continue":
                place = self._place
                self.app.continue_answer(message.id, place.params, place.iteration)
                await self.show()
            case "fork":
                self._fork(message)

    def _text(self, message: StoredMessage) -> str:
        answer = self.app.answers.get(message.id)
        return answer.text if answer is not None else message.text

    def _copy_page(self, message: StoredMessage) -> None:
        from w2c_tui.core.artifact import best_page

        page = best_page(self._text(message))
        if page is None:
            self.notify("There is no page in this answer.", timeout=3)
        else:
            self.app.copy(page.html, "the page")

    def _edit(self, message: StoredMessage) -> None:
        if message.role != "assistant":
            self._ask_for(message, message.text)
            return
        from w2c_tui.tui.dialogs import EditText

        def done(text: str | None) -> None:
            if text is not None and text != message.text:
                self.run_worker(self._edited(message, text))

        self.app.push_screen(EditText("Edit the answer", message.text), done)

    def _ask_for(self, message: StoredMessage, text: str) -> None:
        pictures = tuple(
            Attachment(self.app.store.image(item.sha256), **msgspec.structs.asdict(item))
            for item in message.attachments
        )
        self.post_message(self.EditWanted(message, text, pictures))

    async def _edited(self, message: StoredMessage, text: str) -> None:
        changed = self.app.store.edit(message.id, Message(message.role, text))
        self.app.pages.keep_edit(message, changed)
        await self.show(at=changed.id)
        self.app.preview.show(changed.session_id)

    async def _edit_outside(self, message: StoredMessage) -> None:
        from w2c_tui.core.artifact import best_page
        from w2c_tui.tui.editor import edit

        page = best_page(message.text)
        text = edit(self.app, message.text, ".html" if page else ".md")
        if text is not None and text != message.text:
            if message.role == "assistant":
                await self._edited(message, text)
            else:
                self._ask_for(message, text)

    async def _delete(self, message: StoredMessage) -> None:
        if self.busy():
            return
        self.app.store.delete_message(message.id)
        self.post_message(self.Deleted(message.id))
        await self.show(keep=True)
        self.notify("Deleted, with all below it. Alt+Z brings it back.", timeout=8)
        views = self.transcript.views
        (views[-1] if views else self.screen.query_one("#prompt")).focus()

    def _fork(self, message: StoredMessage) -> None:
        """A new session with everything up to `message`, the pages among it as versions."""
        store = self.app.store
        old = store.session(message.session_id)
        conversation = store.conversation(message.session_id, message.id)
        branch = store.branch(message.session_id, message.id)
        new = store.create_session(
            f"{old.title} (fork)",
            system_prompt=old.system_prompt,
            model=old.model,
            params={k: v for k, v in old.params.items() if k != "place"},
        )
        turns = [m for m in conversation if m.role != "system"]
        for copied, stored in zip(turns, branch, strict=True):
            if copied.role == "user":
                store.add_message(new.id, copied)
                continue
            with store.begin_answer(new.id, model=stored.model) as answer:
                answer.append(copied.text)
                # One that is being written stays as it is now.
                answer.finish(
                    "partial" if stored.status == "streaming" else stored.status,
                    reason=stored.finish_reason,
                    error=stored.error,
                    stats=stored.stats,
                )
            self.app.pages.keep(answer.message_id, self._place.params)
        self.post_message(self.Forked(new.id))
