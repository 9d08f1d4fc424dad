"""`w2c compare`: how near one page or picture is to another."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from w2c_tui.cli.flags import render_options, settings_from
from w2c_tui.console.terminal import say, say_json
from w2c_tui.core.config import Settings
from w2c_tui.core.errors import RenderError
from w2c_tui.core.files import write_atomically

if TYPE_CHECKING:
    from w2c_tui.core.conversation import Attachment
    from w2c_tui.web.view import View

_PAGES = (".html", ".htm", ".xhtml")


@click.command(
    epilog="Examples:  w2c compare shot.png page.html   "
    "w2c compare original.html page.html --report report.html   "
    "w2c compare before.png after.png --json"
)
@click.argument("reference", metavar="A")
@click.argument("candidate", metavar="B")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--report", metavar="FILE", help="Also write a report with pictures, one HTML file.")
@click.option("--difference", metavar="FILE", help="Also write a picture of the differences.")
@click.option(
    "--ocr/--no-ocr",
    default=None,
    help="Read the text of pictures, so that they have blocks to compare.  [default: if installed]",
)
@render_options
def compare(
    reference: str,
    candidate: str,
    as_json: bool,
    report: str | None,
    difference: str | None,
    ocr: bool | None,
    **flags: Any,
) -> int:
    """Say how near B is to A, the original: 1 is the same, 0 has nothing in common.

    Each is an HTML page or a picture. A page is rendered in a window like that of the picture that
    it is compared with, unless --width or --height is given. A page that cannot be rendered, or is
    blank, scores 0.
    """
    settings = settings_from(flags)
    from w2c_tui.console import show_error
    from w2c_tui.web.differences import difference_picture, differences
    from w2c_tui.web.render import Renderer, window_for
    from w2c_tui.web.score import compare as compare_views

    if ocr is None:
        ocr = importlib.util.find_spec("rapidocr") is not None
    attachments = [_attachment(name, settings) for name in (reference, candidate)]
    picture = attachments[0] or attachments[1]
    width, height = 0, 0
    if picture and flags.get("render__width") is None and flags.get("render__height") is None:
        width, height = window_for((picture.width, picture.height), settings.render)
    pictures = _pictures(attachments, settings, read=ocr)
    with contextlib.ExitStack() as stack:
        renderer: Renderer | None = None
        views: list[View | None] = []
        for name, view in zip((reference, candidate), pictures, strict=True):
            if view is not None:
                views.append(view)
                continue
            from w2c_tui.cli.render import read_page

            renderer = renderer or stack.enter_context(Renderer(settings.render))
            try:
                page = msgspec.structs.replace(read_page(name), width=width, height=height)
                views.append(renderer.render(page))
            except RenderError as error:
                if not views:
                    raise
                show_error(error, prefix=name)
                views.append(None)
    first, second = views
    assert first is not None
    comparison = compare_views(first, second)
    found = differences(first, second, comparison)
    if difference is not None and second is not None:
        from w2c_tui.cli.render import as_png

        write_atomically(Path(difference), as_png(difference_picture(first, second)))
    if report is not None:
        from w2c_tui.web.report import comparison_report

        names = (reference, candidate)
        write_atomically(Path(report), comparison_report(first, second, comparison, found, names))
    if as_json:
        row = msgspec.to_builtins(comparison.score)
        row |= {"failed": comparison.failed, "differences": [d.message for d in found]}
        say_json(row)
        return 0
    _show(comparison, [d.message for d in found[:8]], len(found))
    return 0


def _attachment(name: str, settings: Settings) -> Attachment | None:
    """The picture of that name; None for a page."""
    from w2c_tui.core.reference import load_attachment

    if name == "-" or name.lower().endswith(_PAGES):
        return None
    return load_attachment(name, settings.images)


def _pictures(
    attachments: list[Attachment | None], settings: Settings, *, read: bool
) -> list[View | None]:
    from w2c_tui.web.view import view_of_picture

    if read and any(attachments):
        from w2c_tui.cli.running import with_page_text
        from w2c_tui.core.config import paths
        from w2c_tui.engine.client import EngineClient

        with EngineClient(paths().engine_log) as engine:
            attachments = [a and with_page_text(a, engine) for a in attachments]
    return [
        None if attachment is None else view_of_picture(attachment, limits=settings.images)
        for attachment in attachments
    ]


def _show(comparison: Any, messages: list[str], num_found: int) -> None:
    from w2c_tui.web.score import PARTS

    total = comparison.score
    say(f"score        {total.score:.3f}")
    for name in (*PARTS, "structure"):
        value = getattr(total, name)
        shown = "-" if value is None else f"{value:.3f}"
        note = "  (not in the score)" if name == "structure" else ""
        say(f"{name:<12} {shown}{note}")
    if comparison.failed:
        say(comparison.failed)
    if total.block_match is None and not comparison.failed:
        say("Without text recognition a picture has no blocks: pip install 'w2c-tui[ocr]'")
    for message in messages:
        say(f"- {message}")
    if num_found > len(messages):
        say(f"  and {num_found - len(messages)} more (--report shows them)")
