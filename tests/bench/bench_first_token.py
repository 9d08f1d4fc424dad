"""From a picture to the first token: `python -m tests.bench.bench_first_token`.

Starts the real application with w2c-nano in a pseudo-terminal, attaches the example by its key,
sends it after `--wait` seconds (0: at once), and looks at the clock: when its text was recognised,
when the page's first characters stand on the screen, and how long that was after sending. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time

from tests.bench.bench_tui import Terminal

ATTACH, SEND = b"\x1b[15~", b"\r"


def once(wait_s: float) -> dict[str, float]:
    """Seconds of one start of the application."""
    with tempfile.TemporaryDirectory() as folder:
        # The model's files are the user's: making them is not what is measured.
        terminal = Terminal([sys.executable, "-m", "w2c_tui"], folder, own=("DATA", "CONFIG"))
        terminal.until(b"context 0/", 600)
        # The time that it takes to find a picture.
        terminal.idle(5)
        began = time.perf_counter()
        terminal.type(ATTACH)
        found: dict[str, float] = {}
        if wait_s:
            terminal.until(b"reads it ahead")
            found["attached to recognised"] = time.perf_counter() - began
            terminal.idle(began + wait_s - time.perf_counter())
        else:
            terminal.until(b"[Image #1]")
        sent = time.perf_counter()
        terminal.type(SEND)
        terminal.until(b"DOCTYPE")
        now = time.perf_counter()
        terminal.close()
        return found | {"attached to first token": now - began, "sent to first token": now - sent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wait", type=float, default=10.0, help="Seconds from attaching to Enter.")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    for wait_s in (0.0, given.wait):
        runs = [once(wait_s) for _ in range(given.runs)]
        print(f"sent {wait_s:g} s after attaching" if wait_s else "sent at once")
        for name in runs[0]:
            values = [run[name] for run in runs]
            print(f"  {name:<26}{statistics.median(values):.2f} s")


if __name__ == "__main__":
    main()
