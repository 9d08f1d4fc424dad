"""`w2c preview`: a page in the browser, beside its screenshot, while it is written."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from w2c_tui.console.terminal import say

if TYPE_CHECKING:
    from w2c_tui.web.preview import PreviewServer, Shown

    Follow = Callable[[Callable[[Shown], None], threading.Event], None]


@click.command(
    epilog="Examples:  w2c preview landing.html   w2c preview last   w2c preview 3f0a --no-open"
)
@click.argument("what", metavar="SESSION|FILE")
@click.option(
    "-i",
    "--image",
    metavar="PATH|URL",
    help="The screenshot to show beside a FILE. Default: the picture of the same name beside it.",
)
@click.option(
    "--assets",
    type=click.Choice(["none", "crop"]),
    default="none",
    show_default=True,
    help="crop: where the model said where an image was (data-bbox), cut it out of the screenshot.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port to listen on; by default any free one.",
)
@click.option("--no-open", is_flag=True, help="Print the address only; open no browser.")
def preview(what: str, image: str | None, assets: str, port: int, no_open: bool) -> int:
    """Show a page in the browser and follow it while it changes.

    Only this machine can see it: the page is served on 127.0.0.1 under an address that cannot be
    guessed. It runs no scripts and loads nothing from the network. SESSION is the beginning of a
    session's id, or "last"; a folder of versions works too. Ctrl-C ends it.
    """
    with contextlib.ExitStack() as stack:
        shown, follow = _source(what, image, stack)
        from w2c_tui.web.preview import PreviewServer

        server = stack.enter_context(PreviewServer(shown, port=port, cut_out=assets == "crop"))
        _announce(server, no_open)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        follow(server.show, stop)
    return 0


def _source(what: str, image: str | None, stack: contextlib.ExitStack) -> tuple[Shown, Follow]:
    """What is shown first, and what follows it until its event is set."""
    from w2c_tui.cli.sessions import find_session, open_store
    from w2c_tui.core.config import load_settings, paths
    from w2c_tui.core.errors import ImageError
    from w2c_tui.core.reference import load_attachment
    from w2c_tui.web import preview_sources as sources

    path = Path(what).expanduser()
    if path.is_file() or path.suffix.lower() in (".html", ".htm"):
        try:
            original = (
                load_attachment(image, load_settings().images)
                if image
                else sources.screenshot_beside(path)
            )
        except ImageError as error:
            if image:
                raise
            original = None
            say(f"Shown without its screenshot: {error.message}", err=True)
        return sources.shown_file(path, original), lambda show, stop: sources.follow_file(
            show, path, original, stop=stop
        )
    if image:
        raise click.UsageError("--image belongs to a FILE; a session has its own screenshot.")
    if path.is_dir():
        return sources.shown_versions(path), lambda show, stop: sources.follow_versions(
            show, path, stop=stop
        )
    store, pages = stack.enter_context(open_store()), paths().pages
    session_id = find_session(store, what).id
    return sources.shown_session(
        store, session_id, pages
    ), lambda show, stop: sources.follow_session(show, store, session_id, pages, stop=stop)


def _announce(server: PreviewServer, no_open: bool) -> None:
    from w2c_tui.web.preview import open_browser

    say(server.url)
    opened = not no_open and open_browser(server)
    if not opened and "SSH_CONNECTION" in os.environ:
        forward = f"ssh -L {server.port}:127.0.0.1:{server.port}"
        say(f"From the machine you sit at, reach it through: {forward} ...", err=True)
    say("Ctrl-C ends the preview.", err=True)
