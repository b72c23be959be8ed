"""Jobs on several processes; how a whole script ends that is stopped is in test_pre_bdd100k.py."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import cv2
import pytest

from utils.errors import UserError
from utils.parallel import run_jobs, usable_cores


def square(number: int) -> int:
    if number < 0:
        raise UserError(f"{number}: below 0")
    return number**2


def threads(_: int) -> int:
    return cv2.getNumThreads()


def own_pid(_: int) -> int:
    time.sleep(0.002)  # for both processes to have their share
    return os.getpid()


def meet(path: Path) -> bool:
    """Whether another job is at work at the same time."""
    path.touch()
    end = time.monotonic() + 60
    while len(list(path.parent.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    return time.monotonic() < end


def be_killed(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(num_workers: int) -> None:
    done: list[None] = []
    jobs = [3, 1, 2, *range(4, 100)]
    assert run_jobs(square, jobs, num_workers, lambda: done.append(None)) == [job**2 for job in jobs]
    assert len(done) == len(jobs)
    assert run_jobs(square, [], num_workers, lambda: None) == []


def test_many_jobs_go_to_a_process_four_at_a_time() -> None:
    pids = run_jobs(own_pid, list(range(98)), 2, lambda: None)
    assert all(len(set(pids[start : start + 4])) == 1 for start in range(0, 98, 4))


def test_few_jobs_go_one_at_a_time(tmp_path: Path) -> None:
    """So that no process is left without: each of the two here waits for the other to begin."""
    assert run_jobs(meet, [tmp_path / "a", tmp_path / "b"], 2, lambda: None) == [True, True]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_process_is_one_core(num_workers: int) -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        assert run_jobs(threads, [0, 0], num_workers, lambda: None) == [1, 1]
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_a_job_raises_arrives(num_workers: int) -> None:
    on_interrupt = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match="-1: below 0"):
        run_jobs(square, [*range(41), -1, *range(41)], num_workers, lambda: None)  # amid those sent together
    assert signal.getsignal(signal.SIGINT) is on_interrupt


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(UserError, match=r"a worker process was killed, .* --num_workers below 2"):
        run_jobs(be_killed, [1, 2, 3], 2, lambda: None)


def test_usable_cores() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
