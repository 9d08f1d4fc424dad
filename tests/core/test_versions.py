"""Versions of pages on a real disk: bytes, trees, undo, several processes, processes that die."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.pictures import encoded, picture
from w2c_tui.core import versions as versions_module
from w2c_tui.core.conversation import RENDER_SOURCE, Attachment, Message
from w2c_tui.core.errors import StoreError
from w2c_tui.core.image import attachment_from_bytes
from w2c_tui.core.store import Store
from w2c_tui.core.versions import Versions, keep_answer

PAGE = "<!DOCTYPE html>\r\n<html><body>\n<p>Grüße 🙂</p></body></html>"


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    return tmp_path / "pages"


@pytest.fixture
def versions(pages: Path) -> Versions:
    return Versions(pages / "session")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "sessions.sqlite") as opened:
        yield opened


@pytest.fixture
def shot() -> Attachment:
    return attachment_from_bytes(encoded(picture()), "shot.png")


def test_a_version_is_the_page_byte_for_byte_with_all_that_is_known(versions, shot) -> None:
    version = versions.add(
        PAGE,
        original=shot,
        prompt="Make it",
        model="m",
        params={"seed": 3},
        stats={"new_tokens": 9},
    )
    assert version.name == "v001"
    assert version.html_path.read_bytes() == PAGE.encode()
    assert version.original_path == version.folder / "original.png"
    assert version.original_path.read_bytes() == shot.data
    assert not version.render_path.exists()
    again = Versions(versions.folder).get(1)
    assert again.meta == version.meta
    assert (again.meta.prompt, again.meta.model, again.meta.parent) == ("Make it", "m", None)
    assert (again.meta.params, again.meta.stats) == ({"seed": 3}, {"new_tokens": 9})
    assert abs(again.meta.created_at - time.time()) < 60


def test_nothing_is_there_before_the_first_version(versions) -> None:
    assert versions.all() == []
    assert versions.current() is None
    assert not versions.folder.exists()
    with pytest.raises(StoreError, match="nothing to undo"):
        versions.undo()
    with pytest.raises(StoreError, match="v007"):
        versions.get(7)


def test_undo_and_redo_walk_the_tree(versions) -> None:
    for html in ("one", "two", "three"):
        versions.add(html)
    assert [v.meta.parent for v in versions.all()] == [None, 1, 2]
    assert versions.undo().number == 2
    assert versions.undo().number == 1
    branch = versions.add("another two")
    assert (branch.number, branch.meta.parent) == (4, 1)
    assert versions.undo().number == 1
    assert versions.redo().number == 4
    with pytest.raises(StoreError, match="redo"):
        versions.redo()
    assert Versions(versions.folder).select(3).html == "three"
    assert Versions(versions.folder).current().number == 3


def test_a_version_that_was_only_tried_does_not_come_into_sight(versions) -> None:
    versions.add("one")
    versions.add("candidate", origin="candidate", parent=1, select=False)
    versions.note(2, score=0.25, seed=7)
    versions.note(2, rank=2)
    versions.set_render(2, b"\x89PNG")
    found = versions.get(2)
    assert versions.current().number == 1
    assert (found.meta.score, found.meta.notes) == (0.25, {"seed": 7, "rank": 2})
    assert found.render_path.read_bytes() == b"\x89PNG"
    assert found.html == "candidate"


def test_diff_is_unified_and_empty_for_equal_pages(versions) -> None:
    versions.add("<p>a</p>\n<p>b</p>\n")
    versions.add("<p>a</p>\n<p>c</p>")
    versions.add("<p>a</p>\n<p>c</p>")
    assert versions.diff(2, 3) == ""
    assert versions.diff(1, 2).splitlines() == [
        "--- v001/index.html",
        "+++ v002/index.html",
        "@@ -1,2 +1,2 @@",
        " <p>a</p>",
        "-<p>b</p>",
        "+<p>c</p>",
        "\\ No newline at end of file",
    ]


def test_an_edited_page_is_taken_back_below_the_one_it_was_made_from(versions, shot, tmp_path):
    versions.add(PAGE, original=shot, prompt="Make it", message_id=5)
    edited = tmp_path / "edited.html"
    edited.write_bytes(PAGE.encode())
    assert versions.take_edit(edited, 1).number == 1
    edited.write_bytes(b"<p>\xff mine</p>")
    version = versions.take_edit(edited, 1)
    assert (version.number, version.meta.parent, version.meta.origin) == (2, 1, "edit")
    assert version.data == b"<p>\xff mine</p>"
    assert version.original_path.read_bytes() == shot.data
    edited.write_bytes(b" \n")
    with pytest.raises(StoreError, match="empty"):
        versions.take_edit(edited, 2)
    saved = tmp_path / "out" / "page.html"
    versions.save_as(1, saved)
    assert saved.read_bytes() == PAGE.encode()


def test_a_damaged_meta_file_costs_only_what_it_said(versions) -> None:
    versions.add(PAGE)
    (versions.folder / "v001" / "meta.json").write_text('{"parent": "x"')
    assert versions.get(1).meta.origin == "unknown"
    assert versions.get(1).data == PAGE.encode()
    assert versions.add("next").meta.parent == 1


def test_processes_that_write_at_once_never_share_a_number(versions) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from w2c_tui.core.versions import Versions
        versions = Versions(Path(sys.argv[1]))
        for turn in range(15):
            versions.add(f"{sys.argv[2]}-{turn}")
    """)
    command = [sys.executable, "-c", script, str(versions.folder)]
    running = [subprocess.Popen([*command, name]) for name in "abcd"]
    assert [process.wait(60) for process in running] == [0] * 4
    every = versions.all()
    assert [version.number for version in every] == list(range(1, 61))
    assert {version.html for version in every} == {f"{n}-{t}" for n in "abcd" for t in range(15)}


def test_a_process_that_dies_while_writing_leaves_no_version(versions) -> None:
    script = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from w2c_tui.core import versions
        rename = os.rename
        os.rename = lambda *names: os._exit(9)
        versions.Versions(Path(sys.argv[1])).add("half")
    """)
    done = subprocess.run([sys.executable, "-c", script, str(versions.folder)], check=False)
    assert done.returncode == 9
    assert versions.all() == []
    (leftover,) = versions.folder.glob(".new-*")
    os.utime(leftover, (0, 0))
    assert versions.add("whole").number == 1
    assert not leftover.exists()


def test_a_full_disk_leaves_nothing_and_says_what_to_do(versions, monkeypatch) -> None:
    versions.add("one")

    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(versions_module.os, "rename", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        versions.add("two")
    assert "Free some space" in caught.value.hint
    assert sorted(os.listdir(versions.folder)) == ["current", "v001"]


# ── from a session ────────────────────────────────────────────────────────────────────────────


def say(store: Store, session: str, role: str, text: str, *images: Attachment) -> int:
    return store.add_message(session, Message(role, text, images), model="tiny").id


def test_every_answer_with_a_page_becomes_a_version_once(store, pages, shot) -> None:
    session = store.create_session(params={"temperature": 0.0}).id
    say(store, session, "user", "Build this", shot)
    first = say(store, session, "assistant", f"Here:\n```html\n{PAGE}\n```\nDone.")
    say(store, session, "user", "Say hello")
    talk = say(store, session, "assistant", "Hello!")
    say(store, session, "user", "Now in blue")
    second = say(store, session, "assistant", PAGE.replace("<p>", "<p class=blue>"))
    one = keep_answer(store, first, pages)
    assert keep_answer(store, talk, pages) is None
    two = keep_answer(store, second, pages)
    assert keep_answer(store, first, pages) == one
    assert len(Versions(pages / session).all()) == 2
    assert one.data == (PAGE + "\n").encode()
    if os.name != "nt":
        assert pages.stat().st_mode & 0o077 == 0
    assert (one.meta.parent, two.meta.parent) == (None, 1)
    assert (one.meta.prompt, two.meta.prompt) == ("Build this", "Now in blue")
    assert (one.meta.model, one.meta.params) == ("tiny", {"temperature": 0.0})
    assert two.original_path.read_bytes() == shot.data


def test_a_page_corrected_by_its_picture_is_still_about_the_screenshot(store, pages, shot) -> None:
    session = store.create_session().id
    say(store, session, "user", "Build this", shot)
    say(store, session, "assistant", PAGE)
    render = attachment_from_bytes(encoded(picture(30, 20)), "v001.png", RENDER_SOURCE)
    say(store, session, "user", "Correct this", render)
    version = keep_answer(store, say(store, session, "assistant", f"{PAGE}!"), pages)
    assert version.original_path.read_bytes() == shot.data


def test_a_regenerated_answer_is_a_sibling_and_a_continued_one_a_child(store, pages) -> None:
    session = store.create_session().id
    question = say(store, session, "user", "Build this")
    with store.begin_answer(session, parent=question) as answer:
        answer.append("<!DOCTYPE html><html><p>cut")
        answer.finish("partial", reason="length")
    first = keep_answer(store, answer.message_id, pages)
    assert not first.meta.complete
    with store.continue_answer(answer.message_id) as more:
        more.append(" off</p></html>")
        more.finish()
    longer = keep_answer(store, answer.message_id, pages)
    with store.begin_answer(session, parent=question) as other:
        other.append(PAGE)
        other.finish()
    sibling = keep_answer(store, other.message_id, pages)
    assert longer.html == "<!DOCTYPE html><html><p>cut off</p></html>"
    assert (longer.number, longer.meta.parent, longer.meta.complete) == (2, 1, True)
    assert (sibling.number, sibling.meta.parent) == (3, None)


def test_an_answer_follows_the_edit_that_is_in_sight(store, pages) -> None:
    session = store.create_session().id
    say(store, session, "user", "Build this")
    keep_answer(store, say(store, session, "assistant", PAGE), pages)
    versions = Versions(pages / session)
    edit = versions.take_edit(b"<p>mine</p>", 1)
    say(store, session, "user", "Go on")
    assert (
        keep_answer(store, say(store, session, "assistant", PAGE), pages).meta.parent == edit.number
    )
