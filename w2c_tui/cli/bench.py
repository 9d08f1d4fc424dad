"""`w2c bench`: how fast a model is on this machine, alone or against another."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
import msgspec

from w2c_tui.backends.choice import choose_backend
from w2c_tui.cli.flags import model_options, settings_from
from w2c_tui.console.options import F, field_options
from w2c_tui.console.terminal import say, say_json
from w2c_tui.core.config import GenerationParams, Settings

if TYPE_CHECKING:
    from w2c_tui.backends.base import ModelInfo
    from w2c_tui.core.conversation import Attachment
    from w2c_tui.evaluate.speed import Plan, Run, Spread


def _measured_options(command: F) -> F:
    """The flags that change what is measured, for the first model and for --against."""
    others = {f.name for f in msgspec.structs.fields(GenerationParams)} - {"prompt_lookup"}
    command = field_options(GenerationParams, "generation", skip=others)(command)
    command = model_options(command)
    return click.argument("model", required=False, metavar="[MODEL]")(command)


@click.command(
    epilog="Examples:  w2c bench smollm2-135m   w2c bench smollm2-135m --against '--backend hf'   "
    "w2c bench llava-1.5-7b --load-4bit --against llava-q4_k_m.gguf --json"
)
@_measured_options
@click.option(
    "--against",
    metavar="SPEC",
    help="Measure another one in turn: a model, flags that differ, or both, as in '--load-4bit'.",
)
@click.option("--runs", type=click.IntRange(1, 1000), default=3, show_default=True)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(16, 1_000_000),
    default=512,
    show_default=True,
    help="About how much text is read; at most half of the context.",
)
@click.option(
    "--tokens",
    type=click.IntRange(2, 100_000),
    default=128,
    show_default=True,
    help="How much is written.",
)
@click.option("--image", help="Picture to talk about; a screenshot comes with the program.")
@click.option("--no-image", is_flag=True, help="Talk without a picture.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    model: str | None,
    against: str | None,
    runs: int,
    prompt_tokens: int,
    tokens: int,
    image: str | None,
    no_image: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Measure how fast MODEL is: loading, reading, writing, first token, encoding the picture.

    Every run loads the model anew, in a process of its own. SPEC of --against is read on top of
    this command's flags; the two take turns and only one is in memory. Ctrl-C ends it and shows
    what is measured.
    """
    from w2c_tui.evaluate.speed import Plan

    if model is not None and flags.get("model__name") is not None:
        raise click.UsageError("MODEL and --model say the same; give one of them.")
    if image is not None and no_image:
        raise click.UsageError("--image and --no-image exclude each other.")
    if model is not None:
        flags["model__name"] = model
    settings = [settings_from(flags)]
    if against is not None:
        settings.append(settings_from({**flags, **_differences(against, flags)}))
    sides: list[_Side] = []
    for one in settings:
        choose_backend(one.model)
        lookup = one.generation.prompt_lookup
        plan = Plan(
            prompt_tokens=prompt_tokens,
            new_tokens=tokens,
            image=None if no_image else _picture(image, one),
            params=GenerationParams(temperature=0, seed=0, prompt_lookup=lookup),
        )
        label = "" if against is None else "AB"[len(sides)]
        sides.append(_Side(label, one, plan))
    try:
        _take_turns(sides, runs)
    finally:
        # Also what was measured before an error or Ctrl-C.
        if any(run.measures for side in sides for run in side.runs):
            _show(sides, as_json)
    return 0


class _Side:
    """One of the models that are measured, and its runs so far."""

    def __init__(self, label: str, settings: Settings, plan: Plan) -> None:
        self.label, self.settings, self.plan = label, settings, plan
        self.info: ModelInfo | None = None
        self.runs: list[Run] = []

    def sizes(self) -> str:
        """How often and how much was asked, in words."""
        counted = [run for run in self.runs if run.measures]
        words = [f"{len(counted)} run" + "s" * (len(counted) != 1)]
        sizes = counted[-1].sizes if counted else {}
        if "read" in sizes:
            words.append(f"{sizes['read']} tokens read, {sizes['written']} written")
            if sizes["written"] < self.plan.new_tokens:
                words[-1] += " (the answer ended by itself)"
        if "turn_1" in sizes:
            words.append(f"turn 1 of {sizes['turn_1']} tokens")
        return ", ".join(words)


def _differences(spec: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the SPEC of --against says otherwise than `flags`."""
    given: dict[str, Any] = {}

    @click.command("--against", add_help_option=False)
    @_measured_options
    def read(model: str | None, **others: Any) -> None:
        if model is not None:
            others["model__name"] = model
        given.update({k: v for k, v in others.items() if v not in (None, (), False)})

    words = [spec] if os.path.exists(spec) else shlex.split(spec)
    try:
        read.main(words, standalone_mode=False)
    except click.UsageError as error:
        raise click.BadParameter(error.format_message(), param_hint="--against") from error
    if given.get("load_4bit") or given.get("load_8bit"):
        given = {"load_4bit": False, "load_8bit": False, **given}
    if "model__name" in given:
        # It belongs to the first model.
        given = {"model__mmproj": None, **given}
    return given


def _picture(reference: str | None, settings: Settings) -> Attachment:
    from importlib import resources

    from w2c_tui.core.image import attachment_from_bytes
    from w2c_tui.core.reference import load_attachment

    if reference is not None:
        return load_attachment(reference, settings.images)
    example = resources.files("w2c_tui.tui") / "example.png"
    return attachment_from_bytes(example.read_bytes(), "example.png")


def _take_turns(sides: Sequence[_Side], num_runs: int) -> None:
    """Measure each side in turn."""
    from w2c_tui.cli.running import loaded_engine
    from w2c_tui.core.config import paths
    from w2c_tui.evaluate.speed import STEPS, Run, measure

    for side in sides:
        # Not counted: a wrong name is said at once, and for every run that counts the files are
        # fetched, converted and in the system's cache.
        with loaded_engine(side.settings) as (_, side.info):
            pass
    with _progress(num_runs * len(sides) * len(STEPS)) as report:
        done = 0
        for number in range(num_runs):
            for side in sides:
                name = f"run {number + 1} of {num_runs}{side.label and f', {side.label}'}"

                def step(what: str, name: str = name, done: int = done) -> None:
                    report(done + STEPS.index(what), f"{name}: {what}")

                side.runs.append(Run())
                measure(paths().engine_log, side.settings.model, side.plan, side.runs[-1], step)
                done += len(STEPS)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """A `report(done, step)` that draws a bar with the time left, or a line per run."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from w2c_tui.console.progress import console

    if not console.is_terminal:
        yield lambda _, step: console.print(step) if step.endswith(": load") else None
        return
    columns = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, step: progress.update(task, completed=done, description=step)


def _show(sides: Sequence[_Side], as_json: bool) -> None:
    from w2c_tui.evaluate.speed import ratios, spreads
    from w2c_tui.machine import inspect_machine

    compared = ratios(sides[0].runs, sides[1].runs) if len(sides) > 1 else {}
    machine = inspect_machine()
    date = datetime.date.today().isoformat()
    if not as_json:
        _show_table(sides, compared)
        packages = ("w2c-tui", "torch", "transformers", "llama-cpp-python")
        versions = [f"{name} {machine.packages[name]}" for name in packages]
        memory = f"{machine.memory_bytes / 2**30:.0f} GiB"
        gpus = [gpu.name for gpu in machine.gpus]
        where = ", ".join([machine.cpu, f"{machine.threads} threads", memory, *gpus])
        say(f"\n{date}, {where}\n{', '.join(versions)}")
        return
    found = {
        "date": date,
        "machine": machine,
        "sides": [
            {"model": side.info, "spec": side.settings.model, "measured": spreads(side.runs)}
            | {"runs": side.runs}
            for side in sides
        ],
        "ratios": compared,
    }
    say_json(found)


def _show_table(sides: Sequence[_Side], compared: Mapping[str, Spread]) -> None:
    from rich.table import Table

    from w2c_tui.cli.running import describe
    from w2c_tui.console.progress import SafeConsole
    from w2c_tui.evaluate.speed import MEASURES, spreads

    out = SafeConsole()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("")
    for header in [*(side.label or "median" for side in sides), *(["A / B"] if compared else [])]:
        table.add_column(header, justify="right")
        table.add_column("min-max", justify="right")
    columns = [*(spreads(side.runs) for side in sides), *([compared] if compared else [])]
    for name, (title, unit) in MEASURES.items():
        if not any(name in column for column in columns):
            continue
        row = [f"{title}, {'GiB' if unit == 'bytes' else unit}"]
        for column in columns:
            spread = column.get(name)
            divisor = 2**30 if unit == "bytes" and column is not compared else 1
            row += _cells(spread, divisor) if spread is not None else ["-", ""]
        table.add_row(*row)
    for side in sides:
        if side.info is not None:
            about = f"{side.info.name} {describe(side.info)}"
            out.print(f"{side.label}: {about}" if side.label else about, soft_wrap=True)
            out.print(side.sizes(), soft_wrap=True)
    out.print()
    out.print(table, soft_wrap=True)


def _cells(spread: Spread, divisor: float) -> list[str]:
    median, low, high = (
        f"{value / divisor:,.0f}" if value >= 1000 * divisor else f"{value / divisor:.3g}"
        for value in (spread.median, spread.low, spread.high)
    )
    return [median, f"{low}-{high}" if low != high else ""]
