"""`python -m trainer.pack`: the trained part of a finished LoRA run, as it comes with the package.

Adapters are what the run's last checkpoint keeps, and those of the runs that it went on from, side
by side (their products add up); tower, tokenizer and configuration are the result's. What was
written is put together again and compared with the result before it gets its name. The format is
`w2c_tui.models.bundled`'s.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import torch
from safetensors.torch import load_file

from trainer.loop import TRAINED_NAME
from trainer.nano import LANGUAGE_MODEL
from trainer.recipes import Recipe
from trainer.run_folder import RunFolder, read_lines
from w2c_tui.console import run
from w2c_tui.core.config import paths
from w2c_tui.core.conversation import Hints
from w2c_tui.core.errors import ConfigError
from w2c_tui.models.bundled import TEMPLATE_NAME, assemble, write_bundled
from w2c_tui.models.checkpoint import (
    CARD_NAME,
    Report,
    new_folder,
    open_checkpoint,
    read_card,
    write_card,
)

MAX_BYTES = 90_000_000
_ADAPTER = re.compile(r".*\.language_model\.(layers\..+\.lora_[AB])\.default\.weight")
_PROJECTOR = re.compile(r".*\.(multi_modal_projector\..+)")
_TOWER = re.compile(r"(?:model\.)?(vision_tower\..+)")
# Half the last bit of bfloat16, in which runs are saved, is 2**-9; of float16, 2**-12.
_MOST_APART = {torch.bfloat16: 4e-3, torch.float32: 1e-3}


def pack(
    source: Path, out: Path, *, language_model: str, hints: Hints, report: Report
) -> dict[str, float]:
    """Write the bundled folder `out`, which must not exist, from the run folder `source`.

    Returns how far the weights that are put together from it are from the run's result: the largest
    relative difference of a tensor, by part. Raises ConfigError or CheckpointError.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already.", hint="Name a new folder with --out.")
    adapters, projector = _trained(source)
    result = source / "model"
    checkpoint = open_checkpoint(result)
    tower = {
        match[1]: _narrowed(tensor[...])
        for name, tensor in (checkpoint.tensors or {}).items()
        if (match := _TOWER.fullmatch(name))
    }
    card = read_card(result)
    assert card is not None, "the trainer writes one"
    tensors = {**tower, **projector, **adapters}
    beside = {"config.json": result / "config.json"}
    if (result / TEMPLATE_NAME).is_file():
        beside[TEMPLATE_NAME] = result / TEMPLATE_NAME
    with new_folder(out) as scratch:
        folder = scratch / out.name
        write_bundled(folder, language_model=language_model, tensors=tensors, beside=beside)
        # The paths in it are of the machine that trained.
        recipe = card.recipe | {"data": "", "out": "", "projector": "", "model": language_model}
        write_card(folder, msgspec.structs.replace(card, hints=hints, recipe=recipe))
        _check_equal(folder, tensors)
        apart = _compare(folder, checkpoint, report)
        for file in folder.iterdir():
            file.rename(scratch / file.name)
        folder.rmdir()
        size = sum(file.stat().st_size for file in scratch.iterdir())
        if size > MAX_BYTES:
            raise ConfigError(
                f"The packed model takes {size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} ship.",
                hint="Train with a smaller --lora-rank.",
            )
    return apart


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """In bfloat16 if nothing is lost: runs in float32 write what they did not train so, too."""
    half = tensor.bfloat16()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


def _trained(source: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Adapters (float16, scaled) and projector (float32) of the run, by the bundle's names."""
    recipe = _recipe(source)
    if recipe["stage"] == "pretrain":
        # What stage 1 trains is in every later stage's result.
        return {}, {}
    if not recipe["lora_rank"]:
        raise ConfigError(
            f"The run in {source} trained the whole language model.",
            hint="Only runs with --lora-rank are small enough to come with the package.",
        )
    state = load_file(_last(source) / TRAINED_NAME)
    scale = recipe["lora_alpha"] / recipe["lora_rank"]
    found: dict[str, torch.Tensor] = {}
    projector: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if match := _ADAPTER.fullmatch(name):
            scaled = tensor.float() * (scale if match[1].endswith("B") else 1.0)
            found[match[1]] = scaled.half()
        elif match := _PROJECTOR.fullmatch(name):
            projector[match[1]] = tensor.float()
        else:
            raise ConfigError(
                f"{source} trained {name}, which has no place in a bundled model.",
                hint="Train adapters and the projector only.",
            )
    for name, before in _adapters_before(recipe["model"]).items():
        # B A + B' A' is the product of both beside each other.
        side = 0 if name.endswith("A") else 1
        parts = [before, *([found[name]] if name in found else [])]
        found[name] = torch.cat(parts, dim=side).contiguous()
    return found, projector


def _adapters_before(model: str) -> dict[str, torch.Tensor]:
    """The adapters in the model that a run went on from: those of a bundled model it trained."""
    start = Path(model).expanduser()
    return _trained(start.parent)[0] if (start.parent / "run.json").is_file() else {}


def _recipe(source: Path) -> dict[str, Any]:
    try:
        recipe: dict[str, Any] = json.loads((source / "run.json").read_text("utf-8"))["recipe"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{source} is no training run: {error}.", hint="Name the folder given to --out there."
        ) from error
    if not (source / "model" / CARD_NAME).is_file():
        raise ConfigError(f"The run in {source} is not finished.", hint="Go on with --resume.")
    return recipe


def _last(source: Path) -> Path:
    """The checkpoint of the last step. Raises ConfigError if it was not kept."""
    recipe = _recipe(source)
    folder = RunFolder(msgspec.convert(recipe | {"out": str(source)}, Recipe, strict=False), "")
    steps = [line["step"] for line in read_lines(folder.metrics)]
    last = next(reversed(folder.checkpoints()), None)
    if last is None or not steps or last.name != f"checkpoint-{max(steps)}":
        raise ConfigError(
            f"{source} has no checkpoint of its last step, which holds the adapters.",
            hint="Train with --save-every, and keep the last checkpoint.",
        )
    if not (last / TRAINED_NAME).is_file():
        raise ConfigError(
            f"{last} was written by DeepSpeed.", hint="Train adapters with --zero-stage 0."
        )
    return last


def _check_equal(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    stored = load_file(folder / "trained.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor), name


def _compare(folder: Path, result: Any, report: Report) -> dict[str, float]:
    """The largest relative difference by part; raises ConfigError if it is more than rounding."""
    with tempfile.TemporaryDirectory(dir=paths().models) as scratch:
        models = Path(scratch)
        # The language model that is there need not be fetched again.
        for file in paths().models.iterdir():
            if file.is_file():
                (models / file.name).symlink_to(file)
        whole = open_checkpoint(assemble(folder, models, report))
        made, expected = whole.tensors or {}, result.tensors or {}
        if made.keys() != expected.keys():
            raise ConfigError(
                "The packed model has other parts than the result: "
                + ", ".join(sorted(made.keys() ^ expected.keys())[:4]),
                hint="Was it trained on another --language-model?",
            )
        if whole.tokenizer.get_vocab() != result.tokenizer.get_vocab():
            raise ConfigError(
                "The packed model has another vocabulary than the result.",
                hint="Was it trained on another --language-model?",
            )
        apart: dict[str, float] = {}
        for name, tensor in expected.items():
            wanted = tensor[...].float()
            difference = float((made[name][...].float() - wanted).norm() / (wanted.norm() + 1e-12))
            if difference > _MOST_APART.get(tensor.dtype, 1e-3):
                raise ConfigError(
                    f"{name} comes out different from the result, by {difference:.2g}.",
                    hint="Was it trained on another --language-model, or from another model?",
                )
            part = name.removeprefix("model.").partition(".")[0]
            apart[part] = max(apart.get(part, 0.0), difference)
    return apart


@click.command(
    epilog="Example: python -m trainer.pack runs/nano-2 --out models/nano --hints layout"
)
@click.argument("source", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--language-model",
    default=LANGUAGE_MODEL,
    show_default=True,
    help="What the run started from, which users fetch.",
)
@click.option(
    "--hints",
    type=click.Choice(get_args(Hints)),
    default="colors",
    show_default=True,
    help="What the training data say about pictures in words.",
)
def command(source: Path, out: Path, language_model: str, hints: Hints) -> None:
    """Write the trained part of the finished LoRA run RUN as a bundled model."""
    from w2c_tui.console.progress import loading_progress

    with loading_progress() as report:
        apart = pack(source, out, language_model=language_model, hints=hints, report=report)
    size = sum(file.stat().st_size for file in out.iterdir())
    click.echo(f"{out}: {size / 1e6:.1f} MB; it reads back equal.")
    for part, value in apart.items():
        click.echo(f"{part:<24} at most {value:.1e} from the run's result")


if __name__ == "__main__":
    sys.exit(run(command))
