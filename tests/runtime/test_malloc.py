"""Freed memory that is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# New pages of memory (of 4 kB) that each of eight rounds touches: two tensors of 64 MB, freed again.
ROUNDS = """
import resource
import torch
from utils.runtime.malloc import keep_freed_memory

if {kept}:
    keep_freed_memory()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    a, b = torch.ones(2**24), torch.ones(2**24)
    del a, b
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_used_again() -> None:
    fewest = {}  # the kernel may take a page back in one round or the other
    for kept in (False, True):
        script = ROUNDS.format(kept=kept)
        result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        fewest[kept] = min(map(int, result.stdout.split()))
    assert fewest[True] < 0.1 * fewest[False]
