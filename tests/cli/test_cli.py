"""The commands as a user meets them: real processes, a real small model that writes a page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.tiny import PAGE
from w2c_tui.backends.base import Finished, Text
from w2c_tui.cli.chat import _Chat
from w2c_tui.cli.generate import Run
from w2c_tui.core.config import GenerationParams, LoadSpec, RenderSettings, Settings
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.engine.client import EngineClient
from w2c_tui.web.render import Renderer

EXAMPLES = Path(__file__).parents[2] / "examples"


def w2c(*arguments: object, stdin: str | None = None, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "w2c_tui.cli", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


@pytest.fixture
def shots(own_folders):
    folder = own_folders / "shots"
    folder.mkdir()
    for name, color in (("one", "red"), ("two", "green"), ("three", "blue")):
        Image.new("RGB", (120, 80), color).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def flags(page_writer):
    return ["--model", page_writer, "--dtype", "float32", "--temperature", "0", "--threads", "1"]


def test_generate_writes_the_page_and_says_where(shots, flags, own_folders):
    out = own_folders / "page.html"
    done = w2c("generate", shots / "one.png", "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == PAGE
    assert done.stdout == ""
    assert str(out) in done.stderr
    assert "tokens/s" in done.stderr


def test_generate_to_standard_output_and_as_json(shots, flags):
    done = w2c("generate", shots / "one.png", "--out", "-", *flags)
    assert done.stdout == PAGE + "\n"
    done = w2c("generate", shots / "one.png", "--out", "-", "--json", *flags)
    outcome = json.loads(done.stdout)
    assert outcome["status"] == "done"
    assert outcome["html"] == PAGE
    assert outcome["complete"]
    assert outcome["stats"]["new_tokens"] > 0


def test_a_folder_is_done_once_and_a_bad_image_stops_nothing(shots, flags, own_folders):
    (shots / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (shots / "notes.txt").write_text("not an image")
    pages = own_folders / "pages"
    done = w2c("generate", shots, "--out", pages, "--json", *flags)
    assert done.returncode == 1
    rows = {Path(row["image"]).name: row for row in map(json.loads, done.stdout.splitlines())}
    assert sorted(rows) == ["broken.png", "one.png", "three.png", "two.png"]
    assert rows["broken.png"]["status"] == "failed"
    assert rows["broken.png"]["hint"]
    assert sorted(path.name for path in pages.iterdir()) == ["one.html", "three.html", "two.html"]
    (pages / "two.html").unlink()
    (shots / "broken.png").unlink()
    (pages / "one.html").write_text("mine")
    again = w2c("generate", shots, "--out", pages, "--json", *flags)
    assert again.returncode == 0
    status = {
        Path(r["image"]).name: r["status"] for r in map(json.loads, again.stdout.splitlines())
    }
    assert status == {"one.png": "skipped", "three.png": "skipped", "two.png": "done"}
    assert (pages / "one.html").read_text() == "mine"
    w2c("generate", shots / "one.png", "--out", pages, "--force", *flags)
    assert (pages / "one.html").read_text() == PAGE


def test_images_of_one_name_get_pages_of_their_own(shots, flags, own_folders):
    other = own_folders / "other"
    other.mkdir()
    (other / "one.png").write_bytes((shots / "two.png").read_bytes())
    pages = own_folders / "pages"
    w2c("generate", shots / "one.png", other / "one.png", "--out", f"{pages}/", *flags)
    assert sorted(path.name for path in pages.iterdir()) == ["one-2.html", "one.html"]


def test_an_answer_without_a_page_is_a_failure_that_writes_nothing(shots, tiny_llava, own_folders):
    out = own_folders / "page.html"
    flags = ["--model", tiny_llava, "--dtype", "float32", "--temperature", "0"]
    done = w2c("generate", shots / "one.png", "--out", out, "--max-new-tokens", "8", *flags)
    assert done.returncode == 1
    assert "holds no page" in done.stderr
    assert not out.exists()


def test_a_page_cut_by_the_length_limit_is_kept_and_said(shots, flags, own_folders):
    out = own_folders / "page.html"
    done = w2c("generate", shots / "one.png", "--out", out, "--max-new-tokens", "20", *flags)
    assert done.returncode == 0
    assert PAGE.startswith(out.read_text())
    assert "--max-new-tokens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["generate", "missing.png"], 1, ["missing.png"]),
        (["generate"], 2, ["IMAGE"]),
        (["generate", ".", "--model", "x"], 1, ["no images"]),
        (["generate", "{shot}", "--model", "no/such/model"], 1, ["no/such/model", "models list"]),
        (["generate", "{shot}", "--model", "smolm2"], 1, ["smollm2"]),
        (["generate", "{shot}", "--model", "{empty}"], 1, ["empty"]),
        (["generate", "{shot}", "--temperature", "-3"], 1, ["temperature"]),
        (["generate", "{shot}", "--max-memory", "lots"], 1, ["lots", "20GiB"]),
        (["generate", "{shot}", "--load-4bit", "--load-8bit"], 2, ["exclude"]),
        (["generat", "x"], 2, ["Did you mean generate"]),
        (["models", "info", "nothing"], 1, ["catalogue"]),
        (["models", "pull", "nothing"], 1, ["nothing"]),
    ],
)
def test_mistakes_get_one_clear_error(shots, own_folders, arguments, status, words):
    empty = own_folders / "empty"
    empty.mkdir()
    filled = [str(a).format(shot=shots / "one.png", empty=empty) for a in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "w2c_tui.cli", *filled],
        capture_output=True, text=True, timeout=120, check=False, cwd=empty,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr
    assert list(empty.iterdir()) == []


def test_settings_come_from_flag_environment_and_file_in_that_order(shots, flags, own_folders):
    config = own_folders / "config" / "config.toml"
    config.parent.mkdir()
    config.write_text("[generation]\nmax_new_tokens = 3\n")
    run = ["generate", shots / "one.png", "--out", "-", "--json", *flags]
    count = lambda done: json.loads(done.stdout)["stats"]["new_tokens"]  # noqa: E731
    assert count(w2c(*run)) == 3
    assert count(w2c(*run, W2C_GENERATION_MAX_NEW_TOKENS="4")) == 4
    assert count(w2c(*run, "--max-new-tokens", 5, W2C_GENERATION_MAX_NEW_TOKENS="4")) == 5
    config.write_text("[generation]\nmax_tokens = 3\n")
    done = w2c(*run)
    assert done.returncode == 1
    assert "max_tokens" in done.stderr
    assert str(config) in done.stderr
    assert "max_new_tokens" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_stops_writes_nothing_and_leaves_no_process(shots, tiny_llava, own_folders):
    out = own_folders / "page.html"
    command = [sys.executable, "-m", "w2c_tui.cli", "generate", shots / "one.png", "--out", out]
    command += ["--model", tiny_llava, "--dtype", "float32", "--temperature", "3"]
    command += ["--max-new-tokens", "900"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while "loaded in" not in process.stderr.readline():
            pass
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode in (130, 1)  # 1: the random model was already done
    assert not out.exists()
    assert not list(own_folders.glob(".*page*"))
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


class StoppedInTheMiddle(EngineClient):
    """Is told to stop when the page has begun, before the engine can write its end."""

    def stream(self, messages, params, ahead=0, until=""):
        written = ""
        for event in super().stream(messages, params, ahead, until):
            written += event.delta if isinstance(event, Text) else ""
            if written.startswith("<!DOCTYPE html>"):
                os.kill(self.pid, signal.SIGSTOP)
                self.cancel()
                os.kill(self.pid, signal.SIGCONT)
                written = ""
            yield event


@pytest.mark.parametrize("best_of", [1, 2])
def test_a_stop_before_the_page_is_asked_for_is_not_lost(best_of, shots, page_writer, own_folders):
    """As one while the text on the picture is read."""
    params = GenerationParams(temperature=0.1, seed=0, max_new_tokens=120)
    model = LoadSpec(name=str(page_writer), dtype="float32", threads=1)
    run = Run(Settings(model=model, generation=params), PAGE_PROMPT, False, best_of)
    out = own_folders / "page.html"
    with (
        EngineClient(own_folders / "engine.log") as engine,
        Renderer(RenderSettings(timeout_s=60)) as renderer,
    ):
        run.renderer = renderer if best_of > 1 else None
        info = engine.load(model)
        run.interrupted.set()
        outcome = run.one(engine, info, str(shots / "one.png"), out, "")
    assert (outcome.status, outcome.finish_reason) == ("failed", "cancelled")
    assert not out.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("best_of", [1, 2])
def test_a_page_that_was_stopped_in_the_middle_is_not_kept(
    best_of, shots, page_writer, own_folders
):
    params = GenerationParams(temperature=0.1, seed=0, max_new_tokens=120)
    model = LoadSpec(name=str(page_writer), dtype="float32", threads=1)
    run = Run(Settings(model=model, generation=params), PAGE_PROMPT, False, best_of)
    out = own_folders / "page.html"
    out.write_text("a good one")
    with (
        StoppedInTheMiddle(own_folders / "engine.log") as engine,
        Renderer(RenderSettings(timeout_s=60)) as renderer,
    ):
        run.renderer = renderer if best_of > 1 else None
        info = engine.load(model)
        outcome = run.one(engine, info, str(shots / "one.png"), out, "")
    assert outcome.finish_reason == "cancelled"
    assert outcome.status == "failed"
    assert out.read_text() == "a good one"
    assert sorted(path.name for path in own_folders.glob("page*")) == ["page.html"]


def test_chat_answers_over_turns_from_a_pipe(shots, flags, own_folders):
    saved = own_folders / "saved page.html"
    lines = [
        f"/image '{shots / 'one.png'}'",
        "Please generate html code for the given image",
        f"/save {saved}",
        "/reset",
        "/image missing.png",
        "/bogus",
        "Again \\",
        "over two lines",
        "/quit",
        "never read",
    ]
    done = w2c("chat", *flags, "--max-new-tokens", 80, stdin="\n".join(lines) + "\n")
    assert done.stdout.startswith(PAGE + "\n")
    assert saved.read_text() == PAGE
    assert "missing.png" in done.stderr
    assert "'/bogus' is not a command" in done.stderr
    assert done.returncode == 1


def test_chat_reads_a_picture_while_the_question_is_typed(shots, page_writer, own_folders):
    spec = LoadSpec(name=str(page_writer), dtype="float32", device_map="cpu", threads=1)
    settings = Settings(model=spec, generation=GenerationParams(temperature=0, max_new_tokens=3))
    with EngineClient(own_folders / "engine.log") as engine:
        chat = _Chat(settings, engine, engine.load(spec))
        chat.interactive = True
        told: list[Finished] = []
        chat._tell = told.append
        chat._attach(str(shots / "one.png"))
        for thread in threading.enumerate():
            if thread.name == "read ahead":
                thread.join(60)
        chat._ask("")
    assert told[0].stats.reused_tokens == told[0].stats.prompt_tokens - 1


def test_chat_takes_the_flags_of_the_published_command_line(shots, page_writer, own_folders):
    done = w2c(
        "chat", "--model-path", page_writer, "--image-file", shots / "one.png",
        "--temperature", "0", "--max-new-tokens", "8", "--load-8bit",
        stdin="Please generate html code for the given image\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "8bit" in done.stderr


def test_doctor_and_models_report_without_loading_anything(own_folders):
    doctor = w2c("doctor", "--json")
    report = json.loads(doctor.stdout)
    assert report["machine"]["memory_bytes"] > 1e8
    assert report["paths"]["sessions"].startswith(str(own_folders))
    assert report["model"] == "w2c-nano"
    assert "crystalchat-7b-web2code" in w2c("doctor").stdout
    assert "crystalchat-7b-web2code" in w2c("models", "list").stdout
    assert {e["id"] for e in json.loads(w2c("models", "list", "--json").stdout)} > {"smollm2-135m"}
    assert "Apache-2.0" in w2c("models", "info", "smollm2").stdout


def test_convert_writes_a_folder_that_generates_and_never_overwrites(
    shots, page_writer, own_folders
):
    out = own_folders / "standard"
    done = w2c("models", "convert", page_writer, "--out", out)
    assert done.returncode == 0, done.stderr
    assert (out / "w2c.json").exists()
    flags = ["--dtype", "float32", "--temperature", "0", "--threads", "1", "--out", "-"]
    assert w2c("generate", shots / "one.png", "--model", out, *flags).stdout == PAGE + "\n"
    again = w2c("models", "convert", page_writer, "--out", out)
    assert again.returncode == 1
    assert "exists" in again.stderr


def test_doctor_shows_the_placement_of_a_model_it_is_asked_about(tiny_llava, own_folders):
    memory = ["--max-memory", "0=650KB", "--max-memory", "1=650KB", "--max-memory", "cpu=1GB"]
    done = w2c("doctor", "--model", tiny_llava, "--dtype", "float32", *memory)
    assert done.returncode == 0, done.stderr
    assert "Placement of" in done.stdout
    gpu = next(line for line in done.stdout.splitlines() if line.strip().startswith("GPU 0"))
    assert "vision_tower" in gpu


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    done = w2c("completion", shell)
    assert "_W2C_COMPLETE" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]])
def test_front_ends_start_in_a_blink_and_import_nothing_heavy(arguments):
    """No timed assert here; the modules that cost the time must not be there."""
    script = (
        "import sys; from w2c_tui.cli import run, w2c; "
        f"run(w2c, {arguments!r}); "
        "print(sorted({'torch', 'transformers', 'llama_cpp', 'textual', 'numpy', 'PIL'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    "module",
    [
        "w2c_tui.cli.running",
        "w2c_tui.cli.chat",
        "w2c_tui.cli.watch",
        "w2c_tui.__main__",
        "w2c_tui.core.store",
        "w2c_tui.web.preview_sources",
    ],
)
def test_front_end_modules_import_no_runtime(module):
    script = (
        f"import sys, {module}; "
        "print(sorted({'torch', 'transformers', 'llama_cpp'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")
