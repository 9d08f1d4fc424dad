"""`w2c bench` on real small models in real processes. Times are asked for, never judged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.cli.test_cli import w2c
from w2c_tui.evaluate.speed import MEASURES, NUM_TURNS, Run, Spread, ratios, spreads


def test_two_models_take_turns_and_each_run_is_compared_with_the_next(page_file, own_folders):
    done = w2c(
        "bench", page_file, "--threads", "1", "--runs", "2", "--tokens", "24", "--json",
        "--against", "--cache-type f32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("run ")]
    assert said == [f"run {n} of 2, {side}: load" for n in (1, 2) for side in "AB"]
    found = json.loads(done.stdout)
    first, second = found["sides"]
    assert "cache_type" not in first["spec"]
    assert second["spec"]["cache_type"] == "f32"
    assert first["spec"]["name"] == second["spec"]["name"]
    for side in found["sides"]:
        assert side["model"]["backend"] == "gguf"
        assert len(side["runs"]) == 2
        for run in side["runs"]:
            assert list(MEASURES) == [name for name in MEASURES if name in run["measures"]]
            assert all(value > 0 for name, value in run["measures"].items() if name != "image_s")
            assert run["sizes"]["written"] == 24
            # The picture is in it.
            assert run["sizes"]["turn_1"] > 16
    loads = [[run["measures"]["load_s"] for run in side["runs"]] for side in found["sides"]]
    wanted = Spread.of([a / b for a, b in zip(*loads, strict=True)])
    assert found["ratios"]["load_s"]["median"] == pytest.approx(wanted.median)
    assert found["machine"]["cpu"]


def test_a_model_that_reads_text_only_is_measured_without_a_picture(tiny_llama, own_folders):
    done = w2c("bench", tiny_llama, "--threads", "1", "--runs", "1", "--tokens", "9")
    assert done.returncode == 0, done.stderr
    titles = [title for name, (title, _) in MEASURES.items() if name != "image_s"]
    for title in titles:
        assert title in done.stdout
    assert MEASURES["image_s"][0] not in done.stdout
    assert "9 written" in done.stdout
    assert f"turn {NUM_TURNS}" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_shows_what_is_measured(page_file, own_folders):
    command = [sys.executable, "-m", "w2c_tui.cli", "bench", str(page_file), "--threads", "1"]
    command += ["--tokens", "8", "--runs", "900", "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        while not process.stderr.readline().startswith("run 2 of"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in said
    assert "Traceback" not in said
    (side,) = json.loads(output)["sides"]
    assert set(side["runs"][0]["measures"]) == set(MEASURES)
    assert set(side["measured"]) == set(MEASURES)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["no/such/model"], 1, ["no/such/model"]),
        (["a", "--model", "b"], 2, ["MODEL and --model"]),
        (["{file}", "--against", "no/such/model"], 1, ["no/such/model"]),
        (["{file}", "--against", "--no-such-flag"], 2, ["--against", "--no-such-flag"]),
        (["{file}", "--against", "--load-4bit --backend gguf"], 1, ["--load-4bit"]),
        (["{file}", "--image", "missing.png"], 1, ["missing.png"]),
        (["{file}", "--image", "a.png", "--no-image"], 2, ["exclude"]),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(
    page_file, own_folders, arguments, status, words
):
    done = w2c("bench", *(argument.format(file=page_file) for argument in arguments))
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "run 1" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_spreads_and_ratios_are_over_the_runs_that_measured_it():
    ours = [Run({"load_s": 2.0, "decode_tokens_per_s": 30.0}), Run({"load_s": 8.0}), Run()]
    theirs = [Run({"load_s": 1.0, "decode_tokens_per_s": 10.0}), Run({"load_s": 2.0})]
    assert spreads(ours) == {
        "load_s": Spread(5.0, 2.0, 8.0),
        "decode_tokens_per_s": Spread(30.0, 30.0, 30.0),
    }
    assert ratios(ours, theirs) == {
        "load_s": Spread(3.0, 2.0, 4.0),
        "decode_tokens_per_s": Spread(3.0, 3.0, 3.0),
    }
