"""Resuming a run: its last checkpoint, found and read once, and what a new start must share with it."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor
from typing_extensions import NotRequired

from utils.data.classes import ClassTable
from utils.model import checkpoint
from utils.model.checkpoint import LATEST, ModelInfo
from utils.model.segmenter import TRAIN_FLAGS
from utils.runtime import distributed
from utils.runtime.errors import UnreadableError, UserError
from utils.runtime.files import exists, is_folder, listed, status
from utils.train.logger import CONFIG, Config, Record
from utils.train.loop import SavedProgress

AUTO = Path("auto")  # as --resume

# What a resumed run must share with its original, by the names that the user knows.
KEPT = {
    "prompt_mode": "--prompt_mode",
    "losses": "the loss",
    "model_type": "-model_type",
    "init_decoder": "--init_decoder",
    "lr": "-lr",
    "weight_decay": "-weight_decay",
    "lr_scheduler": "--lr_scheduler",
    "warmup_epochs": "--warmup_epochs",
    "effective_batch_size": "the effective batch size (-batch_size x --grad_acc_steps x processes)",
    "classes_per_image": "--classes_per_image",
    "bbox_shift": "--bbox_shift",
    "augment": "--augment",
    "cache_views": "--cache_views",
    "seed": "--seed",
}
_BOX_MODE_ONLY = {"classes_per_image", "bbox_shift"}
_FORMER_LOSSES = {"box": "dice + bce + iou", "semantic": "ce + dice"}  # of runs that do not record theirs


class RunState(TypedDict):
    """`run_state` of a `latest` checkpoint; the first three are state dicts."""

    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    rng: list[dict[str, Tensor]]  # one for each process, by device type
    history: list[Record]
    best_score: float
    progress: SavedProgress
    logged_sums: NotRequired[Tensor | None]  # older versions have none


@dataclass(frozen=True)
class ResumeState:
    """A run's `latest` checkpoint.

    `config` is the run's configuration: the flags of its last start, and what was derived from them.
    """

    path: Path
    info: ModelInfo
    classes: ClassTable
    decoder: dict[str, Tensor]
    config: Config
    run_state: RunState

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def history(self) -> list[Record]:
        return self.run_state["history"]

    def require_same_flags(self, config: Config) -> None:
        """Check the flags that cannot change within a run, and list all that differ.

        Args:
            config: this start's configuration.

        Raises:
            UserError: a flag differs, or the run was saved by a version that lacks one of them.
        """
        unused = _BOX_MODE_ONLY if config["prompt_mode"] == "semantic" else set()
        kept = {key: name for key, name in KEPT.items() if key not in unused}
        recorded = {"init_decoder": None, **self.config}  # older versions had no such flag
        missing = [name for key, name in kept.items() if key not in recorded]
        if missing:
            raise UserError(f"{self.path}: was saved by an older version without {', '.join(missing)}; start a new run")
        differ = [key for key in kept if config[key] != recorded[key]]
        if "prompt_mode" in differ:
            differ = [key for key in differ if key != "losses"]  # it follows from the mode
        if "losses" in differ:
            raise UserError(
                f"{self.path}: an older version trained it with the loss {self.config['losses']}, "
                f"this version has {config['losses']}; start a new run"
            )
        if differ:
            told = [f"{kept[key]} is {config[key]}, but the run has {recorded[key]}" for key in differ]
            raise UserError(f"{self.path}: {'; '.join(told)}. Use the run's values, or start a new run")

    def require_same_data(self, data: Mapping[str, str | None], info: ModelInfo, classes: ClassTable) -> None:
        """Check the model and the data before the data are encoded.

        Losses and mIoU on other data cannot be compared with the run's. Runs of older versions do not record their
        data.

        Args:
            data: the digests of "train_data" and "val_data"; None without the split.
            classes: to be trained.

        Raises:
            UserError: the model or the data are not the run's.
        """
        self.info.require_same(info, self.path)
        if self.classes.names != classes.names:
            raise UserError(
                f"{self.path}: was trained on the classes {', '.join(self.classes.names)}, not on "
                f"{', '.join(classes.names)}; give its data and its --classes and --other_classes, or start a new run"
            )
        for key, flag in {"train_data": "-i", "val_data": "--val_npy_path"}.items():
            then = self.config.get(key)
            if then is not None and data[key] not in (then, None):
                raise UserError(
                    f"{self.path}: {flag} names other data than the run was trained on (other names, sizes or labels); "
                    "give the run's data, or start a new run"
                )

    def cache_choice(self, where: str, dtype: str) -> str:
        """The value of --cache_embeddings, except that `auto` adds no cache to a run without one.

        Raises:
            UserError: as of `require_same_cache`, which is told here before anything is encoded.
        """
        if where == "auto" and self.config.get("train_cache", dtype) is None:
            distributed.say(f"{self.path}: the run has no cache of features, and resumes without one")
            return "off"
        self.require_same_cache(None if where == "off" else dtype)
        return where

    def require_same_cache(self, stored_in: str | None) -> None:
        """Check that features come from where they came from: cached ones are rounded and reduced.

        Args:
            stored_in: the type of the cached features that are trained on; None without a cache.

        Raises:
            UserError: the run used a cache and this start does not, the reverse, or another type.
        """
        then = self.config.get("train_cache", stored_in)
        if stored_in == then:
            return
        if then is None:
            raise UserError(
                f"{self.path}: the run has no cache of features; give --cache_embeddings off, or start a new run"
            )
        if stored_in is None:
            raise UserError(
                f"{self.path}: the run reads features from a cache; give its --cache_embeddings, make room for it on "
                "that disk, or start a new run"
            )
        raise UserError(
            f"{self.path}: --cache_dtype is {stored_in}, but the run has {then}. Use the run's value, or start a new "
            "run"
        )

    def finished(self, num_epochs: int, patience: int | None) -> str | None:
        """Why there is nothing to resume, and what to raise; None if epochs are left."""
        stopped = plateau(self.history, patience)
        if len(self.history) >= num_epochs:
            limits = f"-num_epochs{' and --patience' if stopped else ''}"
            return f"{self.path}: already trained for {len(self.history)} epochs; raise {limits} to resume"
        return f"{self.path}: {stopped}; raise --patience to resume, or give 0 for no limit" if stopped else None


def plateau(history: Sequence[Record], patience: int | None) -> str | None:
    """Tell whether a run stops early: `patience` validations or more after its best are no better.

    Args:
        history: the run's epochs; those with "val_miou" were validated.
        patience: a number of validations; None or 0 for no limit.

    Returns:
        One sentence without a full stop; None if the run does not stop early.
    """
    best, miou, since = -1, -math.inf, 0
    for record in history:
        if "val_miou" in record and record["val_miou"] > miou:  # the rule by which `best` is written
            best, miou, since = int(record["epoch"]), record["val_miou"], 0
        elif "val_miou" in record:
            since += 1
    if not patience or since < patience:
        return None
    times = f"{since} validation{'s' * (since > 1)}"
    return (
        f"stopped early after epoch {history[-1]['epoch'] + 1}: val mIoU has not improved for {times} "
        f"since the best, {miou:.4f} of epoch {best + 1 if best >= 0 else None}"
    )


def find_resume(resume: Path | None, work_dir: Path, task_name: str) -> ResumeState | None:
    """Find and read what `--resume` names.

    Of a run's folder, this is the newest `latest` that can be read, with a warning if it is not the last one.

    Args:
        resume: a run's folder, or a `latest` file; AUTO for the task's run in `work_dir` that was saved last.

    Returns:
        None without --resume, or if AUTO finds no run.

    Raises:
        UserError: no checkpoint can be read.
    """
    if resume is None:
        return None
    if resume != AUTO:
        return _newest_good(resume) if is_folder(resume) else read_resume(resume)
    pattern = re.compile(re.escape(task_name) + r"-\d{8}-\d{4}(-\d+)?")
    candidates = listed(work_dir) if is_folder(work_dir) else []
    folders = [folder for folder in candidates if pattern.fullmatch(folder.name) and _versions(folder)]
    return _newest_good(max(folders, key=_last_saved)) if folders else None


def read_resume(path: Path) -> ResumeState:
    """Read a run's `latest` checkpoint.

    Raises:
        UserError: it is missing or damaged, or it is not a `latest`.
    """
    payload = checkpoint.load_checkpoint(path, TRAIN_FLAGS)
    if "run_state" not in payload:
        raise UserError(f"{path}: holds no state to resume from; give the run's {LATEST}")
    config, run_state = payload.get("args"), payload["run_state"]
    if not (isinstance(config, dict) and _is_run_state(run_state)):
        raise UserError(f"{path}: its state was not written by train_bdd100k.py; start a new run")
    config.setdefault("losses", _FORMER_LOSSES.get(str(config.get("prompt_mode"))))
    return ResumeState(path, payload["info"], payload["classes"], payload["model"], config, run_state)


def _last_saved(folder: Path) -> float:
    return max(found.st_mtime for found in map(status, _versions(folder)) if found)


def _newest_good(folder: Path) -> ResumeState:
    """Read the newest `latest` that is intact."""
    versions = _versions(folder)
    if not versions and exists(folder / CONFIG):
        raise UserError(
            f"{folder}: the run has saved no checkpoint yet; start a new run with the original command, without "
            "--resume"
        )
    errors = []
    for path in versions or [folder / LATEST]:
        try:
            state = read_resume(path)
        except UnreadableError:
            raise  # it may be intact, and an earlier checkpoint would lose what was trained since
        except UserError as error:
            errors.append(error)
            continue
        if path.name != LATEST and distributed.is_main():
            reason = errors[0] if errors else f"{folder / LATEST} is missing"
            print(
                f"warning: {reason}; resuming from {path.name}, the checkpoint before it", file=sys.stderr, flush=True
            )
        return state
    raise errors[0]


def _versions(folder: Path) -> list[Path]:
    """List the run's `latest` and its numbered predecessors, newest first."""
    number = re.compile(re.escape(Path(LATEST).stem) + r"(?:\.(\d+))?" + re.escape(Path(LATEST).suffix))
    names = listed(folder) if is_folder(folder) else []
    found = {path: match for path in names if (match := number.fullmatch(path.name)) and exists(path)}
    return sorted(found, key=lambda path: int(found[path][1] or 0))


def _is_run_state(state: Any) -> bool:
    """Whether every entry has its type; the optimizer and its like check their own states on loading."""
    return (
        _has(state, {"history": list, "best_score": float | int, "rng": list, "progress": dict})
        and bool(state["rng"])
        and all(
            checkpoint.is_flat(record)
            and record.get("epoch") == i
            and isinstance(record.get("train_loss"), float)
            and isinstance(record.get("val_miou", 0.0), float)
            for i, record in enumerate(state["history"])
        )
        and _has(state["progress"], {"steps": int, "skipped_steps": int, "sums": Tensor | None, "seconds": float})
        and state["progress"]["steps"] >= 0
    )


def _has(state: Any, kinds: Mapping[str, Any]) -> bool:
    return isinstance(state, dict) and all(key in state and isinstance(state[key], kind) for key, kind in kinds.items())
