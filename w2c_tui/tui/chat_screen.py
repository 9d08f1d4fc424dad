"""The main screen: the conversation, the prompt under it, and what stands beside them.

Owns the layout, what the keys do, and moving from session to session without losing a draft. What
the parts do is theirs: `branch_view`, `composer`, `panes`, `open_session`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import Screen
from textual.widgets import Static, TextArea

from w2c_tui.backends.base import Prefill
from w2c_tui.core.config import GenerationParams
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import W2CError
from w2c_tui.core.printable import printable
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.core.store import Session, StoredMessage
from w2c_tui.tui.answer import Answer
from w2c_tui.tui.app import W2CApp, guarded
from w2c_tui.tui.branch_view import BranchView
from w2c_tui.tui.composer import Composer
from w2c_tui.tui.key_line import KeyLine
from w2c_tui.tui.open_session import OpenSession
from w2c_tui.tui.page_work import PageWork
from w2c_tui.tui.panes import Panes
from w2c_tui.tui.prompt_box import PromptBox
from w2c_tui.tui.status_line import Notice, StatusLine
from w2c_tui.tui.transcript import Transcript
from w2c_tui.tui.welcome import Welcome

if TYPE_CHECKING:
    from w2c_tui.core.iteration import Iteration
    from w2c_tui.tui.better_run import BetterRun
    from w2c_tui.tui.message_view import Action
    from w2c_tui.tui.picture_pane import AnyPicture, PicturePane
    from w2c_tui.tui.settings_panel import SettingsPanel
    from w2c_tui.tui.sidebar import Sidebar


class ChatScreen(Screen[None]):
    """See the module."""

    AUTO_FOCUS = "PromptBox"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", id="stop"),
        Binding("escape", "back", show=False, id="back"),
        Binding("ctrl+n", "new_session", "New", id="new-session"),
        Binding("ctrl+b", "sessions", "Sessions", id="sessions"),
        Binding("ctrl+o", "model", "Model", id="model"),
        Binding("ctrl+t", "attach", "Attach", id="attach"),
        Binding("f2", "settings", "Settings", id="settings"),
        Binding("f3", "pictures", "View", id="picture"),
        Binding("ctrl+r", "regenerate", "Regenerate", id="regenerate", show=False),
        Binding("ctrl+g", "editor", "Editor", id="editor", show=False),
        Binding("alt+z", "undo", "Undo delete", id="undo", show=False),
        Binding("f5", "example", "Example", id="example", show=False),
        Binding("f4", "compare", "Compare", id="compare"),
        Binding("f7", "preview", "Browser", id="preview", show=False, priority=True),
        Binding("f8", "fix", "Fix what differs", id="fix", show=False),
        Binding("f9", "better", "Better page", id="better", show=False),
        Binding("alt+i", "iteration", "Whole conversation / latest page", show=False, id="given"),
        Binding("f6", "switch", "Messages / prompt", id="switch", show=False, priority=True),
        Binding("pageup", "page(-1)", "Page up", show=False, id="page-up"),
        Binding("pagedown", "page(1)", "Page down", show=False, id="page-down"),
    ]

    app: W2CApp

    def __init__(
        self, place: OpenSession, images: Sequence[str], session: str | None, new: bool
    ) -> None:
        super().__init__()
        self.place = place
        self._images_at_start = list(images)
        self._session_at_start = session
        self._new_at_start = new or bool(images)
        self._undo: list[tuple[str, int | str]] = []
        self._folder = Path.cwd()
        self._read_already: object = None
        """The draft that the model has read ahead, or is at."""
        self._tries: tuple[int, int] | None = None
        """How many of which kind, when the draft is to become several pages."""

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        with Panes(id="main"), Vertical(id="center"):
            yield BranchView(self.place)
            yield Notice()
            yield PageWork(self.place)
            yield Composer(self.place)
        yield StatusLine()
        yield KeyLine()

    def on_mount(self) -> None:
        self._saver = self.set_timer(1.0, self.keep, pause=True)
        self.call_later(self._open_at_start)

    @property
    def branch(self) -> BranchView:
        return self.query_one(BranchView)

    @property
    def composer(self) -> Composer:
        return self.query_one(Composer)

    @property
    def panes(self) -> Panes:
        return self.query_one(Panes)

    @property
    def prompt(self) -> PromptBox:
        return self.composer.prompt

    @property
    def transcript(self) -> Transcript:
        return self.branch.transcript

    @property
    def session(self) -> Session | None:
        return self.place.session

    @property
    def params(self) -> GenerationParams:
        return self.place.params

    # ── sessions ──────────────────────────────────────────────────────────────────────────────

    @guarded
    async def _open_at_start(self) -> None:
        store = self.app.store
        self.prompt.prompts = store.prompts()
        if self._session_at_start:
            await self.open_session(self._session_at_start)
        elif not self._new_at_start and (last := store.sessions()[:1]):
            await self.open_session(last[0].id)
        else:
            await self.branch.show()
        for image in self._images_at_start:
            self.composer.attach(image)

    async def open_session(self, session_id: str, *, message_id: int | None = None) -> None:
        """Show a session where it was left, or at one of its messages."""
        store = self.app.store
        store.session(session_id)
        if message_id is not None:
            store.select_branch(message_id)
        self.keep()
        session = self.place.open(session_id)
        self.composer.show(session.draft, store.draft_attachments(session_id))
        await self.branch.show(at=message_id if message_id is not None else self.place.place)
        self.prompt.focus()

    async def action_new_session(self) -> None:
        self.keep()
        await self._leave_session()
        self.prompt.focus()

    async def _leave_session(self) -> None:
        self.place.leave()
        self.composer.show()
        await self.branch.show()

    def keep(self) -> None:
        """Save the draft and the place, so that nothing is lost however this ends."""
        composer = self.composer
        if composer.editing is not None or (self.session is None and composer.empty):
            return
        try:
            self.place.begin(self.app.spec.name)
            self.place.keep(composer.prompt.text, composer.pictures, self.transcript.in_sight())
        except W2CError as error:
            self.app.show_error(error)

    @on(TextArea.Changed, "#prompt")
    def _typed(self) -> None:
        self.branch.typed()
        self._saver.reset()
        self._saver.resume()

    @on(Composer.Changed)
    def _draft_changed(self) -> None:
        self.refresh_bindings()
        if not self.composer.pictures and self._read_already is not None:
            self._read_already = None
            self.app.read_no_further()

    @on(BranchView.Shown)
    def _tell(self) -> None:
        self.page_work.look()
        self.refresh_bindings()
        title = self.session.title if self.session else ""
        self.query_one("#title", Static).update(f"w2c-tui  {printable(title) or 'New session'}")
        messages, latest = self.transcript.messages, self.place.iteration == "latest"
        self.query_one(StatusLine).tell(messages, self.params, latest_only=latest)

    # ── sending ───────────────────────────────────────────────────────────────────────────────

    @on(Composer.Readable)
    def _read_ahead(self) -> None:
        """Have the model read the pictures of the draft, if nothing else is going on."""
        app, place, earlier = self.app, self.place, self.transcript.messages
        if app.answers or app.better is not None or (earlier and earlier[-1].role == "user"):
            return
        draft, session_id, system = self.composer.draft(), place.id, place.system
        pictures = [(image.sha256, image.page_text) for image in draft.attachments]
        key = (session_id, earlier[-1].id if earlier else None, app.info, pictures)
        if key == self._read_already:
            return
        self._read_already = key

        def conversation() -> list[Message]:
            if session_id:
                return [*app.store.conversation(session_id), draft]
            return [Message("system", system), draft] if system else [draft]

        app.read_ahead(conversation, place.params, place.iteration)

    def reads_ahead(self, progress: Prefill | None) -> None:
        """The application says how far the model is with a draft."""
        self.composer.reads_ahead(progress)

    @on(PromptBox.Sent)
    def _sent(self) -> None:
        if not self.branch.busy():
            self.composer.submit()

    @on(Composer.Ready)
    @guarded
    async def _ready(self) -> None:
        if (message := self.composer.take()) is None:
            return
        tries, self._tries = self._tries, None
        if tries is not None:
            question = self._ask(message)
            await self.branch.show()
            self.page_work.begin(question.id, *tries)
        else:
            await self._send(message)

    async def _send(self, message: Message, *, own: bool = True) -> None:
        """Ask and have it answered; the draft stays when the message is not from there."""
        shown = bool(self.transcript.messages)
        edits = self.composer.editing is not None and own
        stored = self._ask(message, own=own)
        place = self.place
        answer = self.app.begin_answer(
            stored.session_id, place.params, place.iteration, parent=stored.id
        )
        if edits or len(stored.siblings) > 1 or not shown:
            await self.branch.show()
        else:
            await self.branch.append([stored, self.app.store.message(answer.message_id)])

    def _ask(self, message: Message, *, own: bool = True) -> StoredMessage:
        """The message as it is stored, and the draft gone."""
        store, composer = self.app.store, self.composer
        session = self.place.begin(self.app.spec.name)
        if not session.title:
            store.update_session(session.id, title=_title(message))
        shown = self.transcript.messages
        before = composer.editing if own else None
        if before is None and shown and shown[-1].role == "user":
            # Its answer was deleted; two questions in a row have no meaning for a model.
            before = shown[-1]
        if before is not None:
            stored = store.edit(before.id, message)
        else:
            stored = store.add_message(session.id, message)
        if own:
            store.set_draft(session.id, "", [])
            if message.text != PAGE_PROMPT:
                earlier = (text for text in self.prompt.prompts if text != message.text)
                self.prompt.prompts = [message.text, *earlier]
            composer.show()
        return stored

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if not self.is_mounted:
            return True
        if action == "stop":
            busy = self.branch.answer is not None or self.app.better is not None
            return self.composer.waiting or busy
        if action == "compare":
            return self.page_work.has_pages
        if action == "pictures":
            return bool(self._pictures() or self.query("PicturePane"))
        return True

    @guarded
    def action_stop(self) -> None:
        if self.composer.waiting:
            self._tries = None
            self.composer.withdraw()
            return
        run, answer = self.app.better, self.branch.answer
        if run is not None and (answer is None or run.has(answer)):
            run.cancel()
        elif answer is not None:
            answer.cancel()

    def action_back(self) -> None:
        """Leave what was begun; else to the prompt."""
        if self.composer.editing is not None:
            self.composer.show()
        else:
            self.prompt.focus()

    @guarded
    async def action_regenerate(self) -> None:
        await self.branch.regenerate()

    @on(BranchView.EditWanted)
    def _edit(self, event: BranchView.EditWanted) -> None:
        self.keep()
        self.composer.edit(event.message, event.text, event.pictures)

    @guarded
    async def action_editor(self) -> None:
        from w2c_tui.tui.editor import edit

        text = edit(self.app, self.prompt.text, ".md")
        if text is not None:
            self.composer.fill(text.rstrip("\n"))

    # ── what happened elsewhere ───────────────────────────────────────────────────────────────

    async def answer_over(self, answer: Answer) -> None:
        """The application says that an answer ended."""
        await self.branch.answer_over(answer)
        self.page_work.tell()
        # The context holds this answer by now.
        self._read_already = None
        self.composer.offer()
        panel: Any
        for panel in self.query("SettingsPanel"):
            panel.tell(self._costs())

    def text_read(self, image: Attachment, error: W2CError | None) -> None:
        """The application says that text recognition ended."""
        self.composer.text_read(image, error)

    def model_changed(self) -> None:
        """The application says that the model is another one, or further."""
        self.query_one(Notice).tell()
        self.query_one(Welcome).tell()
        self._tell()
        self.composer.model_changed()

    # ── pages ─────────────────────────────────────────────────────────────────────────────────

    @property
    def page_work(self) -> PageWork:
        return self.query_one(PageWork)

    def action_compare(self) -> None:
        self.page_work.compare()

    def action_preview(self) -> None:
        self.page_work.preview()

    def action_fix(self) -> None:
        if not self.branch.busy():
            self.page_work.fix()

    def action_better(self) -> None:
        """Several candidates and corrections, of which the nearest to the screenshot stays."""
        from w2c_tui.tui.dialogs import AskTries

        if self.branch.busy() or self.app.better is not None:
            return
        if self.composer.empty and not self.transcript.messages:
            self.notify("Attach a screenshot first: F5 takes the example.", timeout=4)
            return

        def done(tries: tuple[int, int] | None) -> None:
            if tries is None:
                return
            if not self.composer.empty:
                self._tries = tries
                self.composer.submit()
                return
            asked = [m.id for m in self.transcript.messages if m.role == "user"]
            self.page_work.begin(asked[-1], *tries)

        self.app.push_screen(AskTries(), done)

    @on(PageWork.Changed)
    @guarded
    async def _pages_changed(self) -> None:
        await self.branch.show(keep=True)

    @on(PageWork.Request)
    @guarded
    async def _requested(self, event: PageWork.Request) -> None:
        """What differs is known: ask for it to be corrected, below the page it is about."""
        if self.place.id != event.session_id or self.branch.busy():
            return
        if event.answer_id is not None:
            self.app.store.go_back_to(event.answer_id)
            await self.branch.show(keep=True)
        await self._send(event.message, own=False)

    async def try_began(self, answer: Answer) -> None:
        """The application says that one of several tries begins."""
        if answer.session_id == self.place.id:
            await self.branch.show(keep=True)
        self.page_work.tell()

    async def better_over(self, run: BetterRun) -> None:
        """The application says that there will be no more tries."""
        if self.app.store.message(run.question_id).session_id == self.place.id:
            await self.branch.show(keep=True)
        self.page_work.over(run)

    def _costs(self) -> str:
        from w2c_tui.core.context_cost import Meter

        session = self.session
        messages = self.app.store.branch(session.id) if session else []
        return str(Meter(messages))

    @guarded
    def action_iteration(self) -> None:
        """Switch between the whole conversation and the latest page alone."""
        place = self.place
        other: Iteration = "latest" if place.iteration == "history" else "history"
        place.choose(place.params, place.system, place.ocr, other)
        names = {"history": "the whole conversation", "latest": "the latest page only"}
        self.notify(f"The model is given {names[other]}. {self._costs()}", timeout=8)
        self._tell()

    # ── undo ──────────────────────────────────────────────────────────────────────────────────

    @on(BranchView.Deleted)
    def _message_deleted(self, event: BranchView.Deleted) -> None:
        self._undo.append(("message", event.message_id))

    async def _delete_session(self, session_id: str) -> None:
        if any(a.session_id == session_id for a in self.app.answers.values()):
            self.notify("An answer is being written there: Esc stops it first.", timeout=4)
            return
        self.app.store.delete_session(session_id)
        self._undo.append(("session", session_id))
        if self.place.id == session_id:
            await self._leave_session()
        self._refresh_sidebar()
        self.notify("The session is deleted. Alt+Z brings it back.", timeout=8)

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
            if self.place.id != session_id:
                await self.open_session(session_id)
            else:
                await self.branch.show(at=message_id)

    # ── the list of sessions ──────────────────────────────────────────────────────────────────

    @on(Panes.Left)
    def _panel_left(self) -> None:
        self.prompt.focus()

    async def action_sessions(self) -> None:
        from w2c_tui.tui.sidebar import Sidebar

        sidebar = await self.panes.toggle("Sidebar", Sidebar)
        if sidebar is not None:
            self.keep()
            self._refresh_sidebar()
            sidebar.query_one("SessionList").focus()

    def _refresh_sidebar(self) -> None:
        sidebar: Any
        for sidebar in self.query("Sidebar"):
            sidebar.tell(self.place.id)

    @guarded
    async def on_sidebar_opened(self, event: Sidebar.Opened) -> None:
        await self.open_session(event.session_id, message_id=event.message_id)
        if self.has_class("-narrow"):
            await self.panes.take_away("Sidebar")
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

    @on(BranchView.Forked)
    @guarded
    async def _forked(self, event: BranchView.Forked) -> None:
        await self.open_session(event.session_id)
        self._refresh_sidebar()
        self.notify("A new session that goes on from here.", timeout=4)

    def _rename(self, session_id: str) -> None:
        from w2c_tui.tui.session_dialogs import rename

        def renamed() -> None:
            self.place.refresh()
            self._tell()
            self._refresh_sidebar()

        rename(self.app, session_id, renamed)

    def _export(self, session_id: str) -> None:
        from w2c_tui.tui.session_dialogs import export_to_file

        export_to_file(self.app, session_id)

    # ── settings and model ────────────────────────────────────────────────────────────────────

    async def action_settings(self) -> None:
        from w2c_tui.tui.settings_panel import SettingsPanel

        panel = await self.panes.toggle("SettingsPanel", SettingsPanel)
        if panel is not None:
            place = self.place
            panel.show(place.params, place.system, place.ocr, place.iteration, self._costs())
            panel.query_one("#system").focus()

    @guarded
    def on_settings_panel_changed(self, event: SettingsPanel.Changed) -> None:
        self.place.choose(event.params, event.system, event.ocr, event.iteration)
        self.composer.read_texts()

    def action_model(self) -> None:
        from w2c_tui.tui.model_screen import ModelScreen

        self.app.push_screen(ModelScreen())

    def action_retry(self) -> None:
        self.app.load_model()

    # ── pictures ──────────────────────────────────────────────────────────────────────────────

    def action_attach(self) -> None:
        from w2c_tui.tui.dialogs import PickPicture

        def done(reference: str | None) -> None:
            if reference is not None:
                self._folder = Path(reference).expanduser().parent
                self.composer.attach(reference)

        self.app.push_screen(PickPicture(self._folder), done)

    def action_example(self) -> None:
        from w2c_tui.tui.welcome import EXAMPLE

        self.composer.attach(str(EXAMPLE))

    def _pictures(self) -> list[AnyPicture]:
        """Those of the branch and of the draft, each once."""
        found: dict[str, AnyPicture] = {}
        for message in self.transcript.messages:
            found |= {image.sha256: image for image in message.attachments}
        return list((found | {image.sha256: image for image in self.composer.pictures}).values())

    async def action_pictures(self) -> None:
        if self.query("PicturePane"):
            await self.panes.take_away("PicturePane")
        else:
            await self.show_picture(self._pictures()[-1])

    @on(BranchView.PictureAsked)
    async def _picture_asked(self, event: BranchView.PictureAsked) -> None:
        await self.show_picture(event.picture)

    async def show_picture(self, picture: AnyPicture) -> None:
        """Open the pane with this picture."""
        from w2c_tui.tui.picture_pane import PicturePane

        for pane in self.query(PicturePane):
            pane.show(picture)
            return
        pane = await self.panes.open("PicturePane", lambda: PicturePane(self._pictures))
        pane.show(picture)

    def on_picture_pane_text_wanted(self, event: PicturePane.TextWanted) -> None:
        self.place.ocr = "on"
        if any(image.sha256 == event.image.sha256 for image in self.composer.pictures):
            self.composer.read_texts()
            self.notify("Its text is read and will be given to the model.", timeout=5)
        else:
            self.notify(
                "This message was sent. Press e on it to edit it: its text is read then.",
                timeout=8,
            )

    # ── moving ────────────────────────────────────────────────────────────────────────────────

    def action_switch(self) -> None:
        if self.branch.message_focused:
            self.prompt.focus()
        elif self.transcript.views:
            self.transcript.views[-1].focus()

    @on(Transcript.Left)
    def _transcript_left(self) -> None:
        self.prompt.focus()

    def action_page(self, step: int) -> None:
        # Without animation, which would go on to a place that moved when earlier messages came in.
        transcript = self.transcript
        scroll = transcript.scroll_page_down if step > 0 else transcript.scroll_page_up
        scroll(animate=False)

    # ── the command palette ───────────────────────────────────────────────────────────────────

    def commands(self) -> Iterable[SystemCommand]:
        """What the command palette offers on this screen."""
        from w2c_tui.tui.message_view import MessageView

        last = next((m for m in reversed(self.transcript.messages) if m.role == "assistant"), None)

        def on_last(action: Action) -> Callable[[], object]:
            return lambda: self.branch.post_message(MessageView.Asked(action, last))

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
        if self._pictures():
            yield SystemCommand("Show the picture", "In full, beside it", self.action_pictures)
        yield SystemCommand("Edit the prompt outside", "In $EDITOR", self.action_editor)
        yield SystemCommand(
            "Open in the browser", "A live preview of this session", self.action_preview
        )
        yield SystemCommand(
            "Better page", "Several tries; the nearest one stays", self.action_better
        )
        yield SystemCommand(
            "Iteration", "Give the model everything, or the latest page", self.action_iteration
        )
        if self.page_work.has_pages:
            yield SystemCommand(
                "Compare", "Versions beside the screenshot, with scores", self.action_compare
            )
            yield SystemCommand(
                "Fix what differs", "Ask for a page nearer to the screenshot", self.action_fix
            )
        yield SystemCommand("Undo delete", "Bring back what was deleted last", self.action_undo)
        yield SystemCommand("Example", "Attach the example screenshot", self.action_example)
        if self.branch.answer is not None:
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
