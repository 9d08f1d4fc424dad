"""From bytes to a picture and from a picture to pixels, with real files and real processors."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image, features

from tests.core.pictures import encoded, picture, refused
from w2c_tui.core.config import load_settings
from w2c_tui.core.errors import CheckpointError, ConfigError
from w2c_tui.core.image import (
    ImageLimits,
    ImageSpec,
    attachment_from_bytes,
    open_image,
    pixel_values,
    prepare,
    scale_of,
)

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + png_chunk(b"IEND", b"")


# What is not a picture


NOT_PICTURES = [
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
]


@pytest.mark.parametrize(
    ("name", "data", "words"), NOT_PICTURES, ids=[name for name, *_ in NOT_PICTURES]
)
def test_what_is_not_a_picture_is_recognised(name: str, data: bytes, words: str) -> None:
    refused(lambda: attachment_from_bytes(data, name=name), name, words)


def test_control_characters_of_a_name_become_visible() -> None:
    attachment = attachment_from_bytes(encoded(picture()), name="a\x1b[2J.png")
    assert attachment.name == "a\\x1b[2J.png"


@pytest.mark.parametrize(
    "format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", pytest.param("AVIF", marks=needs_avif)]
)
def test_truncated_files_are_refused(format: str) -> None:
    data = encoded(picture(200, 200), format)
    assert open_image(data).size == (200, 200)
    refused(lambda: open_image(data[: len(data) // 2]), "image")


# Bombs


@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_pixel_bomb_is_refused(size: tuple[int, int]) -> None:
    error = refused(
        lambda: open_image(png(*size, 8, 2, bytes(1000))), "too many pixels", "50 megapixels"
    )
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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_pixel = 1", "unknown field `max_pixel`"),
        ("max_side_px = 0", ">= 1"),
        ("url_timeout_s = 0", "> 0"),
        ("url_timeout_s = inf", "<= 3600"),
        ("max_redirects = -1", ">= 0"),
    ],
)
def test_limits_in_the_configuration_file_are_checked(tmp_path: Path, line: str, said: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[images]\nmax_pixels = 9\n")
    assert load_settings(config_file=config, environ={}).images == ImageLimits(max_pixels=9)
    config.write_text(f"[images]\n{line}\n")
    with pytest.raises(ConfigError, match="images") as caught:
        load_settings(config_file=config, environ={})
    assert said in caught.value.message


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
    ids=[
        "int to 255",
        "int to 65535",
        "int beyond",
        "float to 1",
        "float to 255",
        "nan and inf",
        "float beyond",
        "black",
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


def test_importing_loads_neither_numpy_nor_pillow_nor_a_http_client() -> None:
    script = (
        "import sys, w2c_tui.core.image\n"
        "print(*({'numpy', 'PIL', 'httpx2', 'torch', 'ssl', 'http.client'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
