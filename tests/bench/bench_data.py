"""How long a training step waits for its data: 1280 x 2000 screenshots, two loader processes.

python -m tests.bench.bench_data [--workers 2] [--tokenizer FOLDER] [--seconds 12]

Samples are loaded, tokenised, prepared and laid into batches for real, once from the screenshots'
files and once from what `trainer.prepare --store-pixels` stored. The device is not there: a step is
a pause as long as its FLOPs take at 40 % of the device's peak, by `trainer.arithmetic`; a thread
takes batches over from the loader's processes, as the one that pins memory does where there is a
device. The wait is the share of the loop's time in which nothing was ready; the rate is what the
loader gives when nobody makes it wait.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Sampler
from transformers import LlamaConfig, LlavaConfig

from tests.bench.bench_prepare import page
from trainer.arithmetic import DEVICES, training_flops
from trainer.batches import Collator, TrainingSet
from trainer.dataset import Dataset, open_dataset
from trainer.objective import PACKED_ATTENTION
from trainer.preparation import Job, Tokens, prepare
from trainer.sources import find_source
from w2c_tui.core.config import paths
from w2c_tui.core.image import ImageSpec
from w2c_tui.core.locate import locate
from w2c_tui.core.prompt import V1
from w2c_tui.models import llava
from w2c_tui.models.checkpoint import open_checkpoint
from w2c_tui.models.tokenize import PromptTokenizer

BATCH = 8
SPEC = ImageSpec(size=336, aspect="pad")
TOWER = "openai/clip-vit-large-patch14-336"
# Hidden size, layers, MLP: Llama-like language models of about these sizes.
MODELS = {"7B": (4096, 32, 11008), "1B": (2048, 18, 5632), "0.5B": (1280, 20, 3584)}


def screenshot(source: random.Random) -> Image.Image:
    """A page as browsers show it: flat boxes, a photo or two, lines of small text."""
    image = Image.new("RGB", (1280, 2000), (255, 255, 255 - source.randint(0, 40)))
    draw = ImageDraw.Draw(image)
    for y in range(0, 2000, 250):
        color = tuple(source.randint(0, 255) for _ in range(3))
        draw.rectangle((source.randint(0, 600), y, source.randint(700, 1280), y + 180), fill=color)
    for _ in range(2):
        photo = Image.effect_noise((320, 240), 60).convert("RGB")
        image.paste(photo, (source.randint(0, 900), source.randint(0, 1700)))
    for y in range(20, 1980, 22):
        words = page(source)[80 : 80 + source.randint(40, 160)].replace("\n", " ")
        draw.text((source.randint(0, 200), y), words, fill="black")
    return image


def write_source(folder: Path, count: int) -> Path:
    source = random.Random(0)
    records = []
    for at in range(count):
        screenshot(source).save(folder / f"{at}.png")
        values = ("<image>\nUse the webpage screenshot to generate HTML code.", page(source))
        turns = [
            {"from": speaker, "value": value}
            for speaker, value in zip(("human", "gpt"), values, strict=True)
        ]
        records.append({"id": str(at), "image": f"{at}.png", "conversations": turns})
    path = folder / "pages.json"
    path.write_text(json.dumps(records))
    return path


class Forever(Sampler[int]):
    """The rows of a dataset over and over."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from range(self._size)


def loader(dataset: Dataset, tokens: Tokens, workers: int) -> Any:
    training_set = TrainingSet(
        dataset,
        tokenizer=tokens.tokenizer,
        template=tokens.template,
        image=SPEC,
        image_token_id=0,
        tokens_per_image=tokens.tokens_per_image,
        max_length=tokens.max_length,
    )
    collator = Collator(SPEC, tokens.tokens_per_image, packed=True, attention=PACKED_ATTENTION)
    return DataLoader(
        training_set,
        batch_size=BATCH,
        sampler=Forever(len(dataset)),
        collate_fn=collator,
        num_workers=workers,
    )


def taken_over(batches: Iterator[Any], ahead: int) -> Generator[Any]:
    """Copies of `batches`; a thread makes up to `ahead` of them before they are asked for."""
    ready: queue.Queue[Any] = queue.Queue(ahead)
    over = threading.Event()

    def take() -> None:
        for loaded in batches:
            batch = {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in loaded.items()
            }
            # The memory that it shared with the loader's process is given back here.
            del loaded
            while not over.is_set():
                try:
                    ready.put(batch, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if over.is_set():
                return

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        while True:
            yield ready.get()
    finally:
        over.set()
        thread.join()


def waiting(batches: Iterator[Any], step_s: float, seconds: float) -> tuple[float, float]:
    """Samples per second, and the share of the time in which a step had nothing to work on."""
    # The loader fills its queue while the first step is at work, as in training.
    next(batches)
    time.sleep(max(step_s, 1.0))
    began = time.monotonic()
    waited, steps = 0.0, 0
    while steps < 3 or time.monotonic() - began < seconds:
        asked = time.monotonic()
        next(batches)
        waited += time.monotonic() - asked
        time.sleep(step_s)
        steps += 1
    total = time.monotonic() - began
    return BATCH * steps / total, waited / total


def config_of(name: str) -> LlavaConfig:
    hidden, layers, inner = MODELS[name]
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=hidden // 128,
    )
    vision = llava.TOWERS[TOWER].vision_config()
    return llava.llava_config(text, vision, image_token_id=32000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--tokenizer", help="a folder with config.json and a tokenizer")
    given = parser.parse_args()
    model = given.tokenizer or locate("smollm2-135m", paths().models, lambda *_: None)
    tokens = Tokens(
        tokenizer=PromptTokenizer(open_checkpoint(model, weights=False).tokenizer),
        tokenizer_name=str(model),
        template=V1,
        tokens_per_image=576,
        max_length=2048,
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = write_source(Path(scratch), given.count)
        sources = (find_source("pages", path),)
        datasets = {}
        for name, pixels in (("files", None), ("stored", SPEC)):
            job = Job(sources=sources, tokens=tokens, images="header", pixels=pixels)
            prepare(job, Path(scratch) / name, progress=False)
            datasets[name] = open_dataset(Path(scratch) / name)
        mean = int(datasets["files"].lengths.mean())
        stored = datasets["stored"].meta.pixel_bytes / given.count
        print(f"{given.count} screenshots, {mean:,} tokens, {stored / 1e3:,.0f} KB stored each")
        for name, dataset in datasets.items():
            batches = taken_over(
                iter(loader(dataset, tokens, given.workers)), ahead=2 * given.workers
            )
            rate, _ = waiting(batches, 0.0, given.seconds)
            print(f"\nfrom {name}: {rate:,.1f} samples/s with {given.workers} workers")
            for size, device in (
                ("7B", "A100-40GB"),
                ("7B", "H200"),
                ("1B", "H200"),
                ("0.5B", "H200"),
            ):
                flops = training_flops(
                    config_of(size), mean * BATCH, BATCH, "finetune", num_samples=BATCH
                )
                step_s = flops / (0.4 * DEVICES[device].bf16_flops)
                _, share = waiting(batches, step_s, max(given.seconds, 4 * step_s))
                print(
                    f"  finetune {size:>4} on one {device:<10} {BATCH / step_s:6.1f} samples/s "
                    f"needed, wait {100 * share:5.1f} % of the time"
                )
            batches.close()


if __name__ == "__main__":
    main()
