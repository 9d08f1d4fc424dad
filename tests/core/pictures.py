"""Pictures to test with, as images and as the bytes of files, and what a refusal has to say."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from w2c_tui.core.errors import ImageError


def picture(width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    if mode == "CMYK":
        return Image.frombytes("CMYK", (width, height), values.tobytes())
    return Image.fromarray(values)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def refused(bad: Callable[[], object], *words: str) -> ImageError:
    """The error of `bad`, which has to say each of `words` and what to do."""
    with pytest.raises(ImageError) as caught:
        bad()
    error = caught.value
    for word in words:
        assert word in str(error)
    assert error.hint
    assert all(c.isprintable() or c == "\n" for c in str(error))
    assert len(str(error)) < 600
    return error
