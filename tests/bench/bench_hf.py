"""The HF backend against what transformers offers, on the same weights in one run.

    python -m tests.bench.bench_hf decode [--model FOLDER_OR_NAME] [--shape 135m|1b]
    python -m tests.bench.bench_hf turns
    python -m tests.bench.bench_hf best_of [--candidates 4]

`decode`: tokens/s while writing, ours against `model.generate` with `TextIteratorStreamer`, the
two in turn; the ratio should be at least 1.1. `turns`: time to first token of a second turn over
an unchanged image of 576 tokens, as a share of the first turn's; it should be at most 0.15.
`best_of`: tokens/s of several candidates written at once, against one after another over the same
prompt.
Ratios are what counts: single times depend on the machine and on what else runs on it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TextIteratorStreamer,
)
from transformers.utils import logging

from tests.backends.contract import events, picture, stats, user
from tests.bench.candidates import compare_candidates
from tests.tiny import byte_level_tokenizer, save_llava
from w2c_tui.backends.base import ModelInfo
from w2c_tui.backends.hf import HFBackend
from w2c_tui.core.config import GenerationParams, LoadSpec, paths
from w2c_tui.core.conversation import Message
from w2c_tui.core.locate import locate
from w2c_tui.models.checkpoint import open_checkpoint

SHAPES = {
    # SmolLM2-135M and TinyLlama-1.1B.
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    },
}  # fmt: skip


def save_shape(shape: str, folder: Path) -> Path:
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ours(backend: HFBackend, messages: list[Message], count: int) -> float:
    """Tokens per second after the first."""
    backend._reset_context()
    params = GenerationParams(temperature=0, max_new_tokens=count)
    return stats(events(backend, messages, params)).tokens_per_s


def generate(
    model: PreTrainedModel, tokenizer: Any, inputs: dict[str, torch.Tensor], count: int
) -> tuple[float, float, str]:
    """`model.generate` with a streamer in a thread, as chat programs do: seconds to the first
    token and to the last, and the text."""
    at = []

    class Timed(TextIteratorStreamer):
        def put(self, value: torch.Tensor) -> None:
            if value.numel() == 1:
                at.append(time.perf_counter())
            super().put(value)

    streamer = Timed(tokenizer, skip_prompt=True)
    arguments = {
        **inputs,
        "attention_mask": torch.ones_like(inputs["input_ids"]),
        "streamer": streamer,
        "max_new_tokens": count,
        "do_sample": False,
    }
    began = time.perf_counter()
    worker = threading.Thread(target=model.generate, kwargs=arguments)
    worker.start()
    text = "".join(streamer)
    worker.join()
    return at[0] - began, at[-1] - began, text


def theirs(
    model: PreTrainedModel, backend: HFBackend, messages: list[Message], count: int
) -> float:
    inputs = {"input_ids": torch.tensor([backend.encode(messages).ids])}
    first, last, _ = generate(model, backend._loaded.tokenizer, inputs, count)
    return (count - 1) / (last - first)


def loaded(given: argparse.Namespace, scratch: Path) -> tuple[HFBackend, str, ModelInfo]:
    """The model to measure, which never ends an answer by itself, and its name."""
    name = given.model or str(save_shape(given.shape, scratch))
    backend = HFBackend()
    info = backend.load(
        LoadSpec(name=name, dtype=given.dtype, threads=given.threads), lambda *_: None
    )
    print(f"{info.name}: {info.num_parameters / 1e6:.0f}M, {info.dtype}")
    backend._eos_ids = set()
    return backend, name, info


def bench_decode(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        backend, name, info = loaded(given, Path(scratch))
        dtype = getattr(torch, info.dtype)
        where = locate(name, paths().models, lambda *_: None)
        folder = open_checkpoint(where, cache_dir=paths().models).folder
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        plain.generation_config.eos_token_id = None
        messages = [user("Write a web page about the sea. " * given.prompt)]
        ratios = []
        for run in range(given.runs + 1):
            a = ours(backend, messages, given.tokens)
            b = theirs(plain, backend, messages, given.tokens)
            if run:
                ratios.append(a / b)
                print(f"  ours {a:7.1f} tokens/s   generate {b:7.1f} tokens/s   ratio {a / b:.2f}")
        print(f"decode ratio, median of {len(ratios)}: {statistics.median(ratios):.2f}")


def bench_turns(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_llava(
            Path(scratch),
            image_size=336,
            **{k: v for k, v in SHAPES["135m"].items() if k != "vocab_size"},
            max_position_embeddings=4096,
        )
        backend = HFBackend()
        backend.load(LoadSpec(name=str(folder), threads=given.threads), lambda *_: None)
        ratios = []
        params = GenerationParams(temperature=0, max_new_tokens=8)
        for run in range(given.runs + 1):
            backend._reset_context()
            backend._images.clear()
            image = picture("red", (1280, 900 + run))
            first = [user("Please generate html code for the given image", image)]
            one = stats(events(backend, first, params))
            second = [*first, Message("assistant", "<html></html>"), user("Make it blue")]
            two = stats(events(backend, second, params))
            ratio = two.time_to_first_token_s / one.time_to_first_token_s
            if run:
                ratios.append(ratio)
                print(
                    f"  turn 1 {one.time_to_first_token_s:.2f} s ({one.prompt_tokens} tokens)   "
                    f"turn 2 {two.time_to_first_token_s:.2f} s   ratio {ratio:.3f}"
                )
        print(f"turn 2 / turn 1, median of {len(ratios)}: {statistics.median(ratios):.3f}")


def bench_best_of(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        backend, _, _ = loaded(given, Path(scratch))
        compare_candidates(backend, given.candidates, given.tokens, given.prompt, given.runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["decode", "turns", "best_of"])
    parser.add_argument("--model")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=4, help="repeats of the prompt's sentence")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run = {"decode": bench_decode, "turns": bench_turns, "best_of": bench_best_of}[given.what]
    run(given)


if __name__ == "__main__":
    main()
