"""The conversation and the panels beside it.

Owns which panels are open; on a narrow screen one is open at a time. Knows nothing about what is in
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from textual.containers import Horizontal
from textual.message import Message
from textual.widget import Widget

W = TypeVar("W", bound=Widget)
_RIGHT = "SettingsPanel, PicturePane"


class Panes(Horizontal):
    """See the module."""

    class Left(Message):
        """A panel is closed, and the focus may have been in it."""

    async def toggle(self, name: str, make: Callable[[], W]) -> W | None:
        """Open the panel whose class has this name, and it; close it and None if it was open."""
        if self.query(name):
            await self.take_away(name)
            return None
        return await self.open(name, make)

    async def open(self, name: str, make: Callable[[], W]) -> W:
        """Open the panel, which is not."""
        if self.screen.has_class("-narrow"):
            await self.take_away(f"Sidebar, {_RIGHT}")
        panel = make()
        await self.mount(panel, before=0 if name == "Sidebar" else None)
        self.set_class(bool(self.query(_RIGHT)), "-panel")
        return panel

    async def take_away(self, names: str) -> None:
        """Close those of these panels that are open."""
        await self.query(names).remove()
        self.set_class(bool(self.query(_RIGHT)), "-panel")
        self.post_message(self.Left())

    async def on_sidebar_closed(self) -> None:
        await self.take_away("Sidebar")

    async def on_settings_panel_closed(self) -> None:
        await self.take_away("SettingsPanel")

    async def on_picture_pane_closed(self) -> None:
        await self.take_away("PicturePane")
