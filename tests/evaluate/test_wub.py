"""The understanding benchmark: published and strict scoring, its protocol, and a resumed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import ConfigError
from w2c_tui.evaluate import wub
from w2c_tui.evaluate.asking import inside
from w2c_tui.evaluate.journal import read_rows

# reply, right answer, asked again, right as published, strictly right
REPLIES = [
    ("Yes", "Yes", False, True, True),
    ("yes", "Yes", False, True, True),
    ("YES", "Yes", False, True, True),
    ("No", "No", False, True, True),
    ("no.", "No", False, True, True),
    ("No.</s>", "No", False, True, True),
    ("Yes</s>", "Yes", False, True, True),
    ("Yes.</s>", "Yes", False, True, True),
    (" Yes \n", "Yes", False, True, True),
    ("Yes!", "Yes", False, True, True),
    ("**Yes**", "Yes", False, True, True),
    ('"No"', "No", False, True, True),
    ("- no", "No", False, True, True),
    ("Yes", "No", False, False, False),
    ("No", "Yes", False, False, False),
    ("no</s>", "Yes", False, False, False),
    ("Yes, the page has a form.", "Yes", True, True, True),
    ("Yes, the page has a form.", "No", True, False, False),
    ("No, there is none.", "No", True, True, True),
    ("No, there is none.", "Yes", True, False, False),
    ("Yes and no", "Yes", True, True, True),
    ("Yes and no", "No", True, False, False),
    ("No, yes", "No", True, True, True),
    ("No, yes", "Yes", True, False, False),
    # The published rule looks for the answer anywhere in the first five characters.
    ("Not sure", "No", True, True, False),
    ("NOT SURE</s>", "No", True, True, False),
    ("Not sure", "Yes", True, False, False),
    ("None", "No", True, True, False),
    ("Nope", "No", True, True, False),
    ("Nothing", "Yes", True, False, False),
    ("Now", "No", True, True, False),
    ("I know", "No", True, True, False),
    ("Know", "No", True, True, False),
    ("An o", "No", True, False, False),
    ("I no", "No", True, True, False),
    ("Oh, no", "No", True, False, False),
    ("It is yes", "Yes", True, False, False),
    ("A yes", "Yes", True, True, False),
    ("Ayes", "Yes", True, True, False),
    ("Eyes", "Yes", True, True, False),
    ("Yeses", "Yes", True, True, False),
    ("Yes1", "Yes", False, True, True),
    ("1. Yes", "Yes", False, False, True),
    ("1) No", "No", False, True, True),
    ("No1", "No", False, True, True),
    ("yesno", "Yes", True, True, False),
    ("", "Yes", True, False, False),
    ("", "No", True, False, False),
    ("</s>", "Yes", True, False, False),
    ("</s>Yes", "Yes", True, True, True),
    ("Y", "Yes", True, False, False),
    ("N", "No", True, False, False),
    ("Yea", "Yes", True, False, False),
    ("Ye s", "Yes", False, False, False),
    ("N o", "No", False, False, False),
    ("Y-e-s", "Yes", False, False, False),
    ("ja", "Yes", True, False, False),
    ("True", "Yes", True, False, False),
    ("<s>Yes", "Yes", True, False, False),
    ("<p>No</p>", "No", True, True, False),
    ("Yes " * 200, "Yes", True, True, True),
    ("The answer is no.", "No", True, False, False),
    ("Yes", "yes", False, True, True),
    ("no", "NO", False, True, True),
    ("No", " No ", False, True, True),
    ("42", "42", True, True, False),
]


@pytest.mark.parametrize(("reply", "actual", "again", "published", "strict"), REPLIES)
def test_replies_are_scored_as_published_and_strictly(reply, actual, again, published, strict):
    assert wub.is_yes_or_no(reply.strip()) is not again
    assert wub.published_correct(reply, actual) is published
    assert wub.strict_correct(reply, actual) is strict


IMAGE = Attachment(b"x", "0" * 64, 1, 1)
QUESTION = wub.Question("a/1.png", "1", "Is there a form?", "Yes")


def test_an_unclear_reply_is_asked_for_once_more_in_the_same_chat():
    asked: list[list[Message]] = []
    replies = iter(["Hm", "It might", "never asked"])

    def answer(messages):
        asked.append(list(messages))
        return next(replies)

    row = wub.ask(QUESTION, IMAGE, answer)
    assert row.replies == ("Hm", "It might")
    assert asked[0] == [Message("user", "Is there a form?", (IMAGE,))]
    assert asked[1] == [
        *asked[0],
        Message("assistant", "Hm"),
        Message("user", "Is there a form?"),
    ]
    assert wub.ask(QUESTION, IMAGE, lambda _: " yes.\n").replies == ("yes.",)


def test_a_failed_row_is_dropped_as_published_and_wrong_strictly():
    def row(ident, *replies, error="", actual="Yes", category="a"):
        return wub.Answered(ident, "a/1.png", category, actual, replies, error)

    result = wub.score(
        [
            row("1", "Yes"),
            row("2", "Hm", "Yes, it has"),
            row("3", "Not sure", "Not sure", actual="No", category="b"),
            row("4", error="gone"),
        ]
    )
    assert (result.published.num_correct, result.published.num_rows) == (3, 3)
    assert (result.strict.num_correct, result.strict.num_rows) == (2, 4)
    assert (result.num_dropped, result.num_retried, result.num_unclear) == (1, 2, 2)
    assert {name: a.num_rows for name, a in result.by_category.items()} == {"a": 3, "b": 1}
    assert {name: a.ratio for name, a in result.by_answer.items()} == {"No": 0.0, "Yes": 2 / 3}
    # R: prop.test(2, 4, correct = FALSE)
    assert result.strict.interval.low == pytest.approx(0.1500390)
    assert result.strict.interval.high == pytest.approx(0.8499610)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no questions"),
        ('{"image": "1.png"}\n', "Line 1"),
        ('{"image": "1.png", "question_id": 1, "Q": "?", "A": "Yes"}\nnot json\n', "Line 2"),
    ],
)
def test_a_bad_file_of_questions_is_named_with_its_line(tmp_path, text, words):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        wub.load_questions(path)


def test_an_image_name_cannot_lead_out_of_its_folder(tmp_path):
    assert inside(tmp_path, "a/1.png") == tmp_path.resolve() / "a" / "1.png"
    for name in ("../1.png", "/etc/passwd", "a/../../1.png", "..\\1.png"):
        with pytest.raises(ConfigError, match="outside"):
            inside(tmp_path, name)


@pytest.fixture
def benchmark(own_folders):
    images = own_folders / "images"
    for folder in ("pix", "gpt"):
        (images / folder).mkdir(parents=True)
    rows = []
    for number in range(12):
        name = f"{('pix', 'gpt')[number % 2]}/{number}.png"
        Image.new("RGB", (60, 40), (20 * number, 90, 200)).save(images / name)
        rows.append({"image": name, "question_id": number, "Q": f"Is it {number}?", "A": "Yes"})
    data = own_folders / "eval.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data, images


def command(benchmark, model, out, *more):
    data, images = benchmark
    return [
        *(sys.executable, "-m", "w2c_tui.cli", "evaluate", "wub", "--data", str(data)),
        *("--images", str(images), "--out", str(out), "--model", str(model)),
        *("--dtype", "float32", "--threads", "1", "--max-new-tokens", "6", *more),
    ]


def test_a_killed_run_goes_on_to_the_same_answers(benchmark, tiny_llava, own_folders):
    whole, killed = own_folders / "whole", own_folders / "killed"
    done = subprocess.run(
        command(benchmark, tiny_llava, whole, "--json"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["strict"]["num_rows"] == 12
    assert set(result["by_category"]) == {"pix", "gpt"}
    assert json.loads((whole / "summary.json").read_text()) == result

    process = subprocess.Popen(
        command(benchmark, tiny_llava, killed),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rows = killed / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.read_bytes().count(b"\n") >= 4):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = rows.read_bytes()
    # As if the kill had come in the middle of a row.
    rows.write_bytes(kept + b'{"question_id": "11", "im')
    again = subprocess.run(
        command(benchmark, tiny_llava, killed), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert rows.read_bytes().startswith(kept)
    assert rows.read_bytes() == (whole / "results.jsonl").read_bytes()
    assert "as published" in again.stdout


def test_a_missing_picture_counts_as_wrong_and_is_tried_again(benchmark, tiny_llava, own_folders):
    _, images = benchmark
    out = own_folders / "out"
    moved = images / "pix" / "0.png"
    picture = moved.read_bytes()
    moved.unlink()
    run = command(benchmark, tiny_llava, out, "--limit", "2", "--json")
    result = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert (result["num_dropped"], result["strict"]["num_rows"]) == (1, 2)
    assert result["published"]["num_rows"] == 1
    moved.write_bytes(picture)
    result = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert result["num_dropped"] == 0
    rows = read_rows(out, wub.Answered)
    assert [row.question_id for row in rows] == ["0", "1", "0"]
    assert "0.png" in rows[0].error


def test_another_run_in_the_folder_is_refused(benchmark, tiny_llava, own_folders):
    out = own_folders / "out"
    first = command(benchmark, tiny_llava, out, "--limit", "1")
    subprocess.run(first, capture_output=True, check=True)
    other = subprocess.run(
        [*first, "--temperature", "1"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "another params" in other.stderr
