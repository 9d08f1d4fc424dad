"""Views of pages that were rendered before, on disk: references are rendered once for all runs.

A view is taken again only for the same page with the same files, the same settings, the same
browser with the same fonts, and the same code. Knows nothing about models or scores.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import msgspec

from w2c_tui.core import stand_in
from w2c_tui.core.files import write_atomically
from w2c_tui.web import render, snapshot, view
from w2c_tui.web.render import PageSource, Renderer
from w2c_tui.web.view import Line, Tree, View, picture_from_png

MAX_BYTES = 4 * 2**30
"""Views that were not used for longest are removed beyond this."""

_PARTS = (render, snapshot, stand_in, view)
"""The code that pictures depend on."""


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A view in a file. `files` are what the page asked for in its folder and the hash of what it
    got, empty for nothing."""

    picture: bytes
    lines: tuple[Line, ...] | None
    tree: Tree | None
    page_height: int
    refused: int
    files: dict[str, str]


class RenderCache:
    """A renderer that keeps views in `folder`. Use from any thread, and by several processes.

    Nothing is kept where scripts run, as a page may then look different each time.
    """

    def __init__(self, folder: Path, renderer: Renderer) -> None:
        self.folder = folder
        self.renderer = renderer
        self.num_found = 0

    def render(self, page: PageSource) -> View:
        """As `Renderer.render`. Raises RenderError, and W2CError where nothing can be written."""
        if self.renderer.settings.javascript:
            return self.renderer.render(page)
        path = self.folder / f"{self._key(page)}.view"
        found = self._read(path, page)
        if found is not None:
            self.num_found += 1
            return found
        made = self.renderer.render(page)
        assert made.png is not None  # the browser always sends one
        kept = _Kept(
            picture=made.png,
            lines=made.lines,
            tree=made.tree,
            page_height=made.page_height,
            refused=made.refused,
            files=_hashes(page, made.asked),
        )
        write_atomically(path, msgspec.msgpack.encode(kept))
        return made

    def trim(self, max_bytes: int = MAX_BYTES) -> None:
        """Remove the views that were not used for longest, until all take at most `max_bytes`."""
        entries = []
        for path in self.folder.glob("*.view"):
            with contextlib.suppress(OSError):
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= max_bytes:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size

    def _key(self, page: PageSource) -> str:
        html = page.html if isinstance(page.html, bytes) else page.html.encode("utf-8", "replace")
        about = msgspec.structs.asdict(
            msgspec.structs.replace(page, html="", folder=None, name="")
        ) | {"text": isinstance(page.html, str), "in_folder": page.folder is not None}
        found = hashlib.sha256(self._made_with + msgspec.json.encode(about, order="sorted"))
        found.update(html)
        return found.hexdigest()

    @cached_property
    def _made_with(self) -> bytes:
        """What all pictures depend on beside the page."""
        settings, browser = self.renderer.settings, self.renderer.info()
        about = {
            "window": (settings.width, settings.height, settings.max_page_height),
            "browser": (browser.version, browser.sandboxed, browser.fonts),
            "code": [_hash(Path(str(part.__file__)).read_bytes()) for part in _PARTS],
        }
        return msgspec.json.encode(about, order="sorted")

    def _read(self, path: Path, page: PageSource) -> View | None:
        try:
            kept = msgspec.msgpack.decode(path.read_bytes(), type=_Kept)
            if kept.files != _hashes(page, kept.files):
                return None
            picture = picture_from_png(kept.picture)
        except (OSError, msgspec.DecodeError):
            # Not there, or damaged: it is made again.
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return View(
            picture=picture,
            png=kept.picture,
            lines=kept.lines,
            tree=kept.tree,
            page_height=kept.page_height,
            refused=kept.refused,
            asked=tuple(kept.files),
        )


def _hashes(page: PageSource, paths: Iterable[str]) -> dict[str, str]:
    """The hash of what `page` gets for each of `paths`, empty for nothing."""
    if page.folder is None:
        return {}
    found = {}
    for path in paths:
        content = render.file_of(page.folder, path)
        found[path] = "" if content is None else _hash(content)
    return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
