"""What a loader makes of the end of its worker processes; what a script says of it is in the scripts' tests."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from tests.helpers.scripts import with_shared_memory_of
from utils.data import loaders as loader_module
from utils.data.loaders import Loader, require_shared_memory, sample_bytes, usable_workers
from utils.runtime.errors import LostWorkerError

ROOT = Path(__file__).resolve().parents[2]


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
    with pytest.raises(LostWorkerError, match=r"a loader process has ended \(.*\); .*, lower -num_workers"):
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
@pytest.mark.slow
def test_a_process_that_fails_ends_though_its_workers_ignore_signals(failure: str) -> None:
    code = (
        "from utils.runtime import cli; from utils.runtime.errors import UserError\n"
        "from utils.data.loaders import Loader\n"
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


# Loads batches of 4 x 256 KiB in a worker and prints the error in one line.
LOAD = """
import torch
from utils.runtime import cli
from utils.data.loaders import Loader
class Data:
    def __len__(self): return 8
    def __getitem__(self, index): return {{"image": torch.ones(1 << 16), "parts": {parts}}}
cli.run(lambda: [None for _ in Loader(Data(), batch_size=4, num_workers=1{options})] and None)
"""


@pytest.mark.parametrize("options", ["", ", collate_fn=lambda samples: samples"])  # collated in shared memory, or not
@pytest.mark.slow
def test_a_batch_for_which_there_is_no_shared_memory(options: str) -> None:
    code = LOAD.format(parts="[]", options=options)
    ended = with_shared_memory_of("256k", [sys.executable, "-c", code], cwd=ROOT, timeout=60)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert line.startswith("error: a loader process cannot send a batch: /dev/shm of 256 KiB is full (No space")
    assert "--shm-size" in line and line.endswith("--num_workers 0")


@pytest.mark.slow
def test_shared_memory_that_takes_no_semaphore() -> None:
    command = [
        "bash",
        "-c",
        f'head -c 9k /dev/zero > /dev/shm/x; exec {sys.executable} -c "$0"',
        LOAD.format(parts="[]", options=""),
    ]
    ended = with_shared_memory_of("8k", command, cwd=ROOT, timeout=60)
    line = ended.stderr.splitlines()[-1]  # head complains too
    assert ended.returncode == 1 and line.startswith("error: a loader process cannot") and "--num_workers 0" in line


def assert_too_many_open_files(code: str) -> None:
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1 and line.startswith("error: a loader process cannot send a batch (too many open")
    assert "ulimit -n" in line


@pytest.mark.parametrize("limit", [24, 60])  # the worker meets it, or the main process
@pytest.mark.slow
def test_more_open_files_than_are_allowed(limit: int) -> None:
    before = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
    # torch opens files of its own as it is imported.
    code = "import torch, utils.data.loaders, utils.runtime.cli\n" + before
    code += LOAD.format(parts="[torch.ones(1) for _ in range(9)]", options=", collate_fn=lambda samples: samples")
    assert_too_many_open_files(code)


@pytest.mark.parametrize("spare", range(4))  # 4 are enough
@pytest.mark.slow
def test_a_worker_with_few_files_to_spare(spare: int) -> None:
    """It needs one for each of: the tensor, its copy, the socket to hand it over, and the connection."""
    code = f"""
import contextlib, os, resource, torch
from utils.data.loaders import Loader
from utils.runtime import cli
class Data:
    def __len__(self): return 1
    def __getitem__(self, index):
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        taken = []
        with contextlib.suppress(OSError):
            while True: taken.append(os.dup(0))
        for number in taken[len(taken) - {spare}:]: os.close(number)
        return torch.ones(1)
cli.run(lambda: [None for _ in Loader(Data(), num_workers=1)] and None)
"""
    assert_too_many_open_files(code)


def test_a_worker_lives_on_if_the_main_process_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process knows the reason, which the worker's end would hide."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    for error in (BrokenPipeError(errno.EPIPE, "x"), EOFError(), OSError(errno.EMFILE, "x")):
        loader_module._on_sharer_error(type(error), error, None)
    assert statuses == [loader_module.UNSENT + errno.EMFILE]


@pytest.mark.slow
def test_a_batch_that_cannot_be_sent_ends_the_worker_and_not_in_a_wait_for_ever() -> None:
    loader = Loader([0, 1], num_workers=1, collate_fn=lambda _: threading.Lock())  # type: ignore[arg-type]
    with pytest.raises(LostWorkerError, match="a loader process has ended"):
        next(iter(loader))


class Exiting(Dataset):
    def __init__(self, status: int) -> None:
        self.status = status

    def __getitem__(self, index: int) -> torch.Tensor:
        os._exit(self.status)


@pytest.mark.slow
@pytest.mark.parametrize("status", [1, 2, errno.ENOSPC])
def test_the_status_of_a_crash_is_no_reason(status: int) -> None:
    with pytest.raises(LostWorkerError, match=r"a loader process has ended \(DataLoader worker") as error:
        list(Loader(Exiting(status), sampler=[0], num_workers=1))
    assert os.strerror(status) not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "said"), [(errno.EIO, r"has ended \(Input/output"), (errno.ENOSPC, "cannot send")])
def test_a_batch_that_the_system_does_not_send_says_why(number: int, said: str) -> None:
    class Unsendable:
        def __reduce__(self) -> Any:
            raise OSError(number, os.strerror(number))

    loader = Loader([0, 1], num_workers=1, collate_fn=lambda _: Unsendable())  # type: ignore[arg-type]
    with pytest.raises(LostWorkerError, match=said):
        next(iter(loader))


def test_processes_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(LostWorkerError, match=r"cannot be started .*temporarily unavailable.*--num_workers 0"):
        next(iter(Loader([0, 1], num_workers=1)))  # type: ignore[arg-type]


def test_shared_memory_is_measured_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        f_blocks, f_bavail, f_frsize = 16384, 15000, 4096  # the 64 MiB of a container

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    batch = 4 * sample_bytes({"image": torch.zeros(1024, 1024, 3), "parts": [torch.zeros(1)]})
    assert batch == 4 * (12 * 2**20 + 4096)
    require_shared_memory(batch, 0)  # which needs none
    with pytest.raises(LostWorkerError) as error:
        require_shared_memory(batch, 4)
    assert str(error.value) == (
        "/dev/shm has 59 MiB free of 64 MiB, and loader processes (--num_workers 4) need up to 480 MiB there; start "
        "the container with --shm-size 497m or more, or give --num_workers 0"
    )
    require_shared_memory(batch // 16, 4)
    require_shared_memory(batch, 4, num_batches=1)
    with pytest.raises(LostWorkerError, match="need up to 96 MiB there"):
        require_shared_memory(batch, 4, num_batches=2)
    monkeypatch.setattr(loader_module.distributed, "local_world_size", lambda: 2)
    with pytest.raises(LostWorkerError, match="60 MiB there"):
        require_shared_memory(batch // 16, 4)
    monkeypatch.setattr(Disk, "f_blocks", 0)  # no limit
    require_shared_memory(batch, 4)


@pytest.mark.parametrize(("asked", "processes", "given"), [(4, 1, 4), (9, 1, 6), (4, 2, 3), (4, 9, 1), (0, 9, 0)])
def test_no_more_workers_than_cores(
    asked: int, processes: int, given: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader_module, "usable_cores", lambda: 6)
    monkeypatch.setattr(loader_module.distributed, "local_world_size", lambda: processes)
    assert usable_workers(asked) == given
    said = capsys.readouterr().out
    assert said.count("\n") == (given != asked)
    assert given == asked or said.startswith(f"--num_workers {asked} is lowered to {given}: 6 cores are available")
