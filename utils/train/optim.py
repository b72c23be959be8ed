"""The optimizer over what is trained, and its learning rate over time."""

from __future__ import annotations

import math

import torch
from torch import nn


# 修改点 6: 仅优化 Mask Decoder 的参数
def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients, which are the mask decoder's alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)  # one pass over memory, not ten


def build_scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, *, total_steps: int, warmup_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler to be stepped once after each optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(schedule, step, total_steps=total_steps, warmup_steps=warmup_steps)
    )


def lr_factor(schedule: str, step: int, *, total_steps: int, warmup_steps: int) -> float:
    """What the learning rate is multiplied by at an optimizer step, counted from 0.

    After a linear warm-up: "constant" stays at 1, "cosine" falls to 0 at the end (Loshchilov and Hutter, 2017), and
    "step" is divided by 10 after each third of the steps that are left.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "step":
        return 0.1 ** min(2, int(3 * progress))
    return 1.0
