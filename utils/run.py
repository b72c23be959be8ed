"""A training run's folder: where it is, what is written into it, and how a stopped run is taken up again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import checkpoint, distributed
from utils.checkpoint import BEST, LATEST, ModelInfo
from utils.errors import UserError
from utils.log import CONFIG, RunLogger
from utils.model import Segmenter


@dataclass(frozen=True)
class Latest:
    """A run's `latest`, read to be gone on with."""

    path: Path
    state: dict[str, Any]

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.state["run_state"]["history"]


def read_latest(
    resume: Path, *, config: Mapping[str, Any], kept: Mapping[str, str], num_epochs: int, choose_by_miou: bool
) -> Latest:
    """Read a run's `latest` and check all that can be checked before the data and the SAM file are read.

    Args:
        resume: the run's folder or the file itself.
        config: the configuration of this start, and
        kept: keys of it that must be as the run began, and how the user knows them. The states that are loaded would
            override some of them without a word; to change the others midway makes two runs of one.
        num_epochs: what the run is to have when it ends, the epochs before resuming included.
        choose_by_miou: as of `Run`.

    Raises:
        UserError: `resume` names nothing, a run that began with other settings, or one that has its epochs already.
    """
    path = checkpoint.in_folder(resume, LATEST)
    if not (path.parent / LATEST).exists() and (path.parent / CONFIG).exists():
        raise UserError(f"{path.parent}: no epoch was finished there, so there is nothing to resume; "
                        "run the same command without --resume")
    state = checkpoint.load_checkpoint(path)
    if "run_state" not in state:
        raise UserError(f"{path}: holds no state to resume from; give the run's {LATEST}")
    if not (isinstance(state.get("args"), dict) and _is_run_state(state["run_state"])):
        raise UserError(f"{path}: its state is not one that train_bdd100k.py wrote; start a new run")
    for key, name in kept.items():
        now, then = config[key], state["args"].get(key, config[key])
        if now != then:
            raise UserError(f"{name} is {now}, but {path} began with {then}; give it so, or start a new run")
    latest = Latest(path, state)
    if len(latest.history) >= num_epochs:
        raise UserError(f"{path}: already trained for {len(latest.history)} epochs; raise -num_epochs to go on")
    if any("val_miou" in record for record in latest.history) and not choose_by_miou:
        raise UserError(f"{path}: its best model was chosen by mIoU; give --val_npy_path again, or start a new run")
    return latest


def _is_run_state(state: Any) -> bool:
    """Whether all that is looked at, but for the states that the optimizer and the like check themselves, is there."""
    kinds = {"history": list, "best_score": float | int, "rng": Tensor}
    return (
        isinstance(state, dict)
        and all(isinstance(state.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(record, dict) and record.get("epoch") == i for i, record in enumerate(state["history"]))
    )


class Run:
    """Checkpoints, logs and the history of epochs. Only the main process writes; all of them read on resuming."""

    def __init__(
        self,
        *,
        work_dir: Path,
        task_name: str,
        latest: Latest | None,
        model: Segmenter,
        info: ModelInfo,
        stateful: Mapping[str, Any],
        config: Mapping[str, Any],
        choose_by_miou: bool,
        tensorboard: bool,
        wandb: bool,
    ) -> None:
        """
        Args:
            latest: what to go on from, in its folder; None makes a new one in `work_dir`.
            stateful: what has `state_dict` and `load_state_dict` and belongs into `latest`.
            config: the resolved configuration; it goes into `config.json` and the checkpoints.
            choose_by_miou: the best epoch has the highest "val_miou", not the lowest "train_loss".

        Raises:
            UserError: `latest` does not fit the model, or the folder cannot be made.
        """
        self.model, self.info, self.stateful, self.choose_by_miou = model, info, stateful, choose_by_miou
        # Checkpoints load with weights_only, which knows no Path.
        self.config = {key: str(value) if isinstance(value, Path) else value for key, value in config.items()}
        self.history: list[dict[str, Any]] = []
        self.best_score = -math.inf
        if latest:
            self._resume(latest)
            self.folder = latest.path.parent
        else:
            self.folder = distributed.broadcast(_new_folder(work_dir, task_name) if distributed.is_main() else None)
        self.logger = (
            RunLogger(self.folder, history=self.history, config=self.config, tensorboard=tensorboard, wandb=wandb)
            if distributed.is_main()
            else None
        )

    def _resume(self, latest: Latest) -> None:
        state, run_state = latest.state, latest.state["run_state"]
        state["info"].require_same(self.info, latest.path)
        checkpoint.load_decoder(self.model, state["model"], latest.path)
        try:
            for name, part in self.stateful.items():
                if run_state[name]:  # that of a scaler is empty without fp16, which -use_amp may since have turned on
                    part.load_state_dict(run_state[name])
            torch.set_rng_state(run_state["rng"])
        except Exception:  # each part checks its own state, or stumbles over it, in a way of its own
            raise UserError(f"{latest.path}: its state is of another kind of run; start a new one") from None
        self.history = latest.history
        # The figure of a run that had no validation data is a loss, and no mIoU is to be measured against it.
        if not self.choose_by_miou or any("val_miou" in record for record in self.history):
            self.best_score = run_state["best_score"]

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """A context in which Ctrl-C says how to go on: repeating the command would begin another run."""
        try:
            yield
        except KeyboardInterrupt:
            hint = "no epoch was finished, so there is nothing to resume: run the same command again"
            if (self.folder / LATEST).exists():
                hint = f"run the same command with --resume {self.folder} to go on from the last whole epoch"
            raise KeyboardInterrupt(hint) from None

    def finish_epoch(self, record: dict[str, Any]) -> None:
        """Log an epoch and write the checkpoints: `latest` always, `best` if this epoch is the best so far.

        Args:
            record: "epoch", "train_loss", "seconds", "images_per_second", and, where there are any, "val_miou" and
                "skipped_steps".
        """
        self.history.append(record)
        score = record.get("val_miou", -math.inf) if self.choose_by_miou else -record["train_loss"]
        is_best = score > self.best_score
        if is_best:
            self.best_score = score
        if self.logger is None:
            return
        metadata = {"epoch": record["epoch"], "metrics": record, "args": self.config}
        run_state = {name: part.state_dict() for name, part in self.stateful.items()}
        run_state |= {"rng": torch.get_rng_state(), "history": self.history, "best_score": self.best_score}
        if is_best:
            checkpoint.save_best(self.folder / BEST, self.model, self.info, **metadata)
        checkpoint.save_latest(self.folder / LATEST, self.model, self.info, **metadata, run_state=run_state)
        self.logger.log_epoch(record)
        miou = f", val mIoU {record['val_miou']:.4f}" if "val_miou" in record else ""
        skipped = f", {record['skipped_steps']} steps skipped (fp16 overflow)" if record.get("skipped_steps") else ""
        print(
            f"epoch {record['epoch']}: loss {record['train_loss']:.4f}{miou}, {record['seconds']:.0f} s, "
            f"{record['images_per_second']:.2f} images/s{skipped}{' (best)' if is_best else ''}",
            flush=True,
        )

    def finish(self) -> None:
        """Close the logs and say where everything is."""
        if self.logger is None:
            return
        self.logger.close()
        print(f"\nBest model: {self.folder / BEST}")
        epochs = len(self.history)
        print(f"To train longer: the same command with a larger -num_epochs (now {epochs}) and --resume {self.folder}")
        print(f"Log and curve: {self.folder / 'log.jsonl'}, {self.folder / 'loss_curve.png'}")


def _new_folder(work_dir: Path, task_name: str) -> Path:
    """Make `<work_dir>/<task_name>-<YYYYMMDD-HHMM>`, numbered if another run took the name in the same minute."""
    base = work_dir / f"{task_name}-{datetime.now():%Y%m%d-%H%M}"
    for folder in (base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 100))):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); give another --work_dir") from None
    raise UserError(f"{base}: too many runs of this name in one minute; give another -task_name")
