"""How good the bundled model is on pages that it was not trained on, and whether it looks at them.

python -m tests.bench.bench_nano --pages 100 --out DIR
python -m tests.bench.bench_nano --pages 40 --real FOLDER --out DIR

Composed pages of a seed that training does not use, or real sections that `trainer.pages.real`
wrote to FOLDER, evenly spread; every page counts, failures as 0. What takes too long for one run
can be run in parts, in folders of their own (`--pages 50`, then `--pages 100 --skip 50`). The rows:

- nano-hf, nano-f16, nano-q8_0: the model through transformers and through GGUF files
- nano-shuffled, nano-zeroed: q8_0 with the right words at the right places, while everything else
  that it is told or shown comes from the picture of another page, or from a grey one
- nano-blind: q8_0 that is told what is right, and only sees another page
- untrained: SmolLM2 with the same text, from the GGUF file in its package
- rule: the text that recognition finds as one paragraph per line, with no model
- layout: what the model is told of the layout, put into HTML by the rules with which the pages that
  it learns are made, with no model: how well it could do without what it adds, the elements' names
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
from PIL import Image

from trainer.pages.layout_code import page_of, plain_element
from trainer.pages.write import Plan, make_pages, read_pages
from w2c_tui.backends.base import ModelInfo
from w2c_tui.core.colors import RGB, distance
from w2c_tui.core.config import GenerationParams, LoadSpec, RenderSettings, paths
from w2c_tui.core.conversation import Attachment, Hints, TextLine
from w2c_tui.core.image import attachment_from_picture
from w2c_tui.core.page_layout import layout_of
from w2c_tui.core.reference import load_attachment
from w2c_tui.engine.client import EngineClient
from w2c_tui.evaluate.asking import Asker
from w2c_tui.evaluate.journal import Journal, Run
from w2c_tui.evaluate.run_wcgb import Write, Written, by_model, run_wcgb
from w2c_tui.evaluate.wcgb import Page, PageResult, WcgbResult, load_pages
from w2c_tui.models.page_boxes import areas_of
from w2c_tui.models.page_text import with_colors
from w2c_tui.web.render import PageSource, Renderer, window_for
from w2c_tui.web.score import compare

HELD_OUT_SEED = 990
"""Never trained on."""
MODEL = "w2c-nano"
VARIANTS = (
    *("nano-hf", "nano-f16", "nano-q8_0"),
    *("nano-shuffled", "nano-zeroed", "nano-blind", "untrained", "rule", "layout"),
)


def composed_pages(out: Path, count: int, renderer: Renderer) -> list[Page]:
    """`count` held-out pages in `out`/pages."""
    plan = Plan(seed=HELD_OUT_SEED, widths=(1280, 1440, 1024, 768), inline_share=0.0)
    # Some come out too tall and are left out.
    made_at = out / "made"
    make_pages(made_at, plan, count + 4 + count // 20, renderer, lambda *_: None)
    whole = sorted((m for m in read_pages(made_at) if m.image), key=lambda m: m.index)[:count]
    return _pairs([(str(made.image), made.html) for made in whole], made_at, out / "pages")


def real_sections(out: Path, count: int, folder: Path) -> list[Page]:
    """`count` of the sections in `folder`, evenly spread, in `out`/pages."""
    found = json.loads((folder / "pages.json").read_text(encoding="utf-8"))
    count = min(count, len(found))
    chosen = [found[at * len(found) // count] for at in range(count)]
    pages = [(record["image"], record["conversations"][1]["value"]) for record in chosen]
    return _pairs(pages, folder, out / "pages")


def _pairs(pages: Sequence[tuple[str, str]], source: Path, folder: Path) -> list[Page]:
    """NAME.png beside NAME.html in `folder` for each (picture in `source`, page)."""
    folder.mkdir(exist_ok=True)
    for image, page in pages:
        place = folder / Path(image).name
        place.with_suffix(".html").write_text(page, encoding="utf-8")
        place.write_bytes((source / image).read_bytes())
    return load_pages(folder)


def spec_of(variant: str, folder: Path) -> LoadSpec:
    if variant in ("nano-q8_0", "nano-shuffled", "nano-zeroed", "nano-blind"):
        return LoadSpec(name=MODEL, backend="gguf")
    if variant == "nano-f16":
        found = list(folder.glob("*-f16.gguf"))
        if not found:
            command = [sys.executable, "-m", "w2c_tui.cli", "export-gguf", MODEL]
            subprocess.run([*command, "--out", folder, "--quant", "f16"], check=True)
            found = list(folder.glob("*-f16.gguf"))
        return LoadSpec(name=str(next(f for f in found if "mmproj" not in f.name)))
    if variant == "untrained":
        return LoadSpec(name="smollm2-135m", backend="gguf")
    return LoadSpec(name=MODEL, backend="hf")


Told = dict[tuple[Path, Hints], tuple[TextLine, ...]]


def writer_of(
    variant: str,
    pages: Sequence[Page],
    engine: EngineClient,
    folder: Path,
    params: GenerationParams,
    told: Told,
) -> Write:
    """What writes the pages of `variant`; its model is loaded. `told` is what was recognised."""

    def read(path: Path, hints: Hints) -> Attachment:
        image = load_attachment(str(path))
        if (path, hints) not in told:
            told[path, hints] = engine.read_text(image, hints)
        return msgspec.structs.replace(image, page_text=told[path, hints])

    if variant == "rule":
        return lambda page, number: Written(paragraphs(read(page.image, "text")), True)
    if variant == "layout":
        return lambda page, number: Written(by_rule(read(page.image, "layout")), True)
    spec = spec_of(variant, folder)

    def load() -> ModelInfo:
        return engine.load(spec, lambda *_: None)

    hints = load().hints_for("auto", "none")
    others = {page.image: pages[at - 1].image for at, page in enumerate(pages)}

    def attach(path: Path) -> Attachment:
        image = read(path, hints)
        lines = image.page_text or ()
        if variant not in ("nano-shuffled", "nano-zeroed", "nano-blind"):
            return image
        size = (image.width, image.height)
        if variant == "nano-zeroed":
            other = Image.new("RGB", size, "#808080")
        else:
            other = Image.open(others[path]).convert("RGB").resize(size)
        if variant != "nano-blind":
            lines = with_colors(other, [line for line in lines if line.text])
            if hints == "layout":
                lines = (*areas_of(other, lines), *lines)
        seen = attachment_from_picture(other, image.name, "")
        return msgspec.structs.replace(seen, page_text=lines)

    return by_model(Asker(engine, load, params, threading.Event()), attach)


def paragraphs(image: Attachment) -> str:
    lines = "\n".join(f"<p>{html.escape(line.text)}</p>" for line in image.page_text or ())
    return f"<!DOCTYPE html>\n<html><body>\n{lines}\n</body></html>\n"


def by_rule(image: Attachment) -> str:
    page = layout_of(image.page_text or (), (image.width, image.height))
    return page_of(page, plain_element, language="en", font="sans-serif")


SAME = 10
"""Difference (CIE 1976) up to which two colours are one."""


def right_colors(pages: Sequence[Page], written: Path, renderer: Renderer) -> float:
    """The share of colours that the page written for a page has where that uses them first.

    Of each block of text, from top to bottom, the colours of its letters and of what is behind
    them, unless a block above has them; right where the block's partner has them, too.
    """
    right = asked = 0
    for page in pages:
        assert page.html is not None
        with Image.open(page.image) as picture:
            width, height = window_for(picture.size, renderer.settings)
        original = renderer.render(
            PageSource(page.html.read_text("utf-8"), None, "", width, height)
        )
        place = written / "pages" / f"{page.name}.html"
        view = None
        if place.is_file():
            view = renderer.render(PageSource(place.read_text("utf-8"), None, "", width, height))
        comparison = compare(original, view)
        partners = {id(pair.reference): pair.candidate for pair in comparison.pairs}
        blocks = [pair.reference for pair in comparison.pairs] + list(comparison.missing)
        used: list[RGB] = []
        for block in sorted(blocks, key=lambda block: (block.box[1], block.box[0])):
            partner = partners.get(id(block))
            for color, found in (
                (block.background, partner.background if partner else None),
                (block.color, partner.color if partner else None),
            ):
                if any(distance(color, other) <= SAME for other in used):
                    continue
                used.append(color)
                asked += 1
                right += found is not None and distance(color, found) <= SAME
    return right / asked if asked else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=20)
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="Real sections instead.")
    parser.add_argument("--skip", type=int, default=0, help="Pages of these that are left out.")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompt-lookup", type=int, default=0, help="As in w2c generate.")
    parser.add_argument("--out", type=Path, required=True, help="A folder; what is there stays.")
    parser.add_argument("--at-least", type=float, default=0.0, help="Fail below this score.")
    given = parser.parse_args()
    params = GenerationParams(
        temperature=given.temperature,
        max_new_tokens=1200,
        seed=0,
        prompt_lookup=given.prompt_lookup,
    )
    lowest = 1.0
    told: Told = {}
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"{'':<16}score  text   color  valid  colours  seconds a page  tokens")
    with Renderer(RenderSettings(timeout_s=120)) as renderer:
        pages = (
            real_sections(given.out, given.pages, given.real)
            if given.real
            else composed_pages(given.out, given.pages, renderer)
        )
        asked = pages[given.skip :] if given.skip >= 0 else []
        if not asked:
            parser.error(f"--skip {given.skip} leaves none of {len(pages)} pages.")
        for variant in given.variants.split(","):
            folder = given.out / variant
            run = Run(
                benchmark="wcgb",
                model=variant,
                backend="",
                data=str(given.real or HELD_OUT_SEED),
                params={"temperature": given.temperature, "prompt_lookup": given.prompt_lookup},
            )
            with (
                EngineClient(paths().engine_log) as engine,
                Journal(folder, run, PageResult) as journal,
            ):
                writer = writer_of(variant, pages, engine, given.out, params, told)
                result = run_wcgb(asked, [writer], journal, renderer)
                rows = journal.rows
            colors = right_colors(asked, folder, renderer)
            print(line_of(variant, result, rows, colors), flush=True)
            lowest = min(lowest, result.score)
    if lowest < given.at_least:
        sys.exit(f"{lowest:.3f} is below {given.at_least}.")


def line_of(variant: str, result: WcgbResult, rows: Sequence[PageResult], colors: float) -> str:
    seconds, tokens = (
        statistics.median(values)
        for values in ([row.seconds for row in rows], [row.new_tokens for row in rows])
    )
    return (
        f"{variant:<16}{result.score:.3f}  {result.parts.get('text', 0):.3f}  "
        f"{result.parts.get('color', 0):.3f}  {result.render_rate:.2f}   {colors:.2f}     "
        f"{seconds:.1f}            {tokens:.0f}"
    )


if __name__ == "__main__":
    main()
