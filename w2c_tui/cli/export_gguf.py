"""`w2c export-gguf`: a checkpoint as GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from w2c_tui.cli.flags import export_options, settings_from
from w2c_tui.console.terminal import say
from w2c_tui.core.config import paths
from w2c_tui.export.outcome import Verification


@click.command(
    "export-gguf",
    epilog="Example:  w2c export-gguf LLM360/CrystalChat-7B-Web2Code --out models/ --quant q4_k_m",
)
@click.argument("model")
@click.option("-o", "--out", default=".", metavar="DIR", help="Folder for the files.  [default: .]")
@click.option(
    "--name", default="", help="First part of the files' names; the model's if not given."
)
@click.option("--force", is_flag=True, help="Replace files that are there already.")
@export_options
def export_gguf(model: str, out: str, name: str, force: bool, **flags: Any) -> None:
    """Write MODEL as GGUF files, which llama.cpp runs several times faster on a CPU.

    MODEL is a folder, a catalogue name or OWNER/NAME of the model hub. A model that sees becomes
    two files, which belong side by side: NAME-QUANT.gguf and NAME-mmproj-f16.gguf.
    """
    from w2c_tui.console.progress import console, loading_progress
    from w2c_tui.engine.client import EngineClient

    spec = settings_from(flags).export
    folder = Path(out).expanduser().absolute()
    with EngineClient(paths().engine_log) as engine, loading_progress() as report:
        exported = engine.export(model, folder, spec, report, name=name, force=force)
    for note in exported.notes:
        console.print(f"Note: {note}", soft_wrap=True)
    if exported.verification is not None:
        console.print(_describe(exported.verification), soft_wrap=True)
    for path in (exported.model, exported.mmproj):
        if path:
            say(f"{path} ({Path(path).stat().st_size / 1e6:,.1f} MB)")


def _describe(result: Verification) -> str:
    features = ""
    if result.feature_error is not None:
        features = f"image features differ by {result.feature_error:.1e}, "
    return (
        f"Verified {result.subject}: {features}max |Δlogit| {result.max_logit_error:.2g}, mean KL "
        f"{result.kl:.1e} (at most {result.kl_limit:g}), greedy tokens agree at "
        f"{result.num_agreeing} of {result.num_positions} places"
    )
