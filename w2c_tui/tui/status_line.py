"""What is known about the model at a glance, and what is wrong with it.

Owns the line at the bottom and the notice above the prompt. Knows nothing about sessions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.content import Content
from textual.widgets import Static

from w2c_tui.core.config import GenerationParams
from w2c_tui.core.printable import printable
from w2c_tui.core.store import StoredMessage

if TYPE_CHECKING:
    from w2c_tui.tui.app import W2CApp


class StatusLine(Static):
    """Model, context, speed and memory; what fits the width, the most important first."""

    app: W2CApp

    def __init__(self) -> None:
        super().__init__(id="status", markup=False)
        self._parts: list[str] = []
        self._memory = ""

    def on_mount(self) -> None:
        self.set_interval(2.0, self._measure)

    def _measure(self) -> None:
        """The engine's resident memory."""
        pid = self.app.engine.pid
        memory = ""
        if pid is not None:
            import psutil

            try:
                memory = f"engine {amount(psutil.Process(pid).memory_info().rss)}"
            except psutil.Error:
                memory = ""
        if memory != self._memory:
            self._memory = memory
            self._draw()

    def tell(
        self,
        messages: Sequence[StoredMessage],
        params: GenerationParams,
        *,
        latest_only: bool = False,
    ) -> None:
        """`messages` are the branch in sight: its last answer has the numbers."""
        app = self.app
        info = app.info
        parts: list[str] = []
        if info is not None:
            bits = info.dtype if info.quantization == "none" else info.quantization
            parts.append(f"{short_name(info.name)} {bits} {','.join(info.devices)}")
        elif app.model_state == "loading":
            parts.append(f"{short_name(app.spec.name)}: loading")
        else:
            parts.append("no model loaded (Ctrl+O)")
        stats = next((m.stats for m in reversed(messages) if m.stats), None)
        if stats:
            used, length = stats["context_used"], stats["context_length"]
            parts.append(f"context {used:,}/{length:,} ({100 * used // max(length, 1)}%)")
            if latest_only:
                parts.append("latest page only")
            parts.append(f"{stats['tokens_per_s']:.0f} tokens/s")
            parts.append(f"first {stats['time_to_first_token_s']:.1f} s")
        elif info is not None:
            parts.append(f"context 0/{info.context_length:,}")
        self._parts = parts
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        parts = [*self._parts[:2], *filter(None, [self._memory]), *self._parts[2:]]
        separator = " | " if self.app.plain else " │ "
        while len(parts) > 1 and len(separator.join(parts)) > self.size.width - 2 > 0:
            parts.pop()
        self.update(printable(separator.join(parts)), layout=False)


class Notice(Static):
    """Loading with its progress, or why there is no model and what can be done."""

    app: W2CApp

    def __init__(self) -> None:
        super().__init__(id="notice", markup=False)

    def on_mount(self) -> None:
        self.tell()

    def tell(self) -> None:
        """Show how it stands with the model; nothing when all is well."""
        app = self.app
        error = app.model_error if app.model_state == "failed" else None
        self.display = app.model_state == "loading" or error is not None
        self.set_class(error is not None, "-failed")
        if error is not None:
            ways = Content.from_markup(
                "[@click=screen.retry]Try again[/]   [@click=screen.model]Choose a model[/] (^o)"
            )
            self.update(Content.assemble(f"No model: {printable(str(error))}\n", ways))
        elif self.display:
            self.update(f"{short_name(app.spec.name)}: {progress(app, self.size.width - 4)}")


def progress(app: W2CApp, width: int) -> str:
    """The progress of loading in words and, where its end is known, as a bar and time left."""
    phase, done, total = app.progress
    text = printable(phase)
    if total > 1_000_000:
        text += f", {amount(done)} of {amount(total)}"
    if not total:
        return f"{text} …"
    share = min(1.0, done / total)
    spent = time.monotonic() - app.phase_began
    left = spent * (1 - share) / share if share else 0.0
    room = max(0, min(30, width - len(text) - 20))
    full, empty = ("#", "-") if app.plain else ("█", "░")
    bar = full * round(room * share) + empty * (room - round(room * share))
    return f"{text}  {bar} {share:.0%}" + (f", {left:.0f} s left" if left > 2 else "")


def short_name(name: str) -> str:
    """The last part of a path; other names as they are."""
    return printable(name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or name)


def amount(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
