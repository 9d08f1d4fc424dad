"""The line of keys at the bottom.

Owns two corrections of Textual's footer and nothing else. Knows nothing about what the keys do.
"""

from __future__ import annotations

from collections.abc import Sequence

from textual.screen import Screen
from textual.widgets import Footer


class KeyLine(Footer):
    """A footer that is made anew only when its keys change, and lets go of those of before."""

    def __init__(self, *, show_command_palette: bool = True) -> None:
        super().__init__(compact=True, show_command_palette=show_command_palette)
        self._known: Sequence[tuple[object, ...]] = ()

    def bindings_changed(self, screen: Screen[object]) -> None:
        # Told after every move of the focus, which seldom changes any.
        keys = [
            (binding.key, binding.description, binding.action, binding.group, enabled, tooltip)
            for key, (_, binding, enabled, tooltip) in screen.active_bindings.items()
            if binding.show or key == screen.app.COMMAND_PALETTE_BINDING
        ]
        if keys == self._known and self._bindings_ready:
            return
        if screen.app.app_focus and self.is_attached and screen is self.screen:
            self._known = keys
        super().bindings_changed(screen)

    async def recompose(self) -> None:
        await super().recompose()
        # What watches `compact` and is gone is forgotten only when that is set.
        self.mutate_reactive(Footer.compact)
