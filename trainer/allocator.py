"""Memory of the process, for training on a CPU: what is freed stays, what is cached has bounds.

Owns the settings of glibc's allocator. By default it returns every large block to the system as it
is freed and when the heap's end is free, and each step takes all its activations anew.
Owns the bounds of oneDNN's caches, too, which by default keep the kernels of the last 1,024 shapes:
every new length of a batch is several.
"""

from __future__ import annotations

import ctypes
import os
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


def bound_kernel_caches() -> None:
    """Fewer of oneDNN's kernels are kept, unless the environment says how many.

    Holds for processes that have not computed yet. As many as a step uses are enough: with new
    lengths every step the default took 7 GiB more within 150 steps.
    """
    # torch caches what oneDNN caches, by a name of its own.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_MAX_KERNELS))


_MAX_KERNELS = 64
"""A dense model has about five shapes of weights, and training takes three products with each."""
