"""Batches from worker processes: they ignore signals, and their failures are one-line errors."""

from __future__ import annotations

import atexit
import errno
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data.datasets import (
    EvaluationDataset,
    TrainingDataset,
    TrainingSampler,
    collate_evaluation,
    collate_training,
)
from utils.runtime import distributed
from utils.runtime.device import Precision
from utils.runtime.errors import LostWorkerError, UserError
from utils.runtime.process_pool import usable_cores
from utils.runtime.signals import SIGNALS

SHARED_MEMORY = Path("/dev/shm")  # where PyTorch puts batches that one process hands to another
PREFETCHED = 2  # batches that DataLoader requests from each worker in advance
HELD = 2  # batches of the main process: the one in use and the one before it
PAGE = 4096
UNSENT = 64  # plus errno: the exit status of a worker that cannot send a batch; a crash has 1


class Loader(DataLoader):
    """A `DataLoader` with its own random generator that reports a worker's end when a batch is fetched.

    PyTorch's SIGCHLD handler would raise anywhere, such as within an optimizer step or while a file is written. Without
    it, the main process checks its workers when no batch has come for 5 s.
    """

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        """Set up a `DataLoader` with its options."""
        super().__init__(dataset, worker_init_fn=_prepare_worker, generator=torch.Generator(), **options)
        if self.num_workers:
            self.collate_fn = _IntoSharedMemory(self.collate_fn)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # PyTorch names its own iterator
        """Iterate over the batches of an epoch.

        Raises:
            LostWorkerError: a worker process cannot be started, cannot send a batch, or has ended, most often killed by
                the system.
            UserError: an error of the data set, without PyTorch's traceback.
        """
        handler = signal.getsignal(signal.SIGCHLD)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a half-started loader ends with tracebacks
        try:
            if self.num_workers:
                multiprocessing.Lock()  # fails here, before PyTorch starts, if there is no room for semaphores
            batches = super().__iter__()
        except OSError as error:  # of a semaphore, which is in shared memory, or of a fork
            raise LostWorkerError(
                f"a loader process cannot be started ({error.strerror or error}); give --num_workers 0"
            ) from None
        finally:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        try:
            yield from batches
        except UserError as error:
            kind = type(error)
            raise kind(str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()) from None
        except (RuntimeError, OSError, EOFError) as error:  # EOFError if it ends while it sends a tensor
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            is_own = "Caught " in reason or (isinstance(error, RuntimeError) and not _LOST.search(reason))
            if is_own or self.num_workers == 0:
                raise  # an error of the data set
            workers = getattr(batches, "_workers", ())
            if isinstance(error, EOFError | ConnectionError):
                _wait_for_an_end(workers)
            for worker in workers:
                if worker.exitcode == -signal.SIGBUS:  # the system granted memory that it does not have
                    reason = os.strerror(errno.ENOSPC)
                elif (number := (worker.exitcode or 0) - UNSENT) in errno.errorcode:
                    reason = os.strerror(number)
            raise _not_sent(reason) or LostWorkerError(
                f"a loader process has ended ({reason}); if memory ran out, lower -num_workers"
            ) from None


def _wait_for_an_end(workers: Sequence[Any]) -> None:
    """Wait until a worker that is about to end has ended, and its status is known."""
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()


_LOST = re.compile(r"DataLoader worker \(pid|Pin memory thread exited|ancdata|Too many open files|unable to mmap")


@dataclass(frozen=True)
class _IntoSharedMemory:
    """Collates a batch in a worker and puts it into shared memory at once, where a failure raises an error.

    Otherwise the sending thread does it, drops a batch that it cannot send, and the main process waits forever.
    """

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        try:
            batch = self.collate(samples)
            for tensor in _tensors(batch):
                tensor.share_memory_()
        except (RuntimeError, OSError) as error:
            raise _not_sent(str(error)) or error from None
        return batch


def _not_sent(reason: str) -> LostWorkerError | None:
    """The error to raise if `reason` is one for which a batch cannot be sent."""
    if "Too many open files" in reason or "ancdata" in reason:  # a batch has an open file for each tensor
        return LostWorkerError(
            "a loader process cannot send a batch (too many open files); raise the limit with ulimit -n 65536, or give "
            "--num_workers 0"
        )
    if "shared memory" in reason or "unable to mmap" in reason or reason == os.strerror(errno.ENOSPC):
        return LostWorkerError(
            f"a loader process cannot send a batch: {SHARED_MEMORY}{_size()} is full "
            f"({reason.rpartition(': ')[2]}); start the container with a larger --shm-size, or give "
            "--num_workers 0"
        )
    return None


def _size() -> str:
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except OSError:
        return ""
    return f" of {_bytes(disk.f_blocks * disk.f_frsize)}"


def _bytes(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB" if number >= 2**20 else f"{number / 2**10:,.0f} KiB"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def sample_bytes(sample: Any) -> int:
    """The bytes of a sample in shared memory, where a tensor takes whole pages."""
    return sum(math.ceil(tensor.nbytes / PAGE) * PAGE for tensor in _tensors(sample))


def require_shared_memory(bytes_of_batch: int, num_workers: int, num_batches: int | None = None) -> None:
    """Check that shared memory holds the waiting batches of all processes of this machine.

    Args:
        num_batches: the most that a process has, if known.

    Raises:
        LostWorkerError: they do not fit, and a worker would fail later.
    """
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except OSError:  # macOS has no such folder; on Linux, PyTorch reports failures
        return
    waiting = PREFETCHED * num_workers + HELD
    if num_batches is not None:
        waiting = min(waiting, num_batches)
    needed = bytes_of_batch * waiting * distributed.local_world_size()
    if num_workers and disk.f_blocks and needed > disk.f_bavail * disk.f_frsize:  # no blocks: no limit
        raise LostWorkerError(
            f"{SHARED_MEMORY} has {_bytes(disk.f_bavail * disk.f_frsize)} free of "
            f"{_bytes(disk.f_blocks * disk.f_frsize)}, and loader processes (--num_workers {num_workers}) need up to "
            f"{_bytes(needed)} there; start the container with --shm-size {math.ceil(needed / 2**20) + 16}m or more, "
            "or give --num_workers 0"
        )


def usable_workers(num_workers: int) -> int:
    """`num_workers`, but at most this machine's cores divided by its processes. Prints a message if it lowers it."""
    cores, processes = usable_cores(), distributed.local_world_size()
    most = max(1, cores // processes)
    if num_workers > most:
        shared = f" for {processes} processes" if processes > 1 else ""
        distributed.say(f"--num_workers {num_workers} is lowered to {most}: {cores} cores are available{shared}")
    return min(num_workers, most)


@atexit.register
def _end_workers() -> None:
    """Kill workers at exit: they ignore SIGTERM, and multiprocessing would wait for them forever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _prepare_worker(worker: int) -> None:
    """Ignore signals, which often go to all processes of a job: the main process still needs its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        tempfile.gettempdir()  # kept from now on: when files have run out, it fails with "No such file or directory"
    # One thread sends batches. Another, multiprocessing's resource sharer, sends the open files of their tensors, and
    # calls sys.excepthook when it fails.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    sys.excepthook = _on_sharer_error


def _on_sharer_error(_: type[BaseException], error: BaseException, traceback: Any) -> None:
    if not isinstance(error, EOFError | ConnectionError):  # of the main process, which knows why it broke off
        _end_worker(error, traceback)


def _end_worker(error: BaseException, _: Any) -> NoReturn:
    """End a worker that cannot send a batch; the main process finds the reason in the exit status."""
    number = (error.errno or 0) if isinstance(error, OSError) else 0
    os._exit(UNSENT + number if number in errno.errorcode else 1)


def training_sampler(dataset: TrainingDataset, *, batch_size: int, seed: int, grad_acc_steps: int) -> TrainingSampler:
    """The order of this process's batches of each epoch."""
    return TrainingSampler(
        dataset.num_prompts(),
        grad_acc_steps=grad_acc_steps,
        batch_size=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=seed,
    )


def training_loader(
    dataset: TrainingDataset, *, batch_size: int, num_workers: int, seed: int, grad_acc_steps: int, precision: Precision
) -> Loader:
    """A loader of this process's batches of each epoch; its `batch_sampler` is a `TrainingSampler`."""
    sampler = training_sampler(dataset, batch_size=batch_size, seed=seed, grad_acc_steps=grad_acc_steps)
    _require_shared_memory(dataset, batch_size, len(sampler), num_workers)
    return Loader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_training,
        pin_memory=precision.device.type == "cuda",
    )


def evaluation_loader(dataset: EvaluationDataset, *, batch_size: int, num_workers: int, precision: Precision) -> Loader:
    """A loader of this process's share; every image belongs to exactly one process.

    Batches are the same for any number of processes, as other batches would round differently.
    """
    every = range(len(dataset))
    batches = [list(every[i : i + batch_size]) for i in range(0, len(every), batch_size)]
    most = -(-len(batches) // distributed.world_size())  # the same in all processes: all fail, or none
    _require_shared_memory(dataset, batch_size, most, num_workers)
    return Loader(
        dataset,
        batch_sampler=batches[distributed.rank() :: distributed.world_size()],
        num_workers=num_workers,
        collate_fn=collate_evaluation,
        pin_memory=precision.device.type == "cuda",
    )


def _require_shared_memory(
    dataset: TrainingDataset | EvaluationDataset, batch_size: int, num_batches: int, num_workers: int
) -> None:
    if num_workers:
        require_shared_memory(min(batch_size, len(dataset)) * sample_bytes(dataset[0]), num_workers, num_batches)
