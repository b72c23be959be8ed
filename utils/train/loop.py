"""One epoch of training. It is the same for every prompt mode."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from utils.data.datasets import TrainingBatch
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.progress import progress_bar
from utils.train.step import Steps


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
    sums: Tensor | None = None  # as `Outcome.sums`, over `steps`; float64
    begun: float = field(default_factory=time.monotonic)
    num_steps: int = 0  # of the whole epoch
    title: str = "training"  # at the beginning of the progress bar
    note: str = ""  # at its end

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

    def save_due(self, steps: int) -> bool:
        """Whether `step_done` needs the weights as they are after so many steps of the epoch."""

    def step_done(self, progress: Progress, stop: bool) -> None:
        """Called by all processes after each step. `stop`: one of them was asked to stop; it is the same everywhere."""


class Batches(Protocol):
    """The batches of an epoch, or of the rest of one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[TrainingBatch]: ...


def train_one_epoch(
    steps: Steps, loader: Batches, *, grad_acc_steps: int, progress: Progress, watch: Watch | None = None
) -> dict[str, float]:
    """Train the mask decoder for one epoch, or for the rest of one.

    Args:
        grad_acc_steps: batches of a process in one optimizer step; the last group may be smaller.
        progress: kept up to date. If it has steps already, `loader` gives the batches after them.

    Returns:
        Means over all samples (prompts in box mode, else images) of all processes: "loss" and its parts, which the
        model's `LOSSES` names; "lr" at the end; "optimizer_steps" and "skipped_steps" (by the fp16 scaler, on
        overflow).

    Raises:
        DivergedError: the loss or its gradient is not finite. The weights are those of the last good step.
    """
    steps.model.train()
    scheduler, parts = steps.state.scheduler, steps.parts
    totals = torch.zeros(len(parts) + 1, dtype=torch.float64) if progress.sums is None else progress.sums.cpu()
    taken, epoch, stop = progress.steps, progress.epoch, False
    done = taken * grad_acc_steps
    end = done + len(loader)
    progress.num_steps = -(-end // grad_acc_steps)
    is_quiet = not distributed.is_main()
    bar = progress_bar(loader, progress.title, total=end, initial=done, unit="batch", leave=False, disable=is_quiet)

    def note_outcomes(*, all_of_them: bool) -> None:
        nonlocal totals
        for outcome in steps.outcomes(all_of_them=all_of_them):
            if outcome.skipped:
                progress.skipped_steps += 1
            else:
                scheduler.step()
            totals = progress.sums = totals + outcome.sums
            progress.steps += 1
            if watch:
                watch.step_done(progress, stop and progress.steps == taken)
            bar.set_postfix_str(progress.note, refresh=False)

    try:
        for step, batch in enumerate(bar, start=done):
            # 修改点 8: 梯度累积，每 grad_acc_steps 个 batch 更新一次，轮末不足一组的也更新
            last_of_group = (step + 1) % grad_acc_steps == 0 or step + 1 == end
            steps.add(batch, last=last_of_group)
            if last_of_group:
                stop = steps.update(
                    f"epoch {epoch + 1}, step {step + 1}", stop=watch is not None and watch.stop_requested()
                )
                taken += 1
                waits = stop or step + 1 == end or (watch is not None and watch.save_due(taken))
                note_outcomes(all_of_them=waits)
    except UserError:
        note_outcomes(all_of_them=True)  # the weights have these steps, and are saved
        raise
    return {
        **mean_losses(parts, totals),
        "lr": float(scheduler.get_last_lr()[0]),
        "optimizer_steps": progress.steps - progress.skipped_steps,
        "skipped_steps": progress.skipped_steps,
    }


def mean_losses(parts: tuple[str, ...], totals: Tensor) -> dict[str, float]:
    """The mean of each part and of the loss, from `Outcome.sums`."""
    *sums, samples = totals.tolist()
    means = {part: value / max(samples, 1) for part, value in zip(parts, sums)}
    return {"loss": sum(means.values()), **means}
