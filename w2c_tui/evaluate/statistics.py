"""How sure a mean is: intervals for ratios and for paired differences.

Knows nothing about benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

_Z_95 = 1.959963984540054
"""The 97.5% quantile of the normal distribution."""


class Interval(msgspec.Struct, frozen=True):
    """A 95% interval."""

    low: float
    high: float


def wilson(num_correct: int, num_rows: int) -> Interval:
    """The Wilson score interval of a ratio (Wilson 1927), which stays within 0..1."""
    if not num_rows:
        return Interval(0.0, 1.0)
    ratio, squared = num_correct / num_rows, _Z_95 * _Z_95
    centre = ratio + squared / (2 * num_rows)
    spread = _Z_95 * math.sqrt((ratio * (1 - ratio) + squared / (4 * num_rows)) / num_rows)
    scale = 1 + squared / num_rows
    return Interval(max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def bootstrap(values: Sequence[float], *, seed: int = 0, num_samples: int = 10_000) -> Interval:
    """The percentile bootstrap interval of the mean of `values` (Efron 1979)."""
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        return Interval(math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = np.empty(num_samples)
    # In pieces, so that a run of thousands of pages needs no gigabytes of indices.
    step = max(1, 2_000_000 // data.size)
    for start in range(0, num_samples, step):
        count = min(step, num_samples - start)
        means[start : start + count] = data[rng.integers(data.size, size=(count, data.size))].mean(
            1
        )
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high))
