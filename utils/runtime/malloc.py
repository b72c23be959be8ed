"""Settings of glibc's malloc, so that freed memory is reused for the next tensor."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Reuse freed memory of any size until the process ends; without glibc, do nothing.

    By default glibc requests each block above 32 MB from the system and returns it after use. The system zeroes and
    maps it page by page at first use, which every training step would pay for.
    """
    mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})  # never map, never trim


def mallopt(options: dict[int, int]) -> None:
    """Set options of glibc's malloc; with another C library, do nothing."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in options.items():
            libc.mallopt(option, value)
