"""Jobs on several processes; how a whole script ends that is stopped is in test_pre_bdd100k.py."""

from __future__ import annotations

import os
import signal

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


def be_killed(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(num_workers: int) -> None:
    done: list[int] = []
    jobs = [3, 1, 2, *range(4, 100)]  # enough of them that they are sent several at a time, and the last few are fewer
    assert run_jobs(square, jobs, num_workers, done.append) == [job**2 for job in jobs]
    assert sorted(done) == ([1] * len(jobs) if num_workers == 1 else [3] + [4] * 24)
    done.clear()
    assert run_jobs(square, jobs[:3], num_workers, done.append) == [9, 1, 4]
    assert done == [1, 1, 1]  # few jobs go one at a time, so that no process is left without
    assert run_jobs(square, [], num_workers, done.append) == []


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
