"""GGUF files run by llama.cpp as it comes, one thread, for tests that compare numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_cpp
import numpy as np

import tests.llama_library  # noqa: F401 - models are loaded without what crashes

_F32 = 0


@contextlib.contextmanager
def opened(path: Path, *, vocab_only: bool = False, context: int = 1024) -> Iterator:
    """A `llama_cpp.Llama` with a 32-bit key-value cache that keeps the logits of every position."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        logits_all=not vocab_only,
        type_k=_F32,
        type_v=_F32,
        n_threads=1,
        n_threads_batch=1,
        vocab_only=vocab_only,
        verbose=False,
    )
    try:
        yield model
    finally:
        model.close()


def logits_of(model, ids: Sequence[int]) -> np.ndarray:
    """(len(ids), vocabulary) after reading `ids` from the start."""
    model.reset()
    model.eval(list(ids))
    return np.array(model.scores[: len(ids)])


def greedy(model, ids: Sequence[int], count: int) -> list[int]:
    """The `count` likeliest tokens one after another; nothing ends them."""
    model.reset()
    model.eval(list(ids))
    written = []
    for _ in range(count):
        written.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval([written[-1]])
    return written


def text_ids(model, text: str) -> list[int]:
    """`text` as text: special tokens are not read."""
    return model.tokenize(text.encode(), add_bos=False, special=False)
