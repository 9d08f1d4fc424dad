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


def test_a_draft_is_what_followed_the_same_three_tokens():
    lookup = PromptLookup([1, 2, 3, 4, 5, 6])
    assert lookup.draft([1, 2, 3, 4, 5, 6, 1, 2, 3], 2) == [4, 5]
    assert lookup.draft([1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 8], 2) == []
    assert lookup.draft([1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 8, 1, 2, 3], 4) == [9, 8, 1, 2]
    assert lookup.draft([1, 2, 3], 0) == []
