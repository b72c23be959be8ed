"""Fault injection through the real scripts: killed processes, lost machines, full disks, damaged or missing files.

`tests/test_reliability.py` is the short form. The long form is a command that takes minutes. It kills one training run
with `kill -9` many times. The run must end with exactly the weights of an undisturbed run:

    python -m tests.helpers.faults --kills 20 [--seed 0] [--processes 2] [--prompt_mode semantic]

In semantic mode the frame is not square, and the cache supplies the features of several views.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segment_anything import build_sam_vit_tiny
from tests.helpers.inputs import write_split
from tests.helpers.scripts import ONE_THREAD
from utils.model import checkpoint
from utils.runtime.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 64  # side of an image
TIMEOUT = 900.0  # seconds until a job counts as hung; long, because the machine may be busy


def write_inputs(folder: Path, *, num_images: int = 7, seed: int = 0, width: int = SIZE) -> Path:
    """Write "train", preprocessed images of noise with three classes each, and "sam.pth", a random `vit_tiny`."""
    rng = np.random.default_rng(seed)
    items = {}
    for i in range(num_images):
        labels = np.full((SIZE, width), 255, dtype=np.uint8)
        for class_id in rng.choice(19, size=3, replace=False):
            y, x = rng.integers(0, SIZE - 16, size=2)
            labels[y : y + 16, x : x + 16] = class_id
        items[f"image{i}"] = (rng.integers(0, 256, size=(SIZE, width, 3), dtype=np.uint8), labels)
    write_split(folder / "train", items)
    torch.manual_seed(seed)
    torch.save(build_sam_vit_tiny(image_size=SIZE).state_dict(), folder / "sam.pth")
    return folder


def training(inputs: Path, work_dir: Path, *flags: object) -> list[str]:
    """The arguments for Python that train on the files of `write_inputs`."""
    words = [
        REPOSITORY / "train_bdd100k.py",
        "-i",
        inputs / "train",
        "-model_type",
        "vit_tiny",
        "-checkpoint",
        inputs / "sam.pth",
        "-work_dir",
        work_dir,
        "-task_name",
        "Fault",
        "--device",
        "cpu",
        "-batch_size",
        1,
        "-num_workers",
        0,
        *flags,
    ]
    return [str(word) for word in words]


def free_port() -> int:
    """A TCP port that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(processes: int, *flags: object) -> list[str]:
    """The arguments for Python that start torchrun, on a free port unless `flags` set one."""
    port = [] if any("master_port" in str(flag) for flag in flags) else [f"--master_port={free_port()}"]
    return ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *port, *(str(flag) for flag in flags)]


# Jobs are forked from a process that has imported PyTorch, which saves most of their start. It has no threads yet.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["train_bdd100k", "torch.distributed.launcher.api"])


def _be(words: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run what `python <words>` would run in this process, with stdout and stderr in a file."""
    multiprocessing.set_start_method(None, force=True)  # otherwise inherited from the fork server
    with open(log, "wb", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ |= environment
    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class Job:
    """A running script, alone or under a launcher, and its output."""

    def __init__(self, words: list[str], log: Path, **environment: str) -> None:
        """Start the script.

        Args:
            words: arguments for Python.
            log: file for stdout and stderr.
            environment: additional environment variables.
        """
        self.log = log
        log.touch()
        self._process = _forks.Process(target=_be, args=(words, log, {**ONE_THREAD, **environment}))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def is_over(self) -> bool:
        return not self._process.is_alive()

    def workers(self) -> list[int]:
        """The processes that a launcher has started, ordered by rank."""
        return sorted(int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())

    def wait_until(self, is_so: Callable[[], Any], *, timeout: float = TIMEOUT) -> None:
        """Wait for a condition while the job runs."""
        end = time.monotonic() + timeout
        while not is_so():
            assert not self.is_over, f"ended too soon: {self.said}"
            assert time.monotonic() < end, f"waited in vain: {self.said}"
            time.sleep(0.002)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for the end and return the exit status."""
        self._process.join(timeout)
        if not self.is_over:
            self.kill()
            raise AssertionError(f"hung: {self.said}")
        assert self._process.exitcode is not None
        return self._process.exitcode

    def succeed(self, timeout: float = TIMEOUT) -> str:
        """Wait for the end, which must be without error, and return the output."""
        status = self.wait(timeout)
        assert status == 0, self.said
        return self.said

    def kill(self) -> None:
        """Kill the process and its children with SIGKILL, as a power failure would."""
        victims = [] if self.is_over else [self.pid, *self.workers()]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.join()

    def kill_alone(self) -> None:
        """Kill only the process itself with SIGKILL."""
        self._process.kill()
        self._process.join()


@contextmanager
def running(*jobs: Job) -> Iterator[None]:
    """Kill the jobs at the end of the context."""
    try:
        yield
    finally:
        for job in jobs:
            job.kill()


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """Mount a file system of that size in memory at `folder`.

    Raises:
        PermissionError: this user may not mount.
    """
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        raise PermissionError(f"no small disk can be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Fill the disk with one file, then free `leave` bytes. Returns the file."""
    path = disk / "filler"
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(2**14)):
                pass
        except OSError:
            file.truncate(max(file.tell() - leave, 0))
    return path


def checkpoints(work_dir: Path) -> list[Path]:
    """The checkpoints of all runs in `work_dir`."""
    return sorted(work_dir.glob("*/medsam_model_*.pth"))


def latest_of(work_dir: Path) -> Path | None:
    """The newest `latest` checkpoint of all runs."""
    found = list(work_dir.glob("*/" + checkpoint.LATEST))
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def is_writing(work_dir: Path) -> bool:
    """Whether a `latest` checkpoint is being written now."""
    return any(work_dir.glob(f"*/.{checkpoint.LATEST}.*.tmp"))


class Reader(threading.Thread):
    """Read every checkpoint again and again, like an evaluation during training."""

    def __init__(self, work_dir: Path) -> None:
        super().__init__(daemon=True)
        self.work_dir = work_dir
        self.reads = 0
        self.failures: list[str] = []
        self._ended = threading.Event()
        self._seen: set[Path] = set()

    def run(self) -> None:
        while not self._ended.is_set():
            self.read_all()
            time.sleep(0.05)

    def read_all(self) -> None:
        self._seen |= {path for path in checkpoints(self.work_dir) if path.name == checkpoint.LATEST}
        for path in {*checkpoints(self.work_dir), *self._seen}:  # once written, `latest` must never be missing
            try:
                checkpoint.load_checkpoint(path)
            except UserError as error:
                self.failures.append(str(error))
            self.reads += 1

    def end(self) -> None:
        self._ended.set()
        self.join()


def state_of(path: Path) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """The weights, moments and RNGs of a `latest` checkpoint, and its epochs' figures without timings."""
    payload = checkpoint.load_checkpoint(path)
    state = payload["run_state"]
    moments = [value for moment in state["optimizer"]["state"].values() for value in moment.values()]
    rngs = [value for rng in state["rng"] for value in rng.values()]
    return [*payload["model"].values(), *moments, *rngs], [without_times(record) for record in state["history"]]


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """An epoch's figures without timings."""
    times = ("seconds", "val_seconds", "images_per_second")
    return {key: value for key, value in record.items() if key not in times}


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The figures of `log.jsonl` without timings."""
    return [without_times(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_end(work_dir: Path, other: Path) -> None:
    """Assert that the newest runs of both have bitwise equal weights, moments, RNGs and figures."""
    ours, theirs = latest_of(work_dir), latest_of(other)
    assert ours and theirs
    (tensors, figures), (expected, expected_figures) = state_of(ours), state_of(theirs)
    assert len(tensors) == len(expected) and all(map(torch.equal, tensors, expected))
    assert figures == expected_figures
    assert log_of(ours.parent) == log_of(theirs.parent) == figures


def survive_kills(
    make: Callable[[], Job], work_dir: Path, *, kills: int, rng: random.Random, start: float, window: float
) -> dict[str, Any]:
    """Start a job and kill it at a random moment, `kills` times. Then let it end.

    The moment is in turn during the start, during training, and while `latest` is being written.

    Args:
        make: starts the job.
        work_dir: the folder of its runs.
        kills: how many times to kill it.
        rng: chooses the moments.
        start: seconds that a start takes.
        window: seconds of training to choose from. `kills * window` must be less than the whole training.

    Returns:
        The number of kills, of kills before training and while a checkpoint was written, of checkpoint reads, and the
        saved optimizer steps at each kill.
    """
    figures: dict[str, Any] = {"kills": 0, "before_training": 0, "while_writing": 0, "saved_steps": []}
    reader = Reader(work_dir)
    reader.start()
    while figures["kills"] < kills:
        job, begun, turn = make(), time.monotonic(), figures["kills"] % 3
        with running(job):
            if turn:
                job.wait_until(lambda job=job: "run folder:" in job.said)  # type: ignore[misc]
                begun = time.monotonic()
            job.wait_until(partial(_has_come, begun + rng.uniform(0, window if turn else start)))
            if turn == 2:
                job.wait_until(lambda: is_writing(work_dir))
                time.sleep(rng.uniform(0, 0.02))
            job.kill()
        figures["kills"] += 1
        figures["while_writing"] += is_writing(work_dir)
        figures["before_training"] += "run folder:" not in job.said
        reader.read_all()
        figures["saved_steps"].append(steps_of(work_dir))
    make().succeed()
    reader.read_all()
    reader.end()
    assert not reader.failures, reader.failures
    return {**figures, "checkpoint_reads": reader.reads}


def _has_come(moment: float) -> bool:
    return time.monotonic() > moment


def steps_of(work_dir: Path) -> int:
    """The optimizer steps of the newest `latest` checkpoint."""
    path = latest_of(work_dir)
    if path is None:
        return 0
    state = checkpoint.load_checkpoint(path)["run_state"]
    return sum(record["optimizer_steps"] for record in state["history"]) + state["progress"]["steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--prompt_mode", choices=["box", "semantic"], default="box")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = write_inputs(Path(name), width=SIZE if args.prompt_mode == "box" else SIZE + 32)
        prefix = launcher(args.processes) if args.processes > 1 else []
        flags = ["--grad_acc_steps", 2, "-num_epochs", args.epochs, "-lr", "1e-3", "--prompt_mode", args.prompt_mode]

        def run(work_dir: str, *more: object) -> Job:
            return Job([*prefix, *training(folder, folder / work_dir, *flags, *more)], folder / f"{work_dir}.log")

        # The first start also imports and encodes. Counted as start time, that would put kills after the end.
        run("warm-up", "-num_epochs", 2).succeed()
        begun = time.monotonic()
        undisturbed = run("undisturbed")
        undisturbed.wait_until(lambda: "run folder:" in undisturbed.said)
        start = time.monotonic() - begun
        undisturbed.succeed()
        training_seconds = time.monotonic() - begun - start
        figures = survive_kills(
            lambda: run("killed", "--save_every_steps", 1, "--resume", "auto"),
            folder / "killed",
            kills=args.kills,
            rng=rng,
            start=start,
            window=training_seconds / args.kills,
        )
        assert_same_end(folder / "killed", folder / "undisturbed")
        total = steps_of(folder / "undisturbed")
        seconds = {"undisturbed_seconds": round(start + training_seconds), "seconds": round(time.monotonic() - begun)}
        figures |= {"all_steps": total, "bitwise_equal": True, "processes": args.processes, **seconds}
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
