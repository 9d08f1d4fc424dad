"""From what a person typed, pasted or dragged to the bytes behind it, and to an attachment.

Owns the ways in: references (paths and URLs), files, the network with its address checks, and the
clipboard. Every bad reference is one `ImageError`. Knows nothing about how pictures are decoded
(`core.image` does), about models, prompts, terminals or where limits are set.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

from w2c_tui.core.conversation import Attachment
from w2c_tui.core.errors import ImageError
from w2c_tui.core.image import (
    DEFAULT_LIMITS,
    USE_A_PICTURE,
    ImageLimits,
    attachment_from_bytes,
    attachment_from_picture,
    check_bytes,
    quieten_pillow,
)
from w2c_tui.core.printable import one_line, quoted, reason_of, without_password

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")


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
        words = _words(line, windows)
        whole = parse_reference(line, windows=windows)
        several = len(words) > 1 and all(_looks_like_reference(word) for word in words)
        if several and not os.path.exists(whole):
            references += [parse_reference(word, windows=windows) for word in words]
        else:
            references.append(whole)
    return references


def _words(line: str, windows: bool) -> list[str]:
    """`line` taken apart as the shell does it; nothing when its quotes do not close."""
    if windows:
        return [inside or plain for inside, plain in re.findall(r'"([^"]+)"|(\S+)', line)]
    try:
        return shlex.split(line)
    except ValueError:
        return []


def _is_url(text: str) -> bool:
    return re.match(r"\s*(?!file:)([a-z][a-z0-9+.-]+://|data:)", text, re.IGNORECASE) is not None


def _looks_like_reference(word: str) -> bool:
    pattern = r"[/~.\\]|[a-z]:[\\/]|file:/|.*\.(png|jpe?g|webp|gif|bmp|tiff?|avif)$"
    return _is_url(word) or re.match(pattern, word, re.I) is not None or os.path.exists(word)


def _path_of_file_url(url: str, windows: bool) -> str:
    parts = re.fullmatch(r"file:(?://([^/]*))?(/.*)", url, re.IGNORECASE | re.DOTALL)
    assert parts, "it starts with file:/"
    host, path = parts.groups()
    path = os.fsdecode(unquote_to_bytes(path.encode("utf-8", "surrogateescape")))
    if windows:
        path = re.sub(r"^/([A-Za-z]:)", r"\1", path).replace("/", "\\")
    if (host or "localhost").lower() in ("localhost", socket.gethostname().lower()):
        return path
    if windows:
        return rf"\\{host}{path}"
    raise ImageError(
        f"{quoted(url)} is a file of another machine, {quoted(host)}.",
        hint="Copy the file to this machine and give its path.",
    )


def _unescaped(text: str, bare: str) -> str:
    words = _words(text, windows=False)
    return words[0] if len(words) == 1 else re.sub(r"\\(.)", r"\1", bare)


def _forms_on_disk(path: str) -> Iterator[str]:
    for name in dict.fromkeys((path, os.path.expanduser(path))):
        yield name
        yield unicodedata.normalize("NFC", name)
        yield unicodedata.normalize("NFD", name)


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
        found = without_password(found)
    else:
        name = os.path.basename(found) or "image"
    return attachment_from_bytes(data, name=name, source=found, limits=limits)


def attachment_from_clipboard(limits: ImageLimits = DEFAULT_LIMITS) -> Attachment:
    """The clipboard's picture, or the first readable of its files. Raises ImageError."""
    remote = "SSH_CONNECTION" in os.environ
    hint = (
        "Over SSH this is the clipboard of the remote machine: copy the picture there as a file "
        "and paste its path instead."
        if remote
        else "Copy a picture first, or paste the path of a file."
    )
    try:
        if sys.platform.startswith("linux"):
            return _from_clipboard_program(limits)
        return _from_desktop_clipboard(limits)
    except FileNotFoundError as error:
        install = "Install wl-clipboard (Wayland) or xclip (X11), or paste the path of a file."
        raise ImageError(
            "The clipboard cannot be read: no clipboard program was found.",
            hint=hint if remote else install,
        ) from error
    except LookupError as error:
        raise ImageError("The clipboard holds no image.", hint=hint) from error
    except Exception as error:
        raise ImageError(f"The clipboard cannot be read: {reason_of(error)}.", hint=hint) from error


def _from_clipboard_program(limits: ImageLimits) -> Attachment:
    """On Linux. Pillow's own way hands the bytes to every decoder it has, so it is not used.

    Raises FileNotFoundError without a program, LookupError without a picture.
    """
    commands = {
        "WAYLAND_DISPLAY": ["wl-paste", "--no-newline", "--type", "image/png"],
        "DISPLAY": ["xclip", "-selection", "clipboard", "-target", "image/png", "-out"],
    }
    for display, command in commands.items():
        program = shutil.which(command[0])
        if program is None or display not in os.environ:
            continue
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, check=False, timeout=limits.url_timeout_s
        )
        if done.returncode == 0:
            return attachment_from_bytes(done.stdout, "clipboard.png", "clipboard", limits)
        said = done.stderr.decode(errors="replace").strip()
        if re.search(r"[Nn]othing is copied|not available|No suitable type|No selection", said):
            raise LookupError(said)
        raise OSError(said or f"{command[0]} failed")
    raise FileNotFoundError


def _from_desktop_clipboard(limits: ImageLimits) -> Attachment:
    """On Windows and macOS, where the system itself turns the clipboard into a picture."""
    from PIL import Image, ImageGrab

    quieten_pillow()
    content = _in_time(ImageGrab.grabclipboard, limits.url_timeout_s)
    if isinstance(content, Image.Image):
        return attachment_from_picture(content, "clipboard.png", "clipboard", limits)
    problem: Exception = LookupError()
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
    name = quoted(path)
    try:
        _check_regular(os.stat(path), name)
        # Should a FIFO take the file's place after the check, opening it must not block.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            _check_regular(status, name)
            check_bytes(status.st_size, name, limits)
            data = file.read(limits.max_file_bytes + 1)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    check_bytes(len(data), name, limits)
    return data


def _check_regular(status: os.stat_result, name: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name} is a folder.", hint="Give the path of one picture in it.")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name} is a device or pipe, not a file.", hint=USE_A_PICTURE)


def _unreadable(path: str, error: OSError | ValueError) -> ImageError:
    name = quoted(path)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        import difflib

        folder, base = os.path.split(path)
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = difflib.get_close_matches(base, os.listdir(folder or "."), n=1)
        close = f"Did you mean {quoted(os.path.join(folder, names[0]))}?" if names else ""
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
    reason = reasons.get(error.errno or 0, error.strerror or reason_of(error))
    return ImageError(f"{name} cannot be read: {reason}.", hint="Check the path.")


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
    name = quoted(url)
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
        host = quoted(urlsplit(url).hostname or url)
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
            f"{name} cannot be fetched: {reason_of(error)}.",
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
    name = quoted(url)
    for _ in range(limits.max_redirects + 1):
        response = _answer(url, limits, clients)
        if response.has_redirect_location:
            url = urljoin(url, response.headers["location"])
            continue
        if response.status_code != 200:
            status = f"{response.status_code} {response.reason_phrase}".strip()
            raise ImageError(
                f"{name} cannot be fetched: the server answered {one_line(status)}.",
                hint="Check the address. A picture behind a log-in has to be saved from a browser.",
            )
        if response.headers.get("content-encoding", "identity") not in ("identity", "gzip"):
            raise ImageError(
                f"{name} came compressed in a way that was not asked for.",
                hint="Download the picture with a browser and give its path.",
            )
        announced = response.headers.get("content-length", "")
        check_bytes(int(announced) if announced.isdecimal() else 0, name, limits)
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            check_bytes(len(data), name, limits)
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
            f"{quoted(url)} is not an http or https address.",
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


def is_this_machine(host: str) -> bool:
    """Whether `host` is a name or an address of the loopback interface."""
    import ipaddress

    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _addresses(host: str, url: str, limits: ImageLimits) -> list[str]:
    import ipaddress

    found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if limits.allow_private_hosts:
        return addresses
    for address in addresses:
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            nat64 = ip in ipaddress.IPv6Network("64:ff9b::/96")
            low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if nat64 else None
            ip = ip.ipv4_mapped or ip.sixtofour or low or ip
        if not ip.is_global or ip.is_multicast:
            raise ImageError(
                f"{quoted(url)} leads to {address}, an address inside this machine or network.",
                hint="Save the picture and give its path, or allow private hosts in the settings.",
            )
    return addresses
