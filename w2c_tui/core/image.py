"""From bytes to a verified RGB picture, and from there to the encoder's pixels.

Owns the one place where untrusted bytes meet Pillow's decoders, the limits they keep, and
`ImageSpec`, which says how a picture becomes `pixel_values`. Every bad input is one `ImageError`.
Knows nothing about where bytes come from (`core.reference` does), about models, prompts, terminals
or where limits are set.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from w2c_tui.core.conversation import Attachment, content_hash
from w2c_tui.core.errors import CheckpointError, ImageError
from w2c_tui.core.printable import one_line, quoted, reason_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

Triple = tuple[float, float, float]

# Radford et al. 2021 (CLIP); SigLIP and ViT use a half for every channel.
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HALF: Triple = (0.5, 0.5, 0.5)

# The only decoders that untrusted bytes ever reach, in Pillow's names.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_SIGNATURES = (
    (b"\x89PNG", "png"),
    (b"\xff\xd8", "jpeg"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)
USE_A_PICTURE = "Give a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF picture."


class ImageLimits(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """`[images]`: what is refused before it is fetched, read or decoded.

    The default of `max_pixels` lets full-page screenshots (1280 x 30000) pass and stops
    decompression bombs; `max_side_px` bounds the square that a picture may have to be padded to.
    """

    max_file_bytes: Annotated[
        int, Meta(ge=1, description="Largest file or download to accept, in bytes.")
    ] = 50 * 1024 * 1024
    max_pixels: Annotated[
        int, Meta(ge=1, description="Most pixels, width times height, that a picture may have.")
    ] = 50_000_000
    max_side_px: Annotated[
        int, Meta(ge=1, description="Most pixels that a picture may be wide or high.")
    ] = 32_768
    url_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            le=3600,
            description="Most seconds for a whole download, with name resolution and redirects, "
            "or for the clipboard.",
        ),
    ] = 20.0
    max_redirects: Annotated[
        int, Meta(ge=0, le=100, description="Most redirects to follow from a URL.")
    ] = 5
    allow_private_hosts: Annotated[
        bool,
        Meta(description="Fetch URLs that lead to this machine or a private network, too."),
    ] = False


DEFAULT_LIMITS = ImageLimits()


# From bytes to a picture


def attachment_from_bytes(
    data: bytes, name: str = "image", source: str = "", limits: ImageLimits = DEFAULT_LIMITS
) -> Attachment:
    """`data` as an attachment, after it was decoded once from end to end. Raises ImageError.

    `name` is made safe to print; `source` stays as given, except for what is not valid Unicode.
    """
    width, height = _decoded(data, source or name, limits).size
    return Attachment(
        data=data,
        sha256=content_hash(data),
        width=width,
        height=height,
        name=one_line(name),
        source=source.encode("utf-8", "backslashreplace").decode(),
    )


def attachment_from_picture(
    picture: Image.Image, name: str, source: str, limits: ImageLimits = DEFAULT_LIMITS
) -> Attachment:
    """`picture`, which never was a file, as an attachment with the bytes of a PNG.

    Raises ImageError for one over the limits, and whatever Pillow raises for one that it has not
    decoded yet.
    """
    _check_size(picture.size, quoted(source or name), limits)
    buffer = io.BytesIO()
    _rgb(picture).save(buffer, "PNG", compress_level=1)
    return attachment_from_bytes(buffer.getvalue(), name, source, limits)


def media_type(data: bytes) -> str:
    """The kind of picture that `data` begins like, as a browser names it ("image/png");
    "application/octet-stream" for anything that is none of `FORMATS`."""
    for start, kind in _SIGNATURES:
        if data.startswith(start):
            return f"image/{kind}"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    avif = data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis")
    return "image/avif" if avif else "application/octet-stream"


def open_image(data: bytes | Attachment, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The first frame as an upright RGB picture, transparency on white. Raises ImageError.

    Nothing else escapes, whatever the bytes: sizes are checked before decoding and only the
    decoders of `FORMATS` are used.
    """
    if isinstance(data, Attachment):
        return _decoded(data.data, data.name, limits)
    return _decoded(data, "image", limits)


class ImageHeader(msgspec.Struct, frozen=True):
    """What a picture says of itself: Pillow's name of its format, its pixels when upright."""

    format: str
    width: int
    height: int


def read_header(
    data: bytes, name: str = "image", limits: ImageLimits = DEFAULT_LIMITS
) -> ImageHeader:
    """Format and size without decoding a pixel. Raises ImageError; the rest may be damaged."""
    with _opened(data, name, limits) as image:
        turned = _orientation(image) in (5, 6, 7, 8)
        width, height = reversed(image.size) if turned else image.size
        return ImageHeader(image.format or "", width, height)


def _decoded(data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    with _opened(data, name, limits) as image:
        image.load()
        return _upright(_rgb(image), image)


@contextlib.contextmanager
def _opened(data: bytes, name: str, limits: ImageLimits) -> Iterator[Image.Image]:
    """Pillow's image of `data` within `limits`; whatever it raises becomes an ImageError."""
    from PIL import Image, UnidentifiedImageError

    shown = quoted(name)
    if not data:
        raise ImageError(f"{shown} is empty (0 bytes).", hint=USE_A_PICTURE)
    check_bytes(len(data), shown, limits)
    quieten_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, shown, limits)
            _check_cost(image, data, shown, limits)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unrecognised(data, shown) from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(shown, "", limits) from error
    except MemoryError as error:
        raise ImageError(
            f"There is not enough memory to open {shown}.",
            hint="Scale the picture down or close other programs.",
        ) from error
    # Damaged files make Pillow's decoders raise nearly anything.
    except Exception as error:
        raise ImageError(
            f"{shown} is damaged or incomplete: {reason_of(error)}.",
            hint="Save or download the picture again.",
        ) from error


def check_bytes(num_bytes: int, name: str, limits: ImageLimits) -> None:
    """Raises ImageError if there are more than `max_file_bytes`; `name` is safe to print."""
    if num_bytes > limits.max_file_bytes:
        limit = limits.max_file_bytes / 2**20
        raise ImageError(
            f"{name} is too large: more than {limit:.4g} MiB.",
            hint="Save the picture smaller, for example as JPEG or WebP, or raise the limit.",
        )


def quieten_pillow() -> None:
    """Keep what Pillow and its libraries say about bad pictures off the terminal."""
    # Not by catch_warnings, which is not safe with threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    _quieten_libtiff()


@functools.cache
def _quieten_libtiff() -> None:
    """Damaged files make libtiff write to stderr, in the middle of a terminal's screen.

    Its handler is found through Pillow's module, which is linked with it (not on Windows).
    """
    import ctypes

    from PIL import _imaging

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def _check_size(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels or max(size) > limits.max_side_px:
        raise _too_many_pixels(name, f" ({width} x {height})", limits)


def _too_many_pixels(name: str, size: str, limits: ImageLimits) -> ImageError:
    return ImageError(
        f"{name} has too many pixels{size}: at most {limits.max_pixels / 1e6:g} megapixels and "
        f"{limits.max_side_px} px on a side are accepted.",
        hint="Scale or crop the picture, or raise the limit.",
    )


def _check_cost(image: Image.Image, data: bytes, name: str, limits: ImageLimits) -> None:
    """Refuses small pictures that are made to be expensive.

    A TIFF may have tiles far larger than itself; a progressive JPEG may go over all its pixels
    in thousands of scans, where encoders write about ten.
    """
    tags = getattr(image, "tag_v2", {})
    tile_pixels = int(tags.get(322, 0)) * int(tags.get(323, 0))
    if tile_pixels > limits.max_pixels or (
        image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > 200
    ):
        raise ImageError(
            f"{name} is built in a way that would take too long to open.",
            hint="Save the picture again with an image editor.",
        )


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    colour_key = image.info.get("transparency")
    if isinstance(colour_key, tuple) and max(colour_key) > 255:
        # 16 bits per channel, of which Pillow keeps the upper half.
        image.info["transparency"] = tuple(value >> 8 for value in colour_key)
    layer = image.convert("RGBA")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(layer, mask=layer.getchannel("A"))
    return flat


def _eight_bit(image: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits or floats as 8 bits.

    A mode wider than its content does not say where white is; then it is the nearest usual white
    (1 for floats, 255, 65535) that no value exceeds, else the brightest value.
    """
    import numpy as np
    from PIL import Image

    stored = np.asarray(image)
    values = stored.astype(np.float32)
    top = float(values.max(initial=0, where=np.isfinite(values)))
    np.clip(np.nan_to_num(values, copy=False, nan=0, posinf=top), 0, None, out=values)
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((level for level in usual if top <= level), top)
    values /= white
    grey = (values * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    if isinstance(key := image.info.get("transparency"), int):
        grey[stored == key] = 255
    return Image.fromarray(grey)


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    """`picture` turned by the EXIF orientation of `image`, the file it was decoded from."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    picture.info.clear()
    return picture if turn is None else picture.transpose(turn)


def _orientation(image: Image.Image) -> int:
    # Damaged EXIF data does not make the picture unreadable: viewers show it as it is stored.
    with contextlib.suppress(Exception):
        return int(image.getexif().get(0x0112, 1))
    return 1


_SCREENSHOT = "Open it in a viewer or browser and take a screenshot of it."
# What people mistake for a picture: how its first kilobyte looks, what it is, what to do.
_LOOKALIKES = (
    (rb"\s*%PDF-", "is a PDF document, not a picture", _SCREENSHOT),
    (
        rb"(?is)(\xef\xbb\xbf)?\s*(<!--.*)?<(!doctype html|html|head|body)",
        "is a web page (HTML), not a picture",
        "Take a screenshot of the page, or use the address of the picture itself.",
    ),
    (rb"(?s).*<svg[\s>]", "is a vector drawing (SVG), not a picture of pixels", _SCREENSHOT),
    (rb"\x1f\x8b|PK\x03\x04", "is a compressed archive", "Unpack it first."),
    (rb"(?s).{4}ftyp(hei|hev|mif|msf)", "is a HEIC photo, which is not supported", USE_A_PICTURE),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "is JPEG XL, which is not supported", USE_A_PICTURE),
    (rb"8BPS", "is a Photoshop document", USE_A_PICTURE),
    (rb"(?s).{4}ftyp(?!avi)", "is a video", _SCREENSHOT),
    (
        rb"(?s)\x89PNG|\xff\xd8\xff|RIFF.{4}WEBP|GIF8|BM|II\*\0|MM\0\*|.{4}ftypavi",
        "is damaged: its header cannot be read",
        "Save or download the picture again.",
    ),
)


def _unrecognised(data: bytes, name: str) -> ImageError:
    for pattern, what, hint in _LOOKALIKES:
        if re.match(pattern, data[:1024]):
            return ImageError(f"{name} {what}.", hint=hint)
    return ImageError(f"{name} is not a picture that can be read.", hint=USE_A_PICTURE)


# From a picture to the encoder's pixels

Edge = Annotated[int, Meta(ge=1, le=8192)]
Spread = Annotated[float, Meta(gt=0)]
Byte = Annotated[int, Meta(ge=0, le=255)]
# In the order of Pillow's numbers, which preprocessor_config.json uses.
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


class ImageSpec(msgspec.Struct, frozen=True):
    """How a vision tower wants its pictures: `size` x `size` pixels, scaled and normalised.

    `aspect` is what happens to a picture that is not square: `pad` centres it on a square of
    `pad_color` (LLaVA's expand2square), `crop` scales the short side to `shortest_edge` (`size`
    if None) and cuts out the centre (CLIP), `stretch` ignores the proportions (SigLIP).
    `pad_color` None means the mean colour, int(mean * 255). `blank_corner` pixels of the square's
    right bottom corner are `pad_color`, whatever the picture shows there: a patch that some
    runtimes cannot pass on.
    """

    size: Edge = 336
    aspect: Literal["pad", "crop", "stretch"] = "pad"
    mean: Triple = CLIP_MEAN
    std: tuple[Spread, Spread, Spread] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: Resample = "bicubic"
    pad_color: tuple[Byte, Byte, Byte] | None = None
    shortest_edge: Edge | None = None
    blank_corner: Annotated[int, Meta(ge=0, le=8192)] = 0

    @property
    def background(self) -> tuple[int, int, int]:
        """The colour around a picture that is not square."""
        return self.pad_color or _mean_color(self.mean)

    @classmethod
    def from_processor_config(cls, config: Mapping[str, Any]) -> ImageSpec:
        """The same preparation as Hugging Face's `preprocessor_config.json`.

        Also takes a `processor_config.json`. Knows the CLIP, BiT (DINOv2), LLaVA, SigLIP and ViT
        image processors. Raises CheckpointError for anything that this class cannot express.
        """
        config = config.get("image_processor", config)
        try:
            return msgspec.convert(_spec_fields(config), cls)
        except (msgspec.ValidationError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"The image processor of this checkpoint cannot be used: {reason_of(error)}.",
                hint="Check preprocessor_config.json in the checkpoint's folder.",
            ) from error


# transformers 5.23: what each image processor class does with keys that its file leaves out.
_PROCESSORS: dict[str, tuple[bool, Triple, Triple, int]] = {
    "CLIP": (True, CLIP_MEAN, CLIP_STD, 3),
    "Bit": (True, CLIP_MEAN, CLIP_STD, 3),
    "Llava": (True, CLIP_MEAN, CLIP_STD, 3),
    "Siglip": (False, HALF, HALF, 3),
    "ViT": (False, HALF, HALF, 2),
}


def _spec_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `ImageSpec`. Raises ValueError for what it has no words for."""
    kind = config.get("image_processor_type") or config.get("feature_extractor_type")
    kind = kind or ("CLIP" if config.get("crop_size") else "Siglip")
    family = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", str(kind))
    if family not in _PROCESSORS:
        raise ValueError(f"{kind} prepares pictures in a way that is not known here")
    crops, mean, std, resample = _PROCESSORS[family]
    if not config.get("do_resize", True):
        raise ValueError("do_resize is off, but the encoder needs one size")
    crop = None
    if config.get("do_center_crop", crops):
        crop = _square_edge(config.get("crop_size"), "crop_size")
    size = config.get("size")
    edges = {k: v for k, v in size.items() if v} if isinstance(size, Mapping) else {}
    names_short_side = edges.keys() == {"shortest_edge"}
    edge = edges["shortest_edge"] if names_short_side else _square_edge(size, "size")
    by_short_side = names_short_side or (crops and not edges)

    fields: dict[str, Any] = {"size": edge, "aspect": "stretch"}
    if family == "Llava" and config.get("do_pad"):
        fields["aspect"] = "pad"
    elif by_short_side:
        if crop is None:
            raise ValueError(f"size {size} without a centre crop leaves pictures not square")
        fields = {"size": crop, "aspect": "crop", "shortest_edge": None if edge == crop else edge}
    if crop not in (None, fields["size"]):
        raise ValueError(f"crop_size {crop} differs from size {edge}")

    mean = _triple(config.get("image_mean"), mean)
    if config.get("do_normalize", True):
        fields |= {"mean": mean, "std": _triple(config.get("image_std"), std)}
    else:
        fields |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        fields["pad_color"] = tuple(int(value * 255) for value in mean)
    rescales = config.get("do_rescale", True)
    fields["rescale_factor"] = config.get("rescale_factor", 1 / 255) if rescales else 1.0
    number = resample if config.get("resample") is None else config["resample"]
    fields["resample"] = dict(enumerate(get_args(Resample))).get(number, number)
    return fields


def _square_edge(size: Any, name: str) -> Any:
    if size is None:
        raise ValueError(f"{name} is missing")
    if not isinstance(size, Mapping):
        return size
    edges = {key: value for key, value in size.items() if value}
    if edges.keys() != {"height", "width"} or edges["height"] != edges["width"]:
        raise ValueError(f"{name} {dict(size)} is not one square")
    return edges["height"]


def _triple(value: Any, default: Triple) -> tuple[Any, ...]:
    value = default if value is None else value
    return (value,) * 3 if isinstance(value, int | float) else tuple(value)


def prepare(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """What the encoder sees of `image` before normalisation: RGB, `size` x `size` pixels.

    Equal, bit for bit, to LLaVA's `process_images` (expand2square and CLIP's processor) for `pad`
    and to transformers' PIL image processors for `crop` and `stretch`. Raises ImageError for a
    picture so long and thin that `crop` would enlarge it beyond all bounds.
    """
    from PIL.Image import Resampling

    image = image if image.mode == "RGB" else _rgb(image)
    resample = Resampling[spec.resample.upper()]
    if spec.aspect == "pad":
        square = _padded(image, spec, resample)
    elif spec.aspect == "crop":
        square = _cropped(image, spec, resample)
    else:
        square = image.resize((spec.size, spec.size), resample)
    if spec.blank_corner:
        start = spec.size - spec.blank_corner
        square.paste(spec.pad_color or _mean_color(spec.mean), (start, start, spec.size, spec.size))
    return square


def _cropped(image: Image.Image, spec: ImageSpec, resample: Image.Resampling) -> Image.Image:
    size, edge = spec.size, spec.shortest_edge or spec.size
    short, long = sorted(image.size)
    scaled_long = int(edge * long / short)
    if edge * scaled_long > DEFAULT_LIMITS.max_pixels:
        raise ImageError(
            f"A picture of {image.width} x {image.height} px is too long and thin for this model.",
            hint="Crop the picture to the part that matters.",
        )
    tall = image.height >= image.width
    image = image.resize((edge, scaled_long) if tall else (scaled_long, edge), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _padded(image: Image.Image, spec: ImageSpec, resample: Image.Resampling) -> Image.Image:
    """expand2square and resize, without ever holding the square, which may be 25 times the image.

    Pillow resizes rows first, each for itself, and then columns. So rows go through in bands,
    and rows of nothing but padding stay as they are.
    """
    from PIL import Image

    size, side = spec.size, max(image.size)
    color = spec.background
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrowed = Image.new("RGB", (size, side), color)
    rows = max(1, 2**22 // side)
    for y in range(0, image.height, rows):
        bottom = min(y + rows, image.height)
        band = Image.new("RGB", (side, bottom - y), color)
        band.paste(image.crop((0, y, image.width, bottom)), (left, 0))
        narrowed.paste(band.resize((size, bottom - y), resample), (0, top + y))
    return narrowed.resize((size, size), resample)


def _mean_color(mean: Triple) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, int(value * 255))) for value in mean)
    return red, green, blue


def pixel_values(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """(3, size, size) float32: `prepare`, rescaled and normalised as transformers does it."""
    return normalised(prepare(image, spec), spec)


def normalised(prepared: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """(3, size, size) float32 of a picture that `prepare` made.

    Of the 256 values of each channel, so a table of them gives the same bits as the arithmetic.
    """
    import numpy as np

    pixels = np.asarray(prepared)
    values = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel, table in enumerate(_normalised_values(spec)):
        values[channel] = table[pixels[:, :, channel]]
    return values


@functools.lru_cache(maxsize=8)
def _normalised_values(spec: ImageSpec) -> NDArray[np.float32]:
    """(3, 256) float32: rescaled in float64 and rounded, then normalised in float32."""
    import numpy as np

    rescaled = np.arange(256, dtype=np.float64) * spec.rescale_factor
    values = np.tile(rescaled.astype(np.float32), (3, 1))
    values -= np.array(spec.mean, dtype=np.float32)[:, None]
    values /= np.array(spec.std, dtype=np.float32)[:, None]
    return values


def scale_of(image_size: tuple[int, int], spec: ImageSpec) -> float:
    """By how much the preparation shrinks a picture of (width, height) where it shrinks most.

    A line of text h px high is about h * scale px high afterwards; below some 6 px it cannot be
    read by anyone.
    """
    if spec.aspect == "crop":
        return (spec.shortest_edge or spec.size) / min(image_size)
    return spec.size / max(image_size)
