"""`w2c generate`: screenshots in, pages out, one model load for all of them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from w2c_tui.backends.base import ModelInfo, Stats
from w2c_tui.backends.choice import knows_pages
from w2c_tui.cli.flags import generation_options, model_options, settings_from
from w2c_tui.console.options import F
from w2c_tui.console.terminal import say, say_json, write_bytes
from w2c_tui.core.config import GenerationParams, Settings
from w2c_tui.core.errors import EngineError, ImageError, W2CError
from w2c_tui.core.files import write_atomically
from w2c_tui.core.prompt import PAGE_PROMPT

if TYPE_CHECKING:
    from w2c_tui.cli.running import AnswerLine
    from w2c_tui.core.conversation import Attachment, Message
    from w2c_tui.core.versions import Version
    from w2c_tui.engine.page_writer import Answer
    from w2c_tui.web.better import Try
    from w2c_tui.web.render import Renderer
    from w2c_tui.web.view import View

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


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
    score: float | None = None
    tries: list[dict[str, Any]] | None = None


def better_options(command: F) -> F:
    """The flags that buy a better page with more computing."""
    command = click.option(
        "--refine",
        type=click.IntRange(0, 100),
        default=0,
        metavar="K",
        help="Let the model correct what differs from the image, K times; keep the best page.",
    )(command)
    return click.option(
        "--best-of",
        type=click.IntRange(1, 100),
        default=1,
        metavar="N",
        help="Write N pages with different seeds and keep the one that looks most like the image.",
    )(command)


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
@better_options
@generation_options
@model_options
def generate(
    images: tuple[str, ...],
    prompt: str,
    out: str | None,
    as_json: bool,
    force: bool,
    best_of: int,
    refine: int,
    **flags: Any,
) -> int:
    """Turn screenshots into pages.

    IMAGE is a file, a folder of images or an http(s) URL. The model is loaded once. Pages that
    are already there are skipped, so a run that was interrupted goes on where it stopped; an
    image that fails is reported and the others are done.

    --best-of and --refine render pages in Chromium or Chrome and score them against the image; the
    tries are kept as versions in a folder beside the page (see w2c versions), and Ctrl-C keeps the
    best so far.
    """
    settings = settings_from(flags)
    jobs = _plan(_expand(images), out)
    todo = [job for job in jobs if force or job[1] is None or not job[1].exists()]
    run = Run(settings, prompt, as_json, best_of, refine)
    for image, target in jobs:
        if (image, target) not in todo:
            run.report(Outcome(image, "skipped", output=str(target)))
    if todo:
        run.all(todo)
    return 1 if run.failed else 0


class Run:
    """One invocation: the settings, and what has become of its images."""

    def __init__(
        self, settings: Settings, prompt: str, as_json: bool, best_of: int = 1, refine: int = 0
    ) -> None:
        self.best_of, self.refine = best_of, refine
        self.renderer: Renderer | None = None
        self.settings = settings
        self.prompt = prompt
        self.as_json = as_json
        self.failed = 0
        self.interrupted = threading.Event()
        """Set by the first Ctrl-C."""
        self.begins_pages = not knows_pages(settings.model)

    def all(self, jobs: Sequence[tuple[str, Path | None]]) -> None:
        from w2c_tui.core.reference import load_attachment

        if len(jobs) == 1:
            # A wrong name is said before a model is loaded for it.
            load_attachment(jobs[0][0], self.settings.images)
        self.each(jobs, len(jobs))

    def each(self, jobs: Iterable[tuple[str, Path | None]], total: int = 0) -> None:
        """Do the jobs as they come, with one model; `jobs` ends when `interrupted` is set."""
        from w2c_tui.cli.running import interrupt_cancels, load_model
        from w2c_tui.console.progress import console
        from w2c_tui.core.config import paths
        from w2c_tui.engine.client import EngineClient

        with contextlib.ExitStack() as stack:
            if self.best_of > 1 or self.refine:
                self.renderer = stack.enter_context(self._started_renderer())
            engine = stack.enter_context(EngineClient(paths().engine_log))
            info = load_model(engine, self.settings)
            with interrupt_cancels(engine) as self.interrupted:
                for at, (image, target) in enumerate(jobs, 1):
                    if not engine.is_ready:
                        info = load_model(engine, self.settings)
                    counter = f"[{at}/{total}] " if total > 1 else ""
                    try:
                        outcome = self.one(engine, info, image, target, counter)
                    except W2CError as error:
                        outcome = Outcome(image, "failed", error=error.message, hint=error.hint)
                    stopped = self.interrupted.is_set()
                    if stopped and outcome.status == "done" and outcome.tries:
                        self.report(outcome)
                        raise click.Abort
                    if stopped:
                        console.print("Stopped; nothing of the unfinished page was written.")
                        raise click.Abort
                    self.report(outcome)

    def _started_renderer(self) -> Renderer:
        """The browser. What would keep it from working is said before a model is loaded."""
        from w2c_tui.web.better import check_best_of
        from w2c_tui.web.render import Renderer, find_browser

        check_best_of(self.best_of, self.settings.generation)
        find_browser(self.settings.render.browser)
        return Renderer(self.settings.render)

    def one(
        self, engine: Any, info: ModelInfo, image: str, target: Path | None, counter: str
    ) -> Outcome:
        from w2c_tui.cli.running import AnswerLine, attach
        from w2c_tui.core.conversation import Message
        from w2c_tui.engine.page_writer import begun, write_page

        attachment = attach(image, self.settings, engine, info)
        system = self.settings.system
        messages = [
            *([Message("system", system)] if system else []),
            Message("user", self.prompt, (attachment,)),
        ]
        params = self.settings.generation
        # What a user asks for in their own words is asked in their own words.
        if self.begins_pages and (helped := begun(messages, params)) is not None:
            messages, params = helped
        outcome = Outcome(image, "failed")
        with AnswerLine(f"{counter}{attachment.name}") as progress:
            if self.renderer is None:
                events = write_page(engine, messages, params, cancelled=self.interrupted.is_set)
                answer = progress.follow(events)
            else:
                tries = target.with_name(f"{target.stem}-tries") if target else None
                answer = self._best(
                    engine, info, attachment, messages, params, outcome, progress, tries
                )
        page = answer.page
        outcome.finish_reason = answer.reason
        outcome.stats = answer.stats
        outcome.complete = answer.reason == "stop"
        if answer.reason == "cancelled":
            # A fragment would be taken for the page: by people, and by the next run.
            outcome.error = "Stopped before the page was whole."
            return outcome
        if page is None:
            start = " ".join(answer.text.split())[:80]
            outcome.error = f"The answer holds no page: {start!r}."
            outcome.hint = "Try another prompt, a lower temperature or another model."
            return outcome
        outcome.status = "done"
        if outcome.finish_reason == "length":
            outcome.hint = (
                f"The page was cut after {answer.stats.new_tokens} tokens; "
                "a higher --max-new-tokens lets it end."
            )
        if target is not None:
            write_atomically(target, page.html)
            outcome.output = str(target)
        elif self.as_json:
            outcome.html = page.html
        else:
            html = page.html if page.html.endswith("\n") else page.html + "\n"
            write_bytes(html.encode("utf-8"))
        return outcome

    def _best(
        self,
        engine: Any,
        info: ModelInfo,
        attachment: Attachment,
        messages: list[Message],
        params: GenerationParams,
        outcome: Outcome,
        progress: AnswerLine,
        folder: Path | None,
    ) -> Answer:
        """The answer of the best try. All of them stand in `outcome.tries`, with their pages or,
        where there is a `folder`, as versions in it."""
        from w2c_tui.web.better import Begun, Try, best_try, better_pages

        assert self.renderer is not None
        tries: list[Try] = []
        steps = better_pages(
            engine,
            self.renderer,
            messages,
            params,
            self._reference(engine, attachment, progress),
            info,
            best_of=self.best_of,
            refine=self.refine,
            cancelled=self.interrupted.is_set,
        )
        for step in steps:
            if isinstance(step, Begun):
                progress.part = f"{step.kind} {step.number}/{step.total}"
            elif isinstance(step, Try):
                tries.append(step)
                progress.say(f"{progress.part}: {step.error or f'score {step.score:.3f}'}")
            else:
                progress.take(step)
        if tries[0].answer is not None and tries[0].answer.reason == "cancelled":
            # Only of the first one what there is was looked at; nothing of it is kept.
            return tries[0].answer
        best = best_try(tries) or tries[0]
        outcome.score = round(best.score, 4)
        outcome.tries = [
            {
                "number": one.number,
                "kind": one.kind,
                "seed": one.seed,
                "score": round(one.score, 4),
                "parts": one.comparison.score.parts if one.comparison else {},
                "error": one.error,
                "kept": one is best,
                "html": one.html,
            }
            for one in tries
        ]
        if folder is not None:
            for row, version in zip(
                outcome.tries,
                self._keep_tries(folder, attachment, info, params, tries, best),
                strict=True,
            ):
                del row["html"]
                row["file"] = str(version.html_path) if version else None
        if best.answer is None:
            raise EngineError(best.error)
        return best.answer

    def _reference(self, engine: Any, attachment: Attachment, progress: AnswerLine) -> View:
        """The screenshot to score against, with its text where recognition is installed."""
        import importlib.util

        from w2c_tui.web.view import view_of_picture

        lines = attachment.page_text
        if lines is None and importlib.util.find_spec("rapidocr") is not None:
            progress.part = "reading the image's text"
            lines = engine.read_text(attachment)
        elif lines is None:
            progress.say(
                "without text recognition only the picture counts (pip install 'w2c-tui[ocr]')"
            )
        return view_of_picture(attachment, lines, self.settings.images)

    def _keep_tries(
        self,
        folder: Path,
        attachment: Attachment,
        info: ModelInfo,
        params: GenerationParams,
        tries: list[Try],
        best: Try,
    ) -> list[Version | None]:
        """Keep the page of each try as a version in `folder`, with its picture and its score; the
        best one is in sight. None for a try without a page."""
        from w2c_tui.core.versions import Versions
        from w2c_tui.web.better import best_try

        versions = Versions(folder)
        kept: list[Version | None] = []
        original: Attachment | Path | None = attachment
        for at, one in enumerate(tries):
            if one.answer is None or one.answer.page is None:
                kept.append(None)
                continue
            # What a correction was asked to correct.
            before = best_try(tries[:at]) if one.kind == "correction" else None
            above = kept[tries.index(before)] if before else None
            version = versions.add(
                one.answer.page.html,
                original=original,
                origin="refined" if one.kind == "correction" else "candidate",
                parent=above.number if above else None,
                select=one is best,
                prompt=self.prompt,
                model=info.name,
                params=msgspec.to_builtins(msgspec.structs.replace(params, seed=one.seed)),
                stats=msgspec.to_builtins(one.answer.stats),
                complete=one.answer.page.complete,
                score=round(one.score, 4),
                notes={"parts": one.comparison.score.parts} if one.comparison else {},
            )
            original = version.original_path
            kept.append(version)
            if one.view is not None:
                picture = io.BytesIO()
                one.view.picture.save(picture, "PNG")
                versions.set_render(version.number, picture.getvalue())
        return kept

    def report(self, outcome: Outcome) -> None:
        from w2c_tui.console import show_error

        self.failed += outcome.status == "failed"
        if self.as_json:
            say_json(outcome)
            return
        name = outcome.image
        if outcome.status == "failed":
            show_error(ImageError(outcome.error or "", hint=outcome.hint or ""), prefix=name)
            return
        stats = outcome.stats
        if outcome.status == "skipped":
            say(f"{name}: {outcome.output} is there, skipped (--force redoes it)", err=True)
            return
        measured = (
            f" ({stats.new_tokens} tokens, first after {stats.time_to_first_token_s:.1f} s, "
            f"{stats.tokens_per_s:.0f} tokens/s)"
            if stats
            else ""
        )
        if outcome.tries:
            scores = [row["score"] for row in outcome.tries]
            measured = f" (score {outcome.score:.3f}, first {scores[0]:.3f}, {len(scores)} tries)"
        say(f"{name} -> {outcome.output or 'standard output'}{measured}", err=True)
        if outcome.hint:
            say(f"  {outcome.hint}", err=True)


def _expand(images: Sequence[str]) -> list[str]:
    found: list[str] = []
    for image in images:
        if os.path.isdir(image):
            inside = sorted(
                entry.path
                for entry in os.scandir(image)
                if entry.is_file() and Path(entry.name).suffix.lower() in SUFFIXES
            )
            if not inside:
                raise ImageError(
                    f"The folder {image} holds no images.",
                    hint=f"Looked for {', '.join(sorted(SUFFIXES))}.",
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
        stem = stem_of(image)
        taken[stem] = number = taken.get(stem, 0) + 1
        plan.append((image, folder / (f"{stem}.html" if number == 1 else f"{stem}-{number}.html")))
    return plan


def stem_of(image: str) -> str:
    """The name, without an ending, of the page that is made from a path or URL."""
    name = image.split("?")[0].rstrip("/") if "://" in image else image
    stem = Path(name.replace("\\", "/") if sys.platform == "win32" else name).stem
    return re.sub(r"[\x00-\x1f/:\\]+", "_", stem) or "page"
