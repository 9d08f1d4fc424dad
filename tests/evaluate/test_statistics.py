"""Intervals against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from w2c_tui.evaluate.statistics import bootstrap, wilson


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    # R: prop.test(right, rows, correct = FALSE)$conf.int
    [(0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (74, 100, 0.6463268, 0.8160291)],
)
def test_wilson_intervals(right, rows, low, high):
    interval = wilson(right, rows)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        interval = bootstrap(rng.normal(0.3, 1.0, 60), seed=seed, num_samples=500)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_bootstrap_of_one_value_and_of_nothing():
    assert bootstrap([0.5]) == bootstrap([0.5, 0.5])
    assert math.isnan(bootstrap([]).low)


def test_same_seed_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
