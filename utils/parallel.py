"""One function over many jobs, on several processes, ending cleanly whatever happens to them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2

from utils.errors import UserError
from utils.memory import keep_freed_memory

Job = TypeVar("Job")
Result = TypeVar("Result")

# Jobs sent to a process at a time: sending costs half a millisecond. Ctrl-C waits for what was sent, up to three times
# as many for each process.
MAX_CHUNK = 4


def usable_cores() -> int:
    """Cores that this process may run on, which containers and job schedulers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Job], Result], jobs: list[Job], num_workers: int, advance: Callable[[], object]
) -> list[Result]:
    """`[function(job) for job in jobs]`, in that order, on `num_workers` processes (in this one if that is 1).

    Each is one core: OpenCV is kept from using more.

    Args:
        function: a function of a module's top level, since jobs travel to processes that import that module anew.
        advance: called for each result.

    Raises:
        UserError: a worker process died.
        Exception: whatever `function` raises; jobs that have not begun are dropped then, as they are at Ctrl-C.
    """
    results: list[Result] = []
    num_workers = min(num_workers, len(jobs))
    if num_workers <= 1:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(0)
        try:
            for job in jobs:
                results.append(function(job))
                advance()
        finally:
            cv2.setNumThreads(threads)
        return results
    size = max(1, min(MAX_CHUNK, len(jobs) // (8 * num_workers)))  # so that none works long alone at the end
    # spawn: to fork a process that has threads (tqdm's, OpenCV's, PyTorch's) can deadlock.
    executor = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is answered here alone
    try:
        coming = executor.map(function, jobs, chunksize=size)
        signal.signal(signal.SIGINT, on_interrupt)
        for result in coming:
            results.append(result)
            advance()
    except BrokenProcessPool:
        raise UserError(f"a worker process was killed, most often for lack of memory (run the same command again with "
                        f"--num_workers below {num_workers}: it goes on where it was)") from None
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        executor.shutdown(cancel_futures=True)
    return results


def _start_worker() -> None:
    keep_freed_memory()
    cv2.setNumThreads(0)  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed outright, else it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
