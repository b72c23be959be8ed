"""One function over many jobs on several processes, with a clean end after errors and signals."""

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

# Jobs sent to a process at a time: sending takes half a millisecond, and a function may overlap the work of its jobs.
# Ctrl-C waits for the jobs already sent, up to 3 x MAX_CHUNK for each process.
MAX_CHUNK = 8


def usable_cores() -> int:
    """The number of cores that this process may use; containers and job schedulers limit it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[list[Job]], list[Result]], jobs: list[Job], num_workers: int, advance: Callable[[int], object]
) -> list[Result]:
    """Call `function` on a few jobs at a time, in order, in `num_workers` processes; with 1, in this process.

    OpenCV uses one core in each process.

    Args:
        function: at a module's top level, as worker processes import that module. It returns a result for each job.
        advance: called with the number of new results.

    Returns:
        The results in the order of the jobs.

    Raises:
        UserError: a worker process died.
        Exception: any exception of `function`. Jobs that have not started are dropped, as at Ctrl-C.
    """
    results: list[Result] = []
    num_workers = min(num_workers, len(jobs))
    size = MAX_CHUNK
    if num_workers > 1:
        size = max(1, min(size, len(jobs) // (8 * num_workers)))  # so that no process works alone for long at the end
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
    # spawn, because forking a process with threads (of tqdm, OpenCV, PyTorch) can deadlock.
    executor = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    on_interrupt = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # inherited by workers: only this process handles Ctrl-C
    try:
        coming = executor.map(function, chunks)
        signal.signal(signal.SIGINT, on_interrupt)
        for of_chunk in coming:
            results += of_chunk
            advance(len(of_chunk))
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed, most often because memory ran out; run the same command with --num_workers "
            f"below {num_workers} to resume"
        ) from None
    except KeyboardInterrupt:
        print("\nstopping after the images in progress", file=sys.stderr, flush=True)
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted shutdown would hang
        executor.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, on_interrupt)
    return results


def _start_worker() -> None:
    keep_freed_memory()
    cv2.setNumThreads(0)  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed; otherwise it waits for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
