"""What a turn takes of the model's context, as far as it can be told beforehand.

Estimates: characters and pictures are counted in tokens at the rates that measured answers had, so
that no tokenizer is needed. Knows nothing about models or screens.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.iteration import Iteration, given
from w2c_tui.core.store import StoredMessage

_CHARS_PER_TOKEN = (1.0, 5.0)
"""Bounds for what one answer says about its tokenizer; prose and HTML are at 2.5 to 4.5."""


class Cost(msgspec.Struct, frozen=True):
    """What characters and pictures cost. A picture includes the words that go with it, if text
    recognition gave some."""

    chars_per_token: float
    tokens_per_image: float

    def tokens(self, messages: Sequence[Message]) -> int:
        """What `messages` take."""
        chars, images = _size(messages)
        return round(chars / self.chars_per_token + self.tokens_per_image * images)


def cost_of(prompt: Sequence[Message], answer: str, used: int, new_tokens: int) -> Cost | None:
    """The rates that an answer to `prompt` shows, which took `used` tokens with its prompt, of
    which `new_tokens` are its own; None when it says too little."""
    if not answer or not new_tokens:
        return None
    low, high = _CHARS_PER_TOKEN
    rate = min(max(len(answer) / new_tokens, low), high)
    chars, images = _size(prompt)
    text = (chars + len(answer)) / rate
    return Cost(rate, max(0.0, used - text) / images if images else 0.0)


class Meter:
    """What the next turn of a conversation takes, by what its answers took."""

    def __init__(self, branch: Sequence[StoredMessage]) -> None:
        self._messages = [_message(stored) for stored in branch]
        measured = [at for at, stored in enumerate(branch) if stored.stats.get("context_used")]
        self.context_length: int = 0
        self.cost: Cost | None = None
        """None before the first answer."""
        if not measured:
            return
        first, last = branch[measured[0]].stats, branch[measured[-1]].stats
        self.context_length = last["context_length"]
        # In the first answer's prompt there is little beside the pictures.
        self.cost = cost_of(
            self._prompt(measured[0], first),
            branch[measured[0]].text,
            first["context_used"],
            first["new_tokens"],
        )
        if self.cost is None:
            return
        # The last answer's says most about the text.
        prompt = [*self._prompt(measured[-1], last), self._messages[measured[-1]]]
        chars, images = _size(prompt)
        text = last["context_used"] - self.cost.tokens_per_image * images
        if text > 0:
            self.cost = Cost(max(chars / text, _CHARS_PER_TOKEN[0]), self.cost.tokens_per_image)

    def _prompt(self, at: int, stats: dict[str, object]) -> list[Message]:
        """What the answer at `at` was asked with."""
        iteration: Iteration = "latest" if stats.get("iteration") == "latest" else "history"
        prompt = given(self._messages[:at], iteration)
        left_out = stats.get("num_left_out", 0)
        assert isinstance(left_out, int)
        # The pictures of what was left out stayed.
        return [
            msgspec.structs.replace(message, text="") if number < left_out else message
            for number, message in enumerate(prompt)
        ]

    def tokens(self, iteration: Iteration, request: Message | None = None) -> int:
        """What a model is given for `request`, by default an empty one; 0 before any answer."""
        if self.cost is None:
            return 0
        return self.cost.tokens(given([*self._messages, request or Message("user")], iteration))

    def __str__(self) -> str:
        if self.cost is None:
            return "Known after the first answer."
        whole, latest = self.tokens("history"), self.tokens("latest")
        return (
            f"About {whole:,} tokens with the whole conversation, {latest:,} with the latest "
            f"page only, of {self.context_length:,}."
        )


def _message(stored: StoredMessage) -> Message:
    """Without the bytes of its pictures."""
    pictures = (
        Attachment(b"", image.sha256, image.width, image.height, source=image.source)
        for image in stored.attachments
    )
    return Message(stored.role, stored.text, tuple(pictures))


def _size(messages: Sequence[Message]) -> tuple[int, int]:
    """Characters and images."""
    return (
        sum(len(message.text) for message in messages),
        sum(len(message.attachments) for message in messages),
    )
