"""Training speed, as ratios within one run.

    python -m tests.bench.bench_train stage2     # supervised tokens/s against a plain Trainer
    python -m tests.bench.bench_train stage1     # samples/s with cached features against without

The model is SmolLM2-135M under CLIP-L at 336 px, with random weights, both cut to `--layers` of 30:
the vocabulary is cut by as much, so that tower, blocks and head keep their shares of the work. The
lengths are those of Web2Code's mix: pages of 472 +- 162 tokens about an image of 576, questions
about pages, and text alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from trainer.batches import examples_of
from trainer.dataset import open_dataset
from trainer.loop import train
from trainer.model import build, describe
from trainer.prepare import command as prepare
from trainer.recipes import Recipe, resolve
from trainer.samples import IGNORE_INDEX
from trainer.tiny import small_tokenizer
from w2c_tui.console import run

DEPTH, VOCABULARY = 30, 49152


def write_models(folder: Path, layers: int) -> dict[str, str]:
    """A language model and a tower of 576 features per image; the recipe's fields for them."""
    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY * layers // DEPTH // 64 * 64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        # The last layer is computed and not used, whatever the depth.
        num_hidden_layers=round(24 * layers / DEPTH) + 1,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    square = {"height": 336, "width": 336}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=square)
    processor.save_pretrained(folder / "tower")
    return {"model": str(folder / "text"), "vision_tower": str(folder / "tower")}


def write_data(folder: Path, models: dict[str, str], count: int, stage: str) -> Path:
    """`count` records of the mix, about one token a byte, prepared."""
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for at in range(count):
        kind = rng.choices(("code", "understanding", "text"), (0.6, 0.25, 0.15))[0]
        length = {
            "code": max(60, round(rng.gauss(472, 162))),
            "understanding": rng.randint(10, 120),
            "text": rng.randint(50, 1500),
        }[kind]
        answer = "".join(rng.choices("abcdefgh <>/=", k=length))
        human = "Make the page." if kind == "code" else "What is on it?"
        record: dict = {"id": str(at)}
        if kind != "text":
            picture = Image.new("RGB", (640, 480), tuple(rng.randbytes(3)))
            picture.save(folder / "images" / f"{at}.png")
            record["image"] = f"{at}.png"
            human = f"<image>\n{human}"
        record["conversations"] = [
            {"from": "human", "value": human},
            {"from": "gpt", "value": answer},
        ]
        records.append(record)
    (folder / "mix.json").write_text(json.dumps(records))
    given = ["--source", f"mix={folder / 'mix.json'}", "--images", f"mix={folder / 'images'}"]
    fields = ["--model", models["model"], "--vision-tower", models["vision_tower"]]
    flags = ["--recipe", "debug", "--stage", stage, "--workers", "1"]
    assert run(prepare, [str(folder / "data"), *given, *fields, *flags]) == 0
    return folder / "data"


def recipe_for(folder: Path, models: dict[str, str], data: Path, name: str, **fields) -> Recipe:
    given = {"data": str(data), "out": str(folder / name), "save_every": 0, "max_length": 2048}
    stage = "pretrain" if name.startswith("stage1") else "finetune"
    return resolve("debug", stage, flags=models | given | fields)


class Stopwatch(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def plain_trainer(recipe: Recipe) -> float:
    """Supervised tokens/s of transformers' Trainer on batches padded to their longest sample."""
    parts = describe(recipe)
    model = build(recipe, parts)
    training_set = examples_of(open_dataset(recipe.data), parts, recipe)
    supervised: list[int] = []

    def collate(examples):
        longest = max(len(example.encoded.input_ids) for example in examples)
        shape = (len(examples), longest)
        ids = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX)
        for row, example in enumerate(examples):
            length = len(example.encoded.input_ids)
            ids[row, :length] = torch.from_numpy(example.encoded.input_ids)
            labels[row, :length] = torch.from_numpy(example.encoded.labels)
            mask[row, :length] = 1
        supervised.append(int((labels != IGNORE_INDEX).sum()))
        pixels = [torch.from_numpy(each) for example in examples for each in example.pixels]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return batch | ({"pixel_values": torch.stack(pixels)} if pixels else {})

    watch = Stopwatch()
    arguments = TrainingArguments(
        output_dir=recipe.out,
        per_device_train_batch_size=recipe.per_device_batch,
        max_steps=recipe.max_steps,
        learning_rate=recipe.learning_rate,
        optim="adamw_torch",
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_steps=1000,
    )
    trainer = Trainer(
        model, arguments, data_collator=collate, train_dataset=training_set, callbacks=[watch]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return sum(supervised[1 : len(watch.seconds)]) / sum(watch.seconds[1:])


def ours(recipe: Recipe) -> list[dict]:
    """The steps of a run after the first, which warms up."""
    train(recipe)
    lines = (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][1:]


def stage2(folder: Path, layers: int, steps: int) -> None:
    models = write_models(folder, layers)
    data = write_data(folder, models, 8 * steps, "finetune")
    plain = plain_trainer(
        recipe_for(folder, models, data, "plain", per_device_batch=8, max_steps=steps)
    )
    lines = ours(recipe_for(folder, models, data, "packed", per_device_batch=8, max_steps=steps))
    packed = sum(line["supervised"] for line in lines) / sum(line["step_s"] for line in lines)
    print(f"plain Trainer, padded, all logits: {plain:,.0f} supervised tokens/s")
    print(f"packed, supervised logits only:    {packed:,.0f} supervised tokens/s")
    print(f"ratio {packed / plain:.2f} (target 1.7)")


def stage1(folder: Path, layers: int, steps: int) -> None:
    models = write_models(folder, layers)
    data = write_data(folder, models, 8 * steps, "pretrain")
    rates = {}
    for cached in (False, True):
        recipe = recipe_for(
            folder,
            models,
            data,
            f"stage1-{cached}",
            per_device_batch=8,
            max_steps=steps,
            cache_features=cached,
        )
        lines = ours(recipe)
        rates[cached] = sum(line["samples"] for line in lines) / sum(
            line["step_s"] for line in lines
        )
    print(f"features computed each time: {rates[False]:.2f} samples/s")
    print(f"features cached:             {rates[True]:.2f} samples/s")
    print(f"ratio {rates[True] / rates[False]:.2f} (target 1.2)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["stage1", "stage2"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="w2c-bench-") as folder:
        os.environ["W2C_CACHE_DIR"] = folder
        measure = {"stage1": stage1, "stage2": stage2}[options.what]
        measure(Path(folder), options.layers, options.steps)


if __name__ == "__main__":
    main()
