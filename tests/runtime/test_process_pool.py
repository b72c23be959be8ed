"""Jobs on several processes; how a whole script ends that is stopped is in test_pre_bdd100k.py."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import cv2
import pytest

from utils.runtime.errors import UserError
from utils.runtime.process_pool import run_jobs, usable_cores


def square(numbers: list[int]) -> list[int]:
    for number in numbers:
        if number < 0:
            raise UserError(f"{number}: below 0")
    return [number**2 for number in numbers]


def threads(jobs: list[int]) -> list[int]:
    return [cv2.getNumThreads() for _ in jobs]


def given(jobs: list[int]) -> list[int]:
    return [len(jobs)] * len(jobs)


def meet(paths: list[Path]) -> list[bool]:
    """Whether another process is at work at the same time, on one job too."""
    (path,) = paths
    path.touch()
    end = time.monotonic() + 60
    while len(list(path.parent.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    return [time.monotonic() < end]


def be_killed(jobs: list[int]) -> list[int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return jobs


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(num_workers: int) -> None:
    done: list[int] = []
    jobs = [3, 1, 2, *range(4, 100)]
    assert run_jobs(square, jobs, num_workers, done.append) == [job**2 for job in jobs]
    assert sum(done) == len(jobs)
    assert run_jobs(square, [], num_workers, done.append) == []


@pytest.mark.parametrize(
    ("num_workers", "num_jobs", "size"), [(1, 3, 3), (1, 16, 8), (1, 802, 8), (2, 31, 1), (2, 46, 2), (2, 802, 8)]
)
@pytest.mark.slow
def test_how_many_jobs_are_given_at_a_time(num_workers: int, num_jobs: int, size: int) -> None:
    """Eight, or an eighth of a process's share; but there is no other to be left without beside a single process."""
    rest = num_jobs % size
    results = run_jobs(given, list(range(num_jobs)), num_workers, lambda _: None)
    assert results == [size] * (num_jobs - rest) + [rest] * rest


def test_few_jobs_go_one_at_a_time(tmp_path: Path) -> None:
    """So that no process is left without: each of the two here waits for the other to begin."""
    assert run_jobs(meet, [tmp_path / "a", tmp_path / "b"], 2, lambda _: None) == [True, True]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_process_is_one_core(num_workers: int) -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        assert run_jobs(threads, [0, 0], num_workers, lambda _: None) == [1, 1]
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_a_job_raises_arrives(num_workers: int) -> None:
    on_interrupt = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match="-1: below 0"):
        run_jobs(square, [*range(41), -1, *range(41)], num_workers, lambda _: None)  # amid those sent together
    assert signal.getsignal(signal.SIGINT) is on_interrupt


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(UserError, match=r"a worker process was killed, .* --num_workers below 2"):
        run_jobs(be_killed, [1, 2, 3], 2, lambda _: None)


def test_usable_cores() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
