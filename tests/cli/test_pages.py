"""`w2c versions`, `preview` and `watch` as a user meets them: real processes, real files."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from PIL import Image

from tests.cli.test_cli import flags, w2c
from tests.tiny import PAGE
from w2c_tui.core.config import paths
from w2c_tui.core.conversation import Message
from w2c_tui.core.reference import load_attachment
from w2c_tui.core.store import Store
from w2c_tui.core.versions import Versions, keep_answer
from w2c_tui.machine import find_browser

__all__ = ["flags"]


@pytest.fixture
def session(own_folders: Path) -> str:
    """A session of two answers with pages."""
    shot = own_folders / "shot.png"
    Image.new("RGB", (80, 60), "teal").save(shot)
    with Store.open(paths().sessions) as store:
        found = store.create_session("A shop").id
        store.add_message(found, Message("user", "Build it", (load_attachment(shot),)))
        for color in ("red", "blue"):
            text = f"```html\n<!DOCTYPE html>\n<html><p>{color}</p></html>\n```"
            answer = store.add_message(found, Message("assistant", text))
            keep_answer(store, answer.id, paths().pages)
            store.add_message(found, Message("user", "Another colour"))
    return found


# ── versions ──────────────────────────────────────────────────────────────────────────────────


def test_versions_are_listed_shown_compared_and_saved(session: str, own_folders: Path) -> None:
    sessions = w2c("versions").stdout
    assert session in sessions
    assert "2 versions" in sessions
    assert "A shop" in sessions
    listed = w2c("versions", session[:6]).stdout.splitlines()
    assert [line[:6] for line in listed] == ["  v001", "* v002"]
    assert "from v001" in listed[1]
    assert "Build it" in listed[0]
    rows = [
        json.loads(line)
        for line in w2c("versions", "list", "last", "--json").stdout.split("\n")[:-1]
    ]
    assert [(row["version"], row["parent"]) for row in rows] == [(1, None), (2, 1)]
    assert w2c("versions", "show", "last", "1").stdout == (
        "<!DOCTYPE html>\n<html><p>red</p></html>\n"
    )
    diff = w2c("versions", "diff", "last").stdout
    assert "-<html><p>red</p></html>\n+<html><p>blue</p></html>" in diff
    assert w2c("versions", "diff", "last", "v002", "v001").stdout.startswith("--- v002")
    out = own_folders / "new folder" / "page.html"
    done = w2c("versions", "save", "last", "v001", "--out", out)
    assert done.returncode == 0
    assert "red" in out.read_text()


def test_a_damaged_session_database_is_said_and_read_out(session: str) -> None:
    with paths().sessions.open("r+b") as file:
        file.write(b"garbage" * 100)
    first = w2c("versions", "last")
    assert first.returncode == 0
    assert "* v002" in first.stdout
    assert "The session database was damaged. 5 messages were saved" in first.stderr
    (kept,) = paths().sessions.parent.glob("sessions-damaged-*.sqlite")
    assert str(kept) in first.stderr
    assert kept.read_bytes().startswith(b"garbage")
    assert w2c("versions", "last").stderr == ""


def test_an_edit_is_kept_as_a_version_and_undone(session: str, own_folders: Path) -> None:
    editor = own_folders / "editor.py"
    editor.write_text(
        "import sys, pathlib\np = pathlib.Path(sys.argv[1])\n"
        "p.write_bytes(p.read_bytes().replace(b'blue', b'green'))\n"
    )
    command = f"{sys.executable} {editor}"
    done = w2c("versions", "edit", "last", VISUAL=command)
    assert done.returncode == 0, done.stderr
    assert "v002 -> v003" in done.stderr
    assert "green" in w2c("versions", "show", "last").stdout
    again = w2c("versions", "edit", "last", VISUAL="true")
    assert "Nothing was changed" in again.stderr
    assert w2c("versions", "undo", "last").stdout == "v002\n"
    assert "blue" in w2c("versions", "show", "last").stdout
    assert w2c("versions", "redo", "last").stdout == "v003\n"
    mine = own_folders / "mine.html"
    mine.write_text("<p>mine</p>")
    assert "v001 -> v004" in w2c("versions", "edit", "last", "1", "--from", mine).stderr
    found = Versions(paths().pages / session)
    assert [(v.meta.parent, v.meta.origin) for v in found.all()][2:] == [(2, "edit"), (1, "edit")]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["versions", "list", "zzz"], 1, ["zzz", "versions list"]),
        (["versions", "show", "last", "9"], 1, ["v009", "v001 to v002"]),
        (["versions", "show", "last", "two"], 2, ["'two'", "v003"]),
        (["versions", "diff", "last", "1"], 1, ["v001 was not made from"]),
        (["versions", "undo", "last"], 0, []),
        (["preview", "missing.html"], 1, ["missing.html"]),
        (["preview", "last", "--image", "x.png"], 2, ["--image"]),
        (["watch", "missing"], 2, ["missing"]),
    ],
)
def test_mistakes_get_one_clear_error(
    session: str, arguments: list[str], status: int, words: list[str]
) -> None:
    done = w2c(*arguments)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_without_any_session_it_is_said_how_to_begin_one(own_folders: Path) -> None:
    for command in (["versions"], ["versions", "last"], ["preview", "last", "--no-open"]):
        done = w2c(*command)
        assert done.returncode == 1
        assert "w2c-tui" in done.stderr
    assert not (own_folders / "data").exists()


# ── preview ───────────────────────────────────────────────────────────────────────────────────


def preview(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "w2c_tui.cli", "preview", *map(str, arguments), "--no-open"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetched(url: str, path: str) -> bytes:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection("127.0.0.1", parts.port or 0, timeout=10)
    connection.request("GET", parts.path + path)
    body = connection.getresponse().read()
    connection.close()
    return body


def test_preview_of_a_file_prints_its_address_follows_it_and_ends(own_folders: Path) -> None:
    path = own_folders / "page.html"
    path.write_text("<p>one</p>")
    Image.new("RGB", (80, 60)).save(own_folders / "page.png")
    with preview(path) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert json.loads(fetched(url, "page"))["html"] == "<p>one</p>"
        assert fetched(url, "original") == (own_folders / "page.png").read_bytes()
        path.write_text("<p>two</p>")
        until = time.monotonic() + 5
        while json.loads(fetched(url, "page"))["html"] != "<p>two</p>":
            assert time.monotonic() < until
            time.sleep(0.05)
        in_use = w2c("preview", path, "--port", urlsplit(url).port, "--no-open")
        assert in_use.returncode == 1
        assert "--port" in in_use.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_preview_of_a_session_and_of_a_folder_of_versions(session: str, own_folders: Path) -> None:
    for what in ("last", session[:8], paths().pages / session):
        with preview(what) as process:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert "red" in json.loads(fetched(url, "page?version=1"))["html"]
            assert fetched(url, "original?version=2") == (own_folders / "shot.png").read_bytes()
            process.terminate()
            assert process.wait(10) == 0


# ── watch ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def watched(own_folders: Path, flags: list[str]) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A folder with one old image, and the command that watches it."""
    folder = own_folders / "shots"
    folder.mkdir()
    Image.new("RGB", (120, 80), "black").save(folder / "old.png")
    command = [sys.executable, "-m", "w2c_tui.cli", "watch", folder, "--json", *flags]
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stderr is not None
        try:
            while "Watching" not in process.stderr.readline():
                assert process.poll() is None
            yield folder, process
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_new_screenshots_become_pages_once_they_are_whole(watched) -> None:
    folder, process = watched
    whole = folder.parent / "whole.png"
    Image.effect_noise((400, 300), 60).convert("RGB").save(whole)
    data = whole.read_bytes()
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(data)
    (folder / "done.html").write_text("mine")
    (folder / "done.png").write_bytes(data)
    with (folder / "slow.png").open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        (folder / "quick.png").write_bytes(data)
        first = json.loads(process.stdout.readline())
        assert (Path(first["image"]).name, first["status"]) == ("quick.png", "done")
        assert not (folder / "slow.html").exists()
        file.write(data[len(data) // 2 :])
    second = json.loads(process.stdout.readline())
    assert (Path(second["image"]).name, second["status"]) == ("slow.png", "done")
    (folder / "quick.jpg").write_bytes(data)
    third = json.loads(process.stdout.readline())
    assert Path(third["output"]).name == "quick-2.html"
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    pages = {path.name: path.read_text() for path in folder.glob("*.html")}
    assert pages == {
        "done.html": "mine",
        "quick.html": PAGE,
        "slow.html": PAGE,
        "quick-2.html": PAGE,
    }
    # The model was loaded once.
    assert process.stderr.read().count("loaded in") == 0


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_an_image_that_never_becomes_readable_is_reported_and_the_next_one_done(watched) -> None:
    folder, process = watched
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    broken = json.loads(process.stdout.readline())
    assert (Path(broken["image"]).name, broken["status"]) == ("broken.png", "failed")
    Image.new("RGB", (120, 80), "red").save(folder / "next.png")
    assert json.loads(process.stdout.readline())["status"] == "done"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 1


# ── better pages ──────────────────────────────────────────────────────────────────────────────


def test_the_tries_at_a_page_are_versions_with_pictures_and_scores(
    own_folders: Path, flags: list[str]
) -> None:
    if find_browser() is None:
        pytest.skip("there is no browser")
    shot = own_folders / "shot.png"
    Image.new("RGB", (320, 200), "white").save(shot)
    out = own_folders / "page.html"
    hot = [*flags, "--temperature", "0.3", "--seed", "5"]
    done = w2c("generate", shot, "--out", out, "--json", "--best-of", 2, "--refine", 1, *hot)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["tries"]
    versions = Versions(own_folders / "page-tries")
    every = versions.all()
    assert [str(v.html_path) for v in every] == [row["file"] for row in rows]
    assert [v.meta.origin for v in every] == ["candidate", "candidate", "refined"][: len(every)]
    assert [v.meta.params["seed"] for v in every] == [5, 6, 7][: len(every)]
    assert [v.meta.score for v in every] == [row["score"] for row in rows]
    assert versions.current().html == out.read_text()
    for version in every:
        assert version.original_path.read_bytes() == shot.read_bytes()
        with Image.open(version.render_path) as render:
            assert render.width == 320
    if len(every) == 3:
        assert every[2].meta.parent in (1, 2)
    listed = w2c("versions", own_folders / "page-tries").stdout
    assert listed.count("score ") == len(every)
