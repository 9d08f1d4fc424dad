"""Quantising a GGUF file with llama.cpp, in a process of its own.

The native call takes minutes, cannot be told to stop and ends the process when it fails badly; so
it runs in a child that can be killed. Run as `python -m w2c_tui.export.quantize SOURCE OUT TYPE`,
which ends when its standard input does. Knows nothing about models.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import gguf

from w2c_tui.core.errors import EngineError, MissingPackageError

if TYPE_CHECKING:
    from w2c_tui.backends.base import Report

_MAX_BUFFER_BYTES = 1 << 30
_POLL_S = 0.2


def quantize(source: Path, out: Path, quant: str, report: Report, expected_bytes: int = 0) -> None:
    """Write the GGUF file `source` to `out` in type `quant` ("q4_k_m", ...).

    Progress is `out`'s size; `report` may raise to cancel. Raises EngineError.
    """
    require_llama_cpp()
    command = [sys.executable, "-P", "-m", "w2c_tui.export.quantize", str(source), str(out), quant]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    log: list[bytes] = []
    reader = threading.Thread(target=lambda: log.extend(child.stderr or ()), daemon=True)
    reader.start()
    try:
        while child.poll() is None:
            size = out.stat().st_size if out.exists() else 0
            report("Quantising", min(size, expected_bytes), expected_bytes)
            time.sleep(_POLL_S)
    finally:
        child.kill()
        child.wait()
        reader.join()
        for pipe in (child.stdin, child.stderr):
            if pipe is not None:
                pipe.close()
    if child.returncode:
        lines = b"".join(log).decode(errors="replace").strip().splitlines()
        raise EngineError(
            f"llama.cpp could not write {quant}: {lines[-1] if lines else 'no reason given'}",
            hint="Export with --quant f16, or another type.",
        )


def require_llama_cpp() -> None:
    """Raise MissingPackageError if llama-cpp-python is not installed."""
    import importlib.util

    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingPackageError(
            "llama-cpp-python is not installed.", hint="Install it: pip install 'w2c-tui[gguf]'"
        )


def main() -> None:
    """The child: one native call, ended early when the parent goes away."""
    import ctypes

    import llama_cpp

    source, out, quant = sys.argv[1:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    problems: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level in (3, 4):
            problems.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"].value
    params.nthread = os.cpu_count() or 1
    params.max_buf_size = _MAX_BUFFER_BYTES
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), params):
        sys.exit("".join(problems) or "unknown reason")


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock the interpreter wants when it ends.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
