"""One run against another, page by page or question by question.

Knows nothing about models; a row is a name and a score.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from w2c_tui.core.errors import ConfigError
from w2c_tui.evaluate.journal import read_rows, read_run
from w2c_tui.evaluate.statistics import Interval, bootstrap
from w2c_tui.evaluate.wcgb import PageResult
from w2c_tui.evaluate.wub import Answered


class Change(msgspec.Struct, frozen=True):
    """The scores of one page or question in both runs."""

    name: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        return self.second - self.first


class Paired(msgspec.Struct, frozen=True):
    """The second run against the first, over what both have done, the greatest loss first."""

    benchmark: str
    models: tuple[str, str]
    changes: tuple[Change, ...]
    means: tuple[float, float]
    difference: float
    interval: Interval

    @property
    def is_clear(self) -> bool:
        """Whether the 95% interval of the difference leaves out 0."""
        return self.interval.low > 0 or self.interval.high < 0


def compare_runs(first: Path, second: Path) -> Paired:
    """Paired differences of two folders of results. Raises ConfigError if they do not belong
    together: another benchmark, or other questions or pages."""
    runs = read_run(first), read_run(second)
    if runs[0].benchmark != runs[1].benchmark:
        raise ConfigError(
            f"{first} is a run of {runs[0].benchmark}, {second} one of {runs[1].benchmark}."
        )
    if runs[0].data != runs[1].data:
        raise ConfigError(
            f"{first} and {second} were run on different data.",
            hint="Only runs on the same questions or screenshots can be paired.",
        )
    scores = scores_of(first), scores_of(second)
    return pair(scores[0], scores[1], runs[0].benchmark, (runs[0].model, runs[1].model))


def pair(
    first: Mapping[str, float],
    second: Mapping[str, float],
    benchmark: str,
    models: tuple[str, str],
) -> Paired:
    """Two sets of scores by name. Raises ConfigError if no name is in both."""
    names = [name for name in first if name in second]
    if not names:
        raise ConfigError("The two runs have no row in common.", hint="Let both finish first.")
    changes = sorted(
        (Change(name, first[name], second[name]) for name in names),
        key=lambda change: change.difference,
    )
    differences = [change.difference for change in changes]
    count = len(changes)
    return Paired(
        benchmark=benchmark,
        models=models,
        changes=tuple(changes),
        means=(
            sum(change.first for change in changes) / count,
            sum(change.second for change in changes) / count,
        ),
        difference=sum(differences) / count,
        interval=bootstrap(differences),
    )


def scores_of(folder: Path) -> dict[str, float]:
    """The score of each row of a run: strictly right or wrong, or the visual score."""
    if read_run(folder).benchmark == "wub":
        return {row.question_id: float(row.strict_correct) for row in read_rows(folder, Answered)}
    return {row.name: row.score for row in read_rows(folder, PageResult)}
