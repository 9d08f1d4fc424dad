"""Handing a text to the user's own editor and taking it back."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from textual.app import App, SuspendNotSupported

from w2c_tui.core.errors import ConfigError


def edit(app: App[Any], text: str, suffix: str) -> str | None:
    """`text` as the editor left it, None when that ended with an error.

    The application gives the terminal away meanwhile. Raises ConfigError when there is no editor.
    """
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not command:
        command = "notepad" if os.name == "nt" else "vi"
    failed: Exception | None = None
    status = 1
    with tempfile.TemporaryDirectory(prefix="w2c-") as folder:
        path = Path(folder, f"text{suffix}")
        path.write_bytes(text.encode())
        try:
            with app.suspend():
                # Textual takes the terminal back only when nothing is raised here.
                try:
                    words = shlex.split(command, posix=os.name != "nt")
                    status = subprocess.call([*words, str(path)])
                except (OSError, ValueError) as error:
                    failed = error
        except SuspendNotSupported as error:
            raise ConfigError("This terminal cannot be handed to an editor.") from error
        if failed is not None:
            why = getattr(failed, "strerror", None) or failed
            raise ConfigError(
                f"The editor {command!r} cannot be started: {why}.",
                hint="Set the environment variable EDITOR to a program.",
            ) from failed
        return path.read_bytes().decode(errors="replace") if status == 0 else None
