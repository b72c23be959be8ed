"""utils.train.logger: the figures of each epoch in log.jsonl, the curve, TensorBoard and W&B."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.data.classes import IGNORE_LABEL
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.train.logger import RunLogger, _commit, require_loggers
from utils.train.samples import ValidationSample


def record(epoch: int, **figures: Any) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 2.0 - epoch, **figures}


def logger(
    folder: Path, history: list[dict[str, Any]] | None = None, *, tensorboard: bool = False, wandb: bool = False
) -> RunLogger:
    """Of a run that is resumed if there is a history, be it of no epoch."""
    return RunLogger(
        folder,
        history=history or [],
        config={"lr": 1e-3, "task_name": "街景"},
        resumed=history is not None,
        tensorboard=tensorboard,
        wandb=wandb,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    """`log.jsonl`, read as strict JSON: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"log.jsonl holds {constant}")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()]


def table(folder: Path) -> list[dict[str, str]]:
    """`results.csv` by columns."""
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def sample(name: str = "a") -> ValidationSample:
    """A picture of road, whose left half is predicted as car and whose first row is not labelled."""
    target, prediction = np.zeros((2, 4, 6), np.uint8)
    target[0], prediction[:, :3] = IGNORE_LABEL, 13
    return ValidationSample(name, np.full((4, 6, 3), 7, np.uint8), target, prediction, 0.25)


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """The (step, value) of a curve, as TensorBoard shows it."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


class FakeWandb(ModuleType):
    """As much of `wandb` as is used: it notes what it is told."""

    def __init__(self, refusal: str | None = None) -> None:
        super().__init__("wandb")
        self.id = "abc123"
        self.refusal = refusal
        self.said: list[Any] = []
        self.axes: dict[str, str] = {}
        self.errors = ModuleType("wandb.errors")
        self.errors.Error = type("Error", (Exception,), {})  # type: ignore[attr-defined]

    def init(self, **settings: Any) -> FakeWandb:
        if self.refusal:
            raise self.errors.Error(self.refusal)
        self.said.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def Image(self, image: np.ndarray, **about: Any) -> dict[str, Any]:
        return {"image": image, **about}

    def log(self, scalars: dict[str, Any], step: int) -> None:
        self.said.append((step, scalars))

    def finish(self) -> None:
        self.said.append("finished")


def test_configuration_a_line_an_epoch_and_the_curve(tmp_path: Path) -> None:
    log = logger(tmp_path)
    for epoch in range(2):
        log.log_epoch(record(epoch, val_miou=0.5))
    log.close()
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 1e-3, "task_name": "街景"}
    assert lines(tmp_path) == [record(0, val_miou=0.5), record(1, val_miou=0.5)]
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    names = {"config.json", "starts.jsonl", "log.jsonl", "results.csv", "loss_curve.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_each_start_records_its_command_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "-i", "my data"])
    logger(tmp_path)
    launched_by = {"RANK": "0", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
    for name, value in {**launched_by, "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "123"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--local-rank=0", "--resume", "run\udcff"])
    logger(tmp_path, [record(0)])
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines())
    assert (first["epoch"], first["command"]) == (0, "python train.py -i 'my data'")
    launched = "torchrun --nproc_per_node=2 --master_port=123 train.py --resume 'run\udcff'"
    assert (second["epoch"], second["command"]) == (1, launched)
    assert first["torch"] == torch.__version__ and first["python"] == platform.python_version()
    assert first["folder"] == os.getcwd() and first["time"] <= second["time"]


@pytest.mark.parametrize("changed", [False, True])
def test_the_commit_is_that_of_the_clone(changed: bool, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert _commit(tmp_path) is None
    git("init", "-q")
    assert _commit(tmp_path) is None  # nothing is committed yet
    (tmp_path / "file").touch()
    (tmp_path / "sub").mkdir()
    git("add", "file")
    git("commit", "-qm", "a")
    if changed:
        (tmp_path / "file").write_text("b")
    assert _commit(tmp_path) == git("rev-parse", "HEAD").strip() + ("-dirty" if changed else "")
    assert _commit(tmp_path / "sub") is None  # an installation within a repository of something else


def test_resuming_cuts_the_log_back_to_the_epochs_that_count(tmp_path: Path) -> None:
    first = logger(tmp_path)
    for epoch in range(3):
        first.log_epoch(record(epoch))
    history = [record(0), record(1)]  # the third was logged, but its checkpoint never written
    resumed = logger(tmp_path, history)
    assert lines(tmp_path) == history
    assert [row["epoch"] for row in table(tmp_path)] == ["0", "1"]
    resumed.log_epoch(record(2, again=1))
    assert lines(tmp_path) == [*history, record(2, again=1)]
    assert [row["again"] for row in table(tmp_path)] == ["", "", "1"]
    assert len(history) == 2  # the caller's own list


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_lacks_is_null(tmp_path: Path, value: float) -> None:
    log = logger(tmp_path)
    log.log_epoch(record(0, val_miou=value))
    assert lines(tmp_path) == [record(0, val_miou=None)]
    assert table(tmp_path) == [{"epoch": "0", "train_loss": "2.0", "val_miou": ""}]
    resumed = logger(tmp_path, [record(0, val_miou=value)])
    resumed.log_epoch(record(1))
    assert lines(tmp_path) == [record(0, val_miou=None), record(1)]


def test_tensorboard_has_one_value_an_epoch_also_after_resuming(tmp_path: Path) -> None:
    first = logger(tmp_path, tensorboard=True)
    figures = {"val_miou": 0.1, "val_iou/traffic light": 0.5, "val_iou/train": math.nan, "seconds": 3.0, "dice": 0.2}
    for epoch in range(3):
        first.log_epoch(record(epoch, **figures), samples=[sample()])
    first.close()
    resumed = logger(tmp_path, [record(0), record(1)], tensorboard=True)
    resumed.log_epoch(record(2, **{**figures, "val_miou": 0.75}), samples=[sample()])
    resumed.close()
    board = tmp_path / "tensorboard"
    events = EventAccumulator(str(board))
    events.Reload()
    expected = {"train/loss", "train/dice", "val/miou", "val_iou/traffic_light", "speed/seconds"}
    assert set(events.Tags()["scalars"]) == expected
    assert points(board, "train/loss") == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert [value for _, value in points(board, "val/miou")] == pytest.approx([0.1, 0.1, 0.75])
    images = events.Images("val/samples")
    assert [image.step for image in images] == [0, 1, 2]
    assert images[0].encoded_image_string == (tmp_path / "val_samples/epoch_001.jpg").read_bytes()
    # The page of hyper-parameters has the configuration once.
    told = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"task_name" in told and events.Tags()["tensors"].count("_hparams_/session_start_info") <= 1


def test_what_is_logged_within_an_epoch_is_dropped_from_where_a_resumed_run_begins(tmp_path: Path) -> None:
    first = logger(tmp_path, tensorboard=True)
    for step in (10, 20, 30):
        first.log_step(step, {"loss": step / 10})
    first.close()
    time.sleep(1.1)  # the names of TensorBoard's files have the second, by which they are ordered
    resumed = RunLogger(tmp_path, history=[], config={}, resumed=True, tensorboard=True, wandb=False, steps=20)
    resumed.log_step(30, {"loss": 7})
    resumed.close()
    assert points(tmp_path / "tensorboard/steps", "step/loss") == [(10, 1), (20, 2), (30, 7)]


def test_pictures_of_epochs_that_are_trained_again_are_removed(tmp_path: Path) -> None:
    first = logger(tmp_path)
    for epoch in range(3):
        first.log_epoch(record(epoch), samples=[sample()])
    logger(tmp_path, [record(0)])
    assert [path.name for path in (tmp_path / "val_samples").iterdir()] == ["epoch_001.jpg"]


def test_wandb_is_told_settings_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = logger(tmp_path, wandb=True)
    log.log_step(10, {"loss": 3.0})
    log.log_epoch(record(0, val_miou=0.5), steps=16, samples=[sample()])
    log.close()
    settings, of_step, (step, figures), end = wandb.said
    assert "id" not in settings  # it is W&B that chooses
    assert settings["name"] == tmp_path.name and settings["dir"] == str(tmp_path)
    assert settings["config"] == {"lr": 1e-3, "task_name": "街景"}
    assert of_step == (10, {"step/loss": 3.0}) and step == 16
    (picture,) = figures.pop("val/samples")
    assert figures == {"epoch": 0, "train/loss": 2.0, "val/miou": 0.5}
    assert wandb.axes == {f"{group}/*": "epoch" for group in ("train", "val", "val_iou", "speed")}
    truth, prediction = picture["masks"]["ground truth"], picture["masks"]["prediction"]
    assert (truth["mask_data"] == sample().target).all() and (prediction["mask_data"] == sample().prediction).all()
    assert truth["class_labels"][255] == "not labelled" and prediction["class_labels"][13] == "car"
    assert end == "finished"


def test_wandb_that_does_not_let_us_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refusal="No API key.\nLog in."))
    with pytest.raises(UserError) as error:
        logger(tmp_path, wandb=True)
    said = "-use_wandb: No API key. Log in. (WANDB_MODE=offline needs neither account nor network)"
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("asked", "package", "said"),
    [
        ("wandb", "wandb", '-use_wandb needs Weights & Biases: pip install -e ".[log]"'),
        ("tensorboard", "tensorboard", '--use_tensorboard needs TensorBoard: pip install -e ".[log]"'),
    ],
)
def test_a_package_that_is_not_installed(
    asked: str, package: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError) as error:
        logger(tmp_path, tensorboard=asked == "tensorboard", wandb=asked == "wandb")
    assert str(error.value) == said
    assert not list(tmp_path.iterdir())


def test_what_wandb_or_tensorboard_cannot_take_is_told_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Lost(FakeWandb):
        def log(self, scalars: dict[str, float], step: int) -> None:
            raise BrokenPipeError("the service\nis gone")

        def finish(self) -> None:
            raise BrokenPipeError

    monkeypatch.setitem(sys.modules, "wandb", Lost())
    log = logger(tmp_path, wandb=True, tensorboard=True)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(log._writer, "add_scalar", full)
    for epoch in range(2):
        log.log_epoch(record(epoch))
    log.close()
    assert lines(tmp_path) == [record(0), record(1)]
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "failed (No space left on device); training continues" in said


@pytest.mark.parametrize("history", [[record(0)], []])  # of no epoch: it was stopped within the first
def test_a_resumed_run_goes_on_without_its_loggers(
    history: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refusal="no network"))
    log = logger(tmp_path, history, wandb=True)
    assert "no network" in capsys.readouterr().err
    log.log_epoch(record(1))
    assert lines(tmp_path) == [*history, record(1)]

    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = logger(tmp_path, history, wandb=True, tensorboard=True)
    assert capsys.readouterr().err.startswith("warning: TensorBoard or W&B failed (--use_tensorboard")
    log.log_epoch(record(1))


def test_a_resumed_run_of_wandb_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger(tmp_path, wandb=True)
    logger(tmp_path, [], wandb=True)
    assert (wandb.said[-1]["id"], wandb.said[-1]["resume"]) == ("abc123", "allow")
    (tmp_path / "wandb_id.txt").write_text("../x\n")  # in a folder that came from elsewhere
    wandb.id = "def456"
    logger(tmp_path, [], wandb=True)
    assert "id" not in wandb.said[-1]
    logger(tmp_path, [], wandb=True)
    assert wandb.said[-1]["id"] == "def456"


# What a package may be that is found under the name: an older one that the others do not fit, or a folder of runs.
BROKEN = {
    "raises": ("raise AttributeError('np.float_ was\\nremoved')", "(AttributeError: np.float_ was removed)"),
    "exits": ("raise SystemExit('no protobuf')", "(SystemExit: no protobuf)"),
    "is another": ("x = 1", "has no attribute"),
    "is a folder": (None, ""),
}


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_package_that_cannot_be_imported(package: str, case: str, tmp_path: Path) -> None:
    source, reason = BROKEN[case]
    folder = tmp_path / package
    folder.mkdir()
    if source:
        (folder / "__init__.py").write_text(source)
    # No other folder, as a package that is installed goes before a mere folder.
    with patch.dict(sys.modules), patch.object(sys, "path", [str(tmp_path)]), pytest.raises(UserError) as error:
        for name in [name for name in sys.modules if name.startswith((package, "torch.utils.tensorboard"))]:
            del sys.modules[name]
        require_loggers(tensorboard=package == "tensorboard", wandb=package == "wandb")
    said = str(error.value)
    assert said.startswith({"wandb": "-use_wandb: ", "tensorboard": "--use_tensorboard: "}[package])
    assert f"cannot be imported from {folder}" in said and "\n" not in said
    assert f"pip install -U {package}" in said
    assert reason in said or (package, case) == ("tensorboard", "is another")  # of which torch asks the version


def test_wandb_is_asked_to_log_in_before_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def login() -> None:
        raise wandb.errors.Error("No API key configured.")

    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(wandb, "login", login, raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="-use_wandb: No API key configured"):
        require_loggers(tensorboard=False, wandb=True)
    for mode in ("offline", "disabled", "dryrun"):
        monkeypatch.setenv("WANDB_MODE", mode)
        require_loggers(tensorboard=True, wandb=True)
    monkeypatch.setenv("WANDB_MODE", "online")
    require_loggers(tensorboard=True, wandb=False)


def test_what_wandb_or_tensorboard_raise_as_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise BrokenPipeError("the service\nis gone")

    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UserError, match="-use_wandb: the service is gone"):
        logger(tmp_path, wandb=True)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", fail)
    with pytest.raises(UserError, match="--use_tensorboard: the service is gone"):
        logger(tmp_path, tensorboard=True)


def test_an_absurdly_large_record_of_starts_is_begun_anew(tmp_path: Path) -> None:
    logger(tmp_path)
    with open(tmp_path / "starts.jsonl", "r+b") as file:
        file.truncate(1 << 40)  # a hole, which takes no disk
    logger(tmp_path)
    (start,) = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert json.loads(start)["epoch"] == 0


def test_the_words_of_an_unknown_launcher_are_not_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert distributed.launch_command() == "<the launcher and its flags> train.py"
