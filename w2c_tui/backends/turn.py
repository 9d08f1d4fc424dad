"""Answering one turn, as far as no runtime changes it: the order of events, what fits the context,
which tokens are tried, what of the text counts, what is measured; and writing several answers to
one conversation at a time.

Knows nothing about torch or llama.cpp; every backend that computes tokens uses it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence, Set
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
MAX_BRANCHES = 8
"""Answers that are written in lock step. The more there are, the less each further one gains, and
each has keys and values of its own."""


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
    `answer_lead` is what the template has the model write first. `candidates` is kept here between
    requests; `answer` sets it, and the runtime forgets it with the model.
    """

    candidates: Candidates | None

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

    def branch(self, count: int, room: int) -> int:
        """Split the context into at most `count` branches that can grow by `room` tokens each.

        Returns how many there are: fewer where memory is short, less than 2 where it has none.
        The context itself stays as it is.
        """
        ...

    def extend_branches(self, tokens: Sequence[int]) -> Sequence[Row]:
        """Append one token to each branch; the logits after each of them.

        Raises Interrupted, with the branches as they were.
        """
        ...

    def keep_branches(self, kept: Sequence[int]) -> None:
        """Go on with the branches at these places among the present ones; none gives them up."""
        ...

    def text_stream(self, prompt: Prompt) -> TextStream:
        """For what follows `prompt`."""
        ...

    def peak_memory(self) -> int:
        """The most bytes held so far."""
        ...


class Request(msgspec.Struct, frozen=True):
    """What `Backend.stream` was asked for."""

    messages: tuple[Message, ...]
    params: GenerationParams
    until: str

    def of_any_seed(self) -> Request:
        params = msgspec.structs.replace(self.params, seed=None)
        return msgspec.structs.replace(self, params=params)


class _Writing:
    """One answer as far as it is written.

    `last` is its newest token, which is not in the context yet; `reason` says why it ended;
    `pieces` are text that was not given out; `kept_s` are the seconds it was worked on before it
    was asked for.
    """

    def __init__(
        self,
        runtime: Runtime,
        prompt: Prompt,
        request: Request,
        seed: int,
        limit: int,
    ) -> None:
        latest = prompt.messages[-1]
        begun = latest.text if latest.role == "assistant" else None
        self.seed, self.limit = seed, limit
        self.pick = TokenPicker(request.params, seed, prompt.ids)
        self.last = -1
        self.num_new = 0
        self.reason: FinishReason | None = None
        self.pieces: list[str] = []
        self.kept_s = 0.0
        self._end_ids = runtime.end_ids
        self._text = runtime.text_stream(prompt)
        lead = runtime.answer_lead if begun is None else ""
        self._shown = AnswerText(lead, request.params.stop, request.until, begun or "")

    def take(self, token: int) -> None:
        """Write `token`, and see whether the answer ends with it."""
        self.last = token
        if token in self._end_ids:
            self.reason = "stop"
            return
        self.num_new += 1
        if piece := self._shown.push(self._text.push(token)):
            self.pieces.append(piece)
        if self._shown.stopped:
            self.reason = "stop"
        elif self.num_new >= self.limit:
            self.reason = "length"

    def read(self) -> list[str]:
        """The text that was not given out yet."""
        pieces, self.pieces = self.pieces, []
        return pieces

    def rest(self) -> str:
        """What was held back, once nothing more comes."""
        return self._shown.push(self._text.flush()) + self._shown.flush()


class Candidates:
    """Answers to one conversation that differ in their seeds, written in lock step.

    A runtime reads its weights once for a token of each. One of them is given out as it is
    written; the text of the others is kept until they are asked for.
    """

    def __init__(
        self,
        runtime: Runtime,
        request: Request,
        prompt: Prompt,
        num_dropped: int,
    ) -> None:
        """`prompt` is the request's conversation without its `num_dropped` oldest messages."""
        self.prompt, self.num_dropped = prompt, num_dropped
        self._runtime = runtime
        self._request = request.of_any_seed()
        self._waiting: dict[int, _Writing] = {}
        self._live: list[_Writing] = []

    def begin(self, first: _Writing, others: Sequence[_Writing], row: Row) -> None:
        """Take the branches' first tokens after `row`; `others` are those to be asked for."""
        self._waiting = {one.seed: one for one in others}
        self._live = [first, *others]
        for one in self._live:
            one.take(one.pick(row))
        self._keep([one for one in self._live if one.reason is None])

    def take(self, request: Request) -> _Writing | None:
        """The answer that was kept for this request, if there is one; it is given out once."""
        seed = request.params.seed
        if seed is None or request.of_any_seed() != self._request:
            return None
        return self._waiting.pop(seed, None)

    def write(
        self, writing: _Writing, cancelled: Callable[[], bool]
    ) -> Generator[None, None, None]:
        """Go on with all of them until `writing` has ended, a step at a time; raises Interrupted.

        The first step is what is there already.
        """
        yield
        while writing.reason is None:
            if cancelled():
                raise Interrupted
            began = time.perf_counter()
            rows = self._runtime.extend_branches([one.last for one in self._live])
            for one, row in zip(self._live, rows, strict=True):
                one.take(one.pick(row))
            spent = time.perf_counter() - began
            for one in self._live:
                one.kept_s += spent if one is not writing else 0
            # With fewer branches the others are faster.
            self._keep([one for one in self._live if one.reason is None])
            yield

    def given_out(self) -> None:
        """One of them was, whole; the others are waited for."""
        if not self._waiting:
            forget_candidates(self._runtime)

    def _keep(self, live: list[_Writing]) -> None:
        if len(live) < len(self._live):
            self._runtime.keep_branches([self._live.index(one) for one in live])
            self._live = live


def forget_candidates(runtime: Runtime) -> None:
    """Give up what was written ahead, and its memory."""
    if runtime.candidates is not None:
        runtime.candidates = None
        runtime.keep_branches([])


def answer(
    runtime: Runtime,
    messages: Sequence[Message],
    params: GenerationParams,
    cancelled: Callable[[], bool],
    ahead: int = 0,
    until: str = "",
) -> Iterator[Event]:
    """The events of `Backend.stream` for a runtime that computes tokens.

    With `ahead`, and where the runtime can branch, that many further answers (at most
    `MAX_BRANCHES` in all) are written beside this one, and kept for the requests that are to come.
    Their picks are those of single answers; prompt lookup is off. Of an answer that was kept all of
    the prompt counts as reused, and its tokens/s are those of the time in which it was written.
    Whoever leaves one of them in the middle does not want the others either.
    """
    began = time.perf_counter()
    request = Request(tuple(messages), params, until)
    kept = runtime.candidates
    writing = kept.take(request) if kept is not None else None
    if kept is not None and writing is not None:
        prompt, dropped = kept.prompt, kept.num_dropped
    else:
        kept = None
        forget_candidates(runtime)
        prompt, dropped = _fitting(runtime, messages, params)
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(4), "big")
        limit = min(params.max_new_tokens, runtime.context_length - prompt.num_tokens)
        writing = _Writing(runtime, prompt, request, seed, limit)
    reused: int | None = None
    first_token_s = 0.0
    try:
        if dropped:
            yield Trimmed(dropped, runtime.context_length)
        row: Row | None = None
        if kept is not None:
            reused = prompt.num_tokens
            yield Prefill(reused, reused)
        else:
            for step in runtime.read(prompt):
                if isinstance(step, Prefill):
                    reused = step.done if reused is None else reused
                    yield step
                else:
                    row = step
            assert row is not None
            if ahead:
                kept = _branched(runtime, request, prompt, writing, ahead, row, dropped)
        steps = (
            kept.write(writing, cancelled)
            if kept is not None
            else _alone(runtime, row, writing, params.prompt_lookup, cancelled)
        )
        with contextlib.closing(steps):
            for _ in steps:
                first_token_s = first_token_s or time.perf_counter() - began
                for piece in writing.read():
                    yield Text(piece)
                if writing.reason is not None:
                    break
    except Interrupted:
        writing.reason = "cancelled"
        forget_candidates(runtime)
    except BaseException:
        # Also where the reader goes away.
        forget_candidates(runtime)
        raise
    if kept is not None and kept is runtime.candidates:
        kept.given_out()
    if rest := writing.rest():
        yield Text(rest)
    assert writing.reason is not None
    total = time.perf_counter() - began
    num_new = writing.num_new
    decode_s = writing.kept_s + total - first_token_s
    yield Finished(
        writing.reason,
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
            seed=writing.seed,
        ),
    )


def prefill(
    runtime: Runtime,
    messages: Sequence[Message],
    params: GenerationParams,
    cancelled: Callable[[], bool],
) -> Iterator[Prefill]:
    """The events of `Backend.prefill` for a runtime that computes tokens."""
    if not runtime.can_draft:
        # Its context cannot be taken back to where another prompt parts from this one.
        return
    forget_candidates(runtime)
    prompt, _ = _fitting(runtime, messages, params)
    with contextlib.closing(runtime.read(prompt)) as steps:  # type: ignore[type-var]
        for step in steps:
            if isinstance(step, Prefill):
                yield step
                if cancelled():
                    return


def _fitting(
    runtime: Runtime, messages: Sequence[Message], params: GenerationParams
) -> tuple[Prompt, int]:
    """The prompt of what fits the context, and how many of the oldest messages do not."""
    if not runtime.reads_images:
        _require_page_text(messages)
    left, dropped = fit_context(
        messages,
        lambda some: runtime.encode(some).num_tokens,
        runtime.context_length,
        params.max_new_tokens,
    )
    return runtime.encode(left), dropped


def _branched(
    runtime: Runtime,
    request: Request,
    prompt: Prompt,
    first: _Writing,
    ahead: int,
    row: Row,
    dropped: int,
) -> Candidates | None:
    """`first` and what can be written beside it, each with its first token; None if nothing can."""
    count = runtime.branch(min(1 + ahead, MAX_BRANCHES), first.limit)
    if count < 2:
        return None
    seeds = [(first.seed + number) % 2**63 for number in range(1, count)]
    others = [_Writing(runtime, prompt, request, seed, first.limit) for seed in seeds]
    candidates = runtime.candidates = Candidates(runtime, request, prompt, dropped)
    candidates.begin(first, others, row)
    return candidates


def _alone(
    runtime: Runtime,
    row: Row | None,
    writing: _Writing,
    draft_length: int,
    cancelled: Callable[[], bool],
) -> Generator[None, None, None]:
    """Write one token after another, as long as the reader goes on."""
    assert row is not None
    pick = writing.pick
    lookup = PromptLookup(pick.ids) if draft_length and runtime.can_draft else None
    writing.take(pick(row))
    while True:
        yield
        if cancelled():
            raise Interrupted
        draft: list[int] = []
        if lookup is not None:
            draft = lookup.draft(pick.ids, min(draft_length, writing.limit - writing.num_new - 1))
        rows = runtime.extend([writing.last, *draft])
        right = 0
        try:
            for at, row in enumerate(rows):
                writing.take(pick(row))
                if at == len(draft) or writing.last != draft[at]:
                    break
                right += 1
                yield
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
    a stop string, and ends the answer before one, or after the text `until` in capitals or not.
    `begun` is what the answer goes on from.
    """

    def __init__(self, lead: str, stop: Sequence[str], until: str = "", begun: str = "") -> None:
        self._lead = lead
        self._stop = [text for text in stop if text]
        self._until = re.compile(re.escape(until), re.I) if until else None
        self._num_before = max(len(until) - 1, 0)
        self._before = ""
        self._held = ""
        self.stopped = False
        self._remember(begun)

    def push(self, text: str) -> str:
        """What of `text`, and of what was held back, may be shown."""
        if self.stopped or not text:
            return ""
        if self._lead:
            text, self._lead = text.removeprefix(self._lead), ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        end = self._until.search(self._before + self._held) if self._until else None
        if end is not None:
            found.append(end.end() - len(self._before))
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        self._remember(shown)
        return shown

    def _remember(self, shown: str) -> None:
        """Keep as much of what was shown as `until` may have begun in."""
        if self._num_before:
            self._before = (self._before + shown)[-self._num_before :]

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
