"""Several answers to one question: written at once, against one after another, in one run."""

from __future__ import annotations

import statistics
import time
from typing import Any

from tests.backends.contract import at_once, events, one_by_one, stats, user
from w2c_tui.core.config import GenerationParams


def compare_candidates(backend: Any, count: int, tokens: int, sentences: int, runs: int) -> None:
    """Prints seconds and tokens/s of all candidates together, and the ratio of the two ways.

    Both ways go on from the same prompt, which is in the context already.
    """
    messages = [user("Write a web page about the sea. " * sentences)]
    ratios = []
    for run in range(runs + 1):
        params = GenerationParams(temperature=0.8, max_new_tokens=tokens, seed=run * 100)
        short = GenerationParams(temperature=0, max_new_tokens=1)
        rates = []
        for way in (one_by_one, at_once):
            events(backend, messages, short)
            began = time.perf_counter()
            answers = way(backend, messages, params, count)
            spent = time.perf_counter() - began
            rates.append(sum(stats(found).new_tokens for found in answers) / spent)
        if run:
            ratios.append(rates[1] / rates[0])
            alone, together = rates
            print(
                f"  one after another {alone:7.1f} tokens/s   at once {together:7.1f} tokens/s   "
                f"ratio {ratios[-1]:.2f}",
                flush=True,
            )
    print(f"ratio of {count} candidates, median of {len(ratios)}: {statistics.median(ratios):.2f}")
