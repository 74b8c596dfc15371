"""Settings of the memory allocator that training runs faster with."""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's `mallopt`, from malloc.h."""


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, for its next use of it.

    Every step allocates and frees the same tensors. By default glibc gives large blocks back to the kernel at once and
    each step pays for new pages, which the kernel must clear. Elsewhere than on glibc nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # Older ones refuse more than 32 MiB. Without it the others would do harm: any setting ends glibc's own adjustment.
    if mallopt(MMAP_THRESHOLD, 2**30) or mallopt(MMAP_THRESHOLD, 2**25):
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(TOP_PAD, 2**28)
