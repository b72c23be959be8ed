"""One epoch of training. It is the same for every prompt mode."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils.data.datasets import FILLER, TrainingBatch, TrainingDataset, collate_training
from utils.model.prediction import features_of
from utils.model.segmenter import Segmenter
from utils.runtime import distributed
from utils.runtime.device import Precision
from utils.runtime.errors import DivergedError
from utils.runtime.progress import progress_bar
from utils.train.optim import TrainState


class SavedProgress(TypedDict):
    """A `Progress` in a checkpoint; the epoch is the number of epochs in the history."""

    steps: int
    skipped_steps: int
    sums: Tensor | None
    seconds: float


@dataclass
class Progress:
    """The position within an epoch, after an optimizer step. Training resumes from it."""

    epoch: int
    steps: int = 0  # of the optimizer, with those that the fp16 scaler skipped
    skipped_steps: int = 0
    sums: Tensor | None = None  # as `_StepSums.sums`, over `steps`; float64
    begun: float = field(default_factory=time.monotonic)
    num_steps: int = 0  # of the epoch
    title: str = "training"  # of the progress bar, and what stands at its end
    note: str = ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def saved(self) -> SavedProgress:
        sums = None if self.sums is None else self.sums.cpu()
        return {"steps": self.steps, "skipped_steps": self.skipped_steps, "sums": sums, "seconds": self.seconds}

    @classmethod
    def restored(cls, epoch: int, saved: SavedProgress, num_sums: int) -> Progress:
        """The inverse of `saved`; a ValueError if the sums are not `num_sums`."""
        sums = saved["sums"]
        if sums is not None and sums.shape != (num_sums,):
            raise ValueError("sums of other losses")
        return cls(epoch, saved["steps"], saved["skipped_steps"], sums, begun=time.monotonic() - saved["seconds"])


class Watch(Protocol):
    """Is told of every optimizer step, and may end the epoch after it."""

    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""

    def step_done(self, progress: Progress, stop: bool) -> None:
        """Called by all processes after each step. `stop`: one of them was asked to stop; it is the same everywhere."""


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    state: TrainState,
    *,
    precision: Precision,
    grad_acc_steps: int,
    clip_grad_norm: float,
    progress: Progress,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Train the mask decoder for one epoch, or for the rest of one.

    Args:
        model: a `Segmenter`, or DDP around one.
        grad_acc_steps: batches of a process in one optimizer step; the last group may be smaller.
        clip_grad_norm: largest norm of the gradient, 0 for no limit.
        progress: kept up to date. If it has steps already, `loader` gives the batches after them.

    Returns:
        Means over all samples (prompts in box mode, else images) of all processes: "loss" and its parts, which the
        model's `LOSSES` names; "lr" at the end; "optimizer_steps" and "skipped_steps" (by the fp16 scaler, on
        overflow).

    Raises:
        DivergedError: the loss or its gradient is not finite. The weights are those of the last good step.
    """
    optimizer, scheduler, scaler = state.optimizer, state.scheduler, state.scaler
    parts: tuple[str, ...] = distributed.unwrap(model).LOSSES  # type: ignore[assignment]
    model.train()
    totals = torch.zeros(len(parts) + 1, dtype=torch.float64) if progress.sums is None else progress.sums.cpu()
    done, epoch = progress.steps * grad_acc_steps, progress.epoch
    end = done + len(loader)
    progress.num_steps = -(-end // grad_acc_steps)
    is_quiet = not distributed.is_main()
    bar = progress_bar(loader, progress.title, total=end, initial=done, unit="batch", leave=False, disable=is_quiet)
    optimizer.zero_grad(set_to_none=True)
    group = _StepSums(parts, precision.device)
    for step, batch in enumerate(bar, start=done):
        # 修改点 8: 梯度累积，每 grad_acc_steps 个 batch 更新一次，轮末不足一组的也更新
        last_of_group = (step + 1) % grad_acc_steps == 0 or step + 1 == end
        with distributed.sync_gradients(model, enabled=last_of_group):
            _forward_backward(model, batch, group, scaler, precision)
        if not last_of_group:
            continue

        where = f"epoch {epoch + 1}, step {step + 1}"
        stop = group.reduce(where, stop=watch is not None and watch.stop_requested())
        if not _normalise_gradients(model, optimizer, scaler, group.num_samples, clip_grad_norm):
            raise _diverged(f"{where}: the loss is finite, but not its gradient", group.names_in_step())
        if _step(optimizer, scaler):
            scheduler.step()
        else:
            progress.skipped_steps += 1
        totals = progress.sums = totals + group.sums
        progress.steps += 1
        if watch:
            watch.step_done(progress, stop)
        bar.set_postfix_str(progress.note, refresh=False)
        group = _StepSums(parts, precision.device)
    return {
        **_means(parts, totals),
        "lr": float(scheduler.get_last_lr()[0]),
        "optimizer_steps": progress.steps - progress.skipped_steps,
        "skipped_steps": progress.skipped_steps,
    }


def settle_gradient_order(model: nn.Module, dataset: TrainingDataset, precision: Precision) -> None:
    """Run a pass over an image that counts nowhere, so that DDP fixes the layout of its gradients.

    A single process does nothing.

    DDP changes the layout after its first pass. With three processes or more the layout decides how sums are rounded:
    a resumed run would differ from an uninterrupted one.
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
    moved = {key: precision.to_device(v) if isinstance(v, Tensor) else v for key, v in batch.items()}
    batch = cast(TrainingBatch, moved)
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
        """Add losses of the shape of `valid` (B, or B x Q) and return their sum, which is to be differentiated.

        It is no mean: the number of samples is known only when all processes and batches of the step have counted.
        """
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
        """This process's images with a valid prompt; the others add nothing to the step."""
        return [name for name, counts in zip(self.names, torch.cat(self.in_step).tolist()) if counts]

    def reduce(self, where: str, *, stop: bool) -> bool:
        """Sum over the processes, and tell whether any of them gave `stop`; all fail if a loss is not finite."""
        # Copied to the host once: nothing else in this step waits for the GPU.
        reduced = distributed.all_reduce_sum(torch.cat([self.sums, self.sums.new_tensor([stop])])).cpu()
        self.sums, stops = reduced[:-1], reduced[-1]
        if not bool(self.sums.isfinite().all()):
            bad = [name for name, finite in zip(self.names, torch.cat(self.finite).tolist()) if not finite]
            raise _diverged(f"{where}: the loss is not finite", bad)
        return bool(stops)


def _diverged(what: str, names: list[str]) -> DivergedError:
    """The error that all processes raise, with the images of all."""
    everywhere = sorted({name for some in distributed.all_gather(names) for name in some})
    return DivergedError(
        f"{what} for {', '.join(everywhere)}; the weights were not touched. Check these images, or "
        "start a new run with a lower -lr"
    )


def _means(parts: tuple[str, ...], totals: Tensor) -> dict[str, float]:
    """The mean of each part and of the loss, from `_StepSums.sums`."""
    *sums, samples = totals.tolist()
    means = {part: value / max(samples, 1) for part, value in zip(parts, sums)}
    return {"loss": sum(means.values()), **means}


def _step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Step the optimizer and clear the gradients; False if the scaler skipped the step because fp16 overflowed."""
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
    """Turn the gradient of the summed loss into that of the mean over the step's samples, and clip it.

    The divisor is the number over all processes: the result is the same for every layout, with uneven last batches too.

    Returns:
        False if the gradient is not finite.
    """
    scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    # DDP averages over the processes; the sum is needed.
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, distributed.world_size() / max(num_samples, 1))
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm or float("inf"))
    # With fp16 an overflow is normal now and then: the scaler skips the step and lowers its scale.
    return scaler.is_enabled() or bool(norm.isfinite())
