"""One line of the table of peers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Row:
    """`ours` and `theirs` are the runs' values in `unit`; `missing` says why there are none."""

    what: str
    instead: str
    unit: str = "s"
    ours: Sequence[float] = ()
    theirs: Sequence[float] = ()
    missing: str = ""

    def __str__(self) -> str:
        mine = f"{statistics.median(self.ours):.3g} {self.unit}" if self.ours else ""
        if self.missing:
            return f"| {self.what} | {self.instead} | {mine} | {self.missing} | |"
        other = f"{statistics.median(self.theirs):.3g} {self.unit}"
        ratios = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        spread = f" ({min(ratios):.3g} to {max(ratios):.3g})" if len(ratios) > 1 else ""
        ratio = f"{statistics.median(ratios):.3g}"
        return f"| {self.what} | {self.instead} | {mine} | {other} | {ratio}{spread} |"
