"""Training on encodings that are computed once, against running the encoder in every step.

    python -m benchmarks.training
    python -m benchmarks.training --model_type vit_tiny --image_size 256 --repeats 1 --images 4    # a few seconds

Both loops are the product's own: data set, loader, `train_one_epoch`. "The straightforward loop" has no cache, and the
public package's encoder in float32 in place of ours; it is measured with memory as the C library handles it by itself,
and again (`ratio_memory_kept`) with memory as this project's scripts have it. The cached epoch reads a cache as
`--cache_embeddings` makes it, in float32 or, as with -use_amp, in bf16 autocast; only the values in it are random,
which changes no time. No loader process is started. The lines on 100 epochs are computed from the measured parts: one
encoding and 100 cached steps an image, against 100 straightforward steps. Peak memory is that of the process after a
cached epoch of N images and after one of 8 N, before any encoder has run. All of these train one class of each image;
the last line is of steps that train all of its 11, as is the default, against one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from benchmarks import common
from segment_anything.modeling import Sam
from utils.cache.keys import CacheKey, Request
from utils.cache.writer import prepare_caches
from utils.data.classes import BDD100K
from utils.data.datasets import BoxPromptDataset, NpyFolder, TrainingDataset, TrainingSampler, collate_training
from utils.data.frame import ImageSize, frame_size
from utils.data.manifest import Manifest, ManifestItem
from utils.model.checkpoint import ModelInfo
from utils.model.prediction import features_of
from utils.model.segmenter import BoxSegmenter, Features, Segmenter
from utils.runtime import cli
from utils.runtime.device import Precision
from utils.train.loop import Progress, train_one_epoch
from utils.train.optim import TrainState, build_optimizer, build_scheduler
from utils.train.step import EagerSteps

EPOCHS = 100
BLOCK = 16  # the labels are squares of this side
CLASSES = 11  # in each image
PRECISIONS = {
    "float32": Precision(torch.device("cpu")),
    "bf16": Precision(torch.device("cpu"), torch.bfloat16),
}


def get_args_parser() -> cli.Parser:
    parser = common.get_args_parser(__doc__)
    parser.add_flag("batch_size", type=cli.positive_int, default=1, help="images a step, in both loops")
    parser.add_flag("images", type=cli.positive_int, default=8, help="N, the images of a cached epoch")
    return parser


class RandomEncoder(nn.Module):
    """Takes no time, so that a cache of many images can be made."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        return torch.randn(len(images), *self.shape)


class WithEncoder(BoxSegmenter):
    """The model with another encoder in the place of its own."""

    def __init__(self, sam: Sam, encoder: nn.Module) -> None:
        super().__init__(sam)
        self.encoder = encoder

    def _encode(self, x: Tensor) -> Features:
        return (self.encoder(x),)


def write_split(folder: Path, count: int, image_size: ImageSize) -> NpyFolder:
    """A preprocessed split of black images, and of labels of random squares."""
    height, width = frame_size(image_size)
    rng = np.random.default_rng(0)
    items = []
    for kind in ("imgs", "gts"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        labels = rng.integers(CLASSES, size=(height // BLOCK, width // BLOCK), dtype=np.uint8)
        labels = np.kron(labels, np.ones((BLOCK, BLOCK), np.uint8))
        np.save(folder / "gts" / f"{i}.npy", labels)
        # Nothing is written to it, so it takes no disk.
        np.lib.format.open_memmap(folder / "imgs" / f"{i}.npy", "w+", np.float32, (height, width, 3))
        counts = np.bincount(labels.ravel(), minlength=len(BDD100K)).tolist()
        items.append(ManifestItem(str(i), height, width, counts, 0))
    Manifest(image_size, "float32", "stretch", labelled=True, complete=True, items=items).write(folder)
    return NpyFolder(folder)


class Loop:
    """Epochs of the product's loop over the first images of a data set."""

    def __init__(self, segmenter: Segmenter, dataset: TrainingDataset, precision: Precision, batch: int) -> None:
        self.segmenter, self.dataset, self.precision, self.batch_size = segmenter, dataset, precision, batch
        self.optimizer = build_optimizer(segmenter, lr=5e-5, weight_decay=0.01)

    def loader(self, count: int) -> DataLoader:
        sampler = TrainingSampler([1] * count, batch_size=self.batch_size, rank=0, world_size=1, seed=0)
        return DataLoader(Subset(self.dataset, range(count)), batch_sampler=sampler, collate_fn=collate_training)

    def epoch(self, count: int) -> None:
        scheduler = build_scheduler(self.optimizer, "constant", total_steps=1, warmup_steps=0)
        state = TrainState(self.optimizer, scheduler, self.precision.grad_scaler())
        steps = EagerSteps(self.segmenter, state, self.precision, clip_grad_norm=1.0)
        train_one_epoch(steps, self.loader(count), grad_acc_steps=1, progress=Progress(epoch=0))

    def split(self, count: int) -> dict[str, float]:
        """Mean seconds of each part of a step. The parts are the loop's, one after another, but for its sums."""
        parts = ("data", "encoder", "decoder", "loss", "backward", "optimizer")
        total = dict.fromkeys(parts, 0.0)
        self.segmenter.train()
        started = time.perf_counter()
        steps = 0
        for batch in self.loader(count):
            times = [started, time.perf_counter()]
            with self.precision.autocast():
                features = features_of(self.segmenter, batch, self.precision)
                times.append(time.perf_counter())
                outputs = self.segmenter(features, *(batch[name] for name in self.segmenter.PROMPTS))
            times.append(time.perf_counter())
            loss = torch.stack(list(self.segmenter.losses(outputs, batch).values())).sum(0).mean()
            times.append(time.perf_counter())
            loss.backward()
            times.append(time.perf_counter())
            torch.nn.utils.clip_grad_norm_(self.segmenter.mask_decoder.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter())
            for name, start, end in zip(parts, times, times[1:]):
                total[name] += end - start
            started, steps = times[-1], steps + 1
        return {name: seconds / steps for name, seconds in total.items()}


def cached_dataset(folder: Path, source: NpyFolder, sam: Sam) -> BoxPromptDataset:
    """A data set whose cache is made as a run makes it, in float16."""
    grid = sam.image_encoder.img_size // 16
    segmenter = WithEncoder(sam, RandomEncoder((sam.prompt_encoder.embed_dim, grid, grid)))
    info = ModelInfo("random", source.image_size, source.resize_mode, "0" * 64, "box")
    precision = PRECISIONS["float32"]
    dataset = BoxPromptDataset(source, classes_per_image=1, bbox_shift=20, seed=0)
    (cache,) = prepare_caches(
        str(folder / "cache"),
        [Request(source, num_views=1, passes=EPOCHS)],
        segmenter,
        precision,
        CacheKey.of(segmenter, info, precision, "float16"),
        batch_size=4,
        num_workers=0,
    )
    dataset.use(cache, takes_pixels=False)
    return dataset


def main(args: argparse.Namespace) -> None:
    sam, public = common.build_pair(args.model_type, args.image_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_split(folder / "npy", 8 * args.images, args.image_size)
        dataset = cached_dataset(folder, source, sam)
        loops = {kind: Loop(BoxSegmenter(sam), dataset, p, args.batch_size) for kind, p in PRECISIONS.items()}

        for loop in loops.values():
            loop.epoch(args.images)
        peaks = [common.peak_memory_mb()]
        loops["float32"].epoch(8 * args.images)
        peaks.append(common.peak_memory_mb())
        common.report(
            f"peak memory of cached training, {args.model_type} at {args.image_size}, batch {args.batch_size}",
            ratio=peaks[1] / peaks[0],
            images=[args.images, 8 * args.images],
            peaks_mb=peaks,
        )
        every = BoxPromptDataset(source, classes_per_image=None, bbox_shift=20, seed=0)
        every.use(dataset.cache, takes_pixels=False)
        all_classes = Loop(BoxSegmenter(sam), every, PRECISIONS["float32"], args.batch_size)
        all_classes.epoch(args.batch_size)
        peaks.append(common.peak_memory_mb())
        uncached = BoxPromptDataset(source, classes_per_image=1, bbox_shift=20, seed=0)
        reference = Loop(WithEncoder(sam, public), uncached, PRECISIONS["float32"], args.batch_size)
        compare(args, loops, reference)
        compare_classes(args, loops["float32"], all_classes, peaks[1:])


def compare(args: argparse.Namespace, loops: dict[str, Loop], reference: Loop) -> None:
    """Time epochs from the cache, a straightforward step, and our encoder; print the ratios."""
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size)

    def straightforward() -> None:
        reference.epoch(args.batch_size)

    def encode(precision: Precision) -> Features:
        with precision.autocast():
            return loops["float32"].segmenter.encode(images)

    functions = common.reference("straightforward", straightforward)
    for kind, precision in PRECISIONS.items():
        functions[kind] = lambda kind=kind: loops[kind].epoch(args.images)  # type: ignore[misc]
        functions[f"encoder {kind}"] = lambda precision=precision: encode(precision)  # type: ignore[misc]
    seconds = common.measure(functions, args.repeats)
    steps = -(-args.images // args.batch_size)
    where = f"{args.model_type} at {args.image_size}, batch {args.batch_size}"
    theirs, theirs_kept = seconds["straightforward"], seconds["straightforward, memory kept"]
    reference_split = reference.split(args.batch_size)
    for kind, loop in loops.items():
        step = seconds[kind] / steps
        common.report(
            f"a cached epoch in {kind}, {where}",
            ratio=theirs / step,
            ratio_memory_kept=theirs_kept / step,
            cached_images_per_s=args.batch_size / step,
            straightforward_images_per_s=args.batch_size / theirs,
            cached_step_s=step,
            straightforward_step_s=theirs,
            split_s={"cached": loop.split(args.images), "straightforward, memory kept": reference_split},
        )
        ours = seconds[f"encoder {kind}"] + EPOCHS * step
        common.report(
            f"{EPOCHS} epochs in {kind}, computed, {where}",
            ratio=EPOCHS * theirs / ours,
            ratio_memory_kept=EPOCHS * theirs_kept / ours,
            ours_s_an_image=ours / args.batch_size,
            straightforward_s_an_image=EPOCHS * theirs / args.batch_size,
            encoder_s=seconds[f"encoder {kind}"],
        )


def compare_classes(args: argparse.Namespace, one: Loop, every: Loop, peaks: list[float]) -> None:
    """Time a cached step of one class an image and of all."""
    seconds = common.measure(
        {"one": lambda: one.epoch(args.batch_size), "all": lambda: every.epoch(args.batch_size)}, args.repeats
    )
    common.report(
        f"a cached step with all {CLASSES} classes of an image, {args.model_type} at {args.image_size}, "
        f"batch {args.batch_size}, float32",
        ratio=seconds["all"] / seconds["one"],
        step_s=seconds["all"],
        one_class_step_s=seconds["one"],
        peaks_mb={"one class": peaks[0], "all classes": peaks[1]},
        split_s=every.split(args.batch_size),
    )


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
