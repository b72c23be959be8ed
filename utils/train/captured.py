"""Steps on a card as CUDA graphs: a thousand kernels are one launch, and the host never waits for the card.

A graph repeats its kernels on the same memory, so a batch is copied to where the graph reads it. Batches of each shape
have a graph of their own. The card itself decides whether a step counts: a loss or gradient that is not finite leaves
the weights alone, and the host reads that a few steps later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from utils.data.datasets import TrainingBatch
from utils.model.segmenter import Segmenter
from utils.runtime import distributed
from utils.runtime.device import Precision
from utils.runtime.errors import UserError
from utils.train.optim import TrainState
from utils.train.step import Outcome, counted, diverged, losses_of, names_where, sample_flags, sums_of

LAG = 8  # steps that the host may be ahead of the card
TABLE = 1024  # learning rates on the card


@dataclass
class _Pending:
    """A step whose outcome the host has not read yet."""

    where: str
    report: Tensor  # pinned: the sums, the gradient's norm; the loss scale before the step, and its age in steps
    done: torch.cuda.Event
    names: list[str]
    flags: list[Tensor]  # of each batch, as `sample_flags`


class CapturedSteps:
    """Steps of one process on a card. The first batch of each shape runs without a graph, as a warm-up."""

    def __init__(
        self,
        model: Segmenter,
        state: TrainState,
        precision: Precision,
        clip_grad_norm: float,
        *,
        compiled_batch: int = 0,
    ) -> None:
        """Set up the steps.

        Args:
            compiled_batch: the size of the batches that `torch.compile` is worth it for; 0 for none. Others, as at an
                epoch's end, are captured without it.
        """
        self.model, self.state, self.precision = model, state, precision
        self.parts: tuple[str, ...] = model.LOSSES
        self.clip_grad_norm = clip_grad_norm or float("inf")
        self.compiled_batch = compiled_batch
        self.compiled: Callable[[TrainingBatch], tuple[Tensor, Tensor]] | None = None
        device = precision.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.gradients = [cast(Tensor, p.grad) for p in self.parameters]
        self.sums = torch.zeros(len(self.parts) + 1, dtype=torch.float64, device=device)
        self.report = torch.zeros(len(self.parts) + 4, dtype=torch.float64, device=device)
        self.has_diverged = torch.zeros((), dtype=torch.bool, device=device)
        self.one = torch.ones((), device=device)
        # The learning rate of each step that counts, from a first one on.
        self.lr = torch.zeros((), device=device)
        self.table = torch.zeros(TABLE, device=device)
        self.good_steps = torch.zeros(1, dtype=torch.int64, device=device)  # since the table's first
        self.table_first = self._scheduler.last_epoch
        self.until_refill = 0

        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.places: dict[tuple[object, ...], Tensor] = {}  # where graphs read their inputs
        self.warm: set[tuple[object, ...]] = set()  # shapes of which a batch has run without a graph
        self.adding: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # and the flags that it writes
        self.updating: torch.cuda.CUDAGraph | None = None
        self.has_updated = False
        self.names: list[str] = []
        self.flags: list[Tensor] = []
        self.pending: deque[_Pending] = deque()

    def add(self, batch: TrainingBatch, *, last: bool) -> None:
        leaves, placed = _leaves(batch), self._placed(batch)
        for place, leaf in zip(_leaves(placed), leaves):
            place.copy_(leaf, non_blocking=True)
        shape = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
        if shape in self.warm:
            if shape not in self.adding:
                self.adding[shape] = self._capture(partial(self._add, placed))
            graph, output = self.adding[shape]
            graph.replay()
            flags = output.clone()
        else:
            self.warm.add(shape)
            flags = self._add(placed)
        self.names += batch["name"]
        self.flags.append(flags)

    def update(self, where: str, *, stop: bool) -> bool:
        if self.until_refill == 0:
            self._refill()
        self.until_refill -= 1
        if self.has_updated:
            self.updating = self.updating or self._capture(self._update)[0]
            self.updating.replay()
        else:
            self._update()
            self.has_updated = True
        report = torch.empty_like(self.report, device="cpu", pin_memory=self.report.is_cuda)
        report.copy_(self.report, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self.pending.append(_Pending(where, report, done, self.names, self.flags))
        self.names, self.flags = [], []
        return stop

    def outcomes(self, *, all_of_them: bool) -> Iterator[Outcome]:
        while len(self.pending) > (0 if all_of_them else LAG):
            step = self.pending.popleft()
            step.done.synchronize()
            sums, (norm, scale, age) = step.report[:-3], step.report[-3:]
            overflow = not bool(norm.isfinite())
            if not bool(sums.isfinite().all()):
                what, chosen = "the loss is not finite", ~torch.cat(step.flags, dim=1)[0]
            elif overflow and not self.state.scaler.is_enabled():
                what, chosen = "the loss is finite, but not its gradient", torch.cat(step.flags, dim=1)[1]
            else:
                yield Outcome(sums, skipped=overflow)
                continue
            self.pending.clear()  # these were not taken
            scaler = self.state.scaler
            if scaler.is_enabled():  # they have lowered its scale
                scaler.load_state_dict({**scaler.state_dict(), "scale": scale.item(), "_growth_tracker": int(age)})
            raise diverged(f"{step.where}: {what}", names_where(step.names, chosen))

    def _losses(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        losses = losses_of(self.model, batch, self.precision)
        return sums_of(losses, batch["valid"]), sample_flags(losses, batch["valid"])

    def _add(self, batch: TrainingBatch) -> Tensor:
        """Add a batch's gradient and sums; its `sample_flags`."""
        tensors = cast(TrainingBatch, {key: value for key, value in batch.items() if key != "name"})
        valid = batch["valid"]
        # With a single prompt, the program for any number of them would be compiled anew.
        is_compiled = len(valid) == self.compiled_batch and valid.shape[1:] != (1,)
        parts, flags = self._compiled_losses(tensors) if is_compiled else self._losses(tensors)
        self.sums += counted(parts, valid)
        gradients = torch.autograd.grad(self.state.scaler.scale(parts.sum()), self.parameters)
        torch._foreach_add_(self.gradients, gradients)
        return flags

    def _compiled_losses(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        if batch["valid"].ndim == 2:
            for prompts in (batch["class_ids"], batch["boxes"], batch["valid"]):
                torch._dynamo.mark_dynamic(prompts, 1)
        if self.compiled:
            return self.compiled(batch)
        self.compiled = torch.compile(self._losses)
        distributed.say("compiling the training step, which takes a minute or two")
        try:
            return self.compiled(batch)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # of Dynamo, Inductor, Triton or the C compiler
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--step_mode compiled: torch.compile fails here ({reason}); set it to captured") from None

    def _update(self) -> None:
        """Step the optimizer as `EagerSteps`, but leave the weights alone once a loss or gradient is not finite."""
        optimizer, scaler = self.state.optimizer, self.state.scaler
        self.lr.copy_(self.table.index_select(0, self.good_steps)[0])
        self.has_diverged |= ~self.sums.isfinite().all()
        scale = scaler.scale(self.one)
        age = cast(Tensor, scaler._growth_tracker).clone() if scaler.is_enabled() else self.one
        factor = (1 / self.sums[-1].clamp(min=1)).float()
        torch._foreach_mul_(self.gradients, torch.where(self.has_diverged, float("nan"), factor))
        norm = torch.nn.utils.get_total_norm(self.gradients) / scale
        if not scaler.is_enabled():
            self.has_diverged |= ~norm.isfinite()
        # With NaN everywhere, the scaler skips the step.
        clipping = torch.where(norm.isfinite(), (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1), float("nan"))
        torch._foreach_mul_(self.gradients, clipping)
        with self._optimizer_on_card(skip=~norm.isfinite()):
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        self.good_steps += norm.isfinite()
        self.report.copy_(torch.cat([self.sums, torch.stack([norm, scale, age]).double()]))
        self.sums.zero_()
        torch._foreach_zero_(self.gradients)

    @contextmanager
    def _optimizer_on_card(self, *, skip: Tensor) -> Iterator[None]:
        """A context in which the optimizer reads the learning rate, and whether it is to skip the step, on the card."""
        optimizer = self.state.optimizer
        saved = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = self.lr, True
        if not self.state.scaler.is_enabled():  # as the scaler tells it
            optimizer.found_inf, optimizer.grad_scale = skip.float(), None  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for group, (lr, capturable) in zip(optimizer.param_groups, saved):
                group["lr"], group["capturable"] = lr, capturable
            if not self.state.scaler.is_enabled():
                del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]

    @property
    def _scheduler(self) -> torch.optim.lr_scheduler.LambdaLR:
        return cast(torch.optim.lr_scheduler.LambdaLR, self.state.scheduler)

    def _refill(self) -> None:
        """Put the next learning rates on the card, from that of the first step whose outcome is not known."""
        first, factor = self._scheduler.last_epoch, self._scheduler.lr_lambdas[0]
        rates = [self._scheduler.base_lrs[0] * factor(first + i) for i in range(TABLE)]
        self.table.copy_(torch.tensor(rates))
        self.good_steps -= first - self.table_first
        self.table_first, self.until_refill = first, TABLE - LAG

    def _placed(self, batch: TrainingBatch) -> TrainingBatch:
        """A batch whose tensors are where graphs read them: one place for all tensors of a name and shape."""

        def placed(name: str, value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [placed(f"{name} {i}", part) for i, part in enumerate(value)]
            if not isinstance(value, Tensor):
                return value
            kind = (name, value.shape, value.dtype)
            if kind not in self.places:
                self.places[kind] = torch.empty_like(value, device=self.precision.device)
            return self.places[kind]

        return cast(TrainingBatch, {key: placed(key, value) for key, value in batch.items()})

    def _capture(self, function: Callable[[], Tensor | None]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The kernels of a function as a graph, and the function's result, which each replay writes anew."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, which pin batches, may use the card meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            output = function()
        return graph, cast(Tensor, output)


def _leaves(batch: TrainingBatch) -> list[Tensor]:
    """The batch's tensors."""
    leaves = [value for value in batch.values() if isinstance(value, Tensor)]
    return leaves + list(batch.get("features", ()))
