"""Which token comes next: sampling from logits, and guessing ahead from what was written.

Knows nothing about models, caches or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from w2c_tui.core.config import GenerationParams


class TokenPicker:
    """Chooses the next token from a row of logits and remembers what was chosen."""

    def __init__(
        self, params: GenerationParams, seed: int, prompt: Sequence[int], device: torch.device
    ) -> None:
        self.ids = list(prompt)
        self._greedy = params.temperature == 0
        self._generator = torch.Generator(device).manual_seed(seed)
        self._processors = LogitsProcessorList()
        self._needs_ids = params.repetition_penalty != 1.0
        if self._needs_ids:
            penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
            self._processors.append(penalty)
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(params.temperature))
            if params.top_k:
                self._processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                self._processors.append(TopPLogitsWarper(params.top_p))

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor) -> int:
        if self._processors:
            ids: Any = torch.tensor([self.ids] if self._needs_ids else [[]], device=logits.device)
            scores: Any = logits[None].float()
            logits = self._processors(ids.long(), scores)[0]
        if self._greedy:
            token = int(logits.argmax())
        else:
            probabilities = torch.softmax(logits, dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self.ids.append(token)
        return token


class PromptLookup:
    """Drafts what followed the last time the newest tokens stood in the text (n-grams of 3)."""

    _N = 3

    def __init__(self, ids: Sequence[int]) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = 0
        self._index(ids)

    def _index(self, ids: Sequence[int]) -> None:
        # The newest n-gram is not its own earlier occurrence.
        for end in range(max(self._seen, self._N), len(ids)):
            self._after[tuple(ids[end - self._N : end])] = end
        self._seen = len(ids)

    def draft(self, ids: Sequence[int], length: int) -> list[int]:
        """At most `length` ids that may come next; none if there is nothing to go by."""
        self._index(ids)
        at = self._after.get(tuple(ids[-self._N :]))
        return list(ids[at : at + max(length, 0)]) if at is not None else []
