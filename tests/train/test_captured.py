"""Steps as CUDA graphs against eager ones. Without a card, a graph is replaced by a call of what it would record."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import train_bdd100k
from segment_anything import build_sam_vit_tiny
from tests.helpers.oracles import relative_error
from tests.helpers.scripts import run_script, training_flags
from utils.data.datasets import TrainingBatch
from utils.model import checkpoint
from utils.model.segmenter import SEGMENTERS, Segmenter
from utils.runtime.device import Precision
from utils.runtime.errors import DivergedError, NotSavedError, UserError
from utils.train import captured
from utils.train.captured import CapturedSteps
from utils.train.loop import Progress, train_one_epoch
from utils.train.optim import TrainState, build_optimizer, build_scheduler
from utils.train.step import EagerSteps, Steps

SIZE = 64
HAS_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CARD else "cpu")
FP32 = Precision(DEVICE)


@pytest.fixture(autouse=True)
def no_card_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_CARD:
        return

    def capture(self: CapturedSteps, function: Callable[[], Tensor | None]) -> tuple[Any, Tensor]:
        output = torch.zeros(0, dtype=torch.bool)

        def replay() -> None:
            # A card cannot compile while it captures.
            with torch._dynamo.config.patch(error_on_recompile=True):
                if (result := function()) is not None:
                    output.resize_(result.shape).copy_(result)

        return SimpleNamespace(replay=replay), output

    monkeypatch.setattr(CapturedSteps, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def segmenter_of(mode: str) -> Segmenter:
    torch.manual_seed(0)
    return SEGMENTERS[mode](build_sam_vit_tiny(image_size=SIZE)).to(DEVICE)


def random_batch(segmenter: Segmenter, number: int, prompts: int, images: int = 2) -> TrainingBatch:
    """A batch of other values for each number; the last prompt of its first image is no valid one."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(prompts, (images, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    pixels = torch.randint(256, (images, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    features = [feature.cpu() for feature in segmenter.encode(FP32.images(pixels))]
    batch: TrainingBatch = {"labels": labels, "features": features, "name": [f"{number}.{i}" for i in range(images)]}
    if segmenter.takes_pixels:
        batch["image"] = pixels
    if not segmenter.PROMPTS:
        return {**batch, "valid": torch.ones(images, dtype=torch.bool)}
    corners = torch.rand(images, prompts, 2, generator=generator) * SIZE / 2
    valid = torch.ones(images, prompts, dtype=torch.bool)
    valid[0, -1] = False
    class_ids = torch.arange(prompts).repeat(images, 1)
    return {**batch, "boxes": torch.cat([corners, corners + SIZE / 2], dim=2), "class_ids": class_ids, "valid": valid}


def batches_of(segmenter: Segmenter) -> list[TrainingBatch]:
    """Batches of four shapes, the last with fewer images."""
    batches = [random_batch(segmenter, i, prompts=(3, 5, 3, 2)[i % 4]) for i in range(11)]
    return [*batches, random_batch(segmenter, 11, prompts=3, images=1)]


def state_of(segmenter: Segmenter, precision: Precision = FP32, **scaling: float) -> TrainState:
    optimizer = build_optimizer(segmenter, lr=1e-3, weight_decay=0.01)
    scheduler = build_scheduler(optimizer, "cosine", total_steps=60, warmup_steps=5)
    enabled = precision.amp_dtype == torch.float16
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=enabled, **scaling)  # type: ignore[arg-type]
    return TrainState(optimizer, scheduler, scaler)


def steps_of(kind: str, segmenter: Segmenter, precision: Precision = FP32, **options: Any) -> Steps:
    if kind == "eager":
        return EagerSteps(segmenter, state_of(segmenter, precision), precision, 1.0)
    return CapturedSteps(segmenter, state_of(segmenter, precision), precision, 1.0, **options)


def weights(segmenter: Segmenter) -> Tensor:
    return torch.cat([p.detach().flatten().double().cpu() for p in segmenter.mask_decoder.parameters()])


class Stopped(Exception):
    pass


class Watch:
    """Records the sums after each step, and the weights where a save is due. It may ask to stop in a step."""

    def __init__(self, segmenter: Segmenter, due: int = 0, stop_in: int = 0) -> None:
        self.segmenter, self.due, self.stop_in = segmenter, due, stop_in
        self.sums: list[Tensor] = []
        self.saved: list[tuple[int, Tensor]] = []
        self.asked = 0

    def stop_requested(self) -> bool:
        self.asked += 1
        return self.asked == self.stop_in

    def save_due(self, steps: int) -> bool:
        return steps == self.due

    def step_done(self, progress: Progress, stop: bool) -> None:
        assert progress.sums is not None
        self.sums.append(progress.sums.clone())
        if self.save_due(progress.steps):
            self.saved.append((progress.steps, weights(self.segmenter)))
        if stop:
            raise Stopped


@pytest.mark.parametrize("mode", list(SEGMENTERS))
@pytest.mark.parametrize("kind", ["captured", "compiled"])
def test_they_train_as_eager_ones_do(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "compiled" and not HAS_CARD:
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(captured, "TABLE", captured.LAG + 3)  # of learning rates, filled again and again
    start = segmenter_of(mode)
    batches = batches_of(start)
    runs = []
    for way in ("eager", kind):
        segmenter = copy.deepcopy(start)
        steps = steps_of(way, segmenter, compiled_batch=2 if way == "compiled" else 0)
        watch = Watch(segmenter, due=5)
        figures = [
            train_one_epoch(steps, batches, grad_acc_steps=grad_acc, progress=Progress(epoch), watch=watch)
            for epoch, grad_acc in enumerate((1, 2, 5))
        ]
        runs.append((weights(segmenter), torch.stack(watch.sums), watch.saved, figures))
    (eager, sums, saved, figures), (ours, our_sums, our_saved, our_figures) = runs
    assert relative_error(ours, eager) < 1e-4
    assert torch.allclose(our_sums, sums, rtol=1e-4)
    assert [step for step, _ in saved] == [step for step, _ in our_saved] == [5, 5]
    for (_, expected), (_, actual) in zip(saved, our_saved):
        assert relative_error(actual, expected) < 1e-4
    for ours_of_epoch, of_epoch in zip(our_figures, figures):
        assert ours_of_epoch == pytest.approx(of_epoch, rel=1e-4)


@pytest.mark.skipif(not HAS_CARD, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_card_a_graph_has_the_same_bits(dtype: torch.dtype) -> None:
    start, precision = segmenter_of("box"), Precision(DEVICE, dtype)
    batches, runs = batches_of(start), []
    for kind in ("eager", "captured"):
        segmenter = copy.deepcopy(start)
        steps = steps_of(kind, segmenter, precision)
        for epoch in range(2):
            train_one_epoch(steps, batches, grad_acc_steps=1, progress=Progress(epoch))
        runs.append(weights(segmenter))
    assert torch.equal(*runs)


def test_a_loss_that_is_not_finite_stops_all_later_steps() -> None:
    segmenter = segmenter_of("box")
    batches = [random_batch(segmenter, i, prompts=3) for i in range(20)]
    batches[4]["features"][0][1] = math.nan
    expected = copy.deepcopy(segmenter)
    train_one_epoch(steps_of("captured", expected), batches[:4], grad_acc_steps=1, progress=Progress(0))
    progress, steps = Progress(0), steps_of("captured", segmenter)
    with pytest.raises(DivergedError, match=r"epoch 1, step 5: the loss is not finite for 4\.1; the weights"):
        train_one_epoch(steps, batches, grad_acc_steps=1, progress=progress)
    assert progress.steps == 4
    assert torch.equal(weights(segmenter), weights(expected))
    assert all(state["step"] == 4 for state in steps.state.optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("kind", ["eager", "captured"])
def test_a_loss_that_is_not_finite_leaves_the_loss_scale_as_it_was(kind: str) -> None:
    segmenter, precision = segmenter_of("box"), Precision(DEVICE, torch.float16)
    batches = [random_batch(segmenter, i, prompts=3) for i in range(20)]
    batches[7]["features"][0][1] = math.nan
    state = state_of(segmenter, precision, init_scale=4.0, growth_interval=5)
    make = EagerSteps if kind == "eager" else CapturedSteps
    with pytest.raises(DivergedError, match=r"epoch 1, step 8: the loss is not finite for 7\.1;"):
        train_one_epoch(make(segmenter, state, precision, 1.0), batches, grad_acc_steps=1, progress=Progress(0))
    scaler = state.scaler.state_dict()
    assert (scaler["scale"], scaler["_growth_tracker"]) == (8, 2)  # it grew after five steps, two steps ago


def test_a_gradient_that_is_not_finite_names_the_images_with_a_prompt() -> None:
    segmenter = segmenter_of("box")
    batches = [random_batch(segmenter, i, prompts=3) for i in range(12)]
    batches[0]["valid"][0] = False
    before = weights(segmenter)
    next(segmenter.mask_decoder.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=r"step 1: the loss is finite, but not its gradient for 0\.1; the weights"):
        train_one_epoch(steps_of("captured", segmenter), batches, grad_acc_steps=1, progress=Progress(0))
    assert torch.equal(weights(segmenter), before)


def test_a_step_that_overflows_fp16_is_skipped_and_counted() -> None:
    segmenter, precision = segmenter_of("box"), Precision(DEVICE, torch.float16)
    batches = [random_batch(segmenter, 0, prompts=3)]
    # Of the third scale, 1, no gradient overflows.
    state = state_of(segmenter, precision, init_scale=2.0**40, backoff_factor=2.0**-20)
    steps = CapturedSteps(segmenter, state, precision, 1.0)
    before, all_figures = weights(segmenter), []
    for epoch in range(3):
        all_figures.append(train_one_epoch(steps, batches, grad_acc_steps=1, progress=Progress(epoch)))
        assert torch.equal(weights(segmenter), before) == (epoch < 2)
    assert [figures["skipped_steps"] for figures in all_figures] == [1, 1, 0]
    assert all_figures[0]["lr"] == all_figures[1]["lr"] == pytest.approx(1e-3 / 5)  # the schedule waits
    assert all_figures[2]["lr"] == pytest.approx(2e-3 / 5)


@pytest.mark.parametrize("stop_in", [1, 3, captured.LAG + 5])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_run_that_is_stopped_and_resumed_has_the_same_bits(stop_in: int, dtype: torch.dtype | None) -> None:
    """Within an epoch: the outcomes that the host had not read are part of what is saved."""
    start, precision = segmenter_of("box"), Precision(DEVICE, dtype)
    batches = [random_batch(start, i, prompts=3) for i in range(20)]
    # The first scales overflow, so that the learning rate of a step is not that of its number.
    scaling = {"init_scale": 2.0**44, "backoff_factor": 2.0**-20, "growth_interval": 3} if dtype else {}

    def begin(segmenter: Segmenter, restored: dict[str, Any] | None = None) -> CapturedSteps:
        state = state_of(segmenter, precision, **scaling)
        if restored:
            state.load_state_dict(restored)
        return CapturedSteps(segmenter, state, precision, 1.0)

    whole, stopped = copy.deepcopy(start), copy.deepcopy(start)
    progress, watch = Progress(0), Watch(stopped, stop_in=stop_in)
    figures = train_one_epoch(begin(whole), batches, grad_acc_steps=1, progress=Progress(0))
    steps = begin(stopped)
    with pytest.raises(Stopped):
        train_one_epoch(steps, batches, grad_acc_steps=1, progress=progress, watch=watch)
    assert progress.steps == len(watch.sums) == stop_in
    saved = copy.deepcopy((stopped.state_dict(), steps.state.state_dict()))
    resumed = copy.deepcopy(start)
    resumed.load_state_dict(saved[0])
    progress = Progress.restored(0, progress.saved(), len(steps.parts) + 1)
    left = train_one_epoch(begin(resumed, saved[1]), batches[stop_in:], grad_acc_steps=1, progress=progress)
    assert left == figures and figures["skipped_steps"] == (2 if dtype else 0)
    assert torch.equal(weights(resumed), weights(whole))


def test_graphs_of_different_shapes_share_their_inputs() -> None:
    segmenter = segmenter_of("box")
    steps = CapturedSteps(segmenter, state_of(segmenter), FP32, 1.0)
    batches = [random_batch(segmenter, i, prompts=prompts) for i, prompts in enumerate((3, 5, 3, 5))]
    train_one_epoch(steps, batches, grad_acc_steps=1, progress=Progress(0))
    assert len(steps.adding) == 2
    names = [str(kind[0]) for kind in steps.places]
    assert sorted(names) == ["boxes", "boxes", "class_ids", "class_ids", "features 0", "labels", "valid", "valid"]


@pytest.mark.parametrize("kind", ["eager", "captured"])
def test_a_step_whose_state_cannot_be_saved_counts_once(kind: str) -> None:
    segmenter = segmenter_of("box")
    batches = [random_batch(segmenter, i, prompts=3) for i in range(4)]
    progress, watch = Progress(0), Watch(segmenter)

    def step_done(progress: Progress, stop: bool) -> None:
        raise NotSavedError("the disk is full")

    watch.step_done = step_done  # type: ignore[method-assign]
    steps = steps_of(kind, segmenter)
    with pytest.raises(NotSavedError, match="the disk is full"):
        train_one_epoch(steps, batches[:1], grad_acc_steps=1, progress=progress, watch=watch)
    assert progress.steps == steps.state.scheduler.last_epoch == 1


def test_a_failing_loader_leaves_no_step_uncounted() -> None:
    segmenter = segmenter_of("box")
    batches = [random_batch(segmenter, i, prompts=3) for i in range(3)]

    class Failing:
        def __len__(self) -> int:
            return 9

        def __iter__(self) -> Iterator[TrainingBatch]:
            yield from batches
            raise UserError("a file is gone")

    progress, watch = Progress(0), Watch(segmenter)
    steps = steps_of("captured", segmenter)
    with pytest.raises(UserError, match="a file is gone"):
        train_one_epoch(steps, Failing(), grad_acc_steps=1, progress=progress, watch=watch)
    assert progress.steps == len(watch.sums) == 3
    assert all(state["step"] == 3 for state in steps.state.optimizer.state_dict()["state"].values())


def test_where_the_compiler_fails_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: Any) -> Any:
        def call(batch: TrainingBatch) -> Any:
            raise RuntimeError("no C compiler\nfound")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    segmenter = segmenter_of("box")
    steps = steps_of("captured", segmenter, compiled_batch=2)
    with pytest.raises(UserError, match=r"torch\.compile fails here \(no C compiler found\); set it to captured"):
        train_one_epoch(steps, [random_batch(segmenter, 0, prompts=3)], grad_acc_steps=1, progress=Progress(0))


@pytest.mark.parametrize(
    ("flags", "compiled_batch"),
    [
        ([], 0),
        (["--step_mode", "captured"], 0),
        (["--step_mode", "compiled", "-batch_size", "2"], 2),
        (["--step_mode", "eager"], None),
    ],
)
def test_which_steps_a_run_takes(flags: list[str], compiled_batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    args = train_bdd100k.get_args_parser().parse_args(["-i", "train", *flags])
    train_bdd100k.apply_defaults(args, {})
    segmenter = segmenter_of("box")
    monkeypatch.setattr(train_bdd100k, "can_capture", lambda device: True)
    steps = train_bdd100k.build_steps(args, segmenter, segmenter, state_of(segmenter), FP32)
    assert getattr(steps, "compiled_batch", None) == compiled_batch


@pytest.mark.slow
def test_a_whole_run_is_that_of_eager_steps_resumed_or_not(
    npy: Path, sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_bdd100k, "can_capture", lambda device: True)
    flags = ["--val_npy_path", npy / "val", "-batch_size", 2, "--grad_acc_steps", 1, "-lr", "1e-3"]
    flags += ["--device", DEVICE.type]
    runs = {}
    for mode, starts in {"eager": [3], "captured": [3], "resumed": [1, 3]}.items():
        more = ["--step_mode", "captured" if mode == "resumed" else mode, "--save_every_steps", 2, "--resume", "auto"]
        for epochs in starts:
            common = training_flags(npy / "train", sam_file, tmp_path / mode)
            run_script(train_bdd100k, *common, *flags, *more, "-num_epochs", epochs)
        (folder,) = (tmp_path / mode).iterdir()
        saved = checkpoint.load_checkpoint(folder / checkpoint.LATEST)
        losses = [record["train_loss"] for record in saved["run_state"]["history"]]
        runs[mode] = losses, torch.cat([weight.flatten() for weight in saved["model"].values()])
    assert len(runs["captured"][0]) == 3
    assert runs["captured"][0] == pytest.approx(runs["eager"][0], rel=1e-4)
    assert relative_error(runs["captured"][1], runs["eager"][1]) < 1e-4
    assert HAS_CARD or runs["resumed"][0] == runs["captured"][0]  # a card's kernels may add up in another order
    assert relative_error(runs["resumed"][1], runs["captured"][1]) <= (1e-4 if HAS_CARD else 0)
