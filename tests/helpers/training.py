"""Train for one epoch with plain gradient descent."""

from __future__ import annotations

from typing import Any

import torch

from utils.model.segmenter import Segmenter
from utils.runtime.device import Precision
from utils.train.loop import Progress, train_one_epoch
from utils.train.optim import TrainState, build_scheduler
from utils.train.step import EagerSteps

CPU = Precision(torch.device("cpu"))


def train(
    model: Segmenter,
    loader: Any,
    *,
    grad_acc_steps: int = 1,
    clip: float = 0,
    epoch: int = 0,
    scaler: torch.amp.GradScaler | None = None,
    precision: Precision = CPU,
    schedule: str = "constant",
) -> dict:
    """Train for one epoch with SGD and return the epoch's figures.

    Adam divides by the gradient's size, which turns the rounding errors of vanishing gradients into full steps.
    """
    optimizer = torch.optim.SGD(model.mask_decoder.parameters(), lr=0.1)
    scheduler = build_scheduler(optimizer, schedule, total_steps=4, warmup_steps=0)
    steps = EagerSteps(model, TrainState(optimizer, scheduler, scaler or CPU.grad_scaler()), precision, clip)
    return train_one_epoch(steps, loader, grad_acc_steps=grad_acc_steps, progress=Progress(epoch))
