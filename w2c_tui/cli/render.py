"""`w2c render`: pages in, pictures out, one browser for all of them."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from w2c_tui.cli.flags import render_options, settings_from
from w2c_tui.console.terminal import say
from w2c_tui.core.errors import RenderError
from w2c_tui.core.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

    from w2c_tui.web.render import PageSource


@click.command(
    epilog="Examples:  w2c render page.html   "
    "w2c render page.html --out shot.png --width 390 --full-page   "
    "cat page.html | w2c render - --out shot.png"
)
@click.argument("pages", nargs=-1, required=True, metavar="PAGE...")
@click.option(
    "-o",
    "--out",
    metavar="FILE|DIR|-",
    help="Where to write: a PNG file for one page, a folder for many, - for standard output. "
    "Default: PAGE's name with .png, in the current folder.",
)
@click.option("--full-page", is_flag=True, help="Picture the whole page, not just one window.")
@render_options
def render(pages: tuple[str, ...], out: str | None, full_page: bool, **flags: Any) -> int:
    """Turn pages into pictures, as Chromium or Chrome shows them.

    PAGE is an HTML file, or - for standard input. A page gets the files of its own folder and
    nothing else: no network, no scripts unless --javascript is given. What it asks for in vain is
    counted; pictures that it cannot have are grey. Two renders of a page are the same to the pixel.
    """
    settings = settings_from(flags).render
    targets = _targets(pages, out)
    failed = 0
    from w2c_tui.console import show_error
    from w2c_tui.web.render import Renderer, can_be_sandboxed

    sources = [read_page(page) for page in pages]
    if not can_be_sandboxed():
        say("Chromium runs without its sandbox, as this user is root.", err=True)
    with Renderer(settings) as renderer:
        views = renderer.render_all(sources, full_page=full_page)
        for page, target, view in zip(pages, targets, views, strict=True):
            if isinstance(view, RenderError):
                failed += 1
                show_error(view, prefix=page)
                continue
            png = as_png(view.picture)
            if target is None:
                sys.stdout.buffer.write(png)
                continue
            write_atomically(target, png)
            notes = [f"{view.picture.width} × {view.picture.height}"]
            if full_page and view.is_cut:
                notes.append(f"cut from {view.page_height} px")
            if view.refused:
                notes.append(f"{view.refused} requests refused")
            say(f"{page} -> {target} ({', '.join(notes)})", err=True)
    return 1 if failed else 0


def _targets(pages: tuple[str, ...], out: str | None) -> list[Path | None]:
    if out == "-":
        if len(pages) > 1:
            raise click.UsageError("--out - takes one page.")
        return [None]
    if out is not None and len(pages) == 1 and not (Path(out).is_dir() or out.endswith("/")):
        return [Path(out)]
    folder = Path(out or ".")
    if folder.exists() and not folder.is_dir():
        raise click.UsageError(f"--out {out} is a file, but there are {len(pages)} pages.")
    names = ["page" if page == "-" else Path(page).stem for page in pages]
    targets: list[Path | None] = []
    for at, name in enumerate(names):
        number = names[:at].count(name) + 1
        targets.append(folder / (f"{name}.png" if number == 1 else f"{name}-{number}.png"))
    return targets


def read_page(page: str) -> PageSource:
    """The page at a path, with its folder; `-` is standard input. Raises RenderError."""
    from w2c_tui.web.render import PageSource

    if page == "-":
        return PageSource(sys.stdin.buffer.read(), None, "standard input")
    path = Path(page)
    try:
        return PageSource(path.read_bytes(), path.parent, path.name)
    except OSError as error:
        raise RenderError(
            f"The page {page} cannot be read: {error.strerror}.", hint="Give an HTML file."
        ) from error


def as_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
