"""Sampling equals the logits processors of transformers; guesses come from what was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from w2c_tui.backends.sampling import PromptLookup, TokenPicker
from w2c_tui.core.config import GenerationParams

SETTINGS = [
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 0.2, "top_k": 500},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 0.8},
]


def theirs(params: GenerationParams, ids: list[int], logits: np.ndarray) -> np.ndarray:
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature:
        processors.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            processors.append(TopPLogitsWarper(params.top_p))
    row = torch.from_numpy(logits)[None]
    return processors(torch.tensor([ids]), row)[0].numpy()


@pytest.mark.parametrize("changes", SETTINGS)
def test_what_may_come_and_how_likely_is_as_in_transformers(changes):
    params = GenerationParams(**changes)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        logits = (rng.standard_normal(300) * 4).astype(np.float32)
        before = logits.copy()
        ids = rng.integers(0, 300, 40).tolist()
        ours = TokenPicker(params, 0, ids).scores(logits)
        expected = theirs(params, ids, logits)
        assert (np.isinf(ours) == np.isinf(expected)).all()
        kept = np.isfinite(ours)
        assert np.allclose(ours[kept], expected[kept], rtol=1e-5, atol=1e-5)
        assert (logits == before).all(), "the row belongs to somebody else"


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1, 1e-30], dtype=np.float32))
    pick = TokenPicker(GenerationParams(temperature=1.0), 1, [])
    drawn = np.bincount([pick(logits) for _ in range(4000)], minlength=5) / 4000
    assert np.abs(drawn - [0.5, 0.25, 0.15, 0.1, 0]).max() < 0.03
    assert TokenPicker(GenerationParams(temperature=0), 1, [])(logits) == 0


def test_a_seed_makes_the_draws_and_what_was_drawn_is_penalised():
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    params = GenerationParams(temperature=1.0)
    draws = [
        [pick(logits) for _ in range(20)]
        for pick in (TokenPicker(params, seed, []) for seed in (3, 3, 4))
    ]
    assert draws[0] == draws[1] != draws[2]
    pick = TokenPicker(GenerationParams(temperature=0, repetition_penalty=10.0), 0, [])
    assert len({pick(np.abs(logits)) for _ in range(5)}) == 5


def written(passage: list[int], sure: list[float], max_repeats: int, num_tokens: int) -> list[int]:
    """By a model that begins `passage` anew each time it has written it; at place n it is `sure`[n]
    against token 99, which ends."""
    params = GenerationParams(temperature=0, max_repeats=max_repeats)
    pick = TokenPicker(params, 0, passage * 20)
    start = len(pick.ids)
    for at in range(num_tokens):
        logits = np.zeros(100, dtype=np.float32)
        logits[99] = 5
        logits[passage[at % len(passage)]] = 5 + sure[at % len(passage)]
        if pick(logits) == 99:
            break
    return pick.ids[start:]


def test_a_loop_is_left_where_the_model_is_least_sure():
    passage, sure = list(range(30)), [3.0] * 30
    sure[17] = 0.5
    left = written(passage, sure, 8, 1000)
    assert left == [*passage * 8, *passage[:17], 99]
    assert written(passage, sure, 4, 1000) == [*passage * 5, *passage[:17], 99]
    assert written(passage, sure, 0, 1000) == (passage * 40)[:1000]


def test_what_is_short_or_differs_is_no_loop():
    row, sure = [5, 6, 7], [1.0, 2.0, 3.0]
    assert written(row, sure, 8, 125) == (row * 50)[:125]
    assert written(row, sure, 8, 200)[-1] == 99
    # A table whose rows differ in a number.
    rows = [token for number in range(40) for token in (5, 6, 7, 8, 9, 20 + number)]
    assert written(rows, [1.0] * len(rows), 2, len(rows)) == rows
    # Words that come again are none, however few rounds are allowed.
    words = np.random.default_rng(0).integers(0, 2, 2000).tolist()
    for max_repeats in (1, 2, 3):
        assert written(words, [1.0] * len(words), max_repeats, len(words)) == words


def test_a_loop_at_a_temperature_is_left_too():
    logits = np.full(50, -20, dtype=np.float32)
    logits[7], logits[8] = 5, 0
    pick = TokenPicker(GenerationParams(temperature=0.2), 1, [])
    drawn = [pick(logits) for _ in range(300)]
    assert 8 in drawn
    assert drawn.index(8) == 129
    off = TokenPicker(GenerationParams(temperature=0.2, max_repeats=0), 1, [])
    assert {off(logits) for _ in range(300)} == {7}


def test_a_draft_is_what_followed_the_same_three_tokens():
    lookup = PromptLookup([1, 2, 3, 4, 5, 6])
    assert lookup.draft([1, 2, 3, 4, 5, 6, 1, 2, 3], 2) == [4, 5]
    assert lookup.draft([1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 8], 2) == []
    assert lookup.draft([1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 8, 1, 2, 3], 4) == [9, 8, 1, 2]
    assert lookup.draft([1, 2, 3], 0) == []
