"""What rendering and scoring cost, and whether the score is sane.

    python -m tests.bench.bench_score speed            # pages/s, seconds per comparison
    python -m tests.bench.bench_score sanity           # damage to 40 real pages (needs npm)
    python -m tests.bench.bench_score memory --pages 1000
    python -m tests.bench.bench_score gain --model M --best-of 4 --refine 2 IMAGE...

Prints one JSON object. `cpu_s` is processor time with that of the browser's processes, which says
more than the clock on a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import psutil
from playwright.sync_api import Route, sync_playwright

from tests.bench.real_pages import real_pages
from w2c_tui.core.config import GenerationParams, LoadSpec, RenderSettings, paths
from w2c_tui.web.render import PageSource, Renderer, find_browser
from w2c_tui.web.score import compare, score
from w2c_tui.web.view import View, view_of_picture


def cpu_s() -> float:
    """Processor time of this process and all its children that are alive."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def page_of_20_kb(number: int, height: int = 2000) -> str:
    """A page of text, cards and colours of 20 kB, at least `height` px high."""
    card = (
        '<div class="card" style="border-left:6px solid hsl({hue} 60% 45%)"><h2>Card {at}</h2>'
        "<p>We have <b>created</b> number {at} of page {number} with a good many words, enough to "
        "go on for a line or two in a narrow column.</p><a href='#'>Read more</a></div>"
    )
    cards = "".join(card.format(at=at, number=number, hue=at * 23 % 360) for at in range(200))
    style = (
        "body{font-family:sans-serif;margin:0}.grid{display:grid;gap:16px;padding:32px;"
        "grid-template-columns:repeat(4,1fr)}.card{background:#f3f5f8;padding:16px;border-radius:6px}"
        f".page{{height:{height}px;overflow:hidden}}"
    )
    head = f"<!DOCTYPE html><html><head><style>{style}</style></head><body><div class=page>"
    body = f"<h1>Page {number}</h1><div class=grid>{cards}"
    return f"{head}{body}"[:20_000]


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with Renderer(RenderSettings(max_page_height=2000)) as renderer:
        result["browser"] = f"{renderer.info().path} {renderer.info().version}"
        warm = list(renderer.render_all(PageSource(page_of_20_kb(n)) for n in range(8)))
        reference = warm[0]
        assert isinstance(reference, View)
        assert reference.picture.size == (1280, 2000)
        for name, full_page in (("window_1280x800", False), ("page_1280x2000", True)):
            began, used = time.perf_counter(), cpu_s()
            pages = (PageSource(page_of_20_kb(n)) for n in range(arguments.pages))
            for view in renderer.render_all(pages, full_page=full_page):
                assert isinstance(view, View)
            spent = time.perf_counter() - began
            result[name] = {
                "pages_per_s": round(arguments.pages / spent, 2),
                "cpu_s_per_page": round((cpu_s() - used) / arguments.pages, 3),
            }
        began, used = time.perf_counter(), cpu_s()
        pages = (PageSource(page_of_20_kb(n)) for n in range(arguments.pages))
        for view in renderer.render_all(pages):
            assert isinstance(view, View)
            score(reference, view)
        spent = time.perf_counter() - began
        result["render_and_score_1280x2000"] = {
            "pages_per_s": round(arguments.pages / spent, 2),
            "cpu_s_per_page": round((cpu_s() - used) / arguments.pages, 3),
        }
        other = warm[1]
        assert isinstance(other, View)
        times, cpu_times = [], []
        for _ in range(10):
            began, used = time.perf_counter(), time.process_time()
            compare(reference, other)
            times.append(time.perf_counter() - began)
            cpu_times.append(time.process_time() - used)
        result["compare_1280x2000"] = {
            "seconds": round(statistics.median(times), 3),
            "cpu_s": round(statistics.median(cpu_times), 3),
        }
    return result


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Resident memory of this process and the browser's, over many pages."""
    seen = []
    with Renderer(RenderSettings(max_page_height=2000)) as renderer:
        pages = (PageSource(page_of_20_kb(n)) for n in range(arguments.pages))
        reference: View | None = None
        for number, view in enumerate(renderer.render_all(pages)):
            assert isinstance(view, View)
            reference = reference or view
            score(reference, view)
            if number % (arguments.pages // 10) == 0:
                me = psutil.Process()
                family = (me, *me.children(recursive=True))
                seen.append([round(p.memory_info().rss / 2**20) for p in family])
    return {
        "pages": arguments.pages,
        "own_mib": [row[0] for row in seen],
        "all_mib": list(map(sum, seen)),
    }


DAMAGE = {
    # A heading or paragraph of middling size in another colour.
    "colour": """(() => { const all = texts(), e = all[all.length >> 1]; if (!e) return
      const red = getComputedStyle(e).color.match(/\\d+/g)
      const other = +red[0] > 140 && +red[1] < 110 ? '#00796b' : '#c2185b'
      for (const x of [e, ...e.querySelectorAll('*')])
        x.style.setProperty('color', other, 'important') })()""",
    # One block with text, of about 200 x 100 px, pushed aside and down by 15% of the window.
    "moved": """(() => { const e = blocks()[0] || texts()[0]; if (!e) return
      e.style.setProperty('position', 'relative', 'important')
      e.style.setProperty('left', '170px', 'important')
      e.style.setProperty('top', '190px', 'important') })()""",
    # A fifth of all words, with other letters.
    "words": """(() => { const w = document.createTreeWalker(document.body, 4); let n, i = 0
      while (n = w.nextNode()) if (!/^(script|style)$/i.test(n.parentNode.nodeName))
        n.data = n.data.replace(/[A-Za-z]{3,}/g, x => i++ % 5 ? x : x.replace(/[a-z]/gi,
          c => String.fromCharCode((c.charCodeAt(0) & 96) + (c.charCodeAt(0) % 32 + 11) % 26 + 1)))
    })()""",
    # What begins in the lower half of what is compared.
    "half": """(() => { const middle = Math.min(document.documentElement.scrollHeight, 2000) / 2
      const gone = [...document.body.querySelectorAll('*')].filter(
        e => e.getBoundingClientRect().height && e.getBoundingClientRect().top >= middle)
      gone.forEach(e => e.remove()) })()""",
}
_CHOICE = """
const seen = e => { const r = e.getBoundingClientRect(), s = getComputedStyle(e)
  const middle = [r.left + r.width / 2, r.top + r.height / 2]
  return r.width > 20 && r.height > 8 && r.top >= 0 && r.bottom < 800
    && r.left >= 0 && r.right <= 1280 && s.visibility == 'visible' && s.opacity == '1'
    && e.contains(document.elementFromPoint(...middle)) }
const area = e => e.getBoundingClientRect().width * e.getBoundingClientRect().height
const own = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim().length > 7)
const words = 'h1,h2,h3,h4,h5,h6,p,a,span,li,td,label,div'
const texts = () => [...document.querySelectorAll(words)].filter(e => seen(e) && own(e))
  .sort((a, b) => area(b) - area(a))
const boxes = `${words},section,article,ul,table,form`
const blocks = () => [...document.querySelectorAll(boxes)].filter(
  e => seen(e) && e.innerText.trim().length > 15 && area(e) > 4000 && area(e) < 200000
    && e.getBoundingClientRect().width < 1260).sort(
    (a, b) => Math.abs(area(a) - 20000) - Math.abs(area(b) - 20000))
"""


def _answer(page: PageSource, route: Route) -> None:
    path = unquote(urlsplit(route.request.url).path).lstrip("/")
    assert page.folder is not None
    if not path:
        route.fulfill(body=page.html, content_type="text/html")
    elif (page.folder / path).is_file():
        route.fulfill(path=page.folder / path)
    else:
        route.abort()


def damaged(pages: list[PageSource]) -> list[dict[str, PageSource]]:
    """Each page as the browser has it, whole and with one damage each."""
    found = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=find_browser(),
            chromium_sandbox=False,
            args=["--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"],
        )
        for page in pages:
            context = browser.new_context(
                viewport={"width": 1280, "height": 800}, java_script_enabled=False
            )
            tab = context.new_page()
            context.route("**/*", functools.partial(_answer, page))
            forms = {}
            for name, code in {"whole": "0", **DAMAGE}.items():
                tab.goto("http://page.invalid/")
                script = (
                    f"(() => {{ {_CHOICE}; {code}; return document.documentElement.outerHTML }})()"
                )
                html = "<!DOCTYPE html>" + tab.evaluate(script)
                forms[name] = PageSource(html, page.folder, f"{page.name}: {name}")
            context.close()
            found.append(forms)
        browser.close()
    return found


def sanity(arguments: argparse.Namespace) -> dict[str, Any]:
    pages = real_pages()[: arguments.pages]
    forms = damaged(pages)
    names = ["whole", *DAMAGE, "another page"]
    rows, wrong = [], []
    with Renderer(RenderSettings(max_page_height=2000)) as renderer:
        wholes = list(renderer.render_all(form["whole"] for form in forms))
        for at, form in enumerate(forms):
            reference = wholes[at]
            assert isinstance(reference, View), reference
            views = [reference, *renderer.render_all(form[name] for name in DAMAGE)]
            # A page of another package, as those of one share header and menu.
            views.append(wholes[(at + len(wholes) // 2) % len(wholes)])
            scores = [
                score(reference, view if isinstance(view, View) else None).score for view in views
            ]
            again = renderer.render(form["whole"])
            scores[0] = score(reference, again).score
            rows.append(scores)
            falls = all(a > b for a, b in itertools.pairwise(scores))
            if scores[0] != 1 or not falls:
                wrong.append({"page": pages[at].name, **dict(zip(names, scores, strict=True))})
            print(pages[at].name, *(f"{value:.4f}" for value in scores), file=sys.stderr)
    means = [round(statistics.mean(column), 4) for column in zip(*rows, strict=True)]
    return {
        "pages": len(rows),
        "strictly_decreasing": round(1 - len(wrong) / len(rows), 3),
        "mean": dict(zip(names, means, strict=True)),
        "wrong": wrong,
    }


def gain(arguments: argparse.Namespace) -> dict[str, Any]:
    """The best score after each try of `w2c generate`, over the images."""
    import msgspec

    from w2c_tui.core.catalog import find
    from w2c_tui.core.conversation import Message
    from w2c_tui.core.page_text import begun_page
    from w2c_tui.core.prompt import PAGE_PROMPT
    from w2c_tui.core.reference import load_attachment
    from w2c_tui.engine.client import EngineClient
    from w2c_tui.web.better import Try, better_pages

    curves = []
    entry = find(arguments.model)
    with EngineClient(paths().engine_log) as engine, Renderer() as renderer:
        info = engine.load(LoadSpec(name=arguments.model, threads=arguments.threads))
        for image in arguments.images:
            attachment = load_attachment(image)
            hints = info.hints_for("auto", "text")
            if hints != "none":
                lines = engine.read_text(attachment, hints)
                attachment = msgspec.structs.replace(attachment, page_text=lines)
            messages = [Message("user", PAGE_PROMPT, (attachment,))]
            if entry is not None and not entry.knows_pages:
                messages = begun_page(attachment)
            params = GenerationParams(
                temperature=arguments.temperature, seed=1, max_new_tokens=arguments.max_new_tokens
            )
            best, curve = 0.0, []
            for step in better_pages(
                engine,
                renderer,
                messages,
                params,
                view_of_picture(attachment),
                info,
                best_of=arguments.best_of,
                refine=arguments.refine,
            ):
                if isinstance(step, Try):
                    best = max(best, step.score)
                    curve.append(round(best, 4))
                    print(image, step.kind, step.number, f"{step.score:.4f}", file=sys.stderr)
            curve += [curve[-1]] * (arguments.best_of + arguments.refine - len(curve))
            curves.append(curve)
    means = [round(statistics.mean(column), 4) for column in zip(*curves, strict=True)]
    gains = [round(b - a, 4) for a, b in itertools.pairwise(means)]
    return {"model": info.name, "best_so_far": means, "gain_per_try": gains, "curves": curves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "sanity", "memory", "gain"])
    parser.add_argument("images", nargs="*", default=[])
    parser.add_argument("--pages", type=int, default=40)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--best-of", type=int, default=4)
    parser.add_argument("--refine", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_intermixed_args()
    if not arguments.images:
        arguments.images = [str(p) for p in sorted(Path("examples").glob("*.png"))]
    run = {"speed": speed, "sanity": sanity, "memory": memory, "gain": gain}[arguments.what]
    print(json.dumps(run(arguments), indent=1))


if __name__ == "__main__":
    main()
