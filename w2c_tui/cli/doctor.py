"""`w2c doctor`: what this machine has, where things are, and which models fit."""

from __future__ import annotations

from typing import Any

import click

from w2c_tui.cli import show_error
from w2c_tui.cli.options import model_options, settings_from
from w2c_tui.core.config import LoadSpec, paths
from w2c_tui.core.errors import W2CError


@click.command(
    epilog="Examples:  w2c doctor --json   "
    "w2c doctor --model llava-1.5-7b --load-4bit --max-memory 0=6GiB --max-memory cpu=20GiB"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@model_options
def doctor(as_json: bool, **flags: Any) -> int:
    """Show what this machine has and which models fit.

    Also shows where settings, sessions, models and logs are kept, and whether the configuration
    can be read. With --model it also shows which device would hold what of that model.
    """
    import msgspec

    from w2c_tui.cli.running import status
    from w2c_tui.core.catalog import ENTRIES
    from w2c_tui.machine import inspect_machine, report_lines

    with status("Looking around"):
        machine = inspect_machine()
    places = paths()
    kept = [
        ("settings", places.config_file),
        ("sessions", places.sessions),
        ("models", places.models),
        ("engine log", places.engine_log),
        ("application log", places.app_log),
    ]
    problem: W2CError | None = None
    model = ""
    try:
        model = settings_from(flags).model.name
    except W2CError as error:
        problem = error
    if as_json:
        report = {
            "machine": msgspec.to_builtins(machine),
            "paths": {label: str(path) for label, path in kept},
            "model": model,
            "problem": str(problem) if problem else None,
        }
        click.echo(msgspec.json.encode(report).decode())
        return 1 if problem else 0
    lines = [
        *report_lines(machine),
        *((label, f"{path}{'' if path.exists() else ' (not there yet)'}") for label, path in kept),
        ("model in use", model or "unknown: see below"),
    ]
    fits = report_lines(machine, ENTRIES)[len(report_lines(machine)) :]
    for title, rows in (("This machine", lines), ("Known models", fits)):
        click.secho(title, bold=True)
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            click.echo(f"  {label:<{width}}  {value}")
    if problem is not None:
        show_error(problem)
    elif flags.get("model__name"):
        _show_plan(settings_from(flags).model)
    return 1 if problem else 0


def _show_plan(spec: LoadSpec) -> None:
    """Which device would hold what of a model that the user named."""
    from w2c_tui.cli.running import loading_progress
    from w2c_tui.engine.client import EngineClient

    with EngineClient(paths().engine_log) as engine, loading_progress() as report:
        shares = engine.plan(spec, report)
    click.secho(f"Placement of {spec.name}", bold=True)
    if not shares:
        click.echo("  unknown before it is loaded")
    for share in shares:
        name = f"GPU {share.device}" if share.device.isdigit() else share.device
        first, last = share.modules[0] or "everything", share.modules[-1]
        span = first if first == last or not last else f"{first} ... {last}"
        size = share.num_bytes
        weights = f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.2f} MB"
        click.echo(f"  {name:<6} {weights:>9} of weights  {span}")
