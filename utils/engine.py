"""The two loops: one epoch of training, and prediction over a labelled set. Both return plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import distributed
from utils.bdd100k import IGNORE_LABEL
from utils.errors import UserError
from utils.losses import prompt_losses
from utils.metrics import ConfusionMatrix
from utils.model import BoxSegmenter
from utils.precision import Precision


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
    epoch: int,
) -> dict[str, float]:
    """Train the mask decoder for one epoch.

    Args:
        model: a `BoxSegmenter`, or DDP around one.
        grad_acc_steps: batches of a process that make one optimizer step; the last group may be smaller.
        clip_grad_norm: largest norm of the gradient, 0 for no limit.

    Returns:
        Means over all prompts of all processes: "loss" and its parts "dice", "bce" and "iou"; "lr" at the end;
        "optimizer_steps" and "skipped_steps" (by the fp16 scaler, on overflow).

    Raises:
        UserError: the loss is not finite; the weights are then as after the last good step.
    """
    segmenter: BoxSegmenter = distributed.unwrap(model)  # type: ignore[assignment]
    model.train()
    totals = _StepSums(precision.device)
    skipped = optimizer_steps = 0
    progress = tqdm(loader, desc=f"epoch {epoch}", unit="step", disable=not distributed.is_main(), leave=False)
    optimizer.zero_grad(set_to_none=True)
    group = _StepSums(precision.device)
    for step, batch in enumerate(progress):
        # 修改点 8: 梯度累积：每 grad_acc_steps 步更新一次，末尾不足一组的也更新
        last_of_group = (step + 1) % grad_acc_steps == 0 or step + 1 == len(loader)
        with distributed.sync_gradients(model, enabled=last_of_group):
            with precision.autocast():
                image_embeddings = segmenter.encode(precision.images(batch))
                low_res_masks, iou_predictions = model(image_embeddings, precision.to_device(batch["boxes"]))
            losses = prompt_losses(
                low_res_masks,
                iou_predictions,
                precision.to_device(batch["labels"]),
                precision.to_device(batch["class_ids"]),
            )
            loss_sum = group.add(losses, precision.to_device(batch["valid"]), batch["name"])
            scaler.scale(loss_sum).backward()
        if not last_of_group:
            continue

        num_prompts = group.reduce(f"epoch {epoch}, step {step + 1}")
        _normalise_gradients(model, optimizer, scaler, num_prompts, clip_grad_norm)
        scale_before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if scaler.get_scale() < scale_before:  # a gradient overflowed fp16, and the scaler left the weights alone
            skipped += 1
        else:
            scheduler.step()
            optimizer_steps += 1
        totals.merge(group)
        progress.set_postfix(loss=f"{totals.means()['loss']:.4f}", lr=f"{scheduler.get_last_lr()[0]:.2e}")
        group = _StepSums(precision.device)
    return {
        **totals.means(),
        "lr": float(scheduler.get_last_lr()[0]),
        "optimizer_steps": optimizer_steps,
        "skipped_steps": skipped,
    }


class _StepSums:
    """Sums of the losses over the valid prompts of one optimizer step, and their number, over all processes."""

    KEYS = ("loss", "dice", "bce", "iou", "prompts")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.KEYS), dtype=torch.float64, device=device)
        self.names: list[str] = []
        self.finite: list[Tensor] = []

    def add(self, losses: dict[str, Tensor], valid: Tensor, names: list[str]) -> Tensor:
        """Add B x Q losses and return the sum to differentiate: a sum, as what it is to be divided by is not known
        before the other processes and steps of the group have counted their prompts."""
        parts = [(losses[key] * valid).sum() for key in ("dice", "bce", "iou")]
        loss = torch.stack(parts).sum()
        self.sums += torch.stack([loss.detach(), *(part.detach() for part in parts), valid.sum()]).double()
        self.finite.append(sum(losses.values()).isfinite().all(dim=1))  # type: ignore[union-attr]
        self.names += names
        return loss

    def reduce(self, where: str) -> float:
        """Sum over the processes and return the number of prompts; all processes stop where a loss is not finite."""
        distributed.all_reduce_sum(self.sums)
        if not bool(self.sums.isfinite().all()):
            bad = [name for name, finite in zip(self.names, torch.cat(self.finite).tolist()) if not finite]
            names = sorted({name for some in distributed.all_gather(bad) for name in some})
            raise UserError(
                f"{where}: the loss is not finite for {', '.join(names)}; the weights were not touched. "
                "Check these files, lower -lr, or train without -use_amp"
            )
        return self.sums[-1].item()

    def merge(self, other: _StepSums) -> None:
        self.sums += other.sums

    def means(self) -> dict[str, float]:
        *sums, prompts = self.sums.tolist()
        return {key: value / max(prompts, 1) for key, value in zip(self.KEYS, sums)}


def _normalise_gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    num_prompts: float,
    clip_grad_norm: float,
) -> None:
    """Turn the gradient of the summed loss into that of the mean over all the prompts of the step, and clip it.

    Dividing by the number over all processes, and not each process by its own, is what makes the result the same
    for every layout, uneven last batches included.
    """
    scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    for p in parameters:
        # DDP has averaged over the processes; the sum is wanted.
        p.grad.mul_(distributed.world_size() / max(num_prompts, 1))  # type: ignore[union-attr]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm or float("inf"))
    # With the fp16 scaler an overflow is expected now and then: it skips the step and lowers its scale.
    if not scaler.is_enabled() and not bool(norm.isfinite()):
        raise UserError("the gradient is not finite though the loss is; the weights were not touched. Lower -lr")


@dataclass(frozen=True)
class Prediction:
    """One image's outcome, on the CPU: its name, and S x S label maps."""

    name: str
    image: Tensor  # S x S x 3 as stored
    target: Tensor  # S x S uint8
    prediction: Tensor  # S x S uint8, 255 where no mask claims the pixel


@torch.no_grad()
def predict(model: BoxSegmenter, loader: Iterable[dict[str, Any]], precision: Precision) -> Iterator[Prediction]:
    """Segment each image with the boxes given for it: encoded once, all its classes decoded in one call."""
    model.eval()
    for batch in loader:
        with precision.autocast():
            image_embeddings = model.encode(precision.images(batch))
        for i, name in enumerate(batch["name"]):
            size = batch["labels"].shape[-2:]
            label_map = torch.full(size, IGNORE_LABEL, dtype=torch.uint8, device=precision.device)
            if len(batch["class_ids"][i]):
                with precision.autocast():
                    boxes = precision.to_device(batch["boxes"][i]).float()[None]
                    low_res_masks, _ = model(image_embeddings[i : i + 1], boxes)
                label_map = merge_masks(low_res_masks[0], precision.to_device(batch["class_ids"][i]), size)
            yield Prediction(name, batch["image"][i], batch["labels"][i], label_map.cpu())


def merge_masks(low_res_masks: Tensor, class_ids: Tensor, size: tuple[int, int]) -> Tensor:
    """Make one label map of several classes' masks: the highest logit wins, and must be above 0.

    Args:
        low_res_masks: Q x h x w logits.
        class_ids: Q int64.
        size: (H, W) of the label map; logits are upsampled to it before they are compared.

    Returns:
        H x W uint8, 255 where no mask claims the pixel.
    """
    logits = F.interpolate(low_res_masks.float()[None], size, mode="bilinear", align_corners=False)[0]
    best, winner = logits.max(dim=0)
    return torch.where(best > 0, class_ids[winner], IGNORE_LABEL).to(torch.uint8)


def evaluate(model: BoxSegmenter, loader: Iterable[dict[str, Any]], precision: Precision) -> ConfusionMatrix:
    """Score oracle-box predictions over this process's share of a set, and sum over the processes."""
    confusion = ConfusionMatrix(precision.device)
    progress = tqdm(loader, desc="validation", unit="batch", disable=not distributed.is_main(), leave=False)
    for outcome in predict(model, progress, precision):
        confusion.update(outcome.prediction, outcome.target)
    distributed.all_reduce_sum(confusion.matrix)
    return confusion
