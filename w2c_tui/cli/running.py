"""What commands that run a model share: loading it, attaching images, showing progress.

Progress goes to standard error: bars and a moving line on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from w2c_tui.backends.base import ModelInfo
from w2c_tui.core.config import Settings, paths
from w2c_tui.core.conversation import Attachment
from w2c_tui.core.printable import printable
from w2c_tui.core.reference import load_attachment
from w2c_tui.engine.client import EngineClient

console = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def loaded_engine(settings: Settings) -> Iterator[tuple[EngineClient, ModelInfo]]:
    """An engine with the model of `settings`, closed at the end."""
    with EngineClient(paths().engine_log) as engine:
        yield engine, load_model(engine, settings)


def load_model(engine: EngineClient, settings: Settings) -> ModelInfo:
    """Load the model of `settings`, with progress; says what was loaded."""
    with loading_progress() as report:
        info = engine.load(settings.model, report)
    console.print(
        f"[bold]{escape(printable(info.name))}[/] {describe(info)}, "
        f"loaded in {info.load_time_s:.1f} s",
        soft_wrap=True,
    )
    return info


def describe(info: ModelInfo) -> str:
    """One line about a loaded model."""
    bits = info.dtype if info.quantization == "none" else f"{info.quantization}, {info.dtype}"
    sees = "reads images" if info.reads_images else "reads text only"
    size = f"{info.num_parameters / 1e6:,.0f}M parameters"
    return f"({size}, {bits} on {', '.join(info.devices)}, {sees})"


@contextlib.contextmanager
def loading_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A `report(phase, done, total)` that draws one bar per phase."""
    if not console.is_terminal:
        seen: set[str] = set()

        def tell(phase: str, done: int, total: int) -> None:
            if phase not in seen:
                seen.add(phase)
                console.print(f"{phase} ...")

        yield tell
        return
    with contextlib.ExitStack() as stack:
        bars: dict[str, tuple[Progress, object]] = {}

        def draw(phase: str, done: int, total: int) -> None:
            if phase not in bars:
                for progress, _task in bars.values():
                    progress.stop()
                bars.clear()
                columns = [
                    TextColumn("{task.description}"),
                    BarColumn(),
                    *(
                        (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
                        if total > 1_000_000
                        else (MofNCompleteColumn(),)
                    ),
                ]
                progress = stack.enter_context(Progress(*columns, console=console, transient=True))
                bars[phase] = progress, progress.add_task(phase, total=total or None)
            progress, task = bars[phase]
            progress.update(task, completed=done, total=total or None)  # type: ignore[arg-type]

        yield draw


def attach(reference: str, settings: Settings, engine: EngineClient, info: ModelInfo) -> Attachment:
    """The image at `reference`, with its text read off where the settings or the model ask."""
    image = load_attachment(reference, settings.images)
    if settings.ocr == "off" or (settings.ocr == "auto" and info.reads_images):
        return image
    return with_page_text(image, engine)


def with_page_text(image: Attachment, engine: EngineClient) -> Attachment:
    """`image` with the text that recognition finds on it."""
    import msgspec

    with status(f"Reading the text of {image.name}"):
        lines = engine.read_text(image)
    return msgspec.structs.replace(image, page_text=lines)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """A moving line while something runs, on a terminal."""
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        yield


@contextlib.contextmanager
def interrupt_cancels(engine: EngineClient) -> Iterator[threading.Event]:
    """The first Ctrl-C cancels the running answer, the second one ends the program."""
    pressed = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        engine.cancel()

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


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


def write_result(text: str) -> None:
    """To standard output as UTF-8, whatever the locale says."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()
