"""An engine that sends prepared pieces, for what must look or cost the same on every machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from w2c_tui.backends.base import Event, Finished, ModelInfo, Prefill, Stats, Text
from w2c_tui.core.config import GenerationParams, LoadSpec
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import W2CError
from w2c_tui.engine.client import EngineClient

INFO = ModelInfo(
    name="scripted",
    backend="none",
    family="none",
    template="none",
    reads_images=True,
    context_length=8192,
    num_parameters=1,
    dtype="float32",
    quantization="none",
    devices=("cpu",),
    incremental=True,
    load_time_s=0.0,
)
STATS = Stats(
    prompt_tokens=10,
    reused_tokens=0,
    new_tokens=3500,
    time_to_first_token_s=0.1,
    tokens_per_s=100.0,
    total_s=1.0,
    peak_memory_bytes=0,
    context_used=10,
    context_length=8192,
    seed=0,
)


class ScriptedEngine(EngineClient):
    """Sends `text` in pieces of 4 characters, `rate` of them in a second (0: at once).

    With `hold` it waits after that many until it is cancelled, with `error` it fails at the end.
    """

    def __init__(
        self,
        text: str,
        rate: float = 0,
        *,
        info: ModelInfo = INFO,
        stats: Stats = STATS,
        hold: int = 0,
        error: W2CError | None = None,
    ) -> None:
        super().__init__(Path("engine.log"))
        self._text = text
        self._rate = rate
        self._info = info
        self._stats = stats
        self._hold = hold
        self.error = error
        self._cancelled = threading.Event()
        self.asked: list[Message] = []
        self.until = ""
        """The last request."""

    @property
    def pid(self) -> int | None:
        return 1

    def prefill(self, messages: Sequence[Message], params: GenerationParams) -> Iterator[Prefill]:
        return iter(())

    def load(self, spec: LoadSpec, report: Any = None, *, pictures_soon: bool = False) -> ModelInfo:
        self.model = self._info
        return self._info

    def cancel(self) -> None:
        self._cancelled.set()

    def stream(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        ahead: int = 0,
        until: str = "",
    ) -> Iterator[Event]:
        self.asked, self.until = list(messages), until
        yield Prefill(10, 10)
        began = time.monotonic()
        for number, at in enumerate(range(0, len(self._text), 4)):
            if self._rate:
                time.sleep(max(0.0, began + number / self._rate - time.monotonic()))
            if self._hold and number == self._hold:
                self._cancelled.wait(60)
            if self._cancelled.is_set():
                self._cancelled.clear()
                yield Finished("cancelled", self._stats)
                return
            yield Text(self._text[at : at + 4])
        if self.error is not None:
            raise self.error
        yield Finished("stop", self._stats)
