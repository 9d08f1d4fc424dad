"""What more candidates and corrections gain, for the model at hand.

    python -m tests.bench.bench_better --pages 12 --best-of 4 --refine 1 --out DIR [--model M]

Held-out composed pages (those of bench_nano), each written `--best-of` times at seeds of its own
and then corrected `--refine` times, as `w2c generate` does it. A row is what one would hold after
so many tries, as means over the pages: `seen` is the score that chooses, against the screenshot
alone; `true` that of the page then chosen against the page the screenshot was taken of. Pages that
do not come count 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.bench.bench_nano import HELD_OUT_SEED, composed_pages
from w2c_tui.core.config import GenerationParams, LoadSpec, RenderSettings, paths
from w2c_tui.core.conversation import Message
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.core.reference import load_attachment
from w2c_tui.engine.client import EngineClient
from w2c_tui.evaluate.wcgb import Page
from w2c_tui.web.better import Try, best_try, better_pages
from w2c_tui.web.render import PageSource, Renderer, window_for
from w2c_tui.web.score import score
from w2c_tui.web.view import view_of_picture


class Step(msgspec.Struct):
    """What one holds after a try: seconds since the page was begun, and both scores."""

    seconds: float
    seen: float
    true: float


def steps_of(
    page: Page, engine: EngineClient, renderer: Renderer, given: argparse.Namespace
) -> list[Step]:
    """One step for each try at `page`."""
    image = load_attachment(str(page.image))
    lines = engine.read_text(image, "layout")
    image = msgspec.structs.replace(image, page_text=lines)
    reference = view_of_picture(image, lines)
    assert page.html is not None
    width, height = window_for(reference.picture.size, renderer.settings)
    original = renderer.render(PageSource(page.html.read_text("utf-8"), None, "", width, height))
    params = GenerationParams(temperature=given.temperature, max_new_tokens=1200, seed=0)
    began = time.perf_counter()
    tries: list[Try] = []
    found: list[Step] = []
    events = better_pages(
        engine,
        renderer,
        [Message("user", PAGE_PROMPT, (image,))],
        params,
        reference,
        given.info,
        best_of=given.best_of,
        refine=given.refine,
    )
    for event in events:
        if not isinstance(event, Try):
            continue
        tries.append(event)
        best = best_try(tries)
        view = best.view if best else None
        seen, true = (best.score, score(original, view).score) if best else (0.0, 0.0)
        found.append(Step(time.perf_counter() - began, seen, true))
    # Where nothing was left to correct, the rest would have changed nothing.
    return found + found[-1:] * (given.best_of + given.refine - len(found))


def _mean(steps: Sequence[Step], field: str) -> float:
    return statistics.fmean(getattr(step, field) for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="w2c-nano")
    parser.add_argument("--backend", default="gguf")
    parser.add_argument("--pages", type=int, default=12)
    parser.add_argument("--best-of", type=int, default=4)
    parser.add_argument("--refine", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.4)
    parser.add_argument("--out", type=Path, required=True, help="A folder; what is there stays.")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    name = f"{given.model.replace('/', '-')}-{given.best_of}-{given.refine}-{given.temperature}"
    journal = given.out / f"better-{name}.jsonl"
    rows: dict[str, list[Step]] = {}
    if journal.exists():
        for line in journal.read_text("utf-8").splitlines():
            row = json.loads(line)
            rows[row["page"]] = msgspec.convert(row["steps"], list[Step])
    with Renderer(RenderSettings()) as renderer, EngineClient(paths().engine_log) as engine:
        pages = composed_pages(given.out, given.pages, renderer)
        given.info = engine.load(LoadSpec(name=given.model, backend=given.backend))
        for page in pages:
            if page.name not in rows:
                rows[page.name] = steps_of(page, engine, renderer, given)
                with journal.open("a", encoding="utf-8") as file:
                    steps = msgspec.to_builtins(rows[page.name])
                    file.write(json.dumps({"page": page.name, "steps": steps}) + "\n")
    print(f"{len(pages)} pages of seed {HELD_OUT_SEED}, temperature {given.temperature}")
    print(f"{'after':<14}  seen   gain    true   gain   seconds a page")
    before: Step | None = None
    for number, column in enumerate(zip(*(rows[page.name] for page in pages), strict=True), 1):
        now = Step(*(_mean(column, field) for field in Step.__struct_fields__))
        kind = f"candidate {number}"
        if number > given.best_of:
            kind = f"correction {number - given.best_of}"
        gains = [getattr(now, f) - getattr(before, f) if before else 0.0 for f in ("seen", "true")]
        print(
            f"{kind:<14}  {now.seen:.3f}  {gains[0]:+.3f}  {now.true:.3f}  {gains[1]:+.3f}  "
            f"{now.seconds:.1f}"
        )
        before = now


if __name__ == "__main__":
    main()
