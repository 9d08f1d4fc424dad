"""How well text recognition and the sampled colours do on composed pages, where the truth is known.

    python -m tests.bench.bench_page_text --pages 40

Per variant (recognised lines; the browser's lines with made-up faults, as training has them): lines
found, spaces lost, letters wrong, how far boxes are off, and the colours of letters and ground in
ΔE*ab. The two variants should be alike, or training shows models something that use does not.
"""

from __future__ import annotations

import argparse
import random
from statistics import mean, median, quantiles

from PIL import Image
from playwright.sync_api import sync_playwright
from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

from trainer.pages.compose import compose
from trainer.pages.hints import as_recognised
from w2c_tui.core.colors import distance, name_of, rgb
from w2c_tui.core.config import RenderSettings
from w2c_tui.core.conversation import TextLine
from w2c_tui.models.page_text import read_page_text, with_colors
from w2c_tui.web.render import PageSource, Renderer, find_browser

# Every piece of text with the colour of its letters and of the nearest opaque background.
TRUTH = """() => {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const colour = css => css.match(/[\\d.]+/g).map(Number);
  for (let n = walk.nextNode(); n; n = walk.nextNode()) {
    if (!n.data.trim()) continue;
    let e = n.parentElement, ground = [0, 0, 0, 0];
    for (; e && !ground[3]; e = e.parentElement) {
      const c = colour(getComputedStyle(e).backgroundColor); ground = c.length < 4 ? [...c, 1] : c;
    }
    const range = document.createRange(); range.selectNode(n);
    for (const r of range.getClientRects())
      found.push([[r.left, r.top, r.right, r.bottom],
                  colour(getComputedStyle(n.parentElement).color).slice(0, 3), ground.slice(0, 3)]);
  }
  return found; }"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pages", type=int, default=40)
    parser.add_argument("--seed", type=int, default=990)
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"recognised": [], "made up": []}
    with Renderer(RenderSettings(height=16)) as renderer, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox", "--hide-scrollbars"]
        )
        for index in range(arguments.pages):
            page = compose(arguments.seed, index)
            view = renderer.render(PageSource(page.html, width=page.width))
            tab = browser.new_page(viewport={"width": page.width, "height": 16})
            tab.set_content(page.html)
            truth = tab.evaluate(TRUTH)
            tab.close()
            exact = [TextLine(line.text, line.box) for line in view.lines or ()]
            made_up = as_recognised(exact, random.Random(index))
            for name, lines in (
                ("recognised", read_page_text(view.picture)),
                ("made up", made_up),
            ):
                rows[name] += compared(exact, with_colors(view.picture, lines), truth, view.picture)
        browser.close()
    for name, found in rows.items():
        report(name, found)


def compared(
    exact: list[TextLine], lines: tuple[TextLine, ...], truth: list, picture: Image.Image
) -> list[dict[str, float]]:
    """One row of measures for every exact line; only `found` 0 where nothing matches it."""
    rows = []
    left = list(lines)
    for line in exact:
        best = max(left, key=lambda other: _alike(line, other), default=None)
        if best is None or _alike(line, best) < 0.4:
            rows.append({"found": 0.0})
            continue
        left.remove(best)
        row = {
            "found": 1.0,
            "spaces": line.text.count(" "),
            "spaces lost": max(line.text.count(" ") - best.text.count(" "), 0),
            "letters": len(line.text),
            "letters wrong": Levenshtein.distance(
                line.text.replace(" ", ""), best.text.replace(" ", "")
            ),
            "left": best.box[0] - line.box[0],
            "right": best.box[2] - line.box[2],
            "height": (best.box[3] - best.box[1]) / (line.box[3] - line.box[1]),
        }
        colors = _truth_at(line, truth)
        if colors is not None and best.ink is not None and best.ground is not None:
            row["ink"] = distance(best.ink, colors[0])
            row["ground"] = distance(best.ground, colors[1])
            row["ink named"] = distance(rgb(name_of(best.ink)), colors[0])
            row["ground named"] = distance(rgb(name_of(best.ground)), colors[1])
        rows.append(row)
    return rows


def _alike(line: TextLine, other: TextLine) -> float:
    width = min(line.box[2], other.box[2]) - max(line.box[0], other.box[0])
    height = min(line.box[3], other.box[3]) - max(line.box[1], other.box[1])
    if width <= 0 or height <= 0:
        return 0.0
    return fuzz.ratio(line.text.replace(" ", ""), other.text.replace(" ", "")) / 100


def _truth_at(line: TextLine, truth: list) -> tuple | None:
    x, y = (line.box[0] + line.box[2]) / 2, (line.box[1] + line.box[3]) / 2
    for (left, top, right, bottom), ink, ground in truth:
        if left <= x <= right and top <= y <= bottom:
            return tuple(map(int, ink)), tuple(map(int, ground))
    return None


def report(name: str, rows: list[dict[str, float]]) -> None:
    found = [row for row in rows if row["found"]]

    def total(key: str) -> float:
        return sum(row[key] for row in found)

    print(f"{name}: {len(rows)} lines, {len(found) / len(rows):.1%} found")
    print(f"  spaces lost {total('spaces lost') / total('spaces'):.2%}")
    print(f"  letters wrong {total('letters wrong') / total('letters'):.2%}")
    for key in ("left", "right"):
        values = [row[key] for row in found]
        print(f"  {key} edge off by px: 5%, median, 95%: {_spread(values)}")
    print(f"  height as a share of the browser's: {_spread([row['height'] for row in found])}")
    for key in ("ink", "ground", "ink named", "ground named"):
        values = [row[key] for row in found if key in row]
        within = mean(value <= 10 for value in values)
        print(f"  {key}: median ΔE {median(values):.2f}, {within:.1%} within 10")


def _spread(values: list[float]) -> str:
    cuts = quantiles(values, n=20)
    return f"{cuts[0]:.2f} {median(values):.2f} {cuts[-1]:.2f}"


if __name__ == "__main__":
    main()
