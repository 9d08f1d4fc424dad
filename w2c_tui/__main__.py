"""The command `w2c-tui`: reads its flags, opens the sessions and starts the application.

Imports the terminal library only once there is something to show. Exit status as for `w2c`.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from w2c_tui import __version__
from w2c_tui.cli.flags import generation_options, model_options, settings_from
from w2c_tui.console import run


@click.command(
    name="w2c-tui",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example:  w2c-tui --image shot.png    The same without a screen: w2c chat, w2c "
    "generate.",
)
@click.option(
    "-i",
    "--image",
    "--image-file",
    "images",
    multiple=True,
    metavar="PATH|URL",
    help="Attach this image to the first message (repeatable).",
)
@click.option("-s", "--session", metavar="ID", help="Go on with this session.")
@click.option("-n", "--new", is_flag=True, help="Begin a new session.")
@generation_options
@model_options
@click.version_option(__version__, "-V", "--version", prog_name="w2c-tui")
def tui(images: tuple[str, ...], session: str | None, new: bool, **flags: Any) -> int:
    """Turn screenshots into pages, in a full-screen application.

    Goes on with the session that was used last, unless an image or --new begins another one.
    """
    settings = settings_from(flags)
    if session and new:
        raise click.UsageError("--session and --new exclude each other.")
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError("w2c-tui needs a terminal. In a pipe: w2c chat, w2c generate.")
    # A wrong name is said before the screen is taken over.
    from w2c_tui.core.config import paths
    from w2c_tui.core.store import Store

    places = paths()
    with Store.open(places.sessions) as store:
        if session:
            store.session(session)
        for image in images:
            from w2c_tui.core.reference import parse_reference, read_reference

            if "://" not in image:
                read_reference(parse_reference(image), settings.images)
        return _run(settings, places, store, images, session, new)


def _run(
    settings: Any, places: Any, store: Any, images: tuple[str, ...], session: str | None, new: bool
) -> int:
    import logging
    from logging.handlers import RotatingFileHandler

    from w2c_tui.tui.app import W2CApp
    from w2c_tui.tui.picture import prepare_protocol

    places.app_log.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(
        places.app_log, maxBytes=1_000_000, backupCount=1, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("w2c_tui").addHandler(handler)
    logging.getLogger("w2c_tui").setLevel(logging.INFO)
    app = W2CApp(settings, places, store, images=images, session=session, new=new)
    prepare_protocol(app.protocol)
    try:
        status = app.run()
    finally:
        app.shut_down()
    return app.return_code or status or 0


def main() -> None:
    """Run `w2c-tui` and end the process with its status."""
    sys.exit(run(tui))


if __name__ == "__main__":
    main()
