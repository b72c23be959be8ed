"""How much memory this machine, or the container around this process, has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Version 2 and version 1 of control groups: the folder, the limit, what is used, and the cached files in it.
_VERSIONS = (
    ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def available_memory() -> int:
    """Bytes that this process can take before the system swaps or kills. Cached files count as free."""
    return max(0, min(_of_machine(), *_of_groups()))


def _of_machine() -> int:
    try:
        return _fields(PROC / "meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):  # macOS
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups() -> Iterator[int]:
    """What each control group around this process leaves it."""
    yield 2**63
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit, used, cached = _VERSIONS[bool(controllers)]
        # A container may see its own group as the root.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            place = CGROUPS / folder / group.relative_to("/")
            try:
                most, current = int((place / limit).read_text()), int((place / used).read_text())
                files = _fields(place / "memory.stat")
            except (OSError, ValueError):  # "max", or not visible
                continue
            yield most - current + sum(files.get(name, 0) for name in cached)


def _fields(path: Path) -> dict[str, int]:
    """The first two words of each line."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
