"""From a reference to bytes and an attachment, with real files, a real server and a clipboard."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.core.pictures import encoded, picture, refused
from w2c_tui.core.conversation import content_hash
from w2c_tui.core.image import ImageLimits, open_image
from w2c_tui.core.reference import (
    attachment_from_clipboard,
    load_attachment,
    parse_reference,
    read_reference,
    split_references,
)

LOCAL = ImageLimits(url_timeout_s=5, allow_private_hosts=True)
posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX files")


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


@pytest.mark.parametrize("blank", ["", "  \n", "''", '" "'], ids=repr)
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


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(40 * 2**30)
    start = time.monotonic()
    refused(lambda: load_attachment(path), "sparse.png", "50 MiB")
    assert time.monotonic() - start < 1


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
    ids=["no host", "open bracket", "port", "long host", "zero byte"],
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


# The module


def test_reading_takes_what_parsing_gives(shot: Path) -> None:
    assert read_reference(parse_reference(shot.as_uri())) == shot.read_bytes()


def test_importing_loads_neither_numpy_nor_pillow_nor_a_http_client() -> None:
    script = (
        "import sys, w2c_tui.core.reference\n"
        "print(*({'numpy', 'PIL', 'httpx2', 'torch', 'ssl', 'http.client'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
