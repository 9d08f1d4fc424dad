"""Answering one turn, as far as no runtime changes it: the order of events, what fits the context,
which tokens are tried, what of the text counts, what is measured.

Knows nothing about torch or llama.cpp; every backend that computes tokens uses it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, Protocol

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

from w2c_tui.backends.base import (
    Event,
    Finished,
    FinishReason,
    Prefill,
    Stats,
    Text,
    Trimmed,
)
from w2c_tui.backends.sampling import PromptLookup, TokenPicker
from w2c_tui.core.config import GenerationParams
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import ContextOverflowError, PromptError
from w2c_tui.core.prompt import image_list

MIN_ROOM = 16
"""Tokens that an answer must have room for, or there is no point in beginning it."""


class Interrupted(Exception):
    """Work was left because nobody wants its result any more."""


Row = NDArray[np.float32]
"""Logits after one position: (V,)."""


class Prompt(msgspec.Struct):
    """A conversation as a runtime reads it: `units` are its own; `ids` are the text's token ids.

    `num_tokens` is what the prompt takes of the context, images included.
    """

    messages: Sequence[Message]
    units: list[Any]
    ids: list[int]
    num_tokens: int


class TextStream(Protocol):
    """Token ids to text, one by one."""

    def push(self, ident: int) -> str:
        """The text that became certain with this id."""
        ...

    def flush(self) -> str:
        """What is still held back when nothing more comes."""
        ...


class Runtime(Protocol):
    """What `answer` needs of a backend.

    `can_draft`: tokens can be taken back, so that guesses may be tried. `end_ids` end an answer;
    `answer_lead` is what the template has the model write first.
    """

    @property
    def context_length(self) -> int: ...
    @property
    def reads_images(self) -> bool: ...
    @property
    def can_draft(self) -> bool: ...
    @property
    def end_ids(self) -> Set[int]: ...
    @property
    def answer_lead(self) -> str: ...

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """`messages` up to where the model goes on."""
        ...

    def read(self, prompt: Prompt) -> Iterator[Prefill | Row]:
        """Bring the context to `prompt`; the logits of its end come last. Raises Interrupted."""
        ...

    def extend(self, ids: Sequence[int]) -> Sequence[Row]:
        """Append `ids` to the context; the logits after each of them. Raises Interrupted."""
        ...

    def take_back(self, count: int) -> None:
        """Remove the last `count` tokens from the context."""
        ...

    def text_stream(self, prompt: Prompt) -> TextStream:
        """For what follows `prompt`."""
        ...

    def peak_memory(self) -> int:
        """The most bytes held so far."""
        ...


def answer(
    runtime: Runtime,
    messages: Sequence[Message],
    params: GenerationParams,
    cancelled: Callable[[], bool],
) -> Iterator[Event]:
    """The events of `Backend.stream` for a runtime that computes tokens."""
    began = time.perf_counter()
    seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(4), "big")
    if not runtime.reads_images:
        _require_page_text(messages)
    messages, dropped = fit_context(
        messages,
        lambda some: runtime.encode(some).num_tokens,
        runtime.context_length,
        params.max_new_tokens,
    )
    if dropped:
        yield Trimmed(dropped, runtime.context_length)
    prompt = runtime.encode(messages)
    goes_on = messages[-1].role == "assistant"
    shown = AnswerText("" if goes_on else runtime.answer_lead, params.stop)
    text = runtime.text_stream(prompt)
    limit = min(params.max_new_tokens, runtime.context_length - prompt.num_tokens)
    reused: int | None = None
    first_token_s = 0.0
    num_new = 0
    reason: FinishReason = "length"
    try:
        row: Row | None = None
        for step in runtime.read(prompt):
            if isinstance(step, Prefill):
                reused = step.done if reused is None else reused
                yield step
            else:
                row = step
        assert row is not None
        pick = TokenPicker(params, seed, prompt.ids)
        for token in _tokens(runtime, row, pick, params.prompt_lookup, limit, cancelled):
            if not first_token_s:
                first_token_s = time.perf_counter() - began
            if token in runtime.end_ids:
                reason = "stop"
                break
            num_new += 1
            piece = shown.push(text.push(token))
            if piece:
                yield Text(piece)
            if shown.stopped:
                reason = "stop"
                break
            if num_new >= limit:
                break
    except Interrupted:
        reason = "cancelled"
    rest = shown.push(text.flush()) + shown.flush()
    if rest:
        yield Text(rest)
    total = time.perf_counter() - began
    decode_s = total - first_token_s
    yield Finished(
        reason,
        Stats(
            prompt_tokens=prompt.num_tokens,
            reused_tokens=reused or 0,
            new_tokens=num_new,
            time_to_first_token_s=first_token_s or total,
            tokens_per_s=(num_new - 1) / decode_s if num_new > 1 else 0.0,
            total_s=total,
            peak_memory_bytes=runtime.peak_memory(),
            context_used=prompt.num_tokens + num_new,
            context_length=runtime.context_length,
            seed=seed,
        ),
    )


def _tokens(
    runtime: Runtime,
    row: Row,
    pick: TokenPicker,
    draft_length: int,
    limit: int,
    cancelled: Callable[[], bool],
) -> Iterator[int]:
    """Token ids one after another, as long as the reader takes them."""
    lookup = PromptLookup(pick.ids) if draft_length and runtime.can_draft else None
    begin = len(pick.ids)
    token = pick(row)
    while True:
        yield token
        if cancelled():
            raise Interrupted
        draft: list[int] = []
        if lookup is not None:
            room = min(draft_length, limit - (len(pick.ids) - begin) - 1)
            draft = lookup.draft(pick.ids, room)
        rows = runtime.extend([token, *draft])
        right = 0
        try:
            for at, row in enumerate(rows):
                token = pick(row)
                if at == len(draft) or token != draft[at]:
                    break
                right += 1
                yield token
        finally:
            # Also when the reader leaves in the middle.
            if right < len(draft):
                runtime.take_back(len(draft) - right)


def resident_peak() -> int:
    """The most main memory this process has held so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _require_page_text(messages: Sequence[Message]) -> None:
    for image in image_list(messages):
        if image.page_text is None:
            raise PromptError(
                f"This model reads text only and cannot look at {image.name}.",
                hint="Switch on text recognition (--ocr; F2 in the application), which puts the "
                "page's text into the prompt, or load a model that takes images.",
            )


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
    dropped = 0
    needed = count(kept)
    while needed + room > context_length and (fewer := without_oldest_exchange(kept)):
        kept = fewer
        dropped += 2
        needed = count(kept)
    if needed + min(MIN_ROOM, max_new_tokens) > context_length:
        raise ContextOverflowError(
            f"The last message with its images needs {needed:,} tokens "
            f"and the model's context holds {context_length:,}.",
            hint="Shorten the message, attach fewer images, leave out --ocr, "
            "or use a model with a longer context.",
        )
    return kept, dropped


def without_oldest_exchange(messages: Sequence[Message]) -> list[Message] | None:
    """`messages` less the first question and its answer, whose images stay; None if it is the last.

    The system text stays too.
    """
    head = list(messages[:1]) if messages[0].role == "system" else []
    turns = messages[len(head) :]
    if len(turns) <= 2:
        return None
    images = turns[0].attachments + turns[2].attachments
    return [*head, msgspec.structs.replace(turns[2], attachments=images), *turns[3:]]


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
