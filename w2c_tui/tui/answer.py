"""An answer on its way from the engine to the store and the screen.

Owns the thread's side of generation: it writes each piece to the store and lays it ready for the
screen, which fetches it at its own pace. Knows nothing about widgets.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from w2c_tui.backends.base import Event, Finished, FinishReason, Prefill, Stats, Text, Trimmed
from w2c_tui.core.config import GenerationParams
from w2c_tui.core.errors import EngineError, W2CError
from w2c_tui.core.iteration import Iteration, given
from w2c_tui.core.store import Store, StoredMessage, StreamingAnswer
from w2c_tui.engine.client import EngineClient

Phase = Literal["waiting", "reading", "writing", "over"]


class Answer:
    """One answer while it is written. Everything but `run` belongs to the interface's thread."""

    def __init__(self, writer: StreamingAnswer, message: StoredMessage) -> None:
        self.message_id = message.id
        self.session_id = message.session_id
        self.text = message.text
        """All of it so far, raw; `fetch` brings it up to date."""
        self.phase: Phase = "waiting"
        self.prefill: Prefill | None = None
        self.trimmed: Trimmed | None = None
        self.stats: Stats | None = None
        self.error: W2CError | None = None
        self.num_pieces = 0
        self._writer = writer
        self._pieces: deque[str] = deque()
        self._first_piece_at = 0.0
        self._cancelled = threading.Event()
        self._engine: EngineClient | None = None
        self._done = threading.Event()

    @property
    def tokens_per_s(self) -> float:
        spent = time.monotonic() - self._first_piece_at
        return (self.num_pieces - 1) / spent if self.num_pieces > 1 and spent > 0 else 0.0

    @property
    def stopping(self) -> bool:
        return self._cancelled.is_set()

    def fetch(self) -> bool:
        """Take what has come since the last time into `text`; whether there was anything."""
        pieces: list[str] = []
        with contextlib.suppress(IndexError):
            while True:
                pieces.append(self._pieces.popleft())
        self.text += "".join(pieces)
        return bool(pieces)

    def cancel(self) -> None:
        """End it soon; what has come stays. Other answers that wait for the engine go on."""
        self._cancelled.set()
        engine = self._engine
        if engine is not None:
            engine.cancel()

    def wait(self, timeout_s: float) -> None:
        self._done.wait(timeout_s)

    def run(
        self,
        engine: EngineClient,
        store: Store,
        params: GenerationParams,
        ready: Callable[[], None],
        iteration: Iteration = "history",
        *,
        begins_pages: Callable[[], bool] = lambda: False,
    ) -> None:
        """On a thread: ask the engine and write the answer. `ready` loads the model if need be.
        `begins_pages`: whether a page is begun for the model, as it would not know how to.

        Raises nothing: a failure ends up in the stored message and in `error`.
        """
        try:
            self._run(engine, store, params, ready, iteration, begins_pages)
        except W2CError as error:
            self.fail(error)
        finally:
            self._over()

    def _run(
        self,
        engine: EngineClient,
        store: Store,
        params: GenerationParams,
        ready: Callable[[], None],
        iteration: Iteration,
        begins_pages: Callable[[], bool],
    ) -> None:
        ready()
        if self._cancelled.is_set():
            self._writer.finish("partial", reason="cancelled")
            return
        messages = store.conversation(self.session_id, self.message_id)
        if not self.text:
            messages.pop()
        messages = given(messages, iteration)
        until = ""
        if begins_pages():
            # Late, as the application starts without.
            from w2c_tui.engine.page_writer import END, begun

            if (helped := begun(messages, params)) is not None:
                messages, params = helped
                until = END
                if not self.text:
                    self.begin(messages[-1].text)
        events = engine.stream(messages, params, until=until)
        with contextlib.closing(events):  # type: ignore[type-var]
            for event in events:
                if isinstance(event, Finished):
                    self.finish(event.reason, event, iteration)
                else:
                    self.take(event, engine)

    def begin(self, text: str) -> None:
        """On the same thread: what the model goes on from."""
        self._writer.append(text)
        self._pieces.append(text)

    def take(self, event: Event, engine: EngineClient) -> None:
        """On the same thread: one event that is not the last."""
        self._engine = engine
        if self._cancelled.is_set():
            engine.cancel()
        match event:
            case Text():
                self._writer.append(event.delta)
                self._pieces.append(event.delta)
                self._first_piece_at = self._first_piece_at or time.monotonic()
                self.num_pieces += 1
                self.phase = "writing"
            case Prefill():
                self.prefill, self.phase = event, "reading"
            case Trimmed():
                self.trimmed = event

    def written(self) -> None:
        """On the same thread: the engine is done with it, and what it does next is another's."""
        self._engine = None

    def finish(
        self, reason: FinishReason, event: Finished | None, iteration: Iteration = "history"
    ) -> None:
        """It is over, with the measures of `event`; it was asked with `iteration`."""
        stats = msgspec.structs.asdict(event.stats) if event is not None else {}
        self.stats = event.stats if event is not None else None
        if event is not None:
            stats["iteration"] = iteration
            if self.trimmed:
                stats["num_left_out"] = self.trimmed.num_messages
        self._writer.finish(
            "complete" if reason == "stop" else "partial", reason=reason, stats=stats
        )
        self._over()

    def fail(self, error: W2CError) -> None:
        """It ended with an error, or was stopped in the middle of one."""
        if self._cancelled.is_set() and isinstance(error, EngineError):
            with contextlib.suppress(W2CError):
                self._writer.finish("partial", reason="cancelled")
            self._over()
            return
        self.error = error
        with contextlib.suppress(W2CError):
            self._writer.finish("error", error=str(error))
        self._over()

    def _over(self) -> None:
        self.phase = "over"
        self._engine = None
        self._done.set()
