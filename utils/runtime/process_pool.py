"""One function over many jobs, on several processes, ending cleanly whatever happens to them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2

from utils.runtime.errors import UserError
from utils.runtime.malloc import keep_freed_memory

Job = TypeVar("Job")
Result = TypeVar("Result")

# Jobs given to a process at a time: sending costs half a millisecond, and what a function overlaps, it overlaps within
# them. Ctrl-C waits for what was sent, up to three times as many for each process.
MAX_CHUNK = 8


def usable_cores() -> int:
    """Cores that this process may run on, which containers and job schedulers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[list[Job]], list[Result]], jobs: list[Job], num_workers: int, advance: Callable[[int], object]
) -> list[Result]:
    """`function(jobs)`, a few jobs at a time, in their order, on `num_workers` processes (in this one if that is 1).

    OpenCV uses one core in each.

    Args:
        function: a function of a module's top level, since jobs travel to processes that import that module anew. It
            returns one result for each job.
        advance: called with the number of results that have come.

    Raises:
        UserError: a worker process died.
        Exception: whatever `function` raises; jobs that have not begun are dropped then, as they are at Ctrl-C.
    """
    results: list[Result] = []
    num_workers = min(num_workers, len(jobs))
    size = MAX_CHUNK
    if num_workers > 1:
        size = max(1, min(size, len(jobs) // (8 * num_workers)))  # so that none works long alone at the end
    chunks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    if num_workers <= 1:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(0)
        try:
            for chunk in chunks:
                results += function(chunk)
                advance(len(chunk))
        finally:
            cv2.setNumThreads(threads)
        return results
    # spawn: to fork a process that has threads (tqdm's, OpenCV's, PyTorch's) can deadlock.
    executor = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is answered here alone
    try:
        coming = executor.map(function, chunks)
        signal.signal(signal.SIGINT, on_interrupt)
        for of_chunk in coming:
            results += of_chunk
            advance(len(of_chunk))
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed, most often for lack of memory (run the same command again with "
            f"--num_workers below {num_workers}: it goes on where it was)"
        ) from None
    except KeyboardInterrupt:
        print("\nstopping: what was begun is finished first", file=sys.stderr, flush=True)
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a shutdown that is interrupted leaves a script that never ends
        executor.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, on_interrupt)
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
