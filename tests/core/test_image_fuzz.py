"""Damaged and hostile files: each opens as an RGB picture or is refused with one ImageError."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from w2c_tui.core.errors import ImageError
from w2c_tui.core.image import ImageLimits, open_image

PER_FORMAT = 200
LIMITS = ImageLimits(max_file_bytes=2**20, max_pixels=4_000_000)
MOST_SECONDS = 5.0
MOST_BYTES = 400 * 2**20

GREY = Image.fromarray(np.random.default_rng(7).integers(0, 256, (24, 31), np.uint8))
RGB = Image.merge(
    "RGB", [Image.linear_gradient("L").rotate(90 * i).resize((40, 28)) for i in (0, 1, 2)]
)
RGBA = RGB.copy()
RGBA.putalpha(Image.radial_gradient("L").resize((40, 28)))
WIDE = Image.fromarray(np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) * 100)
FLOAT = Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30))
TURNED = Image.Exif()
TURNED[0x0112] = 6
TURNED[0x010E] = "a description"
MORE = {"save_all": True, "append_images": [RGB.rotate(90)]}

SEEDS: dict[str, list[tuple[Image.Image, dict[str, object]]]] = {
    "PNG": [
        (RGB, {"exif": TURNED}),
        (RGBA, {}),
        (GREY, {"transparency": 9}),
        (RGB.quantize(16), {"transparency": bytes(range(0, 160, 10))}),
        (RGB, {"transparency": (1, 2, 3), "dpi": (72, 72)}),
        (WIDE, {}),
        (GREY.convert("1"), {}),
        (RGB, MORE),
    ],
    "JPEG": [
        (RGB, {"exif": TURNED}),
        (GREY, {}),
        (RGB, {"progressive": True}),
        (RGB.convert("CMYK"), {}),
        (RGB, {"comment": b"x", "restart_marker_rows": 1}),
    ],
    "WEBP": [(RGB, {}), (RGBA, {"lossless": True}), (RGB, MORE), (RGB, {"exif": TURNED})],
    "GIF": [(RGB, {}), (GREY, {"interlace": 1}), (RGB, MORE), (RGB, {"transparency": 3})],
    "BMP": [(RGB, {}), (GREY, {}), (RGB.quantize(200), {}), (GREY.convert("1"), {}), (RGBA, {})],
    "TIFF": [
        (RGB, {"exif": TURNED}),
        (RGB, {"compression": "tiff_lzw"}),
        (RGBA, {"compression": "tiff_adobe_deflate"}),
        (RGB, {"compression": "jpeg"}),
        (RGB, {"compression": "packbits"}),
        (GREY.convert("1"), {"compression": "group4"}),
        (WIDE, {}),
        (FLOAT, {}),
        (RGB.convert("CMYK"), {}),
        (RGB.quantize(8), {}),
        (RGB, MORE),
    ],
    "AVIF": [(RGB, {"exif": TURNED}), (RGBA, {}), (RGB, MORE)],
}


def seeds(format: str) -> list[bytes]:
    found = []
    for image, options in SEEDS[format]:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        found.append(buffer.getvalue())
    return found


def with_png_checksums(data: bytes) -> bytes:
    """The same chunks with right checksums, so that a mutation reaches what is behind them."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = min(struct.unpack(">I", data[at : at + 4])[0], len(data) - at - 12)
        body = data[at + 4 : at + 8 + length]
        out += struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        start = chance.randrange(len(out))
        match chance.randrange(8):
            case 0:
                for _ in range(chance.choice((1, 3, 20))):
                    out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
            case 1:
                del out[max(1, start) :]
            case 2:
                other = chance.choice(others)
                out[start:start] = other[chance.randrange(len(other)) :]
            case 3:
                other = chance.choice(others)
                out[start:] = other[chance.randrange(len(other)) :]
            case 4:
                at = chance.randrange(min(64, len(out)))
                value = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
                out[at : at + chance.choice((1, 2, 4))] = bytes([value]) * chance.choice((1, 2, 4))
            case 5:
                number = chance.choice((0, 1, 300, 65535, 2**24, 2**31 - 1, 2**32 - 1))
                out[start : start + 4] = struct.pack(chance.choice("<>") + "I", number)
            case 6:
                out[start : start + chance.randrange(1, 200)] = b""
            case 7:
                out[start : start + 50] = out[start : start + 50] * chance.choice((2, 50))
        if not out:
            out += b"\0"
    if out[:4] == b"\x89PNG" and chance.random() < 0.7:
        return with_png_checksums(bytes(out))
    return bytes(out)


def peak_bytes() -> int | None:
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else None


def reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def outcome(data: bytes) -> str:
    try:
        image = open_image(data, LIMITS)
    except ImageError as error:
        return "refused" if error.hint and error.message.isprintable() else "badly worded"
    fits = image.width * image.height <= LIMITS.max_pixels
    complete = len(image.tobytes()) == image.width * image.height * 3 > 0
    return "opened" if image.mode == "RGB" and fits and complete else "badly opened"


@pytest.mark.parametrize("format", SEEDS)
def test_every_mutation_opens_or_is_refused(format: str, capfd: pytest.CaptureFixture[str]) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    own = seeds(format)
    others = own + [seeds(other)[0] for other in SEEDS if other != "AVIF"]
    assert all(open_image(seed, LIMITS).mode == "RGB" for seed in own)
    chance = random.Random(f"w2c {format}")
    outcomes: Counter[str] = Counter()
    reset_peak()
    before = peak_bytes()
    for number in range(PER_FORMAT):
        data = mutated(own[number % len(own)], others, chance)
        start = time.monotonic()
        outcomes[outcome(data)] += 1
        assert time.monotonic() - start < MOST_SECONDS, f"number {number} took too long"
    assert set(outcomes) <= {"opened", "refused"}
    assert outcomes["refused"] > PER_FORMAT // 10
    assert outcomes["opened"] > PER_FORMAT // 40
    after = peak_bytes()
    if before is not None and after is not None:
        assert after - before < MOST_BYTES
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\xff\xd8\xff\xe0",
        b"RIFF\xff\0\0\0WEBPVP8L",
        b"RIFF\xff\0\0\0WEBPVP8X\x0a\0\0\0",
        b"GIF89a",
        b"BM",
        b"II*\0\x08\0\0\0",
        b"MM\0*\0\0\0\x08",
        b"II+\0\x08\0\0\0",
        b"\0\0\0\x20ftypavif",
    ],
    ids=[
        "none",
        "PNG",
        "JPEG",
        "WebP VP8L",
        "WebP VP8X",
        "GIF",
        "BMP",
        "TIFF",
        "TIFF big-endian",
        "BigTIFF",
        "AVIF",
    ],
)
def test_noise_behind_a_signature_is_refused(signature: bytes) -> None:
    chance = random.Random(f"noise {signature!r}")
    for length in (0, 1, 3, 10, 30, 100, 1000, 30_000):
        with pytest.raises(ImageError):
            open_image(signature + chance.randbytes(length), LIMITS)
