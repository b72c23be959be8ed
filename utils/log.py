"""What a training run leaves to read: one JSON line an epoch, a curve, and TensorBoard or W&B where asked for."""

from __future__ import annotations

import json
import math
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
            UserError: TensorBoard or W&B was asked for and is not installed, or W&B does not let us in.
        """
        self.folder = folder
        self.history = list(history)
        self._writer = _tensorboard_writer(folder, first_epoch=len(history)) if tensorboard else None
        self._wandb = _wandb_run(folder, config) if wandb else None
        # Whole or not at all; and in a folder that came from elsewhere, a link is replaced, not written through.
        outputs = {CONFIG: json.dumps(config, indent=1, ensure_ascii=False) + "\n",
                   "log.jsonl": "".join(map(_line, self.history))}
        for name, content in outputs.items():
            with atomic_write(folder / name) as file:
                file.write(content.encode(errors="backslashreplace"))

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Record an epoch; `record["epoch"]` is its number, from 0."""
        self.history.append(record)
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(_line(record))
        save_loss_curve(self.folder / "loss_curve.png", self.history)
        scalars = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "epoch"}
        if self._writer:
            for key, value in scalars.items():
                self._writer.add_scalar(key, value, record["epoch"])
            self._writer.flush()
        if self._wandb:
            self._wandb.log(scalars, step=record["epoch"])

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()


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
    # WANDB_MODE=offline keeps everything in the run's folder, to be uploaded later or never.
    try:
        return wandb.init(project="sam-bdd100k", name=folder.name, dir=str(folder), config=config)
    except wandb.errors.Error as error:  # no account, or no network
        reason = " ".join(str(error).split())
        raise UserError(f"-use_wandb: {reason} (WANDB_MODE=offline needs neither account nor network)") from None
