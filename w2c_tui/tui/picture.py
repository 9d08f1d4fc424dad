"""Pictures in a terminal.

Owns drawing with coloured half cells, which works everywhere and scrolls without flicker, and the
choice of a real graphics protocol through textual-image, for pictures that stay in one place.
Knows nothing about models or sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rich.color import Color as RichColor
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

if TYPE_CHECKING:
    from PIL import Image

    from w2c_tui.core.conversation import Attachment
    from w2c_tui.core.store import Store, StoredAttachment

Protocol = Literal["kitty", "sixel", "half-cells", "none"]


def protocol_for(setting: str) -> Protocol:
    """The way of drawing that `setting` names, or that this terminal is known to understand."""
    if setting != "auto":
        return setting  # type: ignore[return-value]
    import os

    from w2c_tui.machine import guess_graphics

    found = guess_graphics(os.environ).protocol
    # textual-image has no iTerm2 protocol; the terminals that have it understand sixel too.
    names: dict[str, Protocol] = {"kitty": "kitty", "iterm2": "sixel", "sixel": "sixel"}
    return "none" if found == "none" else names.get(found, "half-cells")


def prepare_protocol(protocol: Protocol) -> None:
    """To be called before the application runs: textual-image asks the terminal when imported."""
    if protocol in ("kitty", "sixel"):
        import textual_image.widget  # noqa: F401


class HalfCells(Widget):
    """A picture of two pixels per cell, as large as fits its region, its proportions kept."""

    DEFAULT_CSS = "HalfCells { width: 1fr; height: 1fr; }"

    def __init__(self, image: Image.Image | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._image = image
        self._drawn: tuple[int, int] = (0, 0)
        self._strips: list[Strip] = []

    @property
    def image(self) -> Image.Image | None:
        return self._image

    @image.setter
    def image(self, image: Image.Image | None) -> None:
        self._image = image
        self._drawn = (0, 0)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        size = (self.size.width, self.size.height)
        if self._drawn != size:
            # A cell of one colour needs no character that ASCII lacks.
            draw = full_cells if getattr(self.app, "plain", False) else half_cells
            self._strips = draw(self._image, *size) if self._image else []
            self._drawn = size
        background = self.rich_style
        if y < len(self._strips):
            strip = self._strips[y]
            return strip.extend_cell_length(size[0], Style(bgcolor=background.bgcolor))
        return Strip.blank(size[0], background)


def half_cells(image: Image.Image, width: int, height: int) -> list[Strip]:
    """`image` in at most `width` x `height` cells, each of which shows two pixels."""
    from PIL import Image

    scale = min(width / image.width, 2 * height / image.height)
    columns = max(1, min(width, round(image.width * scale)))
    rows = max(1, min(2 * height, round(image.height * scale)))
    small = image.convert("RGB").resize((columns, rows), Image.Resampling.BOX)
    pixels = small.tobytes()
    styles: dict[bytes, Style] = {}
    strips = []
    for top in range(0, rows, 2):
        segments = []
        for x in range(columns):
            at = 3 * (top * columns + x)
            below = at + 3 * columns
            pair = pixels[at : at + 3] + pixels[below : below + 3]
            style = styles.get(pair)
            if style is None:
                upper = RichColor.from_rgb(*pair[:3])
                lower = RichColor.from_rgb(*pair[3:]) if len(pair) == 6 else None
                style = styles[pair] = Style(color=upper, bgcolor=lower)
            segments.append(Segment("▀", style))
        strips.append(Strip(segments, columns))
    return strips


def full_cells(image: Image.Image, width: int, height: int) -> list[Strip]:
    """`image` in at most `width` x `height` cells, each of which is one pixel."""
    from PIL import Image

    scale = min(width / image.width, 2 * height / image.height)
    columns = max(1, min(width, round(image.width * scale)))
    rows = max(1, min(height, round(image.height * scale / 2)))
    small = image.convert("RGB").resize((columns, rows), Image.Resampling.BOX)
    pixels = small.tobytes()
    colors = [RichColor.from_rgb(*pixels[at : at + 3]) for at in range(0, len(pixels), 3)]
    return [
        Strip([Segment(" ", Style(bgcolor=color)) for color in colors[at : at + columns]], columns)
        for at in range(0, len(colors), columns)
    ]


def picture_widget(image: Image.Image, protocol: Protocol) -> Widget:
    """A widget that shows `image` as large as its region allows, in the best way there is."""
    if protocol == "kitty":
        from textual_image.widget import TGPImage

        return TGPImage(image, classes="graphics")
    if protocol == "sixel":
        from textual_image.widget import SixelImage

        return SixelImage(image, classes="graphics")
    if protocol == "none":
        from textual.widgets import Static

        return Static("Pictures are switched off (interface.pictures).", markup=False)
    return HalfCells(image)


def opened(picture: StoredAttachment | Attachment, store: Store) -> tuple[Attachment, Image.Image]:
    """On a thread: a picture with its bytes, from the store if need be, and decoded."""
    import msgspec

    from w2c_tui.core.conversation import Attachment
    from w2c_tui.core.image import open_image

    if not isinstance(picture, Attachment):
        picture = Attachment(store.image(picture.sha256), **msgspec.structs.asdict(picture))
    return picture, open_image(picture)


def thumbnail_of(picture: StoredAttachment, store: Store, edge: int = 160) -> Image.Image:
    """On a thread: `picture` scaled down."""
    image = opened(picture, store)[1]
    image.thumbnail((edge, edge))
    return image
