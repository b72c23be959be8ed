"""The optimizer, its learning rate over time, and their state as one object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainState:
    """What moves the weights: its state dicts go into `latest` under the names of the fields."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler

    def state_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name).state_dict() for field in fields(self)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave.

        Raises:
            Exception: each part rejects a foreign state in its own way.
        """
        for field in fields(self):
            if saved[field.name]:  # a scaler's is empty without fp16, which may be enabled on resuming
                getattr(self, field.name).load_state_dict(saved[field.name])
        # PyTorch does not check the shapes of moments: the first step would fail.
        moments = [(p.shape, value) for p, state in self.optimizer.state.items() for value in state.values()]
        if any(isinstance(value, Tensor) and value.shape not in ((), shape) for shape, value in moments):
            raise ValueError("moments of other parameters")


# 修改点 6: 仅优化 Mask Decoder 的参数
def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients: the mask decoder's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)  # one pass over memory, not ten


def build_scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, *, total_steps: int, warmup_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler that is stepped once after each optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(schedule, step, total_steps=total_steps, warmup_steps=warmup_steps)
    )


def lr_factor(schedule: str, step: int, *, total_steps: int, warmup_steps: int) -> float:
    """The factor on the learning rate at an optimizer step, counted from 0.

    After a linear warm-up, "constant" stays at 1, "cosine" falls to 0 at the end (Loshchilov and Hutter, 2017), and
    "step" is divided by 10 after each third of the remaining steps.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "step":
        return 0.1 ** min(2, int(3 * progress))
    return 1.0
