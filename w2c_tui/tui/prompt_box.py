"""The box in which prompts are typed.

Owns the text, its `[Image #1]` tokens, which are one piece each, the history, and telling a pasted
picture from pasted text. Knows nothing about what happens with a prompt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets.text_area import Selection

from w2c_tui.core.errors import ImageError
from w2c_tui.core.reference import split_references
from w2c_tui.tui.text_area import WrappedArea

_token = re.compile(r"\[Image #(\d+)\]")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def token(number: int) -> str:
    """What stands in the text for the picture of this number, counted from 1."""
    return f"[Image #{number}]"


def tokens_in(text: str) -> list[int]:
    return list(dict.fromkeys(int(found[1]) for found in _token.finditer(text)))


def without_outer_tokens(text: str, numbers: Collection[int]) -> str:
    """`text` as a message: tokens before it only say what is attached and go, and so do those
    behind it when there are no others. All else is part of a sentence; so is what only looks like
    a token, because no picture has its number."""
    if not numbers:
        return text
    tokens = "|".join(re.escape(token(number)) for number in numbers)
    words = re.sub(rf"^(?:\s*(?:{tokens}))+[ \t]*\n?", "", text)
    shorter = re.sub(rf"(?:\s*(?:{tokens}))+\s*$", "", words)
    return shorter if words == text and not re.search(tokens, shorter) else words.rstrip()


def pasted_references(text: str) -> list[str]:
    """The pictures that a paste names: paths that exist, and addresses of pictures. Text that
    merely mentions a path is not taken for one."""
    if len(text) > 10_000 or not text.strip():
        return []
    try:
        references = split_references(text)
    except ImageError:
        return []
    for reference in references:
        is_url = re.match(r"https?://\S+$", reference, re.I) is not None
        path = reference.split("?")[0] if is_url else reference
        if not path.lower().endswith(_SUFFIXES) or not (is_url or os.path.isfile(reference)):
            return []
    return references


class PromptBox(WrappedArea):
    """A text area that grows with its text, sends on Enter and treats pictures as one piece."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send", id="send", priority=True, show=False),
        Binding("shift+enter,ctrl+j,alt+enter", "newline", "New line", id="newline", show=False),
        Binding("ctrl+v,super+v", "paste_picture", "Paste", id="paste", show=False),
        Binding("alt+v", "paste_picture", "Paste picture", id="paste-again", show=False),
        Binding("pageup", "screen.page(-1)", show=False),
        Binding("pagedown", "screen.page(1)", show=False),
        Binding("up", "up_or_earlier", show=False),
        Binding("down", "down_or_later", show=False),
        Binding("ctrl+up", "earlier", "Earlier prompt", id="history-earlier", show=False),
        Binding("ctrl+down", "later", "Later prompt", id="history-later", show=False),
    ]

    class Sent(Message):
        """Enter was pressed."""

    class PictureNamed(Message):
        """Paths or addresses of pictures were pasted or dropped."""

        def __init__(self, references: Sequence[str]) -> None:
            super().__init__()
            self.references = references

    class PicturePasted(Message):
        """The clipboard is wanted, which may hold a picture."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            soft_wrap=True, tab_behavior="focus", highlight_cursor_line=False, **kwargs
        )
        self.prompts: list[str] = []
        """Earlier prompts, newest first."""
        self._prompt_at = -1
        self._unsent = ""

    # ── pictures ──────────────────────────────────────────────────────────────────────────────

    async def _on_paste(self, event: events.Paste) -> None:
        event.prevent_default()
        event.stop()
        if references := pasted_references(event.text):
            self.post_message(self.PictureNamed(references))
        else:
            self.put(event.text)

    def put(self, text: str) -> None:
        """Type `text` at the cursor."""
        result = self.replace(text.replace("\r\n", "\n").replace("\r", "\n"), *self.selection)
        self.move_cursor(result.end_location)

    def put_token(self, number: int) -> None:
        """A token at the cursor, set off from words by spaces."""
        row, column = self.cursor_location
        line = self.document.get_line(row)
        before = " " if column and not line[column - 1].isspace() else ""
        after = "" if line[column : column + 1].isspace() else " "
        self.put(f"{before}{token(number)}{after}")

    def watch_selection(self, previous: Selection, selection: Selection) -> None:
        # The cursor never rests inside a token, so nothing can be typed into one.
        row, column = selection.end
        for found in _token.finditer(self.document.get_line(row)):
            start, end = found.span()
            if start < column < end:
                forward = selection.end > previous.end
                target = (row, end if forward else start)
                is_cursor = selection.start == selection.end
                self.selection = Selection(target if is_cursor else selection.start, target)
                return

    def action_delete_left(self) -> None:
        row, column = self.cursor_location
        if self.selection.is_empty:
            for found in _token.finditer(self.document.get_line(row)):
                if found.end() == column:
                    self.delete((row, found.start()), (row, column))
                    return
        super().action_delete_left()

    def action_delete_right(self) -> None:
        row, column = self.cursor_location
        if self.selection.is_empty:
            for found in _token.finditer(self.document.get_line(row)):
                if found.start() == column:
                    self.delete((row, column), (row, found.end()))
                    return
        super().action_delete_right()

    # ── keys ──────────────────────────────────────────────────────────────────────────────────

    def action_send(self) -> None:
        self._prompt_at = -1
        self.post_message(self.Sent())

    def action_newline(self) -> None:
        self.put("\n")

    def action_paste_picture(self) -> None:
        self.post_message(self.PicturePasted())

    def action_up_or_earlier(self) -> None:
        if self.cursor_at_first_line and (not self.text or self._prompt_at >= 0):
            self.action_earlier()
        else:
            self.action_cursor_up()

    def action_down_or_later(self) -> None:
        if self.cursor_at_last_line and self._prompt_at >= 0:
            self.action_later()
        else:
            self.action_cursor_down()

    def action_earlier(self) -> None:
        if self._prompt_at + 1 < len(self.prompts):
            if self._prompt_at < 0:
                self._unsent = self.text
            self._prompt_at += 1
            self._show(self.prompts[self._prompt_at])

    def action_later(self) -> None:
        if self._prompt_at >= 0:
            self._prompt_at -= 1
            self._show(self.prompts[self._prompt_at] if self._prompt_at >= 0 else self._unsent)

    def _show(self, text: str) -> None:
        self.text = text
        self.move_cursor(self.document.end)
