"""Memory that the C library keeps for the next tensor, in place of giving it back to the system each time."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Have freed memory reused, whatever its size, until the process ends; nothing where the C library is not glibc.

    By itself glibc takes what is larger than 32 MB from the system for each tensor anew and gives it back after use.
    The system hands it out page by page, zeroed, at the first touch of each, and a step of training that allocates the
    same tensors as the step before pays for that every time.
    """
    mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})  # never map, never trim


def mallopt(options: dict[int, int]) -> None:
    """Set options of glibc's malloc; nothing where the C library is another."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in options.items():
            libc.mallopt(option, value)
