"""Keeping freed memory: on Linux the C library returns large blocks to the kernel when they are freed, and the kernel
hands them out again page by page, zeroed. A training step allocates the same large tensors every time, so this costs more
than many of the operations that fill them (measured in docs/log.md).
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Have the C library reuse freed blocks of any size within this process. Returns whether it agreed (glibc only).

    The process then keeps its peak memory until it ends: for long work, not for libraries to call on import.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_TOP_PAD, 64 * 2**20))
