"""The command line of both stages: every field of the recipe is a flag.

Knows nothing about training; torch is loaded when everything on the command line is right.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from trainer.allocator import bound_kernel_caches, keep_freed_memory
from trainer.recipes import RECIPES, Recipe, Stage, resolve
from w2c_tui.console.options import field_options
from w2c_tui.core.config import ExportSpec, Quant
from w2c_tui.core.errors import CheckpointError, ConfigError
from w2c_tui.export.quantize import require_llama_cpp

F = TypeVar("F", bound=Callable[..., Any])

_HELP: dict[Stage, str] = {
    "pretrain": "Stage 1: train the projector between a vision tower and a language model.",
    "finetune": "Stage 2: train the language model and the projector to follow instructions.",
}


def stage_command(stage: Stage) -> click.Command:
    """The command of `stage`; its return value is the exit status."""

    @click.command(
        stage,
        help=_HELP[stage],
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        epilog=f"Example: torchrun --nproc-per-node 8 -m trainer.{stage} --recipe crystal-chat-7b "
        "--data data/prepared --out runs/first",
    )
    @click.option("--recipe", "name", required=True, type=click.Choice(list(RECIPES)))
    @click.option(
        "--config",
        "file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="YAML or TOML file with fields of the recipe.",
    )
    @click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
    @_export_option(stage)
    @click.option("--local_rank", "--local-rank", "launcher_rank", hidden=True)
    @field_options(Recipe, "recipe", skip=("name", "stage"), defaults=False)
    def command(
        name: str, file: Path | None, resume: bool, export_gguf: Quant | None = None, **flags: Any
    ) -> int:
        given = {
            flag.removeprefix("recipe__"): value
            for flag, value in flags.items()
            if flag.startswith("recipe__") and value is not None and value != ()
        }
        recipe = resolve(name, stage, file=file, flags=given)
        if export_gguf is not None:
            require_llama_cpp()
        return _run(recipe, resume, export_gguf)

    return command


def _export_option(stage: Stage) -> Callable[[F], F]:
    if stage == "pretrain":
        return lambda command: command
    return click.option(
        "--export-gguf",
        type=click.Choice(get_args(Quant)),
        help="Write the result as GGUF files, too.",
    )


def _run(recipe: Recipe, resume: bool, export_gguf: Quant | None) -> int:
    first = os.environ.get("RANK", "0") == "0"
    import torch

    if not torch.cuda.is_available():
        # Before anything imports deepspeed, which else looks for devices and tells about it.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
        bound_kernel_caches()
    # Which kernels it lacks, it tells as it is imported, even where nothing is quantised.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from trainer.loop import train

    try:
        result = train(recipe, resume=resume)
    except (ConfigError, CheckpointError):
        # All processes find the same; one of them says it.
        if first:
            raise
        return 1
    if result is None:
        if first:
            click.echo("Stopped by a signal, with a checkpoint; --resume goes on.", err=True)
        return 1
    if not first:
        return 0
    click.echo(result)
    if export_gguf is not None:
        from w2c_tui.export.gguf_export import export

        spec = ExportSpec(quant=export_gguf)
        exported = export(str(result), result.parent, spec, _silent, name=result.parent.name)
        for path in (exported.model, exported.mmproj):
            if path:
                click.echo(path)
    return 0


def _silent(phase: str, done: int, total: int) -> None: ...
