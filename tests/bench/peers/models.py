"""The backends beside the usual ways of running the same weights on the same conversation."""

from __future__ import annotations

import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging

from tests.backends.contract import events, picture, stats, text_of, user
from tests.backends.gguf_files import save_mmproj
from tests.bench.bench_gguf import by_handler
from tests.bench.bench_gguf import turns as gguf_turns
from tests.bench.bench_hf import SHAPES, generate
from tests.bench.peers.rows import Row
from tests.tiny import save_llava
from w2c_tui.backends.hf import HFBackend
from w2c_tui.core.config import GenerationParams, LoadSpec, paths
from w2c_tui.core.conversation import Message
from w2c_tui.core.image import open_image, pixel_values
from w2c_tui.core.locate import locate
from w2c_tui.core.prompt import PAGE_PROMPT

TOKENS = 16
CHANGES = ("Make it blue", "Add a footer", "Use a larger font", "Add a button")


def turns(folder: Path, threads: int, runs: int) -> list[Row]:
    """Five turns over an image of 576 tokens, against `model.generate` with everything afresh at
    each turn, which is what llava.serve.cli does."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shape = {name: size for name, size in SHAPES["135m"].items() if name != "vocab_size"}
    save_llava(folder, image_size=336, **shape, max_position_embeddings=4096)
    backend = HFBackend()
    info = backend.load(LoadSpec(name=str(folder), threads=threads), lambda *_: None)
    assert info.image_spec is not None
    dtype = getattr(torch, info.dtype)
    plain = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    # Both write the same number of tokens, whatever these are.
    plain.generation_config.eos_token_id = None
    backend._eos_ids = set()
    params = GenerationParams(temperature=0, max_new_tokens=TOKENS)
    first: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in range(1, 6)}
    whole: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in range(1, 6)}
    for run in range(runs + 1):
        image = picture("red", (1280, 900 + run))
        messages = [user(PAGE_PROMPT, image)]
        for turn in first:
            found = events(backend, messages, params)
            mine = stats(found)
            began = time.perf_counter()
            pixels = torch.from_numpy(pixel_values(open_image(image), info.image_spec))
            # It prepares the picture once, and encodes it at each turn.
            prepared_s = time.perf_counter() - began if turn == 1 else 0.0
            inputs = {
                "input_ids": torch.tensor([backend.encode(messages).ids]),
                "pixel_values": pixels[None].to(dtype),
            }
            other = generate(plain, backend._loaded.tokenizer, inputs, TOKENS)
            # The first conversation warms both up.
            if run:
                for into, ours, theirs in (
                    (first, mine.time_to_first_token_s, prepared_s + other[0]),
                    (whole, mine.total_s, prepared_s + other[1]),
                ):
                    into[turn][0].append(ours)
                    into[turn][1].append(theirs)
            if turn < 5:
                answer = Message("assistant", text_of(found) or "<html>")
                messages += [answer, user(CHANGES[turn - 1])]
    backend.close()
    name = "`model.generate`, afresh per turn (as llava.serve.cli)"
    return [
        *(Row(f"LLaVA, 135M: first token of turn {n}", name, "s", *first[n]) for n in (1, 2, 5)),
        *(Row(f"LLaVA, 135M: turn {n}, {TOKENS} tokens", name, "s", *whole[n]) for n in (2, 5)),
    ]


def handler(folder: Path, threads: int, runs: int) -> list[Row]:
    """Turn 2 over an image of 576 tokens, against llama-cpp-python's handler."""
    path = Path(locate("smollm2-135m", paths().models, lambda *_: None))
    mmproj = save_mmproj(folder / "mmproj.gguf", 576, image_size=336, hidden=384, layers=12)
    ours, theirs = [], []
    for _ in range(runs):
        ours.append(gguf_turns(path, mmproj, threads, 1))
        theirs.append(by_handler(path, mmproj, threads, 1))
    return [
        Row(
            f"GGUF, 135M in Q4_1 with DINOv2-S: {what}",
            "`Llava15ChatHandler` of llama-cpp-python",
            "s",
            [one[at] for one in ours],
            [one[at] for one in theirs],
        )
        for at, what in enumerate(("first token of turn 2", "turn 2, 16 tokens"))
    ]
