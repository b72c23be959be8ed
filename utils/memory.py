"""Memory that the C library keeps for the next tensor, in place of giving it back to the system each time."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Have freed memory reused, whatever the size, until the process ends; does nothing where the library is not glibc.

    By itself glibc takes what is larger than 32 MB from the system for each tensor anew and gives it back after use.
    The system hands it out page by page, zeroed, at the first touch of each, and a step of training that allocates the
    same tensors as the step before pays for that every time.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
