"""The folder of a run: what is in it, whose it is, and which checkpoint may be taken.

    run.json            the resolved recipe and the data's fingerprint
    metrics.jsonl       one line per step
    samples.jsonl       pages that the model wrote along the way
    checkpoint-N/       full state after step N, complete or not there
    model/              the result, a standard checkpoint folder
    report.html         what happened

A checkpoint is written under another name and renamed when it is whole. Knows nothing about models
or the loop.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec

import w2c_tui
from trainer.recipes import Recipe
from trainer.report import report
from w2c_tui.core.errors import ConfigError
from w2c_tui.core.files import write_atomically

PARTIAL = ".partial"
_LAUNCH = "launch.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class DiskPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a run writes: the result, each checkpoint, and cached features of images.

    `num_checkpoints`: at once, with the one that is being written.
    """

    result: int
    checkpoint: int
    num_checkpoints: int
    features: int

    @property
    def run(self) -> int:
        """What the folder of the run holds at most."""
        return self.result + self.num_checkpoints * self.checkpoint


# What may differ when a run goes on: nothing that the result depends on.
_FREE = {
    *("out", "data", "save_every", "keep_checkpoints", "log_to", "sample_every"),
    *("stall_timeout_s", "workers", "per_device_batch", "offload", "offload_folder"),
    *("gradient_checkpointing", "attn"),
}


class RunFolder:
    """A run's folder, claimed for `recipe` over the data with `data_fingerprint`."""

    def __init__(self, recipe: Recipe, data_fingerprint: str) -> None:
        self.path = Path(recipe.out).expanduser()
        self.recipe = recipe
        self._data_fingerprint = data_fingerprint

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "model"

    @property
    def resharded(self) -> Path:
        """A checkpoint of other devices, in the form that these read, while it is read."""
        return self.path / PARTIAL / "resharded"

    def check(self, *, resume: bool) -> None:
        """Raise ConfigError unless this run may use the folder. Changes nothing."""
        if not self.recipe.out:
            raise ConfigError("The run has no folder.", hint="Name one with --out.")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file.", hint="Name a folder with --out.")
        known = self.path / "run.json"
        if not known.is_file():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ConfigError(
                    f"{self.path} holds something that is no training run.",
                    hint="Name a new folder with --out.",
                )
            return
        if self.result.exists():
            raise ConfigError(
                f"{self.path} holds a run that is finished: {self.result}.",
                hint="Name a new folder with --out.",
            )
        if not resume:
            raise ConfigError(
                f"{self.path} holds another run.",
                hint="Go on with it by --resume, or name a new folder with --out.",
            )
        self._compare(known)

    def check_room(self, plan: DiskPlan) -> None:
        """Raise ConfigError if what the run will write does not fit beside what is there."""
        parents = (self.path, *self.path.parents)
        existing = next(folder for folder in parents if folder.exists())
        free = shutil.disk_usage(existing).free
        # Earlier checkpoints of this run make room for later ones.
        needed = plan.run - len(self.checkpoints()) * plan.checkpoint
        if free < needed:
            raise ConfigError(
                f"This run writes up to {needed / 1e9:,.2f} GB to {self.path} (the result "
                f"{plan.result / 1e9:,.2f} GB, {plan.num_checkpoints} checkpoints of "
                f"{plan.checkpoint / 1e9:,.2f} GB), and {free / 1e9:,.2f} GB are free.",
                hint="Free some space, name another --out, or lower --keep-checkpoints.",
            )

    def _compare(self, known: Path) -> None:
        try:
            stored = json.loads(known.read_text(encoding="utf-8"))
            before, fingerprint = dict(stored["recipe"]), stored["data_fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{known} cannot be read: {error}.", hint="Name a new folder with --out."
            ) from error
        now = msgspec.to_builtins(self.recipe)
        # A run may end earlier than was planned: its learning rate falls over the steps left.
        newest = self._newest_step()
        ends = 0 < newest <= self.recipe.max_steps <= (before.get("max_steps") or newest)
        free = _FREE | {"max_steps"} if ends else _FREE
        changed = [
            f"{field} was {before.get(field)!r} and is {now[field]!r}"
            for field in now
            # A field that the run's version did not know had its default's meaning.
            if field not in free
            and field in before
            and before[field] != json.loads(json.dumps(now[field]))
        ]
        if fingerprint != self._data_fingerprint:
            changed.append("the data are others")
        if changed:
            raise ConfigError(
                f"The run in {self.path} was started differently: {'; '.join(changed)}.",
                hint="Go on with the recipe it was started with, or name a new folder with --out.",
            )

    def claim(self) -> None:
        """Write `run.json` and remove what a killed process left half-written."""
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)
        if not (self.path / "run.json").is_file():
            run = {
                "recipe": msgspec.to_builtins(self.recipe),
                "data_fingerprint": self._data_fingerprint,
                "code_version": w2c_tui.__version__,
            }
            write_atomically(self.path / "run.json", json.dumps(run, indent=2) + "\n")

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = [
            (int(match[1]), path)
            for path in (self.path.iterdir() if self.path.is_dir() else ())
            if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
        ]
        return [path for _, path in sorted(found)]

    def newest(self) -> Path | None:
        """The checkpoint to go on from."""
        return next(reversed(self.checkpoints()), None)

    def _newest_step(self) -> int:
        newest = self.newest()
        return int(newest.name.rpartition("-")[2]) if newest else 0

    def devices_of(self, checkpoint: Path) -> int:
        """How many devices wrote `checkpoint`. Raises ConfigError if it does not say."""
        try:
            devices = json.loads((checkpoint / _LAUNCH).read_text(encoding="utf-8"))["world_size"]
            return int(devices)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{checkpoint} is damaged: {error}.", hint="Remove it to go on from an earlier one."
            ) from error

    def publish(self, name: str, world_size: int) -> None:
        """Make the checkpoint `name` under PARTIAL the newest one, and drop those beyond the limit.

        Its files are on the disk before it gets its name.
        """
        scratch = self.path / PARTIAL / name
        (scratch / _LAUNCH).write_text(json.dumps({"world_size": world_size}), encoding="utf-8")
        for file in scratch.rglob("*"):
            if file.is_file():
                _sync(file)
        shutil.rmtree(self.path / name, ignore_errors=True)
        scratch.rename(self.path / name)
        _sync(self.path)
        for old in self.checkpoints()[: -self.recipe.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)

    def forget_after(self, step: int) -> None:
        """Drop what was noted of the steps that a resumed run does again."""
        for path in (self.metrics, self.samples):
            if path.is_file():
                kept = [line for line in read_lines(path) if line["step"] <= step]
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write_report(self) -> None:
        """Write `report.html` anew."""
        recipe = msgspec.to_builtins(self.recipe)
        page = report(recipe, read_lines(self.metrics), read_lines(self.samples))
        write_atomically(self.path / "report.html", page)


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Append `line` as JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of `path`; one that was cut off is left out, a file not there has none."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
