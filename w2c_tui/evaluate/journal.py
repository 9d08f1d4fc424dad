"""The results of a run, row by row on disk: killed at any moment, it goes on where it was.

A folder holds `run.json` (what was run) and `results.jsonl` (one row per question or page, in the
order in which they finished). Knows nothing about what the rows mean.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from w2c_tui.core.errors import ConfigError
from w2c_tui.core.files import write_atomically

Row = TypeVar("Row", bound=msgspec.Struct)
_COMPARED = ("benchmark", "model", "backend", "data", "params")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What was run on what. `data` is a fingerprint; `params` are all that changes the answers."""

    benchmark: str
    model: str
    backend: str
    data: str
    params: dict[str, Any]
    versions: dict[str, str] = {}


class Journal(Generic[Row]):
    """An append-only list of rows in a folder.

    Opening a folder with another run in it raises ConfigError that names the difference. A row
    that was cut by a kill is taken off.
    """

    def __init__(self, folder: Path, run: Run, kind: type[Row]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.run = _same_run(folder, run)
        self.rows: list[Row] = read_rows(folder, kind)
        path = folder / "results.jsonl"
        if path.exists():
            data = path.read_bytes()
            os.truncate(path, data.rfind(b"\n") + 1)
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> Journal[Row]:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: Row) -> None:
        """Keep `row`, on disk when this returns."""
        self._file.write(msgspec.json.encode(row) + b"\n")
        os.fsync(self._file.fileno())
        self.rows.append(row)


def read_run(folder: Path) -> Run:
    """What was run in `folder`. Raises ConfigError if no run is there."""
    try:
        return msgspec.json.decode((folder / "run.json").read_bytes(), type=Run)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{folder} holds no evaluation: {error}.", hint="Name a folder that --out wrote."
        ) from error


def read_rows(folder: Path, kind: type[Row]) -> list[Row]:
    """The finished rows of a run. Raises ConfigError that names a damaged line."""
    path = folder / "results.jsonl"
    if not path.exists():
        return []
    rows = []
    # What stands after the last line end was being written when the run was killed.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(msgspec.json.decode(line, type=kind))
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"Line {number} of {path} is damaged: {error}.",
                hint="Remove that line and run the command again: only its row is redone.",
            ) from error
    return rows


def _same_run(folder: Path, run: Run) -> Run:
    if not (folder / "run.json").exists():
        if (folder / "results.jsonl").exists():
            raise ConfigError(
                f"{folder} has results but not what was run.", hint="Choose another --out."
            )
        write_atomically(
            folder / "run.json", msgspec.json.format(msgspec.json.encode(run)).decode()
        )
        return run
    before = read_run(folder)
    for field in _COMPARED:
        old, new = getattr(before, field), getattr(run, field)
        if old != new:
            raise ConfigError(
                f"{folder} holds a run with another {field}: {old}, now {new}.",
                hint="Choose another --out.",
            )
    return before
