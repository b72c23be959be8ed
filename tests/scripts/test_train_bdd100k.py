"""train_bdd100k.py end to end: what a run leaves behind, resuming it, and what it says to bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import infer_bdd100k
import train_bdd100k
from segment_anything import build_sam_vit_tiny
from tests.helpers.inputs import IMAGE_SIZE, write_split
from tests.helpers.scripts import log_of, run_script
from utils.data.classes import BDD100K, IGNORE_LABEL
from utils.model import checkpoint
from utils.runtime import cli
from utils.train.run import Run

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def run(train: Train, npy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs with validation. Tests that change it take a copy."""
    work_dir = tmp_path_factory.mktemp("run")
    return train(work_dir, "-num_epochs", 2, "-task_name", "Drawn", "--val_npy_path", npy / "val", "-lr", "1e-3")


@pytest.fixture
def run_copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "work" / run.name))


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = {"seconds", "val_seconds", "images_per_second"}
    return [{key: record[key] for key in record.keys() - times} for record in log]


def test_a_run_leaves_checkpoints_log_configuration_and_curve(run: Path, npy: Path) -> None:
    assert re.fullmatch(r"Drawn-\d{8}-\d{4}", run.name)
    files = {"medsam_model_best.pth", "medsam_model_latest.pth", "medsam_model_latest.1.pth"}
    files |= {"log.jsonl", "results.csv", "config.json", "starts.jsonl"}
    files |= {"loss_curve.png", "class_iou.png", "train_batch.jpg", "val_samples"}
    assert {path.name for path in run.iterdir()} == files
    for name in ("loss_curve.png", "class_iou.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (run / "val_samples").iterdir()) == ["epoch_001.jpg", "epoch_002.jpg"]

    log = log_of(run)
    assert [record["epoch"] for record in log] == [0, 1]
    with open(run / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for record, row in zip(log, table, strict=True):
        assert {f"val_iou/{name}" for name in BDD100K.names} < record.keys() == row.keys()
        assert {key: float(value) if value else None for key, value in row.items()} == record
        ious = [record[f"val_iou/{name}"] for name in BDD100K.names]
        assert None in ious and record["val_miou"] == pytest.approx(np.mean([iou for iou in ious if iou is not None]))
        assert {"train_loss", "dice", "bce", "iou", "lr", "val_miou", "seconds", "images_per_second"} <= record.keys()
        assert record["optimizer_steps"] == 1 and record["skipped_steps"] == 0  # two batches of 4 make one group

    config = json.loads((run / "config.json").read_text())
    assert config["tr_npy_path"] == str(npy / "train") and config["num_epochs"] == 2
    assert config["weight_decay"] == 0.01  # a default, so that the file says all


def test_the_next_command_can_be_pasted(
    train: Train, npy: Path, sam_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, sam = tmp_path / "my data", tmp_path / "my sam.pth"
    data.symlink_to(npy)
    sam.symlink_to(sam_file)
    features = tmp_path / "my features"
    flags = ["--val_npy_path", data / "val", "-checkpoint", sam, "-use_amp", "--amp_dtype", "bf16"]
    flags += ["--cache_embeddings", features, "--cache_dtype", "float32"]
    folder = train(tmp_path / "my runs", "-num_epochs", 1, *flags)
    before, _, command = capsys.readouterr().out.replace("\\\n", " ").partition("Next:\n")
    assert f"--resume '{folder}'\n" in before
    args = infer_bdd100k.get_args_parser().parse_args(shlex.split(command)[2:])
    assert (args.val_npy_path, args.sam_checkpoint, args.use_amp) == (data / "val", sam, True)
    assert args.model_checkpoint == folder / checkpoint.BEST
    assert args.output_dir == infer_bdd100k.choose_output_dir(args) == folder / "eval-val"
    args.given.remove("output_dir")
    assert infer_bdd100k.choose_output_dir(args) == folder / "eval-val"  # the default is the same
    # Without these it would encode again what the run has encoded.
    assert (args.amp_dtype, args.cache_embeddings, args.cache_dtype) == ("bf16", str(features), "float32")
    default = infer_bdd100k.get_args_parser().get_default
    assert {name: default(name) for name in train_bdd100k.OF_INFERENCE} == train_bdd100k.OF_INFERENCE


def test_without_validation_the_next_command_names_the_split_beside(
    train: Train, npy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "-num_epochs", 1)
    assert f"python infer_bdd100k.py --val_npy_path {npy}/val \\\n" in capsys.readouterr().out


def test_best_holds_what_was_trained_and_latest_the_state_beside_it(run: Path) -> None:
    best = checkpoint.load_checkpoint(run / "medsam_model_best.pth")
    assert all(key.startswith("mask_decoder.") for key in best["model"])
    assert "run_state" not in best
    latest = checkpoint.load_checkpoint(run / "medsam_model_latest.pth")
    assert latest["epoch"] == 1
    assert {"optimizer", "scheduler", "scaler", "rng", "history"} <= latest["run_state"].keys()


def test_validation_every_few_epochs_and_at_the_end(
    train: Train, npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_bdd100k, "train_one_epoch", lambda *_, **__: {"loss": 1.0})
    folder = train(tmp_path, "-num_epochs", 5, "--val_npy_path", npy / "val", "--val_every", 2)
    assert ["val_miou" in record for record in log_of(folder)] == [False, True, False, True, True]


def train_to(
    mious: list[float], train: Train, npy: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch, *flags: object
) -> Path:
    """A run whose epochs end at once and whose validations find `mious`; one beyond them fails as full memory does."""
    found = iter(mious)

    def measure(_: Any) -> float:
        try:
            return next(found)
        except StopIteration:
            raise MemoryError from None

    with monkeypatch.context() as patched:
        patched.setattr(train_bdd100k, "train_one_epoch", lambda *_, **__: {"loss": 1.0})
        patched.setattr(train_bdd100k, "mean_iou", measure)
        return train(work_dir, "--val_npy_path", npy / "val", *flags)


# Validations, the flags that they are counted by, and how many epochs the run has in the end.
PATIENCE: dict[str, tuple[list[float], list[object], int]] = {
    "two that are no better": ([0.1, 0.3, 0.2, 0.3], ["--patience", 2], 4),  # as good is no better
    "a better one begins the count anew": ([0.3, 0.2, 0.4, 0.1, 0.2], ["--patience", 2], 5),
    "of the second epoch each": ([0.2, 0.1, 0.1], ["--patience", 2, "--val_every", 2], 6),
    "at once": ([0.3, 0.2], ["--patience", 1], 2),
    "always better": ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], ["--patience", 1], 8),
    "off": ([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], ["--patience", 0], 8),
}


@pytest.mark.parametrize("case", PATIENCE)
@pytest.mark.slow
def test_patience_stops_a_run_that_no_longer_improves(
    case: str,
    train: Train,
    npy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mious, flags, epochs = PATIENCE[case]
    folder = train_to(mious, train, npy, tmp_path, monkeypatch, "-num_epochs", 8, *flags)
    log = log_of(folder)
    assert [record["val_miou"] for record in log if "val_miou" in record] == mious and len(log) == epochs
    best = checkpoint.load_checkpoint(folder / checkpoint.BEST)
    assert best["metrics"]["val_miou"] == max(mious)
    said = capsys.readouterr().out
    line = (
        f"\nstopped early after epoch {epochs}: val mIoU has not improved for {flags and flags[1]} validation"
        f"{'s' * (flags != ['--patience', 1])} "
        f"since the best, {max(mious):.4f} of epoch {best['epoch'] + 1}\n"
    )
    assert (line in said) == (epochs < 8) and said.count("stopped early") == (epochs < 8)
    assert "Next:\n" in said  # it ends as any other


@pytest.mark.slow
def test_a_killed_run_stops_where_one_that_was_not_killed_does(
    train: Train, npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mious = [0.1, 0.3, 0.2, 0.3]
    flags: list[object] = ["-num_epochs", 8, "-task_name", "Drawn", "--patience", 2]
    with pytest.raises(MemoryError):
        train_to(mious[:3], train, npy, tmp_path, monkeypatch, *flags)
    (folder,) = tmp_path.iterdir()
    assert len(checkpoint.load_checkpoint(folder / checkpoint.LATEST)["run_state"]["history"]) == 3
    train_to(mious[3:], train, npy, tmp_path, monkeypatch, *flags, "--resume", "auto")
    assert len(log_of(folder)) == 4

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    train_to([], train, npy, tmp_path, monkeypatch, *flags, "--resume", "auto")
    said = capsys.readouterr().out
    assert said == (
        f"{folder}/medsam_model_latest.pth: stopped early after epoch 4: val mIoU has not improved for 2 "
        "validations since the best, 0.3000 of epoch 2; raise --patience to resume, or give 0 for no limit\n"
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    train_to([0.2], train, npy, tmp_path, monkeypatch, *flags, "--resume", folder, "--patience", 3)
    assert len(log_of(folder)) == 5
    train_to([0.2, 0.1, 0.1], train, npy, tmp_path, monkeypatch, *flags[:-2], "--resume", folder, "--patience", 9)
    assert len(log_of(folder)) == 8


@pytest.mark.slow
def test_one_epoch_resumed_to_two_equals_two_bit_for_bit(train: Train, run: Path, npy: Path, tmp_path: Path) -> None:
    flags = ["-task_name", "Drawn", "--val_npy_path", npy / "val", "-lr", "1e-3"]
    folder = train(tmp_path, "-num_epochs", 1, *flags)
    assert train(tmp_path, "-num_epochs", 2, *flags, "--resume", folder) == folder

    resumed, straight = (checkpoint.load_checkpoint(f / "medsam_model_latest.pth") for f in (folder, run))
    for key, value in straight["model"].items():
        assert torch.equal(resumed["model"][key], value), key
    moments = [state["run_state"]["optimizer"]["state"] for state in (resumed, straight)]
    assert moments[0].keys() == moments[1].keys() and moments[0]
    for index, moment in moments[1].items():
        assert all(torch.equal(moments[0][index][key], value) for key, value in moment.items()), index
    assert without_times(log_of(folder)) == without_times(log_of(run))


def test_resuming_with_the_same_effective_batch_cut_otherwise(train: Train, run_copy: Path, npy: Path) -> None:
    # As someone would whose memory ran out; the manual says that it changes nothing else.
    flags = ["--val_npy_path", npy / "val", "-lr", "1e-3", "-batch_size", 2, "--grad_acc_steps", 8]
    train(run_copy.parent, "-num_epochs", 3, "--resume", run_copy, *flags)
    assert [record["optimizer_steps"] for record in log_of(run_copy)] == [1, 1, 1]


# Seven images in groups of two: four optimizer steps an epoch, the last of a single image.
SMALL_STEPS = ["-batch_size", 1, "--grad_acc_steps", 2, "-num_epochs", 2, "-lr", "1e-3"]


@pytest.fixture(scope="module")
def undisturbed(train: Train, npy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed"), *SMALL_STEPS, "--val_npy_path", npy / "val")


def assert_same_run(folder: Path, other: Path) -> None:
    """Weights, moments and figures are those of the other run, bit for bit."""
    states = [checkpoint.load_checkpoint(path / "medsam_model_latest.pth") for path in (folder, other)]
    assert all(torch.equal(states[0]["model"][key], value) for key, value in states[1]["model"].items())
    ours, theirs = (state["run_state"] for state in states)
    moments = theirs["optimizer"]["state"]
    assert moments and all(
        torch.equal(ours["optimizer"]["state"][index][key], value)
        for index, moment in moments.items()
        for key, value in moment.items()
    )
    assert ours["scheduler"] == theirs["scheduler"]
    assert torch.equal(ours["rng"][0]["cpu"], theirs["rng"][0]["cpu"])
    assert without_times(log_of(folder)) == without_times(log_of(other))


@pytest.mark.parametrize(
    ("number", "step", "said"),
    [
        (signal.SIGINT, 1, "epoch 1/2, after 1 optimizer step"),
        (signal.SIGTERM, 4, "epoch 1/2, after 4 optimizer steps"),
        (signal.SIGTERM, 7, "epoch 2/2, after 3 optimizer steps"),
        (signal.SIGINT, "validation", "epoch 1/2, after 4 optimizer steps"),
    ],
)
@pytest.mark.slow
def test_a_signal_saves_the_step_and_resuming_equals_never_having_stopped(
    number: signal.Signals,
    step: int | str,
    said: str,
    undisturbed: Path,
    train: Train,
    npy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = [*SMALL_STEPS, "--val_npy_path", npy / "val"]
    calls = []

    def stop_requested(run: Run) -> bool:
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return run.stop.requested

    def evaluate(*_: Any) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not heeded")

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as end:
        patched.setattr(Run, "stop_requested", stop_requested)
        if step == "validation":
            patched.setattr(train_bdd100k, "evaluate", evaluate)
        cli.run(lambda: train(tmp_path, *flags))  # type: ignore[arg-type,return-value]
    assert end.value.code == 128 + number
    (folder,) = tmp_path.iterdir()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    command = f"python {shlex.quote(sys.argv[0])} --resume {folder}"
    assert lines == [f"interrupted: stopped in {said}; resume with: {command}"]

    assert train(tmp_path, *flags, "--resume", "auto") == folder
    assert_same_run(folder, undisturbed)


def killed(train: Train, npy: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run like `undisturbed` that ends as full memory ends it, after a step that is not saved."""

    def die(run: Run, progress: Any, stop: bool) -> None:
        step_done(run, progress, stop)
        if progress.steps == 3:
            raise MemoryError

    step_done = Run.step_done
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(Run, "step_done", die)
        train(work_dir, *SMALL_STEPS, "--val_npy_path", npy / "val", "--save_every_steps", 2)
    (folder,) = work_dir.iterdir()
    return folder


def test_a_run_is_resumed_by_its_folder_alone(
    undisturbed: Path, train: Train, npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed(train, npy, tmp_path, monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    run_script(train_bdd100k, "--resume", folder)
    assert_same_run(folder, undisturbed)
    assert json.loads((folder / "config.json").read_text()) == {**config, "resume": str(folder)}
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2 and all(start["torch"] == torch.__version__ for start in starts)


def test_flags_beside_resume_change_what_may_change(train: Train, run_copy: Path) -> None:
    flags = ["-num_epochs", 3, "--preset", "cpu", "-num_workers", 0, "--patience", 7, "--keep_last", 0]
    run_script(train_bdd100k, "--resume", run_copy / checkpoint.LATEST, *flags)
    assert len(log_of(run_copy)) == 3 and "val_miou" in log_of(run_copy)[-1]
    config = json.loads((run_copy / "config.json").read_text())
    expected = {"batch_size": 2, "grad_acc_steps": 8, "use_amp": True, "num_workers": 0, "patience": 7, "keep_last": 0}
    assert {name: config[name] for name in expected} == expected
    assert config["task_name"] == "Drawn" and config["lr"] == 1e-3


def test_a_run_of_a_version_with_fewer_flags_is_resumed_by_its_folder_alone(run_copy: Path) -> None:
    path = run_copy / checkpoint.LATEST
    payload = torch.load(path, weights_only=True)
    for name in ("patience", "preset", "keep_last", "save_every_steps", "val_every", "deterministic", "device"):
        del payload["args"][name]
    payload["args"]["a_flag_of_a_later_version"] = 1
    torch.save(payload, path)
    run_script(train_bdd100k, "--resume", run_copy, "-num_epochs", 3, "--device", "cpu")
    assert len(log_of(run_copy)) == 3


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [("batch_size", -4, "--batch_size"), ("model_type", "vit_x", "--model_type"), ("seed", "x", "--seed")],
)
def test_a_recorded_flag_that_no_run_has(
    name: str, value: Any, flag: str, run_copy: Path, error_of: Callable[..., str]
) -> None:
    path = run_copy / checkpoint.LATEST
    payload = torch.load(path, weights_only=True)
    payload["args"][name] = value
    torch.save(payload, path)
    line = error_of(train_bdd100k, "--resume", run_copy)
    assert line == f"error: {path}: its {flag} is {value!r}; give {flag}, or start a new run"


def test_a_new_run_needs_data(tmp_path: Path, error_of: Callable[..., str]) -> None:
    line = error_of(train_bdd100k, "--resume", "auto", "-work_dir", tmp_path)
    assert "--resume auto finds no run of this task; give -i, the training split" in line
    # Before the imports, so by a process of its own.
    words = [sys.executable, train_bdd100k.__file__, "--patience", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: give -i, the training split") and not done.stdout


def test_resuming_inside_an_epoch_with_the_batch_cut_otherwise(
    undisturbed: Path, train: Train, npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed(train, npy, tmp_path, monkeypatch)
    assert checkpoint.load_checkpoint(folder / "medsam_model_latest.pth")["run_state"]["progress"]["steps"] == 2
    flags = [*SMALL_STEPS, "-batch_size", 2, "--grad_acc_steps", 1, "--val_npy_path", npy / "val"]
    train(tmp_path, *flags, "--resume", folder)
    for ours, theirs in zip(log_of(folder), log_of(undisturbed)):
        assert ours["optimizer_steps"] == theirs["optimizer_steps"] == 4
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


def test_a_finished_run_is_no_error_to_who_starts_it_again(
    train: Train, run_copy: Path, npy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    flags = ["-task_name", "Drawn", "--val_npy_path", npy / "val", "-lr", "1e-3", "--resume", "auto"]
    assert train(run_copy.parent, "-num_epochs", 2, *flags) == run_copy
    assert "latest.pth: already trained for 2 epochs; raise -num_epochs to resume" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_resuming_with_the_scaler_newly_enabled(train: Train, run_copy: Path, npy: Path) -> None:
    # As someone would whose memory ran out without -use_amp.
    flags = ["--val_npy_path", npy / "val", "-lr", "1e-3", "-use_amp", "--amp_dtype", "fp16"]
    train(run_copy.parent, "-num_epochs", 3, "--resume", run_copy, *flags)
    assert [record["epoch"] for record in log_of(run_copy)] == [0, 1, 2]


@pytest.mark.slow
def test_logging_to_tensorboard_and_to_wandb_without_a_network(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HTTPS_PROXY": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    folder = train(tmp_path, "-num_epochs", 1, "--use_tensorboard", "-use_wandb", "True")

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (scalar,) = events.Scalars("train/loss")
    assert scalar.step == 0 and scalar.value == pytest.approx(log_of(folder)[0]["train_loss"])
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert record.stat().st_size > 0
    # A resumed run is the same one to W&B, which names its files by id.
    train(tmp_path, "-num_epochs", 2, "-use_wandb", "--resume", folder)
    records = list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(records) == 2 and {path.name for path in records} == {record.name}


def test_wandb_without_an_account(
    npy: Path, sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    for name, value in {"login": lambda **_: True, "init": refuse}.items():
        monkeypatch.setattr(wandb, name, value)
    shutil.copy(sam_file, tmp_path / "sam.pth")
    line = error_of(train_bdd100k, *good_flags(tmp_path), "-i", npy / "train", "-use_wandb")
    assert "No API key configured. Use `wandb login`" in line and "WANDB_MODE=offline" in line


def test_a_logger_that_cannot_be_used_is_told_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "-use_wandb needs" in error_of(train_bdd100k, *good_flags(tmp_path), "-use_wandb")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "--use_tensorboard" in error_of(train_bdd100k, *good_flags(tmp_path), "--use_tensorboard")


@pytest.mark.slow
def test_a_decoder_overfits_two_images(train: Train, tmp_path: Path) -> None:
    # Flat patches of colour, which even the features of a random encoder can tell apart.
    items = {}
    for name, split in (("a", 20), ("b", 40)):
        labels = np.full((IMAGE_SIZE, IMAGE_SIZE), 10, dtype=np.uint8)
        labels[split:] = 0
        labels[split - 10 : split + 10, 16:48] = 13
        colors = np.zeros((256, 3), dtype=np.uint8)
        colors[[0, 10, 13]] = (90, 90, 90), (120, 180, 250), (200, 20, 20)
        items[name] = (colors[labels], labels)
    data = write_split(tmp_path / "npy", items)
    flags = ["--classes_per_image", 3, "--bbox_shift", 0, "--grad_acc_steps", 1, "-batch_size", 2, "-lr", "1e-3"]
    folder = train(tmp_path / "work", "-i", data, "-num_epochs", 40, *flags)
    losses = [record["train_loss"] for record in log_of(folder)]
    assert losses[-1] < losses[0] / 4


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickle_into(path: Path) -> None:
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


# How an image's file is damaged, and what the one line must say.
BAD_NPY: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, r"\.npy: no such file"),
    "truncated": (truncate, r"\.npy: truncated by \d+ bytes"),
    "corrupt": (lambda path: path.write_bytes(b"not numpy at all"), r"\.npy: damaged, or not an \.npy file"),
    "pickled": (pickle_into, r"\.npy: holds pickled objects, which are never loaded"),
}


def resume(folder: Path, *flags: Any) -> list[Any]:
    """Flags that would go on with the finished run in `folder`, and others."""
    validation = ["--val_npy_path", folder / "train"]
    return ["--resume", folder / "run", "-num_epochs", 3, "-lr", "1e-3", *validation, *flags]


def of_earlier_version(folder: Path) -> Path:
    """Make the run in `folder` one of a version whose masks did not compete, and which did not name its loss."""
    path = folder / "run" / checkpoint.LATEST
    times = path.stat()
    state = torch.load(path, weights_only=True)
    del state["args"]["losses"]
    torch.save(state, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return folder


def stalled(folder: Path) -> Path:
    """Make the run in `folder` one whose second validation was no better than its first."""
    path = folder / "run" / checkpoint.LATEST
    times = path.stat()
    state = torch.load(path, weights_only=True)
    for record in state["run_state"]["history"]:
        record["val_miou"] = 0.5
    torch.save(state, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return folder


# Flags that are given after good ones, as a function of a folder with the data in "train" and a finished run in "run";
# and what the one line must say.
BAD_FLAGS: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "no such folder": (lambda f: ["-i", f / "nowhere"], r"nowhere: no such folder; .* create it with pre_bdd100k"),
    "folder without manifest": (
        lambda f: ["-i", f / "run"],
        r"manifest.json: no such file; .* was not written by pre_bdd100k",
    ),
    "missing checkpoint": (lambda f: ["-checkpoint", f / "none.pth"], r"none.pth: no such checkpoint"),
    "fine-tuned in place of SAM": (lambda f: ["-checkpoint", f / "run" / checkpoint.BEST], r"best.pth: .*SAM"),
    "batch size 0": (lambda f: ["-batch_size", 0], r"batch_size.* at least 1, got 0"),
    "resume nothing": (lambda f: ["--resume", f / "none.pth"], r"none.pth: no such checkpoint"),
    "resume a folder of no run": (lambda f: ["--resume", f / "train"], r"latest.pth: no such checkpoint"),
    "resume best": (lambda f: ["--resume", f / "run" / checkpoint.BEST], r"no state to resume from; give .*latest"),
    "resume a finished run": (lambda f: resume(f, "-num_epochs", 2), r"already trained for 2 epochs; raise -num_ep"),
    "resume another model": (
        lambda f: resume(f, "-model_type", "vit_b"),
        r"latest.pth: -model_type is vit_b, but the run has vit_tiny\.",
    ),
    "other lr": (lambda f: resume(f, "-lr", "2e-3"), r"latest.pth: -lr is 0.002, but the run has 0.001\. Use the run"),
    "other weight decay": (lambda f: resume(f, "-weight_decay", 0), r"-weight_decay is 0.0, but the run has 0.01\."),
    "other schedule": (lambda f: resume(f, "--lr_scheduler", "step"), r"--lr_scheduler is step, .* has constant\."),
    "other warm-up": (lambda f: resume(f, "--warmup_epochs", 1), r"--warmup_epochs is 1.0, but the run has 0\."),
    "other batch size": (lambda f: resume(f, "-batch_size", 2), r"effective batch size .* is 8, but .* has 16\."),
    "other accumulation": (lambda f: resume(f, "--grad_acc_steps", 1), r"effective batch size .* is 4, .* has 16\."),
    "other number of classes": (lambda f: resume(f, "--classes_per_image", 2), r"_per_image is 2, .* has all\."),
    "a loss of an earlier version": (
        lambda f: resume(of_earlier_version(f)),
        r"latest.pth: an older version .* dice "
        r"\+ bce \+ iou, this version has dice \+ bce \+ iou \+ ce; start a new run",
    ),
    "other augmentation": (lambda f: resume(f, "--augment", "flip"), r"--augment is flip, but the run has none\."),
    "more views than there are": (lambda f: ["--cache_views", 2], r"_views 2: --augment none has only 1"),
    "one view to augment": (lambda f: ["--augment", "full", "--cache_views", 1], r"_views 1: .* use --augment none"),
    "features on no card": (
        lambda f: ["--cache_device", "cuda"],
        r"_device cuda: the run trains on the CPU; set --cache",
    ),
    "no features to keep": (
        lambda f: ["--cache_device", "cpu", "--cache_embeddings", "off"],
        r"--cache_device cpu: there is no cache with --cache_embeddings off; leave out one of the two",
    ),
    "a graph on no card": (
        lambda f: ["--step_mode", "captured"],
        r"--step_mode captured needs a CUDA device, .* to auto",
    ),
    "compiled on no card": (
        lambda f: ["--step_mode", "compiled"],
        r"--step_mode compiled needs a CUDA device, .* auto",
    ),
    "patience without validation": (lambda f: ["--patience", 3], r"--patience counts validations: give --val_npy_path"),
    "negative patience": (lambda f: ["--patience", -1], r"patience.* at least 0, got -1"),
    "resume a run that has stopped": (
        lambda f: resume(stalled(f), "--patience", 1),
        r"latest.pth: stopped early after "
        r"epoch 2: .* for 1 validation since .*; raise --patience to resume",
    ),
    "other jitter": (lambda f: resume(f, "--bbox_shift", 0), r"--bbox_shift is 0, but the run has 20\."),
    "other seed": (lambda f: resume(f, "--seed", 1), r"--seed is 1, but .* has 2024\. .* or start"),
    "several at once": (
        lambda f: resume(f, "--seed", 1, "--augment", "full", "-batch_size", 2),
        r"effective batch size .* is 8, .* 16; --augment is full, but .* none; --seed is 1, but .* 2024\. Use the run",
    ),
    "CUDA where there is none": (lambda f: ["--device", "cuda:0"], r"--device cuda:0: PyTorch finds no CUDA device"),
    "no device at all": (lambda f: ["--device", "gpu"], r"--device gpu: not supported"),
    "no launcher": (lambda f: ["--distributed"], r"needs a launcher: python -m torch.distributed.launch"),
    "world size without launcher": (lambda f: ["--world_size", 4], r"needs a launcher"),
    "node without launcher": (lambda f: ["--node_rank", 3], r"--node_rank 3 is .* need a launcher"),
    "method without launcher": (lambda f: ["--init_method", "foo"], r"--init_method foo is .* need a launcher"),
}


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def good_flags(folder: Path) -> list[Any]:
    data = ["-i", folder / "train", "-checkpoint", folder / "sam.pth", "-model_type", "vit_tiny"]
    return [*data, "-work_dir", folder / "work", "-num_epochs", 2, "-num_workers", 0, "--device", "cpu"]


@pytest.fixture
def inputs(run: Path, npy: Path, sam_file: Path, tmp_path: Path) -> Path:
    """A folder with copies of what a training run needs, to be spoilt: "train", "sam.pth" and a finished "run"."""
    shutil.copytree(npy / "train", tmp_path / "train")
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(sam_file, tmp_path / "sam.pth")
    return tmp_path


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_told_in_one_line(case: str, inputs: Path, error_of: Callable[..., str], no_cuda: None) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (inputs / "run").iterdir()}
    make_flags, complaint = BAD_FLAGS[case]
    assert re.search(complaint, error_of(train_bdd100k, *good_flags(inputs), *make_flags(inputs)))
    assert not (inputs / "work").exists()  # nothing was begun
    assert before == {path.name: path.stat().st_mtime_ns for path in (inputs / "run").iterdir()}


@pytest.mark.parametrize("case", BAD_NPY)
def test_bad_npy_is_told_in_one_line(case: str, inputs: Path, error_of: Callable[..., str]) -> None:
    victim = sorted((inputs / "train" / "imgs").glob("*.npy"))[2]
    damage, complaint = BAD_NPY[case]
    damage(victim)
    line = error_of(train_bdd100k, *good_flags(inputs))
    assert str(victim) in line and re.search(complaint, line)
    assert not (inputs / "work").exists()


def test_truncated_checkpoint(inputs: Path, error_of: Callable[..., str]) -> None:
    truncate(inputs / "sam.pth")
    assert "sam.pth: truncated" in error_of(train_bdd100k, *good_flags(inputs))


def test_resuming_from_a_truncated_checkpoint(inputs: Path, error_of: Callable[..., str]) -> None:
    for path in (inputs / "run").glob("medsam_model_latest*.pth"):  # the earlier one too
        truncate(path)
    line = error_of(train_bdd100k, *good_flags(inputs), "--resume", inputs / "run")
    assert f"{checkpoint.LATEST}: truncated" in line


def test_resuming_a_run_of_a_version_that_knew_less(inputs: Path, error_of: Callable[..., str]) -> None:
    path = inputs / "run" / checkpoint.LATEST
    state = torch.load(path, weights_only=True)
    del state["args"]["augment"]
    torch.save(state, path)
    line = error_of(train_bdd100k, *good_flags(inputs), *resume(inputs))
    assert f"{checkpoint.LATEST}: was saved by an older version without --augment; start a new run" in line


def test_checkpoint_of_another_model_type(inputs: Path, error_of: Callable[..., str]) -> None:
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, inputs / "sam.pth")
    assert "a checkpoint of vit_b, not of vit_tiny" in error_of(train_bdd100k, *good_flags(inputs))


def test_resuming_a_run_of_another_image_size(
    run: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    size = 2 * IMAGE_SIZE
    labels = np.zeros((size, size), dtype=np.uint8)
    data = write_split(tmp_path / "train", {"a": (np.zeros((size, size, 3), dtype=np.uint8), labels)})
    shutil.copy(sam_file, tmp_path / "sam.pth")
    shutil.copytree(run, tmp_path / "run")
    line = error_of(train_bdd100k, *good_flags(tmp_path), "-i", data, *resume(tmp_path))
    assert f"was trained with image size {IMAGE_SIZE}, not {size}" in line


@pytest.mark.parametrize(("flag", "split"), [("-i", "train"), ("--val_npy_path", "val")])
@pytest.mark.slow
def test_resuming_on_data_that_changed(
    flag: str, split: str, run_copy: Path, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    data = tmp_path / "npy"
    shutil.copytree(npy, data)  # of which the place does not matter
    flags = [
        "-model_type",
        "vit_tiny",
        "-checkpoint",
        sam_file,
        "--device",
        "cpu",
        "-num_workers",
        0,
        "-lr",
        "1e-3",
        "-num_epochs",
        3,
        "-i",
        data / "train",
        "--val_npy_path",
        data / "val",
        "--resume",
        run_copy,
    ]
    manifest = json.loads((data / split / "manifest.json").read_text())
    pixels = manifest["items"][0]["pixels"]
    pixels[0], pixels[15] = pixels[0] - 1, pixels[15] + 1  # a corrected mask
    whole = (data / split / "manifest.json").read_text()
    (data / split / "manifest.json").write_text(json.dumps(manifest))
    line = error_of(train_bdd100k, *flags)
    assert f"{run_copy}/medsam_model_latest.pth: {flag} names other data than the run was trained on" in line
    (data / split / "manifest.json").write_text(whole)
    run_script(train_bdd100k, *flags)
    assert len(log_of(run_copy)) == 3


def test_resuming_a_run_without_a_record_of_its_data(train: Train, run_copy: Path, npy: Path) -> None:
    path = run_copy / checkpoint.LATEST
    payload = torch.load(path, weights_only=True)
    del payload["args"]["train_data"], payload["args"]["val_data"]
    torch.save(payload, path)
    train(run_copy.parent, "-num_epochs", 3, "--resume", run_copy, "--val_npy_path", npy / "val", "-lr", "1e-3")
    assert len(log_of(run_copy)) == 3


def test_resuming_on_another_sam_file(run: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    torch.manual_seed(1)
    torch.save(build_sam_vit_tiny(image_size=IMAGE_SIZE).state_dict(), tmp_path / "sam.pth")
    for folder, name in ((run, "run"), (npy / "train", "train")):
        shutil.copytree(folder, tmp_path / name)
    line = error_of(train_bdd100k, *good_flags(tmp_path), *resume(tmp_path))
    assert "was trained with sam sha256" in line and "give the SAM file it was trained on" in line


def test_validation_data_of_another_kind(
    npy: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    labels = np.zeros((32, 32), dtype=np.uint8)
    val = write_split(tmp_path / "val", {"a": (np.zeros((32, 32, 3), dtype=np.uint8), labels)})
    shutil.copy(sam_file, tmp_path / "sam.pth")
    line = error_of(train_bdd100k, *good_flags(tmp_path), "-i", npy / "train", "--val_npy_path", val)
    assert f"image_size is 32, but the training data have {IMAGE_SIZE}" in line


def test_validation_data_without_a_labelled_pixel(inputs: Path, error_of: Callable[..., str]) -> None:
    labels = np.full((IMAGE_SIZE, IMAGE_SIZE), IGNORE_LABEL, dtype=np.uint8)
    val = write_split(inputs / "val", {"a": (np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8), labels)})
    line = error_of(train_bdd100k, *good_flags(inputs), "--val_npy_path", val)
    assert f"{val}: no labelled pixel to measure mIoU on; give another --val_npy_path" in line
    assert not (inputs / "work").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--world_size", 4], "--world_size 4, but the launcher started 2 processes"),
        (["--world_size", 2, "--node_rank", 1], "--node_rank 1, but the launcher calls this node 0"),
        (["--device", "cuda"], "PyTorch finds no CUDA device"),
    ],
)
def test_flags_that_contradict_the_launcher(
    flags: list[Any],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_of: Callable[..., str],
    no_cuda: None,
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert complaint in error_of(train_bdd100k, *good_flags(tmp_path), "--distributed", *flags)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], r"cannot meet by --init_method env:// \(.*MASTER_ADDR expected, but not set\); .* torchrun"),
        (["--init_method", "foo"], r"cannot meet by --init_method foo \(No rendezvous handler"),
    ],
)
def test_processes_that_cannot_meet(
    flags: list[Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert re.search(complaint, error_of(train_bdd100k, *good_flags(tmp_path), *flags))


def test_a_poisoned_image_stops_the_run_with_its_name(
    sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    labels = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    items = {name: (np.full((*labels.shape, 3), value, np.float32), labels) for name, value in zip("ab", (0.5, np.nan))}
    write_split(tmp_path / "train", items)
    shutil.copy(sam_file, tmp_path / "sam.pth")
    flags = [*good_flags(tmp_path), "-num_epochs", 5, "--cache_embeddings"]
    for cache in ("off", "auto"):  # auto goes on without one
        line = error_of(train_bdd100k, *flags, cache)
        assert line.startswith("error: epoch 1, step 1: the loss is not finite for b;")
    for mode in ("box", "semantic"):
        line = error_of(train_bdd100k, *flags, tmp_path / mode, "--prompt_mode", mode)
        assert line.startswith("error: b: its features are not finite in float16; check the image")
    assert not list(tmp_path.glob("work/*/*.pth"))


def test_resuming_looks_at_the_small_file_first(inputs: Path, error_of: Callable[..., str]) -> None:
    shutil.rmtree(inputs / "train" / "imgs")
    (inputs / "sam.pth").unlink()
    assert "--seed is 1, but the run has 2024" in error_of(
        train_bdd100k, *good_flags(inputs), *resume(inputs, "--seed", 1)
    )


@pytest.mark.parametrize("cache", ["off", "auto"])  # auto does not go on without one
def test_shared_memory_that_is_too_small_is_told_before_anything_is_begun(
    cache: str, inputs: Path, error_of: Callable[..., str], little_shared_memory: None
) -> None:
    line = error_of(train_bdd100k, *good_flags(inputs), "-num_workers", 2, "--cache_embeddings", cache)
    assert line.startswith("error: /dev/shm has 64 KiB free") and "--shm-size" in line and "--num_workers 0" in line
    assert not (inputs / "work").exists()


def test_room_for_the_checkpoints_is_measured_before_long_work(
    inputs: Path, error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    monkeypatch.setattr(train_bdd100k, "use_caches", lambda *_, **__: pytest.fail("long work"))
    line = error_of(train_bdd100k, *good_flags(inputs), "--keep_last", 9)
    assert "work: the checkpoints need" in line and "has 1.0 MiB free; make room there, lower --keep_last" in line
    assert not (inputs / "work").exists()
    (inputs / "work").touch()
    assert "work: cannot be written (Not a directory); give another -work_dir" in error_of(
        train_bdd100k, *good_flags(inputs)
    )


def test_a_full_gpu_is_told_in_one_line(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train_bdd100k, "train_one_epoch", run_out)
    line = error_of(train_bdd100k, *good_flags(inputs))
    assert "GPU's memory is full; lower -batch_size and raise --grad_acc_steps by the same factor" in line


def test_amp_on_a_cpu_that_has_no_bf16_is_no_secret(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False, raising=False)
    monkeypatch.setattr(train_bdd100k, "train_one_epoch", lambda *_, **__: {"loss": 1.0})
    train(tmp_path, "-num_epochs", 1, "-use_amp")
    assert "1 process(es) on cpu, float32: this CPU has no bf16\n" in capsys.readouterr().out
