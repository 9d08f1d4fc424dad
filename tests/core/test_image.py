"""From a reference to a picture and from a picture to pixels, with real files and a real server."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image, features

from w2c_tui.core.conversation import content_hash
from w2c_tui.core.errors import CheckpointError, ImageError
from w2c_tui.core.image import (
    ImageLimits,
    ImageSpec,
    attachment_from_bytes,
    attachment_from_clipboard,
    load_attachment,
    open_image,
    parse_reference,
    pixel_values,
    prepare,
    read_reference,
    scale_of,
    split_references,
)

LOCAL = ImageLimits(url_timeout_s=5, allow_private_hosts=True)
posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX files")
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


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


def png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + png_chunk(b"IEND", b"")


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


# References


@pytest.fixture
def shot(tmp_path: Path) -> Path:
    path = tmp_path / "My Shot (1).png"
    path.write_bytes(encoded(picture()))
    return path


def test_a_plain_path_and_surrounding_whitespace(shot: Path) -> None:
    assert parse_reference(f"  {shot}\n") == str(shot)


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_are_removed(shot: Path, quote: str) -> None:
    assert parse_reference(f"{quote}{shot}{quote}") == str(shot)


def test_file_urls_are_decoded(shot: Path) -> None:
    for url in (
        shot.as_uri(),
        shot.as_uri().replace("file://", "file://localhost"),
        shot.as_uri().replace("file://", "FILE:"),
        f"'{shot.as_uri()}'",
    ):
        assert load_attachment(url).source == str(shot)


def test_a_file_url_of_another_machine_is_refused() -> None:
    refused(lambda: parse_reference("file://fileserver/share/a.png", windows=False), "fileserver")


@posix_only
def test_backslash_escapes_of_a_dragged_path_are_undone(shot: Path) -> None:
    dragged = str(shot).replace(" ", r"\ ").replace("(", r"\(").replace(")", r"\)")
    assert parse_reference(dragged) == str(shot)
    half_escaped = str(shot).replace("(", r"\(").replace(")", r"\)")
    assert parse_reference(half_escaped) == str(shot)


@posix_only
def test_shell_quoting_of_an_apostrophe_is_undone(tmp_path: Path) -> None:
    path = tmp_path / "it's.png"
    path.write_bytes(b"x")
    assert parse_reference(f"'{tmp_path}/it'\\''s.png'") == str(path)
    assert parse_reference(str(path)) == str(path)


@posix_only
def test_the_literal_path_wins_over_its_unescaped_reading(tmp_path: Path) -> None:
    literal, plain = tmp_path / r"a\ b.png", tmp_path / "a b.png"
    plain.touch()
    assert parse_reference(str(literal)) == str(plain)
    literal.touch()
    assert parse_reference(str(literal)) == str(literal)
    quoted = tmp_path / "'q.png'"
    quoted.touch()
    with contextlib.chdir(tmp_path):
        assert parse_reference("'q.png'") == "'q.png'"


def test_windows_paths_keep_their_backslashes() -> None:
    path = r"C:\Users\me\new shot.png"
    assert parse_reference(f'"{path}"', windows=True) == path
    assert parse_reference("file:///C:/Users/me/new%20shot.png", windows=True) == path
    assert parse_reference("file://server/share/a.png", windows=True) == r"\\server\share\a.png"
    assert parse_reference(path, windows=False) == path


def test_the_home_folder(shot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shot.parent))
    monkeypatch.setenv("USERPROFILE", str(shot.parent))
    assert parse_reference(f"~/{shot.name}") == os.path.expanduser(f"~/{shot.name}")
    assert load_attachment(f"'~/{shot.name}'").name == shot.name


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_either_unicode_form(tmp_path: Path, forms: tuple[str, str]) -> None:
    on_disk, typed = (unicodedata.normalize(form, "Übersicht é.png") for form in forms)  # type: ignore[arg-type]
    assert on_disk != typed
    (tmp_path / on_disk).write_bytes(encoded(picture()))
    assert load_attachment(str(tmp_path / typed)).width == 40


@posix_only
def test_a_name_that_is_not_utf8_still_opens(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    try:
        Path(path).write_bytes(encoded(picture()))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for reference in (path, f"file://{tmp_path}/caf%E9.png"):
        attachment = load_attachment(reference)
        assert attachment.name == r"caf\udce9.png"
        msgspec.json.encode(attachment.source)


def test_urls_pass_through() -> None:
    assert (
        parse_reference(" 'https://example.org/a b.png?x=1' ") == "https://example.org/a b.png?x=1"
    )


@pytest.mark.parametrize("blank", ["", "  \n", "''", '" "'])
def test_blank_references_are_refused(blank: str) -> None:
    refused(lambda: parse_reference(blank), "No image")


@posix_only
def test_a_paste_of_several_dragged_paths(shot: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.png"
    other.touch()
    escaped = str(shot).replace(" ", r"\ ").replace("(", r"\(").replace(")", r"\)")
    for paste in (f"{escaped} {other}", f"'{shot}' \"{other}\" ", f"{shot}\n{other}\n"):
        assert split_references(paste) == [str(shot), str(other)]
    urls = ["https://a.example/1.png", shot.as_uri()]
    assert split_references(" ".join(urls)) == [urls[0], str(shot)]


def test_a_missing_one_of_several_is_still_its_own_reference(shot: Path) -> None:
    assert split_references(f"'{shot}' /nowhere/at/all.png", windows=False) == [
        str(shot),
        "/nowhere/at/all.png",
    ]


def test_an_unquoted_name_with_spaces_stays_whole(shot: Path) -> None:
    assert split_references(str(shot)) == [str(shot)]
    assert split_references("my missing shot.png") == ["my missing shot.png"]
    assert split_references("it's missing.png") == ["it's missing.png"]
    assert split_references(" \n ") == []


def test_a_windows_paste() -> None:
    paste = r'"C:\My Shots\a.png" D:\b.png'
    assert split_references(paste, windows=True) == [r"C:\My Shots\a.png", r"D:\b.png"]


# Files


def test_an_attachment_describes_the_file(shot: Path) -> None:
    attachment = load_attachment(shot)
    assert attachment.data == shot.read_bytes()
    assert attachment.sha256 == content_hash(attachment.data)
    assert (attachment.width, attachment.height) == (40, 30)
    assert (attachment.name, attachment.source) == (shot.name, str(shot))
    assert np.array_equal(np.asarray(open_image(attachment)), np.asarray(picture()))


def test_a_missing_file_is_named_with_its_likely_spelling(shot: Path) -> None:
    error = refused(lambda: load_attachment(shot.parent / "My Shot (2).png"), "My Shot (2).png")
    assert "Did you mean" in error.hint
    assert "My Shot (1).png" in error.hint
    refused(lambda: load_attachment("/nowhere/x.png"), "/nowhere/x.png", "does not exist")
    refused(lambda: load_attachment(shot / "x.png"), "does not exist")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    refused(lambda: load_attachment(tmp_path), "is a folder")


@posix_only
def test_pipes_and_devices_are_refused_without_blocking(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    start = time.monotonic()
    refused(lambda: load_attachment(pipe), "pipe.png", "device or pipe")
    refused(lambda: load_attachment("/dev/zero"), "device or pipe")
    assert time.monotonic() - start < 1


@posix_only
def test_a_file_without_permission(shot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, and so acts as nobody for a moment."""
    shot.chmod(0)
    shot.parent.chmod(0o755)
    monkeypatch.chdir(shot.parent)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        refused(lambda: load_attachment(shot.name), "may not be read", shot.name)
    finally:
        os.seteuid(user)


@posix_only
def test_circular_links_and_overlong_names(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    refused(lambda: load_attachment(tmp_path / "a.png"), "circle")
    refused(lambda: load_attachment("x" * 5000 + ".png"), "too long")
    refused(lambda: load_attachment("a\0b.png"), "a\\x00b.png")
    refused(lambda: load_attachment("a\ud800b.png"), "a\\ud800b.png")


def test_control_characters_of_a_name_never_reach_the_terminal(tmp_path: Path) -> None:
    refused(
        lambda: load_attachment("/tmp/\x1b]0;owned\x07\u202egnp.x"), "\\x1b]0;owned\\x07\\u202e"
    )
    attachment = attachment_from_bytes(encoded(picture()), name="a\x1b[2J.png")
    assert attachment.name == "a\\x1b[2J.png"


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(40 * 2**30)
    start = time.monotonic()
    refused(lambda: load_attachment(path), "sparse.png", "50 MiB")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.png", b"", "empty"),
        ("notes.png", b"just some notes\n", "not a picture"),
        ("drawing.svg", b"<?xml version='1.0'?>\n<svg width='1'>", "SVG"),
        ("drawing.svg", b"<!-- x -->\n<svg>", "SVG"),
        ("paper.pdf", b"%PDF-1.7\n", "PDF"),
        ("page.html", b"\n<!DOCTYPE html><html><svg ></svg>", "HTML"),
        ("page.html", b"<!-- saved --><html>", "HTML"),
        ("photo.heic", b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        ("clip.mp4", b"\0\0\0\x18ftypisom\0\0\0\0", "video"),
        ("a.jxl", b"\xff\x0a\xfa\x7f", "JPEG XL"),
        ("a.psd", b"8BPS\0\1", "Photoshop"),
        ("a.svgz", gzip.compress(b"<svg></svg>"), "compressed"),
        ("header.png", b"\x89PNG\r\n\x1a\n1234", "damaged"),
        ("icon.ppm", b"P6 2 2 255 " + bytes(12), "not a picture"),
        ("post.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    ],
)
def test_what_is_not_a_picture_is_recognised(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(data)
    refused(lambda: load_attachment(tmp_path / name), name, words)


@pytest.mark.parametrize(
    "format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", pytest.param("AVIF", marks=needs_avif)]
)
def test_truncated_files_are_refused(format: str) -> None:
    data = encoded(picture(200, 200), format)
    assert open_image(data).size == (200, 200)
    refused(lambda: open_image(data[: len(data) // 2]), "image")


# Bombs


def bomb(width: int, height: int) -> bytes:
    rows = zlib.compress(bytes(1000))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_pixel_bomb_is_refused(size: tuple[int, int]) -> None:
    error = refused(lambda: open_image(bomb(*size)), "too many pixels", "50 megapixels")
    assert size[0] > 15_000 or "10000 x 10000" in error.message


def test_other_formats_bombs_are_refused_too() -> None:
    gif = b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b"," + bytes(9) + b"\2;"
    webp = bytearray(encoded(picture(), "WEBP"))
    webp[26:30] = struct.pack("<HH", 9000, 9000)
    bmp = bytearray(encoded(picture(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)
    for data in (gif, webp, bmp):
        refused(lambda data=data: open_image(bytes(data)), "too many pixels")


def test_a_full_page_screenshot_passes_and_an_endless_one_does_not() -> None:
    assert open_image(encoded(Image.new("1", (1280, 30_000)))).size == (1280, 30_000)
    refused(lambda: open_image(encoded(Image.new("1", (1, 40_000)))), "1 x 40000")


def test_files_made_to_be_expensive_are_refused() -> None:
    jpeg = encoded(picture(), "JPEG", progressive=True)
    start = jpeg.index(b"\xff\xda")
    refused(lambda: open_image(jpeg[:start] + jpeg[start:-2] * 100 + jpeg[-2:]), "too long to open")
    tile = zlib.compress(bytes(64 * 64))
    for edge, opens in ((64, True), (16_000, False)):
        tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: edge, 323: edge}
        tags |= {324: 10 + 12 * 10 + 4, 325: len(tile)}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + tile
        if opens:
            assert open_image(tiff).size == (16, 16)
        else:
            refused(lambda tiff=tiff: open_image(tiff), "too long to open")


def test_the_limits_are_the_callers() -> None:
    data = encoded(picture(100, 100))
    refused(lambda: open_image(data, ImageLimits(max_pixels=9_999)), "100 x 100")
    refused(lambda: open_image(data, ImageLimits(max_file_bytes=100)), "too large")
    refused(lambda: open_image(data, ImageLimits(max_side_px=99)), "99 px")


# Decoding


def close_to(image: Image.Image, expected: Image.Image, tolerance: float) -> bool:
    assert image.mode == "RGB"
    assert image.size == expected.size
    first, second = (np.asarray(i.convert("RGB")).astype(int) for i in (image, expected))
    return float(np.abs(first - second).mean()) <= tolerance


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95}, 3),
        ("JPEG", {"quality": 95, "progressive": True}, 3),
        pytest.param("AVIF", {"quality": 95}, 3, marks=needs_avif),
    ],
)
def test_every_format_opens(format: str, options: dict[str, object], tolerance: float) -> None:
    gradient = Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * i) for i in range(3)])
    assert close_to(open_image(encoded(gradient, format, **options)), gradient, tolerance)


@pytest.mark.parametrize(
    "format", ["GIF", "PNG", "WEBP", pytest.param("AVIF", marks=needs_avif), "TIFF"]
)
def test_an_animation_is_its_first_frame(format: str) -> None:
    red, blue = (Image.new("RGB", (20, 20), color) for color in ("red", "blue"))
    data = encoded(red, format, save_all=True, append_images=[blue])
    with Image.open(io.BytesIO(data)) as reread:
        assert reread.n_frames == 2
    assert close_to(open_image(data), red, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    stored = Image.new("RGB", (30, 20), "white")
    stored.paste("red", (0, 0, 15, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encoded(stored, format, exif=exif))
    # Where the stored upper left corner is to be seen: EXIF 2.3, section 4.6.4.
    corner = {
        1: "00", 2: "10", 3: "11", 4: "01", 5: "00", 6: "10", 7: "11", 8: "01",
    }[orientation]  # fmt: skip
    assert opened.size == ((30, 20) if orientation < 5 else (20, 30))
    x, y = (int(edge) * (length - 8) + 4 for edge, length in zip(corner, opened.size, strict=True))
    red, green, _ = opened.getpixel((x, y))  # type: ignore[misc]
    assert red > 200
    assert green < 90
    attachment = attachment_from_bytes(encoded(stored, format, exif=exif))
    assert (attachment.width, attachment.height) == opened.size


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert open_image(data).size == (40, 30)


def test_pillows_warnings_stay_inside() -> None:
    """Warnings are errors here: one about an invalid animation would cost the picture."""
    data = png(1, 1, 8, 0, b"\0\x50", png_chunk(b"acTL", struct.pack(">II", 0, 0)))
    with pytest.warns(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(data))
    assert open_image(data).getpixel((0, 0)) == (80, 80, 80)


def on_white(color: tuple[int, ...], alpha: int) -> np.ndarray:
    return np.array([255 + (c - 255) * alpha / 255 for c in color])


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_goes_on_white(format: str) -> None:
    for alpha in (0, 1, 100, 255):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        data = encoded(Image.new("RGBA", (4, 4), (200, 30, 90, alpha)), format, **options)
        pixel = np.array(open_image(data).getpixel((1, 1)))
        assert np.abs(pixel - on_white((200, 30, 90), alpha)).max() <= 1


def test_grey_with_alpha_goes_on_white() -> None:
    pixel = open_image(encoded(Image.new("LA", (4, 4), (0, 51)))).getpixel((0, 0))
    assert pixel == (204, 204, 204)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_colour_goes_on_white(format: str) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    opened = open_image(encoded(image, format, transparency=0))
    assert opened.getpixel((0, 0)) == (0, 0, 255)
    assert opened.getpixel((2, 2)) == (255, 255, 255)


def test_a_palette_with_partial_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 9, 9, 9])
    pixel = open_image(encoded(image, "PNG", transparency=bytes([51, 255]))).getpixel((0, 0))
    assert pixel == (204, 204, 204)


@pytest.mark.parametrize(
    ("mode", "key", "shown"),
    [("RGB", (10, 20, 30), (1, 2, 3)), ("L", 7, 8), ("1", 0, 255)],
)
def test_a_colour_key_goes_on_white(mode: str, key: object, shown: object) -> None:
    image = Image.new(mode, (2, 1), key)  # type: ignore[arg-type]
    image.putpixel((1, 0), shown)  # type: ignore[arg-type]
    opened = open_image(encoded(image, "PNG", transparency=key))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    expected = Image.new(mode, (1, 1), shown).convert("RGB").getpixel((0, 0))  # type: ignore[arg-type]
    assert opened.getpixel((1, 0)) == expected


def test_16_bit_colour_keys() -> None:
    rgb = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x8000, 0, 0xFFFF)
    data = png(2, 1, 16, 2, rgb, png_chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)))
    opened = open_image(data)
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 0)) == (128, 0, 255)
    grey = b"\0" + struct.pack(">2H", 0x1234, 0x1235)
    opened = open_image(png(2, 1, 16, 0, grey, png_chunk(b"tRNS", struct.pack(">H", 0x1234))))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 0)) == (18, 18, 18)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(format: str) -> None:
    values = np.array([[0, 128, 129, 257, 0x8000, 65407, 65535]], np.uint16)
    opened = open_image(encoded(Image.fromarray(values), format))
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
    dark = open_image(encoded(Image.fromarray(values // 300), format))
    assert np.asarray(dark).max() == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[-5, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0, 500_000, 1_000_000]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 200]], np.float32), [0, 100, 200]),
        (np.array([[np.nan, np.inf, 0.5]], np.float32), [0, 128, 128]),
        (np.array([[-np.inf, -3, 1e30]], np.float32), [0, 0, 255]),
        (np.zeros((1, 3), np.float32), [0, 0, 0]),
    ],
)
def test_wide_grey_is_scaled_by_its_usual_white(values: np.ndarray, expected: list[int]) -> None:
    opened = open_image(encoded(Image.fromarray(values), "TIFF"))
    assert np.asarray(opened)[0, :, 1].tolist() == expected


def test_cmyk_becomes_rgb() -> None:
    for format in ("JPEG", "TIFF"):
        opened = open_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), format))
        red, green, blue = opened.getpixel((8, 8))  # type: ignore[misc]
        assert red > 240
        assert max(green, blue) < 15


def test_a_picture_carries_nothing_of_its_file() -> None:
    exif = Image.Exif()
    exif[0x010F] = "camera"
    assert open_image(encoded(picture(), "JPEG", exif=exif, comment=b"x")).info == {}


# The network


@dataclass
class Site:
    url: str
    requests: list[str] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what is tested here."""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content_Length": str(len(body)), **headers}.items():
                if value:
                    self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            here.requests.append(f"{self.headers['Host']} {self.path}")
            good = encoded(picture())
            match self.path.split("?")[0].rsplit("/", 1):
                case [_, "shot.png" | "my%20shot.png" | "reflected"]:
                    self.answer(good)
                case ["/redirect", count]:
                    left = int(count) - 1
                    self.answer(b"", 302, Location=f"/redirect/{left}" if left else "../shot.png")
                case [_, "to"]:
                    self.answer(b"", 301, Location=self.path.split("?")[1])
                case [_, "loop"]:
                    self.answer(b"", 307, Location="/loop")
                case [_, "page"]:
                    self.answer(b"<!doctype html><title>x</title>", Content_Type="image/png")
                case [_, "gzip"]:
                    self.answer(gzip.compress(good), Content_Encoding="gzip")
                case [_, "gzip-bomb"]:
                    self.answer(gzip.compress(bytes(2**27)), Content_Encoding="gzip")
                case [_, "brotli"]:
                    self.answer(good, Content_Encoding="br")
                case [_, "announces-too-much"]:
                    self.answer(b"", Content_Length=str(10**12))
                case [_, "announces-nonsense"]:
                    self.answer(b"", Content_Length="9" * 5000)
                case [_, "ends-early"]:
                    self.answer(good[:50], Content_Length=str(len(good)))
                case [_, "endless"]:
                    self.answer(b"", Content_Length="")
                    while not here.stopped.is_set():
                        self.wfile.write(bytes(2**16))
                case [_, "dribble"]:
                    self.answer(b"", Content_Length="1000000")
                    while not here.stopped.wait(0.05):
                        self.wfile.write(b"x")
                case [_, "dribble-header"]:
                    self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
                    while not here.stopped.wait(0.05):
                        self.wfile.write(b"x")
                case [_, "silence"]:
                    here.stopped.wait(30)
                case [_, "nonsense"]:
                    self.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")
                case [_, "hangs-up"]:
                    self.connection.shutdown(socket.SHUT_RDWR)
                case [_, "login"]:
                    self.answer(b"", 403)
                case _:
                    self.answer(b"no", 404)

    server = _Server(("127.0.0.1", 0), Handler)
    here = Site(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield here
    here.stopped.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_a_picture_is_fetched(site: Site) -> None:
    attachment = load_attachment(f"{site.url}/a/my%20shot.png?size=1", LOCAL)
    assert attachment.data == encoded(picture())
    assert attachment.name == "my shot.png"
    assert attachment.source == f"{site.url}/a/my%20shot.png?size=1"


def test_the_server_sees_the_name_that_was_asked_for(site: Site) -> None:
    url = site.url.replace("127.0.0.1", "localhost")
    load_attachment(f"{url}/shot.png", LOCAL)
    assert site.requests[-1] == f"{url.removeprefix('http://')} /shot.png"


def test_a_password_in_a_url_is_shown_nowhere(site: Site) -> None:
    url = site.url.replace("//", "//me:secret@")
    assert "secret" not in load_attachment(f"{url}/shot.png", LOCAL).source
    assert "secret" not in str(refused(lambda: load_attachment(f"{url}/missing", LOCAL), "404"))


def test_redirects_are_followed_up_to_the_limit(site: Site) -> None:
    assert load_attachment(f"{site.url}/redirect/5", LOCAL).width == 40
    refused(lambda: load_attachment(f"{site.url}/redirect/6", LOCAL), "more than 5 times")


def test_a_redirect_loop_ends(site: Site) -> None:
    refused(lambda: load_attachment(f"{site.url}/loop", LOCAL), "/loop", "redirected")


@pytest.mark.parametrize("target", ["ftp://example.org/a.png", "file:///etc/passwd", "data:,x"])
def test_a_redirect_leaves_http_for_nothing_else(site: Site, target: str) -> None:
    refused(lambda: load_attachment(f"{site.url}/to?{target}", LOCAL), "not an http")


@pytest.mark.parametrize(
    "url", ["ftp://example.org/a.png", "data:image/png;base64,AAAA", "x-y://z"]
)
def test_other_schemes_are_refused(url: str) -> None:
    refused(lambda: load_attachment(url), url, "not an http")


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("missing.png", "404"),
        ("login", "403"),
        ("page", "HTML"),
        ("brotli", "compressed"),
        ("ends-early", "cannot be fetched"),
        ("nonsense", "cannot be fetched"),
        ("hangs-up", "cannot be fetched"),
        ("announces-nonsense", "cannot be fetched"),
    ],
)
def test_what_a_server_does_wrong(site: Site, path: str, word: str) -> None:
    refused(lambda: load_attachment(f"{site.url}/{path}", LOCAL), f"{site.url}/{path}", word)


@pytest.mark.parametrize("path", ["endless", "announces-too-much", "gzip-bomb"])
def test_a_body_over_the_limit_is_not_read_to_its_end(site: Site, path: str) -> None:
    refused(lambda: load_attachment(f"{site.url}/{path}", LOCAL), "50 MiB")


def test_a_body_that_came_gzipped_unasked_is_read(site: Site) -> None:
    assert load_attachment(f"{site.url}/gzip", LOCAL).width == 40


@pytest.mark.parametrize("path", ["silence", "dribble", "dribble-header"])
def test_the_deadline_is_for_the_whole_download(site: Site, path: str) -> None:
    limits = ImageLimits(url_timeout_s=0.4, allow_private_hosts=True)
    start = time.monotonic()
    refused(lambda: load_attachment(f"{site.url}/{path}", limits), "within 0.4 s")
    assert time.monotonic() - start < 2


def test_no_thread_stays_behind_after_a_timeout(site: Site) -> None:
    limits = ImageLimits(url_timeout_s=0.2, allow_private_hosts=True)
    for path in ("dribble", "dribble-header"):
        refused(lambda path=path: load_attachment(f"{site.url}/{path}", limits), "within")
    until = time.monotonic() + 5
    while any(t.name == "w2c-image" for t in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [t for t in threading.enumerate() if t.name == "w2c-image"]


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(lambda: load_attachment(f"http://127.0.0.1:{port}/a.png", LOCAL), "cannot be fetched")


@pytest.mark.parametrize(
    "url",
    ["http://", "http://[::1", "http://a:99999/", "http://" + "a" * 300 + "/", "http://a\x00b/"],
)
def test_malformed_urls(url: str) -> None:
    refused(lambda: load_attachment(url, LOCAL))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0.0.0.0",
        "0x7f.1",
        "2130706433",
        "169.254.169.254",
        "10.1.2.3",
        "192.168.0.1",
        "100.64.0.1",
        "224.0.0.1",
        "[fe80::1]",
        "[fd00::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ],
)
def test_addresses_inside_are_refused(site: Site, host: str) -> None:
    port = site.url.rpartition(":")[2]
    before = len(site.requests)
    refused(lambda: load_attachment(f"http://{host}:{port}/shot.png"), "inside this machine")
    assert len(site.requests) == before


def test_a_redirect_to_an_address_inside_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy plays the public site: 93.184.215.14 is a public address that is never reached."""
    monkeypatch.setenv("http_proxy", site.url)
    public = "http://93.184.215.14"
    assert load_attachment(f"{public}/shot.png").width == 40
    assert site.requests[-1] == f"93.184.215.14 {public}/shot.png"
    refused(lambda: load_attachment(f"{public}/to?{site.url}/shot.png"), "inside this machine")
    assert site.requests[-1].startswith("93.184.215.14 ")


def test_a_name_that_changes_its_address_is_fetched_from_the_one_that_was_checked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rebinding name server: the second answer differs from the first, which was checked."""
    real, asked = socket.getaddrinfo, []

    def rebinding(host: object, *args: object, **options: object) -> object:
        if host == "rebind.example":
            asked.append(host)
            host = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return real(host, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    port = site.url.rpartition(":")[2]
    assert load_attachment(f"http://rebind.example:{port}/shot.png", LOCAL).width == 40
    assert len(asked) == 1


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_certificate_is_checked_against_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for localhost and not for 127.0.0.1, where both lead."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *subject, *files], check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded(picture()))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with _Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            url = f"https://localhost:{server.server_port}/shot.png"
            refused(lambda: load_attachment(url, LOCAL), "certificate")
            monkeypatch.delenv("SSL_CERT_DIR", raising=False)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            assert load_attachment(url, LOCAL).width == 40
            by_address = url.replace("localhost", "127.0.0.1")
            refused(lambda: load_attachment(by_address, LOCAL), "certificate")
        finally:
            server.shutdown()
            thread.join()


# The clipboard


@pytest.fixture
def clipboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Stands in for the desktop with a `wl-paste` program of our own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the clipboard is a program on Linux only")
    monkeypatch.setenv("PATH", f"{tmp_path}")
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    for name in ("DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)

    def install(script: str) -> None:
        program = tmp_path / "wl-paste"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return install


def test_a_picture_from_the_clipboard(clipboard: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "copied").write_bytes(encoded(picture()))
    clipboard(f"exec /bin/cat {tmp_path}/copied")
    attachment = attachment_from_clipboard()
    assert attachment.name == "clipboard.png"
    assert np.array_equal(np.asarray(open_image(attachment)), np.asarray(picture()))


def test_a_clipboard_without_a_picture(clipboard: Callable[[str], None]) -> None:
    clipboard("echo 'Nothing is copied' >&2; exit 1")
    refused(attachment_from_clipboard, "no image")


def test_a_clipboard_that_fails_or_holds_rubbish(clipboard: Callable[[str], None]) -> None:
    clipboard("echo 'compositor is gone' >&2; exit 1")
    refused(attachment_from_clipboard, "compositor is gone")
    clipboard("echo rubbish")
    refused(attachment_from_clipboard, "cannot be read")
    clipboard("exec /bin/sleep 2")
    refused(lambda: attachment_from_clipboard(ImageLimits(url_timeout_s=0.2)), "cannot be read")


def test_a_machine_without_a_clipboard_program(
    clipboard: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "wl-clipboard" in refused(attachment_from_clipboard).hint
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 22 10.0.0.2 22")
    assert "SSH" in refused(attachment_from_clipboard).hint


# Pixels

SIZES = [
    (336, 336),
    (640, 480),
    (481, 640),
    (1, 40),
    (40, 1),
    (1, 1),
    (337, 335),
    (100, 2500),
    (2500, 101),
    (5, 6),
    (1279, 3001),
]


def expand2square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """LLaVA's own, llava/mm_utils.py."""
    width, height = image.size
    if width == height:
        return image
    if width > height:
        result = Image.new(image.mode, (width, width), color)
        result.paste(image, (0, (width - height) // 2))
        return result
    result = Image.new(image.mode, (height, height), color)
    result.paste(image, ((height - width) // 2, 0))
    return result


def hf_pixels(image: Image.Image, kind: str = "CLIP", **config: object) -> np.ndarray:
    import transformers

    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**config)
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


CLIP_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


@pytest.mark.parametrize("size", SIZES)
def test_padded_pixels_are_llavas_bit_for_bit(size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = hf_pixels(expand2square(image, (122, 116, 104)), **CLIP_336)
    values = pixel_values(image, ImageSpec())
    assert values.dtype == np.float32
    assert values.shape == (3, 336, 336)
    assert np.array_equal(values, expected)


@pytest.mark.parametrize("size", SIZES)
def test_cropped_pixels_are_clips_bit_for_bit(size: tuple[int, int]) -> None:
    image = picture(*size)
    assert np.array_equal(
        pixel_values(image, ImageSpec(aspect="crop")), hf_pixels(image, **CLIP_336)
    )


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA"])
@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_pixels_of_other_modes_are_those_of_the_opened_picture(mode: str, aspect: str) -> None:
    image = picture(64, 45).quantize() if mode == "P" else picture(64, 45, mode)
    opened = open_image(encoded(image, transparency=3) if mode == "P" else encoded(image))
    fed = expand2square(opened, (122, 116, 104)) if aspect == "pad" else opened
    values = pixel_values(opened, ImageSpec(aspect=aspect))  # type: ignore[arg-type]
    assert np.array_equal(values, hf_pixels(fed, **CLIP_336))


@pytest.mark.parametrize(
    "resample", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
)
@pytest.mark.parametrize("size", [(90, 641), (641, 90), (20, 31)])
def test_padding_in_bands_equals_padding_at_once(resample: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    spec = ImageSpec(size=64, resample=resample, pad_color=(1, 2, 250))  # type: ignore[arg-type]
    whole = expand2square(image, (1, 2, 250))
    expected = whole.resize((64, 64), Image.Resampling[resample.upper()])
    assert prepare(image, spec).tobytes() == expected.tobytes()


def test_the_models_view_is_what_is_normalised() -> None:
    image, spec = picture(50, 80), ImageSpec(size=32)
    view = prepare(image, spec)
    assert (view.mode, view.size) == ("RGB", (32, 32))
    assert view.getpixel((0, 16)) == (122, 116, 104)
    plain = msgspec.structs.replace(spec, mean=(0.0,) * 3, std=(1.0,) * 3, rescale_factor=1.0)
    plain = msgspec.structs.replace(plain, pad_color=(122, 116, 104))
    assert np.array_equal(pixel_values(image, plain), np.asarray(view).transpose(2, 0, 1))


def test_padding_a_long_page_takes_no_square_of_memory() -> None:
    """A child measures its own peak, in KiB: the square alone would take 1.2 GiB."""
    script = (
        "from pathlib import Path\nfrom PIL import Image\nfrom w2c_tui.core.image import *\n"
        "image = Image.new('RGB', (200, 18000))\nprepare(image, ImageSpec(size=56))\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc is Linux's")
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 300_000


def test_a_hair_that_crop_would_blow_up_is_refused() -> None:
    refused(lambda: prepare(Image.new("RGB", (1, 30_000)), ImageSpec(aspect="crop")), "1 x 30000")


CLIP_CONFIG = {
    "image_processor_type": "CLIPImageProcessor",
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "do_rescale": True,
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    **CLIP_336,
}
OLD_CLIP = {
    "feature_extractor_type": "CLIPFeatureExtractor",
    "size": 336,
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "resample": 3,
}
DINOV2 = CLIP_CONFIG | {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 56, "width": 56},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 48, "width": 48},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "do_center_crop": None,
    "crop_size": None,
}
LLAVA = CLIP_CONFIG | {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True}
VIT = {"image_processor_type": "ViTImageProcessor", "size": 32, "resample": 2}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("CLIP", CLIP_CONFIG),
        ("CLIP", OLD_CLIP),
        ("CLIP", CLIP_CONFIG | {"do_normalize": False}),
        ("CLIP", CLIP_CONFIG | {"resample": 2, "rescale_factor": 1 / 128}),
        ("Bit", DINOV2),
        ("Bit", DINOV2 | {"crop_size": 71, "size": {"shortest_edge": 60}}),
        ("Siglip", SIGLIP),
        (
            "Siglip",
            {"image_processor_type": "SiglipImageProcessor", "size": {"height": 9, "width": 9}},
        ),
        ("ViT", VIT),
        ("Llava", LLAVA),
        ("Llava", LLAVA | {"do_normalize": False, "do_rescale": False}),
        ("Llava", LLAVA | {"do_pad": False}),
    ],
)
def test_processor_configs_give_the_processors_pixels(kind: str, config: dict[str, object]) -> None:
    spec = ImageSpec.from_processor_config(config)
    arguments = {k: v for k, v in config.items() if not k.endswith("_type")}
    for size in ((70, 50), (33, 91)):
        expected = hf_pixels(picture(*size), kind, **arguments)
        assert np.array_equal(pixel_values(picture(*size), spec), expected)


def test_a_processor_config_holds_the_image_processor() -> None:
    nested = {"processor_class": "LlavaProcessor", "image_processor": LLAVA}
    assert ImageSpec.from_processor_config(nested) == ImageSpec()
    assert ImageSpec.from_processor_config(CLIP_CONFIG) == ImageSpec(aspect="crop")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (CLIP_CONFIG | {"do_center_crop": False}, "not square"),
        (CLIP_CONFIG | {"do_resize": False}, "do_resize"),
        (CLIP_CONFIG | {"crop_size": {"height": 300, "width": 336}}, "crop_size"),
        (CLIP_CONFIG | {"size": {"longest_edge": 336}}, "longest_edge"),
        (CLIP_CONFIG | {"size": {"shortest_edge": 336, "longest_edge": 700}}, "longest_edge"),
        (CLIP_CONFIG | {"size": None}, "size"),
        (CLIP_CONFIG | {"size": "big"}, "shortest_edge"),
        (CLIP_CONFIG | {"crop_size": None}, "crop_size"),
        (CLIP_CONFIG | {"image_std": [1, 1, 0]}, "std"),
        (CLIP_CONFIG | {"image_mean": [1, 1]}, "mean"),
        (CLIP_CONFIG | {"resample": 17}, "resample"),
        (SIGLIP | {"size": {"height": 48, "width": 64}}, "not one square"),
        (SIGLIP | {"size": 10**9}, "size"),
        (LLAVA | {"size": {"shortest_edge": 400}}, "400"),
        (SIGLIP | {"image_processor_type": "Qwen2VLImageProcessor"}, "Qwen2VL"),
        ({}, "size"),
        ({"image_processor": 3}, "cannot be used"),
    ],
)
def test_configs_that_no_spec_can_express_are_refused(config: dict[str, object], word: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be used") as caught:
        ImageSpec.from_processor_config(config)
    assert word in str(caught.value)


def test_a_spec_survives_json() -> None:
    spec = ImageSpec(size=384, aspect="stretch", pad_color=(1, 2, 3))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=ImageSpec) == spec


def test_the_scale_of_a_preparation() -> None:
    assert scale_of((1280, 2560), ImageSpec(size=320)) == pytest.approx(1 / 8)
    assert scale_of((1280, 2560), ImageSpec(size=320, aspect="crop")) == pytest.approx(1 / 4)
    assert scale_of((1280, 2560), ImageSpec(size=320, aspect="stretch")) == pytest.approx(1 / 8)
    edge = ImageSpec(size=224, shortest_edge=256, aspect="crop")
    assert scale_of((512, 2560), edge) == pytest.approx(1 / 2)


# The module


def test_reading_takes_what_parsing_gives(shot: Path) -> None:
    assert read_reference(parse_reference(shot.as_uri())) == shot.read_bytes()


def test_importing_loads_neither_numpy_nor_pillow_nor_a_http_client() -> None:
    script = (
        "import sys, w2c_tui.core.image\n"
        "print(*({'numpy', 'PIL', 'httpx2', 'torch', 'ssl', 'http.client'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
