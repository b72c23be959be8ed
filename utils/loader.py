"""Batches from worker processes, which leave signals to the main process and whose end is one line."""

from __future__ import annotations

import atexit
import multiprocessing
import re
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from utils.errors import LostWorkerError
from utils.stopping import SIGNALS


class Loader(DataLoader):
    """A `DataLoader` that draws from no RNG but its own, and tells of a worker's end where a batch is fetched.

    PyTorch's handler of SIGCHLD would tell of it wherever the main process just is: within an optimizer step, or a file
    that is half written. Without it, the main process looks for its workers when none has given a batch for 5 s.
    """

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        """
        Args:
            options: as `DataLoader` has them.
        """
        super().__init__(dataset, worker_init_fn=_ignore_signals, generator=torch.Generator(), **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # PyTorch names its own iterator
        """
        Raises:
            LostWorkerError: a worker process has ended, most often as the system killed it.
        """
        handler = signal.getsignal(signal.SIGCHLD)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what is half made can only be ended with noise
        try:
            batches = super().__iter__()
        finally:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        try:
            yield from batches
        except (RuntimeError, ConnectionError, EOFError) as error:  # the latter if it ends while it hands over a tensor
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            is_own = "Caught " in reason or (isinstance(error, RuntimeError) and not _LOST.search(reason))
            if is_own or self.num_workers == 0:
                raise  # it is the data set's
            raise LostWorkerError(f"a loader process has ended ({reason}): if it was for lack of memory, lower "
                                  "-num_workers") from None


_LOST = re.compile(r"DataLoader worker \(pid|Pin memory thread exited")


@atexit.register
def _end_workers() -> None:
    """Else multiprocessing would ask those that an error left by SIGTERM, which they ignore, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _ignore_signals(worker: int) -> None:
    """Who signals all of a job would else kill its workers under the step to be finished."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
