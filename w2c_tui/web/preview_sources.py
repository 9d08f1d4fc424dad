"""Where a preview's pages come from: a file, a session of the store, a folder of versions.

Owns reading each of them as one `Shown` and following it while it changes. Files are polled: that
is as fast as a person sees, costs nothing measurable for one file, and works on network drives and
shared folders, where no file system says what changed. Knows nothing about servers but `show`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from w2c_tui.core.conversation import Attachment
from w2c_tui.core.errors import StoreError, W2CError
from w2c_tui.core.reference import load_attachment
from w2c_tui.core.store import Store
from w2c_tui.core.versions import Versions, screenshot_above, versions_of
from w2c_tui.web.preview import Shown

Show = Callable[[Shown], None]

FILE_INTERVAL_S = 0.02
SESSION_INTERVAL_S = 0.1
LARGEST_FILE_BYTES = 200_000_000
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def shown_file(path: Path, original: Attachment | None = None) -> Shown:
    """The page in a file. Raises W2CError when it cannot be read."""
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise W2CError(
                f"{path} is too large for a preview: {path.stat().st_size / 1e6:,.0f} MB.",
                hint=f"At most {LARGEST_FILE_BYTES / 1e6:,.0f} MB are shown.",
            )
        html = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise W2CError(
            f"{path} cannot be read: {error.strerror or error}.",
            hint="Give an HTML file, or a session; w2c versions list shows those with pages.",
        ) from error
    return Shown(title=path.name, html=html, original=original, folder=path.absolute().parent)


def follow_file(
    show: Show, path: Path, original: Attachment | None = None, *, stop: threading.Event
) -> None:
    """Show the file again whenever it changes, until `stop`."""
    seen, changed_at, writing = _signature(path), 0.0, False
    while not stop.wait(FILE_INTERVAL_S):
        now = _signature(path)
        if now == seen or now is None:
            # An editor may have taken it away for a moment.
            if writing and time.monotonic() - changed_at > 1:
                writing = False
                show(shown_file(path, original))
            continue
        seen, before, changed_at = now, changed_at, time.monotonic()
        writing = changed_at - before < 1
        try:
            shown = shown_file(path, original)
        except W2CError:
            continue
        show(msgspec.structs.replace(shown, writing=writing))


def screenshot_beside(page: Path) -> Attachment | None:
    """The picture that has the name of the page, which `w2c generate` made it from, or the
    original of a version."""
    names = [page.stem, "original"] if page.name == "index.html" else [page.stem]
    for path in (page.with_name(name + suffix) for name in names for suffix in _PICTURES):
        if path.is_file():
            return load_attachment(path)
    return None


def shown_session(store: Store, session_id: str, pages: Path) -> Shown:
    """The branch in sight of a session: its last answer while it is written and as long as no
    version was made of it, and the versions. Raises StoreError when there is no such session."""
    session = store.session(session_id)
    branch = store.branch(session_id)
    answers = [at for at, message in enumerate(branch) if message.role == "assistant"]
    versions = versions_of(pages, session_id)
    title = session.title or "Session"
    if not answers:
        return Shown(title=title, original=screenshot_above(store, branch), versions=versions)
    answer = branch[answers[-1]]
    writing = answer.status == "streaming"
    kept = not writing and any(v.meta.message_id == answer.id for v in versions.all())
    return Shown(
        title=title,
        answer="" if kept else answer.text,
        writing=writing,
        original=screenshot_above(store, branch[: answers[-1]]),
        versions=versions,
    )


def follow_session(
    show: Show, store: Store, session_id: str, pages: Path, *, stop: threading.Event
) -> None:
    """Show the session again whenever it or its versions change, until `stop`. Another process may
    be writing it."""
    versions = versions_of(pages, session_id)
    seen: object = None
    while not stop.wait(SESSION_INTERVAL_S):
        try:
            session = store.session(session_id)
            leaf = store.message(session.leaf_id) if session.leaf_id is not None else None
            now = (
                session.title,
                leaf and (leaf.id, leaf.status, len(leaf.text)),
                _versions_signature(versions),
            )
            if now != seen:
                show(shown_session(store, session_id, pages))
                seen = now
        except StoreError:
            # Deleted, or the file is held by another program: what is shown stays.
            continue


def shown_versions(folder: Path) -> Shown:
    """A folder of versions that belongs to no session."""
    return Shown(title=folder.name, versions=Versions(folder))


def follow_versions(show: Show, folder: Path, *, stop: threading.Event) -> None:
    """Show the folder again whenever a version comes or is chosen, until `stop`."""
    shown = shown_versions(folder)
    seen = _versions_signature(Versions(folder))
    while not stop.wait(SESSION_INTERVAL_S):
        now = _versions_signature(Versions(folder))
        if now != seen:
            show(shown)
            seen = now


def _versions_signature(versions: Versions) -> object:
    """Changes when a version is added or chosen: both rename something in the folder."""
    try:
        return os.stat(versions.folder).st_mtime_ns
    except OSError:
        return None


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
