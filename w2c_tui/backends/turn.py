"""The parts of answering that no runtime changes: what fits the context, what of the text counts.

Knows nothing about torch or llama.cpp; every backend uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import ContextOverflowError

MIN_ROOM = 16
"""Tokens that an answer must have room for, or there is no point in beginning it."""


def fit_context(
    messages: Sequence[Message],
    count: Callable[[Sequence[Message]], int],
    context_length: int,
    max_new_tokens: int,
) -> tuple[list[Message], int]:
    """Drop the oldest exchanges until prompt and answer fit; returns (messages, number dropped).

    `count(messages)` is the prompt length in tokens. A quarter of the context (or `max_new_tokens`,
    if less) is kept free for the answer. The system text stays, and so do the images of dropped
    messages: they move to the first message that is left, because a conversation about a
    screenshot is nothing without it. Raises ContextOverflowError if the last exchange alone is
    too long.
    """
    room = min(max_new_tokens, max(context_length // 4, MIN_ROOM))
    kept = list(messages)
    head = kept[:1] if kept[0].role == "system" else []
    turns = kept[len(head) :]
    dropped = 0
    needed = count(kept)
    while needed + room > context_length and len(turns) > 2:
        images = turns[0].attachments + turns[2].attachments
        turns = [msgspec.structs.replace(turns[2], attachments=images), *turns[3:]]
        dropped += 2
        needed = count([*head, *turns])
    if needed + min(MIN_ROOM, max_new_tokens) > context_length:
        raise ContextOverflowError(
            f"The last message with its images needs {needed:,} tokens "
            f"and the model's context holds {context_length:,}.",
            hint="Shorten the message, attach fewer images, leave out --ocr, "
            "or use a model with a longer context.",
        )
    return [*head, *turns], dropped


class AnswerText:
    """Raw model text on its way to the reader.

    Takes off the template's `lead` (the space before the first word), holds back what may become
    a stop string, and ends the answer before one.
    """

    def __init__(self, lead: str, stop: Sequence[str]) -> None:
        self._lead = lead
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What of `text`, and of what was held back, may be shown."""
        if self.stopped or not text:
            return ""
        if self._lead:
            text, self._lead = text.removeprefix(self._lead), ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, once nothing more comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
