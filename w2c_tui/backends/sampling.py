"""Which token comes next: sampling from logits, and guessing ahead from what was written.

One way for every backend, equal to the logits processors of transformers but for loops, which end
here. Knows nothing about models, caches or text, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from w2c_tui.core.config import GenerationParams


class TokenPicker:
    """Chooses the next token from a row of logits and remembers what was chosen."""

    def __init__(self, params: GenerationParams, seed: int, prompt: Sequence[int]) -> None:
        self.ids = list(prompt)
        self._params = params
        self._random = np.random.default_rng(seed)
        self._loops = Loops(params.max_repeats) if params.max_repeats else None
        self._seen = set(prompt)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """The next token; logits: (V,)."""
        scores = self.scores(logits)
        if self._params.temperature == 0:
            token = int(scores.argmax())
        else:
            weights = np.exp(scores - scores.max(), dtype=np.float64).cumsum()
            drawn = self._random.random() * weights[-1]
            # Rounding may put the draw at the very end.
            token = min(int(np.searchsorted(weights, drawn, side="right")), len(weights) - 1)
        self.ids.append(token)
        self._seen.add(token)
        if self._loops is not None:
            self._loops.add(token)
        return token

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """`logits` after penalty, loops, temperature, top-k and top-p; what cannot come is -inf."""
        params = self._params
        scores = logits
        if params.repetition_penalty != 1.0 and self._seen:
            seen = np.fromiter(self._seen, dtype=np.int64)
            scores = scores.copy()
            kept = scores[seen]
            penalty = np.float32(params.repetition_penalty)
            scores[seen] = np.where(kept < 0, kept * penalty, kept / penalty)
        if self._loops is not None and (token := self._loops.refused(scores)) is not None:
            scores = scores.copy()
            scores[token] = -np.inf
        if params.temperature == 0:
            return scores
        scores = scores / np.float32(params.temperature)
        if 0 < params.top_k < len(scores):
            least = np.partition(scores, -params.top_k)[-params.top_k]
            scores[scores < least] = -np.inf
        if params.top_p < 1:
            order = np.argsort(scores, kind="stable")
            weights = np.exp(scores[order] - scores.max())
            share = (weights / weights.sum()).cumsum()
            unlikely = share <= 1 - params.top_p
            # The likeliest always stays.
            unlikely[-1] = False
            scores[order[unlikely]] = -np.inf
        return scores


class Loops:
    """Notices that an answer goes round in circles, and where to leave.

    A loop is a passage of up to `MAX_TOKENS` tokens that was written `max_repeats` times in a row,
    and over `MIN_TOKENS` of those: short pages and rows of a table are none. It is left where its
    next token is least sure, which is where an element could end, and not in the middle of one.
    """

    MAX_TOKENS = 256
    MIN_TOKENS = 128

    def __init__(self, max_repeats: int) -> None:
        # Fewer rounds would be two passages that are alike.
        self._max_repeats = max(max_repeats, 3)
        self._ids: list[int] = []
        self._places: dict[int, list[int]] = {}
        self._runs: dict[int, int] = {}
        """By distance: how many of the newest tokens are what stood that far before them."""
        self._leads: list[float] = []
        """How sure each token was since a loop is one round from its end."""

    def add(self, token: int) -> None:
        """`token` was written."""
        at = len(self._ids)
        self._ids.append(token)
        runs: dict[int, int] = {}
        places = self._places.setdefault(token, [])
        for place in reversed(places):
            if at - place > self.MAX_TOKENS:
                break
            runs[at - place] = self._runs.get(at - place, 0) + 1
        places.append(at)
        self._runs = runs

    def refused(self, scores: NDArray[np.float32]) -> int | None:
        """The token that is not to come next, if any; to be asked once for each; scores: (V,)."""
        length = self._length()
        if length is None:
            self._leads = []
            return None
        token = self._ids[-length]
        others = scores.copy()
        others[token] = -np.inf
        self._leads.append(float(scores[token] - others.max()))
        place, last_round = len(self._leads) - 1, self._leads[:length]
        if place < length or place % length != last_round.index(min(last_round)):
            return None
        return token

    def _length(self) -> int | None:
        """That of the passage that is repeated, one round before it was repeated enough."""
        for length, run in sorted(self._runs.items()):
            if run >= max((self._max_repeats - 2) * length, self.MIN_TOKENS - length):
                return length
        return None


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
