"""Progress on standard error: bars and a moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType  # noqa: TID251
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.text import Text as Line

from w2c_tui.core.printable import printable


class SafeConsole(Console):
    """Shows what steers a terminal instead of doing it, and reads no markup: what is printed are
    other people's names and messages."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            # Those with `control` are rich's own: they move the cursor of a progress bar.
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


console = SafeConsole(stderr=True)


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
                    TextColumn("{task.description}", markup=False),
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


@contextlib.contextmanager
def counting(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A `report(done, total)` that draws a bar with the time left, or now and then a line."""
    if not console.is_terminal:
        last = 0.0

        def tell(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > 30 or done == total:
                last = time.monotonic()
                console.print(f"{done:,} of {total:,} {unit}")

        yield tell
        return
    columns = [
        TextColumn(unit, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(unit, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """A moving line while something runs, on a terminal."""
    if console.is_terminal:
        with console.status(Line(text)):
            yield
    else:
        yield
