"""utils/runtime/memory.py: what a machine and its control groups leave, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.runtime import memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of /proc and /sys/fs/cgroup of a machine with 10 GiB available, and no control groups."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc" / "meminfo", f"MemTotal: {2**24} kB\nMemAvailable: {10 * 2**20} kB\nHugePages_Total: 0\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(folder: Path, limit: str, used: float, cached: float, *, version: int = 2) -> None:
    """A control group whose files have these amounts in GiB; half of the cached files are active."""
    names = ("memory.max", "memory.current", "") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    write(folder / names[0], f"{limit}\n")
    write(folder / names[1], f"{int(used * GIB)}\n")
    half = int(cached / 2 * GIB)
    write(folder / "memory.stat", f"anon 5\n{prefix}inactive_file {half}\n{prefix}active_file {half}\n")


def test_a_machine_without_groups(machine: Path) -> None:
    assert memory.available_memory() == 10 * GIB


def test_a_container_that_sees_itself_as_the_root(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "0::/docker/abc\n")
    group(machine / "cgroup", str(8 * GIB), 5, 2)
    assert memory.available_memory() == 5 * GIB


def test_the_narrowest_of_nested_groups_counts(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "0::/slurm/job/step\n")
    group(machine / "cgroup" / "slurm" / "job" / "step", "max", 1, 0)
    group(machine / "cgroup" / "slurm" / "job", str(4 * GIB), 1, 0.5)
    group(machine / "cgroup" / "slurm", str(100 * GIB), 1, 0)
    assert memory.available_memory() == 3.5 * GIB


def test_groups_of_version_1(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "5:cpu,cpuacct:/other\n4:memory:/job\n1:name=systemd:/\n0::/\n")
    group(machine / "cgroup" / "memory" / "job", str(2 * GIB), 1.5, 1, version=1)
    group(machine / "cgroup" / "memory", str(2**63 - 4096), 12, 0, version=1)
    group(machine / "cgroup" / "other", "0", 0, 0)
    assert memory.available_memory() == 1.5 * GIB


def test_a_group_that_is_over_its_limit(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "0::/\n")
    group(machine / "cgroup", str(GIB), 2, 0)
    assert memory.available_memory() == 0


def test_a_system_without_proc(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "proc" / "meminfo").unlink()
    assert memory.available_memory() > 2**26  # all of this machine's


def test_this_machine() -> None:
    assert 2**20 < memory.available_memory() < 2**50
