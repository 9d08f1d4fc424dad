"""The versions of a page: what each answer came to, on disk, as a tree that nothing falls out of.

    FOLDER/v001/index.html      the page, byte for byte as it was written
               /meta.json       where it came from (`Meta`)
               /original.png    the screenshot it was made from, in the bytes it came in
               /render.png      its picture, once somebody has made one
          /v002/...
          /current              the number of the version in sight

Owns this layout and its numbering. A version folder appears whole or not at all, under a number
that no other process took; it is never changed but for `render.png` and what `note` adds. Knows
nothing about models, browsers or screens, and about the session store only what `keep_answer`
reads from it. Everything may be called from any thread and from several processes.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from w2c_tui.core.artifact import best_page
from w2c_tui.core.conversation import RENDER_SOURCE, Attachment
from w2c_tui.core.errors import StoreError, W2CError
from w2c_tui.core.files import write_atomically
from w2c_tui.core.image import media_type
from w2c_tui.core.printable import quoted
from w2c_tui.core.store import Store, StoredMessage

_PLAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
Origin = Literal["answer", "edit", "candidate", "refined", "unknown"]

_version_name = re.compile(r"v(\d{3,9})").fullmatch


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """`meta.json`. Times are seconds since the epoch.

    `origin` "unknown" is a version whose meta.json is missing or damaged. `complete` says that the
    page was written to its end. `message_id` is the answer in the session store. `score`, in
    0..1, says how near the rendered page is to the original, where that was measured; `notes` is
    free for whoever made the version.
    """

    origin: Origin = "answer"
    parent: int | None = None
    created_at: float = 0.0
    prompt: str = ""
    model: str = ""
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    complete: bool = True
    message_id: int | None = None
    score: float | None = None
    notes: dict[str, Any] = {}


class Version(msgspec.Struct, frozen=True):
    """One version: its number, its folder and its meta.json as it was read."""

    number: int
    folder: Path
    meta: Meta

    @property
    def name(self) -> str:
        return f"v{self.number:03d}"

    @property
    def html_path(self) -> Path:
        return self.folder / "index.html"

    @property
    def render_path(self) -> Path:
        """Where its picture is, or will be."""
        return self.folder / "render.png"

    @property
    def original_path(self) -> Path | None:
        """The screenshot it was made from."""
        return next(self.folder.glob("original.*"), None)

    @property
    def data(self) -> bytes:
        """The page as it is on disk. Raises StoreError."""
        try:
            return self.html_path.read_bytes()
        except OSError as error:
            raise _unreadable(self.html_path, error) from error

    @property
    def html(self) -> str:
        """The page as text; bytes that are no UTF-8 are shown as such. Raises StoreError."""
        return self.data.decode("utf-8", "replace")


def versions_of(pages: Path, session_id: str) -> Versions:
    """The versions of a session. Raises StoreError for an id that leads out of `pages`.

    The ids of this program are plain; a session file may come from somebody else.
    """
    if not _PLAIN_ID.fullmatch(session_id):
        raise StoreError(
            f"The session file holds a session with the id {quoted(session_id)}, which is no name.",
            hint="It was not written by this program.",
        )
    return Versions(pages / session_id)


class Versions:
    """The versions in one folder, which is made when the first one is added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Version]:
        """Every version, oldest first; none when there is no folder. Raises StoreError."""
        return [self.get(number) for number in self._numbers()]

    def get(self, number: int) -> Version:
        """Raises StoreError when there is no such version."""
        folder = self.folder / f"v{number:03d}"
        if not folder.is_dir():
            known = self._numbers()
            raise StoreError(
                f"There is no version v{number:03d} in {self.folder}.",
                hint=f"There are v{known[0]:03d} to v{known[-1]:03d}." if known else "",
            )
        try:
            meta = msgspec.json.decode((folder / "meta.json").read_bytes(), type=Meta)
        except (OSError, msgspec.DecodeError):
            # The page itself is worth more than what is known about it.
            meta = Meta(origin="unknown", created_at=folder.stat().st_mtime)
        return Version(number, folder, meta)

    def current(self) -> Version | None:
        """The version in sight: the selected one, else the newest; None without any."""
        numbers = self._numbers()
        with contextlib.suppress(OSError, ValueError):
            selected = int((self.folder / "current").read_text(encoding="ascii"))
            if selected in numbers:
                return self.get(selected)
        return self.get(numbers[-1]) if numbers else None

    def select(self, number: int) -> Version:
        """Bring a version into sight. Raises StoreError when there is none."""
        version = self.get(number)
        write_atomically(self.folder / "current", f"{number}\n")
        return version

    def undo(self) -> Version:
        """Go back to the parent of the version in sight. Raises StoreError at the root."""
        here = self.current()
        if here is None or here.meta.parent is None:
            raise StoreError(
                "There is nothing to undo: " + (f"{here.name} came first." if here else "no page.")
            )
        return self.select(here.meta.parent)

    def redo(self) -> Version:
        """Go on to the newest version made from the one in sight. Raises StoreError at a leaf."""
        here = self.current()
        later = [v for v in self.all() if here is not None and v.meta.parent == here.number]
        if not later:
            raise StoreError("There is nothing to redo: no version was made from this one.")
        return self.select(later[-1].number)

    def add(
        self,
        html: str | bytes,
        *,
        original: Attachment | Path | None = None,
        parent: int | Literal["current"] | None = "current",
        select: bool = True,
        **meta: Any,
    ) -> Version:
        """Keep `html` as the next version; `meta` are fields of `Meta`.

        `original` is the screenshot, or the file of another version to share. `parent` None begins
        a tree of its own. With `select` the new version comes into sight. Raises StoreError, and
        leaves nothing behind, when it cannot be written.
        """
        if parent == "current":
            here = self.current()
            parent = here.number if here else None
        known = Meta(parent=parent, created_at=time.time())
        known = msgspec.structs.replace(known, **meta)
        data = html if isinstance(html, bytes) else html.encode("utf-8", "replace")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            scratch = self.folder / f".new-{os.urandom(8).hex()}"
            scratch.mkdir()
            try:
                (scratch / "index.html").write_bytes(data)
                (scratch / "meta.json").write_bytes(_json(known))
                if original is not None:
                    _put_original(scratch, original)
                number = self._take_number(scratch)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
        except OSError as error:
            raise StoreError(
                f"A version of the page cannot be kept in {self.folder}: "
                f"{error.strerror or error}.",
                hint="Free some space, or make the folder writable for you.",
            ) from error
        if select:
            self.select(number)
        return self.get(number)

    def take_edit(self, edited: bytes | Path, parent: int) -> Version:
        """Keep an edited page as a version made from `parent`, which is returned when nothing was
        changed. Raises StoreError for an empty page or a file that cannot be read."""
        try:
            data = edited if isinstance(edited, bytes) else edited.read_bytes()
        except OSError as error:
            raise _unreadable(Path(str(edited)), error) from error
        before = self.get(parent)
        if data == before.data:
            return before
        if not data.strip():
            raise StoreError(
                "The edited page is empty and was not kept.", hint=f"{before.name} is as it was."
            )
        return self.add(
            data,
            original=before.original_path,
            parent=parent,
            origin="edit",
            prompt=before.meta.prompt,
            message_id=before.meta.message_id,
        )

    def set_render(self, number: int, png: bytes) -> None:
        """Keep the picture of a version."""
        write_atomically(self.get(number).render_path, png)

    def note(self, number: int, *, score: float | None = None, **notes: Any) -> Version:
        """Add a score and notes to what is known about a version; others stay as they are."""
        version = self.get(number)
        meta = msgspec.structs.replace(
            version.meta,
            score=version.meta.score if score is None else score,
            notes=version.meta.notes | notes,
        )
        write_atomically(version.folder / "meta.json", _json(meta))
        return self.get(number)

    def diff(self, before: int, after: int) -> str:
        """What changed between two versions, as a unified diff; empty when nothing did."""
        old, new = self.get(before), self.get(after)
        lines = difflib.unified_diff(
            _lines(old.html), _lines(new.html), f"{old.name}/index.html", f"{new.name}/index.html"
        )
        return "".join(
            line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
            for line in lines
        )

    def save_as(self, number: int, path: Path) -> None:
        """Write the page to `path`, byte for byte, whole or not at all."""
        write_atomically(path, self.get(number).data)

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(self.folder, error) from error
        return sorted(int(match[1]) for name in names if (match := _version_name(name)))

    def _take_number(self, scratch: Path) -> int:
        number = max(self._numbers(), default=0) + 1
        while True:
            try:
                # A folder that is not empty is never replaced: this is what makes numbers unique.
                os.rename(scratch, self.folder / f"v{number:03d}")
            except OSError:
                if not (self.folder / f"v{number:03d}").exists():
                    raise
                number += 1
            else:
                return number

    def _sweep(self) -> None:
        """Remove what a process left that died while it wrote."""
        for leftover in self.folder.glob(".new-*"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > 3600:
                    shutil.rmtree(leftover)


def keep_answer(
    store: Store,
    message_id: int,
    pages: Path,
    *,
    origin: Origin = "answer",
    params: dict[str, Any] | None = None,
) -> Version | None:
    """The page of a finished answer as a version of its session in `pages`; None when it holds no
    page.

    Every front end calls this when an answer ends. Calling it again changes nothing; an answer
    that was written on becomes a version below the one it was. The parent is what the answer
    follows: the page of the nearest answer above, or an edit of that page which is in sight.
    `params` are how it was written, by default those of the session.
    """
    message = store.message(message_id)
    page = best_page(message.text)
    if page is None:
        return None
    versions = versions_of(pages, message.session_id)
    every = versions.all()
    own = [v for v in every if v.meta.message_id == message_id and v.meta.origin != "edit"]
    if own and own[-1].data == page.html.encode("utf-8", "replace"):
        return own[-1]
    # As private as the sessions are.
    with contextlib.suppress(OSError):
        pages.mkdir(mode=0o700, parents=True, exist_ok=True)
    above = store.branch(message.session_id, message_id)[:-1]
    asked = next((m.text for m in reversed(above) if m.role == "user"), "")
    return versions.add(
        page.html,
        original=screenshot_above(store, above),
        origin=origin,
        parent=own[-1].number if own else _follows(versions, every, above),
        prompt=asked,
        model=message.model,
        params=store.session(message.session_id).params if params is None else params,
        stats=message.stats,
        complete=page.complete,
        message_id=message_id,
    )


def screenshot_above(store: Store, above: Sequence[StoredMessage]) -> Attachment | None:
    """The image that an answer below the messages `above` is about: the latest that was shown and
    is not a render of a page."""
    for message in reversed(above):
        image = next((i for i in message.attachments if i.source != RENDER_SOURCE), None)
        if image is not None:
            return Attachment(store.image(image.sha256), **msgspec.structs.asdict(image))
    return None


def _follows(versions: Versions, every: list[Version], above: list[StoredMessage]) -> int | None:
    """The version that an answer below the messages `above` is made from."""
    for message in reversed(above):
        made = [v for v in every if v.meta.message_id == message.id]
        if not made:
            continue
        here = versions.current()
        # An edit carries the message of the page that it was made from.
        if here is not None and here.meta.message_id == message.id:
            return here.number
        return next((v for v in reversed(made) if v.meta.origin != "edit"), made[-1]).number
    return None


def _put_original(folder: Path, original: Attachment | Path) -> None:
    if isinstance(original, Attachment):
        ending = media_type(original.data).rpartition("/")[2]
        (folder / f"original.{ending}").write_bytes(original.data)
        return
    target = folder / f"original{original.suffix}"
    try:
        os.link(original, target)
    except OSError:
        shutil.copyfile(original, target)


def _lines(html: str) -> list[str]:
    """Lines as a diff shows them: only a line feed ends one."""
    return re.findall(r"[^\n]*\n|[^\n]+", html)


def _json(meta: Meta) -> bytes:
    return msgspec.json.format(msgspec.json.encode(meta), indent=2) + b"\n"


def _unreadable(path: Path, error: OSError) -> W2CError:
    return StoreError(
        f"{path} cannot be read: {error.strerror or error}.",
        hint="Make the file and its folder readable for you.",
    )
