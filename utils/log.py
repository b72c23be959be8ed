"""What a training run leaves to read: one JSON line an epoch, a curve, and TensorBoard or W&B where asked for."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write
from utils.visualize import save_loss_curve

CONFIG = "config.json"


class RunLogger:
    """Writes each epoch's figures to `log.jsonl`, `loss_curve.png` and, where asked, TensorBoard and W&B."""

    def __init__(
        self, folder: Path, *, history: list[dict[str, Any]], config: dict[str, Any], tensorboard: bool, wandb: bool
    ) -> None:
        """
        Args:
            folder: the run's folder.
            history: the epochs before this start of the run, [] unless resumed; `log.jsonl` is cut back to them.
            config: the resolved configuration, written to `config.json`.

        Raises:
            UserError: TensorBoard or W&B was asked for and is not installed, W&B does not let us in, or a file cannot
                be written.
        """
        self.folder = folder
        self.history = list(history)
        self._warned = False
        self._writer = _tensorboard_writer(folder, first_epoch=len(history)) if tensorboard else None
        try:
            self._wandb = _wandb_run(folder, config) if wandb else None
        except UserError as error:
            if not history:
                raise
            self._warn(str(error))  # a resumed run has begun with it, and must not end for want of it
            self._wandb = None
        # In a folder that came from elsewhere, a link is replaced, not written through.
        with atomic_write(folder / CONFIG) as file:
            file.write((json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        self._write_log()

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Record an epoch; `record["epoch"]` is its number, from 0. TensorBoard and W&B may fail, with a warning.

        Raises:
            UserError: `log.jsonl` or the curve cannot be written.
        """
        self.history.append(record)
        self._write_log()
        save_loss_curve(self.folder / "loss_curve.png", self.history)
        scalars = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "epoch"}
        with self._dispensable():
            if self._writer:
                for key, value in scalars.items():
                    self._writer.add_scalar(key, value, record["epoch"])
                self._writer.flush()
        with self._dispensable():
            if self._wandb:
                self._wandb.log(scalars, step=record["epoch"])

    def close(self) -> None:
        with self._dispensable():
            if self._writer:
                self._writer.close()
        with self._dispensable():
            if self._wandb:
                self._wandb.finish()

    def _write_log(self) -> None:
        # All of it, as a line that is appended could be half a line.
        with atomic_write(self.folder / "log.jsonl") as file:
            file.write("".join(map(_line, self.history)).encode())

    @contextmanager
    def _dispensable(self) -> Iterator[None]:
        """A context of TensorBoard or W&B, whose failure is no reason to stop; the first one is told."""
        try:
            yield
        except Exception as error:  # a full disk, a connection or a process that was lost: each has its own
            self._warn(" ".join(str(error).split()) or type(error).__name__)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            print(f"warning: TensorBoard or W&B failed ({reason}); training goes on, and {self.folder / 'log.jsonl'} "
                  "has every figure", file=sys.stderr, flush=True)
        self._warned = True


def _line(record: dict[str, Any]) -> str:
    """The record as strict JSON, which knows neither NaN nor infinity: they become null."""
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(values) + "\n"


def _tensorboard_writer(folder: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('--use_tensorboard needs TensorBoard: pip install -e ".[log]"') from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)


def _wandb_run(folder: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError('-use_wandb needs Weights & Biases: pip install -e ".[log]"') from None
    # Without a connection its end would be waited for without end; what was not sent stays there for `wandb sync`.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
    # WANDB_MODE=offline keeps everything in the run's folder, to be uploaded later or never.
    try:
        return wandb.init(project="sam-bdd100k", name=folder.name, dir=str(folder), config=config)
    except wandb.errors.Error as error:  # no account, or no network
        reason = " ".join(str(error).split())
        raise UserError(f"-use_wandb: {reason} (WANDB_MODE=offline needs neither account nor network)") from None
