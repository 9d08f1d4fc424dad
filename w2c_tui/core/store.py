"""The session store: every session, its tree of messages, their images, and a search over all.

Owns the tables (`migrations/`) and what may be done to them. Knows nothing about where the file
lives, how it is opened, locked and saved from damage (`database`), about models, or about screens.

One `Store` may be used from any thread; each method is one short transaction. Several windows may
use one file. Only `StreamingAnswer.append` never waits for the disk.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from w2c_tui.core.conversation import Attachment, Message, Role, TextLine
from w2c_tui.core.database import BUSY_TIMEOUT_S, Database, Schema
from w2c_tui.core.errors import StoreError

Status = Literal["complete", "streaming", "partial", "error"]
Parent = int | None | Literal["leaf"]

FLUSH_INTERVAL_S = 0.5
_MARK_START, _MARK_END = "\x02", "\x03"


class Session(msgspec.Struct, frozen=True):
    """A conversation and everything needed to resume it. Times are seconds since the epoch.

    `leaf_id` is the end of the branch in sight, None in an empty session.
    """

    id: str
    created_at: float
    updated_at: float
    deleted_at: float | None
    title: str
    model: str
    params: dict[str, Any]
    scroll: float
    leaf_id: int | None
    system_prompt: str
    draft: str


class StoredAttachment(msgspec.Struct, frozen=True):
    """An attachment without its bytes, which `Store.image` reads when they are wanted."""

    sha256: str
    width: int
    height: int
    name: str
    source: str
    page_text: tuple[TextLine, ...] | None


class StoredMessage(msgspec.Struct, frozen=True):
    """One message of the tree. `text` is raw: byte for byte what was typed or written.

    `siblings` are the ids with the same parent, oldest first and this one included: the versions
    between which the user can switch.
    """

    id: int
    session_id: str
    parent_id: int | None
    created_at: float
    deleted_at: float | None
    role: Role
    status: Status
    finish_reason: str
    error: str
    model: str
    stats: dict[str, Any]
    text: str
    attachments: tuple[StoredAttachment, ...] = ()
    siblings: tuple[int, ...] = ()


class SearchHit(msgspec.Struct, frozen=True):
    """A message that holds all words of a search; `marks` are the spans of `snippet` that match."""

    message_id: int
    session_id: str
    title: str
    role: Role
    created_at: float
    snippet: str
    marks: tuple[tuple[int, int], ...]


class Recovery(msgspec.Struct, frozen=True):
    """A damaged database was set aside at `moved_to`; this many messages could be read from it."""

    moved_to: Path
    num_messages: int

    def __str__(self) -> str:
        saved = "1 message was" if self.num_messages == 1 else f"{self.num_messages} messages were"
        return (
            f"The session database was damaged. {saved} saved from it; the damaged file is kept "
            f"as {self.moved_to}."
        )


class Store:
    """See the module. Use `Store.open`; close it, or use it as a context manager."""

    recovery: Recovery | None = None
    """Set when opening found a damaged file: tell the user where it is."""

    def __init__(self, database: Database) -> None:
        self.path = database.path
        self._db = database
        self._answers: set[StreamingAnswer] = set()

    @classmethod
    def open(cls, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> Store:
        """Open or create the store at `path`; see `Database.open`. Raises StoreError.

        Damage in what a front end shows first is found here, other damage when it is read.
        """
        store = cls(Database.open(path, _schema(), busy_timeout_s=busy_timeout_s))
        try:
            store._begin()
        except StoreError:
            store.close()
            if not store._db.suspect:
                raise
            store = cls(Database.open(path, _schema(), busy_timeout_s=busy_timeout_s))
            try:
                store._begin()
            except BaseException:
                store.close()
                raise
        except BaseException:
            store.close()
            raise
        return store

    def _begin(self) -> None:
        self.adopt_dead_answers()
        for session in self.sessions()[:1]:
            self.branch(session.id)
        if self._db.set_aside:
            with self._db.transaction(write=False):
                count = self._db.run("SELECT count(*) FROM messages").fetchone()[0]
            self.recovery = Recovery(self._db.set_aside, count)

    def close(self) -> None:
        """Write what is buffered; answers still open become 'partial'. Harmless when repeated."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._db.close)
            for answer in list(self._answers):
                stack.callback(answer.finish, "partial", reason="closed")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def adopt_dead_answers(self) -> None:
        """Answers whose process is gone become 'partial'. Done on opening; a window that saw
        another one die may do it again."""
        with self._db.live_owners() as alive, self._db.transaction():
            self._db.run(
                "UPDATE messages SET status = 'partial', finish_reason = 'interrupted',"
                " owner = NULL WHERE status = 'streaming' AND owner NOT IN"
                f" ({', '.join('?' * len(alive))})",
                alive,
            )

    # ── sessions ──────────────────────────────────────────────────────────────────────────────

    def create_session(
        self,
        title: str = "",
        *,
        system_prompt: str = "",
        model: str = "",
        params: dict[str, Any] | None = None,
    ) -> Session:
        session_id = os.urandom(6).hex()
        now = time.time()
        with self._db.transaction():
            self._db.run(
                "INSERT INTO sessions (id, created_at, updated_at, title, system_prompt, model,"
                " params) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (session_id, now, now, title, system_prompt, model, _json(params or {})),
            )
            return self.session(session_id)

    def session(self, session_id: str) -> Session:
        """Also a deleted one, until it is purged. Raises StoreError when there is none."""
        with self._db.transaction(write=False):
            row = self._db.run("SELECT * FROM sessions WHERE id = ?", (session_id,)).fetchone()
        if row is None:
            raise StoreError(f"There is no session {session_id!r} in {self.path}")
        return _session(row)

    def sessions(self, query: str = "") -> list[Session]:
        """Sessions that were not deleted, last used first; with `query`, those where the title
        holds it or a message holds all its words."""
        with self._db.transaction(write=False):
            rows = self._db.run(
                "SELECT * FROM sessions WHERE deleted_at IS NULL AND (:title = ''"
                " OR instr(casefold(title), :title) OR id IN (SELECT session_id FROM messages"
                " WHERE deleted_at IS NULL AND id IN"
                " (SELECT rowid FROM messages_fts WHERE messages_fts MATCH :match)))"
                " ORDER BY updated_at DESC, rowid DESC",
                {"title": query.strip().casefold(), "match": _match(query)},
            ).fetchall()
        return [_session(row) for row in rows]

    def update_session(
        self,
        session_id: str,
        *,
        title: str | None = None,
        system_prompt: str | None = None,
        model: str | None = None,
        params: dict[str, Any] | None = None,
        scroll: float | None = None,
    ) -> None:
        """Change what is given; None leaves a field as it is."""
        given = {
            "title": title,
            "system_prompt": system_prompt,
            "model": model,
            "params": None if params is None else _json(params),
            "scroll": scroll,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        if changes:
            assignments = ", ".join(f"{name} = :{name}" for name in changes)
            with self._db.transaction():
                self._change_session(assignments, changes | {"id": session_id})

    def set_draft(
        self, session_id: str, text: str, attachments: Sequence[Attachment] | None = None
    ) -> None:
        """Keep the unsent prompt; `attachments` None leaves the draft's images as they are."""
        with self._db.transaction():
            self._change_session("draft = :draft", {"draft": text, "id": session_id})
            if attachments is not None:
                self._db.run(
                    "DELETE FROM attachments WHERE session_id = ? AND message_id IS NULL",
                    (session_id,),
                )
                self._attach(session_id, None, attachments)

    def draft_attachments(self, session_id: str) -> list[Attachment]:
        with self._db.transaction(write=False):
            drafts = self._attachments("message_id IS NULL AND session_id = ?", (session_id,))
            return list(self._with_data(drafts.get(None, ()), {}))

    def delete_session(self, session_id: str) -> None:
        """Hide a session; `restore_session` undoes it until `purge`."""
        with self._db.transaction():
            self._change_session("deleted_at = :now", {"now": time.time(), "id": session_id})

    def restore_session(self, session_id: str) -> None:
        with self._db.transaction():
            self._change_session("deleted_at = NULL", {"id": session_id})

    def purge(self, *, older_than_s: float = 0.0) -> None:
        """Delete for good what was deleted at least this long ago, and images nobody shows."""
        before = (time.time() - older_than_s,)
        with self._db.transaction():
            self._db.run("DELETE FROM sessions WHERE deleted_at <= ?", before)
            self._db.run("DELETE FROM messages WHERE deleted_at <= ?", before)
            self._db.run("DELETE FROM images WHERE sha256 NOT IN (SELECT sha256 FROM attachments)")

    # ── the message tree ──────────────────────────────────────────────────────────────────────

    def add_message(
        self, session_id: str, message: Message, *, parent: Parent = "leaf", model: str = ""
    ) -> StoredMessage:
        """Add a finished message below `parent` (None: as a new root) and make it the leaf."""
        with self._db.transaction():
            message_id = self._insert(session_id, message, parent, "complete", model)
            return self.message(message_id)

    def edit(self, message_id: int, message: Message) -> StoredMessage:
        """A new sibling of `message_id`; the old one and all below it stay reachable."""
        with self._db.transaction():
            old = self.message(message_id)
            return self.add_message(old.session_id, message, parent=old.parent_id)

    def begin_answer(
        self, session_id: str, *, parent: Parent = "leaf", model: str = ""
    ) -> StreamingAnswer:
        """Start an answer below `parent`. To regenerate one, give its `parent_id`."""
        with self._db.transaction():
            message = Message("assistant")
            message_id = self._insert(session_id, message, parent, "streaming", model)
        return self._writer(message_id)

    def continue_answer(self, message_id: int) -> StreamingAnswer:
        """Write on at the end of a truncated or stopped answer, in place."""
        with self._db.transaction():
            changed = self._db.run(
                "UPDATE messages SET status = 'streaming', owner = ?, error = '',"
                " finish_reason = '' WHERE id = ? AND role = 'assistant'"
                " AND status <> 'streaming' AND deleted_at IS NULL",
                (self._db.owner, message_id),
            ).rowcount
        if not changed:
            raise StoreError(
                f"Message {message_id} cannot be continued",
                hint="Only a finished answer that was not deleted can be written on.",
            )
        return self._writer(message_id)

    def message(self, message_id: int) -> StoredMessage:
        """Also a deleted one. Raises StoreError when there is none."""
        found = self._load("SELECT ?", (message_id,), deleted=True)
        if not found:
            raise StoreError(f"There is no message {message_id} in {self.path}")
        return found[0]

    def branch(self, session_id: str, leaf: int | None = None) -> list[StoredMessage]:
        """The path from the root to `leaf` (by default the session's), in reading order."""
        with self._db.transaction(write=False):
            end = self.session(session_id).leaf_id if leaf is None else leaf
            found = self._load(
                "SELECT ? UNION ALL SELECT parent_id FROM messages JOIN chosen USING (id)"
                " WHERE parent_id IS NOT NULL",
                (end,),
            )
        return [message for message in found if message.session_id == session_id]

    def tree(self, session_id: str) -> list[StoredMessage]:
        """Every message of every branch, oldest first: what an export needs."""
        return self._load("SELECT id FROM messages WHERE session_id = ?", (session_id,))

    def children(self, message_id: int) -> list[StoredMessage]:
        return self._load("SELECT id FROM messages WHERE parent_id = ?", (message_id,))

    def conversation(self, session_id: str, leaf: int | None = None) -> list[Message]:
        """`branch` with the images' bytes and the system prompt in front: what a model is given.

        Every image is read once, however often it is attached.
        """
        with self._db.transaction(write=False):
            system_prompt = self.session(session_id).system_prompt
            messages = [Message("system", system_prompt)] if system_prompt else []
            images: dict[str, bytes] = {}
            for stored in self.branch(session_id, leaf):
                attachments = self._with_data(stored.attachments, images)
                messages.append(Message(stored.role, stored.text, attachments))
        return messages

    def select_branch(self, message_id: int) -> None:
        """Bring `message_id` into sight: the newest message at or below it becomes the leaf."""
        with self._db.transaction():
            session_id = self.message(message_id).session_id
            leaf = self._db.run(
                f"{_SUBTREE} SELECT max(id) FROM messages JOIN chosen USING (id)"
                " WHERE deleted_at IS NULL",
                (message_id,),
            ).fetchone()[0]
            if leaf is None:
                raise StoreError(f"Message {message_id} was deleted", hint="Restore it first.")
            self._change_session("leaf_id = :leaf", {"leaf": leaf, "id": session_id})

    def go_back_to(self, message_id: int) -> None:
        """Make a message the end of the branch in sight: what comes next follows it. What was
        below it stays, and `select_branch` brings it back."""
        with self._db.transaction():
            message = self.message(message_id)
            if message.deleted_at is not None:
                raise StoreError(f"Message {message_id} was deleted", hint="Restore it first.")
            self._change_session("leaf_id = :leaf", {"leaf": message_id, "id": message.session_id})

    def delete_message(self, message_id: int) -> None:
        """Hide a message and all below it; `restore_message` undoes it until `purge`.

        When the leaf goes, the newest sibling's branch takes its place, else the parent.
        """
        with self._db.transaction():
            target = self.message(message_id)
            self._db.run(
                f"{_SUBTREE} UPDATE messages SET deleted_at = ?"
                " WHERE deleted_at IS NULL AND id IN chosen",
                (message_id, time.time()),
            )
            leaf = self._db.run(
                "SELECT m.id, m.deleted_at FROM sessions s JOIN messages m ON m.id = s.leaf_id"
                " WHERE s.id = ?",
                (target.session_id,),
            ).fetchone()
            if leaf and leaf["deleted_at"] is not None:
                others = [sibling for sibling in target.siblings if sibling != message_id]
                change = {"leaf": target.parent_id, "id": target.session_id}
                self._change_session("leaf_id = :leaf", change)
                if others:
                    self.select_branch(others[-1])

    def restore_message(self, message_id: int) -> None:
        """Bring back what one `delete_message` hid, and show it."""
        with self._db.transaction():
            parent = self.message(message_id).parent_id
            if parent is not None and self.message(parent).deleted_at is not None:
                raise StoreError(
                    f"Message {message_id} belongs to message {parent}, which was deleted too",
                    hint="Restore that one first.",
                )
            self._db.run(
                f"{_SUBTREE} UPDATE messages SET deleted_at = NULL WHERE id IN chosen"
                " AND deleted_at = (SELECT deleted_at FROM messages WHERE id = ?)",
                (message_id, message_id),
            )
            self.select_branch(message_id)

    # ── reading across sessions ───────────────────────────────────────────────────────────────

    def search(self, text: str, *, limit: int = 50) -> list[SearchHit]:
        """Messages on any branch that hold all words of `text`, the last one as a beginning; best
        first. `text` is what a user typed: it has no syntax and cannot be wrong."""
        with self._db.transaction(write=False):
            rows = self._db.run(
                "SELECT m.id AS message_id, m.session_id, s.title, m.role, m.created_at,"
                " snippet(messages_fts, 0, ?, ?, '…', 12) AS snippet FROM messages_fts"
                " JOIN messages m ON m.id = messages_fts.rowid JOIN sessions s ON s.id ="
                " m.session_id WHERE messages_fts MATCH ? AND m.deleted_at IS NULL"
                " AND s.deleted_at IS NULL ORDER BY rank LIMIT ?",
                (_MARK_START, _MARK_END, _match(text), limit),
            ).fetchall()
        return [SearchHit(**{**dict(row), **_marked(row["snippet"])}) for row in rows]

    def prompts(self, *, limit: int = 200) -> list[str]:
        """What the user typed in all sessions, newest first, each text once."""
        with self._db.transaction(write=False):
            rows = self._db.run(
                "SELECT text FROM messages WHERE role = 'user' AND text <> ''"
                " AND deleted_at IS NULL GROUP BY text ORDER BY max(id) DESC LIMIT ?",
                (limit,),
            )
            return [row[0] for row in rows]

    def image(self, sha256: str) -> bytes:
        with self._db.transaction(write=False):
            row = self._db.run("SELECT data FROM images WHERE sha256 = ?", (sha256,)).fetchone()
        if row is None:
            raise StoreError(f"There is no image {sha256[:12]} in {self.path}")
        return bytes(row[0])

    # ── inside ────────────────────────────────────────────────────────────────────────────────

    def _change_session(self, assignments: str, values: dict[str, Any]) -> None:
        if not self._db.run(f"UPDATE sessions SET {assignments} WHERE id = :id", values).rowcount:
            raise StoreError(f"There is no session {values['id']!r} in {self.path}")

    def _insert(
        self, session_id: str, message: Message, parent: Parent, status: Status, model: str
    ) -> int:
        session = self.session(session_id)
        parent_id = session.leaf_id if parent == "leaf" else parent
        if session.deleted_at is not None:
            raise StoreError(f"Session {session_id!r} was deleted", hint="Restore it first.")
        if parent_id is not None:
            above = self.message(parent_id)
            if above.session_id != session_id:
                raise StoreError(f"Message {parent_id} is not in session {session_id!r}")
            if above.deleted_at is not None:
                raise StoreError(f"Message {parent_id} was deleted", hint="Restore it first.")
        now = time.time()
        owner = self._db.owner if status == "streaming" else None
        row = (session_id, parent_id, now, message.role, status, owner, model, message.text)
        message_id = self._db.run(
            "INSERT INTO messages (session_id, parent_id, created_at, role, status, owner, model,"
            " text) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        ).lastrowid
        assert message_id is not None
        self._attach(session_id, message_id, message.attachments)
        self._change_session(
            "leaf_id = :leaf, updated_at = :now", {"leaf": message_id, "now": now, "id": session_id}
        )
        return message_id

    def _attach(self, session_id: str, message_id: int | None, items: Iterable[Attachment]) -> None:
        owner = (session_id, message_id)
        for position, item in enumerate(items):
            self._db.run(
                "INSERT OR IGNORE INTO images (sha256, width, height, data) VALUES (?, ?, ?, ?)",
                (item.sha256, item.width, item.height, item.data),
            )
            self._db.run(
                "INSERT INTO attachments (session_id, message_id, position, sha256, name, source,"
                " page_text) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*owner, position, item.sha256, item.name, item.source, _json(item.page_text)),
            )

    def _load(
        self, chosen: str, values: Sequence[Any], *, deleted: bool = False
    ) -> list[StoredMessage]:
        """The messages whose ids `chosen` selects, in three queries however many there are."""
        cte = f"WITH RECURSIVE chosen (id) AS ({chosen})"
        with self._db.transaction(write=False):
            rows = self._db.run(
                f"{cte} SELECT {_COLUMNS} FROM messages JOIN chosen USING (id)"
                + ("" if deleted else " WHERE deleted_at IS NULL")
                + " ORDER BY id",
                values,
            ).fetchall()
            attachments = self._attachments(f"message_id IN ({cte} SELECT id FROM chosen)", values)
            families: dict[tuple[str, int | None], list[int]] = {}
            for session_id in {row["session_id"] for row in rows}:
                for parent_id, sibling in self._db.run(
                    "SELECT parent_id, id FROM messages WHERE session_id = ?"
                    " AND deleted_at IS NULL ORDER BY id",
                    (session_id,),
                ):
                    families.setdefault((session_id, parent_id), []).append(sibling)
        return [
            StoredMessage(
                **{**dict(row), "stats": msgspec.json.decode(row["stats"])},
                attachments=attachments.get(row["id"], ()),
                siblings=tuple(families.get((row["session_id"], row["parent_id"]), ())),
            )
            for row in rows
        ]

    def _attachments(
        self, where: str, values: Sequence[Any]
    ) -> dict[int | None, tuple[StoredAttachment, ...]]:
        found: dict[int | None, tuple[StoredAttachment, ...]] = {}
        for row in self._db.run(
            "SELECT message_id, sha256, width, height, name, source, page_text FROM attachments"
            f" JOIN images USING (sha256) WHERE {where} ORDER BY message_id, position",
            values,
        ):
            fields = dict(row)
            message_id = fields.pop("message_id")
            lines = msgspec.json.decode(row["page_text"], type=tuple[TextLine, ...] | None)
            stored = StoredAttachment(**{**fields, "page_text": lines})
            found[message_id] = (*found.get(message_id, ()), stored)
        return found

    def _with_data(
        self, stored: Iterable[StoredAttachment], images: dict[str, bytes]
    ) -> tuple[Attachment, ...]:
        attachments = []
        for item in stored:
            if item.sha256 not in images:
                images[item.sha256] = self.image(item.sha256)
            attachments.append(Attachment(images[item.sha256], **msgspec.structs.asdict(item)))
        return tuple(attachments)

    def _writer(self, message_id: int) -> StreamingAnswer:
        answer = StreamingAnswer(self, message_id)
        self._answers.add(answer)
        return answer


class StreamingAnswer:
    """An answer while it is written: each piece is on disk within `FLUSH_INTERVAL_S`.

    Used as a context manager, an answer that is left unfinished becomes 'partial', or 'error' when
    left by an exception.
    """

    failure: StoreError | None = None
    """Why the last write in the background failed; the text is kept and tried again."""

    def __init__(self, store: Store, message_id: int) -> None:
        self.message_id = message_id
        self._store = store
        self._pending: list[str] = []
        self._timer: threading.Timer | None = None
        self._finished = False
        self._buffer_lock = threading.Lock()
        self._write_lock = threading.Lock()

    def append(self, delta: str) -> None:
        """Take a piece; returns at once. After `finish` it is dropped: a stopped model may still
        be sending."""
        with self._buffer_lock:
            if self._finished or not delta:
                return
            self._pending.append(delta)
            if self._timer is None:
                self._timer = threading.Timer(FLUSH_INTERVAL_S, self._flush_in_background)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Write what is buffered now. Raises StoreError and keeps the text when it cannot."""
        self._write("", ())

    def finish(
        self,
        status: Literal["complete", "partial", "error"] = "complete",
        *,
        reason: str = "",
        error: str = "",
        stats: dict[str, Any] | None = None,
    ) -> StoredMessage:
        """Write the rest and the verdict. Raises StoreError when it cannot; may then be called
        again. Finishing a finished answer changes nothing."""
        if not self._finished:
            self._write(
                ", status = ?, owner = NULL, finish_reason = ?, error = ?, stats = ?",
                (status, reason, error, _json(stats or {})),
                last=True,
            )
        return self._store.message(self.message_id)

    def __enter__(self) -> StreamingAnswer:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if exc is None:
            self.finish("partial")
        else:
            self.finish("error", error=str(exc))

    def _flush_in_background(self) -> None:
        with self._buffer_lock:
            self._timer = None
        try:
            self.flush()
        except StoreError as failure:
            self.failure = failure

    def _write(self, assignments: str, values: tuple[Any, ...], *, last: bool = False) -> None:
        # Two locks: `append` must not wait while a slow disk takes the text.
        with self._write_lock:
            with self._buffer_lock:
                count = len(self._pending)
                text = "".join(self._pending)
            if self._finished or (not text and not last):
                return
            with self._store._db.transaction():
                found = self._store._db.run(
                    f"UPDATE messages SET text = text || ?{assignments} WHERE id = ?",
                    (text, *values, self.message_id),
                ).rowcount
            self.failure = None
            with self._buffer_lock:
                del self._pending[:count]
                self._finished = last or not found
                if self._finished:
                    self._store._answers.discard(self)
            if not found:
                raise StoreError(f"Answer {self.message_id} was deleted while it was written")


_COLUMNS = (
    "id, session_id, parent_id, created_at, deleted_at, role, status, finish_reason, error, model,"
    " stats, text"
)
_SUBTREE = (
    "WITH RECURSIVE chosen (id) AS (SELECT ? UNION ALL"
    " SELECT messages.id FROM messages JOIN chosen ON parent_id = chosen.id)"
)
_MEND = (
    "INSERT INTO sessions (id, title, created_at, updated_at) SELECT session_id, 'Recovered',"
    " min(created_at), max(created_at) FROM messages"
    " WHERE session_id NOT IN (SELECT id FROM sessions) GROUP BY session_id",
    "UPDATE messages SET parent_id = NULL WHERE parent_id NOT IN (SELECT id FROM messages)",
    "DELETE FROM attachments WHERE session_id NOT IN (SELECT id FROM sessions)"
    " OR message_id NOT IN (SELECT id FROM messages)"
    " OR sha256 NOT IN (SELECT sha256 FROM images)",
    "UPDATE sessions SET leaf_id = (SELECT max(id) FROM messages"
    " WHERE session_id = sessions.id AND deleted_at IS NULL)"
    " WHERE leaf_id NOT IN (SELECT id FROM messages WHERE deleted_at IS NULL)"
    " OR (leaf_id IS NULL AND title = 'Recovered')",
)


def _schema() -> Schema:
    folder = resources.files("w2c_tui.core") / "migrations"
    scripts = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".sql")),
        key=lambda file: file.name,
    )
    migrations = [script.read_text(encoding="utf-8") for script in scripts]
    return Schema(migrations, ("sessions", "images", "messages", "attachments"), _MEND)


def _session(row: sqlite3.Row) -> Session:
    return Session(**{**dict(row), "params": msgspec.json.decode(row["params"])})


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _match(text: str) -> str:
    """User text as an FTS5 query: each word quoted, so that nothing in it is an operator."""
    words = [word.replace('"', '""') for word in text[:200].replace("\0", " ").split()]
    return " ".join(f'"{word}"' for word in words) + "*" if words else '""'


def _marked(raw: str) -> dict[str, Any]:
    """Take SQLite's marks, two control characters, out of a snippet and say where they were."""
    snippet, *parts = raw.split(_MARK_START)
    marks = []
    for part in parts:
        marked, _, rest = part.partition(_MARK_END)
        marks.append((len(snippet), len(snippet) + len(marked)))
        snippet += marked + rest
    return {"snippet": snippet, "marks": tuple(marks)}
