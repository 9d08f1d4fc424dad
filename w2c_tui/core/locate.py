"""From what a person calls a model to where it is.

Knows the order in which a name is read: a path on disk, a catalogue name, a hub name. Fetches
packaged files; knows nothing about how a model is loaded or how hubs are reached.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path

from w2c_tui.core.catalog import BUNDLED_NAME, ENTRIES, BundledModel, PackagedFile, find
from w2c_tui.core.download import fetch_packaged
from w2c_tui.core.errors import ModelNotFoundError
from w2c_tui.core.hub import fetch_gguf

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


_HUB_FILE = re.compile(rf"(?P<repo>{_HUB_NAME.pattern}):(?P<quant>[\w.-]+)")


def names_gguf(name: str) -> bool:
    """Whether `name` leads to a GGUF file: a path, OWNER/NAME:QUANT, or such a catalogue entry.

    A bundled model does as well, as its file is made on first use.
    """
    if Path(name).suffix.casefold() == ".gguf" or _HUB_FILE.fullmatch(name):
        return True
    if bundled_folder(name) is not None:
        return True
    path = Path(name).expanduser()
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    entry = None if path.exists() else find(name)
    source = entry.source if entry else None
    return isinstance(source, PackagedFile) and source.member.endswith(".gguf")


def bundled_folder(name: str) -> Path | None:
    """The folder that holds only the trained part of the model `name`, if it is such a model."""
    path = Path(name).expanduser()
    if path.exists():
        return path if (path / BUNDLED_NAME).is_file() else None
    entry = find(name)
    source = entry.source if entry else None
    return source.path if isinstance(source, BundledModel) else None


def locate(
    name: str,
    models_folder: Path,
    report: Callable[[str, int, int], None],
    cancelled: Callable[[], bool] = lambda: False,
) -> str:
    """A folder or file on disk, or a hub name, for `name`.

    For a bundled model the folder of its trained part: `models.checkpoint` makes it whole.

    A packaged model that is not in `models_folder` yet, or a hub's GGUF file (OWNER/NAME:QUANT), is
    downloaded, with `report(phase, done, total)` in bytes. Raises ModelNotFoundError, which
    suggests close names, or DownloadError.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    entry = find(name)
    if entry is not None:
        if isinstance(entry.source, PackagedFile):
            fetched = fetch_packaged(
                entry.source,
                models_folder,
                lambda done, total: report(f"Downloading {entry.title}", done, total),
                cancelled,
            )
            return str(fetched)
        if isinstance(entry.source, BundledModel):
            return str(entry.source.path)
        return entry.source
    file = _HUB_FILE.fullmatch(name)
    if file is not None:
        return str(fetch_gguf(file["repo"], file["quant"], report))
    is_path = name.startswith((".", "~", "/")) or "\\" in name or path.suffix == ".gguf"
    if not is_path and _HUB_NAME.fullmatch(name):
        return name
    known = [known for entry in ENTRIES for known in (entry.id, *entry.aliases)]
    close = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.5)
    raise ModelNotFoundError(
        f"There is no {'file or folder' if is_path else 'model called'} {name}.",
        hint=f"Did you mean {close[0]}?"
        if close
        else "w2c models list shows the known ones; "
        "a folder, a .gguf file, OWNER/NAME of a model hub and OWNER/NAME:QUANT work too.",
    )


def display_name(name: str) -> str:
    """How `name` is shown once it was found: a title, or the last part of a path."""
    entry = find(name)
    if entry is not None:
        return entry.title
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name
