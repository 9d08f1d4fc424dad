"""`w2c models`: the catalogue, and fetching models before they are needed."""

from __future__ import annotations

import os
from pathlib import Path

import click

from w2c_tui.console.terminal import say, say_json
from w2c_tui.core.catalog import CatalogEntry, find
from w2c_tui.core.config import paths
from w2c_tui.core.errors import ModelNotFoundError


@click.group(epilog="Example:  w2c models pull smollm2-135m")
def models() -> None:
    """See which models there are, and fetch them."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def list_models(as_json: bool) -> None:
    """List the known models: what they need and whether this machine has it.

    Any other folder, .gguf file or OWNER/NAME of a model hub works too.
    """
    from rich.table import Table

    from w2c_tui.console.progress import SafeConsole
    from w2c_tui.core.catalog import ALL_BITS, ENTRIES, memory_needed
    from w2c_tui.machine import inspect_machine

    if as_json:
        say_json(ENTRIES)
        return
    machine = inspect_machine()
    largest = max(machine.gpu_memory_bytes, machine.memory_available_bytes)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "sees", "licence"):
        table.add_column(column, no_wrap=column == "model")
    for column in ("size", "context", "16 bit", "8 bit", "4 bit"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("fits")
    for entry in ENTRIES:
        needed = [memory_needed(entry, bits) for bits in ALL_BITS]
        fitting = [bits for bits, size in zip(ALL_BITS, needed, strict=True) if size <= largest]
        table.add_row(
            entry.id,
            "images" if entry.vision else "text",
            entry.licence,
            _count(entry.parameters),
            f"{entry.context:,}",
            *(f"{size / 1e9:.1f} GB" for size in needed),
            "yes" if 16 in fitting else f"{fitting[0]} bit" if fitting else "no",
        )
    console = SafeConsole()
    console.print(table, soft_wrap=not console.is_terminal)


@models.command()
@click.argument("name")
def info(name: str) -> None:
    """Show everything that is known about the model NAME."""
    from w2c_tui.core.catalog import ALL_BITS, BundledModel, PackagedFile, memory_needed
    from w2c_tui.core.download import find_packaged
    from w2c_tui.machine import describe_fit, inspect_machine

    entry = _entry(name)
    source = entry.source
    if isinstance(source, PackagedFile):
        where = find_packaged(source, paths().models)
        origin = f"{source.name} in the Python package {source.package} {source.version}"
        kept = str(where) if where else "not fetched yet (w2c models pull)"
    elif isinstance(source, BundledModel):
        origin = f"comes with w2c-tui, trained on {source.language_model}"
        kept = str(source.path)
    else:
        origin, kept = f"{source} on the model hub", "in the hub's own cache, once fetched"
    rows = [
        ("title", entry.title),
        ("names", ", ".join([entry.id, *entry.aliases])),
        ("source", origin),
        ("on disk", kept),
        ("licence", entry.licence),
        ("parameters", f"{entry.parameters:,}"),
        ("family", f"{entry.family}, prompt template {entry.template}"),
        ("reads", "images and text" if entry.vision else "text only"),
        ("context", f"{entry.context:,} tokens"),
        ("backends", ", ".join(entry.backends)),
        *(
            (f"memory, {bits} bit", f"{memory_needed(entry, bits) / 1e9:.1f} GB")
            for bits in ALL_BITS
        ),
        ("this machine", describe_fit(inspect_machine(), entry)),
        *([("note", entry.note)] if entry.note else []),
    ]
    for label, value in rows:
        say(f"{label:<15} {value}")


@models.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def pull(names: tuple[str, ...]) -> None:
    """Fetch models, so that later runs need no network.

    NAME is one of `w2c models list` or OWNER/NAME of the model hub.
    """
    from w2c_tui.console.progress import loading_progress
    from w2c_tui.core.catalog import BundledModel, find
    from w2c_tui.core.hub import fetch_from_hub
    from w2c_tui.core.locate import locate

    for name in names:
        entry = find(name)
        with loading_progress() as report:
            if entry is not None and isinstance(entry.source, BundledModel):
                locate(entry.source.language_model, paths().models, report)
            place = locate(name, paths().models, report)
            if "/" in place and not os.path.exists(place):
                place = str(fetch_from_hub(place, report))
        say(f"{name}: {place}")


@models.command(epilog="Example:  w2c models convert LLM360/CrystalChat-7B-Web2Code --out crystal/")
@click.argument("source")
@click.option("-o", "--out", required=True, metavar="DIR", help="The new folder.")
def convert(source: str, out: str) -> None:
    """Write the model SOURCE as a standard Hugging Face folder.

    Published LLaVA-layout checkpoints and text GGUF files become safetensors with tokenizer,
    processor and chat template, as other tools read them.
    """
    from w2c_tui.console.progress import loading_progress
    from w2c_tui.engine.client import EngineClient

    folder = Path(out).expanduser().absolute()
    with EngineClient(paths().engine_log) as engine, loading_progress() as report:
        engine.convert(source, folder, report)
    say(f"{source}: {folder}")


def _entry(name: str) -> CatalogEntry:
    entry = find(name)
    if entry is None:
        raise ModelNotFoundError(
            f"{name} is not in the catalogue.",
            hint="w2c models list shows what is; other models work, but nothing is known of them.",
        )
    return entry


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
