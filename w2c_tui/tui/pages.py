"""The pages of sessions: their versions on disk, how they look, and how near that is.

Owns the browser that renders them and what is remembered of comparisons. Everything here may take
seconds and belongs on a worker thread; the libraries that render and compare are imported there,
when they are first needed. Knows nothing about widgets.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from w2c_tui.core.config import GenerationParams, Settings
from w2c_tui.core.conversation import RENDER_SOURCE, Attachment
from w2c_tui.core.errors import RenderError, StoreError, W2CError
from w2c_tui.core.store import Store, StoredMessage
from w2c_tui.engine.client import EngineClient

if TYPE_CHECKING:
    from PIL import Image

    from w2c_tui.core.versions import Origin, Version, Versions
    from w2c_tui.web.better import Try
    from w2c_tui.web.render import Renderer
    from w2c_tui.web.view import View

_REMEMBERED = 6
"""Comparisons with their pictures that are kept in memory."""


class Compared(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A version beside the screenshot it was made from.

    Pictures are None where there are none: no screenshot, or a page that could not be rendered,
    for which `failed` is the reason. `parts` are the score's parts in 0..1. `request` asks a model
    to correct what differs.
    """

    version: Version
    original: Image.Image | None = None
    render: Image.Image | None = None
    difference: Image.Image | None = None
    score: float | None = None
    parts: dict[str, float] = {}
    differences: tuple[str, ...] = ()
    request: str = ""
    failed: str = ""


class Pages:
    """See the module. One per application; `close` ends the browser."""

    def __init__(
        self, store: Store, engine: EngineClient, settings: Settings, folder: Path
    ) -> None:
        self._store = store
        self._engine = engine
        self._settings = settings
        self._folder = folder
        self._renderer: Renderer | None = None
        self._references: dict[str, View] = {}
        self._compared: OrderedDict[tuple[str, bytes], Compared] = OrderedDict()
        self._working = threading.Lock()

    def versions(self, session_id: str) -> Versions:
        from w2c_tui.core.versions import versions_of

        return versions_of(self._folder, session_id)

    @property
    def folder(self) -> Path:
        """Where all of them are."""
        return self._folder

    def close(self) -> None:
        """End the browser. Harmless when repeated."""
        renderer, self._renderer = self._renderer, None
        if renderer is not None:
            renderer.close()

    # ── keeping ───────────────────────────────────────────────────────────────────────────────

    def keep(self, message_id: int, params: GenerationParams) -> Version | None:
        """The page of an answer that is over, as a version; None when it holds none."""
        from w2c_tui.core.versions import keep_answer

        chosen = msgspec.to_builtins(params)
        return keep_answer(self._store, message_id, self._folder, params=chosen)

    def keep_try(self, message_id: int, done: Try, params: GenerationParams) -> Version | None:
        """As `keep`, for one of several tries, with what is known about its looks."""
        from w2c_tui.core.versions import keep_answer

        origin: Origin = "candidate" if done.kind == "candidate" else "refined"
        chosen = msgspec.to_builtins(msgspec.structs.replace(params, seed=done.seed))
        version = keep_answer(self._store, message_id, self._folder, origin=origin, params=chosen)
        if version is None:
            return None
        versions = self.versions(self._store.message(message_id).session_id)
        if done.view is not None:
            versions.set_render(version.number, _png(done.view.picture))
        if done.comparison is None:
            return version
        parts = done.comparison.score.parts
        return versions.note(version.number, score=done.score, parts=parts)

    def keep_edit(self, before: StoredMessage, after: StoredMessage) -> Version | None:
        """The page of an answer that the user wrote over, as a version made from what it was."""
        from w2c_tui.core.artifact import best_page

        page = best_page(after.text)
        if page is None:
            return None
        versions = self.versions(after.session_id)
        made = [v for v in versions.all() if v.meta.message_id == before.id]
        return versions.add(
            page.html,
            original=made[-1].original_path if made else None,
            parent=made[-1].number if made else None,
            origin="edit",
            prompt=made[-1].meta.prompt if made else "",
            complete=page.complete,
            message_id=after.id,
        )

    # ── looks ─────────────────────────────────────────────────────────────────────────────────

    @property
    def renderer(self) -> Renderer:
        """The browser. Raises RenderError where there is none."""
        if self._renderer is None:
            from w2c_tui.web.render import Renderer, find_browser

            find_browser(self._settings.render.browser)
            self._renderer = Renderer(self._settings.render)
        return self._renderer

    def reference(self, screenshot: Attachment) -> View:
        """The screenshot as pages are compared with it, its text read where that is possible."""
        from w2c_tui.web.view import view_of_picture

        known = self._references.get(screenshot.sha256)
        if known is None:
            lines = screenshot.page_text
            if lines is None and importlib.util.find_spec("rapidocr") is not None:
                lines = self._engine.read_text(screenshot)
            known = view_of_picture(screenshot, lines, self._settings.images)
            self._references = {screenshot.sha256: known}
        return known

    def compared(self, versions: Versions, number: int) -> Compared:
        """The version as it looks, beside its screenshot, with its score. Raises W2CError when
        there is no browser or no such version."""
        with self._working:
            version = versions.get(number)
            key = (str(version.folder), version.data)
            if key not in self._compared:
                self._compared[key] = self._compare(versions, version)
                while len(self._compared) > _REMEMBERED:
                    self._compared.popitem(last=False)
            self._compared.move_to_end(key)
            return self._compared[key]

    def _screenshot(self, version: Version) -> Attachment | None:
        """With the text that was read on it, if the conversation has that."""
        from w2c_tui.core.versions import screenshot_above

        if version.meta.message_id is not None:
            with contextlib.suppress(StoreError):
                message = self._store.message(version.meta.message_id)
                branch = self._store.branch(message.session_id, message.id)
                if (found := screenshot_above(self._store, branch)) is not None:
                    return found
        return original_of(version)

    def _compare(self, versions: Versions, version: Version) -> Compared:
        from w2c_tui.core.stand_in import stand_in
        from w2c_tui.web.differences import difference_picture, differences, fix_request
        from w2c_tui.web.render import PageSource, window_for
        from w2c_tui.web.score import compare

        screenshot = self._screenshot(version)
        width, height = 0, 0
        if screenshot is not None:
            size = screenshot.width, screenshot.height
            width, height = window_for(size, self._settings.render)
        view, failed = None, ""
        page = stand_in(version.html, screenshot=screenshot, labels=False)
        try:
            view = self.renderer.render(
                PageSource(page.html, name=version.name, width=width, height=height)
            )
            versions.set_render(version.number, _png(view.picture))
        except RenderError as error:
            if self._renderer is None:
                raise
            failed = str(error)
        picture = view.picture if view is not None else None
        if screenshot is None:
            return Compared(version=version, render=picture, failed=failed)
        reference = self.reference(screenshot)
        comparison = compare(reference, view)
        parts = comparison.score.parts
        noted = versions.note(version.number, score=comparison.score.score, parts=parts)
        return Compared(
            version=noted,
            original=reference.picture,
            render=picture,
            difference=difference_picture(reference, view) if view is not None else None,
            score=comparison.score.score,
            parts=parts,
            differences=tuple(d.message for d in differences(reference, view, comparison)),
            request=fix_request(reference, view, comparison),
            failed=failed or comparison.failed,
        )


def original_of(version: Version) -> Attachment | None:
    """The screenshot that a version was made from."""
    from w2c_tui.core.image import attachment_from_bytes

    path = version.original_path
    if path is None:
        return None
    try:
        return attachment_from_bytes(path.read_bytes(), path.name)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}.") from error


def render_of(version: Version) -> Attachment | None:
    """The picture of a version, once there is one."""
    from w2c_tui.core.image import attachment_from_bytes

    try:
        data = version.render_path.read_bytes()
        return attachment_from_bytes(data, f"{version.name}.png", RENDER_SOURCE)
    except (OSError, W2CError):
        return None


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
