"""Which samples make a step, and how they are dealt to devices."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from trainer.batches import StepSampler
from trainer.recipes import named

LENGTHS = np.random.default_rng(0).integers(20, 2048, 1000).astype(np.int32)


def steps(micro_batches, **fields):
    """The samples of each step, as (steps, micro-batches, samples of one)."""
    fields = {"global_batch": 32, "epochs": 1} | fields
    recipe = msgspec.structs.replace(named("debug", "finetune"), **fields)
    sampler = StepSampler(LENGTHS, recipe, num_micro_batches=micro_batches)
    order = np.array(list(sampler))
    assert len(order) == len(sampler)
    return order.reshape(-1, micro_batches, 32 // micro_batches)


@pytest.mark.parametrize("fields", [{}, {"length_grouped": False}, {"batching": "padded"}])
def test_an_epoch_takes_every_sample_and_only_fills_the_last_step(fields):
    order = steps(4, **fields).reshape(-1)
    counts = np.bincount(order, minlength=1000)
    assert counts.min() == 1
    assert counts.sum() == 1024
    assert counts.max() == 2


@pytest.mark.parametrize("fields", [{}, {"length_grouped": False}, {"batching": "padded"}])
def test_the_samples_of_a_step_do_not_depend_on_the_devices(fields):
    one, many = steps(2, **fields), steps(16, **fields)
    for first, second in zip(one, many, strict=True):
        assert sorted(first.reshape(-1)) == sorted(second.reshape(-1))


def test_packed_micro_batches_hold_about_as_many_tokens():
    ungrouped = steps(4, length_grouped=False)
    tokens = LENGTHS[ungrouped].sum(axis=2)
    assert (tokens.max(axis=1) / tokens.min(axis=1)).max() < 1.1


def test_padded_micro_batches_hold_samples_of_like_length():
    grouped = LENGTHS[steps(4, batching="padded")]
    padding = (grouped.max(axis=2, keepdims=True) - grouped).sum() / grouped.sum()
    plain = LENGTHS[np.random.default_rng(1).permutation(1000)[:992].reshape(-1, 8)]
    assert padding < 0.1
    assert (plain.max(axis=1, keepdims=True) - plain).sum() / plain.sum() > 0.5


def test_epochs_and_seeds_have_orders_of_their_own_and_the_same_seed_the_same():
    two = steps(4, epochs=2)
    half = len(two) // 2
    assert (two[:half] != two[half:]).any()
    assert (steps(4, seed=1) != steps(4, seed=2)).any()
    assert (steps(4, seed=1) == steps(4, seed=1)).all()
    assert (two[:half] == steps(4)).all()
