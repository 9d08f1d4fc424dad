"""The llama.cpp inside of llama-cpp-python, and what it has to say.

Owns finding it, its release, where native log lines go (the logger "llama.cpp") and how native code
reports progress. Every native call is made by `gguf_header`, `llama` and `image_encoder`.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from w2c_tui.core.errors import MissingPackageError

VERSION = "0.3.36"
"""The release of llama-cpp-python whose low-level structures these are; they change between
releases."""

try:
    import llama_cpp
    import llama_cpp.llama_cpp as lib
    from llama_cpp import mtmd_cpp as mtmd
    from llama_cpp._ctypes_extensions import load_shared_library

    ggml = lib._lib
    # On Windows a library does not answer for those that it uses. Elsewhere it must be asked: the
    # package has several copies of ggml, and only the one that it uses knows where to log.
    if not hasattr(ggml, "gguf_init_from_file"):
        ggml = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
except (ImportError, OSError, RuntimeError) as error:
    raise MissingPackageError(
        f"GGUF models need llama-cpp-python, which cannot be used: {error}",
        hint=f"Run: pip install llama-cpp-python=={VERSION}  (it compiles llama.cpp for some "
        "minutes and needs a C++ compiler), or choose --backend hf.",
    ) from error
if llama_cpp.__version__ != VERSION:
    raise MissingPackageError(
        f"llama-cpp-python {llama_cpp.__version__} is installed, and {VERSION} is needed.",
        hint=f"Run: pip install llama-cpp-python=={VERSION}  or choose --backend hf.",
    )

__all__ = [
    "FLASH_ATTENTION",
    "VERSION",
    "Closing",
    "Report",
    "forget_errors",
    "ggml",
    "lib",
    "mtmd",
    "never",
    "reporting",
    "supports_gpus",
    "text_of",
    "uses_gpus",
    "what_it_said",
]

Report = Callable[[str, int, int], None]

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
"""llama.h: enum llama_flash_attn_type."""

_logger = logging.getLogger("llama.cpp")
# Without this, Python itself would print warnings to the terminal where nobody set up logging.
_logger.addHandler(logging.NullHandler())
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_errors: collections.deque[str] = collections.deque(maxlen=8)
_line: list[str] = []
_level = logging.INFO


def _take_log(level: int, text: bytes | None, _: Any) -> None:
    global _level
    _level = _LEVELS.get(level, _level)
    _line.append((text or b"").decode("utf-8", "replace"))
    if not _line[-1].endswith("\n"):
        return
    line = "".join(_line).rstrip()
    _line.clear()
    if _level >= logging.ERROR:
        _errors.append(line)
    _logger.log(_level, "%s", line)


_log_callback = lib.llama_log_callback(_take_log)
lib.llama_log_set(_log_callback, None)
# This one sets mtmd's own as well.
mtmd.mtmd_helper_log_set(_log_callback, None)
mtmd.mtmd_log_set(_log_callback, None)


lib.llama_backend_init()


def forget_errors() -> None:
    """What was said until now has nothing to do with what comes."""
    _errors.clear()


def what_it_said() -> str:
    """The error that llama.cpp logged first since `forget_errors`, as the end of a message.

    Later ones only say that something failed.
    """
    said = next((line for line in _errors if line.strip()), "")
    _errors.clear()
    # Without the names of the functions that it went through.
    said = re.sub(r"^([\w:]+: )+(error loading model: )?", "", said).strip().rstrip(".")
    return f": {said}" if said else ""


def text_of(value: bytes | None) -> str:
    """What native code returned as text."""
    return (value or b"").decode("utf-8", "replace")


def supports_gpus() -> bool:
    """Whether this build of llama.cpp can put layers on GPUs."""
    return bool(lib.llama_supports_gpu_offload())


def uses_gpus(n_gpu_layers: int) -> bool:
    """Whether a model of which so many layers are asked to be on GPUs (-1: all) has some there."""
    return n_gpu_layers != 0 and supports_gpus()


class Closing:
    """Something native that is given back by `close`, at the latest at the end of a `with`."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def reporting(report: Report, phase: str, total: int) -> Iterator[Any]:
    """A native progress callback that calls `report`; what that raises comes out at the end."""
    raised: list[BaseException] = []

    def progress(done: float, _: Any) -> bool:
        try:
            report(phase, int(done * total), total)
        except BaseException as error:  # noqa: BLE001 - must not travel through native code
            raised.append(error)
        return not raised

    yield progress
    if raised:
        raise raised[0]


def never() -> bool:
    """Whether to stop, where nobody asks for it."""
    return False
