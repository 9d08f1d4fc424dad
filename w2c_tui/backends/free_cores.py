"""How many threads compute fastest beside what else the machine is doing.

Threads that share one operation wait for the slowest of them: with one more busy process than there
are cores, each waits for a turn of the scheduler at every operation, and all of them together are
slower than one. Knows nothing about what is computed.
"""

from __future__ import annotations

import time

import psutil

LOOK_EVERY_S = 0.5
_TOO_OLD_S = 5.0


class FreeCores:
    """The number of threads to use, at most `most`, looked up again twice a second while in use."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._threads = most
        self._process = psutil.Process()
        self._cores = psutil.cpu_count() or 1
        self._seen = self._look()

    def threads(self) -> int:
        """How many of the cores were left by other processes just now; at least 1."""
        spent = time.monotonic() - self._seen[0]
        if spent < LOOK_EVERY_S:
            return self._threads
        before, self._seen = self._seen, self._look()
        # What was long ago says nothing about now.
        if spent <= _TOO_OLD_S:
            seconds, busy, own = (now - then for now, then in zip(self._seen, before, strict=True))
            others = max(busy - own, 0.0) / seconds
            self._threads = min(max(round(self._cores - others), 1), self.most)
        return self._threads

    def _look(self) -> tuple[float, float, float]:
        """The clock, and CPU seconds so far: of the whole machine, and of this process."""
        system = psutil.cpu_times()
        # On Linux `user` holds `guest` already.
        passive = ("idle", "iowait", "guest", "guest_nice")
        busy = sum(value for name, value in system._asdict().items() if name not in passive)
        own = self._process.cpu_times()
        return time.monotonic(), busy, own.user + own.system
