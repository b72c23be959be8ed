"""A run's folder, which epoch is its best, and what it says when it is to be resumed and cannot be."""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from utils.data.classes import BDD100K
from utils.model import checkpoint
from utils.model.checkpoint import BEST, LATEST, ModelInfo
from utils.runtime.errors import DivergedError, UnreadableError, UserError
from utils.train.optim import TrainState
from utils.train.resume import AUTO, KEPT, ResumeState, find_resume, plateau
from utils.train.run import Run, RunSettings

INFO = ModelInfo("vit_tiny", 64, "stretch", sam_sha256="ab" * 32)


# What must stay within a run, and a flag that may change.
CONFIG: dict[str, Any] = {**dict.fromkeys(KEPT, 0), "prompt_mode": "box", "lr": 0.1, "losses": "dice", "keep_last": 2}


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that messages name."""
    monkeypatch.setattr(sys, "argv", ["train.py", "-lr", "0.1"])


def start(
    work_dir: Path,
    *,
    resume: ResumeState | None = None,
    choose_by_miou: bool = False,
    num_epochs: int = 1,
    patience: int | None = None,
    **config: Any,
) -> Run:
    """A run of a model of one layer."""
    model: Any = SimpleNamespace(mask_decoder=torch.nn.Linear(1, 1), LOSSES=("dice",), classes=BDD100K)
    settings = RunSettings(work_dir, "Drawn", num_epochs, patience, choose_by_miou, keep_last=2)
    optimizer = torch.optim.SGD(model.mask_decoder.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    state = TrainState(optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False))
    return Run(settings, model, INFO, state, {**CONFIG, **config}, resume)


def read(resume: Path) -> ResumeState:
    found = find_resume(resume, resume.parent, "Drawn")
    assert found
    return found


def record(epoch: int, loss: float, miou: float | None = None, **figures: Any) -> dict[str, Any]:
    measured = {} if miou is None else {"val_miou": miou}
    return {"epoch": epoch, "train_loss": loss, "seconds": 1.0, "images_per_second": 1.0, **measured, **figures}


@pytest.mark.parametrize(("mious", "best_epoch"), [([0.5, 0.25], 0), ([math.nan, 0.25], 1), ([None, None], 1)])
def test_best_is_chosen_by_validation_or_else_by_loss(
    tmp_path: Path, mious: list[float | None], best_epoch: int
) -> None:
    run = start(tmp_path, choose_by_miou=mious[0] is not None)
    records = [record(epoch, 2.0 - epoch, miou) for epoch, miou in enumerate(mious)]
    for one in records:
        run.finish_epoch(one)
    best = checkpoint.load_checkpoint(run.folder)
    assert best["epoch"] == best_epoch and best["metrics"] == records[best_epoch]


def test_validation_that_begins_midway_is_not_measured_against_losses(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.finish_epoch(record(0, -5.0))  # as a score this is 5, above any mIoU
    resumed = start(tmp_path, resume=read(run.folder), choose_by_miou=True)
    resumed.finish_epoch(record(1, 1.0, miou=0.25))
    assert checkpoint.load_checkpoint(run.folder / BEST)["epoch"] == 1
    again = start(tmp_path, resume=read(run.folder), choose_by_miou=True)
    assert again.best_score == 0.25


def test_all_flags_that_differ_are_listed_at_once(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.finish_epoch(record(0, 1.0))
    resume = read(run.folder)
    resume.require_same_flags({**CONFIG, "keep_last": 7})
    with pytest.raises(UserError) as error:
        resume.require_same_flags({**CONFIG, "lr": 0.2, "seed": 5, "augment": "flip"})
    assert str(error.value) == (
        f"{run.folder / LATEST}: -lr is 0.2, but the run has 0.1; --augment is flip, but the run has 0; "
        "--seed is 5, but the run has 0. Use the run's values, or start a new run"
    )
    with pytest.raises(UserError) as error:  # of which the loss follows, and box mode's flags do not matter
        resume.require_same_flags({**CONFIG, "prompt_mode": "semantic", "losses": "ce", "bbox_shift": 3})
    assert "--prompt_mode is semantic, but the run has box. Use" in str(error.value)
    with pytest.raises(UserError, match=r"--init_decoder is a\.pth, but the run has 0"):
        resume.require_same_flags({**CONFIG, "init_decoder": "a.pth"})
    for key in ("seed", "cache_views", "init_decoder"):  # runs that did not know the last began from SAM
        del resume.config[key]
    with pytest.raises(UserError, match="saved by an older version without --cache_views, --seed; start a new run"):
        resume.require_same_flags(CONFIG)


@pytest.mark.parametrize(
    "run_state",
    [
        *[{}, [], None, {"history": [], "best_score": 0.5}, {"rng": []}, {"progress": {}}],
        {"history": [{"epoch": 0}]},
        {"history": [{"epoch": 0, "train_loss": "a"}]},
        {"history": [{"epoch": 0, "train_loss": 0.5, "val_miou": []}]},
        {"history": [{"epoch": 0, "train_loss": 0.5, "val_miou": "a"}]},
    ],
)
def test_a_foreign_run_state(tmp_path: Path, run_state: Any) -> None:
    run = start(tmp_path)
    run.finish_epoch(record(0, 1.0))
    payload = torch.load(run.folder / LATEST, weights_only=True)
    if run_state and "best_score" not in run_state:  # one part is wrong
        run_state = {**payload["run_state"], **run_state}
    torch.save({**payload, "run_state": run_state}, run.folder / LATEST)
    with pytest.raises(UserError, match=r"latest.pth: its state was not written by train_bdd100k.py; start a new"):
        read(run.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": None},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"rng": [{"cpu": torch.zeros(3)}]},
        {"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(7, 7)}}, "param_groups": [{"params": [0, 1]}]}},
        {"progress": {"steps": 1, "skipped_steps": 0, "sums": torch.zeros(7), "seconds": 0.5}},
    ],
)
def test_states_that_do_not_fit(tmp_path: Path, change: dict[str, Any]) -> None:
    run = start(tmp_path)
    run.finish_epoch(record(0, 1.0))
    payload = torch.load(run.folder / LATEST, weights_only=True)
    state = {key: value for key, value in {**payload["run_state"], **change}.items() if value is not None}
    torch.save({**payload, "run_state": state}, run.folder / LATEST)
    with pytest.raises(UserError, match=r"latest.pth: its state does not fit this model; start a new run"):
        start(tmp_path, resume=read(run.folder))


def test_a_run_that_saved_nothing(tmp_path: Path) -> None:
    folder = start(tmp_path).folder
    with pytest.raises(UserError) as error:
        read(folder)
    said = "the run has saved no checkpoint yet; start a new run with the original command, without --resume"
    assert str(error.value) == f"{folder}: {said}"
    assert find_resume(AUTO, tmp_path, "Drawn") is None


def damage(path: Path) -> None:
    """Flip one bit of a weight, which leaves the file readable to PyTorch."""
    content = bytearray(path.read_bytes())
    weight = next(iter(torch.load(path, weights_only=True)["model"].values()))
    content[content.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(content)


def test_a_damaged_latest_gives_way_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path)
    for epoch in range(4):
        run.finish_epoch(record(epoch, 1.0))
    names = [LATEST, "medsam_model_latest.1.pth", "medsam_model_latest.2.pth"]
    assert sorted(path.name for path in run.folder.glob("*latest*")) == sorted(names)
    assert [len(read(run.folder / name).history) for name in names] == [4, 3, 2]
    damage(run.folder / LATEST)
    torch.load(run.folder / LATEST, weights_only=True)  # as good as any to PyTorch
    capsys.readouterr()
    assert len(read(run.folder).history) == 3
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and f"{LATEST}: truncated" in said and f"resuming from {names[1]}" in said
    (run.folder / LATEST).unlink()  # as a kill between two renames leaves it
    assert len(read(run.folder).history) == 3 and f"{LATEST} is missing" in capsys.readouterr().err
    for name in names[1:]:
        damage(run.folder / name)
    with pytest.raises(UserError, match=r"latest.1.pth: truncated, or not a checkpoint"):
        read(run.folder)


def test_what_the_system_refuses_costs_nothing_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a new run nor the `latest` before it is taken instead."""
    run = start(tmp_path)
    for epoch in range(2):
        run.finish_epoch(record(epoch, 1.0))

    def refuse(path: Any, *_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch, pytest.raises(UnreadableError) as error:
        patch.setattr("os.listdir", refuse)
        find_resume(AUTO, tmp_path, "Drawn")
    assert str(error.value) == f"{tmp_path}: cannot be read (Permission denied)"
    with monkeypatch.context() as patch, pytest.raises(UnreadableError) as error:
        patch.setattr("utils.model.checkpoint.load_plain", lambda path, **_: refuse(path))
        find_resume(run.folder, tmp_path, "Drawn")
    assert str(error.value) == f"{run.folder / LATEST}: cannot be read (Permission denied)"


def test_auto_takes_the_tasks_run_that_was_saved_last(tmp_path: Path) -> None:
    runs = [start(tmp_path) for _ in range(3)]
    for when, run in zip((200, 300), runs):
        run.finish_epoch(record(0, 1.0))
        os.utime(run.folder / LATEST, (when, when))
    other = tmp_path / "Other-20260101-0000"
    shutil.copytree(runs[0].folder, other)
    found = {name: find_resume(AUTO, tmp_path, name) for name in ("Drawn", "Other", "Nothing")}
    expected = {"Drawn": runs[1].folder / LATEST, "Other": other / LATEST, "Nothing": None}
    assert {name: state and state.path for name, state in found.items()} == expected


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path)
    run.finish_epoch(record(0, 1.0))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = {path: path.read_bytes() for path in run.folder.glob("*.pth")}
    for loss in (2.0, 0.5):  # of `latest`, and of `best`
        said = (
            rf"No space left on device: the disk at .* MiB free; make room there\)\..*intact\..*--resume {run.folder}"
        )
        with pytest.raises(UserError, match=said):
            run.finish_epoch(record(1, loss))
    assert {path: path.read_bytes() for path in run.folder.iterdir() if path.suffix in (".pth", ".tmp")} == before


def test_a_finished_run_says_how_to_train_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path)
    run.finish_epoch(record(0, 1.0))
    run.finish()
    longer = f"To train longer, add a larger -num_epochs (now 1) to: python train.py --resume {run.folder}\n"
    assert longer in capsys.readouterr().out
    said = f"{run.folder / LATEST}: already trained for 1 epochs; raise -num_epochs to resume"
    assert read(run.folder).finished(1, None) == said and read(run.folder).finished(2, None) is None


@pytest.mark.parametrize(
    ("mious", "patience", "since"),
    [
        ([], 1, None),
        ([0.5], 1, None),
        ([0.5, 0.5], 1, 1),
        ([0.5, None, 0.4, None], 2, None),  # epochs without a validation count nowhere
        ([None, 0.5, 0.4, None, 0.3], 2, 2),
        ([0.5, 0.4, 0.3, 0.6], 2, None),  # as of a run that was resumed with more patience, or without
        ([0.5, 0.4, 0.3, 0.2], 2, 3),
        ([0.5, math.nan, math.nan], 2, 2),
        ([math.nan, 0.5, 0.4], 2, None),
        ([0.5, 0.4, 0.3], None, None),
    ],
)
def test_plateau_by_hand(mious: list[float | None], patience: int | None, since: int | None) -> None:
    said = plateau([record(epoch, 1.0, miou) for epoch, miou in enumerate(mious)], patience)
    assert (
        said is None
        if since is None
        else said and f"not improved for {since} validation{'s' * (since > 1)} since" in said
    )


@pytest.mark.parametrize(
    ("mious", "larger"),
    [
        ([0.5, 0.4], "--patience (now 1)"),
        ([0.4, 0.5, 0.6], "-num_epochs (now 3)"),
        ([0.4, 0.5, 0.4], "-num_epochs (now 3) and --patience (now 1)"),
    ],
)
def test_a_run_with_patience_says_how_to_train_longer(
    mious: list[float], larger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(tmp_path, choose_by_miou=True, num_epochs=3, patience=1)
    for epoch, miou in zip(run.epochs(), mious):
        run.finish_epoch(record(epoch, 1.0, miou))
    assert not list(run.epochs())
    run.finish()
    said = capsys.readouterr().out
    assert f"To train longer, add a larger {larger} to: python train.py --resume {run.folder}\n" in said
    assert ("\nstopped early after epoch 2" in said) == (len(mious) < 3)
    # What it advises is enough, and no less is.
    finished = read(run.folder).finished(3, 1)
    assert finished and all((flag in larger) == (flag in finished) for flag in ("-num_epochs", "--patience"))
    epochs, patience = 3 + ("-num_epochs" in larger), 1 + ("--patience" in larger)
    assert read(run.folder).finished(epochs, patience) is None


def test_skipped_steps_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path)
    for epoch, skipped in enumerate((2, 0)):
        run.finish_epoch(record(epoch, 1.0 + epoch, skipped_steps=skipped))
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("1.00 images/s, 2 steps skipped (fp16 overflow) (best)") and "skipped" not in second


def test_runs_of_one_minute_get_folders_of_their_own(tmp_path: Path) -> None:
    assert len({start(tmp_path).folder for _ in range(3)}) == 3  # two of them at least within a minute


def test_work_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be made \(Not a directory\); give another --work_dir"):
        start(tmp_path / "file" / "work")


@pytest.mark.parametrize(("config", "fix"), [({"use_amp": True}, " or add -use_amp False"), ({"use_amp": False}, "")])
def test_what_a_run_that_diverged_advises_can_be_followed(config: dict[str, Any], fix: str, tmp_path: Path) -> None:
    run = start(tmp_path, num_epochs=9, **config)
    run.finish_epoch(record(0, 1.0))
    with pytest.raises(DivergedError) as error, run.training():
        raise DivergedError("epoch 1, step 2: not finite")
    assert str(error.value) == (
        f"epoch 1, step 2: not finite. The last checkpoint is intact. Fix the images{fix} and resume with: "
        f"python train.py --resume {run.folder}"
    )


def step_points(run: Run, steps: range, *, num_steps: int = 25) -> list[tuple[int, float]]:
    """Take steps whose loss is their number, and return the points of the curve within the epoch."""
    points: list[tuple[int, float]] = []
    assert run.logger
    run.logger._step_writer = SimpleNamespace(
        add_scalar=lambda tag, value, step: points.append((step, value)) if tag == "step/dice" else None,
        flush=lambda: None,
    )
    progress = run.progress
    progress.num_steps = num_steps
    for step in steps:
        before = torch.zeros(2, dtype=torch.float64) if progress.sums is None else progress.sums
        progress.sums = before + torch.tensor([2.0 * step, 2.0])  # two samples
        progress.steps = step
        run.step_done(progress, stop=False)
    return points


@pytest.mark.parametrize("stopped_after", [7, 10, 14, 25])
def test_points_within_an_epoch_are_means_also_of_a_resumed_run(stopped_after: int, tmp_path: Path) -> None:
    """As of an undisturbed run: a point's mean begins before the start that finds it."""
    run = start(tmp_path, num_epochs=9)
    run.finish_epoch(record(0, 1.0, optimizer_steps=24, skipped_steps=1))
    points = step_points(run, range(1, stopped_after + 1))
    run._save_latest()
    resumed = start(tmp_path, num_epochs=9, resume=read(run.folder))
    points += step_points(resumed, range(stopped_after + 1, 26))
    assert points == [(35, 5.5), (45, 15.5), (50, 23.0)]


def test_the_time_left_counts_epochs_and_validations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path, num_epochs=10, choose_by_miou=True)
    run.finish_epoch(record(0, 1.0, 0.5, val_seconds=60.0) | {"seconds": 540.0})
    assert capsys.readouterr().out.endswith("images/s (best); about 1 h 30 min left\n")
    progress = run.progress
    progress.steps, progress.num_steps = 1, 4
    progress.begun = time.monotonic() - 30  # a quarter of the epoch: 120 s each, and as many validations as epochs
    assert run._seconds_left() == pytest.approx((9 - 0.25) * 120 + 9 * 60, abs=5)
    step_points(run, range(1, 2), num_steps=4)
    assert progress.title == "epoch 2/10" and progress.note.startswith("loss 1.0000, run 26:")


def test_validations_come_every_few_epochs_and_at_the_end(tmp_path: Path) -> None:
    run = start(tmp_path, num_epochs=5, choose_by_miou=True)
    run.settings = replace(run.settings, val_every=2)
    assert [run.validates(epoch) for epoch in range(5)] == [False, True, False, True, True]
    assert not start(tmp_path, num_epochs=5).validates(4)
