"""Optimizer steps: the gradients of batches, and the update of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from utils.data.datasets import TrainingBatch
from utils.model.prediction import features_of
from utils.model.segmenter import Segmenter
from utils.runtime import distributed
from utils.runtime.device import Precision
from utils.runtime.errors import DivergedError
from utils.train.optim import TrainState


@dataclass(frozen=True)
class Outcome:
    """What an optimizer step did."""

    sums: Tensor  # of each part of the loss over the step's valid samples, and their number; float64 on the CPU
    skipped: bool  # by the fp16 scaler, on overflow


class Steps(Protocol):
    """Takes optimizer steps. The outcomes may come later than the steps, but in their order."""

    state: TrainState
    parts: tuple[str, ...]  # of the loss

    @property
    def model(self) -> nn.Module:
        """A `Segmenter`, or DDP around one."""

    def add(self, batch: TrainingBatch, *, last: bool) -> None:
        """Add the gradient of a batch's summed loss. `last`: it is the last batch of its step."""

    def update(self, where: str, *, stop: bool) -> bool:
        """Update the weights with the mean gradient over the samples of all processes.

        Args:
            where: the step, for error messages.
            stop: this process was asked to stop.

        Returns:
            Whether any process was.
        """

    def outcomes(self, *, all_of_them: bool) -> Iterator[Outcome]:
        """The outcomes that are known, or, after waiting, those of all steps so far.

        Raises:
            DivergedError: a loss or its gradient was not finite. The weights are those of the last good step.
        """


class EagerSteps:
    """Steps that are computed at once, in one process or in several that share them (DDP)."""

    def __init__(self, model: nn.Module, state: TrainState, precision: Precision, clip_grad_norm: float) -> None:
        self.model, self.state, self.precision, self.clip_grad_norm = model, state, precision, clip_grad_norm
        self.parts: tuple[str, ...] = distributed.unwrap(model).LOSSES  # type: ignore[assignment]
        self.sums = _StepSums(self.parts, precision.device)
        self.outcome: Outcome | None = None
        state.optimizer.zero_grad(set_to_none=True)

    def add(self, batch: TrainingBatch, *, last: bool) -> None:
        with distributed.sync_gradients(self.model, enabled=last):
            _forward_backward(self.model, batch, self.sums, self.state.scaler, self.precision)

    def update(self, where: str, *, stop: bool) -> bool:
        sums, self.sums = self.sums, _StepSums(self.parts, self.precision.device)
        any_stop = sums.reduce(where, stop=stop)
        if not self._normalise_gradients(sums.num_samples):
            raise diverged(f"{where}: the loss is finite, but not its gradient", sums.names_in_step())
        self.outcome = Outcome(sums.sums, skipped=not self._step())
        return any_stop

    def outcomes(self, *, all_of_them: bool) -> Iterator[Outcome]:
        outcome, self.outcome = self.outcome, None  # at once: what is done with it may fail
        if outcome:
            yield outcome

    def _step(self) -> bool:
        """Step the optimizer and clear the gradients; False if the scaler skipped the step because fp16 overflowed."""
        scaler = self.state.scaler
        scale_before = scaler.get_scale()
        scaler.step(self.state.optimizer)
        scaler.update()
        self.state.optimizer.zero_grad(set_to_none=True)
        return scaler.get_scale() >= scale_before

    def _normalise_gradients(self, num_samples: float) -> bool:
        """Turn the gradient of the summed loss into that of the mean over the step's samples, and clip it.

        The divisor is the number over all processes: the result is the same for every layout, with uneven last batches
        too.

        Returns:
            False if the gradient is not finite.
        """
        self.state.scaler.unscale_(self.state.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        # DDP averages over the processes; the sum is needed.
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, distributed.world_size() / max(num_samples, 1))
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm or float("inf"))
        # With fp16 an overflow is normal now and then: the scaler skips the step and lowers its scale.
        return self.state.scaler.is_enabled() or bool(norm.isfinite())


def settle_gradient_order(model: nn.Module, batch: TrainingBatch, precision: Precision) -> None:
    """Run a pass over a batch that counts nowhere, so that DDP fixes the layout of its gradients.

    DDP changes the layout after its first pass. With three processes or more the layout decides how sums are rounded:
    a resumed run would differ from an uninterrupted one.
    """
    model.train()
    nothing = _StepSums(distributed.unwrap(model).LOSSES, precision.device)  # type: ignore[arg-type]
    _forward_backward(model, batch, nothing, precision.grad_scaler(), precision)
    model.zero_grad(set_to_none=True)


def _forward_backward(
    model: nn.Module, batch: TrainingBatch, sums: _StepSums, scaler: torch.amp.GradScaler, precision: Precision
) -> None:
    """Add the gradient of a batch's summed loss, and the losses to `sums`."""
    # Features stay where they are: `features_of` moves them.
    moved = {key: precision.to_device(v) if isinstance(v, Tensor) else v for key, v in batch.items()}
    batch = cast(TrainingBatch, moved)
    losses = losses_of(model, batch, precision)
    loss_sum = sums.add(losses, batch["valid"], batch["name"])
    scaler.scale(loss_sum).backward()


def losses_of(model: nn.Module, batch: TrainingBatch, precision: Precision) -> dict[str, Tensor]:
    """The parts of the loss in the order of `LOSSES`, each of the shape of the batch's "valid" (B, or B x Q)."""
    segmenter: Segmenter = distributed.unwrap(model)  # type: ignore[assignment]
    with precision.autocast():
        features = features_of(segmenter, batch, precision)
        outputs = model(features, *(batch[key] for key in segmenter.PROMPTS))
    losses = segmenter.losses(outputs, batch)
    return {part: losses[part] for part in segmenter.LOSSES}


def sums_of(losses: dict[str, Tensor], valid: Tensor) -> Tensor:
    """The sum of each part over the valid samples."""
    return torch.stack([(loss * valid).sum() for loss in losses.values()])


def counted(parts: Tensor, valid: Tensor) -> Tensor:
    """What a batch adds to a step's sums: those of `sums_of`, and the number of samples, float64."""
    return torch.cat([parts.detach(), valid.sum()[None]]).double()


def sample_flags(losses: dict[str, Tensor], valid: Tensor) -> Tensor:
    """Whether each image's loss is finite, and whether it has a valid prompt: 2 x B bool."""
    finite = sum(losses.values()).view(len(valid), -1).isfinite().all(dim=1)  # type: ignore[union-attr]
    return torch.stack([finite, valid.view(len(valid), -1).any(dim=1)])


class _StepSums:
    """Sums of the losses over the valid samples of one optimizer step, and their number, over all processes."""

    def __init__(self, parts: tuple[str, ...], device: torch.device) -> None:
        self.sums = torch.zeros(len(parts) + 1, dtype=torch.float64, device=device)  # and the number of samples
        self.names: list[str] = []
        self.flags: list[Tensor] = []

    def add(self, losses: dict[str, Tensor], valid: Tensor, names: list[str]) -> Tensor:
        """Add losses of the shape of `valid` (B, or B x Q) and return their sum, which is to be differentiated.

        It is no mean: the number of samples is known only when all processes and batches of the step have counted.
        """
        parts = sums_of(losses, valid)
        self.sums += counted(parts, valid)
        self.flags.append(sample_flags(losses, valid))
        self.names += names
        return parts.sum()

    @property
    def num_samples(self) -> float:
        return self.sums[-1].item()

    def names_in_step(self) -> list[str]:
        """This process's images with a valid prompt; the others add nothing to the step."""
        return names_where(self.names, torch.cat(self.flags, dim=1)[1])

    def reduce(self, where: str, *, stop: bool) -> bool:
        """Sum over the processes, and tell whether any of them gave `stop`; all fail if a loss is not finite."""
        # Copied to the host once: nothing else in this step waits for the GPU.
        reduced = distributed.all_reduce_sum(torch.cat([self.sums, self.sums.new_tensor([stop])])).cpu()
        self.sums, stops = reduced[:-1], reduced[-1]
        if not bool(self.sums.isfinite().all()):
            bad = names_where(self.names, ~torch.cat(self.flags, dim=1)[0])
            raise diverged(f"{where}: the loss is not finite", bad)
        return bool(stops)


def names_where(names: list[str], chosen: Tensor) -> list[str]:
    return [name for name, is_chosen in zip(names, chosen.tolist()) if is_chosen]


def diverged(what: str, names: list[str]) -> DivergedError:
    """The error that all processes raise, with the images of all."""
    everywhere = sorted({name for some in distributed.all_gather(names) for name in some})
    return DivergedError(
        f"{what} for {', '.join(everywhere)}; the weights were not touched. Check these images, or "
        "start a new run with a lower -lr"
    )
