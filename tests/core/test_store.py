"""The session store on a real file: trees, streaming, search, other processes, damage."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from w2c_tui.core import store as store_module
from w2c_tui.core.conversation import Attachment, Message, TextLine, content_hash
from w2c_tui.core.database import Database, Schema
from w2c_tui.core.errors import StoreError
from w2c_tui.core.store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sessions.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as opened:
        yield opened


def image(data: bytes = b"pixels", **fields: object) -> Attachment:
    return Attachment(data, content_hash(data), 640, 480, **fields)  # type: ignore[arg-type]


def user(text: str, *attachments: Attachment) -> Message:
    return Message("user", text, attachments)


def answer(text: str) -> Message:
    return Message("assistant", text)


def wait_until(condition: object, timeout_s: float = 20.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def run_script(body: str, path: Path) -> subprocess.Popen[str]:
    """A real process that has `store`, open on `path`; its stdout is a pipe."""
    head = """
        import sys, time
        from pathlib import Path
        from w2c_tui.core.conversation import Message
        from w2c_tui.core.store import Store
        store = Store.open(Path(sys.argv[1]))
    """
    source = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", source, str(path)], stdout=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """A test that fails does not leave its process behind."""
    with process:
        try:
            yield
        finally:
            process.kill()


def check_index(store: Store) -> None:
    """The search index holds exactly what the messages hold: SQLite's own check."""
    with store._db.transaction():
        store._db.run("INSERT INTO messages_fts (messages_fts, rank) VALUES ('integrity-check', 1)")


# ── sessions ──────────────────────────────────────────────────────────────────────────────────


def test_a_session_is_resumed_with_all_its_settings(path: Path) -> None:
    with Store.open(path) as store:
        made = store.create_session(
            "Shop", system_prompt="Be brief.", model="crystal", params={"top_p": 0.9, "stop": ["x"]}
        )
        store.update_session(made.id, title="Shop page", scroll=12.5)
        store.set_draft(made.id, "make it [Image #1]", [image(name="logo.png")])
        store.set_draft(made.id, "make it [Image #1] blue")
    with Store.open(path) as store:
        found = store.session(made.id)
        assert [session.id for session in store.sessions()] == [made.id]
        assert store.draft_attachments(made.id) == [image(name="logo.png")]
    assert (found.title, found.scroll, found.draft) == (
        "Shop page",
        12.5,
        "make it [Image #1] blue",
    )
    assert (found.system_prompt, found.model) == ("Be brief.", "crystal")
    assert found.params == {"top_p": 0.9, "stop": ["x"]}


def test_sending_empties_the_draft_images_only_when_asked(store: Store) -> None:
    session = store.create_session()
    store.set_draft(session.id, "hello", [image()])
    store.add_message(session.id, user("hello", image()))
    assert len(store.draft_attachments(session.id)) == 1
    store.set_draft(session.id, "", [])
    assert store.draft_attachments(session.id) == []
    assert len(store.branch(session.id)[0].attachments) == 1


def test_sessions_are_listed_by_last_message_and_filtered_by_title_or_text(store: Store) -> None:
    old = store.create_session("Über uns")
    new = store.create_session("Prices 100%")
    assert [session.id for session in store.sessions()] == [new.id, old.id]
    store.add_message(old.id, user("a pricing table"))
    assert [session.id for session in store.sessions()] == [old.id, new.id]
    assert [session.id for session in store.sessions("über")] == [old.id]
    assert [session.id for session in store.sessions("0%")] == [new.id]
    assert [session.id for session in store.sessions("table")] == [old.id]
    assert {session.id for session in store.sessions("pric")} == {old.id, new.id}
    assert store.sessions("no such thing") == []


def test_a_deleted_session_can_be_restored_until_it_is_purged(store: Store) -> None:
    session = store.create_session("gone")
    store.add_message(session.id, user("needle", image()))
    store.delete_session(session.id)
    assert store.sessions() == []
    assert store.search("needle") == []
    with pytest.raises(StoreError, match="was deleted"):
        store.add_message(session.id, user("more"))
    store.purge(older_than_s=3600)
    store.restore_session(session.id)
    assert [hit.session_id for hit in store.search("needle")] == [session.id]
    store.delete_session(session.id)
    store.purge()
    with pytest.raises(StoreError, match="no session"):
        store.session(session.id)
    with pytest.raises(StoreError, match="no image"):
        store.image(image().sha256)
    check_index(store)


def test_purging_keeps_images_that_are_still_shown(store: Store) -> None:
    kept, gone = store.create_session(), store.create_session()
    for session in (kept, gone):
        store.add_message(session.id, user("", image(b"shared")))
    store.add_message(gone.id, user("", image(b"only here")))
    store.delete_session(gone.id)
    store.purge()
    assert store.image(content_hash(b"shared")) == b"shared"
    with pytest.raises(StoreError):
        store.image(content_hash(b"only here"))


def test_unknown_ids_are_store_errors(store: Store) -> None:
    session, other = store.create_session(), store.create_session()
    foreign = store.add_message(other.id, user("x"))
    for call in (
        lambda: store.session("nope"),
        lambda: store.update_session("nope", title="x"),
        lambda: store.branch("nope"),
        lambda: store.add_message("nope", user("x")),
        lambda: store.add_message(session.id, user("x"), parent=999),
        lambda: store.add_message(session.id, user("x"), parent=foreign.id),
        lambda: store.message(999),
        lambda: store.select_branch(999),
        lambda: store.continue_answer(foreign.id),
    ):
        with pytest.raises(StoreError):
            call()
    assert store.tree(session.id) == []
    assert store.branch(session.id, foreign.id) == []


# ── the tree ──────────────────────────────────────────────────────────────────────────────────


def test_text_and_attachments_come_back_byte_for_byte(store: Store) -> None:
    session = store.create_session(system_prompt="You write HTML.")
    lines = (TextLine("Kauf' jetzt", (1, 2, 3, 4), 0.5),)
    shot = image(bytes(range(256)), name="a b.png", source="/tmp/a b.png", page_text=lines)
    text = "\ufeff<s>old</s>\r\n<image>\x00 </s>\t🦊 <|im_end|>\n\n"
    sent = [user(text, shot, image(b"2")), answer(text * 2), user("again", shot)]
    for message in sent:
        store.add_message(session.id, message)
    assert store.conversation(session.id) == [Message("system", "You write HTML."), *sent]
    first = store.branch(session.id)[0]
    assert [item.name for item in first.attachments] == ["a b.png", "image"]
    assert first.attachments[0].page_text == lines


def test_an_undecodable_file_name_is_stored_readably(store: Store) -> None:
    session = store.create_session()
    name = os.fsdecode(b"caf\xe9.png")
    store.add_message(session.id, user("ünï", image(name=name)))
    assert store.branch(session.id)[0].attachments[0].name == "caf\ufffd.png"
    assert store.branch(session.id)[0].text == "ünï"


def test_editing_and_regenerating_make_siblings_and_keep_the_old_branch(store: Store) -> None:
    session = store.create_session()
    question = store.add_message(session.id, user("q1"))
    first = store.add_message(session.id, answer("a1"), model="m1")
    second = store.add_message(session.id, answer("a2"), parent=question.id, model="m2")
    assert second.siblings == (first.id, second.id)
    edited = store.edit(question.id, user("q2"))
    assert [message.text for message in store.branch(session.id)] == ["q2"]
    assert edited.siblings == (question.id, edited.id)

    store.select_branch(first.id)
    assert [message.text for message in store.branch(session.id)] == ["q1", "a1"]
    store.select_branch(question.id)
    assert [message.text for message in store.branch(session.id)] == ["q1", "a2"]
    assert [message.text for message in store.branch(session.id, edited.id)] == ["q2"]
    assert [message.model for message in store.children(question.id)] == ["m1", "m2"]
    assert [message.text for message in store.tree(session.id)] == ["q1", "a1", "a2", "q2"]


def test_deleting_a_message_hides_what_is_below_and_can_be_undone(store: Store) -> None:
    session = store.create_session()
    question = store.add_message(session.id, user("q"))
    first = store.add_message(session.id, answer("first"))
    second = store.add_message(session.id, answer("second"), parent=question.id)
    below = store.add_message(session.id, user("below"))

    store.delete_message(second.id)
    assert [message.id for message in store.branch(session.id)] == [question.id, first.id]
    assert store.message(first.id).siblings == (first.id,)
    assert store.search("below") == []
    with pytest.raises(StoreError, match="was deleted"):
        store.add_message(session.id, user("x"), parent=second.id)
    with pytest.raises(StoreError, match="Restore"):
        store.restore_message(below.id)

    store.restore_message(second.id)
    texts = [message.text for message in store.branch(session.id)]
    assert texts == ["q", "second", "below"]
    store.delete_message(question.id)
    assert store.session(session.id).leaf_id is None
    store.purge()
    assert store.tree(session.id) == []


def test_undoing_a_delete_does_not_undo_an_earlier_one_below(store: Store) -> None:
    session = store.create_session()
    top = store.add_message(session.id, user("top"))
    gone = store.add_message(session.id, answer("gone"))
    store.delete_message(gone.id)
    store.delete_message(top.id)
    store.restore_message(top.id)
    assert [message.text for message in store.tree(session.id)] == ["top"]


def test_a_thousand_message_session_opens_and_is_deleted(store: Store) -> None:
    session = store.create_session()
    page = "<p>word</p>\n" * 200
    for number in range(500):
        store.add_message(session.id, user(f"question {number}", image(b"%d" % (number % 5))))
        store.add_message(session.id, answer(page))
    statements: list[str] = []
    store._db._connection.set_trace_callback(statements.append)
    branch = store.branch(session.id)
    store._db._connection.set_trace_callback(None)
    assert len(branch) == 1000
    assert [message.parent_id for message in branch[1:]] == [m.id for m in branch[:-1]]
    assert len(statements) <= 6, "the number of queries grows with the number of messages"
    store.delete_message(branch[0].id)
    store.delete_session(session.id)
    store.purge()
    assert store.sessions() == []


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.tuples(st.sampled_from("aaesdr"), st.integers(0, 10_000)), max_size=25))
def test_any_history_leaves_a_path_of_visible_messages(
    store: Store, steps: list[tuple[str, int]]
) -> None:
    """Against a model: a dictionary of parents and a set of what is hidden, by which deletion."""
    session = store.create_session()
    parents: dict[int, int | None] = {}
    hidden: dict[int, int] = {}

    def path_of(message_id: int | None) -> list[int]:
        return [*path_of(parents[message_id]), message_id] if message_id is not None else []

    for kind, number in steps:
        visible = [message_id for message_id in parents if message_id not in hidden]
        pick = visible[number % len(visible)] if visible else None
        if kind == "a" or pick is None:
            parents[store.add_message(session.id, user("x"), parent=pick).id] = pick
        elif kind == "e":
            parents[store.edit(pick, user("y")).id] = parents[pick]
        elif kind == "s":
            store.select_branch(pick)
            assert pick in [message.id for message in store.branch(session.id)]
        elif kind == "d":
            store.delete_message(pick)
            hidden |= {m: pick for m in visible if pick in path_of(m)}
        elif hidden:
            cause = list(hidden.values())[number % len(hidden)]
            if parents[cause] in hidden:
                with pytest.raises(StoreError, match="Restore"):
                    store.restore_message(cause)
            else:
                store.restore_message(cause)
                hidden = {m: why for m, why in hidden.items() if why != cause}

        visible = [message_id for message_id in parents if message_id not in hidden]
        assert [message.id for message in store.tree(session.id)] == visible
        leaf = store.session(session.id).leaf_id
        assert [message.id for message in store.branch(session.id)] == path_of(leaf)
        assert leaf is None or leaf in visible
        for message in store.branch(session.id):
            same = tuple(m for m in visible if parents[m] == message.parent_id)
            assert message.siblings == same


# ── answers while they are written ────────────────────────────────────────────────────────────


def test_an_answer_is_written_while_it_streams_and_found_when_finished(store: Store) -> None:
    session = store.create_session()
    question = store.add_message(session.id, user("q"))
    writer = store.begin_answer(session.id, model="m")
    writer.append("<p>zeb")
    assert store.message(writer.message_id).status == "streaming"
    wait_until(lambda: store.message(writer.message_id).text == "<p>zeb")
    assert store.search("zeb") == []
    writer.append("ra</p>")
    done = writer.finish(reason="stop", stats={"tokens": 7, "rate": 1.5})
    writer.append("too late")
    assert writer.finish("error") == done
    assert (done.text, done.status, done.finish_reason) == ("<p>zebra</p>", "complete", "stop")
    assert (done.stats, done.model, done.parent_id) == (
        {"tokens": 7, "rate": 1.5},
        "m",
        question.id,
    )
    assert [hit.message_id for hit in store.search("zebra")] == [done.id]


def test_appending_does_not_wait_for_the_disk(store: Store) -> None:
    writer = store.begin_answer(store.create_session().id)
    writer.append("a")
    with store._db.transaction():
        flushing = threading.Thread(target=writer.flush)
        flushing.start()
        wait_until(writer._write_lock.locked)
        time.sleep(0.05)
        writer.append("b")
    flushing.join()
    assert store.message(writer.message_id).text == "a"
    assert writer.finish().text == "ab"


def test_a_truncated_answer_is_continued_in_place(store: Store) -> None:
    session = store.create_session()
    with store.begin_answer(session.id) as writer:
        writer.append("<p>one ")
    stopped = store.message(writer.message_id)
    assert (stopped.text, stopped.status) == ("<p>one ", "partial")
    more = store.continue_answer(stopped.id)
    with pytest.raises(StoreError, match="cannot be continued"):
        store.continue_answer(stopped.id)
    more.append("two</p>")
    assert more.finish().text == "<p>one two</p>"
    assert len(store.search("one two")) == 1
    assert store.search("one")[0].snippet == "<p>one two</p>"
    check_index(store)


def test_an_exception_keeps_what_came_and_says_why(store: Store) -> None:
    session = store.create_session()
    with contextlib.suppress(ZeroDivisionError), store.begin_answer(session.id) as writer:
        writer.append("half")
        _ = 1 / 0
    failed = store.message(writer.message_id)
    assert (failed.text, failed.status, failed.error) == ("half", "error", "division by zero")


def test_closing_the_store_keeps_open_answers_as_partial(path: Path) -> None:
    with Store.open(path) as store:
        session = store.create_session()
        store.begin_answer(session.id).append("half")
    store.close()
    with Store.open(path) as store:
        (found,) = store.branch(session.id)
    assert (found.text, found.status) == ("half", "partial")
    assert [file.name for file in path.with_name("sessions.db.locks").iterdir()] == ["open"]


def test_a_full_disk_while_streaming_loses_nothing_once_there_is_space(store: Store) -> None:
    session = store.create_session()
    writer = store.begin_answer(session.id)
    connection = store._db._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    writer.append("x" * 200_000)
    wait_until(lambda: writer.failure is not None)
    assert writer.failure is not None
    assert "free some space" in writer.failure.hint
    with pytest.raises(StoreError):
        writer.finish()
    connection.execute("PRAGMA max_page_count = 1000000").fetchall()
    writer.append("y")
    assert writer.finish().text == "x" * 200_000 + "y"
    assert writer.failure is None


def test_an_answer_whose_session_was_purged_does_not_disturb_closing(path: Path) -> None:
    with Store.open(path) as store:
        session = store.create_session()
        writer = store.begin_answer(session.id)
        store.delete_session(session.id)
        store.purge()
        writer.append("x")
        with pytest.raises(StoreError, match="deleted while it was written"):
            writer.finish()


def test_many_threads_use_one_store(store: Store) -> None:
    session = store.create_session()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with store.begin_answer(session.id, parent=None) as writer:
                for piece in range(50):
                    writer.append(f"{number}.{piece} ")
                    if piece % 10 == 0:
                        writer.flush()
                        store.search("1")
                writer.finish()
        except BaseException as failure:  # noqa: BLE001
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    expected = {"".join(f"{n}.{piece} " for piece in range(50)) for n in range(6)}
    assert {message.text for message in store.tree(session.id)} == expected


# ── several processes ─────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kill_9_while_streaming_loses_at_most_the_last_second(path: Path) -> None:
    process = run_script(
        """
        session = store.create_session()
        store.add_message(session.id, Message("user", "finished message"))
        writer = store.begin_answer(session.id)
        for number in range(100000):
            writer.append(f"{number},{time.time()}\\n")
            if number == 100:
                print(session.id, flush=True)
            time.sleep(0.01)
        """,
        path,
    )
    assert process.stdout is not None
    with ending(process), Store.open(path) as other:
        session_id = process.stdout.readline().strip()
        # Another window opens meanwhile: the answer belongs to a living process and stays.
        with Store.open(path) as third:
            assert third.branch(session_id)[-1].status == "streaming"
        process.send_signal(signal.SIGKILL)
        killed_at = time.time()
        process.wait()
        other.adopt_dead_answers()
        asked, partial = other.branch(session_id)
    assert asked.text == "finished message"
    assert (partial.status, partial.finish_reason) == ("partial", "interrupted")
    lines = partial.text.splitlines()
    assert [int(line.split(",")[0]) for line in lines] == list(range(len(lines)))
    assert killed_at - float(lines[-1].split(",")[1]) < 1.0
    with Store.open(path) as store:
        assert [hit.message_id for hit in store.search("finished")] == [asked.id]
        with store.continue_answer(partial.id) as writer:
            writer.append("on")
        assert store.message(partial.id).text == partial.text + "on"


def test_two_processes_write_at_once_and_lose_nothing(path: Path) -> None:
    body = """
        session = store.create_session(sys.argv[1])
        for number in range(150):
            store.add_message(session.id, Message("user", f"text {number}"))
        store.close()
        print(session.id)
    """
    # Both also create the file at the same moment.
    processes = [run_script(body, path) for _ in range(2)]
    ids = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    with Store.open(path) as store:
        for session_id in ids:
            texts = [message.text for message in store.branch(session_id)]
            assert texts == [f"text {number}" for number in range(150)]


def test_a_database_held_by_another_program_is_a_clear_error(path: Path) -> None:
    with (
        Store.open(path, busy_timeout_s=0.1) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        assert store.sessions() == []
        with pytest.raises(StoreError, match="locked") as raised:
            store.create_session()
        assert "Another program is holding it" in raised.value.hint
        assert isinstance(raised.value.__cause__, sqlite3.OperationalError)
        other.execute("ROLLBACK")
        store.create_session()


def test_opening_waits_for_another_process_that_is_opening(path: Path) -> None:
    process = run_script(
        """
        from w2c_tui.core.database import _locked
        with _locked(Path(sys.argv[1] + ".locks") / "open", 5):
            print("locked", flush=True)
            time.sleep(60)
        """,
        path,
    )
    assert process.stdout is not None
    with ending(process):
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(StoreError, match="has been opening"):
            Store.open(path, busy_timeout_s=0.1)
        process.kill()
        Store.open(path).close()


def test_a_read_only_database_is_a_clear_error(store: Store) -> None:
    store._db._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError) as raised:
        store.create_session()
    assert "read-only" in raised.value.hint


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be used"):
        Store.open(tmp_path / "file" / "sessions.db")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(StoreError, match="folder"):
        Store.open(tmp_path / "folder.db")


def test_a_closed_store_says_so(path: Path) -> None:
    store = Store.open(path)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.sessions()


# ── versions and damage ───────────────────────────────────────────────────────────────────────


def migrated(path: Path, *more: str) -> Schema:
    schema = store_module._schema()
    return Schema([*schema.migrations, *more], schema.tables, schema.mend)


def test_an_older_database_is_backed_up_and_migrated(path: Path) -> None:
    with Store.open(path) as store:
        session = store.create_session("kept")
    newer = migrated(path, "ALTER TABLE sessions ADD COLUMN colour TEXT NOT NULL DEFAULT 'red'")
    database = Database.open(path, newer)
    with closing(database), database.transaction():
        (row,) = database.run("SELECT title, colour FROM sessions").fetchall()
        assert tuple(row) == ("kept", "red")
    (backup,) = path.parent.glob("sessions.db.v*.bak")
    with Store.open(backup) as store:
        assert store.session(session.id).title == "kept"

    with pytest.raises(StoreError, match="newer version") as raised:
        Store.open(path)
    assert "Update" in raised.value.hint
    assert not list(path.parent.glob("*damaged*"))


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    Store.open(path).close()
    with pytest.raises(StoreError):
        Database.open(
            path, migrated(path, "CREATE TABLE extra (x); INSERT INTO nowhere VALUES (1);")
        )
    with Store.open(path) as store, store._db.transaction():
        assert not store._db.run("SELECT 1 FROM sqlite_master WHERE name = 'extra'").fetchall()


def test_the_database_of_another_program_is_not_touched(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StoreError, match="another program"):
        Store.open(path)
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]


def test_migration_files_are_numbered_without_gaps() -> None:
    folder = Path(store_module.__file__).with_name("migrations")
    numbers = sorted(int(file.name[:4]) for file in folder.glob("*.sql"))
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(store_module._schema().migrations) == len(numbers)


@pytest.mark.parametrize(
    "content",
    [b"this is not a database at all" * 100, b"SQLite format 3\0"],
    ids=["no database", "only a header"],
)
def test_a_file_that_is_no_database_is_set_aside(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with Store.open(path) as store:
        recovery = store.recovery
        session = store.create_session()
    assert recovery is not None
    assert recovery.moved_to.read_bytes() == content
    assert recovery.num_messages == 0
    with Store.open(path) as store:
        assert store.recovery is None
        assert store.session(session.id)


def test_a_damaged_database_is_set_aside_and_read_out(path: Path) -> None:
    with Store.open(path) as store:
        sessions = [store.create_session(f"session {number}") for number in range(3)]
        for number in range(200):
            store.add_message(sessions[number % 3].id, user(f"text {number} " + "x" * 3000))
        store.add_message(sessions[0].id, user("with image", image(b"pixels" * 999)))
    pages = bytearray(path.read_bytes())
    place = pages.find(b"text 100 ") // 4096 * 4096
    pages[place : place + 4096] = bytes([255]) * 4096
    path.write_bytes(pages)

    with Store.open(path) as store:
        with pytest.raises(StoreError, match="malformed") as raised:
            _ = [store.branch(session.id) for session in sessions]
        assert "Restart" in raised.value.hint
    with Store.open(path) as store:
        assert store.recovery is not None
        assert store.recovery.moved_to.exists()
        assert store.recovery.num_messages > 150
        assert len({session.title for session in store.sessions()}) == 3
        (hit,) = [hit for hit in store.search("with image") if "with image" in hit.snippet]
        message = store.conversation(hit.session_id)[-1]
        assert message.attachments[0].data == b"pixels" * 999
        assert sum(len(store.tree(session.id)) for session in store.sessions()) == (
            store.recovery.num_messages
        )
        store.add_message(hit.session_id, user("life goes on"))
        with store._db.transaction():
            assert not store._db.run("PRAGMA foreign_key_check").fetchall()
        check_index(store)
    with Store.open(path) as store:
        assert store.recovery is None
        assert len(store.search("life goes on")) == 1


def test_messages_whose_session_is_lost_are_recovered_in_a_new_one(path: Path) -> None:
    with Store.open(path) as store:
        for number in range(100):
            session = store.create_session("s" * 300 + str(number))
            store.add_message(session.id, user(f"text {number}"))
    pages = bytearray(path.read_bytes())
    place = pages.find(b"s" * 300 + b"50") // 4096 * 4096
    pages[place : place + 4096] = bytes([255]) * 4096
    path.write_bytes(pages)
    with Store.open(path) as store:
        assert store.recovery is not None
        assert store.recovery.num_messages == 100
        lost = [session for session in store.sessions() if session.title == "Recovered"]
        assert lost
        assert all(len(store.branch(session.id)) == 1 for session in store.sessions())


def sixty_messages(path: Path) -> bytearray:
    """A database of sixty messages in three sessions, each message on a page of its own."""
    with Store.open(path) as store:
        for number in range(3):
            session = store.create_session(f"session {number}")
            for line in range(20):
                store.add_message(session.id, user(f"line {line} " + "x" * 3000))
    return bytearray(path.read_bytes())


def in_all(store: Store) -> int:
    return sum(len(store.tree(session.id)) for session in store.sessions())


@pytest.mark.parametrize("length", [16, 100, 4096])
def test_a_database_without_its_beginning_loses_nothing(path: Path, length: int) -> None:
    content = sixty_messages(path)
    content[:length] = os.urandom(length)
    path.write_bytes(content)
    with Store.open(path) as store:
        assert store.recovery is not None
        assert store.recovery.num_messages == in_all(store) == 60
        assert store.recovery.moved_to.read_bytes() == content
        assert store.recovery.moved_to.name.startswith("sessions-damaged-")
        assert "60 messages were saved from it" in str(store.recovery)
        check_index(store)
    assert not list(path.parent.glob(".salvage-*")), "a copy is left"


def test_what_is_left_of_a_truncated_database_is_read(path: Path) -> None:
    content = sixty_messages(path)
    path.write_bytes(content[: len(content) // 4096 * 2 // 3 * 4096])
    with Store.open(path) as store:
        assert store.recovery is not None
        assert store.recovery.num_messages == in_all(store) > 20
        assert store.search("line")


def test_damage_in_many_places_costs_what_was_there(path: Path) -> None:
    content = sixty_messages(path)
    lost = [content.find(b"line %d x" % line) // 4096 * 4096 for line in (3, 9, 10, 15)]
    for place in lost:
        content[place : place + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    for _ in range(2):
        with contextlib.suppress(StoreError), Store.open(path) as store:
            in_all(store)
            break
    with Store.open(path) as store:
        assert in_all(store) == 60 - len(lost)


def test_damage_in_the_session_used_last_is_found_on_opening(path: Path) -> None:
    content = sixty_messages(path)
    place = content.rfind(b"line 19 x") // 4096 * 4096
    content[place : place + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    with Store.open(path) as store:
        assert store.recovery is not None
        assert in_all(store) == 59


def test_reading_a_damaged_file_out_is_taken_up_again(path: Path) -> None:
    """Killed after the file was set aside, before anything was read out of it."""
    content = sixty_messages(path)
    content[:100] = bytes(100)
    path.write_bytes(content)
    kill = """
        import os, sys
        from pathlib import Path
        from w2c_tui.core import database
        from w2c_tui.core.store import Store
        database._salvage = lambda *_: os._exit(9)
        Store.open(Path(sys.argv[1]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(kill), str(path)])
    assert done.returncode == 9
    with Store.open(path) as store:
        assert store.recovery is not None
        assert in_all(store) == 60
    with Store.open(path) as store:
        assert store.recovery is None
        assert in_all(store) == 60


def test_two_processes_that_find_damage_set_it_aside_once(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"garbage" * 1000)
    body = "print(store.recovery is not None); store.close()"
    processes = [run_script(body, path) for _ in range(3)]
    seen = sorted(process.communicate()[0].strip() for process in processes)
    assert seen == ["False", "False", "True"]
    assert len(list(path.parent.glob("sessions-damaged-*.db"))) == 1


# ── search ────────────────────────────────────────────────────────────────────────────────────


def test_search_finds_words_on_every_branch_with_marked_snippets(store: Store) -> None:
    session = store.create_session("Shop")
    first = store.add_message(session.id, user("please build the Café checkout page"))
    store.edit(first.id, user("something else"))
    (hit,) = store.search("cafe CHECK")
    assert (hit.message_id, hit.title, hit.role) == (first.id, "Shop", "user")
    assert [hit.snippet[start:end] for start, end in hit.marks] == ["Café", "checkout"]
    assert store.search("cafe nothing") == []
    store.select_branch(hit.message_id)
    assert store.branch(session.id)[-1].id == first.id


def test_marks_survive_control_characters_in_the_text(store: Store) -> None:
    session = store.create_session()
    store.add_message(session.id, user("a \x02 needle \x03 b \x02"))
    (hit,) = store.search("needle")
    assert "needle" in hit.snippet
    assert all(0 <= start <= end <= len(hit.snippet) for start, end in hit.marks)


HOSTILE = [
    '"', '""', "'", "*", "a*", "-a", "a OR", "NOT", "NEAR(a b)", "a AND", "(", ")", "{a}", "text:",
    "^a", "+", "a\0b", "\0", "%", "_", "; DROP TABLE messages", "\ud800", "🦊" * 300, "a " * 9000,
    "-" * 5000, "a-" * 5000, "\n\t", '" OR 1=1 --', "é\u0301", "\x02", "{", "~", "text : x",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=[ascii(text)[:20] for text in HOSTILE])
def test_no_search_text_is_a_syntax_error(store: Store, text: str) -> None:
    session = store.create_session()
    store.add_message(session.id, user("plain a b text"))
    assert isinstance(store.search(text), list)
    assert isinstance(store.sessions(text), list)
    assert len(store.branch(session.id)) == 1


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(st.characters(), max_size=40))
def test_any_search_text_is_accepted(store: Store, text: str) -> None:
    assert store.search(text) == []


def test_prompt_history_is_newest_first_without_repeats(store: Store) -> None:
    session = store.create_session()
    for text in ("one", "two", "one", ""):
        store.add_message(session.id, user(text))
        store.add_message(session.id, answer("an answer"))
    assert store.prompts() == ["one", "two"]
    assert store.prompts(limit=1) == ["one"]
