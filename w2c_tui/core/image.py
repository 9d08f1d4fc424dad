"""From something a person gave to a verified RGB picture, and from there to the encoder's pixels.

Owns the three ways in (a path or URL, bytes, the clipboard), the one place where untrusted bytes
meet Pillow's decoders, and `ImageSpec`, which says how a picture becomes `pixel_values`. Every bad
input is one `ImageError`. Knows nothing about models, prompts, terminals or where limits are set.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import re
import shlex
import socket
import stat
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

import msgspec

from w2c_tui.core.conversation import Attachment, content_hash
from w2c_tui.core.errors import CheckpointError, ImageError

if TYPE_CHECKING:
    import httpx2
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

T = TypeVar("T")
Triple = tuple[float, float, float]

# Radford et al. 2021 (CLIP); SigLIP and ViT use a half for every channel.
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HALF: Triple = (0.5, 0.5, 0.5)

# The only decoders that untrusted bytes ever reach, in Pillow's names.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_USE_A_PICTURE = "Give a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF picture."


class ImageLimits(msgspec.Struct, frozen=True):
    """What is refused before it is decoded.

    `max_pixels` lets full-page screenshots (1280 x 30000) pass and stops decompression bombs;
    `max_side_px` bounds the square that a picture may have to be padded to. `url_timeout_s` is
    wall clock for the whole download, name resolution and redirects included. Unless
    `allow_private_hosts`, a URL and each of its redirects may only lead to public addresses.
    """

    max_file_bytes: int = 50 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_side_px: int = 32_768
    url_timeout_s: float = 20.0
    max_redirects: int = 5
    allow_private_hosts: bool = False


DEFAULT_LIMITS = ImageLimits()


# What a person typed, pasted or dragged


def parse_reference(text: str, *, windows: bool = os.name == "nt") -> str:
    """The local path or URL that `text` means.

    Understands `~`, quotes, `file://` URLs, the backslash escapes of a dragged path (not on
    `windows`, where a backslash separates folders) and both Unicode normalisations of a name.
    The first spelling that exists on disk wins, the literal one before all others. Raises
    ImageError when `text` is blank or a `file://` URL names another machine.
    """
    text = text.strip()
    bare = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    if not bare.strip():
        raise ImageError("No image was named.", hint="Give the path of a file or an http(s) URL.")
    if _is_url(bare):
        return bare.strip()
    if bare.lower().startswith("file:/"):
        spellings = [_path_of_file_url(bare, windows)]
    else:
        spellings = [text, bare] if windows else [text, bare, _unescaped(text, bare)]
    for spelling in spellings:
        for path in _forms_on_disk(spelling):
            if os.path.exists(path):
                return path
    from_windows = re.match(r"[A-Za-z]:\\", bare)
    return os.path.expanduser(bare if from_windows else spellings[-1])


def split_references(text: str, *, windows: bool = os.name == "nt") -> list[str]:
    """The paths and URLs of a paste: one on each line, or several on a line, quoted or escaped.

    A line is taken apart only where every part looks like a reference, so that an unquoted name
    with spaces stays whole. Each is as `parse_reference` returns it, and raises as it does.
    """
    references = []
    for line in filter(str.strip, text.splitlines()):
        try:
            words = (
                [a or b for a, b in re.findall(r'"([^"]+)"|(\S+)', line)]
                if windows
                else shlex.split(line)
            )
        except ValueError:
            words = []
        whole = parse_reference(line, windows=windows)
        several = len(words) > 1 and all(_looks_like_reference(word) for word in words)
        if several and not os.path.exists(whole):
            references += [parse_reference(word, windows=windows) for word in words]
        else:
            references.append(whole)
    return references


def _is_url(text: str) -> bool:
    return re.match(r"\s*(?!file:)([a-z][a-z0-9+.-]+://|data:)", text, re.IGNORECASE) is not None


def _looks_like_reference(word: str) -> bool:
    pattern = r"[/~.\\]|[a-z]:[\\/]|file:/|.*\.(png|jpe?g|webp|gif|bmp|tiff?|avif)$"
    return _is_url(word) or re.match(pattern, word, re.I) is not None or os.path.exists(word)


def _path_of_file_url(url: str, windows: bool) -> str:
    parts = re.fullmatch(r"file:(?://([^/]*))?(/.*)", url, re.IGNORECASE | re.DOTALL)
    host, path = parts.groups() if parts else ("", url[5:])
    path = os.fsdecode(unquote_to_bytes(path.encode("utf-8", "surrogateescape")))
    if windows:
        path = re.sub(r"^/([A-Za-z]:)", r"\1", path).replace("/", "\\")
    if (host or "localhost").lower() in ("localhost", socket.gethostname().lower()):
        return path
    if windows:
        return rf"\\{host}{path}"
    raise ImageError(
        f"{_shown(url)} is a file of another machine, {_shown(host)}.",
        hint="Copy the file to this machine and give its path.",
    )


def _unescaped(text: str, bare: str) -> str:
    with contextlib.suppress(ValueError):
        words = shlex.split(text)
        if len(words) == 1:
            return words[0]
    return re.sub(r"\\(.)", r"\1", bare)


def _forms_on_disk(path: str) -> Iterator[str]:
    for name in dict.fromkeys((path, os.path.expanduser(path))):
        yield name
        yield unicodedata.normalize("NFC", name)
        yield unicodedata.normalize("NFD", name)


def _shown(text: str, limit: int = 100) -> str:
    """`text` for a message: nothing that moves a terminal's cursor, no password, not too long."""
    text = re.sub(r"(?<=://)[^/@\s]*@", "", text)
    text = text if len(text) <= limit else f"{text[: limit // 3]}…{text[-limit // 2 :]}"
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"'{''.join(escaped)}'"


# From a reference to bytes


def load_attachment(reference: str | Path, limits: ImageLimits = DEFAULT_LIMITS) -> Attachment:
    """The verified picture behind a path or URL. Raises ImageError.

    A string is read as a person's spelling (`parse_reference`), a Path is taken as it is.
    """
    found = str(reference) if isinstance(reference, Path) else parse_reference(reference)
    data = read_reference(found, limits)
    if _is_url(found):
        parts = urlsplit(found)
        name = unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.hostname or "image"
    else:
        name = os.path.basename(found) or "image"
    return attachment_from_bytes(data, name=name, source=found, limits=limits)


def attachment_from_bytes(
    data: bytes, name: str = "image", source: str = "", limits: ImageLimits = DEFAULT_LIMITS
) -> Attachment:
    """`data` as an attachment, after it was decoded once from end to end. Raises ImageError.

    `name` is made safe to print; `source` stays as given, except for what is not valid Unicode
    and a URL's password.
    """
    width, height = _decoded(data, source or name, limits).size
    source = re.sub(r"(?<=://)[^/@\s]*@", "", source) if _is_url(source) else source
    return Attachment(
        data=data,
        sha256=content_hash(data),
        width=width,
        height=height,
        name=_shown(name)[1:-1],
        source=source.encode("utf-8", "backslashreplace").decode(),
    )


def attachment_from_clipboard(limits: ImageLimits = DEFAULT_LIMITS) -> Attachment:
    """The clipboard's picture as a PNG, or the first readable of its files. Raises ImageError."""
    from PIL import Image, ImageGrab

    _quieten_pillow()
    remote = "SSH_CONNECTION" in os.environ
    hint = (
        "Over SSH this is the clipboard of the remote machine: copy the picture there as a file "
        "and paste its path instead."
        if remote
        else "Copy a picture first, or paste the path of a file."
    )
    try:
        content = _in_time(ImageGrab.grabclipboard, limits.url_timeout_s)
        if isinstance(content, Image.Image):
            _check_size(content.size, "clipboard", limits)
            buffer = io.BytesIO()
            _rgb(content).save(buffer, "PNG", compress_level=1)
            return attachment_from_bytes(buffer.getvalue(), "clipboard.png", "clipboard", limits)
    except ImageError:
        raise
    except NotImplementedError as error:
        install = "Install wl-clipboard (Wayland) or xclip (X11), or paste the path of a file."
        raise ImageError(
            "The clipboard cannot be read: no clipboard program was found.",
            hint=hint if remote else install,
        ) from error
    except Exception as error:
        raise ImageError(f"The clipboard cannot be read: {_reason(error)}.", hint=hint) from error
    problem = ImageError("The clipboard holds no image.", hint=hint)
    for path in content or ():
        try:
            return load_attachment(Path(path), limits)
        except ImageError as error:
            problem = error
    raise problem


def read_reference(reference: str, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The bytes of a local file or http(s) URL, at most `max_file_bytes`. Raises ImageError."""
    return _read_url(reference, limits) if _is_url(reference) else _read_file(reference, limits)


def _read_file(path: str, limits: ImageLimits) -> bytes:
    name = _shown(path)
    try:
        _check_regular(os.stat(path), name)
        # Should a FIFO take the file's place after the check, opening it must not block.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            _check_regular(status, name)
            _check_bytes(status.st_size, name, limits)
            data = file.read(limits.max_file_bytes + 1)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    _check_bytes(len(data), name, limits)
    return data


def _check_regular(status: os.stat_result, name: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name} is a folder.", hint="Give the path of one picture in it.")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name} is a device or pipe, not a file.", hint=_USE_A_PICTURE)


def _check_bytes(num_bytes: int, name: str, limits: ImageLimits) -> None:
    if num_bytes > limits.max_file_bytes:
        limit = limits.max_file_bytes / 2**20
        raise ImageError(
            f"{name} is too large: more than {limit:.4g} MiB.",
            hint="Save the picture smaller, for example as JPEG or WebP, or raise the limit.",
        )


def _unreadable(path: str, error: OSError | ValueError) -> ImageError:
    name = _shown(path)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        import difflib

        folder, base = os.path.split(path)
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = difflib.get_close_matches(base, os.listdir(folder or "."), n=1)
        close = f"Did you mean {_shown(os.path.join(folder, names[0]))}?" if names else ""
        return ImageError(
            f"{name} does not exist.",
            hint=close or "Check the path; a relative one starts where the program was started.",
        )
    if isinstance(error, PermissionError):
        return ImageError(
            f"{name} may not be read by this user.",
            hint="Change the file's permissions or copy it to a folder of your own.",
        )
    if isinstance(error, ValueError):
        return ImageError(
            f"{name} cannot be a path: it contains a character that no file name can have.",
            hint="Paste the path again, without control characters.",
        )
    reasons = {
        errno.ENAMETOOLONG: "the name is too long",
        errno.ELOOP: "its symbolic links lead in a circle",
    }
    reason = reasons.get(error.errno or 0, error.strerror or _reason(error))
    return ImageError(f"{name} cannot be read: {reason}.", hint="Check the path.")


def _reason(error: BaseException) -> str:
    return _shown(str(error) or type(error).__name__, 160)[1:-1].rstrip(".")


# Over the network


def _in_time(work: Callable[[], T], seconds: float) -> T:
    """`work()` on a thread of its own; TimeoutError after `seconds`, whatever it hangs on."""
    from concurrent.futures import Future

    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
            outcome.set_exception(error)

    threading.Thread(target=run, name="w2c-image", daemon=True).start()
    return outcome.result(timeout=seconds)


def _read_url(url: str, limits: ImageLimits) -> bytes:
    import httpx2

    clients: list[httpx2.Client] = []
    name = _shown(url)
    try:
        return _in_time(lambda: _download(url, limits, clients), limits.url_timeout_s)
    except ImageError:
        raise
    except (TimeoutError, httpx2.TimeoutException) as error:
        raise ImageError(
            f"{name} did not arrive within {limits.url_timeout_s:g} s.",
            hint="Try again, or download the picture with a browser and give its path.",
        ) from error
    except socket.gaierror as error:
        host = _shown(urlsplit(url).hostname or url)
        raise ImageError(
            f"{name} cannot be fetched: the host {host} was not found.",
            hint="Check the address and the network connection.",
        ) from error
    # RuntimeError is httpx2's for its streams; ImportError is a SOCKS proxy without its package.
    except (
        httpx2.HTTPError,
        httpx2.InvalidURL,
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
    ) as error:
        raise ImageError(
            f"{name} cannot be fetched: {_reason(error)}.",
            hint="Check the address, or download the picture with a browser and give its path.",
        ) from error
    finally:
        # Also ends a download that is still under way.
        for client in clients:
            client.close()


def _download(url: str, limits: ImageLimits, clients: list[httpx2.Client]) -> bytes:
    """Follows redirects by hand, because each hop's address is checked before it is used.

    Every client that is opened is added to `clients`, for the caller to close.
    """
    name = _shown(url)
    for _ in range(limits.max_redirects + 1):
        response = _answer(url, limits, clients)
        if response.has_redirect_location:
            url = urljoin(url, response.headers["location"])
            continue
        if response.status_code != 200:
            status = f"{response.status_code} {response.reason_phrase}".strip()
            raise ImageError(
                f"{name} cannot be fetched: the server answered {_shown(status)[1:-1]}.",
                hint="Check the address. A picture behind a log-in has to be saved from a browser.",
            )
        if response.headers.get("content-encoding", "identity") not in ("identity", "gzip"):
            raise ImageError(
                f"{name} came compressed in a way that was not asked for.",
                hint="Download the picture with a browser and give its path.",
            )
        announced = response.headers.get("content-length", "")
        _check_bytes(int(announced) if announced.isdecimal() else 0, name, limits)
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            _check_bytes(len(data), name, limits)
        return bytes(data)
    raise ImageError(
        f"{name} was redirected more than {limits.max_redirects} times.",
        hint="Open the address in a browser and use the address of the picture itself.",
    )


def _answer(url: str, limits: ImageLimits, clients: list[httpx2.Client]) -> httpx2.Response:
    """The response to one request, its body unread.

    The connection goes to an address that was checked, so that a name cannot resolve differently
    in between; the certificate is still checked against the name. A proxy resolves by itself.
    """
    from urllib.request import getproxies, proxy_bypass

    import httpx2

    target = httpx2.URL(url)
    host = target.raw_host.decode("ascii")
    if target.scheme not in ("http", "https") or not host:
        raise ImageError(
            f"{_shown(url)} is not an http or https address.",
            hint="Download the picture and give its path.",
        )
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and proxy_bypass(host):
        proxy = None
    try:
        addresses = _addresses(host, url, limits)
    except socket.gaierror:
        if not proxy:
            raise
        addresses = []
    client = httpx2.Client(
        verify=httpx2.create_ssl_context(),
        proxy=proxy,
        trust_env=False,
        timeout=limits.url_timeout_s,
    )
    clients.append(client)
    headers = {
        "Host": target.netloc.decode("ascii"),
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "User-Agent": "w2c-tui",
    }
    hops = [target] if proxy else [target.copy_with(host=address) for address in addresses]
    for hop in hops:
        request = client.build_request(
            "GET", hop, headers=headers, extensions={"sni_hostname": host}
        )
        try:
            return client.send(request, stream=True)
        except httpx2.ConnectError:
            if hop is hops[-1]:
                raise
    raise AssertionError("getaddrinfo returns at least one address or raises")


def _addresses(host: str, url: str, limits: ImageLimits) -> list[str]:
    import ipaddress

    found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in [] if limits.allow_private_hosts else addresses:
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            nat64 = ip in ipaddress.IPv6Network("64:ff9b::/96")
            low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if nat64 else None
            ip = ip.ipv4_mapped or ip.sixtofour or low or ip
        if not ip.is_global or ip.is_multicast:
            raise ImageError(
                f"{_shown(url)} leads to {address}, an address inside this machine or network.",
                hint="Save the picture and give its path, or allow private hosts in the settings.",
            )
    return addresses


# From bytes to a picture


def open_image(data: bytes | Attachment, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The first frame as an upright RGB picture, transparency on white. Raises ImageError.

    Nothing else escapes, whatever the bytes: sizes are checked before decoding and only the
    decoders of `FORMATS` are used.
    """
    if isinstance(data, Attachment):
        return _decoded(data.data, data.name, limits)
    return _decoded(data, "image", limits)


def _decoded(data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    shown = _shown(name)
    if not data:
        raise ImageError(f"{shown} is empty (0 bytes).", hint=_USE_A_PICTURE)
    _check_bytes(len(data), shown, limits)
    _quieten_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, shown, limits)
            _check_cost(image, data, shown, limits)
            image.load()
            return _upright(_rgb(image), image)
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
            f"{shown} is damaged or incomplete: {_reason(error)}.",
            hint="Save or download the picture again.",
        ) from error


def _quieten_pillow() -> None:
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
    turn = None
    # Damaged EXIF data does not make the picture unreadable: viewers show it as it is stored.
    with contextlib.suppress(Exception):
        turn = turns.get(image.getexif().get(0x0112, 1))
    picture.info.clear()
    return picture if turn is None else picture.transpose(turn)


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
    (rb"(?s).{4}ftyp(hei|hev|mif|msf)", "is a HEIC photo, which is not supported", _USE_A_PICTURE),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "is JPEG XL, which is not supported", _USE_A_PICTURE),
    (rb"8BPS", "is a Photoshop document", _USE_A_PICTURE),
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
    return ImageError(f"{name} is not a picture that can be read.", hint=_USE_A_PICTURE)


# From a picture to the encoder's pixels

Edge = Annotated[int, msgspec.Meta(ge=1, le=8192)]
Spread = Annotated[float, msgspec.Meta(gt=0)]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # as Pillow counts


class ImageSpec(msgspec.Struct, frozen=True):
    """How a vision tower wants its pictures: `size` x `size` pixels, scaled and normalised.

    `aspect` is what happens to a picture that is not square: `pad` centres it on a square of
    `pad_color` (LLaVA's expand2square), `crop` scales the short side to `shortest_edge` (`size`
    if None) and cuts out the centre (CLIP), `stretch` ignores the proportions (SigLIP).
    `pad_color` None means the mean colour, int(mean * 255).
    """

    size: Edge = 336
    aspect: Literal["pad", "crop", "stretch"] = "pad"
    mean: Triple = CLIP_MEAN
    std: tuple[Spread, Spread, Spread] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: Resample = "bicubic"
    pad_color: tuple[Byte, Byte, Byte] | None = None
    shortest_edge: Edge | None = None

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
                f"The image processor of this checkpoint cannot be used: {_reason(error)}.",
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
    by_short_side = edges.keys() == {"shortest_edge"} or (not edges and crops)
    edge = edges.get("shortest_edge") if by_short_side and edges else _square_edge(size, "size")

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
    fields["resample"] = dict(enumerate(RESAMPLES)).get(number, number)
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
    size = spec.size
    if spec.aspect == "stretch":
        return image.resize((size, size), resample)
    if spec.aspect == "pad":
        return _padded(image, spec, resample)
    edge = spec.shortest_edge or size
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
    color = spec.pad_color or _mean_color(spec.mean)
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
    """(3, size, size) float32: `prepare`, rescaled and normalised as transformers does it.

    The rescaling is done in float64 and rounded, then normalised in float32.
    """
    import numpy as np

    rescaled = np.asarray(prepare(image, spec)).astype(np.float64) * spec.rescale_factor
    values = rescaled.astype(np.float32)
    values -= np.array(spec.mean, dtype=np.float32)
    values /= np.array(spec.std, dtype=np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def scale_of(image_size: tuple[int, int], spec: ImageSpec) -> float:
    """By how much the preparation shrinks a picture of (width, height) where it shrinks most.

    A line of text h px high is about h * scale px high afterwards; below some 6 px it cannot be
    read by anyone.
    """
    edge = min(image_size) if spec.aspect == "crop" else max(image_size)
    return ((spec.shortest_edge or spec.size) if spec.aspect == "crop" else spec.size) / edge
