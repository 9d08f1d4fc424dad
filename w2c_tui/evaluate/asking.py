"""How a benchmark puts its questions to a model: through the engine, failures kept as results.

Knows nothing about what is asked or how answers are scored.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from w2c_tui.backends.base import ModelInfo, Text
from w2c_tui.core.config import GenerationParams, LoadSpec
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import ConfigError
from w2c_tui.engine.client import EngineClient
from w2c_tui.engine.page_writer import Answer, write_page

Item = TypeVar("Item")
Worker = TypeVar("Worker")
Result = TypeVar("Result")
_AHEAD = 4
"""Items per worker that may be finished while an earlier one is not."""

Load = Callable[[], ModelInfo]
"""Loads the model; called again where the engine process died."""
Attach = Callable[[Path], Attachment]
"""Opens a picture, with its text read off where that is wanted."""


class Stopped(Exception):
    """The user ended the run; what is finished is kept."""


class Asker:
    """Answers of one model, each with a seed of its own so that a resumed run is the same run."""

    def __init__(
        self, engine: EngineClient, load: Load, params: GenerationParams, stop: threading.Event
    ) -> None:
        self.engine = engine
        self._load = load
        self._params = params
        self._stop = stop

    def ask(self, messages: Sequence[Message], number: int) -> str:
        """The raw answer to `messages` as row `number` of the run. Raises Stopped and W2CErrors."""
        params = self._begin(number)
        events = self.engine.stream(messages, params)
        text = "".join(event.delta for event in events if isinstance(event, Text))
        self._check()
        return text

    def page(self, messages: Sequence[Message], number: int) -> Answer:
        """As `ask`, for an answer that is over when its page is."""
        params = self._begin(number)
        events = write_page(self.engine, messages, params, cancelled=self._stop.is_set)
        while True:
            try:
                next(events)
            except StopIteration as end:
                answer: Answer = end.value
                self._check()
                return answer

    def _begin(self, number: int) -> GenerationParams:
        self._check()
        if not self.engine.is_ready:
            self._load()
        return msgspec.structs.replace(self._params, seed=(self._params.seed or 0) + number)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


def shared_out(
    items: Iterable[Item], workers: Sequence[Worker], work: Callable[[Worker, Item], Result]
) -> Generator[Result, None, None]:
    """`work(worker, item)` for each item, by whichever worker is free; results in items' order.

    Only a few items ahead are begun. What `work` raises comes out in the item's place, and ends
    the whole once the items that are being worked on are done.
    """
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def run(item: Item) -> Result:
        worker = free.get()
        try:
            return work(worker, item)
        finally:
            free.put(worker)

    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(len(workers), thread_name_prefix="w2c-ask") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(run, item))
                if len(waiting) > _AHEAD * len(workers):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises ConfigError if the name leads out of it."""
    path = (folder / name.replace("\\", "/")).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ConfigError(f"The image {name!r} lies outside of {folder}.")
    return path


def what_was_run(
    spec: LoadSpec, params: GenerationParams, ocr: str, ocr_hints: str
) -> dict[str, object]:
    """All settings that change answers, as plain data for `journal.Run`."""
    model = {
        key: value
        for key, value in msgspec.to_builtins(spec).items()
        if key not in ("name", "threads", "max_memory", "offload_folder")
    }
    return {**model, **msgspec.to_builtins(params), "ocr": ocr, "ocr_hints": ocr_hints}
