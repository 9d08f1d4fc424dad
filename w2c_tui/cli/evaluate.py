"""`w2c evaluate`: the published benchmarks, and one run against another."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from w2c_tui.backends.choice import choose_backend
from w2c_tui.cli.flags import generation_options, model_options, render_options, settings_from
from w2c_tui.console.terminal import say, say_json

if TYPE_CHECKING:
    from w2c_tui.backends.base import ModelInfo
    from w2c_tui.core.config import GenerationParams, LoadSpec, Settings
    from w2c_tui.core.conversation import Message
    from w2c_tui.engine.client import EngineClient
    from w2c_tui.evaluate.asking import Asker, Attach
    from w2c_tui.evaluate.wcgb import Page, WcgbResult
    from w2c_tui.evaluate.wub import Accuracy, WubResult

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


_devices = click.option(
    "--devices",
    default="",
    help="Share the work out to one model on each of these: 0,1 are GPUs, cpu,cpu two processes.",
)


@click.group(
    epilog="Example:  w2c evaluate wub --model M --data Web2Code_eval.jsonl --images images/"
)
def evaluate() -> None:
    """Measure how good a model is: on the Web2Code benchmarks, on your own pages."""


@evaluate.command(
    epilog="Example:  w2c evaluate wub --model llava-1.5-7b --load-4bit "
    "--data Web2Code_eval.jsonl --images images/"
)
@click.option("--data", type=_FILE, required=True, help="JSONL of rows {image, question_id, Q, A}.")
@click.option("--images", type=_FOLDER, required=True, help="Folder that the image names start in.")
@click.option("--out", type=click.Path(path_type=Path), help="Results go here; default: wub-MODEL.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many questions.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@_devices
@generation_options
@model_options
def wub(
    data: Path,
    images: Path,
    out: Path | None,
    limit: int | None,
    as_json: bool,
    devices: str,
    **flags: Any,
) -> int:
    """Answer the Webpage Understanding Benchmark: yes/no questions on screenshots.

    Prompt, the one retry and temperature 0.2 are as published; flags change them. An interrupted
    run goes on where it was when it is started again.
    """
    from w2c_tui.evaluate.asking import what_was_run
    from w2c_tui.evaluate.journal import Journal, Run
    from w2c_tui.evaluate.run_wub import run_wub
    from w2c_tui.evaluate.wub import PUBLISHED_PARAMS, Answered, load_questions

    settings = _published(settings_from(flags), PUBLISHED_PARAMS, flags)
    questions = load_questions(data)[:limit]
    run = Run(
        benchmark="wub",
        model=settings.model.name,
        backend=choose_backend(settings.model),
        data=hashlib.sha256(data.read_bytes()).hexdigest(),
        params=what_was_run(settings.model, settings.generation, settings.ocr, settings.ocr_hints),
    )
    folder = out or Path(f"wub-{_stem(settings.model.name)}")
    specs = on_devices(settings.model, devices)
    with (
        Journal(folder, run, Answered) as journal,
        evaluating(settings, specs, "questions") as session,
    ):
        result = run_wub(session.workers, questions, images, journal, session.report)
    _show_wub(result, folder, as_json)
    return 0


@evaluate.command(
    epilog="Examples:  w2c evaluate wcgb --model llava-1.5-7b --images shots/ --references html/   "
    "w2c evaluate wcgb --predictions pages/ --images Design2Code/"
)
@click.option("--images", type=_FOLDER, required=True, help="Folder of screenshots.")
@click.option(
    "--references",
    type=_FOLDER,
    help="Folder of their HTML, NAME.html for NAME.png; default: the screenshots' own.",
)
@click.option("--predictions", type=_FOLDER, help="Score the pages in this folder; ask no model.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Results go here; default: wcgb-MODEL."
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many pages.")
@click.option("--judge-url", default="", help="OpenAI-compatible server that rates the pictures.")
@click.option("--judge-model", default="", help="The judge's model, where the server has several.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@render_options
@_devices
@generation_options
@model_options
def wcgb(
    images: Path,
    references: Path | None,
    predictions: Path | None,
    out: Path | None,
    limit: int | None,
    judge_url: str,
    judge_model: str,
    as_json: bool,
    devices: str,
    **flags: Any,
) -> int:
    """Answer the Webpage Code Generation Benchmark: reproduce screenshots, render, score.

    Every page counts, one without a picture scores 0. Prompt, temperature 0.2 and 10,000 tokens
    are as published; flags change them. An interrupted run goes on where it was. With --judge-url
    both pictures of each page are sent to that server for the paper's ten ratings.
    """
    from w2c_tui.cli.running import with_page_text
    from w2c_tui.core.config import paths
    from w2c_tui.evaluate import journal, wcgb
    from w2c_tui.evaluate.asking import what_was_run
    from w2c_tui.evaluate.report import write_report
    from w2c_tui.evaluate.run_wcgb import by_model, from_folder, run_wcgb
    from w2c_tui.web.render import Renderer, find_browser
    from w2c_tui.web.render_cache import RenderCache

    settings = _published(settings_from(flags), wcgb.PUBLISHED_PARAMS, flags)
    pages = wcgb.load_pages(images, references)[:limit]
    find_browser(settings.render.browser)
    model = str(predictions) if predictions else settings.model.name
    run = journal.Run(
        benchmark="wcgb",
        model=model,
        backend="predictions" if predictions else choose_backend(settings.model),
        data=_fingerprint(pages),
        params={
            **(
                {}
                if predictions
                else what_was_run(
                    settings.model, settings.generation, settings.ocr, settings.ocr_hints
                )
            ),
            "render": msgspec.to_builtins(settings.render),
            "judge": judge_model or judge_url,
        },
    )
    folder = out or Path(f"wcgb-{_stem(model)}")
    with contextlib.ExitStack() as stack:
        rows = stack.enter_context(journal.Journal(folder, run, wcgb.PageResult))
        renderer = stack.enter_context(Renderer(settings.render))
        cache = RenderCache(paths().renders, renderer)
        cache.trim()
        specs = on_devices(settings.model, devices) if predictions is None else []
        session = stack.enter_context(evaluating(settings, specs, "pages"))
        judging = stack.enter_context(_judge(judge_url, judge_model)) if judge_url else None
        writers = (
            [by_model(asker, attach, settings.system) for asker, attach in session.workers]
            if predictions is None
            else [from_folder(predictions)]
        )
        read = importlib.util.find_spec("rapidocr") is not None
        result = run_wcgb(
            pages,
            writers,
            rows,
            renderer,
            render_reference=cache.render,
            read_text=(lambda image: with_page_text(image, session.engine)) if read else None,
            ask_judge=judging,
            report=session.report,
            limits=settings.images,
        )
        latest = {row.name: row for row in rows.rows}
        report = write_report(folder, run, result, [latest[page.name] for page in pages])
    _show_wcgb(result, folder, report, as_json)
    return 0


@evaluate.command(
    epilog="Example:  w2c evaluate compare wcgb-model-f16 wcgb-model-q4 --report q4.html"
)
@click.argument("run_a", type=_FOLDER)
@click.argument("run_b", type=_FOLDER)
@click.option("--report", type=click.Path(path_type=Path), help="Write what changed as HTML.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def compare(run_a: Path, run_b: Path, report: Path | None, as_json: bool) -> int:
    """Say whether RUN_B is better than RUN_A: paired over the same questions or pages.

    The interval is a bootstrap of the paired differences; where it leaves out 0 the difference is
    more than chance.
    """
    from w2c_tui.evaluate.compare import compare_runs
    from w2c_tui.evaluate.report import write_comparison

    paired = compare_runs(run_a, run_b)
    if report is not None:
        write_comparison(report, paired, (run_a, run_b))
    if as_json:
        say_json(paired)
        return 0
    worse = sum(change.difference < 0 for change in paired.changes)
    better = sum(change.difference > 0 for change in paired.changes)
    say(f"{run_a}: {paired.means[0]:.4f}")
    say(f"{run_b}: {paired.means[1]:.4f}")
    say(
        f"difference: {paired.difference:+.4f}, 95% interval {paired.interval.low:+.4f} to "
        f"{paired.interval.high:+.4f} ({'clear' if paired.is_clear else 'may be chance'})"
    )
    say(f"{better} better, {worse} worse, {len(paired.changes) - better - worse} the same")
    for change in (*paired.changes[:5],) if worse else ():
        say(f"  {change.difference:+.3f}  {change.name}")
    return 0


@contextlib.contextmanager
def _judge(url: str, model: str) -> Iterator[Callable[[Sequence[Message], int], str]]:
    """Asks a server in an engine process of its own."""
    import threading

    from w2c_tui.cli.running import load_model
    from w2c_tui.core.config import GenerationParams, LoadSpec, Settings, paths
    from w2c_tui.engine.client import EngineClient
    from w2c_tui.evaluate.asking import Asker

    spec = LoadSpec(backend="openai", base_url=url, name=model or LoadSpec().name)
    params = GenerationParams(temperature=0, max_new_tokens=300, seed=0)
    asking = threading.Lock()
    with EngineClient(paths().engine_log) as engine:
        load_model(engine, Settings(model=spec))
        asker = Asker(
            engine, lambda: load_model(engine, Settings(model=spec)), params, threading.Event()
        )

        def ask(messages: Sequence[Message], number: int) -> str:
            with asking:
                return asker.ask(messages, number)

        yield ask


def _fingerprint(pages: Sequence[Page]) -> str:
    """Of the names and contents of all screenshots and reference pages."""
    found = hashlib.sha256()
    for page in pages:
        found.update(os.fsencode(page.name))
        for path in (page.image, page.html):
            found.update(hashlib.sha256(path.read_bytes()).digest() if path else b"-")
    return found.hexdigest()


class Evaluation(msgspec.Struct):
    """The models that are being evaluated, and how far they are. `engine` is there without one."""

    engine: EngineClient
    workers: list[tuple[Asker, Attach]]
    report: Callable[[int, int], None]


def on_devices(spec: LoadSpec, devices: str) -> list[LoadSpec]:
    """The model once for each of the comma-separated `devices`, or as it is if there are none.

    Raises ConfigError for what is no device.
    """
    from w2c_tui.core.errors import ConfigError

    names = [name.strip() for name in devices.split(",") if name.strip()]
    if not names:
        return [spec]
    backend = choose_backend(spec)
    if backend == "openai":
        raise ConfigError(
            "--devices is for models on this machine.", hint="Leave it out with --base-url."
        )
    num_cpu = names.count("cpu")
    specs = []
    for name in names:
        number = name.removeprefix("cuda:")
        if name != "cpu" and not number.isdecimal():
            raise ConfigError(
                f"--devices: {name!r} is no device.", hint="A GPU's number, or cpu, as in 0,1."
            )
        where: dict[str, Any]
        if backend == "gguf":
            where = {"n_gpu_layers": 0} if name == "cpu" else {"main_gpu": int(number)}
        else:
            where = {"device_map": "cpu" if name == "cpu" else f"cuda:{number}"}
        if name == "cpu" and not spec.threads:
            where["threads"] = max((os.cpu_count() or 1) // num_cpu, 1)
        specs.append(msgspec.structs.replace(spec, **where))
    return specs


@contextlib.contextmanager
def evaluating(settings: Settings, specs: Sequence[LoadSpec], unit: str) -> Iterator[Evaluation]:
    """An engine with a model for each of `specs`, with a bar of finished `unit`.

    Ctrl-C ends the run with click.Abort; what is finished is kept.
    """
    from w2c_tui.cli.running import attach, interrupt_cancels, load_model
    from w2c_tui.console.progress import console, counting
    from w2c_tui.core.config import paths
    from w2c_tui.engine.client import EngineClient
    from w2c_tui.evaluate.asking import Asker, Stopped

    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(EngineClient(paths().engine_log)) for _ in range(len(specs) or 1)
        ]
        loads: list[Callable[[], ModelInfo]] = []
        infos = []
        for engine, spec in zip(engines, specs, strict=False):
            there = msgspec.structs.replace(settings, model=spec)
            loads.append(functools.partial(load_model, engine, there))
            infos.append(loads[-1]())
        report = stack.enter_context(counting(unit))
        pressed = stack.enter_context(interrupt_cancels(*engines))

        def opener(engine: EngineClient, info: ModelInfo) -> Attach:
            return lambda path: attach(str(path), settings, engine, info)

        workers = [
            (Asker(engine, load, settings.generation, pressed), opener(engine, info))
            for engine, load, info in zip(engines, loads, infos, strict=False)
        ]
        try:
            yield Evaluation(engines[0], workers, report)
        except Stopped:
            console.print("Stopped; run the same command again to go on.")
            raise click.Abort from None


def _published(settings: Settings, protocol: GenerationParams, flags: dict[str, Any]) -> Settings:
    """`settings` with the protocol's way of generating, but for what a flag asked for."""
    given = {
        field: value
        for key, value in flags.items()
        if key.startswith("generation__") and value is not None and value != ()
        for field in [key.removeprefix("generation__")]
    }
    params = msgspec.structs.replace(
        protocol, **{field: getattr(settings.generation, field) for field in given}
    )
    return msgspec.structs.replace(settings, generation=params)


def _stem(model: str) -> str:
    return Path(model).name or "model"


def _show_wub(result: WubResult, folder: Path, as_json: bool) -> None:
    from rich.table import Table

    from w2c_tui.console.progress import SafeConsole
    from w2c_tui.core.files import write_atomically

    text = msgspec.json.format(msgspec.json.encode(result)).decode()
    write_atomically(folder / "summary.json", text + "\n")
    if as_json:
        say_json(result, indent=2)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "accuracy", "95% interval", "right", "rows"):
        table.add_column(column, justify="left" if not column else "right")

    def add(name: str, accuracy: Accuracy) -> None:
        interval = accuracy.interval
        table.add_row(
            name,
            f"{100 * accuracy.ratio:.2f}%",
            f"{100 * interval.low:.1f} to {100 * interval.high:.1f}",
            f"{accuracy.num_correct:,}",
            f"{accuracy.num_rows:,}",
        )

    add("as published", result.published)
    add("strict", result.strict)
    for name, accuracy in [*result.by_category.items(), *result.by_answer.items()]:
        add(f"  strict, {name}", accuracy)
    SafeConsole().print(table, soft_wrap=True)
    say(
        f"{result.num_retried} asked twice, {result.num_unclear} neither yes nor no, "
        f"{result.num_dropped} failed. Rows: {folder / 'results.jsonl'}"
    )


def _show_wcgb(result: WcgbResult, folder: Path, report: Path, as_json: bool) -> None:
    from w2c_tui.core.files import write_atomically

    text = msgspec.json.format(msgspec.json.encode(result)).decode()
    write_atomically(folder / "summary.json", text + "\n")
    if as_json:
        say_json(result, indent=2)
        return
    say(
        f"visual score {result.score:.4f}, 95% interval {result.interval.low:.4f} to "
        f"{result.interval.high:.4f}, over {result.num_pages:,} pages"
    )
    say(f"rendered {result.num_rendered:,} ({100 * result.render_rate:.1f}%)")
    for part, value in result.parts.items():
        say(f"  {part.replace('_', ' '):<12} {value:.4f}")
    if result.bleu is not None and result.chrf is not None:
        say(f"  text BLEU    {result.bleu:.4f}\n  text chrF    {result.chrf:.4f}")
    for label, judged in (
        ("judged, strict", result.judged_strict),
        ("judged, as published", result.judged_published),
    ):
        if judged is not None:
            scores = " / ".join(f"{name} {value:.2f}" for name, value in judged.scores.items())
            say(f"{label}: {judged.overall:.3f} ({scores}), {judged.num_pages} pages")
    say(f"Report: {report}")
