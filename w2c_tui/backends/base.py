"""What every backend is: the protocol, and the plain data that goes in and comes out.

A backend is one file that passes `tests/backends/contract.py`. This module knows nothing about
torch, llama.cpp, processes or screens; the front ends import it for its types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, get_args

import msgspec

from w2c_tui.core.config import GenerationParams, LoadSpec, Quantization
from w2c_tui.core.conversation import Hints, Message
from w2c_tui.core.image import ImageSpec

FinishReason = Literal["stop", "length", "cancelled"]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded, as a front end shows it."""

    name: str
    backend: str
    family: str
    template: str
    reads_images: bool
    context_length: int
    num_parameters: int
    dtype: str
    quantization: Quantization
    devices: tuple[str, ...]
    incremental: bool
    load_time_s: float
    image_spec: ImageSpec | None = None
    """How it prepares pictures, where that is one square; None if unknown or text only."""
    hints: Hints = "none"
    """What it was trained to be told about a picture, although it sees it."""
    sends_to: str = ""
    """The other machine (host:port) that gets the text and the pictures; empty if none does."""
    note: str = ""
    """What a user should know about this model before believing it."""

    def hints_for(self, ocr: Literal["auto", "on", "off"], wanted: Hints) -> Hints:
        """What it is told about a picture where the user said `ocr` and `wanted`."""
        if ocr == "off" or (ocr == "auto" and self.reads_images and self.hints == "none"):
            return "none"
        # Each of them says all that the one before says.
        return max(wanted, self.hints, "text", key=get_args(Hints).index)

    @property
    def runtime(self) -> str:
        """The library that runs it."""
        return {"hf": "transformers", "gguf": "llama.cpp"}.get(self.backend, self.backend)


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """Measures of one answer. `reused_tokens` of the prompt were kept from the turn before.

    `tokens_per_s` is of the time in which it was written, `total_s` that of its request: an answer
    that was written beside an earlier one comes at once.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    time_to_first_token_s: float
    tokens_per_s: float
    total_s: float
    peak_memory_bytes: int
    context_used: int
    context_length: int
    seed: int


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """`done` of `total` prompt tokens are computed (images count as their tokens)."""

    done: int
    total: int


class Trimmed(msgspec.Struct, frozen=True, tag=True):
    """The first `num_messages` messages after the system text no longer fit and were left out.

    Their images were kept: they stand in the first message that is left.
    """

    num_messages: int
    context_length: int


class Text(msgspec.Struct, frozen=True, tag=True):
    """The next piece of the answer, raw."""

    delta: str


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The answer is over. "length": it was cut by `max_new_tokens` or by the context."""

    reason: FinishReason
    stats: Stats


Event = Prefill | Trimmed | Text | Finished
Report = Callable[[str, int, int], None]
"""Progress of loading: `report(phase, done, total)`; `total` 0 is unknown."""


class Backend(Protocol):
    """A way of running models. One model at a time, one request at a time, one thread."""

    def load(self, spec: LoadSpec, report: Report) -> ModelInfo:
        """Load the model of `spec`. Raises a W2CError and holds nothing if that fails."""
        ...

    def stream(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        cancelled: Callable[[], bool],
        ahead: int = 0,
        until: str = "",
    ) -> Iterator[Event]:
        """Answer the conversation; the last event is Finished.

        `ahead`: how many requests for the same will follow, with the seeds that come after this
        one (modulo 2**63). A backend may write those answers beside this one, and must give each
        what it would be alone; any other request drops them, and so does leaving an answer.

        `until`: the answer is over when it holds this text, in capitals or not, and ends with it.

        `cancelled` is asked often; once it is true the stream ends with reason "cancelled" within
        half a second and what was computed stays usable.
        """
        ...

    def prefill(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        cancelled: Callable[[], bool],
    ) -> Iterator[Prefill]:
        """Read the conversation as `stream` would, and write nothing: what a later request shares
        with it at the beginning is not read again.

        Does nothing where reading twice cannot be spared. `cancelled` is asked after each step, and
        what was read until then stays. Raises what `stream` raises.
        """
        ...

    def close(self) -> None:
        """Give back the model's memory."""
        ...
