"""Keeping freed memory in the process, for training on a CPU.

Owns the settings of glibc's allocator. By default it returns every large block to the system as it
is freed and when the heap's end is free, and each step takes all its activations anew, page by page
(mallopt(3)).
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 2**28


def keep_freed_memory() -> bool:
    """Make the process reuse what it frees; False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  musl has a mallopt that does nothing
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
