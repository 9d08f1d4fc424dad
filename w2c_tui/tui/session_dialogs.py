"""What is asked about a session before something is done with it: a title, a file.

Knows nothing about the screen that they stand before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from w2c_tui.core.errors import W2CError
from w2c_tui.core.files import write_atomically
from w2c_tui.core.printable import printable
from w2c_tui.tui.app import W2CApp
from w2c_tui.tui.dialogs import AskLine
from w2c_tui.tui.export import FORMATS, export, file_name


def rename(app: W2CApp, session_id: str, renamed: Callable[[], None]) -> None:
    """Ask for a title; `renamed` is called when the session has it. Raises W2CError."""

    def done(title: str | None) -> None:
        if title is None or not title.strip():
            return
        try:
            app.store.update_session(session_id, title=title.strip())
        except W2CError as error:
            app.show_error(error)
        else:
            renamed()

    app.push_screen(AskLine("Rename the session", app.store.session(session_id).title), done)


def export_to_file(app: W2CApp, session_id: str) -> None:
    """Ask for a file and write the session there. Raises W2CError."""
    session = app.store.session(session_id)

    def refuse(value: str) -> str:
        path = Path(value).expanduser()
        if path.suffix.lower() not in FORMATS:
            return f"End the name with {', '.join(FORMATS)}."
        return f"{path} exists already: choose another name." if path.exists() else ""

    def done(value: str | None) -> None:
        if value is None:
            return
        path = Path(value).expanduser().absolute()
        try:
            write_atomically(path, export(app.store, session_id, path.suffix))
        except W2CError as error:
            app.show_error(error)
        else:
            app.notify(f"Exported to {printable(str(path))}", timeout=10, markup=False)

    question = "Export to which file? .md and .html to read, .json with every branch"
    default = str(Path.cwd() / f"{file_name(session)}.md")
    app.push_screen(AskLine(question, default, refuse), done)
