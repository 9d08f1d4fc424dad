"""Where the next message is made: the prompt box, the pictures in it, and a line about both.

Owns the draft: which pictures are attached, whether their text has been read, when the model can
begin to read it, and when it can be sent. Knows nothing about what was said before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import msgspec
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message as Event
from textual.widgets import Static, TextArea

from w2c_tui.backends.base import Prefill
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import ImageError, W2CError
from w2c_tui.core.printable import printable
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.core.store import StoredMessage
from w2c_tui.tui.app import W2CApp, guarded
from w2c_tui.tui.open_session import OpenSession
from w2c_tui.tui.prompt_box import (
    PromptBox,
    pasted_references,
    token,
    tokens_in,
    without_outer_tokens,
)


class Composer(Vertical):
    """See the module."""

    app: W2CApp

    class Ready(Event):
        """What was to be sent can be: `take` has it."""

    class Readable(Event):
        """There are pictures, and all that the model will be told about them is known: it could
        read them while the user types."""

    class Changed(Event):
        """There are other pictures, or something waits to be sent or no longer does."""

    def __init__(self, place: OpenSession) -> None:
        super().__init__(id="composer")
        self._place = place
        self.pictures: list[Attachment] = []
        """Those whose token is in the text, in the text's order."""
        self.editing: StoredMessage | None = None
        """The message of which the draft will be another version."""
        self._numbers: dict[int, Attachment] = {}
        self._reading: set[str] = set()
        self._prefill: Prefill | None = None
        self._waiting = False
        self._told: tuple[bool, list[str]] = (False, [])

    def compose(self) -> ComposeResult:
        yield Static(id="hint", markup=False)
        yield PromptBox(id="prompt", placeholder="Paste or drop a screenshot, or type; Enter sends")

    def on_mount(self) -> None:
        self._name_it()

    @property
    def prompt(self) -> PromptBox:
        return self.query_one(PromptBox)

    def _name_it(self) -> None:
        title = "Edit: Enter sends it as another version, Esc leaves it"
        self.prompt.border_title = title if self.editing else "Prompt"

    # ── the draft ─────────────────────────────────────────────────────────────────────────────

    def show(self, text: str = "", pictures: Sequence[Attachment] = ()) -> None:
        """Another draft."""
        self.editing, self._waiting = None, False
        self.pictures = list(pictures)
        self._numbers = dict(enumerate(pictures, 1))
        self.fill(text)
        self._name_it()
        self.read_texts()

    def edit(self, message: StoredMessage, text: str, pictures: Sequence[Attachment]) -> None:
        """The draft is to become another version of `message`."""
        tokens = [token(number) for number in range(1, len(pictures) + 1)]
        self.show(" ".join([*tokens, text]), pictures)
        self.editing = message
        self._name_it()
        self.prompt.focus()

    def fill(self, text: str) -> None:
        """Other words; pictures stay as far as their token does."""
        self.prompt.text = text
        self.prompt.move_cursor(self.prompt.document.end)
        self.hint()

    @property
    def empty(self) -> bool:
        return not self.prompt.text.strip() and not self.pictures

    @on(TextArea.Changed, "#prompt")
    def _take_pictures(self) -> None:
        numbers = [n for n in tokens_in(self.prompt.text) if n in self._numbers]
        pictures = [self._numbers[number] for number in numbers]
        if pictures != self.pictures:
            self.pictures = pictures
            self.hint()

    def submit(self) -> None:
        """The user is done writing. `Ready` follows, when the model is known and texts are read."""
        text = self.prompt.text.strip()
        if self.empty:
            return
        if references := pasted_references(text):
            # A path that was typed by hand is a picture, too.
            self.prompt.text = ""
            for reference in references:
                self.attach(reference)
            return
        self._waiting = True
        self.proceed()

    def take(self) -> Message | None:
        """What is to be sent, once."""
        if not self._waiting:
            return None
        self._waiting = False
        return self.draft()

    def draft(self) -> Message:
        """What would be sent now."""
        text = without_outer_tokens(self.prompt.text, self._numbers).strip() or PAGE_PROMPT
        return Message("user", text, tuple(self.pictures))

    @property
    def waiting(self) -> bool:
        """Whether something will be sent as soon as it can be."""
        return self._waiting

    def withdraw(self) -> None:
        """Do not send what waits."""
        self._waiting = False
        self.hint()

    @guarded
    def proceed(self) -> None:
        """Say that the draft is ready, once the model is known and the pictures' text was read."""
        if not self._waiting:
            return
        wanted = [self.app.wants_text(image, self._place.ocr) for image in self.pictures]
        if None in wanted and self.app.model_state in ("none", "failed"):
            self.app.load_model()
        if any(value is None or value for value in wanted):
            self.read_texts()
        else:
            self.post_message(self.Ready())

    def hint(self, text: str = "") -> None:
        """One line above the prompt about what is going on with it."""
        if not text and self._reading:
            names = ", ".join(i.name for i in self.pictures if i.sha256 in self._reading)
            text = f"Reading the text on {printable(names) or 'a picture'} …"
        if not text and self._prefill is not None and not self._waiting:
            share = self._prefill.done / max(self._prefill.total, 1)
            text = f"The model reads it ahead … {share:.0%}"
        if self._waiting:
            text = f"{text or 'Waiting for the model.'} Will be sent then; Esc takes it back."
        if not text and self.pictures:
            from w2c_tui.tui.picture_pane import warning

            texts = filter(None, (warning(image, self.app.info) for image in self.pictures))
            text = next((f"{t} F3, then t has it read." for t in texts), "")
        hint = self.query_one("#hint", Static)
        hint.update(text)
        hint.display = bool(text)
        state = (self._waiting, [image.sha256 for image in self.pictures])
        if state != self._told:
            self._told = state
            self.post_message(self.Changed())

    def model_changed(self) -> None:
        """What the draft waits for may have come, or never will."""
        if self.app.info is not None:
            self.read_texts()
            self.call_later(self.proceed)
        elif self.app.model_state == "failed":
            self.withdraw()

    # ── pictures ──────────────────────────────────────────────────────────────────────────────

    @on(PromptBox.PictureNamed)
    def _pictures_named(self, event: PromptBox.PictureNamed) -> None:
        for reference in event.references:
            self.attach(reference)

    @on(PromptBox.PicturePasted)
    def _picture_pasted(self) -> None:
        self.hint("Reading the clipboard …")
        self._open_clipboard()

    def attach(self, reference: str) -> None:
        """Attach the picture at a path or address, in the background."""
        self.hint(f"Opening {printable(reference)} …")
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
        self.hint()
        self.app.show_error(error)

    def _paste_text(self, error: W2CError) -> None:
        """The clipboard holds no picture: paste its text, or say why nothing happens."""
        self.hint()
        text = self.app.clipboard
        if not text and "SSH_CONNECTION" not in os.environ:
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
        self._take_pictures()
        self.read_texts()
        self.prompt.focus()

    def read_texts(self) -> None:
        """Have the text read on those pictures whose model cannot see it."""
        for image in self.pictures:
            if self.app.wants_text(image, self._place.ocr) and image.sha256 not in self._reading:
                self._reading.add(image.sha256)
                self.app.read_text(image)
        self.hint()
        self.offer()

    def offer(self) -> None:
        """Say that the model could begin to read, if it can."""
        wanted = [self.app.wants_text(image, self._place.ocr) for image in self.pictures]
        known = self.app.info is not None and not self._waiting and self.editing is None
        if known and wanted and not any(value is None or value for value in wanted):
            self.post_message(self.Readable())

    def reads_ahead(self, progress: Prefill | None) -> None:
        """How far the model is with it; None when it is not at it any more."""
        self._prefill = progress
        self.hint()

    def text_read(self, image: Attachment, error: W2CError | None) -> None:
        """`image` is back with its text, or without."""
        self._reading.discard(image.sha256)
        if error is not None:
            self._waiting = False
            self.app.show_error(error)
        for number, known in self._numbers.items():
            if known.sha256 == image.sha256 and image.page_text is not None:
                self._numbers[number] = msgspec.structs.replace(known, page_text=image.page_text)
        self._take_pictures()
        self.hint()
        self.proceed()
        self.offer()
