"""How fast a model is: what one run asks of it, what is measured of that, and runs compared.

A run loads the model into a process of its own, so that runs of two models can take turns on a
machine that holds only one of them. Knows nothing about tables or flags.
"""

from __future__ import annotations

import io
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from w2c_tui.backends.base import Finished, ModelInfo, Stats, Text
from w2c_tui.core.config import GenerationParams, LoadSpec
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.image import attachment_from_bytes, open_image
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.engine.client import EngineClient

Unit = Literal["s", "tokens/s", "bytes"]
Step = Callable[[str], None]
"""Told before each step of a run what it is."""

NUM_TURNS = 5
TURN_TOKENS = 32
_TOKENS_PER_LINE = 16
"""About, where a server does not count."""
STEPS = ("load", "warm up", "text", *(f"turn {turn}" for turn in range(1, NUM_TURNS + 1)), "image")

MEASURES: dict[str, tuple[str, Unit]] = {
    "load_s": ("loading", "s"),
    "prefill_tokens_per_s": ("reading", "tokens/s"),
    "decode_tokens_per_s": ("writing", "tokens/s"),
    "first_token_turn_1_s": ("turn 1, first token", "s"),
    "first_token_turn_2_s": ("turn 2, first token", "s"),
    "first_token_turn_5_s": ("turn 5, first token", "s"),
    "image_s": ("image encoding", "s"),
    "memory_bytes": ("most memory", "bytes"),
}
"""What a run measures, with its name in a table and its unit, in the order of a table. Loading is
from the start of the process to the loaded model; memory is the process's own and the GPUs'."""

_CHANGES = (
    "Make the heading blue.",
    "Put a footer below it.",
    "Use a larger font.",
    "Add a button.",
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much a run asks. `image` None leaves pictures out."""

    prompt_tokens: int = 512
    new_tokens: int = 128
    image: Attachment | None = None
    params: GenerationParams = GenerationParams(temperature=0, seed=0)


class Spread(msgspec.Struct, frozen=True):
    """The values of all runs, in short."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


class Run(msgspec.Struct):
    """What was measured so far, by the names in `MEASURES`, and the sizes that it was measured
    with: tokens of the text that was read, of the answer that was written, of turn 1."""

    measures: dict[str, float] = msgspec.field(default_factory=dict)
    sizes: dict[str, int] = msgspec.field(default_factory=dict)


def spreads(runs: Iterable[Run]) -> dict[str, Spread]:
    """Over all runs that measured it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run.measures.items():
            found.setdefault(name, []).append(value)
    return {name: Spread.of(found[name]) for name in MEASURES if name in found}


def ratios(runs: Sequence[Run], others: Sequence[Run]) -> dict[str, Spread]:
    """Each run's value divided by that of the other's run that followed it."""
    pairs = [
        Run(
            {
                name: value / other.measures[name]
                for name, value in run.measures.items()
                if other.measures.get(name)
            }
        )
        for run, other in zip(runs, others, strict=False)
    ]
    return spreads(pairs)


def measure(log_path: Path, spec: LoadSpec, plan: Plan, run: Run, step: Step) -> ModelInfo:
    """One run; `run` is filled while it goes, so that what is measured outlives an interruption.

    Every run asks with other numbers and another pixel, so that nothing it asks is known to a
    server from before. Raises what loading and answering raise.
    """
    with EngineClient(log_path) as engine:
        step("load")
        began = time.perf_counter()
        info = engine.load(spec)
        run.measures["load_s"] = time.perf_counter() - began
        _Questions(engine, info, plan, run, step).ask_all()
    return info


class _Questions:
    """The questions of one run, put to a loaded model."""

    def __init__(
        self, engine: EngineClient, info: ModelInfo, plan: Plan, run: Run, step: Step
    ) -> None:
        self._engine, self._info, self._plan, self._run = engine, info, plan, run
        self._step = step
        self._random = random.Random()

    def ask_all(self) -> None:
        self._step("warm up")
        short, long = (self._prompt_tokens(count) for count in (1, 9))
        self._step("text")
        self._read_and_write((long - short) / 8 or _TOKENS_PER_LINE, short)
        image = self._plan.image if self._info.reads_images else None
        self._turns(None if image is None else self._salted(image))
        # A server keeps what it likes, and models that prepare the whole prompt keep no images.
        if image is not None and self._info.incremental and self._info.backend != "openai":
            self._step("image")
            self._encode(self._salted(image))

    def _prompt_tokens(self, num_lines: int) -> int:
        _, stats = self._ask([Message("user", self._lines(num_lines))], 4)
        return stats.prompt_tokens

    def _read_and_write(self, per_line: float, around: int) -> None:
        """`per_line` tokens in each line, and about `around` of them beside the lines."""
        num_tokens = self._plan.prompt_tokens
        if self._info.context_length:
            num_tokens = min(num_tokens, self._info.context_length // 2)
        text = self._lines(max(round((num_tokens - around) / per_line), 1))
        question = f"{text}Write a long web page with a table of all these prices."
        _, stats = self._ask([Message("user", question)], self._plan.new_tokens)
        computed = stats.prompt_tokens - stats.reused_tokens
        self._run.sizes |= {"read": computed, "written": stats.new_tokens}
        if computed:
            self._measured("prefill_tokens_per_s", computed / stats.time_to_first_token_s)
        if stats.tokens_per_s:
            self._measured("decode_tokens_per_s", stats.tokens_per_s)

    def _turns(self, image: Attachment | None) -> None:
        question = PAGE_PROMPT if image is not None else f"{self._lines(8)}Make it a web page."
        messages = [Message("user", question, () if image is None else (image,))]
        for turn in range(1, NUM_TURNS + 1):
            self._step(f"turn {turn}")
            text, stats = self._ask(messages, TURN_TOKENS)
            if turn == 1:
                self._run.sizes["turn_1"] = stats.prompt_tokens
            name = f"first_token_turn_{turn}_s"
            if name in MEASURES:
                self._measured(name, stats.time_to_first_token_s)
            if turn < NUM_TURNS:
                # No template knows what an answer without a character is.
                answer = Message("assistant", text or "<html>")
                messages += [answer, Message("user", _CHANGES[turn - 1])]

    def _encode(self, image: Attachment) -> None:
        """The same question twice, over a picture that is new and then known; what stands before
        it differs, so that all the rest is computed both times."""
        first_token_s = []
        for _ in range(2):
            messages = [
                Message("user", self._lines(1)),
                Message("assistant", "Good."),
                Message("user", PAGE_PROMPT, (image,)),
            ]
            _, stats = self._ask(messages, 1)
            first_token_s.append(stats.time_to_first_token_s)
        self._measured("image_s", first_token_s[0] - first_token_s[1])

    def _ask(self, messages: Sequence[Message], new_tokens: int) -> tuple[str, Stats]:
        params = msgspec.structs.replace(self._plan.params, max_new_tokens=new_tokens)
        text = ""
        for event in self._engine.stream(messages, params):
            if isinstance(event, Text):
                text += event.delta
            elif isinstance(event, Finished):
                if event.stats.peak_memory_bytes:
                    self._measured("memory_bytes", event.stats.peak_memory_bytes)
                return text, event.stats
        raise AssertionError("an answer ends with Finished")

    def _measured(self, name: str, value: float) -> None:
        self._run.measures[name] = value

    def _lines(self, count: int) -> str:
        """Lines of equally many tokens, other ones each time."""
        numbers = (self._random.randrange(100_000, 1_000_000) for _ in range(count))
        return "".join(f"Item {n} costs {n % 90 + 10} euros.\n" for n in numbers)

    def _salted(self, image: Attachment) -> Attachment:
        """The same picture but for one pixel."""
        picture = open_image(image).copy()
        picture.putpixel((0, 0), tuple(self._random.randbytes(3)))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return attachment_from_bytes(buffer.getvalue(), image.name)
