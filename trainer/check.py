"""`python -m trainer.check`: a dry run of a stage, before any device is held.

Owns what is looked at, and what counts as a problem: everything that would stop a run or spoil it
silently. Reads no weights and needs none of the devices it reckons with. Knows nothing about how
any of it is done: recipes, data, samples, arithmetic and the run's folder are asked.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec
import numpy as np

from trainer.recipes import RECIPES, Recipe, Stage, resolve
from w2c_tui.console import run
from w2c_tui.console.options import field_options
from w2c_tui.core.errors import W2CError
from w2c_tui.core.printable import printable

if TYPE_CHECKING:
    from trainer.arithmetic import Device, MemoryPlan
    from trainer.dataset import Dataset, Sample
    from trainer.model import Parts

Level = Literal["fact", "warning", "problem"]
GIB = 2**30
NUM_IMAGES_OPENED = 100
NUM_TRUNCATED_READ = 2000
USABLE_MEMORY = 0.97
"""Share of a device's memory that a process can get."""
NUM_LOADED, LOADING_S = 64, 3.0
"""Samples that are loaded to see how fast that goes, and the time after which it is known."""
MOST_WAITING = 0.02
"""The share of its time that a device may wait for data without a warning."""


class Line(msgspec.Struct, frozen=True):
    """One thing found out. `remedy`: what to do about a warning or problem."""

    section: str
    text: str
    level: Level = "fact"
    remedy: str = ""


class Cluster(msgspec.Struct, frozen=True):
    """`count` devices; `device` is None where nothing is known about them."""

    count: int
    device: Any = None


def check(
    recipe: Recipe, cluster: Cluster, mfu: float = 0.4, num_samples: int = 2
) -> Iterator[Line]:
    """Everything about a run of `recipe` on `cluster`, line by line.

    mfu: share of the devices' peak to reckon time with. num_samples: samples to show. Never raises
    for what is wrong with the run; that is a line of level "problem".
    """
    from trainer.dataset import open_dataset
    from trainer.model import describe

    yield from _configuration(recipe, cluster)
    parts = yield from _attempt("model", lambda: describe(recipe, weights=False))
    dataset = None
    if recipe.data:
        path = Path(recipe.data).expanduser()
        dataset = yield from _attempt("data", lambda: open_dataset(path))
    else:
        yield Line(
            "data",
            "No dataset is named: lengths are reckoned at their limit, steps are unknown.",
            "warning",
            "Prepare one with python -m trainer.prepare and name it with --data.",
        )
    if parts is not None:
        yield from _model(recipe, parts)
        if dataset is not None:
            yield from _data(recipe, parts, dataset)
            yield from _samples(recipe, parts, dataset, num_samples)
        yield from _cost(recipe, parts, dataset, cluster, mfu)
        yield from _saving(recipe, parts, dataset)


def _attempt(section: str, work: Callable[[], Any]) -> Any:
    """What `work` returns; None after a line of what it raised."""
    try:
        return work()
    except W2CError as error:
        yield Line(section, error.message, "problem", error.hint)
    return None


# --- Configuration and model ----------------------------------------------------------------------


def _configuration(recipe: Recipe, cluster: Cluster) -> Iterator[Line]:
    yield Line(
        "configuration",
        f"{recipe.name}, {recipe.stage}: {recipe.model}"
        + (f" with {recipe.vision_tower}" if recipe.vision_tower else ""),
    )
    zero = f"ZeRO-{recipe.zero_stage}" if recipe.zero_stage else "without DeepSpeed"
    offload = f", offload to {recipe.offload}" if recipe.offload != "none" else ""
    yield Line(
        "configuration",
        f"{recipe.precision}, {zero}{offload}, gradient checkpointing "
        f"{'on' if recipe.gradient_checkpointing else 'off'}, {recipe.batching} batches",
    )
    accumulation = yield from _attempt(
        "configuration", lambda: recipe.gradient_accumulation(cluster.count)
    )
    if accumulation is not None:
        yield Line(
            "configuration",
            f"global batch {recipe.global_batch} = {cluster.count} device(s) x "
            f"{recipe.per_device_batch} samples x {accumulation} accumulated",
        )
    if recipe.zero_stage in (2, 3) and cluster.count == 1 and recipe.offload == "none":
        yield Line(
            "configuration",
            f"ZeRO-{recipe.zero_stage} on one device shares nothing out.",
            "warning",
            "Set --zero-stage 0, or --offload cpu to save memory.",
        )


def _model(recipe: Recipe, parts: Parts) -> Iterator[Line]:
    from trainer.arithmetic import model_size

    size = model_size(parts.config)
    trainable = size.trainable(recipe)
    for name, count in (
        ("language model", size.language_model + size.lm_head),
        ("projector", size.projector),
        ("vision tower", size.vision_tower),
    ):
        yield Line("model", f"{name}: {_millions(count)} parameters")
    total = size.total + (trainable - size.projector if recipe.lora_rank else 0)
    yield Line(
        "model",
        f"{_millions(trainable)} of {_millions(total)} parameters train "
        f"({100 * trainable / total:.2f} %): {_what_trains(recipe)}",
    )
    aspect = {"pad": "padded to a square", "crop": "centre crop", "stretch": "stretched"}
    yield Line(
        "model",
        f"an image of any size becomes {parts.image.size} x {parts.image.size} px "
        f"({aspect[parts.image.aspect]}) and {parts.tokens_per_image} tokens",
    )
    if parts.tokens_per_image >= recipe.max_length:
        yield Line(
            "model",
            f"An image takes {parts.tokens_per_image} of {recipe.max_length} tokens: "
            "nothing is left for text.",
            "problem",
            "Raise --max-length, or take a smaller image size.",
        )
    positions = getattr(parts.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and recipe.max_length > positions:
        yield Line(
            "model",
            f"max_length {recipe.max_length} is beyond the {positions} positions that the language "
            "model was made for.",
            "problem",
            f"Set --max-length to at most {positions}.",
        )
    if recipe.projector:
        yield from _attempt("model", lambda: _check_projector(recipe, parts))
    elif recipe.stage == "finetune" and parts.tower is not None:
        yield Line(
            "model",
            "Stage 2 starts from a random projector.",
            "warning",
            "Name the result of stage 1 with --projector.",
        )


def _what_trains(recipe: Recipe) -> str:
    if recipe.stage == "pretrain":
        return "the projector"
    if recipe.lora_rank:
        return f"the projector and adapters of rank {recipe.lora_rank}"
    return "the projector and the language model"


def _check_projector(recipe: Recipe, parts: Parts) -> None:
    from trainer.arithmetic import meta_model
    from trainer.model import fitting_projector

    fitting_projector(recipe.projector, meta_model(parts.config).model.multi_modal_projector)


# --- Data and samples -----------------------------------------------------------------------------


def _data(recipe: Recipe, parts: Parts, dataset: Dataset) -> Iterator[Line]:
    from trainer.dataset import tokenizer_hash

    for at, source in enumerate(dataset.meta.sources):
        mine = dataset.source_index == at
        num_text = int((mine & ~dataset.modality).sum())
        yield Line(
            "data", f"{source.name}: {source.num_rows:,} samples, {num_text:,} of them text only"
        )
    if not len(dataset):
        yield Line("data", "The dataset is empty.", "problem", "Prepare it again.")
        return
    yield from _attempt(
        "data",
        lambda: dataset.check_measured(
            tokenizer_hash(parts.tokenizer), recipe.template, parts.tokens_per_image
        ),
    )
    lengths = dataset.lengths
    num_truncated = int((lengths > recipe.max_length).sum())
    yield Line(
        "data",
        f"lengths: mean {lengths.mean():,.0f}, median {int(np.median(lengths)):,}, "
        f"longest {lengths.max():,} tokens",
    )
    many = num_truncated > 0.05 * len(dataset)
    yield Line(
        "data",
        f"{num_truncated:,} samples ({100 * num_truncated / len(dataset):.2f} %) are cut off at "
        f"{recipe.max_length:,} tokens",
        "warning" if many else "fact",
        "What is cut off is never learnt: raise --max-length if memory allows." if many else "",
    )
    if recipe.global_batch > len(dataset):
        yield Line(
            "data",
            f"A global batch of {recipe.global_batch} is more than the {len(dataset):,} samples: "
            "some are taken twice in a step.",
            "warning",
            "Lower --global-batch.",
        )
    yield from _images(dataset)


def _images(dataset: Dataset) -> Iterator[Line]:
    """A few images, evenly spread: data may have moved since it was prepared."""
    from trainer.dataset import read_image

    rows = np.flatnonzero(dataset.modality)
    if not len(rows):
        return
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), NUM_IMAGES_OPENED)).astype(int)]
    broken: list[str] = []
    for row in rows:
        sample = dataset.record(int(row))
        try:
            for image in sample.images:
                read_image(image)
        except W2CError as error:
            broken.append(f"{sample.source}/{sample.id}: {error.message}")
    if broken:
        yield Line(
            "data",
            f"{len(broken)} of {len(rows)} samples that were tried have images that cannot be "
            f"opened. {broken[0]}",
            "problem",
            "Put the images back where they were, or prepare the data again.",
        )
    else:
        yield Line("data", f"the images of {len(rows)} samples, evenly spread, open")
    if not dataset.meta.images_opened:
        yield Line(
            "data",
            "Preparing did not open the images: one that is missing stops the run.",
            "warning",
            "Prepare with --check-images header or full.",
        )


def _samples(recipe: Recipe, parts: Parts, dataset: Dataset, num_shown: int) -> Iterator[Line]:
    if not len(dataset):
        return
    truncated = np.flatnonzero(dataset.lengths > recipe.max_length)
    tried = truncated[
        np.linspace(0, len(truncated) - 1, min(len(truncated), NUM_TRUNCATED_READ)).astype(int)
    ]
    masked = []
    for row in tried:
        sample = dataset.record(int(row))
        if not _encoded(recipe, parts, sample).num_supervised:
            masked.append(f"{sample.source}/{sample.id}")
    # Every sample that is not cut off has its supervised tokens counted.
    num_never = int((dataset.num_supervised == 0).sum())
    share = (len(masked) / max(1, len(tried)) * len(truncated) + num_never) / len(dataset)
    yield Line(
        "samples",
        f"{100 * share:.2f} % of samples are masked out: nothing is learnt from them"
        + (f", for example {masked[0]}" if masked else ""),
        "problem" if share > 0.01 else "warning" if share else "fact",
        "Raise --max-length, or check the template." if share else "",
    )
    for row in np.linspace(0, len(dataset) - 1, min(num_shown, len(dataset))).astype(int):
        sample = dataset.record(int(row))
        encoded = _encoded(recipe, parts, sample)
        yield Line(
            "samples",
            f"{sample.source}/{sample.id}: {len(encoded.input_ids):,} tokens, "
            f"{encoded.num_supervised:,} under the loss"
            + (", cut off" if encoded.truncated else ""),
        )
        yield Line("samples", marked_text(recipe, parts, encoded))


def _encoded(recipe: Recipe, parts: Parts, sample: Sample) -> Any:
    from trainer.samples import encode

    return encode(
        sample.messages,
        parts.template,
        parts.tokenizer,
        image_token_id=parts.image_token_id,
        tokens_per_image=parts.tokens_per_image,
        max_length=recipe.max_length,
    )


START, END = "\x02", "\x03"
"""Around text under the loss, until it is known how it can be shown."""


def marked_text(recipe: Recipe, parts: Parts, encoded: Any, limit: int = 400) -> str:
    """What the model reads, with START and END around what it learns to write.

    Runs longer than twice `limit` characters lose their middle.
    """
    from trainer.samples import IGNORE_INDEX

    ids = encoded.input_ids.tolist()
    supervised = (encoded.labels != IGNORE_INDEX).tolist()
    image, tokenizer = parts.image_token_id, parts.tokenizer.tokenizer
    shown: list[str] = []
    at = 0
    while at < len(ids):
        end = at + 1
        same = (ids[at] == image, supervised[at])
        while end < len(ids) and (ids[end] == image, supervised[end]) == same:
            end += 1
        if same[0] and not same[1]:
            shown.append(f"[{end - at} image tokens]")
        else:
            text = printable(str(tokenizer.decode(ids[at:end])))
            if len(text) > 2 * limit:
                text = f"{text[:limit]} […] {text[-limit:]}"
            shown.append(f"{START}{text}{END}" if same[1] else text)
        at = end
    return "".join(shown)


# --- Cost -----------------------------------------------------------------------------------------


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The work of a run, and its largest micro-batch."""

    num_steps: int
    tokens: int
    images: int
    supervised: int
    squared_lengths: float
    tokens_at_once: int
    images_at_once: int


def load_of(recipe: Recipe, dataset: Dataset, world_size: int) -> Load:
    """What the samples of `dataset` come to, in the very micro-batches of the run."""
    from trainer.batches import StepSampler

    lengths = np.minimum(dataset.lengths, recipe.max_length).astype(np.int64)
    accumulation = recipe.gradient_accumulation(world_size)
    order = np.fromiter(
        StepSampler(lengths, recipe, num_micro_batches=world_size * accumulation), dtype=np.int64
    )
    micro = lengths[order].reshape(-1, recipe.per_device_batch)
    if recipe.batching == "padded":
        held = micro.max(axis=1) * recipe.per_device_batch
    else:
        held = micro.sum(axis=1)
    images = dataset.num_images[order].astype(np.int64).reshape(-1, recipe.per_device_batch)
    return Load(
        num_steps=len(order) // recipe.global_batch,
        tokens=int(micro.sum()),
        images=int(images.sum()),
        supervised=int(np.minimum(dataset.num_supervised[order], lengths[order]).sum()),
        squared_lengths=float((micro.astype(np.float64) ** 2).sum()),
        tokens_at_once=int(held.max()),
        images_at_once=max(1, int(images.sum(axis=1).max())),
    )


def _cost(
    recipe: Recipe, parts: Parts, dataset: Dataset | None, cluster: Cluster, mfu: float
) -> Iterator[Line]:
    from trainer.arithmetic import memory_plan, training_flops

    load = None
    if dataset is not None and len(dataset):
        # A batch that does not divide was named before.
        if recipe.global_batch % (recipe.per_device_batch * cluster.count):
            return
        load = load_of(recipe, dataset, cluster.count)
    at_once = (
        (load.tokens_at_once, load.images_at_once)
        if load
        else (recipe.per_device_batch * recipe.max_length, recipe.per_device_batch)
    )
    plan = memory_plan(parts.config, recipe, cluster.count, *at_once)
    yield from _memory(plan, at_once[0], cluster)
    if load is None:
        return
    flops = training_flops(
        parts.config,
        load.tokens,
        load.images,
        recipe.stage,
        squared_lengths=load.squared_lengths,
        num_supervised=load.supervised,
        lora=recipe.lora_rank > 0,
    )
    num_samples = load.num_steps * recipe.global_batch
    yield Line(
        "time",
        f"{load.num_steps:,} steps, {num_samples:,} samples, {load.tokens:,} tokens "
        f"({load.supervised:,} under the loss)",
    )
    yield Line(
        "time", f"{flops:.3g} FLOP in all, {flops / num_samples / 1e12:.3g} TFLOP per sample"
    )
    device: Device | None = cluster.device
    needed = None
    if device is not None:
        seconds = flops / (cluster.count * device.bf16_flops * mfu)
        yield Line(
            "time",
            f"{_duration(seconds)} on {cluster.count} x {device.name} at {100 * mfu:g} % MFU, "
            f"{num_samples / seconds / cluster.count:,.2f} samples/s per device",
        )
        needed = num_samples / seconds / cluster.count
    if dataset is not None:
        yield from _loading(recipe, parts, dataset, needed)


def _loading(
    recipe: Recipe, parts: Parts, dataset: Dataset, needed: float | None
) -> Iterator[Line]:
    """How fast samples load, for a device that takes `needed` in a second."""
    from trainer.batches import examples_of

    examples = examples_of(dataset, parts, recipe)

    def load(row: int) -> None:
        if recipe.cache_features:
            # Then pictures are opened once, before the first step.
            _encoded(recipe, parts, dataset.record(row))
        else:
            _ = examples[row]

    # Sources may differ much, so that neither the first ones nor those of one length would do.
    rows = np.random.default_rng(0).permutation(len(dataset))[: NUM_LOADED + 1].tolist()
    loaded = 0
    try:
        # What is done once, such as opening files, does not count.
        load(rows.pop())
        began = monotonic()
        for row in rows:
            load(row)
            loaded += 1
            if monotonic() - began > LOADING_S:
                break
    except W2CError:
        # Was named with the data.
        return
    if not loaded:
        return
    rate = loaded / (monotonic() - began) * max(recipe.workers, 1)
    by = f"{recipe.workers} process(es)" if recipe.workers else "the training process itself"
    text = f"data loads at {rate:,.1f} samples/s per device, by {by} of a machine like this one"
    if needed is None:
        yield Line("time", text)
        return
    # Without processes of its own loading is never done beside a step.
    share = max(0.0, 1 - rate / needed) if recipe.workers else needed / (needed + rate)
    if share < MOST_WAITING:
        yield Line("time", text)
        return
    remedies = []
    if dataset.modality.any() and dataset.meta.pixels is None and not recipe.cache_features:
        remedies.append("Prepare the data with --store-pixels, which decodes screenshots once.")
    remedies.append("Raise --workers where there are cores for them.")
    yield Line(
        "time",
        f"{text}, which is {100 * rate / needed:,.0f} % of what the device takes: it waits "
        f"{100 * share:,.0f} % of the time",
        "warning",
        " ".join(remedies),
    )


def _memory(plan: MemoryPlan, tokens_at_once: int, cluster: Cluster) -> Iterator[Line]:
    for name, num_bytes, note in (
        ("weights", plan.weights, ""),
        ("gradients", plan.gradients, ""),
        ("optimizer", plan.optimizer, ""),
        ("activations", plan.activations, f"largest micro-batch: {tokens_at_once:,} tokens"),
        ("buffers", plan.working, "gathered parameters, logits, the tower at work"),
        ("overhead", plan.overhead, "driver and libraries, assumed"),
    ):
        gib = f"{num_bytes / GIB:8.2f} GiB"
        yield Line("memory", f"{name:<12}{gib}" + (f"  {note}" if note else ""))
    yield Line("memory", f"{'per device':<12}{plan.total / GIB:8.2f} GiB")
    if plan.host:
        yield Line("memory", f"{'of the host':<12}{plan.host / GIB:8.2f} GiB per process")
    device: Device | None = cluster.device
    if device is None:
        return
    usable = USABLE_MEMORY * device.memory_bytes
    share = f"{plan.total / GIB:.1f} of {usable / GIB:.1f} GiB"
    if plan.total <= usable:
        yield Line("memory", f"fits {device.name}: {share}")
    else:
        yield Line(
            "memory",
            f"It does not fit {device.name}: {share}.",
            "problem",
            "Lower --per-device-batch, or set --gradient-checkpointing, a higher --zero-stage, "
            "--offload cpu or --lora-rank.",
        )


# --- Saving ---------------------------------------------------------------------------------------


def _saving(recipe: Recipe, parts: Parts, dataset: Dataset | None) -> Iterator[Line]:
    from trainer.arithmetic import disk_plan
    from trainer.model import rehearse_writing
    from trainer.run_folder import RunFolder

    def rehearse() -> bool:
        rehearse_writing(recipe, parts)
        return True

    if (yield from _attempt("saving", rehearse)):
        yield Line("saving", "configuration, tokenizer, processor and w2c.json can be written")
    num_images = int(dataset.num_images.sum(dtype="int64")) if dataset is not None else 0
    plan = disk_plan(parts.config, recipe, num_images)
    if plan.features:
        yield Line("saving", f"features of {num_images:,} images: {plan.features / 1e9:,.2f} GB")
    needed = plan.run + plan.features
    yield Line(
        "saving",
        f"result {plan.result / 1e9:,.2f} GB, a checkpoint {plan.checkpoint / 1e9:,.2f} GB, "
        f"{plan.num_checkpoints} at once: {needed / 1e9:,.2f} GB of disk",
    )
    if not recipe.out:
        yield Line("saving", "The run has no folder yet.", "warning", "Name one with --out.")
        return
    out = Path(recipe.out).expanduser().absolute()
    fingerprint = dataset.fingerprint if dataset is not None else ""
    yield from _attempt("saving", lambda: RunFolder(recipe, fingerprint).check(resume=False))
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        yield Line(
            "saving",
            f"{existing} has {free / 1e9:,.2f} GB free.",
            "problem",
            "Free some space, name another --out, or lower --keep-checkpoints.",
        )
    else:
        yield Line("saving", f"{existing} has {free / 1e9:,.1f} GB free")


# --- Showing --------------------------------------------------------------------------------------


def _millions(count: int) -> str:
    return f"{count / 1e9:,.3f} B" if count >= 1e9 else f"{count / 1e6:,.2f} M"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60:02} min"
    return f"{rest // 60} min {rest % 60:02} s" if rest >= 60 else f"{seconds:.1f} s"


def show(lines: Sequence[Line] | Iterator[Line], color: bool) -> int:
    """Print `lines` as they come; the number of problems."""
    section = ""
    problems = 0
    for line in lines:
        if line.section != section:
            section = line.section
            click.secho(f"\n{section}", bold=True, color=color)
        text = printable(line.text.replace(START, "\ue000").replace(END, "\ue001"))
        if color:
            text = text.replace("\ue000", click.style("", fg="green", reset=False))
            text = text.replace("\ue001", click.style(""))
        else:
            text = text.replace("\ue000", "«").replace("\ue001", "»")
        text = text.replace("\n", "\n    ")
        if line.level == "fact":
            click.echo(f"  {text}", color=color)
            continue
        problems += line.level == "problem"
        fg = "red" if line.level == "problem" else "yellow"
        click.echo(f"  {click.style(line.level, fg=fg, bold=True)}: {text}", color=color)
        if line.remedy:
            click.echo(f"    {printable(line.remedy)}")
    return problems


@click.command(
    "python -m trainer.check",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: python -m trainer.check --recipe crystal-chat-7b --stage finetune "
    "--data data/finetune --out runs/finetune --devices 16xA100-40GB",
)
@click.option("--recipe", "name", required=True, type=click.Choice(list(RECIPES)))
@click.option("--stage", required=True, type=click.Choice(["pretrain", "finetune"]))
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML or TOML file with fields of the recipe.",
)
@click.option(
    "--devices",
    metavar="COUNTxDEVICE",
    help="Devices to reckon with, as in 16xA100-40GB; none needs to be there.",
)
@click.option(
    "--mfu",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of their peak FLOP/s that the devices are expected to reach.",
)
@click.option(
    "--samples",
    "num_samples",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Samples to show, with what is under the loss in green.",
)
@field_options(Recipe, "recipe", skip=("name", "stage"), defaults=False)
def command(
    name: str,
    stage: Stage,
    file: Path | None,
    devices: str | None,
    mfu: float,
    num_samples: int,
    **flags: Any,
) -> int:
    """Try everything about a run of one stage without running it. Exit status 1: it would fail."""
    given = {
        flag.removeprefix("recipe__"): value
        for flag, value in flags.items()
        if value is not None and value != ()
    }
    recipe = resolve(name, stage, file=file, flags=given)
    # Or DeepSpeed, which transformers looks for, says that it found no accelerator.
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    # Late, because it loads torch.
    from trainer.arithmetic import parse_devices

    cluster = Cluster(*parse_devices(devices)) if devices else Cluster(1)
    problems = show(check(recipe, cluster, mfu, num_samples), color=sys.stdout.isatty())
    if problems:
        click.secho(f"\n{problems} problem(s): this run would fail.", fg="red", bold=True)
        return 1
    click.secho("\nNo problem was found.", fg="green", bold=True)
    return 0


def main() -> None:
    """Run the command and end the process with its status."""
    sys.exit(run(command))


if __name__ == "__main__":
    main()
