"""The pane with a picture in full, and the picture as the model will see it.

Owns which of the pictures at hand is shown, and what is said about it, the warning about text that
is too small included. Knows nothing about sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Button, Static

from w2c_tui.backends.base import ModelInfo
from w2c_tui.core.conversation import Attachment
from w2c_tui.core.errors import W2CError
from w2c_tui.core.page_layout import described
from w2c_tui.core.printable import printable
from w2c_tui.core.store import StoredAttachment
from w2c_tui.tui.picture import opened, picture_widget

if TYPE_CHECKING:
    from PIL import Image

    from w2c_tui.tui.app import W2CApp

AnyPicture = StoredAttachment | Attachment

BODY_TEXT_PX = 16
"""How high text usually is on a page, where nothing was measured."""
READABLE_PX = 6
"""Below this nobody reads a line of text (`core.image.scale_of`)."""


def text_height(image: Attachment, info: ModelInfo) -> float | None:
    """How many pixels high usual text of `image` is for the model's encoder; None if unknown."""
    from w2c_tui.core.image import scale_of

    if info.image_spec is None:
        return None
    lines = [line.box[3] - line.box[1] for line in image.page_text or () if line.text]
    height = median(lines) if lines else BODY_TEXT_PX
    return height * scale_of((image.width, image.height), info.image_spec)


def warning(image: Attachment, info: ModelInfo | None) -> str:
    """What to say when the model will not be able to read the page's text, else nothing."""
    if info is None or not info.reads_images:
        return ""
    height = text_height(image, info)
    read = any(line.text for line in image.page_text or ())
    if height is None or height >= READABLE_PX or read:
        return ""
    return f"Text is about {height:.0f} px high for this model: too small to read."


class PicturePane(Vertical):
    """One picture, in a place that does not scroll."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Close", show=False),
        Binding("m", "eye", "Model's eye", id="model-eye"),
        Binding("t", "text", "Read its text", id="read-text"),
        Binding("left", "other(-1)", "Previous", show=False),
        Binding("right", "other(1)", "Next", show=False),
    ]

    app: W2CApp
    can_focus = True

    class Closed(Message):
        """The user is done with it."""

    class TextWanted(Message):
        """The text on the picture should be given to the model."""

        def __init__(self, image: Attachment) -> None:
            super().__init__()
            self.image = image

    def __init__(self, pictures: Callable[[], list[AnyPicture]]) -> None:
        super().__init__(id="picture")
        self._pictures = pictures
        self._shown = ""
        self._attachment: Attachment | None = None
        self._image: Image.Image | None = None
        self._as_model = False
        self._counter = ""

    def compose(self) -> ComposeResult:
        yield Static(markup=False, id="picture-name")
        yield Container(id="picture-frame")
        yield Static(markup=False, id="picture-note")
        with Horizontal(id="picture-buttons"):
            yield Button("Model's eye (m)", id="eye", compact=True)
            yield Button("Read its text (t)", id="read", compact=True)
            yield Button("Close", id="close-picture", compact=True)

    @work(exclusive=True)
    async def show(self, picture: AnyPicture) -> None:
        """Open `picture` and show it."""
        self._shown = picture.sha256
        hashes = [known.sha256 for known in self._pictures()]
        self._counter = ""
        if len(hashes) > 1 and picture.sha256 in hashes:
            at = hashes.index(picture.sha256)
            self._counter = f"  {at + 1} of {len(hashes)} (left, right)"
        try:
            found = await asyncio.to_thread(opened, picture, self.app.store)
        except W2CError as error:
            self.app.show_error(error)
            return
        self._attachment, self._image = found
        await self.draw()
        self.focus()

    async def draw(self) -> None:
        """Draw what is set, in the way that is set."""
        attachment, image = self._attachment, self._image
        if attachment is None or image is None:
            return
        frame = self.query_one("#picture-frame", Container)
        info = self.app.info
        size = f"{attachment.width} x {attachment.height} px"
        name = f"{printable(attachment.name)}  {size}{self._counter}"
        note = warning(attachment, info)
        content: Container | VerticalScroll | None = None
        shown = image
        if self._as_model:
            name, note = f"{name}\nAs the model sees it", ""
            if info is None:
                note = "Load a model to see with its eye."
            elif not info.reads_images:
                content = self._as_text(attachment)
            elif info.image_spec is None:
                note = "This model prepares pictures in its own way, which is not known here."
            else:
                from w2c_tui.core.image import prepare

                try:
                    shown = prepare(image, info.image_spec)
                    note = f"{info.image_spec.size} x {info.image_spec.size} px. " + warning(
                        attachment, info
                    )
                except W2CError as error:
                    note = str(error)
        await frame.remove_children()
        await frame.mount(content or picture_widget(shown, self.app.protocol))
        self.query_one("#picture-name", Static).update(name)
        self.query_one("#picture-note", Static).update(note)
        label = "Picture (m)" if self._as_model else "Model's eye (m)"
        self.query_one("#eye", Button).label = label
        read = attachment.page_text is not None
        self.query_one("#read", Button).display = not read

    def _as_text(self, attachment: Attachment) -> VerticalScroll:
        lines = attachment.page_text
        if lines is None:
            text = "This model reads text only, and the text of this picture was not read yet."
        elif not lines:
            text = "No text was found on this picture, so this model learns nothing about it."
        else:
            text = described(lines, (attachment.width, attachment.height))
        return VerticalScroll(Static(printable(text), markup=False), can_focus=False)

    @on(Button.Pressed, "#eye")
    async def action_eye(self) -> None:
        self._as_model = not self._as_model
        await self.draw()

    @on(Button.Pressed, "#read")
    def action_text(self) -> None:
        if self._attachment is not None and self._attachment.page_text is None:
            self.post_message(self.TextWanted(self._attachment))

    @on(Button.Pressed, "#close-picture")
    def action_leave(self) -> None:
        self.post_message(self.Closed())

    def action_other(self, step: int) -> None:
        pictures = self._pictures()
        hashes = [picture.sha256 for picture in pictures]
        if self._shown in hashes:
            self.show(pictures[(hashes.index(self._shown) + step) % len(hashes)])
