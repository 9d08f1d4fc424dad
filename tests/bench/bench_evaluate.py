"""How fast pages are rendered and scored, and whether a long run needs more memory.

    python -m tests.bench.bench_evaluate [PAGES]

Scores pages of 1280×2000 against references with HTML. In the first run each page is two renders
and a score; later ones, as of another model, find the references in the cache. Goal: 4 pages/s on 2
cores, memory flat over 1,000 pages. `of CPU` counts this process and the browser's, and says how
many pages/s two cores give that do nothing else.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil

from w2c_tui.core.config import RenderSettings
from w2c_tui.evaluate import Journal, Page, PageResult, Run, from_folder, run_wcgb
from w2c_tui.web.render import PageSource, Renderer
from w2c_tui.web.render_cache import RenderCache

_WORDS = "order river market price ship team plan open close start cloud stone paper light".split()  # noqa: SIM905


def _page(seed: int) -> str:
    some = random.Random(seed)
    sections = "".join(
        f"<section style='background:#{some.randrange(1 << 24):06x};height:200px;padding:20px'>"
        f"<h2>{' '.join(some.choices(_WORDS, k=4))}</h2>"
        f"<p>{' '.join(some.choices(_WORDS, k=60))}</p></section>"
        for _ in range(8)
    )
    return f"<!DOCTYPE html><title>{seed}</title><body style='margin:0'>{sections}</body>"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as scratch, Renderer(RenderSettings()) as renderer:
        folder = Path(scratch)
        picture = folder / "picture.png"
        view = renderer.render(PageSource(_page(0)))
        view.picture.crop((0, 0, 1280, 2000)).save(picture)
        predictions = folder / "predictions"
        predictions.mkdir()
        pages = []
        for number in range(count):
            html = folder / f"{number}.html"
            html.write_text(_page(number))
            (predictions / f"{number}.html").write_text(_page(number).replace("20px", "24px"))
            pages.append(Page(str(number), picture, html))
        cache = RenderCache(folder / "cache", renderer)
        for title in ("first run", "later run"):
            _run(title, pages, predictions, folder / title, renderer, cache)


def _run(
    title: str,
    pages: list[Page],
    predictions: Path,
    out: Path,
    renderer: Renderer,
    cache: RenderCache,
) -> None:
    run = Run(benchmark="wcgb", model="", backend="", data="", params={})
    count = len(pages)
    memory: list[int] = []
    began, cpu = time.perf_counter(), _cpu_s()

    def report(done: int, total: int) -> None:
        if done in (total // 10, total):
            memory.append(psutil.Process().memory_info().rss)

    with Journal(out, run, PageResult) as journal:
        result = run_wcgb(
            pages,
            [from_folder(predictions)],
            journal,
            renderer,
            render_reference=cache.render,
            report=report,
        )
    assert result.num_rendered == count
    spent, cpu = time.perf_counter() - began, _cpu_s() - cpu
    print(
        f"{title}: {count} pages in {spent:.1f} s: {count / spent:.2f} pages/s (goal 4); of CPU "
        f"{1000 * cpu / count:.0f} ms a page, {2 * count / cpu:.2f} pages/s on two free cores; "
        f"memory after a tenth {memory[0] / 2**20:.0f} MiB, at the end {memory[-1] / 2**20:.0f}",
        flush=True,
    )


def _cpu_s() -> float:
    spent = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            spent += times.user + times.system
    return spent


if __name__ == "__main__":
    main()
