"""The main screen: the conversation, the prompt under it, and what stands beside them.

Owns which session is shown, its draft, and what the keys do. Knows nothing about how answers are
generated (`app`, `answer`) or how messages look (`transcript`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from textual import on, work
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer, Static, TextArea

from w2c_tui.core.config import GenerationParams
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import ImageError, W2CError
from w2c_tui.core.files import write_atomically
from w2c_tui.core.printable import printable
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.core.store import Session, StoredAttachment, StoredMessage
from w2c_tui.tui.answer import Answer
from w2c_tui.tui.app import W2CApp, guarded
from w2c_tui.tui.prompt_box import PromptBox, token, tokens_in, without_outer_tokens
from w2c_tui.tui.status_line import Notice, StatusLine
from w2c_tui.tui.transcript import Transcript
from w2c_tui.tui.welcome import Welcome

if TYPE_CHECKING:
    from w2c_tui.tui.message_view import Action, MessageView, PictureWanted
    from w2c_tui.tui.picture_pane import PicturePane
    from w2c_tui.tui.settings_panel import SettingsPanel
    from w2c_tui.tui.sidebar import Sidebar

FRAME_S = 1 / 10
"""How often an answer that is being written is drawn."""
FRAME_WHILE_TYPING_S = 1 / 3
"""The same shortly after a key: what is typed comes first."""


class ChatScreen(Screen[None]):
    """See the module."""

    AUTO_FOCUS = "PromptBox"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", id="stop"),
        Binding("ctrl+n", "new_session", "New", id="new-session"),
        Binding("ctrl+b", "sessions", "Sessions", id="sessions"),
        Binding("ctrl+o", "model", "Model", id="model"),
        Binding("ctrl+t", "attach", "Attach", id="attach"),
        Binding("f2", "settings", "Settings", id="settings"),
        Binding("f3", "pictures", "Picture", id="picture"),
        Binding("ctrl+r", "regenerate", "Regenerate", id="regenerate", show=False),
        Binding("ctrl+g", "editor", "Editor", id="editor", show=False),
        Binding("alt+z", "undo", "Undo delete", id="undo", show=False),
        Binding("f5", "example", "Example", id="example", show=False),
        Binding("f6", "switch", "Messages / prompt", id="switch", show=False, priority=True),
        Binding("pageup", "page(-1)", "Page up", show=False, id="page-up"),
        Binding("pagedown", "page(1)", "Page down", show=False, id="page-down"),
    ]

    app: W2CApp

    def __init__(self, images: Sequence[str], session: str | None, new: bool) -> None:
        super().__init__()
        self._images_at_start = list(images)
        self._session_at_start = session
        self._new_at_start = new or bool(images)
        self.session: Session | None = None
        """None until there is something to keep."""
        self.draft: list[Attachment] = []
        self._numbers: dict[int, Attachment] = {}
        self._reading: set[str] = set()
        self._waiting_to_send = False
        self._editing: StoredMessage | None = None
        self._undo: list[tuple[str, int | str]] = []
        self._system = ""
        self._params = GenerationParams()
        self._ocr = "auto"
        self._picture = ""
        self._kept: tuple[object, ...] = ()
        self._typed_at = self._drawn_at = 0.0
        self._folder = Path.cwd()

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        with Horizontal(id="main"), Vertical(id="center"):
            yield Welcome()
            yield Transcript(id="transcript")
            yield Notice()
            yield Static(id="hint", markup=False)
            yield PromptBox(id="prompt", placeholder="Paste or drop a screenshot, or type")
        yield StatusLine()
        yield Footer(compact=True, show_command_palette=True)

    def on_mount(self) -> None:
        self.prompt.border_title = "Prompt"
        self._clock = self.set_interval(FRAME_S, self._follow, pause=True)
        self._saver = self.set_timer(1.0, self.keep, pause=True)
        self._defaults()
        self.call_later(self._open_at_start)

    @property
    def prompt(self) -> PromptBox:
        return self.query_one(PromptBox)

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def params(self) -> GenerationParams:
        return self._params

    def _answer_in(self, session: Session | None) -> Answer | None:
        """The answer that is being written in this session, if any."""
        if session is None:
            return None
        return next((a for a in self.app.answers.values() if a.session_id == session.id), None)

    # ── sessions ──────────────────────────────────────────────────────────────────────────────

    def _defaults(self) -> None:
        settings = self.app.settings
        self._params, self._ocr, self._system = settings.generation, settings.ocr, settings.system

    @guarded
    async def _open_at_start(self) -> None:
        store = self.app.store
        self.prompt.prompts = store.prompts()
        if self._session_at_start:
            await self.open_session(self._session_at_start)
        elif not self._new_at_start and (last := store.sessions()[:1]):
            await self.open_session(last[0].id)
        else:
            await self._show_branch()
        for image in self._images_at_start:
            self.attach(image)

    async def open_session(self, session_id: str, *, message_id: int | None = None) -> None:
        """Show a session where it was left, or at one of its messages."""
        store = self.app.store
        session = store.session(session_id)
        if message_id is not None:
            store.select_branch(message_id)
            session = store.session(session_id)
        self.keep()
        self._leave_draft()
        self.session = session
        self._defaults()
        saved = session.params
        own = msgspec.to_builtins(msgspec.structs.asdict(self._params)) | saved.get(
            "generation", {}
        )
        with contextlib.suppress(msgspec.ValidationError):
            self._params = msgspec.convert(own, GenerationParams)
        self._ocr = saved.get("ocr", self._ocr)
        self._system = session.system_prompt
        self.draft = store.draft_attachments(session_id)
        self._numbers = dict(enumerate(self.draft, 1))
        self._fill(session.draft)
        place = message_id if message_id is not None else saved.get("place")
        await self._show_branch(at=place)
        self._read_texts()
        self.prompt.focus()

    async def action_new_session(self) -> None:
        self.keep()
        self._leave_draft()
        self.session = None
        self._defaults()
        self._fill("")
        await self._show_branch()
        self.prompt.focus()

    def _leave_draft(self) -> None:
        self.draft, self._numbers = [], {}
        self._editing, self._waiting_to_send = None, False

    def _fill(self, text: str) -> None:
        self.prompt.text = text
        self.prompt.move_cursor(self.prompt.document.end)
        self._hint()

    def keep(self) -> None:
        """Save the draft and the place, so that nothing is lost however this ends."""
        text = self.prompt.text
        if self._editing is not None:
            return
        if self.session is None:
            if not text.strip() and not self.draft:
                return
            self._begin_session("")
        assert self.session is not None
        store = self.app.store
        try:
            draft = (self.session.id, text, [(i.sha256, i.page_text) for i in self.draft])
            if draft != self._kept:
                store.set_draft(self.session.id, text, self.draft)
                self._kept = draft
            place = self.transcript.in_sight()
            params = self._saved_params() | ({"place": place} if place else {})
            if params != self.session.params:
                store.update_session(self.session.id, params=params)
            self.session = store.session(self.session.id)
        except W2CError as error:
            self.app.show_error(error)

    def _saved_params(self) -> dict[str, Any]:
        """What was chosen for this session; all else follows the settings."""
        general = msgspec.structs.asdict(self.app.settings.generation)
        own = msgspec.structs.asdict(self._params).items()
        changed = {name: value for name, value in own if value != general[name]}
        found: dict[str, Any] = {"generation": msgspec.to_builtins(changed)} if changed else {}
        if self._ocr != self.app.settings.ocr:
            found["ocr"] = self._ocr
        return found

    def _begin_session(self, title: str) -> None:
        self.session = self.app.store.create_session(
            title,
            system_prompt=self._system,
            model=self.app.spec.name,
            params=self._saved_params(),
        )

    async def _show_branch(self, *, at: int | None = None, keep: bool = False) -> None:
        """Bring the transcript in line with the store."""
        messages: list[StoredMessage] = []
        if self.session is not None:
            self.session = self.app.store.session(self.session.id)
            messages = self.app.store.branch(self.session.id)
        self.query_one(Welcome).display = not messages
        self.transcript.display = bool(messages)
        await self.transcript.show(messages, self.app.answers.get, at=at, keep=keep)
        await self._catch_up()
        self._name_it()
        self._tell_status()

    async def _catch_up(self) -> None:
        """Follow what is being written; answers may have ended while their views were made."""
        for view in self.transcript.views:
            if view.message.status == "streaming" and view.message.id not in self.app.answers:
                await self._finish(view.message.id)
        if self.app.answers:
            self._clock.resume()
        else:
            self._clock.pause()
        if self._message_focused:
            self.refresh_bindings()

    def _name_it(self) -> None:
        title = self.session.title if self.session else ""
        self.query_one("#title", Static).update(f"w2c-tui  {printable(title) or 'New session'}")

    # ── pictures ──────────────────────────────────────────────────────────────────────────────

    def attach(self, reference: str) -> None:
        """Attach the picture at a path or address, in the background."""
        self._hint(f"Opening {printable(reference)} …")
        self._open_picture(reference)

    @work(thread=True, group="attach", exit_on_error=False)
    def _open_picture(self, reference: str) -> None:
        from w2c_tui.core.reference import load_attachment

        try:
            image = load_attachment(reference, self.app.settings.images)
        except W2CError as error:
            self.call_later(self._not_attached, error)
        else:
            self.call_later(self.add_picture, image)

    @work(thread=True, group="attach", exit_on_error=False)
    def _open_clipboard(self) -> None:
        from w2c_tui.core.reference import attachment_from_clipboard

        try:
            image = attachment_from_clipboard(self.app.settings.images)
        except ImageError as error:
            self.call_later(self._paste_text, error)
        else:
            self.call_later(self.add_picture, image)

    def _not_attached(self, error: W2CError) -> None:
        self._hint()
        self.app.show_error(error)

    def _paste_text(self, error: W2CError) -> None:
        """The clipboard holds no picture: paste its text, or say why nothing happens."""
        self._hint()
        text = self.app.clipboard
        if not text and not _is_remote():
            import pyperclip

            with contextlib.suppress(pyperclip.PyperclipException):
                text = pyperclip.paste()
        if text:
            self.prompt.put(text)
        else:
            self.app.show_error(error)

    def add_picture(self, image: Attachment) -> None:
        """Put an opened picture into the prompt."""
        number = max([0, *self._numbers, *tokens_in(self.prompt.text)]) + 1
        self._numbers[number] = image
        self.prompt.put_token(number)
        self._take_draft()
        self._hint()
        self._read_texts()
        self.prompt.focus()

    def _take_draft(self) -> None:
        """The pictures whose token is in the text are attached, in the text's order."""
        numbers = [n for n in tokens_in(self.prompt.text) if n in self._numbers]
        self.draft = [self._numbers[number] for number in numbers]

    def _read_texts(self) -> None:
        for image in self.draft:
            if self.app.wants_text(image, self._ocr) and image.sha256 not in self._reading:
                self._reading.add(image.sha256)
                self.app.read_text(image)
        self._hint()

    async def text_read(self, image: Attachment, error: W2CError | None) -> None:
        self._reading.discard(image.sha256)
        if error is not None:
            self._waiting_to_send = False
            self.app.show_error(error)
        for number, known in self._numbers.items():
            if known.sha256 == image.sha256 and image.page_text is not None:
                self._numbers[number] = msgspec.structs.replace(known, page_text=image.page_text)
        self._take_draft()
        self._hint()
        await self._send_if_ready()

    def on_picture_wanted(self, event: PictureWanted) -> None:
        self._decode_thumbnail(event.thumbnail)

    @work(thread=True, group="thumbnails", exit_on_error=False)
    def _decode_thumbnail(self, thumbnail: Any) -> None:
        from w2c_tui.tui.picture import thumbnail_of

        with contextlib.suppress(W2CError):
            image = thumbnail_of(thumbnail.picture, self.app.store)
            self.call_later(thumbnail.show, image)

    # ── the prompt ────────────────────────────────────────────────────────────────────────────

    @on(PromptBox.PictureNamed)
    def _pictures_named(self, event: PromptBox.PictureNamed) -> None:
        for reference in event.references:
            self.attach(reference)

    @on(PromptBox.PicturePasted)
    def _picture_pasted(self) -> None:
        self._hint("Reading the clipboard …")
        self._open_clipboard()

    @on(TextArea.Changed, "#prompt")
    def _typed(self) -> None:
        self._typed_at = time.monotonic()
        self._take_draft()
        self._saver.reset()
        self._saver.resume()

    @on(PromptBox.Sent)
    async def _sent(self) -> None:
        if self._answer_in(self.session) is not None:
            self.notify("Esc stops the answer first.", timeout=3)
            return
        text = self.prompt.text.strip()
        if not text and not self.draft:
            return
        from w2c_tui.tui.prompt_box import pasted_references

        if references := pasted_references(text):
            # A path that was typed by hand is a picture, too.
            self.prompt.text = ""
            for reference in references:
                self.attach(reference)
            return
        self._waiting_to_send = True
        await self._send_if_ready()

    @guarded
    async def _send_if_ready(self) -> None:
        """Send what waits, once the model is known and the pictures' text was read."""
        if not self._waiting_to_send:
            return
        wanted = [self.app.wants_text(image, self._ocr) for image in self.draft]
        if None in wanted and self.app.model_state in ("none", "failed"):
            self.app.load_model()
        if any(value is None or value for value in wanted):
            self._read_texts()
            return
        self._waiting_to_send = False
        await self._send()

    async def _send(self) -> None:
        store = self.app.store
        text = without_outer_tokens(self.prompt.text).strip() or PAGE_PROMPT
        message = Message("user", text, tuple(self.draft))
        if self.session is None:
            self._begin_session("")
        assert self.session is not None
        if not self.session.title:
            store.update_session(self.session.id, title=_title(message))
        before = self._editing
        if (
            before is None
            and self.transcript.messages
            and self.transcript.messages[-1].role == "user"
        ):
            # Its answer was deleted; two questions in a row have no meaning for a model.
            before = self.transcript.messages[-1]
        if before is not None:
            stored = store.edit(before.id, message)
        else:
            stored = store.add_message(self.session.id, message)
        self._leave_draft()
        store.set_draft(self.session.id, "", [])
        if text != PAGE_PROMPT:
            self.prompt.prompts = [text, *(t for t in self.prompt.prompts if t != text)]
        self._fill("")
        self.prompt.border_title = "Prompt"
        answer = self.app.begin_answer(self.session.id, self._params, parent=stored.id)
        if before is not None or not self.transcript.messages:
            await self._show_branch()
        else:
            await self.transcript.append([stored, store.message(answer.message_id)])
            await self._catch_up()

    def _hint(self, text: str = "") -> None:
        """One line above the prompt about what is going on with it."""
        if not text and self._reading:
            names = ", ".join(i.name for i in self.draft if i.sha256 in self._reading)
            text = f"Reading the text on {printable(names) or 'a picture'} …"
        if self._waiting_to_send:
            text = f"{text or 'Waiting for the model.'} Will be sent then; Esc takes it back."
        if not text and self.draft:
            from w2c_tui.tui.picture_pane import warning

            texts = filter(None, (warning(image, self.app.info) for image in self.draft))
            text = next((f"{t} F3, then t has it read." for t in texts), "")
        hint = self.query_one("#hint", Static)
        hint.update(text)
        hint.display = bool(text)

    # ── answers ───────────────────────────────────────────────────────────────────────────────

    async def _follow(self) -> None:
        """Draw what has come of the answers."""
        now = time.monotonic()
        if now - self._typed_at < 0.15 and now - self._drawn_at < FRAME_WHILE_TYPING_S:
            return
        self._drawn_at = now
        for answer in list(self.app.answers.values()):
            changed = answer.fetch()
            view = self.transcript.view(answer.message_id)
            if view is not None and view.answer is answer:
                if changed:
                    await view.follow()
                else:
                    view.tell()

    async def answer_over(self, answer: Answer) -> None:
        await self._finish(answer.message_id)
        if not self.app.answers:
            self._clock.pause()
        self._tell_status()
        if self._message_focused:
            self.refresh_bindings()

    async def _finish(self, message_id: int) -> None:
        message = self.app.store.message(message_id)
        self.transcript.replace(message)
        view = self.transcript.view(message_id)
        if view is not None:
            await view.finish(message)

    @guarded
    async def action_stop(self) -> None:
        if self._waiting_to_send:
            self._waiting_to_send = False
            self._hint()
        elif (answer := self._answer_in(self.session)) is not None:
            answer.cancel()
        elif self._editing is not None:
            self._leave_draft()
            self.prompt.border_title = "Prompt"
            self._fill("")
        else:
            self.prompt.focus()

    @guarded
    async def action_regenerate(self) -> None:
        last = self.transcript.messages[-1] if self.transcript.messages else None
        if last is not None:
            await self._regenerate(last)

    async def _regenerate(self, message: StoredMessage) -> None:
        if self._answer_in(self.session) is not None:
            self.notify("Esc stops the answer first.", timeout=3)
            return
        parent = message.id if message.role == "user" else message.parent_id
        answer = self.app.begin_answer(message.session_id, self._params, parent=parent)
        await self._show_branch(keep=True)
        self._focus_message(answer.message_id)

    def _focus_message(self, message_id: int) -> None:
        view = self.transcript.view(message_id)
        if view is not None and self._message_focused:
            view.focus(scroll_visible=False)

    @property
    def _message_focused(self) -> bool:
        return self.focused is not None and self.focused.parent is self.transcript

    # ── messages ──────────────────────────────────────────────────────────────────────────────

    @guarded
    async def on_message_view_version_wanted(self, event: MessageView.VersionWanted) -> None:
        self.app.store.select_branch(event.message_id)
        await self._show_branch(at=event.message_id)
        view = self.transcript.view(event.message_id)
        if view is not None:
            view.focus(scroll_visible=False)

    @on(Transcript.Left)
    def _left(self) -> None:
        self.prompt.focus()

    @guarded
    async def on_message_view_asked(self, event: MessageView.Asked) -> None:
        message = event.message
        if event.action == "picture":
            if event.picture is not None:
                self.show_picture(event.picture)
            return
        assert message is not None
        answer = self.app.answers.get(message.id)
        text = answer.text if answer is not None else message.text
        match event.action:
            case "copy":
                self.app.copy(text, "the message")
            case "copy_page":
                from w2c_tui.core.artifact import best_page

                page = best_page(text)
                if page is None:
                    self.notify("There is no page in this answer.", timeout=3)
                else:
                    self.app.copy(page.html, "the page")
            case "edit":
                await self._edit(message)
            case "editor":
                await self._edit_outside(message)
            case "delete":
                await self._delete(message)
            case "regenerate":
                await self._regenerate(message)
            case "continue":
                self.app.continue_answer(message.id, self._params)
                await self._show_branch()
            case "fork":
                await self._fork(message)

    async def _edit(self, message: StoredMessage) -> None:
        if message.role == "assistant":
            from w2c_tui.tui.dialogs import EditText

            def done(text: str | None) -> None:
                if text is not None and text != message.text:
                    self.run_worker(self._edited(message, text))

            self.app.push_screen(EditText("Edit the answer", message.text), done)
            return
        self.keep()
        self._leave_draft()
        self._editing = message
        images = self._pictures_of(message)
        self._numbers = dict(enumerate(images, 1))
        self._fill(" ".join([*map(token, self._numbers), message.text]))
        self.prompt.border_title = "Edit: Enter sends it as another version, Esc leaves it"
        self._take_draft()
        self.prompt.focus()

    async def _edited(self, message: StoredMessage, text: str) -> None:
        changed = self.app.store.edit(message.id, Message(message.role, text))
        await self._show_branch(at=changed.id)

    def _pictures_of(self, message: StoredMessage) -> list[Attachment]:
        return [
            Attachment(self.app.store.image(item.sha256), **msgspec.structs.asdict(item))
            for item in message.attachments
        ]

    async def _edit_outside(self, message: StoredMessage) -> None:
        from w2c_tui.core.artifact import best_page
        from w2c_tui.tui.editor import edit

        page = best_page(message.text)
        text = edit(self.app, message.text, ".html" if page else ".md")
        if text is not None and text != message.text:
            if message.role == "assistant":
                await self._edited(message, text)
            else:
                await self._edit(message)
                self._fill(" ".join([*map(token, self._numbers), text]))

    @guarded
    async def action_editor(self) -> None:
        from w2c_tui.tui.editor import edit

        text = edit(self.app, self.prompt.text, ".md")
        if text is not None:
            self._fill(text.rstrip("\n"))

    async def _delete(self, message: StoredMessage) -> None:
        answer = self._answer_in(self.session)
        if answer is not None:
            self.notify("Esc stops the answer first.", timeout=3)
            return
        self.app.store.delete_message(message.id)
        self._undo.append(("message", message.id))
        await self._show_branch(keep=True)
        self.notify("Deleted, with all below it. Alt+Z brings it back.", timeout=8)
        views = self.transcript.views
        (views[-1] if views else self.prompt).focus()

    @guarded
    async def action_undo(self) -> None:
        if not self._undo:
            self.notify("There is nothing to bring back.", timeout=3)
            return
        kind, ident = self._undo.pop()
        if kind == "session":
            self.app.store.restore_session(str(ident))
            await self.open_session(str(ident))
            self._refresh_sidebar()
        else:
            message_id = int(ident)
            self.app.store.restore_message(message_id)
            session_id = self.app.store.message(message_id).session_id
            if self.session is None or self.session.id != session_id:
                await self.open_session(session_id)
            else:
                await self._show_branch(at=message_id)

    async def _fork(self, message: StoredMessage) -> None:
        """A new session with everything up to `message`."""
        store = self.app.store
        old = store.session(message.session_id)
        conversation = store.conversation(message.session_id, message.id)
        models = [m.model for m in store.branch(message.session_id, message.id)]
        new = store.create_session(
            f"{old.title} (fork)",
            system_prompt=old.system_prompt,
            model=old.model,
            params={k: v for k, v in old.params.items() if k != "place"},
        )
        turns = [m for m in conversation if m.role != "system"]
        for copied, model in zip(turns, models, strict=True):
            store.add_message(new.id, copied, model=model)
        await self.open_session(new.id)
        self._refresh_sidebar()
        self.notify("A new session that goes on from here.", timeout=4)

    # ── beside the conversation ───────────────────────────────────────────────────────────────

    async def _toggle(self, name: str, make: Callable[[], Widget]) -> Widget | None:
        """Show the panel of this name, or take it away; on a narrow screen it is alone."""
        if self.query(name):
            await self._take_away(name)
            return None
        if self.has_class("-narrow"):
            await self._take_away("Sidebar, SettingsPanel, PicturePane")
        panel = make()
        before = 0 if name == "Sidebar" else None
        await self.query_one("#main").mount(panel, before=before)
        self.set_class(bool(self.query("SettingsPanel, PicturePane")), "-panel")
        return panel

    async def _take_away(self, names: str) -> None:
        await self.query(names).remove()
        self.set_class(bool(self.query("SettingsPanel, PicturePane")), "-panel")
        self.prompt.focus()

    async def action_sessions(self) -> None:
        from w2c_tui.tui.sidebar import Sidebar

        sidebar = await self._toggle("Sidebar", Sidebar)
        if sidebar is not None:
            self.keep()
            self._refresh_sidebar()
            sidebar.query_one("SessionList").focus()

    def _refresh_sidebar(self) -> None:
        sidebar: Any
        for sidebar in self.query("Sidebar"):
            sidebar.tell(self.session.id if self.session else "")

    async def on_sidebar_closed(self) -> None:
        await self._take_away("Sidebar")

    async def on_settings_panel_closed(self) -> None:
        await self._take_away("SettingsPanel")

    async def on_picture_pane_closed(self) -> None:
        await self._take_away("PicturePane")

    @guarded
    async def on_sidebar_opened(self, event: Sidebar.Opened) -> None:
        await self.open_session(event.session_id, message_id=event.message_id)
        if self.has_class("-narrow"):
            await self._take_away("Sidebar")
        self._refresh_sidebar()

    @guarded
    async def on_sidebar_asked(self, event: Sidebar.Asked) -> None:
        match event.action:
            case "rename":
                self._rename(event.session_id)
            case "export":
                self._export(event.session_id)
            case "delete":
                await self._delete_session(event.session_id)

    def _rename(self, session_id: str) -> None:
        from w2c_tui.tui.dialogs import AskLine

        old = self.app.store.session(session_id).title

        @guarded
        def done(screen: ChatScreen, title: str | None) -> None:
            if title is not None and title.strip():
                screen.app.store.update_session(session_id, title=title.strip())
                if screen.session is not None and screen.session.id == session_id:
                    screen.session = screen.app.store.session(session_id)
                    screen._name_it()
                screen._refresh_sidebar()

        self.app.push_screen(AskLine("Rename the session", old), partial(done, self))

    def _export(self, session_id: str) -> None:
        from w2c_tui.tui.dialogs import AskLine
        from w2c_tui.tui.export import FORMATS, export, file_name

        session = self.app.store.session(session_id)

        def refuse(value: str) -> str:
            path = Path(value).expanduser()
            if path.suffix.lower() not in FORMATS:
                return f"End the name with {', '.join(FORMATS)}."
            return f"{path} exists already: choose another name." if path.exists() else ""

        @guarded
        def done(screen: ChatScreen, value: str | None) -> None:
            if value is not None:
                path = Path(value).expanduser().absolute()
                write_atomically(path, export(screen.app.store, session_id, path.suffix))
                screen.notify(f"Exported to {printable(str(path))}", timeout=10, markup=False)

        question = "Export to which file? .md and .html to read, .json with every branch"
        default = str(Path.cwd() / f"{file_name(session)}.md")
        self.app.push_screen(AskLine(question, default, refuse), partial(done, self))

    async def _delete_session(self, session_id: str) -> None:
        if any(a.session_id == session_id for a in self.app.answers.values()):
            self.notify("An answer is being written there: Esc stops it first.", timeout=4)
            return
        self.app.store.delete_session(session_id)
        self._undo.append(("session", session_id))
        if self.session is not None and self.session.id == session_id:
            self.session = None
            self._leave_draft()
            self._defaults()
            self._fill("")
            await self._show_branch()
        self._refresh_sidebar()
        self.notify("The session is deleted. Alt+Z brings it back.", timeout=8)

    async def action_settings(self) -> None:
        from w2c_tui.tui.settings_panel import SettingsPanel

        panel = await self._toggle("SettingsPanel", SettingsPanel)
        if isinstance(panel, SettingsPanel):
            panel.show(self._params, self._system, self._ocr)
            panel.query_one("#system").focus()

    def on_settings_panel_changed(self, event: SettingsPanel.Changed) -> None:
        self._params, self._system, self._ocr = event.params, event.system, event.ocr
        if self.session is not None:
            self.app.store.update_session(
                self.session.id, system_prompt=self._system, params=self._saved_params()
            )
            self.session = self.app.store.session(self.session.id)
        self._read_texts()

    def action_model(self) -> None:
        from w2c_tui.tui.model_screen import ModelScreen

        self.app.push_screen(ModelScreen())

    def action_attach(self) -> None:
        from w2c_tui.tui.dialogs import PickPicture

        def done(reference: str | None) -> None:
            if reference is not None:
                self._folder = Path(reference).expanduser().parent
                self.attach(reference)

        self.app.push_screen(PickPicture(self._folder), done)

    # ── the picture in full ───────────────────────────────────────────────────────────────────

    def _all_pictures(self) -> list[StoredAttachment | Attachment]:
        """Those of the branch and of the draft, each once."""
        found: dict[str, StoredAttachment | Attachment] = {}
        for message in self.transcript.messages:
            found |= {image.sha256: image for image in message.attachments}
        return list((found | {image.sha256: image for image in self.draft}).values())

    async def action_pictures(self) -> None:
        pictures = self._all_pictures()
        if self.query("PicturePane"):
            await self._take_away("PicturePane")
        elif pictures:
            self.show_picture(pictures[-1])
        else:
            self.notify("There is no picture yet. Ctrl+T attaches one.", timeout=4)

    def on_picture_pane_other(self, event: PicturePane.Other) -> None:
        pictures = self._all_pictures()
        hashes = [picture.sha256 for picture in pictures]
        if self._picture in hashes:
            at = (hashes.index(self._picture) + event.step) % len(hashes)
            self.show_picture(pictures[at])

    @work(exclusive=True, group="picture")
    async def show_picture(self, picture: StoredAttachment | Attachment) -> None:
        """Open the pane with this picture."""
        from w2c_tui.tui.picture import opened
        from w2c_tui.tui.picture_pane import PicturePane

        if not self.query("PicturePane"):
            await self._toggle("PicturePane", PicturePane)
        self._picture = picture.sha256
        hashes = [known.sha256 for known in self._all_pictures()]
        counter = ""
        if len(hashes) > 1 and picture.sha256 in hashes:
            counter = f"  {hashes.index(picture.sha256) + 1} of {len(hashes)} (left, right)"
        try:
            attachment, image = await asyncio.to_thread(opened, picture, self.app.store)
        except W2CError as error:
            self.app.show_error(error)
            return
        for pane in self.query(PicturePane):
            await pane.show(attachment, image, counter)
            pane.focus()

    def on_picture_pane_text_wanted(self, event: PicturePane.TextWanted) -> None:
        if any(image.sha256 == event.image.sha256 for image in self.draft):
            self._ocr = "on"
            self._read_texts()
            self.notify("Its text is read and will be given to the model.", timeout=5)
        else:
            self.notify(
                "This message was sent. Press e on it to edit it: its text is read then.",
                timeout=8,
            )
            self._ocr = "on"

    def model_changed(self) -> None:
        self.query_one(Notice).tell()
        self.query_one(Welcome).tell()
        self._tell_status()
        if self.app.info is not None:
            self._read_texts()
            self.call_later(self._send_if_ready)
        elif self.app.model_state == "failed" and self._waiting_to_send:
            self._waiting_to_send = False
            self._hint()

    def action_example(self) -> None:
        from w2c_tui.tui.welcome import EXAMPLE

        self.attach(str(EXAMPLE))

    def action_retry(self) -> None:
        self.app.load_model()

    def _tell_status(self) -> None:
        self.query_one(StatusLine).tell(self.transcript.messages, self._params)

    def action_switch(self) -> None:
        if self._message_focused:
            self.prompt.focus()
        elif self.transcript.views:
            self.transcript.views[-1].focus()

    def action_page(self, step: int) -> None:
        transcript = self.transcript
        transcript.scroll_page_down() if step > 0 else transcript.scroll_page_up()

    def commands(self) -> Iterable[SystemCommand]:
        """What the command palette offers on this screen."""
        from w2c_tui.tui.message_view import MessageView

        last = next((m for m in reversed(self.transcript.messages) if m.role == "assistant"), None)

        def on_last(action: Action) -> Callable[[], object]:
            return lambda: self.post_message(MessageView.Asked(action, last))

        yield SystemCommand("New session", "Begin another conversation", self.action_new_session)
        yield SystemCommand("Sessions", "List and search sessions", self.action_sessions)
        yield SystemCommand("Attach a picture", "Choose a file", self.action_attach)
        yield SystemCommand(
            "Paste from the clipboard", "A picture or text", self.prompt.action_paste_picture
        )
        yield SystemCommand("Model", "Pick, load and unload a model", self.action_model)
        yield SystemCommand(
            "Settings", "System prompt, OCR and generation parameters", self.action_settings
        )
        yield SystemCommand("Show the picture", "In full, beside the text", self.action_pictures)
        yield SystemCommand("Edit the prompt outside", "In $EDITOR", self.action_editor)
        yield SystemCommand("Undo delete", "Bring back what was deleted last", self.action_undo)
        yield SystemCommand("Example", "Attach the example screenshot", self.action_example)
        if self._answer_in(self.session) is not None:
            yield SystemCommand("Stop", "Stop the answer and keep what came", self.action_stop)
        if last is not None:
            yield SystemCommand("Regenerate", "Another answer", self.action_regenerate)
            yield SystemCommand("Copy answer", "The last one, raw", on_last("copy"))
            yield SystemCommand("Copy page", "Only the code of the last page", on_last("copy_page"))
            if last.status != "complete":
                yield SystemCommand("Continue", "Write on at the end", on_last("continue"))
        if self.session is not None:
            ident = self.session.id
            yield SystemCommand("Rename session", "Give it a title", lambda: self._rename(ident))
            yield SystemCommand(
                "Export session", "Markdown, JSON or HTML", lambda: self._export(ident)
            )
            yield SystemCommand(
                "Delete session",
                "Alt+Z brings it back",
                lambda: self.run_worker(self._delete_session(ident)),
            )


def _title(message: Message) -> str:
    if message.text == PAGE_PROMPT and message.attachments:
        return message.attachments[0].name
    line = " ".join(message.text.split())
    return line if len(line) <= 60 else line[:57] + "…"


def _is_remote() -> bool:
    import os

    return "SSH_CONNECTION" in os.environ
