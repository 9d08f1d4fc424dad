"""What the application costs: `python -m tests.bench.bench_tui [NAME...]`.

Each measure starts the real application in a pseudo-terminal of 120 x 40 and reads its processor
time and memory from outside; beside it stands a bare Textual screen, measured the same way in the
same run. The engine is replaced by one that sends prepared pieces, so that only the interface is
measured. Prints one JSON object. Numbers of different machines compare only as ratios: the targets
in seconds are of one where the bare screen takes 0.25 s, and are as much longer here as that is.
"""

from __future__ import annotations

import compileall
import json
import os
import select
import struct
import sys
import tempfile
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent
SIZE = (40, 120)
PAGE = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Shop</title>\n'
    "<style>\n  body { margin: 0; font-family: sans-serif }\n</style>\n</head>\n<body>\n"
    + '<div class="card"><h2>Fresh new layout</h2>\n  <p>We have <b>created</b> it.</p></div>\n'
    * 169
    + "</body>\n</html>\n"
)[:14_000]
TARGETS = {
    "first_paint_cpu_s": 0.45,
    "first_paint_mib": 90,
    "stream_cpu_s": 1.0,
    "echo_p95_ms": 50,
    "open_500_s": 0.5,
    "after_1000_mib": 130,
}
BARE_CPU_S = 0.25
"""On the machine of the targets."""


class Terminal:
    """A process in a pseudo-terminal, and what it has written.

    It has its `own` folders below `folder`, the others are the user's.
    """

    def __init__(
        self, command: list[str], folder: str, own: tuple[str, ...] = ("DATA", "CONFIG", "CACHE")
    ) -> None:
        import fcntl
        import pty
        import termios

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            for name in own:
                os.environ[f"W2C_{name}_DIR"] = f"{folder}/{name.lower()}"
            os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
            time.sleep(0.05)
            os.execvp(command[0], command)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        self.process = psutil.Process(self.pid)
        self.output = b""

    def read(self, wait_s: float) -> bytes:
        found = b""
        if select.select([self.fd], [], [], wait_s)[0]:
            try:
                found = os.read(self.fd, 1 << 20)
            except OSError:
                found = b""
        self.output += found
        return found

    def until(self, mark: bytes, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        start = len(self.output)
        while mark not in self.output[max(0, start - len(mark)) :]:
            self.read(0.02)
            assert time.monotonic() < end, self.output[-2000:]

    def idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.read(0.02)

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def mib(self) -> float:
        return self.process.memory_info().rss / 2**20

    def close(self) -> None:
        self.process.kill()
        os.waitpid(self.pid, 0)
        os.close(self.fd)


def bare() -> dict[str, float]:
    """As `first_paint`, for a Textual screen with nothing in it."""
    return _until_painted("bare", [str(HERE / "bare_screen.py")])


def first_paint() -> dict[str, float]:
    """From the start of the process to the first full frame, the key list at the bottom."""
    return _until_painted("first_paint", ["-m", "w2c_tui"])


def _until_painted(name: str, arguments: list[str]) -> dict[str, float]:
    cpu, mib = [], []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            terminal = Terminal([sys.executable, *arguments], folder)
            terminal.until(b"palette")
            cpu.append(terminal.cpu_s())
            mib.append(terminal.mib())
            terminal.close()
    return {f"{name}_cpu_s": min(cpu), f"{name}_mib": max(mib)}


def _scripted(scenario: str, *arguments: str) -> tuple[Terminal, tempfile.TemporaryDirectory]:
    folder = tempfile.TemporaryDirectory()
    command = [sys.executable, "-m", "tests.bench.scripted_app", scenario, *arguments]
    terminal = Terminal(command, folder.name)
    terminal.until(b"palette")
    terminal.idle(1.0)
    return terminal, folder


def stream() -> dict[str, float]:
    """14,000 characters of HTML in 4-character pieces: as fast as they come, and at 1,000/s."""
    found = {}
    for name, rate in (("stream_burst_cpu_s", "0"), ("stream_cpu_s", "1000")):
        terminal, folder = _scripted("stream", rate)
        before = terminal.cpu_s()
        terminal.type(b"go\r")
        terminal.until(b"tokens, first after")
        terminal.idle(0.3)
        found[name] = terminal.cpu_s() - before
        terminal.close()
        folder.cleanup()
    return found


def echo() -> dict[str, float]:
    """From a key to its echo: at rest, and while 100 pieces come in every second."""
    found = {}
    for name, streaming in (("echo_at_rest", False), ("echo", True)):
        terminal, folder = _scripted("stream", "100")
        if streaming:
            terminal.type(b"go\r")
            terminal.until(b"Writing")
            terminal.idle(1.0)
        waits = []
        for count in range(200):
            # A letter that nothing else on the screen contains.
            mark = b"\xc7" + bytes([0x80 + count % 48])
            terminal.read(0)
            start = len(terminal.output)
            began = time.perf_counter()
            terminal.type(mark)
            while mark not in terminal.output[start:]:
                terminal.read(0.001)
                assert time.perf_counter() - began < 5
            waits.append(1000 * (time.perf_counter() - began))
            terminal.idle(0.05)
        terminal.close()
        folder.cleanup()
        waits.sort()
        found |= {f"{name}_p50_ms": waits[100], f"{name}_p95_ms": waits[190]}
    return found


def opening() -> dict[str, float]:
    """A session of 500 messages, from the key to the last message on the screen."""
    terminal, folder = _scripted("open")
    before = terminal.cpu_s()
    began = time.perf_counter()
    terminal.type(b"\x1b[15;5~")
    terminal.until(b"LASTMESSAGE")
    wall = time.perf_counter() - began
    terminal.idle(0.5)
    found = {"open_500_s": wall, "open_500_cpu_s": terminal.cpu_s() - before}
    before = terminal.cpu_s()
    for _ in range(20):
        terminal.type(b"\x1b[5~")
        terminal.idle(0.1)
    found["page_up_cpu_s"] = (terminal.cpu_s() - before) / 20
    terminal.close()
    folder.cleanup()
    return found


def memory() -> dict[str, float]:
    """1,000 messages with 200 images, sent one after the other."""
    terminal, folder = _scripted("thousand")
    terminal.type(b"\x1b[15;5~")
    began = terminal.cpu_s()
    terminal.until(b"ALLDONE", 600)
    terminal.idle(1.0)
    found = {"after_1000_mib": terminal.mib(), "cpu_of_500_turns_s": terminal.cpu_s() - began}
    terminal.close()
    folder.cleanup()
    return found


def main(names: list[str]) -> int:
    # As pip does where it installs.
    compileall.compile_dir(HERE.parents[1] / "w2c_tui", quiet=1)
    found = bare()
    for measure in (first_paint, stream, echo, opening, memory):
        if not names or measure.__name__ in names:
            found |= measure()
    slower = found["bare_cpu_s"] / BARE_CPU_S
    targets = {
        name: round(most * slower, 3) if name.endswith("_s") else most
        for name, most in TARGETS.items()
        if name in found
    }
    rounded = {name: round(value, 3) for name, value in found.items()}
    missed = [name for name, most in targets.items() if found[name] > most]
    told = {"measured": rounded, "targets": TARGETS, "targets_here": targets, "missed": missed}
    print(json.dumps(told, indent=2))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
