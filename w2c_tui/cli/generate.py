"""`w2c generate`: screenshots in, pages out, one model load for all of them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from w2c_tui.backends.base import Finished, ModelInfo, Prefill, Stats, Text, Trimmed
from w2c_tui.cli.options import generation_options, model_options, settings_from
from w2c_tui.core.catalog import find
from w2c_tui.core.config import Settings
from w2c_tui.core.errors import ImageError, W2CError
from w2c_tui.core.files import write_atomically
from w2c_tui.core.prompt import PAGE_PROMPT

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


class Outcome(msgspec.Struct, omit_defaults=True):
    """What became of one image; `--json` prints one of these per line."""

    image: str
    status: str
    output: str | None = None
    html: str | None = None
    complete: bool | None = None
    finish_reason: str | None = None
    error: str | None = None
    hint: str | None = None
    stats: Stats | None = None


@click.command(
    epilog="Examples:  w2c generate shot.png   "
    "w2c generate shots/ --out pages/ --json   "
    "w2c generate https://example.org/shot.png --out - | less"
)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "-p", "--prompt", default=PAGE_PROMPT, show_default=True, help="What to ask of each image."
)
@click.option(
    "-o",
    "--out",
    metavar="FILE|DIR|-",
    help="Where to write: a file for one image, a folder for many, - for standard output. "
    "Default: IMAGE's name with .html, in the current folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
@click.option("--force", is_flag=True, help="Redo images whose page is already there.")
@generation_options
@model_options
def generate(
    images: tuple[str, ...],
    prompt: str,
    out: str | None,
    as_json: bool,
    force: bool,
    **flags: Any,
) -> int:
    """Turn screenshots into pages.

    IMAGE is a file, a folder of images or an http(s) URL. The model is loaded once. Pages that
    are already there are skipped, so a run that was interrupted goes on where it stopped; an
    image that fails is reported and the others are done.
    """
    settings = settings_from(flags)
    jobs = _plan(_expand(images), out)
    todo = [job for job in jobs if force or job[1] is None or not job[1].exists()]
    run = _Run(settings, prompt, as_json)
    for image, target in jobs:
        if (image, target) not in todo:
            run.report(Outcome(image, "skipped", output=str(target)))
    if todo:
        run.all(todo)
    return 1 if run.failed else 0


class _Run:
    """One invocation: the settings, and what has become of its images."""

    def __init__(self, settings: Settings, prompt: str, as_json: bool) -> None:
        self.settings = settings
        self.prompt = prompt
        self.as_json = as_json
        self.failed = 0
        entry = find(settings.model.name)
        # What a user asks for in their own words is asked in their own words.
        self.begins_pages = entry is not None and not entry.knows_pages and prompt == PAGE_PROMPT

    def all(self, jobs: Sequence[tuple[str, Path | None]]) -> None:
        from w2c_tui.cli.running import console, interrupt_cancels, load_model
        from w2c_tui.core.config import paths
        from w2c_tui.core.reference import load_attachment
        from w2c_tui.engine.client import EngineClient

        if len(jobs) == 1:
            # A wrong name is said before a model is loaded for it.
            load_attachment(jobs[0][0], self.settings.images)
        with EngineClient(paths().engine_log) as engine:
            info = load_model(engine, self.settings)
            with interrupt_cancels(engine) as pressed:
                for at, (image, target) in enumerate(jobs, 1):
                    if engine.pid is None:
                        info = load_model(engine, self.settings)
                    counter = f"[{at}/{len(jobs)}] " if len(jobs) > 1 else ""
                    try:
                        outcome = self.one(engine, info, image, target, counter)
                    except W2CError as error:
                        outcome = Outcome(image, "failed", error=error.message, hint=error.hint)
                    if pressed.is_set():
                        console.print("Stopped; nothing of the unfinished page was written.")
                        raise click.Abort
                    self.report(outcome)

    def one(
        self, engine: Any, info: ModelInfo, image: str, target: Path | None, counter: str
    ) -> Outcome:
        from w2c_tui.cli.running import Rate, attach, console, write_result
        from w2c_tui.core.artifact import best_page
        from w2c_tui.core.conversation import Message
        from w2c_tui.core.page_text import begun_page

        attachment = attach(image, self.settings, engine, info)
        system = self.settings.system
        messages = [
            *([Message("system", system)] if system else []),
            Message("user", self.prompt, (attachment,)),
        ]
        if self.begins_pages and attachment.page_text:
            messages = begun_page(attachment)
        params = self.settings.generation
        raw: list[str] = []
        if messages[-1].role == "assistant":
            raw.append(messages[-1].text)
            # Without an end of its own such a model goes round in circles.
            length = 100 + sum(len(line.text) for line in attachment.page_text or ())
            params = msgspec.structs.replace(
                params, max_new_tokens=min(params.max_new_tokens, length)
            )
        ended = False
        rate = Rate()
        finished: Finished | None = None
        title = f"{counter}{attachment.name}"
        with contextlib.ExitStack() as stack:
            line = None
            if console.is_terminal:
                line = stack.enter_context(console.status(f"{title}: reading"))
            for event in engine.stream(messages, params):
                if isinstance(event, Text):
                    raw.append(event.delta)
                    if not ended and "</html>" in "".join(raw[-8:]).lower():
                        # Whatever else the model wants to say, it is not the page.
                        ended = True
                        engine.cancel()
                    rate.add()
                    if line is not None and rate.count % 8 == 0:
                        line.update(f"{title}: {rate.count} tokens, {rate.per_s:.0f} tokens/s")
                elif isinstance(event, Prefill) and line is not None:
                    line.update(f"{title}: reading {event.done}/{event.total} tokens")
                elif isinstance(event, Trimmed):
                    console.print(f"{title}: the conversation was cut to fit the context.")
                elif isinstance(event, Finished):
                    finished = event
        assert finished is not None
        text = "".join(raw)
        page = best_page(text)
        outcome = Outcome(
            image,
            "failed",
            finish_reason="stop" if ended else finished.reason,
            stats=finished.stats,
            complete=ended or finished.reason == "stop",
        )
        if page is None:
            start = " ".join(text.split())[:80]
            outcome.error = f"The answer holds no page: {start!r}."
            outcome.hint = "Try another prompt, a lower temperature or another model."
            return outcome
        outcome.status = "done"
        if outcome.finish_reason == "length":
            outcome.hint = (
                f"The page was cut after {finished.stats.new_tokens} tokens; "
                "a higher --max-new-tokens lets it end."
            )
        if target is not None:
            write_atomically(target, page.html)
            outcome.output = str(target)
        elif self.as_json:
            outcome.html = page.html
        else:
            write_result(page.html if page.html.endswith("\n") else page.html + "\n")
        return outcome

    def report(self, outcome: Outcome) -> None:
        from w2c_tui.cli import printable, show_error

        self.failed += outcome.status == "failed"
        if self.as_json:
            click.echo(msgspec.json.encode(outcome).decode())
            return
        name = printable(outcome.image)
        if outcome.status == "failed":
            show_error(ImageError(outcome.error or "", hint=outcome.hint or ""), prefix=name)
            return
        stats = outcome.stats
        if outcome.status == "skipped":
            click.echo(f"{name}: {outcome.output} is there, skipped (--force redoes it)", err=True)
            return
        measured = (
            f" ({stats.new_tokens} tokens, first after {stats.time_to_first_token_s:.1f} s, "
            f"{stats.tokens_per_s:.0f} tokens/s)"
            if stats
            else ""
        )
        click.echo(f"{name} -> {outcome.output or 'standard output'}{measured}", err=True)
        if outcome.hint:
            click.echo(f"  {outcome.hint}", err=True)


def _expand(images: Sequence[str]) -> list[str]:
    found: list[str] = []
    for image in images:
        if os.path.isdir(image):
            inside = sorted(
                entry.path
                for entry in os.scandir(image)
                if entry.is_file() and Path(entry.name).suffix.lower() in _SUFFIXES
            )
            if not inside:
                raise ImageError(
                    f"The folder {image} holds no images.",
                    hint=f"Looked for {', '.join(sorted(_SUFFIXES))}.",
                )
            found += inside
        else:
            found.append(image)
    return list(dict.fromkeys(found))


def _plan(images: Sequence[str], out: str | None) -> list[tuple[str, Path | None]]:
    """Each image with the file that its page goes to (None: standard output)."""
    if out == "-":
        return [(image, None) for image in images]
    is_folder = out is None or os.path.isdir(out) or out.endswith(("/", os.sep))
    if out is not None and len(images) == 1 and not is_folder:
        return [(images[0], Path(out))]
    folder = Path(out or ".")
    if folder.exists() and not folder.is_dir():
        raise click.UsageError(f"--out {out} is a file, but there are {len(images)} images.")
    taken: dict[str, int] = {}
    plan: list[tuple[str, Path | None]] = []
    for image in images:
        stem = _stem(image)
        taken[stem] = number = taken.get(stem, 0) + 1
        plan.append((image, folder / (f"{stem}.html" if number == 1 else f"{stem}-{number}.html")))
    return plan


def _stem(image: str) -> str:
    name = image.split("?")[0].rstrip("/") if "://" in image else image
    stem = Path(name.replace("\\", "/") if sys.platform == "win32" else name).stem
    return re.sub(r"[\x00-\x1f/:\\]+", "_", stem) or "page"
