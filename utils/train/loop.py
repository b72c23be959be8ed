"""The two loops: one epoch of training, and the score over a labelled set. They know no prompt mode."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.data.datasets import FILLER, TrainingBatch, TrainingDataset, collate_training
from utils.model.prediction import features_of
from utils.model.segmenter import Segmenter
from utils.runtime import distributed
from utils.runtime.device import Precision
from utils.runtime.errors import DivergedError


@dataclass
class Progress:
    """How far an epoch has come, at the end of an optimizer step: with it, training goes on inside the epoch."""

    epoch: int
    steps: int = 0  # of the optimizer, those included that the fp16 scaler skipped
    skipped_steps: int = 0
    sums: Tensor | None = None  # as `_StepSums.sums`, over `steps`; float64
    begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun


class Watch(Protocol):
    """Who is told of every optimizer step, and may end the epoch after it."""

    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""

    def step_done(self, progress: Progress, stop: bool) -> None:
        """Called by all processes after each step; `stop`, the same everywhere: one of them was asked to stop."""


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    grad_acc_steps: int,
    clip_grad_norm: float,
    progress: Progress,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Train the mask decoder for one epoch, or what is left of it.

    Args:
        model: a `Segmenter`, or DDP around one.
        grad_acc_steps: batches of a process that make one optimizer step; the last group may be smaller.
        clip_grad_norm: largest norm of the gradient, 0 for no limit.
        progress: kept up to date; where it has steps already, `loader` gives the batches that come after them.

    Returns:
        Means over all samples (prompts in box mode, else images) of all processes: "loss" and the parts of it that the
        model's `LOSSES` names; "lr" at the end; "optimizer_steps" and "skipped_steps" (by the fp16 scaler, on
        overflow).

    Raises:
        DivergedError: the loss or its gradient is not finite; the weights are then as after the last good step.
    """
    parts: tuple[str, ...] = distributed.unwrap(model).LOSSES  # type: ignore[assignment]
    model.train()
    totals = torch.zeros(len(parts) + 1, dtype=torch.float64) if progress.sums is None else progress.sums.cpu()
    done, epoch = progress.steps * grad_acc_steps, progress.epoch
    end = done + len(loader)
    bar = tqdm(loader, f"epoch {epoch}", end, leave=False, disable=not distributed.is_main(), unit="step", initial=done)
    optimizer.zero_grad(set_to_none=True)
    group = _StepSums(parts, precision.device)
    for step, batch in enumerate(bar, start=done):
        # 修改点 8: 梯度累积，每 grad_acc_steps 个 batch 更新一次，轮末不足一组的也更新
        last_of_group = (step + 1) % grad_acc_steps == 0 or step + 1 == end
        with distributed.sync_gradients(model, enabled=last_of_group):
            _forward_backward(model, batch, group, scaler, precision)
        if not last_of_group:
            continue

        where = f"epoch {epoch}, step {step + 1}"
        stop = group.reduce(where, stop=watch is not None and watch.stop_requested())
        if not _normalise_gradients(model, optimizer, scaler, group.num_samples, clip_grad_norm):
            raise _diverged(f"{where}: the loss is finite, but not its gradient", group.names_in_step())
        if _step(optimizer, scaler):
            scheduler.step()
        else:
            progress.skipped_steps += 1
        totals = progress.sums = totals + group.sums
        progress.steps += 1
        means = _means(parts, totals)
        bar.set_postfix(loss=f"{means['loss']:.4f}", lr=f"{scheduler.get_last_lr()[0]:.2e}")
        if watch:
            watch.step_done(progress, stop)
        group = _StepSums(parts, precision.device)
    return {
        **_means(parts, totals),
        "lr": float(scheduler.get_last_lr()[0]),
        "optimizer_steps": progress.steps - progress.skipped_steps,
        "skipped_steps": progress.skipped_steps,
    }


def settle_gradient_order(model: nn.Module, dataset: TrainingDataset, precision: Precision) -> None:
    """Where there are several processes, a pass over no image, which changes nothing that is trained.

    DDP lays its gradients out anew after its first pass, and of three processes or more, the layout decides how a sum
    is rounded: a resumed run would differ from one that went on.
    """
    if distributed.unwrap(model) is model:
        return
    model.train()
    batch = collate_training([dataset[FILLER]])
    nothing = _StepSums(distributed.unwrap(model).LOSSES, precision.device)  # type: ignore[arg-type]
    _forward_backward(model, batch, nothing, precision.grad_scaler(), precision)
    model.zero_grad(set_to_none=True)


def _forward_backward(
    model: nn.Module, batch: TrainingBatch, group: _StepSums, scaler: torch.amp.GradScaler, precision: Precision
) -> None:
    """Add the gradient of a batch's summed loss, and the losses to `group`."""
    segmenter: Segmenter = distributed.unwrap(model)  # type: ignore[assignment]
    on_device: Any = {key: precision.to_device(v) if isinstance(v, Tensor) else v for key, v in batch.items()}
    batch = on_device
    with precision.autocast():
        features = features_of(segmenter, batch, precision)
        outputs = model(features, *(batch[key] for key in segmenter.PROMPTS))
    loss_sum = group.add(segmenter.losses(outputs, batch), batch["valid"], batch["name"])
    scaler.scale(loss_sum).backward()


class _StepSums:
    """Sums of the losses over the valid samples of one optimizer step, and their number, over all processes."""

    def __init__(self, parts: tuple[str, ...], device: torch.device) -> None:
        self.parts = parts
        self.sums = torch.zeros(len(parts) + 1, dtype=torch.float64, device=device)  # and the number of samples
        self.names: list[str] = []
        self.finite: list[Tensor] = []
        self.in_step: list[Tensor] = []

    def add(self, losses: dict[str, Tensor], valid: Tensor, names: list[str]) -> Tensor:
        """Add losses of the shape of `valid` (B, or B x Q) and return the sum to differentiate: a sum, as what it is
        to be divided by is not known before the other processes and steps of the group have counted their samples."""
        parts = torch.stack([(losses[part] * valid).sum() for part in self.parts])
        self.sums += torch.cat([parts.detach(), valid.sum()[None]]).double()
        self.finite.append(sum(losses.values()).view(len(names), -1).isfinite().all(dim=1))  # type: ignore[union-attr]
        self.in_step.append(valid.view(len(names), -1).any(dim=1))
        self.names += names
        return parts.sum()

    @property
    def num_samples(self) -> float:
        return self.sums[-1].item()

    def names_in_step(self) -> list[str]:
        """Of this process's images, those with a prompt that counts; the others give the step nothing."""
        return [name for name, counts in zip(self.names, torch.cat(self.in_step).tolist()) if counts]

    def reduce(self, where: str, *, stop: bool) -> bool:
        """Sum over the processes; whether any of them gave `stop`. All of them fail where a loss is not finite."""
        # To the host once: all else that is asked of the sums in this step does not wait for a card.
        reduced = distributed.all_reduce_sum(torch.cat([self.sums, self.sums.new_tensor([stop])])).cpu()
        self.sums, stops = reduced[:-1], reduced[-1]
        if not bool(self.sums.isfinite().all()):
            bad = [name for name, finite in zip(self.names, torch.cat(self.finite).tolist()) if not finite]
            raise _diverged(f"{where}: the loss is not finite", bad)
        return bool(stops)


def _diverged(what: str, names: list[str]) -> DivergedError:
    """The error, which all processes raise, each with the names of its own images."""
    everywhere = sorted({name for some in distributed.all_gather(names) for name in some})
    return DivergedError(
        f"{what} for {', '.join(everywhere)}; the weights were not touched. Check these images, or "
        "start a new run with a lower -lr"
    )


def _means(parts: tuple[str, ...], totals: Tensor) -> dict[str, float]:
    """The mean of each part and of their sum, from sums as `_StepSums` has them."""
    *sums, samples = totals.tolist()
    means = {part: value / max(samples, 1) for part, value in zip(parts, sums)}
    return {"loss": sum(means.values()), **means}


def _step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Move the weights and forget the gradients; False if one overflowed fp16 and the scaler left the weights alone."""
    scale_before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return scaler.get_scale() >= scale_before


def _normalise_gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    num_samples: float,
    clip_grad_norm: float,
) -> bool:
    """Turn the gradient of the summed loss into that of the mean over all the samples of the step, and clip it.

    False if it is not finite.

    Dividing by the number over all processes, and not each process by its own, is what makes the result the same
    for every layout, uneven last batches included.
    """
    scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    # DDP has averaged over the processes; the sum is wanted.
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, distributed.world_size() / max(num_samples, 1))
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm or float("inf"))
    # With the fp16 scaler an overflow is expected now and then: it skips the step and lowers its scale.
    return scaler.is_enabled() or bool(norm.isfinite())
