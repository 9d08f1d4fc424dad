"""A text area that always shows its lines where they are.

Owns two corrections of Textual's text area and nothing else. Knows nothing about what is written.
"""

from __future__ import annotations

from textual.widgets import TextArea


class WrappedArea(TextArea):
    """A text area whose lines are broken, and drawn, for the width that it has."""

    @property
    def wrap_width(self) -> int:
        """Cells in a line, from the size that the last layout gave; 0 for lines without an end.

        Textual asks the compositor, which may be between two layouts: a text that is loaded then
        keeps line breaks for a width that it never gets, as no change of size follows.
        """
        if not self.soft_wrap:
            return 0
        taken = self.styles.gutter.width + self.scrollbar_gutter.width + self.gutter_width + 1
        return max(0, self.outer_size.width - taken)

    def _rewrap_and_refresh_virtual_size(self) -> None:
        # Textual draws again only where the number of lines changes, not where words move.
        super()._rewrap_and_refresh_virtual_size()
        self.refresh()
