"""What hostile text looks like, and how to see that none of it steered a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

# Sets the window's title, clears the screen (also by the 8-bit sequence), overwrites the line,
# writes backwards, puts text on the clipboard, asks the terminal for an answer.
EVIL = (
    "\x1b]0;OWNED\x07\x1b[2J\x9b2J\rover\u202egnp.\x7f\x08\x1b]52;c;T1dORUQ=\x07\x1b[6n\x1bP1;OWNED"
)
EVIL_NAME = EVIL.replace("/", "_")
COMMAND = [sys.executable, "-m", "w2c_tui.cli"]

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")
# What our own programs say to a terminal: colours, the cursor, modes, what Textual asks once.
_OWN = re.compile(
    r"\x1b\[[0-9;:?<=>]*[ABCDGHJKmhlnqrtu](?<!\x1b\[2J)(?<!\x1b\[6n)|\x1b\[\?[0-9;$]*[pc]"
    r"|\x1b\]8;[^\x07\x1b]*\x1b\\|\x1b\]22;[a-z]*\x07|\x1b[=>78]|\x1b\[c|\x1b\[>[0-9]*q|\r"
)


def assert_harmless(output: str, *, terminal: bool) -> None:
    """Nothing in `output` steers: on a pipe nothing at all, on a terminal only what is ours."""
    rest = _OWN.sub("", output) if terminal else output
    found = _UNSAFE.search(rest)
    around = rest[max(0, found.start() - 60) : found.end() + 60] if found else ""
    assert found is None, f"{found[0]!r} reached the terminal: {around!r}"


def piped(*arguments: object, stdin: str = "", **environment: str) -> tuple[str, int]:
    """What a command writes to pipes, both of them, and its status."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin.encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
        env=os.environ | environment,
        check=False,
    )
    return done.stdout.decode(), done.returncode


class Terminal:
    """A program on a pseudo terminal; all that it writes is kept."""

    def __init__(self, command: list[str], size: tuple[int, int] = (120, 40)) -> None:
        self.written = ""
        self._raw = b""
        self._main, side = pty.openpty()
        ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        # What is typed is not ours to judge.
        attributes = termios.tcgetattr(side)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(side, termios.TCSANOW, attributes)
        self.process = subprocess.Popen(
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
        )
        os.close(side)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._main)

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def read(self, seconds: float = 0.1) -> bool:
        """Take what comes within `seconds`; False at the end."""
        ready, _, _ = select.select([self._main], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self._main, 65536)
        except OSError:
            return False
        self._raw += data
        self.written = self._raw.decode("utf-8", "replace")
        return bool(data)

    def until(self, text: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.plain():
            assert self.read(), f"it ended without {text!r}: {self.written[-2000:]!r}"
            assert time.monotonic() < deadline, f"no {text!r} in {self.plain()[-3000:]!r}"

    def plain(self) -> str:
        """What was written, without our own sequences."""
        return _OWN.sub("", self.written)

    def to_the_end(self, timeout_s: float = 200) -> int:
        deadline = time.monotonic() + timeout_s
        while self.read():
            assert time.monotonic() < deadline, f"it does not end: {self.written[-2000:]!r}"
        return self.process.wait(timeout=30)


def on_terminal(*arguments: object) -> tuple[str, int]:
    """What a command writes to a terminal, and its status."""
    with Terminal([*COMMAND, *map(str, arguments)]) as terminal:
        status = terminal.to_the_end()
        return terminal.written, status
