"""The installed command in a real terminal (tmux): what a user does from start to resuming."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from tests.tui.kill_twenty import NUM_KILLS, TEXT
from w2c_tui.core.config import paths
from w2c_tui.core.store import Store

COMMAND = [sys.executable, "-m", "w2c_tui"]


def test_the_help_is_quick_and_loads_no_terminal_library(own_folders):
    script = (
        "import sys, time; sys.argv = ['w2c-tui', '--help']\n"
        "from w2c_tui.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'textual', 'torch', 'transformers', 'PIL.Image', 'numpy'} & set(sys.modules)\n"
        "print(heavy, time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "--image" in done.stdout
    assert "--temperature" in done.stdout
    heavy, _, seconds = done.stderr.strip().rpartition(" ")
    assert heavy == "set()"
    assert float(seconds) < 0.3


def test_the_application_imports_no_backend(own_folders):
    script = (
        "import sys, w2c_tui.tui.chat_screen, w2c_tui.tui.message_view, w2c_tui.tui.model_screen\n"
        "import w2c_tui.tui.picture_pane, w2c_tui.tui.settings_panel, w2c_tui.tui.sidebar\n"
        "print({'torch', 'transformers', 'llama_cpp', 'w2c_tui.backends.hf'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--temperature", "-1"], 1, "temperature"),
        (["--session", "x", "--new"], 2, "exclude"),
        ([], 2, "needs a terminal"),
    ],
)
def test_errors_before_the_start_are_said_on_standard_error(own_folders, arguments, status, said):
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, input="")
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr


class Tmux:
    """One window of a tmux server of its own."""

    def __init__(self, width: int, height: int, command: str) -> None:
        self.socket = f"w2c-{uuid.uuid4().hex[:8]}"
        self._run("new-session", "-d", "-x", str(width), "-y", str(height), command)

    def _run(self, *arguments: str) -> str:
        command = ["tmux", "-L", self.socket, "-f", os.devnull, *arguments]
        # Not as it is inherited: readline puts the size of pytest's own terminal there, unseen.
        env = dict(os.environ)
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        return done.stdout

    def screen(self) -> str:
        return self._run("capture-pane", "-p")

    def keys(self, *keys: str) -> None:
        self._run("send-keys", *keys)

    def paste(self, text: str) -> None:
        self._run("set-buffer", text)
        self._run("paste-buffer", "-p")

    def until(self, text: str, timeout_s: float = 60) -> str:
        end = time.monotonic() + timeout_s
        while text not in (shown := self.screen()):
            assert time.monotonic() < end, f"{text!r} is not on the screen:\n{shown}"
            time.sleep(0.05)
        return shown

    def application(self) -> psutil.Process:
        shell = psutil.Process(int(self._run("display-message", "-p", "#{pane_pid}")))
        return next(p for p in shell.children() if "w2c_tui" in p.cmdline())

    def close(self) -> None:
        subprocess.run(["tmux", "-L", self.socket, "kill-server"], check=False)


@pytest.fixture
def terminal(own_folders, slow_llama):
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    opened = []

    def start(*arguments, size=(100, 30), command=COMMAND):
        flags = (
            f"--model {shlex.quote(str(slow_llama))} --dtype float32 --device-map cpu --threads 1 "
            "--no-ocr --temperature 1 --seed 2 --max-new-tokens 900"
        )
        command = f"{shlex.join(command)} {flags} {shlex.join(arguments)}"
        # LEFT comes last: the mode of the terminal is on the screen before it.
        told = "left=$?; stty -a | tr ' ' '\\n' | grep -x icanon; echo LEFT $left; cat"
        window = Tmux(*size, f"{command}; {told}")
        opened.append(window)
        return window

    yield start
    for window in opened:
        window.close()


def test_a_first_session_from_start_to_resume(terminal, picture):
    window = terminal()
    window.until("From screenshot to page")
    window.until("slow-llama float32 cpu")
    window.keys("-l", "Write a [red]page[/red]")
    window.keys("Enter")
    window.until("Writing:")
    window.keys("Escape")
    window.until("Stopped: F6 n continues it")
    window.paste(f"'{picture('my shot.png')}'")
    window.until("[Image #1]")
    window.keys("C-q")
    shown = window.until("LEFT 0")
    assert "icanon" in shown

    with Store.open(paths().sessions) as store:
        (session,) = store.sessions()
        question, answer = store.branch(session.id)
        assert question.text == "Write a [red]page[/red]"
        assert (answer.status, answer.finish_reason) == ("partial", "cancelled")
        assert session.draft.strip() == "[Image #1]"

    again = terminal(size=(80, 24))
    shown = again.until("[Image #1]")
    assert "Stopped: F6 n continues it" in again.until("Stopped")
    again.keys("C-q")
    again.until("LEFT 0")


def test_a_killed_application_loses_at_most_the_last_second(terminal):
    window = terminal()
    window.until("slow-llama float32 cpu")
    window.keys("-l", "Go")
    window.keys("Enter")
    window.until("Writing: 1")
    while int(re.search(r"Writing: (\d+)", window.screen()).group(1)) < 60:
        time.sleep(0.05)
    # What is older than a second is safe.
    time.sleep(1.5)
    application = window.application()
    shown = window.screen()
    application.kill()
    window.until("LEFT")
    with Store.open(paths().sessions) as store:
        answer = store.branch(store.sessions()[0].id)[-1]
    assert answer.status == "partial"
    assert len(answer.text) > 20
    assert "Writing" in shown


def test_twenty_kills_lose_at_most_the_last_second(own_folders):
    done = subprocess.run(
        [sys.executable, "-m", "tests.tui.kill_twenty", "0"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == NUM_KILLS
    assert sum(kill["num_shown"] > 20 for kill in kills) >= 5
    with Store.open(paths().sessions) as store:
        (session,) = store.sessions()
        messages = store.branch(session.id)
    assert [m.text for m in messages[::2]] == [kill["question"] for kill in kills]
    assert all(m.status == "complete" for m in messages[::2])
    for kill, answer in zip(kills, messages[1::2], strict=True):
        assert answer.status == "partial"
        assert TEXT.startswith(answer.text)
        assert len(answer.text) >= 4 * kill["num_shown"]


def test_a_prompt_is_written_in_the_editor_of_the_user(terminal, tmp_path, monkeypatch):
    editor = tmp_path / "my editor.sh"
    editor.write_text('#!/bin/sh\nprintf "from outside" >> "$1"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", f"'{editor}'")
    window = terminal()
    window.until("From screenshot to page")
    window.keys("-l", "Written ")
    window.until("Written")
    window.keys("C-g")
    window.until("Written from outside")
    window.keys("C-q")
    window.until("LEFT 0")


def test_an_editor_that_is_not_there_is_told_and_the_prompt_stays(terminal, monkeypatch):
    monkeypatch.setenv("VISUAL", "no-such-editor")
    window = terminal()
    window.until("From screenshot to page")
    window.keys("-l", "Written ")
    window.until("Written")
    window.keys("C-g")
    window.until("'no-such-editor'")
    window.keys("-l", "again")
    window.until("Written again")
    window.keys("C-q")
    window.until("LEFT 0")


def test_a_defect_restores_the_terminal_and_is_in_the_log(terminal, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from w2c_tui.tui.status_line import StatusLine\n"
        "def fail(self, *_, **__): raise ZeroDivisionError('on purpose')\n"
        "StatusLine.tell = fail\n"
        "from w2c_tui.__main__ import main\n"
        "main()\n"
    )
    window = terminal(command=[sys.executable, str(broken)])
    shown = window.until("LEFT 1")
    assert "because of a defect of its own. Your sessions are saved." in shown
    assert "app.log" in shown
    assert "Traceback" not in shown
    assert "icanon" in shown
    assert "ZeroDivisionError: on purpose" in paths().app_log.read_text()


def test_a_termination_signal_restores_the_terminal(terminal):
    window = terminal()
    window.until("slow-llama float32 cpu")
    application = window.application()
    application.terminate()
    shown = window.until("LEFT 143")
    assert "icanon" in shown
