"""GGUF models through the commands: real processes, the page writer as an exported file."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_cli import w2c
from tests.tiny import PAGE
from w2c_tui.core.config import paths


@pytest.fixture
def shot(own_folders):
    from PIL import Image

    path = own_folders / "shot.png"
    Image.new("RGB", (120, 80), "green").save(path)
    return path


def test_generate_writes_the_page_and_says_what_ran_it(page_file, shot, own_folders):
    out = own_folders / "page.html"
    flags = ["--model", page_file, "--temperature", "0", "--threads", "1"]
    done = w2c("generate", shot, "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == PAGE
    assert "by llama.cpp, reads images" in done.stderr
    # What native code says is for the log.
    assert "llama_model_loader" not in done.stderr + done.stdout
    assert "llama_model_loader" in paths().engine_log.read_text()
    again = w2c("generate", shot, "--force", "--out", out, *flags, "--prompt-lookup", "8", "--json")
    assert json.loads(again.stdout)["status"] == "done"
    assert out.read_text() == PAGE


def test_a_conversation_goes_on_from_what_is_known(page_file, shot):
    script = "Please generate html code for the given image\nAgain\n/quit\n"
    flags = ["--model", page_file, "--temperature", "0", "--threads", "1", "--backend", "gguf"]
    done = w2c("chat", "--image", shot, *flags, stdin=script)
    assert done.returncode == 0, done.stderr
    assert PAGE in done.stdout


def test_doctor_shows_where_a_gguf_model_goes(page_file, own_folders):
    done = w2c("doctor", "--model", page_file)
    assert done.returncode == 0, done.stderr
    assert f"Placement of {page_file}" in done.stdout
    assert "of weights" in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend", "gguf", "--load-4bit"], "gguf backend has no --load-4bit"),
        (["--backend", "hf", "--mmproj", "x.gguf"], "hf backend has no --mmproj"),
        (["--mmproj", "missing.gguf"], "missing.gguf cannot be read"),
        (["--tensor-split", "3,x"], "tensor_split"),
        (["--tensor-split", "3,1", "--main-gpu", "0"], "--main-gpu puts it on one"),
        (["--cache-type", "q9"], "q9"),
    ],
)
def test_flags_that_cannot_work_say_so(flags, words, page_file, shot):
    done = w2c("generate", shot, "--out", "-", "--model", page_file, *flags)
    assert done.returncode in (1, 2)
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_file_that_is_no_model_is_an_error_before_anything_is_written(shot, own_folders):
    broken = own_folders / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\x03" * 200)
    done = w2c("generate", shot, "--out", own_folders / "page.html", "--model", broken)
    assert done.returncode == 1
    assert "damaged or incomplete" in done.stderr
    assert not (own_folders / "page.html").exists()
