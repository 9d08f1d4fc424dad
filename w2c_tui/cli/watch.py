"""`w2c watch`: screenshots that come into a folder become pages, with one model load.

Owns noticing them; what becomes of each is `w2c generate`'s. The folder is polled: that works on
network drives and folders shared with a virtual machine, and a second is soon enough here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from w2c_tui.cli.flags import generation_options, model_options, settings_from
from w2c_tui.cli.generate import SUFFIXES, Run, better_options, stem_of
from w2c_tui.console.terminal import say
from w2c_tui.core.config import Settings
from w2c_tui.core.errors import ImageError
from w2c_tui.core.prompt import PAGE_PROMPT

INTERVAL_S = 0.4
PATIENCE_S = 5.0
"""How long an image that cannot be read may rest before it is no longer one half written."""

_Signature = tuple[int, int, int]


@click.command(
    epilog="Example:  w2c watch ~/Pictures/Screenshots --out pages/ --model LLM360/CrystalChat-7B-"
    "Web2Code --load-4bit"
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-p", "--prompt", default=PAGE_PROMPT, show_default=True, help="What to ask of each image."
)
@click.option("-o", "--out", metavar="DIR", help="Where to write the pages. Default: FOLDER.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
@click.option("--existing", is_flag=True, help="Do the images that are there already, too.")
@click.option("--force", is_flag=True, help="Redo images whose page is there when they change.")
@better_options
@generation_options
@model_options
def watch(
    folder: Path,
    prompt: str,
    out: str | None,
    as_json: bool,
    existing: bool,
    force: bool,
    best_of: int,
    refine: int,
    **flags: Any,
) -> int:
    """Turn every screenshot that comes into FOLDER into a page.

    The model is loaded once. An image is taken when it is written completely; one whose page is
    there already is left alone. Ctrl-C ends it.
    """
    settings = settings_from(flags)
    pages = Path(out) if out else folder
    if pages.exists() and not pages.is_dir():
        raise click.UsageError(f"--out {out} is a file; the pages need a folder.")
    run = Run(settings, prompt, as_json, best_of, refine)
    # What comes while the model is loaded is new, too.
    arrivals = Arrivals(folder, settings, known={} if existing else _images(folder))

    def jobs() -> Iterator[tuple[str, Path | None]]:
        say(f"Watching {folder}; Ctrl-C ends it.", err=True)
        for image in arrivals.until(run.interrupted.is_set):
            target = pages / arrivals.page_name(image)
            if force or not target.exists():
                yield str(image), target

    run.each(jobs())
    return 1 if run.failed else 0


class Arrivals:
    """The images that come into a folder, each once it is whole."""

    def __init__(self, folder: Path, settings: Settings, known: dict[Path, _Signature]) -> None:
        self._folder = folder
        self._settings = settings
        self._done = known
        self._resting: dict[Path, tuple[_Signature, float]] = {}
        self._names: dict[str, Path] = {}

    def until(self, stopped: Callable[[], bool]) -> Iterator[Path]:
        """Waits for the next one; ends when `stopped`. Raises ImageError when the folder goes."""
        while not stopped():
            for image in self.whole():
                if stopped():
                    return
                yield image
            time.sleep(INTERVAL_S)

    def whole(self) -> list[Path]:
        """The images that came or changed and have not been growing since the last look."""
        found = _images(self._folder)
        ready = []
        for image, signature in found.items():
            if self._done.get(image) == signature:
                continue
            before, since = self._resting.get(image, (None, 0.0))
            if before != signature:
                self._resting[image] = signature, time.monotonic()
            elif self._readable(image) or time.monotonic() - since > PATIENCE_S:
                # One that never becomes readable is reported by whoever opens it.
                self._done[image] = signature
                del self._resting[image]
                ready.append(image)
        self._resting = {image: rest for image, rest in self._resting.items() if image in found}
        return ready

    def page_name(self, image: Path) -> str:
        """Images that differ only in their ending get pages of their own."""
        stem, number = stem_of(str(image)), 1
        name = f"{stem}.html"
        while self._names.setdefault(name, image) != image:
            number += 1
            name = f"{stem}-{number}.html"
        return name

    def _readable(self, image: Path) -> bool:
        from w2c_tui.core.reference import load_attachment

        try:
            load_attachment(image, self._settings.images)
        except ImageError:
            return False
        return True


def _images(folder: Path) -> dict[Path, _Signature]:
    found = {}
    try:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith(".") or Path(entry.name).suffix.lower() not in SUFFIXES:
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                # A name for a moment only, while a program saves.
                continue
            if entry.is_file() and status.st_size:
                signature = status.st_mtime_ns, status.st_size, status.st_ino
                found[Path(entry.path)] = signature
    except OSError as error:
        raise ImageError(
            f"The folder {folder} can no longer be read: {error.strerror or error}.",
            hint="Watch it again when it is back.",
        ) from error
    return found
