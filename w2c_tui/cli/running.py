"""What commands that run a model share: loading it, attaching images, following answers."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Generator, Iterator
from types import FrameType
from typing import TypeVar

import msgspec
from rich.text import Text as Line

from w2c_tui.backends.base import Event, ModelInfo, Prefill, Text, Trimmed
from w2c_tui.console.progress import console, loading_progress, status
from w2c_tui.core.config import Settings, paths
from w2c_tui.core.conversation import Attachment, Hints
from w2c_tui.core.page_text import WITHOUT_TEXT, recognises_text
from w2c_tui.core.reference import load_attachment
from w2c_tui.engine.client import EngineClient

T = TypeVar("T")


@contextlib.contextmanager
def loaded_engine(settings: Settings) -> Iterator[tuple[EngineClient, ModelInfo]]:
    """An engine with the model of `settings`, closed at the end."""
    with EngineClient(paths().engine_log) as engine:
        yield engine, load_model(engine, settings)


def load_model(engine: EngineClient, settings: Settings) -> ModelInfo:
    """Load the model of `settings`, with progress; says what was loaded."""
    with loading_progress() as report:
        info = engine.load(settings.model, report)
    about = f" {describe(info)}, loaded in {info.load_time_s:.1f} s"
    console.print(Line.assemble((info.name, "bold"), about), soft_wrap=True)
    if info.sends_to:
        console.print(
            f"Text and pictures leave this machine: they are sent to {info.sends_to}.",
            soft_wrap=True,
        )
    if info.note:
        console.print(info.note, soft_wrap=True)
    return info


def describe(info: ModelInfo) -> str:
    """One line about a loaded model."""
    bits = info.dtype if info.quantization == "none" else f"{info.quantization}, {info.dtype}"
    sees = "reads images" if info.reads_images else "reads text only"
    size = f"{info.num_parameters / 1e6:,.0f}M parameters, " if info.num_parameters else ""
    return f"({size}{bits} on {', '.join(info.devices)} by {info.runtime}, {sees})"


def attach(reference: str, settings: Settings, engine: EngineClient, info: ModelInfo) -> Attachment:
    """The image at `reference`, with its text read off where the settings or the model ask."""
    image = load_attachment(reference, settings.images)
    hints = info.hints_for(settings.ocr, settings.ocr_hints)
    if hints == "none":
        return image
    if settings.ocr == "auto" and info.reads_images and not recognises_text():
        _tell_once(f"{info.name} {WITHOUT_TEXT}")
        return image
    return with_page_text(image, engine, hints)


def _tell_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        console.print(text, soft_wrap=True)


_told: set[str] = set()


def with_page_text(image: Attachment, engine: EngineClient, hints: Hints = "text") -> Attachment:
    """`image` with the text that recognition finds on it."""
    with status(f"Reading the text of {image.name}"):
        lines = engine.read_text(image, hints)
    return msgspec.structs.replace(image, page_text=lines)


@contextlib.contextmanager
def interrupt_cancels(*engines: EngineClient) -> Iterator[threading.Event]:
    """The first Ctrl-C cancels the running answers, the second one ends the program."""
    pressed = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        # Not in this thread: the signal may have come while it was sending, holding the lock.
        for engine in engines:
            threading.Thread(target=engine.cancel, daemon=True).start()

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class AnswerLine:
    """A moving line that follows answers, on a terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.part = ""
        self._rate = Rate()
        self._line = console.status(Line(f"{title}: reading")) if console.is_terminal else None

    def __enter__(self) -> AnswerLine:
        if self._line is not None:
            self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.stop()

    def follow(self, answer: Generator[Event, None, T]) -> T:
        """Take all events of an answer; returns what it returns."""
        while True:
            try:
                event = next(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            self.take(event)

    def take(self, event: Event) -> None:
        if isinstance(event, Text):
            self._rate.add()
            if self._rate.count % 8 == 0:
                self._show(f"{self._rate.count} tokens, {self._rate.per_s:.0f} tokens/s")
        elif isinstance(event, Prefill):
            self._rate = Rate()
            self._show(f"reading {event.done}/{event.total} tokens")
        elif isinstance(event, Trimmed):
            self.say("the conversation was cut to fit the context.")

    def say(self, text: str) -> None:
        """A line that stays."""
        console.print(f"{self.title}: {text}")

    def _show(self, text: str) -> None:
        if self._line is not None:
            part = f"{self.part}, " if self.part else ""
            self._line.update(Line(f"{self.title}: {part}{text}"))


class Rate:
    """Counts what comes in and says how fast."""

    def __init__(self) -> None:
        self.count = 0
        self._began = 0.0

    def add(self) -> None:
        self._began = self._began or time.perf_counter()
        self.count += 1

    @property
    def per_s(self) -> float:
        spent = time.perf_counter() - self._began if self._began else 0.0
        return (self.count - 1) / spent if self.count > 1 and spent else 0.0
