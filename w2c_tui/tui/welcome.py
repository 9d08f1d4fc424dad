"""What stands where the conversation will be: how to begin, and what this model can do.

Owns these words and the example screenshot. Knows nothing about sessions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from w2c_tui.core.catalog import find
from w2c_tui.core.printable import printable
from w2c_tui.tui.status_line import short_name

if TYPE_CHECKING:
    from w2c_tui.tui.app import W2CApp

EXAMPLE = Path(__file__).with_name("example.png")
"""A screenshot to try: a page made with Bootstrap (MIT licence)."""

_HOW = """\
Give it a screenshot of a web page and it writes the code, on this machine.
Paste or drop a picture; Ctrl+V takes the clipboard, Ctrl+T lists files.
Then press Enter. Esc stops. F1 shows all keys, Ctrl+P finds every command.
"""
_TEXT_ONLY = """\
It cannot see. It is given the words that text recognition finds on the screenshot and where \
they stand: expect a rough page with some of the words and none of the design. For pages that \
look like the screenshot choose a vision model with Ctrl+O.
"""
_SEES = "It sees the screenshot itself.\n"


class Welcome(VerticalScroll, can_focus=False):
    """Shown while the session is empty."""

    app: W2CApp

    def __init__(self) -> None:
        super().__init__(id="welcome")
        self._model = Static(markup=False, id="about-model")

    def compose(self) -> ComposeResult:
        yield Static("From screenshot to page", markup=False, id="welcome-title")
        yield Static(_HOW, markup=False)
        link = Content.from_markup("[@click=screen.example]Try the example screenshot[/] (F5)")
        yield Static(link)
        yield self._model

    def on_mount(self) -> None:
        self.tell()

    def tell(self) -> None:
        """Say what the model that is loaded, or will be, can do."""
        info = self.app.info
        entry = find(self.app.spec.name)
        name = entry.title if entry else short_name(info.name if info else self.app.spec.name)
        sees = info.reads_images if info else entry.vision if entry else None
        about = {True: _SEES, False: _TEXT_ONLY, None: ""}[sees]
        self._model.update(printable(f"The model is {name}.\n{about}"))
