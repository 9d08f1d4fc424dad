"""The application in a terminal under everything that goes wrong, for as long as one likes.

    python -m tests.bench.soak --minutes 30 [--seed N]

Types and pastes into the real application with a small real model: questions, good and broken
pictures, cancelling, editing, deleting, other sessions. In between the engine is killed, the
application is killed, the disk is filled (a small tmpfs, where one may be mounted), the session
file is overwritten in places and the model's files are removed while it runs. What is finished is
read off the database by SQLite alone as soon as it is there, and must be there at the end; no
process and no temporary file may be left, and memory must be flat. Prints figures as JSON;
exit status 1: something was lost or left.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import psutil

from tests.backends.contract import picture
from tests.bench.bench_tui import Terminal
from w2c_tui.core.errors import StoreError
from w2c_tui.core.store import Store

PAGE_BYTES = 4096
DISK_MIB = 48
MOST_GROWTH_MIB = {"application": 30.0, "engine": 30.0}
"""Since it had warmed up; what is on the screen and what is in its cache may take this much."""
ENTER, ESCAPE, NEW, QUIT, RETRY, UNDO = b"\r", b"\x1b", b"\x0e", b"\x11", b"\x12", b"\x1bz"
MESSAGES, EXAMPLE, UP = b"\x1b[17~", b"\x1b[15~", b"\x1b[A"
_ESCAPES = re.compile(rb"\x1b\[[0-9;?<>=]*[a-zA-Z]|\x1b.")
_KEPT = re.compile(
    r"sessions\.sqlite(-wal|-shm|\.locks/open)?|sessions-damaged-[\w-]+\.sqlite(-wal|-shm)?"
    r"|interface\.json|logs/(engine|app)\.log(\.1)?"
    r"|pages/\w+/(versions\.json|v\d+/(index\.html|meta\.json|original\.\w+|render\.png))"
)
"""What may be in the data folder when nothing runs."""


TOLD_TO_RESTART = "The file is damaged. Restart"
"""Logged where damage is met that opening the sessions did not meet."""


class Failed(Exception):
    """The application did not do what it must."""


class Soak:
    """One application after another on one data folder, and what has become of its messages."""

    def __init__(self, folder: Path, model: Path, seed: int) -> None:
        self.folder, self.data = folder, folder / "data"
        self.model, self.spare = folder / "model", model
        self.random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.finished: dict[int, tuple[str, int]] = {}
        """Text and number of pictures of each message, by its id."""
        self.growth: dict[str, list[float]] = {"application": [], "engine": []}
        self.problems: list[str] = []
        self.full_disk = False
        self._number = 0
        self._log_read = 0
        self._first_mib: dict[str, tuple[int, float]] = {}
        self.pictures = self._save_pictures()
        self.restore_model()
        self.start()

    def _save_pictures(self) -> dict[str, list[Path]]:
        folder = self.folder / "pictures"
        folder.mkdir()
        good = picture("red", (320, 200)).data
        broken = {
            "noise.png": self.random.randbytes(3000),
            "cut.png": good[: len(good) // 2],
            "empty.png": b"",
            "words.jpg": b"<html>no picture</html>",
            # 60,000 pixels squared, as its head says.
            "bomb.png": good[:16] + (60_000).to_bytes(4, "big") * 2 + good[24:],
        }
        found: dict[str, list[Path]] = {"good": [], "broken": [folder / "missing.png"]}
        for color in ("red", "green", "blue"):
            path = folder / f"{color} shot.png"
            path.write_bytes(picture(color, (320, 200)).data)
            found["good"].append(path)
        for name, data in broken.items():
            (folder / name).write_bytes(data)
            found["broken"].append(folder / name)
        return found

    # --- the application ---------------------------------------------------------------------

    def start(self) -> None:
        file = next(f for f in sorted(self.spare.iterdir()) if "mmproj" not in f.name)
        command = [sys.executable, "-m", "w2c_tui", "--model", str(self.model / file.name)]
        command += ["--threads", "1", "--context", "1024", "--no-ocr", "--temperature", "1"]
        command += ["--max-new-tokens", "300"]
        self.terminal = Terminal(command, str(self.folder))
        self._first_mib.clear()
        self.acts_in_this_life = 0
        self.counts["starts"] += 1
        self.until(lambda: b"palette" in self.terminal.output[-60_000:], "the first frame")
        self.until(lambda: self.engine() is not None, "the engine")
        self.idle(1.0)

    def engine(self) -> psutil.Process | None:
        with contextlib.suppress(psutil.Error):
            for child in self.terminal.process.children():
                if "w2c_tui.engine.child" in child.cmdline():
                    return child
        return None

    def idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.terminal.read(0.02)
        self.terminal.output = self.terminal.output[-200_000:]
        if os.waitpid(self.terminal.pid, os.WNOHANG)[0]:
            self.fail("the application ended by itself")

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                self.fail(f"waited {timeout_s:.0f} s for {what}")
            self.idle(0.1)

    def fail(self, what: str) -> NoReturn:
        shown = _ESCAPES.sub(b" ", self.terminal.output[-6000:]).decode(errors="replace")
        raise Failed(f"{what}; shown last: {' '.join(shown.split())[-1500:]}")

    def type(self, *keys: bytes) -> None:
        for key in keys:
            self.terminal.type(key)
            # An escape that is followed at once would be read as Alt.
            self.idle(0.3 if key.startswith(b"\x1b") else 0.1)

    def kill(self) -> None:
        engine = self.engine()
        self.terminal.close()
        end = time.monotonic() + 10
        while engine is not None and engine.is_running() and time.monotonic() < end:
            time.sleep(0.05)
        self.look_for_processes("after the application was killed")

    def quit(self) -> None:
        self.type(ESCAPE, ESCAPE, QUIT)
        end = time.monotonic() + 30
        while not os.waitpid(self.terminal.pid, os.WNOHANG)[0]:
            self.terminal.read(0.05)
            if time.monotonic() > end:
                self.fail("the application does not end")
        os.close(self.terminal.fd)
        self.look_for_processes("after the application was left")

    def look_for_processes(self, when: str) -> None:
        left = [process for process in psutil.process_iter() if self._is_ours(process)]
        if left:
            self.problems.append(f"{when} there was still {[p.pid for p in left]}")
            for process in left:
                process.kill()

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return (
                process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get("W2C_DATA_DIR") == str(self.data)
            )
        return False

    # --- what is in the database ---------------------------------------------------------------

    def rows(self) -> list[tuple[int, str, str, str, float | None, int]]:
        """Id, role, status, text, when it was deleted, number of pictures: by SQLite alone."""
        query = (
            "SELECT id, role, status, text, deleted_at,"
            " (SELECT count(*) FROM attachments WHERE message_id = messages.id) FROM messages"
        )
        path = f"file:{self.data / 'sessions.sqlite'}?mode=ro"
        with contextlib.closing(sqlite3.connect(path, uri=True, timeout=10)) as connection:
            return connection.execute(query).fetchall()

    def note(self) -> None:
        """Remember what is finished; what the user deleted may go."""
        for ident, _, status, text, deleted_at, num_pictures in self.rows():
            if deleted_at is not None:
                self.finished.pop(ident, None)
            elif status != "streaming":
                self.finished[ident] = (text, num_pictures)

    def settle(self) -> None:
        """Wait until nothing is being written, and note what is finished."""
        self.until(lambda: all(row[2] != "streaming" for row in self.rows()), "the answer's end")
        self.idle(0.2)
        self.note()

    def check_messages(self, overwritten: bytes = b"") -> None:
        """Every finished message is there; not those that stood on a page that was overwritten."""
        found: dict[int, tuple[str, int]] = {}
        # Damage that is met while reading is put right by opening again, as the message says.
        for _ in range(3):
            found.clear()
            with (
                contextlib.suppress(StoreError),
                Store.open(self.data / "sessions.sqlite") as store,
            ):
                if store.recovery is not None:
                    self.counts["recoveries"] += 1
                    if not store.recovery.moved_to.exists():
                        self.problems.append("a damaged database is not where the message says")
                for session in store.sessions():
                    for message in store.tree(session.id):
                        found[message.id] = (message.text, len(message.attachments))
                break
        for ident, (text, num_pictures) in list(self.finished.items()):
            is_text, is_pictures = found.get(ident, (None, 0))
            if is_text is not None and is_text.startswith(text) and is_pictures >= num_pictures:
                continue
            del self.finished[ident]
            if overwritten:
                self.counts["messages on overwritten pages"] += 1
            else:
                self.problems.append(f"message {ident} is lost: {text[:60]!r}, now {is_text!r:.60}")

    # --- what is done to it ----------------------------------------------------------------------

    def question(self) -> bytes:
        self._number += 1
        return f"Question {self._number} ".encode()

    def paste(self, path: Path) -> None:
        self.type(b"\x1b[200~" + f"'{path}'".encode() + b"\x1b[201~")
        self.idle(0.4)

    def ask(self) -> None:
        before = len(self.rows())
        self.type(self.question(), ENTER)
        with contextlib.suppress(Failed):
            self.until(lambda: len(self.rows()) > before, "the question", 15)
            self.counts["asked"] += 1

    def do_ask(self) -> None:
        self.ask()

    def do_ask_about_a_picture(self) -> None:
        self.paste(self.random.choice(self.pictures["good"]))
        self.ask()

    def do_attach_a_broken_picture(self) -> None:
        self.paste(self.random.choice(self.pictures["broken"]))
        self.ask()

    def do_ask_about_the_example(self) -> None:
        self.type(EXAMPLE)
        self.idle(0.5)
        self.ask()

    def do_cancel(self) -> None:
        self.ask()
        self.idle(self.random.uniform(0, 0.5))
        self.type(ESCAPE)

    def do_edit_a_question(self) -> None:
        self.type(MESSAGES, UP, b"e", self.question(), ENTER)
        self.idle(0.5)

    def do_regenerate(self) -> None:
        self.type(RETRY)

    def do_continue(self) -> None:
        self.type(MESSAGES, b"n", ESCAPE)

    def do_delete_and_undo(self) -> None:
        self.type(MESSAGES, b"d")
        if self.random.random() < 0.5:
            self.type(UNDO)
        self.type(ESCAPE)

    def do_fork(self) -> None:
        self.type(MESSAGES, b"f", ESCAPE)

    def do_begin_a_session(self) -> None:
        self.type(NEW)

    def do_kill_the_engine(self) -> None:
        self.ask()
        self.idle(self.random.uniform(0, 0.3))
        if (engine := self.engine()) is not None:
            engine.kill()
        self.settle()
        self.ask()
        self.settle()
        if self.engine() is None:
            self.fail("the engine was killed and a question starts no new one")

    def do_kill_the_application(self) -> None:
        self.ask()
        self.idle(self.random.uniform(0, 1.0))
        self.note()
        self.kill()
        self.start()

    def do_leave_and_return(self) -> None:
        self.quit()
        self.check_messages()
        self.start()

    def do_fill_the_disk(self) -> None:
        if not self.full_disk:
            return
        ballast = self.data / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(PAGE_BYTES))
        self.type(self.question(), ENTER)
        self.idle(2.0)
        self.paste(self.random.choice(self.pictures["good"]))
        self.type(ENTER)
        self.idle(1.0)
        if self.random.random() < 0.3:
            self.kill()
            ballast.unlink()
            self.start()
        ballast.unlink(missing_ok=True)
        self.settle()
        before = len(self.rows())
        self.ask()
        if len(self.rows()) <= before:
            self.fail("there is space again, and a question is not taken")

    def do_overwrite_the_session_file(self) -> None:
        first = not self.counts["recoveries"] or self.random.random() < 0.5
        # What a kill leaves in the log would stand in for the beginning of the file.
        self.quit() if first or self.random.random() < 0.5 else self.kill()
        path = self.data / "sessions.sqlite"
        content = bytearray(path.read_bytes())
        num_pages = len(content) // PAGE_BYTES
        page = 0 if first else self.random.randrange(1, num_pages)
        place = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
        overwritten = bytes(content[place]) if page else b""
        content[place] = self.random.randbytes(PAGE_BYTES)
        path.write_bytes(content)
        self.check_messages(overwritten)
        self.start()

    def do_remove_the_model(self) -> None:
        shutil.rmtree(self.model)
        self.ask()
        self.settle()
        if (engine := self.engine()) is not None:
            engine.kill()
        self.ask()
        self.settle()
        self.restore_model()
        self.ask()
        self.settle()
        if self.engine() is None:
            self.fail("the model is back, and a question does not load it")

    def restore_model(self) -> None:
        shutil.copytree(self.spare, self.model)

    # --- the whole -------------------------------------------------------------------------------

    def run(self, minutes: float) -> None:
        gentle = [
            *[self.do_ask] * 4,
            *[self.do_ask_about_a_picture] * 3,
            *[self.do_attach_a_broken_picture] * 2,
            *[self.do_cancel] * 3,
            *[self.do_edit_a_question] * 2,
            self.do_ask_about_the_example,
            self.do_regenerate,
            self.do_continue,
            self.do_delete_and_undo,
            self.do_fork,
            self.do_begin_a_session,
        ]
        harsh = [
            self.do_kill_the_engine,
            self.do_kill_the_application,
            self.do_leave_and_return,
            self.do_fill_the_disk,
            self.do_overwrite_the_session_file,
            self.do_remove_the_model,
        ]
        began = time.monotonic()
        waiting: list[Callable[[], None]] = []
        while time.monotonic() - began < 60 * minutes:
            for _ in range(self.random.randint(4, 12)):
                self.act(self.random.choice(gentle))
            waiting = waiting or self.random.sample(harsh, len(harsh))
            self.act(waiting.pop())
        self.quit()
        self.check_messages()

    def act(self, act: Callable[[], None]) -> None:
        name = act.__name__.removeprefix("do_").replace("_", " ")
        self.counts[name] += 1
        self._new_log()
        try:
            # Wherever the last act left the focus: to the prompt.
            self.type(ESCAPE, ESCAPE)
            act()
            self.settle()
            self.measure()
        except Failed as failure:
            log = self._new_log()
            if TOLD_TO_RESTART not in log or not self.terminal.process.is_running():
                self.problems.append(f"{name}: {failure}\n{log[-3000:]}")
            with contextlib.suppress(OSError, psutil.Error):
                self.kill()
            self.start()
        else:
            log = self._new_log()
            if TOLD_TO_RESTART in log:
                self.quit()
                self.start()
        self.counts["restarts as the message says"] += TOLD_TO_RESTART in log

    def _new_log(self) -> str:
        """What the application has logged since the last call."""
        path = self.data / "logs" / "app.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        # It is begun anew when it is long.
        new = text[self._log_read :] if self._log_read <= len(text) else text
        self._log_read = len(text)
        return new

    def measure(self) -> None:
        """How much more memory each process has than when it had warmed up."""
        self.acts_in_this_life += 1
        for name, process in (("application", self.terminal.process), ("engine", self.engine())):
            if process is None:
                continue
            with contextlib.suppress(psutil.Error):
                mib = process.memory_info().rss / 2**20
                pid, first = self._first_mib.get(name, (0, 0.0))
                if pid != process.pid or self.acts_in_this_life <= 8:
                    self._first_mib[name] = (process.pid, mib)
                else:
                    self.growth[name].append(mib - first)
                self.counts[f"most MiB of the {name}"] = max(
                    self.counts[f"most MiB of the {name}"], round(mib)
                )

    def finish(self) -> None:
        """What is left, now that nothing runs."""
        self.look_for_processes("at the end")
        for file in sorted(self.data.rglob("*")):
            name = str(file.relative_to(self.data))
            if file.is_file() and not _KEPT.fullmatch(name):
                self.problems.append(f"{name} is left in the data folder")
        for file in (self.folder / "tmp").iterdir():
            self.problems.append(f"{file.name} is left in the temporary folder")
        for name, values in self.growth.items():
            if values and max(values) > MOST_GROWTH_MIB[name]:
                self.problems.append(f"the {name} grew by {max(values):.0f} MiB")
        if not self.counts["recoveries"]:
            self.problems.append("no damaged database was recovered")
        if not any(num_pictures for _, num_pictures in self.finished.values()):
            self.problems.append("no message has a picture")


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[bool]:
    """A tmpfs at `path`; False, and a plain folder, where none may be mounted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)


def save_model(folder: Path) -> Path:
    """A tiny LLaVA with random weights as GGUF files, which load in a moment."""
    from tests.tiny import save_llava
    from w2c_tui.core.config import ExportSpec
    from w2c_tui.export.gguf_export import export

    source = save_llava(folder / "checkpoint")
    out = folder / "spare"
    export(str(source), out, ExportSpec(quant="f16", verify=False), lambda *_: None, name="tiny")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("W2C_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="w2c-soak-") as scratch:
        folder = Path(scratch)
        model = save_model(folder)
        (folder / "tmp").mkdir()
        os.environ |= {"TMPDIR": str(folder / "tmp"), "W2C_INTERFACE_PICTURES": "half-cells"}
        # A message may be opened in the user's editor; this one changes nothing.
        os.environ["VISUAL"] = "true"
        with small_disk(folder / "data") as mounted:
            soak = Soak(folder, model, given.seed)
            soak.full_disk = mounted
            try:
                soak.run(given.minutes)
                soak.finish()
            finally:
                for process in psutil.process_iter():
                    if soak._is_ours(process):
                        process.kill()
            figures = {
                "minutes": given.minutes,
                "seed": given.seed,
                "disk": f"tmpfs of {DISK_MIB} MiB" if mounted else "skipped: no tmpfs allowed here",
                "counts": dict(sorted(soak.counts.items())),
                "finished messages": len(soak.finished),
                "most growth, MiB": {
                    k: round(max(v, default=0), 1) for k, v in soak.growth.items()
                },
                "problems": soak.problems,
            }
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
