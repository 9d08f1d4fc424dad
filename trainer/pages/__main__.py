"""`python -m trainer.pages`: compose pages, render them, and write what trainer.prepare reads."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, get_args

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.pages.compose import WIDTHS
from trainer.pages.palette import FONTS
from trainer.pages.write import Code, Plan, check_code, make_pages, write_records
from w2c_tui.core.config import RenderSettings
from w2c_tui.core.conversation import Hints
from w2c_tui.core.errors import W2CError
from w2c_tui.web.render import Renderer

_Widths = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=240, le=3840)], ...], msgspec.Meta(min_length=1)
]


@click.command(
    epilog="Example: python -m trainer.pages --count 20000 --out data/pages --widths 1280,768"
)
@click.option("--count", type=click.IntRange(1), required=True, help="Pages to make.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Their folder."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same pages."
)
@click.option(
    "--widths",
    default=",".join(map(str, WIDTHS)),
    show_default=True,
    help="Widths of the window in px, the likelier first.",
)
@click.option(
    "--inline-share",
    type=click.FloatRange(0, 1),
    default=0.15,
    show_default=True,
    help="Share of pages with inline styles only.",
)
@click.option(
    "--part-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of pages that are but a section or a card, cut off at its edges, at any width.",
)
@click.option(
    "--stack-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the other pages that are many short sections in any order, many of them alike.",
)
@click.option(
    "--hints",
    type=click.Choice(get_args(Hints)),
    default="text",
    show_default=True,
    help="Put into the question: nothing, the text on the page, the text with its colours, or the "
    "text in the boxes on which it lies.",
)
@click.option(
    "--code",
    type=click.Choice(get_args(Code)),
    default="source",
    show_default=True,
    help="The answers: the HTML that pages were rendered from, or one with the numbers of the "
    "layout that is told.",
)
@click.option(
    "--tabs", type=click.IntRange(0, 64), default=0, help="Pages rendered at a time; 0: one a core."
)
def main(
    count: int,
    out: Path,
    seed: int,
    widths: str,
    inline_share: float,
    part_share: float,
    stack_share: float,
    hints: Hints,
    code: Code,
    tabs: int,
) -> None:
    """Compose web pages, render them in headless Chromium, and write LLaVA records.

    Interrupt it at any time: the same command goes on where it stopped. More pages of the same set
    are made by a larger --count; other --hints or --code only rewrite the records.
    """
    try:
        check_code(code, hints)
        plan = Plan(
            seed=seed,
            widths=_widths(widths),
            inline_share=inline_share,
            part_share=part_share,
            stack_share=stack_share,
        )
        # Our own pages end; a machine that is busy with training may take long for one.
        settings = RenderSettings(tabs=tabs, height=16, timeout_s=300)
        with Renderer(settings) as renderer:
            rendered = _with_progress(out, plan, count, renderer)
            about = _about(renderer) if rendered else _known_about(out)
        records = write_records(out, plan, count, hints, code, about)
    except W2CError as error:
        click.echo(f"Error: {error.message}\n{error.hint}".rstrip(), err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("Stopped; the same command goes on from here.", err=True)
        sys.exit(130)
    click.echo(f"{out}: {records} records in pages.json and captions.json.")


def _widths(text: str) -> tuple[int, ...]:
    try:
        return msgspec.convert(text.replace(",", " ").split(), _Widths, strict=False)
    except msgspec.ValidationError as error:
        raise click.BadParameter(
            f"{text!r}: {error}; give px between 240 and 3840, as in 1280,768.",
            param_hint="--widths",
        ) from error


def _about(renderer: Renderer) -> dict[str, Any]:
    info = renderer.info()
    return {"browser": info.version, "generic_fonts": info.fonts, "named_fonts": FONTS}


def _known_about(out: Path) -> dict[str, Any]:
    """What the manifest said of the browser that made the pages."""
    path = out / "manifest.json"
    known = msgspec.json.decode(path.read_bytes()) if path.is_file() else {}
    return {key: known[key] for key in ("browser", "generic_fonts", "named_fonts") if key in known}


def _with_progress(out: Path, plan: Plan, count: int, renderer: Renderer) -> int:
    console = Console(stderr=True)
    columns = (
        TextColumn("Pages"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    begun: list[tuple[float, int]] = []
    shown = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Pages", total=count, rate="")

        def report(done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if not begun:
                begun.append((now, done))
            seconds = now - begun[0][0]
            rate = (done - begun[0][1]) / seconds if seconds > 1 else 0.0
            progress.update(task, completed=done, rate=f"{rate:.1f}/s" if rate else "")
            if not console.is_terminal and (now - shown > 30 or done == total):
                shown = now
                left = (total - done) / rate / 60 if rate else 0.0
                console.print(f"{done} of {total} pages, {rate:.1f}/s, {left:.0f} min left")

        return make_pages(out, plan, count, renderer, report)


if __name__ == "__main__":
    main()
