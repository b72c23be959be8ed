"""What a loader makes of the end of its worker processes; what a script says of it is in the scripts' tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from utils.errors import LostWorkerError
from utils.loader import Loader

ROOT = Path(__file__).resolve().parents[1]


class Doomed(Dataset):
    """The worker process that makes sample 1 dies, so many seconds after it has begun with it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 1 and self.seconds:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((1,), index)


def test_a_worker_that_dies_at_work() -> None:
    with pytest.raises(LostWorkerError, match=r"a loader process has ended \(.*\): .*, lower -num_workers"):
        list(Loader(Doomed(0), sampler=[0, 1], num_workers=1))


def test_a_worker_that_dies_with_a_batch_that_it_offers() -> None:
    """A tensor's memory is asked of the process that made it. And nothing is raised before a batch is fetched."""
    before = multiprocessing.active_children()
    batches = iter(Loader(Doomed(0.5), sampler=[0, 1], num_workers=1))
    assert next(batches) == 0
    (worker,) = set(multiprocessing.active_children()) - set(before)
    while worker.exitcode is None:  # a handler of SIGCHLD would raise here
        time.sleep(0.01)
    assert worker.exitcode == -signal.SIGKILL
    with pytest.raises(LostWorkerError, match="a loader process has ended"):
        next(batches)


class Failing(Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: int) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("of the data set"), EOFError("of a file")])
def test_what_a_data_set_raises_is_no_lost_worker(error: Exception, num_workers: int) -> None:
    raised = None
    before = set(multiprocessing.active_children())
    try:  # not pytest.raises, which would keep all frames
        list(Loader(Failing(error), sampler=[0], num_workers=num_workers))
    except (RuntimeError, EOFError) as caught:
        raised = type(caught), str(error) in str(caught)
    for worker in set(multiprocessing.active_children()) - before:  # PyTorch raises in a cycle, which holds them
        worker.kill()
    assert raised == (type(error), True)


@pytest.mark.parametrize(
    "failure",
    [
        "error = UserError('the reason'); raise error",  # in a cycle with the frame that holds the loader
        "error = ValueError('the reason'); raise error",  # kept by Python, with that frame
        "next(batches)",  # in a worker, which PyTorch tells by such a cycle
    ],
)
def test_a_process_that_fails_ends_though_its_workers_ignore_signals(failure: str) -> None:
    code = (
        "from utils import cli; from utils.errors import UserError; from utils.loader import Loader\n"
        "class Failing:\n"
        "    def __len__(self): return 9\n"
        "    def __getitem__(self, index):\n"
        "        if index: raise UserError('the reason')\n"
        "        return 0\n"
        "def main():\n"
        "    batches = iter(Loader(Failing(), num_workers=2)); next(batches)\n"
        f"    {failure}\n"
        "cli.run(main)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].endswith("rror: the reason")
