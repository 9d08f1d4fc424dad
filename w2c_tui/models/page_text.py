"""Text recognition on screenshots with the optional package `rapidocr` (extra `ocr`).

Owns the recogniser: it is created once per process, on first use, from the weights inside the
package; nothing is downloaded and nothing is logged. Knows nothing about prompts; how lines are
written for a model is `w2c_tui.core.page_text`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from w2c_tui.core.conversation import Hints, TextLine
from w2c_tui.core.errors import ImageError, MissingPackageError, W2CError

MIN_SCORE = 0.65
"""Lines below this confidence are mostly icons and rules read as letters."""

MIN_LONE_SCORE = 0.95
"""The same for a single letter or sign, which an icon resembles more easily."""

MIN_TEXT_PX = 8
"""Images thinner than this, at the scale at which they are read, hold no letters."""

MIN_SIDE_PX, MAX_WIDTH_PX = 480, 2000
"""Crops with a side below the first are enlarged twice, wider screens are reduced to the second."""

BAND_PX, OVERLAP_PX, MAX_BANDS = 1600, 200, 16
"""Tall pages are read in overlapping bands; a page beyond `MAX_BANDS` of them is scaled down."""

MAX_SAMPLED_PIXELS = 40_000
"""Pixels of a line that are looked at for its colours; of larger ones every second, third, ..."""

_lock = threading.Lock()


def read_page_text(image: Image.Image) -> tuple[TextLine, ...]:
    """The lines of text on `image`, top to bottom and left to right within a row.

    Boxes are pixels of `image`, clipped to it. Time grows with the area, to about 30 s on two cores
    at the limit of `MAX_BANDS`; memory stays below 1 GB. Raises `MissingPackageError` without
    the extra `ocr` and `ImageError` when recognition fails.
    """
    scale = _scale(image.size)
    if min(image.size) * scale < MIN_TEXT_PX:
        return ()
    try:
        with _lock:  # One page at a time keeps the memory bound; sessions use every core anyway.
            engine = _engine()
            found = [line for band in _bands(image, scale) for line in _read_band(engine, *band)]
    except W2CError:
        raise
    except Exception as error:
        raise ImageError(
            f"Text recognition failed on an image of {image.width}×{image.height} px: {error}",
            hint="Run without --ocr, or try a smaller or cropped screenshot.",
        ) from error
    lines = [line for raw in found if (line := _in_pixels(raw, scale, image.size))]
    return _in_reading_order(_without_icons(_without_repeats(lines)))


def prepare() -> None:
    """Create the recogniser before its first use, which then is a second or two faster.

    Raises MissingPackageError without the extra `ocr`.
    """
    from PIL import ImageDraw

    import w2c_tui.models.page_boxes  # noqa: F401 - which imports scipy

    # The first line that is read takes half a second more.
    image = Image.new("RGB", (480, 480), "white")
    ImageDraw.Draw(image).text((40, 40), "Welcome", fill="black", font_size=32)
    read_page_text(image)


def read_hints(image: Image.Image, hints: Hints) -> tuple[TextLine, ...]:
    """What a model is told about `image`: its lines as `read_page_text` finds them, with their
    colours, or with the areas on which they lie (`page_boxes.with_layout`)."""
    lines = read_page_text(image)
    if hints == "layout":
        from w2c_tui.models.page_boxes import with_layout

        return with_layout(image, lines)
    return with_colors(image, lines) if hints == "colors" else lines


def with_colors(image: Image.Image, lines: Sequence[TextLine]) -> tuple[TextLine, ...]:
    """`lines` with the colour of their letters and of what is behind them, read off `image`.

    Behind is the commonest colour of the box; the letters are what differs most from it, since the
    edges of letters are mixtures of both.
    """
    return tuple(_with_colors(image, line) for line in lines)


_FEWEST_PIXELS = 4


def _with_colors(image: Image.Image, line: TextLine) -> TextLine:
    left, top, right, bottom = line.box
    box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    if box[2] <= box[0] or box[3] <= box[1]:
        return line
    pixels = np.asarray(image.crop(box).convert("RGB")).reshape(-1, 3)
    if len(pixels) > MAX_SAMPLED_PIXELS:
        pixels = pixels[:: -(-len(pixels) // MAX_SAMPLED_PIXELS)]
    packed = pixels.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    values, counts = np.unique(packed, return_counts=True)
    ground = _unpacked(values[counts.argmax()])
    apart = np.abs(pixels.astype(np.int32) - ground).sum(axis=1)
    if (apart > 0).sum() < _FEWEST_PIXELS:
        return msgspec.structs.replace(line, ground=ground)
    # The very largest difference may be a speck of something else.
    far = np.partition(apart, -_FEWEST_PIXELS)[-_FEWEST_PIXELS]
    inside = pixels[(apart >= 0.92 * far) & (apart <= 1.02 * far)]
    red, green, blue = np.median(inside, axis=0).round().astype(int).tolist()
    return msgspec.structs.replace(line, ink=(red, green, blue), ground=ground)


def _unpacked(value: Any) -> tuple[int, int, int]:
    return int(value) >> 16, int(value) >> 8 & 255, int(value) & 255


@cache
def _engine() -> Any:
    try:
        import onnxruntime  # noqa: F401
        import rapidocr
    except ImportError as error:
        raise MissingPackageError(
            f"Text recognition needs the packages rapidocr and onnxruntime ({error}).",
            hint="Install them with: pip install 'w2c-tui[ocr]'",
        ) from error
    weights = Path(rapidocr.__file__).parent / "models"
    return rapidocr.RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.text_score": MIN_SCORE,
            # Screenshots are upright: the classifier that turns lines by 180° has nothing to do.
            "Global.use_cls": False,
            # The scaling is done here; the detector's own would blow up strips and thin columns.
            "Global.max_side_len": 4 * MAX_WIDTH_PX,
            "Det.limit_type": "max",
            "Det.limit_side_len": 4 * MAX_WIDTH_PX,
            # A path makes it read that file, where a mere name may start a download.
            "Det.model_path": str(_weights_file(weights, "det")),
            "Rec.model_path": str(_weights_file(weights, "rec")),
            # onnxruntime's own choice pins threads to cores, which containers refuse out loud.
            "EngineConfig.onnxruntime.intra_op_num_threads": min(os.cpu_count() or 1, 8),
        }
    )


def _weights_file(folder: Path, part: str) -> Path:
    found = sorted(folder.glob(f"*_{part}_*.onnx"))
    if not found:
        raise MissingPackageError(
            f"The installed rapidocr carries no *_{part}_*.onnx in {folder}.",
            hint="Reinstall it with: pip install --force-reinstall 'w2c-tui[ocr]'",
        )
    return found[0]


def _scale(size: tuple[int, int]) -> float:
    """Pixels read per pixel of the page."""
    width, height = size
    tallest = BAND_PX + (MAX_BANDS - 1) * (BAND_PX - OVERLAP_PX)
    return min(
        2.0 if min(size) < MIN_SIDE_PX else 1.0,
        MAX_WIDTH_PX / max(width, 1),
        tallest / max(height, 1),
    )


def _bands(image: Image.Image, scale: float) -> Iterator[tuple[Any, int, float, float]]:
    """Bands of the scaled page: BGR pixels, offset, first and last y that the band answers for."""
    width, height = (max(round(side * scale), 1) for side in image.size)
    # Only one band is ever scaled at a time, so that a tall page costs no second full copy.
    for top in range(0, max(height - OVERLAP_PX, 1), BAND_PX - OVERLAP_PX):
        bottom = min(top + BAND_PX, height)
        part = image.resize(
            (width, bottom - top),
            Image.Resampling.BICUBIC,
            box=(0, top / scale, image.width, min(bottom / scale, image.height)),
        )
        pixels = np.ascontiguousarray(np.asarray(part.convert("RGB"))[:, :, ::-1])
        first = top + OVERLAP_PX / 2 if top else 0.0
        last = bottom - OVERLAP_PX / 2 if bottom < height else float(height)
        yield pixels, top, first, last


def _read_band(
    engine: Any, pixels: Any, top: int, first: float, last: float
) -> Iterator[tuple[str, Any, float]]:
    result = engine(pixels)
    for text, corners, score in zip(
        result.txts or (), _or_empty(result.boxes), result.scores or (), strict=True
    ):
        corners = corners + np.array([0, top])
        # A little slack on both sides: a line on the border is then found twice, never missed.
        if first - 8 <= corners[:, 1].mean() <= last + 8:
            yield text, corners, float(score)


def _or_empty(boxes: Any) -> Any:
    return () if boxes is None else boxes


def _in_pixels(raw: tuple[str, Any, float], scale: float, size: tuple[int, int]) -> TextLine | None:
    text, corners, score = raw
    # Icon fonts come out as private-use characters, of no use to a model.
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    limits = np.array(size)
    left, top = np.clip(np.floor(corners.min(axis=0) / scale), 0, limits).astype(int).tolist()
    right, bottom = np.clip(np.ceil(corners.max(axis=0) / scale), 0, limits).astype(int).tolist()
    if not any(c.isalnum() or c in "$€£¥+" for c in text) or right <= left or bottom <= top:
        return None
    if len(text) == 1 and not text.isdigit() and score < MIN_LONE_SCORE:
        return None
    return TextLine(text=text, box=(left, top, right, bottom), score=round(score, 3))


def _without_repeats(lines: Sequence[TextLine]) -> list[TextLine]:
    """Lines whose boxes mostly coincide are one line seen in two bands; the surer one stays."""
    kept: list[TextLine] = []
    for line in sorted(lines, key=lambda line: -line.score):
        if all(_overlap(line.box, other.box) < 0.5 for other in kept):
            kept.append(line)
    return kept


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Shared area as a share of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / smaller


def _without_icons(lines: list[TextLine]) -> list[TextLine]:
    """Icons read as one Chinese character, on pages that have no Chinese text otherwise."""
    if any(len(line.text) > 1 and any(map(_is_ideograph, line.text)) for line in lines):
        return lines
    return [line for line in lines if not (len(line.text) == 1 and _is_ideograph(line.text))]


def _is_ideograph(character: str) -> bool:
    return "\u2e80" <= character <= "\u9fff"


def _in_reading_order(lines: Sequence[TextLine]) -> tuple[TextLine, ...]:
    rows: list[list[TextLine]] = []
    for line in sorted(lines, key=lambda line: line.box[1] + line.box[3]):
        if rows and _same_row(rows[-1][0], line):
            rows[-1].append(line)
        else:
            rows.append([line])
    return tuple(line for row in rows for line in sorted(row, key=lambda line: line.box[0]))


def _same_row(first: TextLine, line: TextLine) -> bool:
    apart = abs(sum(line.box[1::2]) - sum(first.box[1::2])) / 2
    return apart <= 0.5 * min(b[3] - b[1] for b in (first.box, line.box))
