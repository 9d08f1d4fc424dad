"""What a page looks like, as plain data: a picture, its lines of text and its elements.

Owns the one form in which rendered pages and mere pictures are compared. Knows nothing about
browsers, scores or files.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from PIL import Image

from w2c_tui.core.conversation import Attachment, TextLine
from w2c_tui.core.image import DEFAULT_LIMITS, ImageLimits, open_image

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels of the picture."""
Color = tuple[int, int, int]
"""sRGB, 0..255."""


class Line(NamedTuple):
    """One line of text on a page. `color` is None where only a picture could tell it."""

    text: str
    box: Box
    color: Color | None = None


class Tree(NamedTuple):
    """The elements of a page in document order: tag names, and each one's parent (-1: none)."""

    tags: tuple[str, ...]
    parents: tuple[int, ...]


class View(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A page as it is seen.

    `picture` is RGB, and `png` the file that it was read from, if any. `lines` is None when nobody
    read the text, `tree` when there is no HTML.
    `page_height` is the whole page's height in pixels, of which the picture may show less.
    `refused` counts what the page asked for and did not get: network, files outside of its folder.
    `asked` are the paths inside of its folder that it asked for, whether they exist or not.
    """

    picture: Image.Image
    png: bytes | None = None
    lines: tuple[Line, ...] | None = None
    tree: Tree | None = None
    page_height: int = 0
    refused: int = 0
    asked: tuple[str, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether the page goes on below the picture."""
        return self.page_height > self.picture.height


def picture_from_png(png: bytes) -> Image.Image:
    """An RGB picture from what a browser or this program wrote; others go through `core.image`.

    Raises OSError if it is damaged.
    """
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.load()
        # `convert` copies a picture that is RGB already, which takes as long as decoding it.
        return image if image.mode == "RGB" else image.convert("RGB")


def view_of_picture(
    attachment: Attachment,
    lines: Iterable[TextLine] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> View:
    """A screenshot as a view. `lines` is what text recognition found; by default what the
    attachment carries. Raises ImageError."""
    picture = open_image(attachment, limits)
    found = attachment.page_text if lines is None else lines
    return View(
        picture=picture,
        lines=None
        if found is None
        else tuple(Line(line.text, line.box) for line in found if line.text),
        page_height=picture.height,
    )
