"""Writing files so that a reader finds the old content or the new one, and nothing between.

Knows nothing about what is written.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from w2c_tui.core.errors import W2CError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put `content` (text as UTF-8) at `path`, whole or not at all. Raises W2CError naming it."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as error:
        raise W2CError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Choose another place, or free some space.",
        ) from error
