"""`w2c doctor`: what this machine has, where things are, and which models fit."""

from __future__ import annotations

from typing import Any

import click

from w2c_tui.cli.flags import model_options, settings_from
from w2c_tui.console import show_error
from w2c_tui.console.terminal import say, say_json
from w2c_tui.core.config import LoadSpec, Settings, paths
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

    from w2c_tui.console.progress import status
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
    settings = Settings()
    try:
        settings = settings_from(flags)
        model = settings.model.name
    except W2CError as error:
        problem = error
    if as_json:
        report = {
            "machine": msgspec.to_builtins(machine),
            "paths": {label: str(path) for label, path in kept},
            "model": model,
            "browser": _browser(settings),
            "problem": str(problem) if problem else None,
        }
        say_json(report)
        return 1 if problem else 0
    facts = report_lines(machine)
    lines = [
        # The machine's own search knows no settings.
        *((label, _browser(settings) if label == "browser" else value) for label, value in facts),
        *((label, f"{path}{'' if path.exists() else ' (not there yet)'}") for label, path in kept),
        ("model in use", model or "unknown: see below"),
    ]
    fits = report_lines(machine, ENTRIES)[len(facts) :]
    for title, rows in (("This machine", lines), ("Known models", fits)):
        say(title, bold=True)
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            say(f"  {label:<{width}}  {value}")
    if problem is not None:
        show_error(problem)
    elif flags.get("model__name"):
        _show_plan(settings_from(flags).model)
    return 1 if problem else 0


def _browser(settings: Settings) -> str:
    """The browser that pages are rendered in, or what to do for one."""
    from w2c_tui.web.render import can_be_sandboxed, find_browser

    try:
        path = find_browser(settings.render.browser)
    except W2CError as error:
        return f"{error.message} {error.hint}"
    return f"{path}{'' if can_be_sandboxed() else ' (without its sandbox: this user is root)'}"


def _show_plan(spec: LoadSpec) -> None:
    """Which device would hold what of a model that the user named."""
    from w2c_tui.console.progress import loading_progress
    from w2c_tui.engine.client import EngineClient

    with EngineClient(paths().engine_log) as engine, loading_progress() as report:
        shares = engine.plan(spec, report)
    say(f"Placement of {spec.name}", bold=True)
    if not shares:
        say("  unknown before it is loaded")
    for share in shares:
        name = f"GPU {share.device}" if share.device.isdigit() else share.device
        first, last = share.modules[0] or "everything", share.modules[-1]
        span = first if first == last or not last else f"{first} ... {last}"
        size = share.num_bytes
        weights = f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.2f} MB"
        say(f"  {name:<6} {weights:>9} of weights  {span}")
