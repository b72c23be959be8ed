"""Fault injection through the real scripts with `tests/helpers/faults.py`; docs/RELIABILITY.md has the guarantees."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.faults import (
    Job,
    assert_same_end,
    checkpoints,
    fill,
    free_port,
    is_writing,
    latest_of,
    launcher,
    log_of,
    running,
    small_disk,
    steps_of,
    survive_kills,
    training,
    write_inputs,
)
from utils.model import checkpoint

pytestmark = pytest.mark.slow

# Seven images in groups of two: four optimizer steps an epoch, the last of a single image.
FLAGS = ["-num_epochs", 3, "-lr", "1e-3"]
PAIR = [*FLAGS, "--grad_acc_steps", 1]  # of two processes
SINGLE = [*FLAGS, "--grad_acc_steps", 2]
WITH_A_BAR = {"TQDM_MININTERVAL": "0"}  # which writes a line for each batch
SAVING = ["--save_every_steps", 1, "--resume", "auto"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `work_dir` of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    Job(training(inputs, folder / "work", *SINGLE), folder / "log").succeed()
    return folder / "work"


@pytest.fixture(scope="module")
def undisturbed_pair(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two processes."""
    folder = tmp_path_factory.mktemp("pair")
    Job([*launcher(2), *training(inputs, folder / "work", *PAIR)], folder / "log").succeed()
    return folder / "work"


def error_in(said: str) -> str:
    """The one line of what a job said that tells the user what went wrong; a launcher's own report is left out."""
    said = said.split("torch/distributed/elastic")[0]
    assert "Traceback" not in said, said
    (line,) = [line for line in re.split(r"[\r\n]", said) if line.startswith(("error: ", "interrupted: "))]
    return line


def test_kills_at_random_moments(inputs: Path, tmp_path: Path) -> None:
    flags = [*SINGLE, "-num_epochs", 6]  # which take longer than all that is done before the last kill
    Job(training(inputs, tmp_path / "undisturbed", *flags), tmp_path / "log").succeed()
    figures = survive_kills(
        lambda: Job(training(inputs, tmp_path / "work", *flags, *SAVING), tmp_path / "log"),
        tmp_path / "work",
        kills=6,
        rng=random.Random(0),
        start=0.5,
        window=0.1,
    )
    assert figures["checkpoint_reads"] > 0 and figures["saved_steps"][-1] < 24
    assert_same_end(tmp_path / "work", tmp_path / "undisturbed")


def test_the_same_seed_gives_the_same_figures(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    (run,) = undisturbed.iterdir()
    for name, flags in {"again": ["-num_workers", 2], "other": ["--seed", 1]}.items():
        Job(training(inputs, tmp_path / name, *SINGLE, *flags), tmp_path / "log").succeed()
    (again,), (other,) = (list((tmp_path / name).iterdir()) for name in ("again", "other"))
    assert log_of(again) == log_of(run) != log_of(other)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_latest_costs_what_came_after_the_one_before(
    damage: str, inputs: Path, undisturbed: Path, tmp_path: Path
) -> None:
    words = training(inputs, tmp_path / "work", *SINGLE, *SAVING)
    job = Job(words, tmp_path / "log")
    with running(job):
        job.wait_until(lambda: steps_of(tmp_path / "work") >= 2)
    latest = latest_of(tmp_path / "work")
    assert latest
    content = bytearray(latest.read_bytes())
    latest.unlink()  # first, as who is killed within a save may leave one file under both names
    if damage == "truncated":
        latest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        latest.write_bytes(content)
    said = Job(words, tmp_path / "log").succeed()
    assert re.search(r"warning: .*latest\.pth.* resuming from medsam_model_latest\.1\.pth", said)
    assert_same_end(tmp_path / "work", undisturbed)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_no_more(fault: str, inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "disk", 64) as disk:
            words = training(inputs, disk / "work", *SINGLE, *SAVING)
            job = Job(words, tmp_path / "log")
            with running(job):
                job.wait_until(lambda: steps_of(disk / "work") >= 1)
                if fault == "full":
                    filler = fill(disk, leave=2**20)
                else:  # which the system refuses while a file is open for writing
                    remount = ["mount", "-o", "remount,ro", str(disk)]
                    job.wait_until(lambda: subprocess.run(remount, capture_output=True).returncode == 0)
                assert job.wait() == 1
            line = error_in(job.said)
            assert f"{disk}/work/Fault-" in line and "--resume" in line and "The last checkpoint is intact" in line
            for path in checkpoints(disk / "work"):
                checkpoint.load_checkpoint(path)
            assert not is_writing(disk / "work")  # nothing half-written takes up the room
            if fault == "full":
                assert re.search(rf"No space left on device: the disk at {disk} has .* MiB free; make room there", line)
                filler.unlink()
            else:
                assert "Read-only file system" in line
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            Job(words, tmp_path / "log").succeed()
            assert_same_end(disk / "work", undisturbed)
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_full_disk_at_the_start(inputs: Path, tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "disk", 1) as disk:
            (disk / "work").mkdir()
            fill(disk, leave=0)
            job = Job(training(inputs, disk / "work", *SINGLE), tmp_path / "log")
            assert job.wait() == 1
            assert f"the disk at {disk} has 0.0 MiB free" in error_in(job.said)
    except PermissionError as error:
        pytest.skip(str(error))


def losing_a_data_file(job: Job, inputs: Path, tmp_path: Path) -> Path:
    """Take a file away from a job that trains, which must fail for it; the file, which is then back again."""
    victim, aside = inputs / "train" / "gts" / "image3.npy", tmp_path / "aside.npy"
    try:
        with running(job):
            job.wait_until(lambda: "], loss " in job.said)
            victim.rename(aside)
            assert job.wait() == 1
    finally:
        aside.rename(victim)
    return victim


def test_a_data_file_that_goes_during_training(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    words = training(inputs, tmp_path / "work", *SINGLE)
    job = Job(words, tmp_path / "log", **WITH_A_BAR)
    victim = losing_a_data_file(job, inputs, tmp_path)
    line = error_in(job.said)
    assert f"{victim}: " in line and "run pre_bdd100k.py again to repair it" in line and "--resume" in line
    assert steps_of(tmp_path / "work") % 4 != 0  # saved inside an epoch, though nobody asked for that
    Job([*words, "--resume", "auto"], tmp_path / "log").succeed()
    assert_same_end(tmp_path / "work", undisturbed)


def test_a_loader_process_that_is_killed(inputs: Path, tmp_path: Path) -> None:
    """One that dies once it has given its last batch is missed by nobody: then it is the next one's turn."""
    words = training(inputs, tmp_path / "work", *SINGLE, "-num_epochs", 500, "-num_workers", 1)
    job = Job(words, tmp_path / "log", **WITH_A_BAR)
    killed: set[int] = set()
    with running(job):
        job.wait_until(lambda: "], loss " in job.said)
        while not job.is_over:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended in between
                for pid in set(job.workers()) - killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        assert job.wait() == 1
    line = error_in(job.said)
    assert re.match(r"error: a loader process has ended \(.*\); if memory ran out, lower -num_workers", line)
    assert "--resume" in line or "nothing was saved yet" in line


def test_killed_workers_are_replaced_by_the_launcher(inputs: Path, undisturbed_pair: Path, tmp_path: Path) -> None:
    job = Job(
        [*launcher(2, "--max_restarts=2"), *training(inputs, tmp_path / "work", *PAIR, *SAVING)], tmp_path / "log"
    )
    with running(job):
        for rank in (0, 1):  # which is also how often the launcher has started them anew
            job.wait_until(lambda rank=rank: job.said.count("resuming at epoch") == rank)  # type: ignore[misc]
            before = steps_of(tmp_path / "work")
            job.wait_until(lambda before=before: steps_of(tmp_path / "work") > before)  # type: ignore[misc]
            os.kill(job.workers()[rank], signal.SIGKILL)
        said = job.succeed()
    assert said.count("resuming at epoch") == 2 and "error: " not in said
    assert len(list((tmp_path / "work").iterdir())) == 1
    assert_same_end(tmp_path / "work", undisturbed_pair)


def test_a_data_file_that_goes_is_told_by_one_of_two_processes(
    inputs: Path, undisturbed_pair: Path, tmp_path: Path
) -> None:
    """The main process saves the state, though another one failed, and the printed command resumes the job."""
    job = Job([*launcher(2), *training(inputs, tmp_path / "work", *PAIR)], tmp_path / "log", **WITH_A_BAR)
    losing_a_data_file(job, inputs, tmp_path)
    line = error_in(job.said)
    assert "run pre_bdd100k.py again to repair it" in line
    assert steps_of(tmp_path / "work") > 0
    name, *words = shlex.split(line.partition("resume with: ")[2])
    assert name == "torchrun" and words[0] == "--nproc_per_node=2" and words[-2] == "--resume"
    Job(["-m", "torch.distributed.run", *words], tmp_path / "log").succeed()
    assert_same_end(tmp_path / "work", undisturbed_pair)


def test_a_lost_machine(inputs: Path, undisturbed_pair: Path, tmp_path: Path) -> None:
    """Two launchers train together; one goes with all it started; the other ends; started again, both finish."""

    def start(attempt: int) -> list[Job]:
        flags = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        words = training(inputs, tmp_path / "work", *PAIR, *SAVING)
        return [
            Job([*launcher(1, *flags, f"--node_rank={node}"), *words], tmp_path / f"log{attempt}{node}")
            for node in (0, 1)
        ]

    here, other = start(0)
    with running(here, other):
        here.wait_until(lambda: steps_of(tmp_path / "work") >= 2)
        other.kill()
        assert here.wait() != 0
    line = error_in(here.said)
    assert "process 0 of 2 lost the connection to another one" in line and "--resume" in line
    again = start(1)
    with running(*again):
        said = [job.succeed() for job in again]
    assert "resuming at epoch" in said[0]
    assert_same_end(tmp_path / "work", undisturbed_pair)
