"""The code generation benchmark, end to end in a real browser, and one run against another."""

from __future__ import annotations

import io
import json
import os
import pydoc
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.backends.test_openai import Server, stream
from w2c_tui.core.errors import BrowserNotFoundError, ConfigError
from w2c_tui.core.files import write_atomically
from w2c_tui.evaluate import wcgb
from w2c_tui.evaluate.asking import Stopped, shared_out
from w2c_tui.evaluate.compare import pair
from w2c_tui.evaluate.journal import read_rows
from w2c_tui.web.render import PageSource, Renderer, find_browser

try:
    find_browser()
except BrowserNotFoundError:
    pytest.skip("no Chromium or Chrome", allow_module_level=True)

MODULES = ["abc", "bisect", "colorsys", "errno", "keyword", "linecache", "opcode", "reprlib"]
MODULES += ["sched", "stat", "token", "tty"]
"""Real pages: what Python writes about these modules of its own."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A Design2Code-like folder of a dozen pages: NAME.html and its screenshot NAME.png."""
    folder = tmp_path_factory.mktemp("pages")
    writer = pydoc.HTMLDoc()
    sources = []
    for name in MODULES:
        module = pydoc.locate(name)
        html = writer.page(name, writer.document(module, name))
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
        sources.append(PageSource(html, name=name, width=480))
    with Renderer() as renderer:
        for name, view in zip(MODULES, renderer.render_all(sources), strict=True):
            view.picture.crop((0, 0, 480, min(view.picture.height, 1200))).save(
                folder / f"{name}.png"
            )
    return folder


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "w2c_tui.cli", "evaluate", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def rows_of(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def test_a_model_is_scored_on_every_page_and_a_killed_run_goes_on(pages, page_writer, own_folders):
    flags = [
        *("--model", page_writer, "--dtype", "float32", "--temperature", "0", "--threads", "1"),
        *("--images", pages, "--max-new-tokens", "200"),
    ]
    whole, killed = own_folders / "whole", own_folders / "killed"
    done = evaluate("wcgb", *flags, "--out", whole, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["num_pages"] == result["num_rendered"] == 12
    assert 0 < result["interval"]["low"] < result["score"] < result["interval"]["high"] < 1
    assert set(result["parts"]) == set(wcgb.PARTS)
    assert 0 <= result["bleu"] < result["chrf"] < 1
    assert result["judged_strict"] is None
    report = (whole / "report.html").read_text()
    assert all(f"pages/{name}.html" in report for name in MODULES)
    assert report.count('src="pictures/') == 36

    command = [sys.executable, "-m", "w2c_tui.cli", "evaluate", "wcgb", *map(str, flags)]
    process = subprocess.Popen(
        [*command, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    rows = killed / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = rows.read_bytes()
    again = evaluate("wcgb", *flags, "--out", killed)
    assert again.returncode == 0, again.stderr
    assert rows.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert rows_of(killed) == rows_of(whole)
    assert "visual score" in again.stdout


def test_two_models_share_the_pages_and_give_the_rows_of_one(pages, page_writer, own_folders):
    flags = [
        *("--model", page_writer, "--dtype", "float32", "--temperature", "1", "--threads", "1"),
        *("--images", pages, "--max-new-tokens", "40", "--limit", "6"),
    ]
    one, two = own_folders / "one", own_folders / "two"
    done = evaluate("wcgb", *flags, "--out", two, "--devices", "cpu,cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("loaded in") == 2
    done = evaluate("wcgb", *flags, "--out", one)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("loaded in") == 1
    assert rows_of(two) == rows_of(one)
    pages_of = [{p.name: p.read_text() for p in (f / "pages").glob("*.html")} for f in (one, two)]
    assert pages_of[0] == pages_of[1]
    assert len(set(map(str, rows_of(one)))) == 6
    wrong = evaluate("wcgb", *flags, "--out", own_folders / "x", "--devices", "0,tpu")
    assert wrong.returncode == 1
    assert "'tpu' is no device" in wrong.stderr


def test_items_are_shared_out_in_order_and_an_error_ends_the_rest():
    begun = []
    both = threading.Barrier(2, timeout=30)

    def work(worker: str, item: int) -> tuple[int, str]:
        begun.append(item)
        if item < 2:
            # Passed only when two workers are at work at the same time.
            both.wait()
        if item == 5:
            raise Stopped
        return item, worker

    results = []
    with pytest.raises(Stopped):
        results += shared_out(range(1000), ["a", "b"], work)
    assert len(begun) < 40
    found = list(shared_out(range(3), ["a", "b"], lambda worker, item: (item, worker)))
    assert [item for item, _ in found] == [0, 1, 2]
    both.reset()
    first_two = list(shared_out(range(2), ["a", "b"], work))
    assert {worker for _, worker in first_two} == {"a", "b"}


@pytest.fixture(scope="module")
def predictions(pages, tmp_path_factory):
    """The pages themselves, but for one that is missing, one cut in half and one that is blank."""
    folder = tmp_path_factory.mktemp("predictions")
    for name in MODULES:
        shutil.copy(pages / f"{name}.html", folder / f"{name}_output.html")
    (folder / "abc_output.html").unlink()
    half = folder / "sched_output.html"
    half.write_text(half.read_text()[: len(half.read_text()) // 2])
    (folder / "tty_output.html").write_text("<!DOCTYPE html><html><body></body></html>")
    return folder


def test_pages_from_elsewhere_are_scored_and_failures_count_zero(pages, predictions, own_folders):
    out = own_folders / "out"
    done = evaluate("wcgb", "--predictions", predictions, "--images", pages, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = {row.name: row for row in read_rows(out, wcgb.PageResult)}
    assert rows["abc"].outcome == "no page"
    assert rows["abc"].score == rows["tty"].score == 0
    assert rows["abc"].bleu == 0
    assert 0.2 < rows["sched"].score < 0.95
    same = [row for name, row in rows.items() if name not in ("abc", "tty", "sched")]
    assert [row.score for row in same] == pytest.approx([1.0] * 9)
    assert [row.bleu for row in same] == pytest.approx([1.0] * 9)
    assert result["score"] == pytest.approx(sum(row.score for row in rows.values()) / 12)
    assert (result["num_pages"], result["num_rendered"]) == (12, 11)
    assert result["parts"]["structure"] < 1


def test_a_judge_sees_both_pictures_and_only_when_asked_for(pages, predictions, own_folders):
    reply = stream("9,9,9,9,", "8,8,7,7,7,", "6")
    with Server(reply, stream("I cannot")) as server:
        out = own_folders / "out"
        done = evaluate(
            *("wcgb", "--predictions", predictions, "--images", pages, "--out", out, "--json"),
            *("--limit", "3", "--judge-url", server.url),
        )
    assert done.returncode == 0, done.stderr
    # The first page has no picture, the other two were judged.
    assert len(server.requests) == 2
    for request in server.requests:
        kinds = [part["type"] for part in request["messages"][0]["content"]]
        assert kinds == ["image_url", "image_url", "text"]
    result = json.loads(done.stdout)
    assert result["judged_published"]["overall"] == 7.5
    assert result["judged_published"]["num_pages"] == 1
    assert result["judged_strict"]["overall"] == 2.5
    assert result["judged_strict"]["num_pages"] == 1
    assert "as published" in (out / "report.html").read_text()


def test_two_runs_are_compared_page_by_page(pages, predictions, own_folders):
    first, second = own_folders / "first", own_folders / "second"
    for folder, out in ((predictions, first), (pages, second)):
        assert (
            evaluate("wcgb", "--predictions", folder, "--images", pages, "--out", out).returncode
            == 0
        )
    report = own_folders / "report.html"
    done = evaluate("compare", first, second, "--json", "--report", report)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["means"][1] == pytest.approx(1.0)
    assert result["difference"] == pytest.approx(result["means"][1] - result["means"][0])
    assert {
        change["name"] for change in result["changes"] if change["second"] > change["first"]
    } == {
        "abc",
        "sched",
        "tty",
    }
    assert "Better: 3" in report.read_text()
    assert report.read_text().count("<img") >= 4
    text = evaluate("compare", second, first).stdout
    assert "0 better, 3 worse, 9 the same" in text


def test_runs_on_other_data_are_not_paired(pages, predictions, own_folders):
    first, second = own_folders / "first", own_folders / "second"
    for limit, out in ((1, first), (2, second)):
        run = ("--images", pages, "--limit", limit, "--out", out)
        assert evaluate("wcgb", "--predictions", predictions, *run).returncode == 0
    done = evaluate("compare", first, second)
    assert done.returncode == 1
    assert "different data" in done.stderr
    done = evaluate("compare", first, own_folders)
    assert done.returncode == 1
    assert "holds no evaluation" in done.stderr


def test_a_paired_difference_knows_chance_from_a_clear_gain():
    first = {str(at): 0.5 + 0.01 * (at % 7) for at in range(40)}
    noise = {name: value + (0.02 if int(name) % 2 else -0.02) for name, value in first.items()}
    gain = {name: value + 0.03 + 0.01 * (int(name) % 3) for name, value in first.items()}
    assert not pair(first, noise, "wcgb", ("a", "b")).is_clear
    better = pair(first, gain, "wcgb", ("a", "b"))
    assert better.is_clear
    assert better.interval.low < better.difference < better.interval.high
    assert better.difference == pytest.approx(0.0397, abs=1e-3)
    with pytest.raises(ConfigError, match="no row in common"):
        pair({"a": 1.0}, {"b": 1.0}, "wcgb", ("a", "b"))


def test_pages_are_found_by_name_and_what_does_not_fit_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no screenshots"):
        wcgb.load_pages(tmp_path)
    picture = io.BytesIO(b"x").getvalue()
    for name in ("b/1.png", "b/2.PNG", "a.jpg"):
        write_atomically(tmp_path / "shots" / name, picture)
    html = tmp_path / "html"
    write_atomically(html / "b" / "1.html", "<p>")
    pages = wcgb.load_pages(tmp_path / "shots", html)
    assert [(page.name, page.html is not None) for page in pages] == [
        ("a", False),
        ("b/1", True),
        ("b/2", False),
    ]
    with pytest.raises(ConfigError, match="has the name of a screenshot"):
        wcgb.load_pages(tmp_path / "shots", tmp_path / "shots")
    write_atomically(tmp_path / "shots" / "b" / "1.jpg", picture)
    with pytest.raises(ConfigError, match="two formats"):
        wcgb.load_pages(tmp_path / "shots")
