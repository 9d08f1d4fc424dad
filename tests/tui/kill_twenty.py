"""Starts the application twenty times and kills it with signal 9 while an answer comes in.

`python -m tests.tui.kill_twenty SEED` prints one JSON line per kill: the question, and how many
pieces were on the screen a second before. The imports are shared by forking, which is what makes
twenty starts cheap.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import re
import select
import signal
import struct
import sys
import termios
import time

import w2c_tui.tui.chat_screen
import w2c_tui.tui.message_view
from tests.tui.scripted import ScriptedEngine
from w2c_tui.core.config import Settings, paths
from w2c_tui.core.store import Store
from w2c_tui.tui.app import W2CApp

NUM_KILLS = 20
PIECES_PER_S = 150
TEXT = "".join(f"{number:03d} " for number in range(1000))
_progress = re.compile(rb"Writing: ([\d,]+)")


def run_application() -> None:
    with Store.open(paths().sessions) as store:
        engine = ScriptedEngine(TEXT, PIECES_PER_S)
        W2CApp(Settings(ocr="off"), paths(), store, engine=engine).run()


def kill_once(question: str, after_s: float) -> dict[str, object]:
    """Ask `question`, kill `after_s` after the answer began, and say what was shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color"}
        run_application()
        os._exit(0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    output = b""
    shown: list[tuple[float, int]] = []
    asked = False
    end = time.monotonic() + 60
    while not shown or time.monotonic() < shown[0][0] + after_s:
        assert time.monotonic() < end, output[-2000:]
        if select.select([terminal], [], [], 0.02)[0]:
            output += os.read(terminal, 1 << 16)
        if not asked and b"palette" in output:
            os.write(terminal, question.encode() + b"\r")
            asked, output = True, b""
        if asked and (found := _progress.findall(output)):
            shown.append((time.monotonic(), int(found[-1].replace(b",", b""))))
            output = output[-20:]
    os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    os.waitpid(pid, 0)
    os.close(terminal)
    before = [count for moment, count in shown if moment <= killed_at - 1.0]
    return {"question": question, "num_shown": max(before, default=0)}


def main() -> None:
    rng = random.Random(int(sys.argv[1]))
    for number in range(NUM_KILLS):
        print(json.dumps(kill_once(f"Question {number}", rng.uniform(0.2, 1.6))), flush=True)


if __name__ == "__main__":
    assert w2c_tui.tui.chat_screen
    assert w2c_tui.tui.message_view
    main()
