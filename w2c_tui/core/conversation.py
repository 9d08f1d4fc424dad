"""What a conversation is: messages, the images attached to them and the text read off those images.

Owns the plain data that every other part passes around. Knows nothing about templates, tokens,
models, files or databases.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

Role = Literal["system", "user", "assistant"]
Hints = Literal["none", "text", "colors", "layout"]
"""What a model is told about a picture in words: nothing, its lines of text, those with their
colours, or those in the areas of one colour on which they lie."""

RENDER_SOURCE = "w2c:render"
"""The `source` of a picture that shows a model how its own page looks; every other picture is one
that a page is to be made from."""


class TextLine(msgspec.Struct, frozen=True):
    """One line of text found on a screenshot by text recognition.

    `box` is (left, top, right, bottom) in pixels of the opened image; `score` is the recogniser's
    confidence in 0..1. `ink` and `ground` are the colours (sRGB) of its letters and of what is
    behind them, or None when nobody looked.

    Without `text` it is an area of one colour instead, as a card or a button: `ground` is its
    colour, `ink` that of its border, None without one, and `radius` that of its round corners, px.
    """

    text: str
    box: tuple[int, int, int, int]
    score: float = 1.0
    ink: tuple[int, int, int] | None = None
    ground: tuple[int, int, int] | None = None
    radius: int = 0


class Attachment(msgspec.Struct, frozen=True):
    """One verified image, as the bytes it came in.

    `sha256` is the hash of `data` and the key of every cache: two attachments with the same bytes
    are the same image whatever their names. `width` and `height` are pixels after the EXIF
    orientation was applied. `page_text` is what text recognition found, with the areas of the page
    where these were asked for, or None when nothing was; it belongs to the conversation, so that
    every later turn shows the model the same.
    """

    data: bytes
    sha256: str
    width: int
    height: int
    name: str = "image"
    source: str = ""
    page_text: tuple[TextLine, ...] | None = None


class Message(msgspec.Struct, frozen=True):
    """One turn of one speaker. `text` is raw: exactly what was typed or what the model wrote."""

    role: Role
    text: str = ""
    attachments: tuple[Attachment, ...] = ()


def content_hash(data: bytes) -> str:
    """The key under which an image's bytes are known everywhere."""
    return hashlib.sha256(data).hexdigest()
