"""One SQLite file that several windows of the program share, and that outlives all of them.

Owns opening, migrating, locking, transactions, what happens to a damaged file, and the one seam
where sqlite3's errors become StoreError. Knows nothing about what the tables mean (`store`).

Threads: a `Database` may be used from any thread. It has one connection and one lock, which
`transaction` holds; transactions are short.

Processes: SQLite's write-ahead log lets windows read and write side by side. Each open database
also holds an operating-system lock on a file named after its `owner` in `<path>.locks/`. That lock
falls when the process ends, however it ends, so `live_owners` tells without clocks or process ids
whose work will never go on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from w2c_tui.core.errors import StoreError

BUSY_TIMEOUT_S = 10.0
_PAGE_BYTES = 4096
_LARGEST_GAP, _LARGEST_HOLE = 2**60, 10_000
APPLICATION_ID = 0x77326374
"""'w2ct', written into the file by the first migration."""

_HINTS = {
    sqlite3.SQLITE_FULL: "The disk is full: free some space and try again.",
    sqlite3.SQLITE_READONLY: "It is read-only: make the file and its folder writable for you.",
    sqlite3.SQLITE_PERM: "Make the file and its folder readable and writable for you.",
    sqlite3.SQLITE_CANTOPEN: "Make the file and its folder readable and writable for you.",
    sqlite3.SQLITE_BUSY: "Another program is holding it: close it, or try again in a moment.",
    sqlite3.SQLITE_LOCKED: "Another program is holding it: close it, or try again in a moment.",
    sqlite3.SQLITE_IOERR: "The disk does not answer: check that it is connected and healthy.",
    sqlite3.SQLITE_CORRUPT: "The file is damaged. Restart: it will be set aside and read out.",
    sqlite3.SQLITE_NOTADB: "The file is damaged. Restart: it will be set aside and read out.",
}
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

# Files in `<path>.locks/` that are no owner: held while opening; left by a run that met damage;
# the name of a damaged file that has yet to be read out.
_OPENING, _SUSPECT, _ASIDE = "open", "damaged", "aside"


class Schema:
    """What a database file of this program holds.

    `migrations[n]` brings version n to n + 1. `tables` are read out of a damaged file, in this
    order and as far as they can be read; `mend` then makes the rows agree with each other.
    """

    def __init__(
        self, migrations: Sequence[str], tables: Sequence[str], mend: Sequence[str]
    ) -> None:
        self.migrations = migrations
        self.tables = tables
        self.mend = mend


class Database:
    """See the module. Use `Database.open` and close it."""

    set_aside: Path | None = None
    """Where opening put a damaged file; what could be read of it is in this one."""

    def __init__(self, path: Path, connection: sqlite3.Connection, busy_timeout_s: float) -> None:
        self.path = path
        self.owner = os.urandom(8).hex()
        self._connection = connection
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.RLock()
        self._claim: IO[bytes] | None = None

    @classmethod
    def open(
        cls, path: Path, schema: Schema, *, busy_timeout_s: float = BUSY_TIMEOUT_S
    ) -> Database:
        """Open or create the file and bring it to the newest version, after a backup copy.

        A damaged file is renamed, never deleted: see `set_aside`. Raises StoreError when the file
        was written by a newer version or by another program, or cannot be used.
        """
        with _mapped(path):
            _locks(path).mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(_locks(path) / _OPENING, busy_timeout_s):
                connection, set_aside = _connect_or_set_aside(path, busy_timeout_s)
                database = cls(path, connection, busy_timeout_s)
                try:
                    _migrate(connection, path, schema.migrations)
                    if set_aside:
                        _salvage(set_aside, connection, schema)
                        (_locks(path) / _ASIDE).unlink()
                    database.set_aside = set_aside
                    database._claim = (_locks(path) / database.owner).open("wb")
                    _try_lock(database._claim)
                except BaseException:
                    database.close()
                    raise
        return database

    @property
    def suspect(self) -> bool:
        """Whether damage was met since opening; opening again sets the file aside then."""
        return (_locks(self.path) / _SUSPECT).exists()

    def close(self) -> None:
        """Harmless when repeated."""
        with self._lock:
            self._connection.close()
            if self._claim is not None and not self._claim.closed:
                self._claim.close()
                with contextlib.suppress(OSError):
                    (_locks(self.path) / self.owner).unlink()

    @contextlib.contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[None]:
        """All or nothing, and one consistent view. A nested one belongs to the outermost."""
        with self._lock, _mapped(self.path):
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE" if write else "BEGIN DEFERRED")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, such as a full disk.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def run(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        """One statement, inside a transaction."""
        assert self._connection.in_transaction
        if isinstance(values, dict):
            return self._connection.execute(sql, {k: _storable(v) for k, v in values.items()})
        return self._connection.execute(sql, [_storable(value) for value in values])

    @contextlib.contextmanager
    def live_owners(self) -> Iterator[list[str]]:
        """The owners whose process is alive; nobody can become one until the block ends."""
        locks = _locks(self.path)
        with _mapped(self.path), _locked(locks / _OPENING, self._busy_timeout_s):
            alive = [self.owner]
            for file in locks.iterdir():
                if file.name in (_OPENING, _SUSPECT, _ASIDE, self.owner):
                    continue
                with file.open("r+b") as claim:
                    dead = _try_lock(claim)
                if dead:
                    file.unlink()
                else:
                    alive.append(file.name)
            yield alive


def _connect_or_set_aside(path: Path, timeout_s: float) -> tuple[sqlite3.Connection, Path | None]:
    suspect, aside = _locks(path) / _SUSPECT, _locks(path) / _ASIDE
    name = aside.read_text(encoding="utf-8") if aside.exists() else ""
    if not name:
        try:
            connection = _connect(path, timeout_s, check=suspect.exists())
            suspect.unlink(missing_ok=True)
            return connection, None
        except sqlite3.DatabaseError as error:
            if _code(error) not in _DAMAGED:
                raise
        name = f"{path.stem}-damaged-{_now()}-{os.urandom(2).hex()}{path.suffix}"
        aside.write_text(name, encoding="utf-8")
    # From here on a run that is killed or finds the disk full is taken up by the next one.
    moved_to = path.with_name(name)
    if not moved_to.exists():
        # The file itself last: a log without its file would be taken for that of the next one.
        for suffix in ("-wal", "-shm", ""):
            part = Path(f"{path}{suffix}")
            if part.exists():
                part.rename(f"{moved_to}{suffix}")
    suspect.unlink(missing_ok=True)
    return _connect(path, timeout_s), moved_to


def _connect(path: Path, timeout_s: float, *, check: bool = False) -> sqlite3.Connection:
    if not path.exists():
        path.touch(mode=0o600)
    connection = sqlite3.connect(
        path, timeout=timeout_s, isolation_level=None, check_same_thread=False
    )
    try:
        connection.row_factory = sqlite3.Row
        connection.create_function("casefold", 1, str.casefold, deterministic=True)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        # With a write-ahead log this loses nothing when a process dies, only when the power does.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        # Reads the whole file, hence only after an earlier run met damage.
        if check and (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            damage = sqlite3.DatabaseError(found)
            damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damage
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    version, application_id, num_tables = connection.execute(
        "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_master)"
        " FROM pragma_user_version, pragma_application_id"
    ).fetchone()
    if num_tables and application_id != APPLICATION_ID:
        raise StoreError(
            f"{path} is the database of another program", hint="Choose another data folder."
        )
    if version > len(migrations):
        raise StoreError(
            f"{path} was written by a newer version of w2c-tui (schema {version}; this version"
            f" knows schemas up to {len(migrations)})",
            hint="Update w2c-tui, or choose another data folder.",
        )
    if 0 < version < len(migrations):
        backup = path.with_name(f"{path.name}.v{version}-{_now()}.bak")
        backup.touch(mode=0o600)
        with contextlib.closing(sqlite3.connect(backup)) as copy:
            connection.backup(copy)
    for number, script in enumerate(migrations[version:], version + 1):
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{script};\nPRAGMA user_version = {number};\nCOMMIT;"
            )
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _salvage(damaged: Path, connection: sqlite3.Connection, schema: Schema) -> None:
    """Copy what can still be read. Raises when it cannot be written."""
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("BEGIN IMMEDIATE")
    try:
        with _readable_copy(damaged, schema) as old:
            for table in schema.tables:
                _copy_readable(table, old, connection)
        for statement in schema.mend:
            connection.execute(statement)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("PRAGMA foreign_keys = ON")


@contextlib.contextmanager
def _readable_copy(damaged: Path, schema: Schema) -> Iterator[sqlite3.Connection]:
    """A connection to a copy of `damaged`, whose first page is replaced if it makes no sense.

    That page says where the tables begin. A new database has them at the same places, because they
    are made first and never again.
    """
    with tempfile.TemporaryDirectory(prefix=".salvage-", dir=damaged.parent) as folder:
        copy = Path(folder, "copy")
        for suffix in ("", "-wal"):
            if Path(f"{damaged}{suffix}").exists():
                shutil.copyfile(f"{damaged}{suffix}", f"{copy}{suffix}")
        with contextlib.closing(_lenient(copy)) as old:
            if _sees(old, schema.tables):
                yield old
                return
        new = Path(folder, "new")
        with contextlib.closing(sqlite3.connect(new)) as empty:
            for script in schema.migrations:
                empty.executescript(script)
        first = bytearray(new.read_bytes()[:_PAGE_BYTES])
        log = Path(f"{copy}-wal").exists()
        # https://www.sqlite.org/fileformat.html#the_database_header: with or without a log; equal
        # change counters, so that the number of pages counts; no free pages.
        first[18:20] = b"\2\2" if log else b"\1\1"
        first[24:28] = first[92:96] = (1).to_bytes(4, "big")
        first[28:32] = (copy.stat().st_size // _PAGE_BYTES).to_bytes(4, "big")
        first[32:40] = bytes(8)
        with copy.open("r+b") as file:
            file.write(first)
        with contextlib.closing(_lenient(copy)) as old:
            yield old


def _lenient(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    # Without this SQLite refuses a file that is shorter than its header says.
    with contextlib.suppress(sqlite3.DatabaseError):
        connection.execute("PRAGMA writable_schema = ON")
    return connection


def _sees(connection: sqlite3.Connection, tables: Sequence[str]) -> bool:
    try:
        found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.DatabaseError:
        return False
    return found.issuperset(tables)


def _copy_readable(table: str, old: sqlite3.Connection, new: sqlite3.Connection) -> None:
    try:
        names = [it[0] for it in old.execute(f"SELECT * FROM {table} LIMIT 0").description]
    except sqlite3.DatabaseError:
        return
    insert = (
        f"INSERT OR IGNORE INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
    )
    for row in _readable_rows(table, old):
        new.execute(insert, row)


def _readable_rows(table: str, old: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """The rows of `table`; a damaged page costs only those on it."""
    after: int | None = -1
    while after is not None:
        last = after
        try:
            rows = old.execute(f"SELECT rowid, * FROM {table} WHERE rowid > ? ORDER BY 1", (after,))
            for row in rows:
                last = row[0]
                yield row[1:]
            return
        except sqlite3.DatabaseError:
            after = _next_readable(table, old, last)
        # Looking for what comes after an id reads its page and the next; looking for the id, one.
        end = last + _LARGEST_HOLE
        for number in range(last + 1, end if after is None else min(after + 1, end)):
            with contextlib.suppress(sqlite3.DatabaseError):
                yield from old.execute(f"SELECT * FROM {table} WHERE rowid = ?", (number,))


def _next_readable(table: str, old: sqlite3.Connection, after: int) -> int | None:
    """The id, found by doubling and halving, after which rows can be read again."""

    def readable(gap: int) -> bool:
        query = f"SELECT * FROM {table} WHERE rowid > ? ORDER BY rowid"
        try:
            old.execute(query, (after + gap,)).fetchone()
        except sqlite3.DatabaseError:
            return False
        return True

    good, bad = 1, 0
    while not readable(good):
        if good > _LARGEST_GAP:
            return None
        good, bad = good * 2, good
    while good - bad > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if readable(middle) else (good, middle)
    return after + good


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if _code(error) in _DAMAGED:
            with contextlib.suppress(OSError):
                (_locks(path) / _SUSPECT).touch()
        hint = _HINTS.get(_code(error), "")
        raise StoreError(f"The session database {path} failed: {error}", hint=hint) from error
    except OSError as error:
        raise StoreError(
            f"The session database {path} cannot be used: {error}",
            hint="Make the file and its folder readable and writable for you.",
        ) from error


@contextlib.contextmanager
def _locked(file: Path, timeout_s: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    with file.open("ab") as handle:
        while not _try_lock(handle):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"Another process has been opening {file.parent} for {timeout_s:g} s",
                    hint="Close the other windows of w2c-tui and try again.",
                )
            time.sleep(0.02)
        yield


def _try_lock(handle: IO[bytes]) -> bool:
    """Take the file's lock for as long as it is open; False when somebody else has it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
    else:
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _locks(path: Path) -> Path:
    return path.with_name(f"{path.name}.locks")


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code, 0 for an error of the Python module itself."""
    code: int = getattr(error, "sqlite_errorcode", 0) or 0
    return code & 0xFF


def _storable(value: Any) -> Any:
    """Text without lone surrogates, as an undecodable file name has them: UTF-8 has no such."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value
