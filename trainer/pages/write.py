"""A data set of composed pages on disk: pictures, LLaVA records, a manifest.

Owns the folder: `images/` and `pages.jsonl` (one line for each page, written after its picture) are
what costs time and are never made twice; `pages.json` (screenshot to HTML), `captions.json`
(screenshot to a short description, for stage 1) and `manifest.json` follow from them. Knows nothing
about how pages are composed or rendered.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import faker
import msgspec
from PIL import Image

import w2c_tui
from trainer.pages.caption import caption_of
from trainer.pages.compose import Block, ComposedPage, compose
from trainer.pages.hints import as_recognised
from trainer.pages.layout_code import Elements, page_of
from trainer.pages.markup import Dialect
from trainer.pages.palette import Theme
from trainer.pages.words import LICENCE
from w2c_tui.core.conversation import Attachment, Hints, Message, TextLine
from w2c_tui.core.errors import ConfigError, RenderError
from w2c_tui.core.files import write_atomically
from w2c_tui.core.page_layout import layout_of
from w2c_tui.core.prompt import PAGE_PROMPT, user_content
from w2c_tui.models.page_boxes import with_layout
from w2c_tui.models.page_text import with_colors
from w2c_tui.web.render import PageSource, Renderer

Report = Callable[[int, int], None]

Code = Literal["source", "layout"]
"""The HTML that a page was rendered from, or one with the numbers of the layout that is told."""

INLINE_PROMPT = f"{PAGE_PROMPT} Use inline styles only."
CAPTION_PROMPT = "Describe the blocks of this page and their colours."
FORMAT_VERSION = 2
MAX_HEIGHT_SHARE = 2.2
"""Pages that come out taller than this times their width are left out: nothing could be seen."""


class Made(msgspec.Struct, frozen=True):
    """A line of `pages.jsonl`: a page that was rendered. `image` is None if it was left out."""

    index: int
    image: str | None
    width: int
    height: int
    html: str
    dialect: Dialect
    language: str
    layout: str
    theme: Theme | None
    blocks: tuple[Block, ...]
    lines: tuple[TextLine, ...]


class Plan(msgspec.Struct, frozen=True):
    """What decides how pages come out; a folder holds pages of one plan only."""

    seed: int
    widths: tuple[int, ...]
    inline_share: float
    part_share: float = 0.0
    stack_share: float = 0.0
    format_version: int = FORMAT_VERSION
    faker: str = faker.VERSION


def make_pages(
    out: Path, plan: Plan, count: int, renderer: Renderer, report: Report = lambda done, total: None
) -> int:
    """Render pages 0 to `count` of `plan` into `out`, except those that are there already.

    Returns how many were rendered. `report(done, total)` after every page. Raises ConfigError if
    `out` holds pages of another plan, RenderError if the browser fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    _keep_plan(out, plan)
    done = {made.index for made in read_pages(out, repair=True)}
    todo = [index for index in range(count) if index not in done]
    num_done = count - len(todo)
    report(num_done, count)
    if not todo:
        return 0
    composed: dict[int, ComposedPage] = {}

    def sources() -> Iterator[PageSource]:
        for index in todo:
            shares = (plan.inline_share, plan.part_share, plan.stack_share)
            page = compose(plan.seed, index, plan.widths, *shares)
            composed[index] = page
            # The window has next to no height: the picture is then as high as the page itself.
            yield PageSource(page.html, width=page.width, name=f"page {index}")

    with (out / "pages.jsonl").open("ab") as journal:
        for index, view in zip(todo, renderer.render_all(sources()), strict=True):
            if isinstance(view, RenderError):
                raise view
            page = composed.pop(index)
            picture, image = view.picture, None
            if view.page_height <= MAX_HEIGHT_SHARE * page.width:
                picture = _at_least(page.height, picture, page.theme.page)
                image = f"images/{index // 1000:04}/{index:07}.png"
                save_picture(picture, out / image)
            lines = tuple(TextLine(line.text, line.box) for line in view.lines or ())
            made = Made(
                index=index,
                image=image,
                width=picture.width,
                height=picture.height,
                html=page.html,
                dialect=page.dialect,
                language=page.language,
                layout=page.layout,
                theme=page.theme,
                blocks=page.blocks,
                lines=with_colors(picture, lines),
            )
            # After the picture, in one write: what a line names is there, whenever this is killed.
            journal.write(msgspec.json.encode(made) + b"\n")
            journal.flush()
            num_done += 1
            report(num_done, count)
    return len(todo)


def read_pages(out: Path, *, repair: bool = False) -> Iterator[Made]:
    """The pages that are in `out`, in the order in which they were made.

    A last line that was not written to its end is not one; `repair` removes it.
    """
    path = out / "pages.jsonl"
    if not path.is_file():
        return
    whole = 0
    with path.open("rb") as journal:
        for line in journal:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            yield msgspec.json.decode(line, type=Made)
    if repair and whole < path.stat().st_size:
        os.truncate(path, whole)


def write_records(
    out: Path, plan: Plan, count: int, hints: Hints, code: Code, about: dict[str, Any]
) -> int:
    """Write the record files and the manifest for pages 0 to `count`; the number of records.

    `hints`: what stands in the prompt about the page; `code`: how the page is written. The same
    folder may be written again with others. Raises ConfigError for a pair that does not fit.
    """
    pages = sorted(
        (made for made in read_pages(out) if made.image and made.index < count),
        key=lambda made: made.index,
    )
    prefix = f"composed-{plan.seed}"
    write_page_records(out, pages, hints, prefix, code)
    captions = [
        _record(prefix, made, CAPTION_PROMPT, caption_of(made.theme, made.blocks, made))
        for made in pages
        if made.theme is not None
    ]
    _write_list(out / "captions.json", captions)
    manifest = {
        **msgspec.to_builtins(plan),
        "count": count,
        "records": len(pages),
        "left_out": count - len(pages),
        "hints": hints,
        "code": code,
        "code_version": w2c_tui.__version__,
        "licence": f"Pages: this project (Apache-2.0). {LICENCE}",
        **about,
    }
    write_atomically(out / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest)))
    return len(pages)


def write_page_records(
    out: Path, pages: Sequence[Made], hints: Hints, prefix: str, code: Code = "source"
) -> None:
    """Write `pages.json`: for each page its picture, the question and the HTML.

    Raises ConfigError for code by a layout that the question does not tell.
    """
    check_code(code, hints)
    # Where all are written in one way there is nothing to ask for.
    alike = code == "layout" or all(made.dialect == "inline" for made in pages)
    prompts: dict[Dialect, str] = {
        "inline": PAGE_PROMPT if alike else INLINE_PROMPT,
        "classes": PAGE_PROMPT,
    }

    def record(made: Made) -> dict[str, Any]:
        lines = told_lines(made, hints, prefix, out)
        answer = made.html if code == "source" else layout_code(made, lines or ())
        return _record(prefix, made, question(made, lines, prompts[made.dialect]), answer)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        _write_list(out / "pages.json", list(pool.map(record, pages)))


def check_code(code: Code, hints: Hints) -> None:
    """Raise ConfigError for code by a layout that the question does not tell."""
    if code == "layout" and hints != "layout":
        raise ConfigError(
            f"Pages with the numbers of a layout cannot be read off questions with {hints} hints.",
            hint="Add --hints layout.",
        )


def told_lines(made: Made, hints: Hints, seed: str, folder: Path) -> tuple[TextLine, ...] | None:
    """What a model is told about the page. `folder` is where the page's picture is."""
    if hints == "none":
        return None
    lines = as_recognised(made.lines, random.Random(f"w2c hints {seed} {made.index}"))
    if hints == "text":
        return tuple(TextLine(line.text, line.box, line.score) for line in lines)
    if hints == "layout":
        with Image.open(folder / str(made.image)) as picture:
            return with_layout(picture.convert("RGB"), lines)
    return lines


def question(made: Made, lines: tuple[TextLine, ...] | None, prompt: str = PAGE_PROMPT) -> str:
    """What the model is asked about the page, told `lines`, as the application would ask it."""
    image = Attachment(b"", "", made.width, made.height, page_text=lines)
    return user_content(Message("user", prompt, (image,)))


def layout_code(made: Made, lines: Sequence[TextLine]) -> str:
    """The page with the numbers of the layout in `lines`, its elements and its font."""
    font = made.theme.font_family if made.theme else "sans-serif"
    return page_of(
        layout_of(lines, (made.width, made.height)),
        Elements(made.html),
        language=made.language,
        font=font,
    )


def _record(prefix: str, made: Made, asked: str, answer: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{made.index:07}",
        "image": made.image,
        "conversations": [
            {"from": "human", "value": f"<image>\n{asked}"},
            {"from": "gpt", "value": answer},
        ],
    }


def _write_list(path: Path, records: Sequence[dict[str, Any]]) -> None:
    lines = ",\n".join(msgspec.json.encode(record).decode() for record in records)
    write_atomically(path, f"[\n{lines}\n]\n")


def _keep_plan(out: Path, plan: Plan) -> None:
    path = out / "plan.json"
    if path.is_file():
        try:
            known = msgspec.json.decode(path.read_bytes(), type=Plan)
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"{path} cannot be read: {error}", hint="Name another --out folder."
            ) from error
        if known != plan:
            raise ConfigError(
                f"{out} holds pages that were made otherwise: {_difference(known, plan)}.",
                hint="Name another --out folder, or give the same options.",
            )
        return
    write_atomically(path, msgspec.json.encode(plan).decode() + "\n")


def _difference(known: Plan, plan: Plan) -> str:
    return ", ".join(
        f"{name} {getattr(known, name)!r}, not {getattr(plan, name)!r}"
        for name in Plan.__struct_fields__
        if getattr(known, name) != getattr(plan, name)
    )


def _at_least(height: int, picture: Image.Image, color: str) -> Image.Image:
    """`picture` with the page's background below it, as a window that is higher shows it."""
    if picture.height >= height:
        return picture
    longer = Image.new("RGB", (picture.width, height), color)
    longer.paste(picture, (0, 0))
    return longer


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    picture.save(part, "PNG", compress_level=3)
    os.replace(part, path)
