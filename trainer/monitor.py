"""Seeing a run: a live line, one line of metrics per step, signals, and a stop when it stalls.

Owns what is measured of a step and how it is shown. Knows nothing about models or batches.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from trainer.run_folder import add_line
from w2c_tui.core.errors import W2CError


class TrainingStopped(W2CError):
    """The run cannot go on: a loss that is no number, nothing to learn from, a stall."""


class Monitor(TrainerCallback):
    """Watches the loop from its callbacks. One per process; the first one writes and shows."""

    def __init__(
        self,
        metrics: Path,
        *,
        world_size: int,
        stall_timeout_s: float,
        step_flops: Callable[[dict[str, int]], float] | None = None,
        device_flops: float | None = None,
    ) -> None:
        self._metrics = metrics
        self._world_size = world_size
        self._step_flops = step_flops
        self._device_flops = device_flops
        self._stall_timeout_s = stall_timeout_s
        self._step_began = self._progress_at = time.perf_counter()
        self._recent: deque[float] = deque(maxlen=50)
        self._shown_at = 0.0
        self._counts: dict[str, int] = {}
        self._data_wait_s = 0.0
        self._records: list[str] = []
        self._watchdog: threading.Thread | None = None
        self._over = threading.Event()
        self.signalled: int | None = None
        """The last signal that asked for a checkpoint."""

    # --- what the loop tells ---------------------------------------------------------------------

    def began_waiting(self) -> None:
        """The loop asks for the samples of the next step."""
        self._step_began = self._progress_at = time.perf_counter()

    def got_samples(self, records: list[str], counts: dict[str, int]) -> None:
        """They are there. `counts`: over all processes."""
        self._progress_at = time.perf_counter()
        self._data_wait_s = self._progress_at - self._step_began
        self._records = records
        self._counts = counts

    # --- signals ---------------------------------------------------------------------------------

    def __enter__(self) -> Monitor:
        """From here on SIGUSR1 asks for a checkpoint, SIGTERM for one and the end."""

        def asked(number: int, frame: FrameType | None) -> None:
            # SIGTERM is not forgotten when a SIGUSR1 follows.
            if self.signalled != signal.SIGTERM:
                self.signalled = number

        self._handlers = {
            number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._over.set()
        if self._shown_at and sys.stderr.isatty():
            sys.stderr.write("\n")

    # --- callbacks -------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress_at = time.perf_counter()
        if self._stall_timeout_s:
            self._watchdog = threading.Thread(target=self._watch, daemon=True)
            self._watchdog.start()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        now = time.perf_counter()
        self._progress_at = now
        step_s = max(now - self._step_began, 1e-9)
        self._recent.append(step_s)
        if not state.is_world_process_zero:
            return
        line: dict[str, Any] = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs["learning_rate"],
            "step_s": round(step_s, 6),
            "data_wait_s": round(self._data_wait_s, 6),
            "memory_bytes": _memory_bytes(),
            **self._counts,
        }
        if self._step_flops is not None and self._counts:
            line["flops_per_s"] = self._step_flops(self._counts) / step_s
        add_line(self._metrics, line)
        self._show(line, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress_at = time.perf_counter()

    # --- showing ---------------------------------------------------------------------------------

    def _show(self, line: dict[str, Any], num_steps: int) -> None:
        live = sys.stderr.isatty()
        last = line["step"] == num_steps
        if not last and time.monotonic() - self._shown_at < (0.2 if live else 10.0):
            return
        self._shown_at = time.monotonic()
        text = self.line(line, num_steps)
        sys.stderr.write(f"\r\x1b[K{text}" if live else f"{text}\n")
        sys.stderr.flush()

    def line(self, line: dict[str, Any], num_steps: int) -> str:
        """One step as a person reads it."""
        step_s = sum(self._recent) / len(self._recent)
        parts = [
            f"step {line['step']}/{num_steps}",
            f"loss {line['loss']:.4f}",
            f"lr {line['learning_rate']:.1e}",
        ]
        if self._counts:
            parts += [
                f"{self._counts['tokens'] / line['step_s']:,.0f} tokens/s",
                f"{self._counts['samples'] / line['step_s'] / self._world_size:.1f} "
                "samples/s per device",
            ]
        if "flops_per_s" in line and self._device_flops:
            share = line["flops_per_s"] / self._world_size / self._device_flops
            parts.append(f"MFU {share:.0%}")
        parts += [
            f"data wait {line['data_wait_s'] / line['step_s']:.1%}",
            f"{line['memory_bytes'] / 2**30:.1f} GiB",
            f"{_duration((num_steps - line['step']) * step_s)} left",
        ]
        return " · ".join(parts)

    # --- stalls ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(min(self._stall_timeout_s / 4, 5.0)):
            idle = time.perf_counter() - self._progress_at
            if idle < self._stall_timeout_s:
                continue
            records = ", ".join(self._records) or "none yet"
            sys.stderr.write(
                f"\nNo step ended for {idle:.0f} s; the run stops. Where every thread stands:\n"
            )
            faulthandler.dump_traceback(file=sys.stderr)
            sys.stderr.write(
                f"Samples of the last step that was loaded here: {records}\n"
                "Look for a picture on a file system that hangs, or a process that is gone; "
                "go on with --resume.\n"
            )
            sys.stderr.flush()
            # The main thread hangs, so nothing softer ends the process.
            os._exit(1)


def _memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
