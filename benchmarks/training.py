"""Training on encodings that are computed once, against running the encoder in every step.

    python -m benchmarks.training
    python -m benchmarks.training --model_type vit_tiny --image_size 256 --repeats 1 --images 4    # a few seconds

"The straightforward loop" is, in each step, the public package's encoder in float32 and then this project's decoder,
loss and optimizer. A cached step reads the encodings instead, one float16 file for each image, memory-mapped. Their
values are random, which changes no time; images are not read in either. The line on 100 epochs is computed from the
measured parts: one encoding and 100 cached steps an image, against 100 straightforward steps. Peak memory is that of
the process after a cached epoch of N images and after one of 8 N, before any encoder has run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from utils import cli
from utils.boxes import class_boxes, jitter_boxes
from utils.model import BoxSegmenter, Features
from utils.optim import build_optimizer

EPOCHS = 100
BLOCK = 16  # the labels are squares of this side


def get_args_parser() -> cli.Parser:
    parser = common.get_args_parser(__doc__)
    parser.add_flag("batch_size", type=cli.positive_int, default=1, help="images a step, in both loops")
    parser.add_flag("images", type=cli.positive_int, default=8, help="N, the images of a cached epoch")
    return parser


class Encodings:
    """Images' encodings and labels in a folder, as a cache has them, read one sample at a time."""

    def __init__(self, folder: Path, count: int, shape: tuple[int, ...], image_size: int) -> None:
        self.folder, self.image_size = folder, image_size
        rng = np.random.default_rng(0)
        for i in range(count):
            labels = rng.integers(11, size=(image_size // BLOCK, image_size // BLOCK), dtype=np.uint8)
            np.save(folder / f"labels_{i}.npy", np.kron(labels, np.ones((BLOCK, BLOCK), np.uint8)))
            np.save(folder / f"features_{i}.npy", rng.standard_normal(shape, dtype=np.float32).astype(np.float16))

    def batch(self, indexes: range) -> tuple[Features, dict[str, Tensor]]:
        """Features, and one random class of each image with its jittered box."""
        features = [np.load(self.folder / f"features_{i}.npy", mmap_mode="c") for i in indexes]
        return (torch.stack([torch.from_numpy(array) for array in features]).float(),), self.prompts(indexes)

    def prompts(self, indexes: range) -> dict[str, Tensor]:
        rng = np.random.default_rng(indexes.start)
        labels = [np.load(self.folder / f"labels_{i}.npy") for i in indexes]
        class_ids, boxes = [], []
        for label in labels:
            present, tight = class_boxes(label)
            chosen = rng.integers(len(present), size=1)
            class_ids.append(torch.from_numpy(present[chosen]))
            boxes.append(torch.from_numpy(jitter_boxes(tight[chosen], self.image_size, 20, rng)).float())
        return {
            "labels": torch.from_numpy(np.stack(labels)),
            "class_ids": torch.stack(class_ids),
            "boxes": torch.stack(boxes),
        }


class Loop:
    """Steps of this project's decoder, loss and optimizer; `seconds` adds up where they spend their time."""

    def __init__(self, segmenter: BoxSegmenter) -> None:
        self.segmenter = segmenter.train()
        self.optimizer = build_optimizer(segmenter, lr=5e-5, weight_decay=0.01)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def step(self, batch: Callable[[], tuple[Features, dict[str, Tensor]]], part: str) -> None:
        """Train on what `batch` gives, whose time is counted as `part`."""
        times = [time.perf_counter()]
        features, inputs = batch()
        times.append(time.perf_counter())
        outputs = self.segmenter(features, inputs["boxes"])
        times.append(time.perf_counter())
        loss = torch.stack(list(self.segmenter.losses(outputs, inputs).values())).sum(0).mean()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(self.segmenter.mask_decoder.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        for name, start, end in zip((part, "decoder", "loss", "backward", "optimizer"), times, times[1:]):
            self.seconds[name] += end - start

    def split(self, steps: int) -> dict[str, float]:
        """Seconds of each part of a step, a mean over the `steps` since the last call."""
        mean = {name: seconds / steps for name, seconds in self.seconds.items()}
        self.seconds.clear()
        return mean


def main(args: argparse.Namespace) -> None:
    sam, public = common.build_pair(args.model_type, args.image_size)
    loop = Loop(BoxSegmenter(sam))
    grid = args.image_size // 16
    shape = (sam.prompt_encoder.embed_dim, grid, grid)
    with tempfile.TemporaryDirectory() as folder:
        data = Encodings(Path(folder), 8 * args.images, shape, args.image_size)

        def cached_epoch(count: int) -> None:
            for start in range(0, count, args.batch_size):
                loop.step(partial(data.batch, range(start, min(start + args.batch_size, count))), "data")

        cached_epoch(args.images)
        peaks = [common.peak_memory_mb()]
        cached_epoch(8 * args.images)
        peaks.append(common.peak_memory_mb())
        common.report(
            f"peak memory of cached training, {args.model_type} at {args.image_size}, batch {args.batch_size}",
            ratio=peaks[1] / peaks[0],
            images=[args.images, 8 * args.images],
            peaks_mb=peaks,
        )
        compare(args, loop, data, public, cached_epoch)


def compare(
    args: argparse.Namespace,
    loop: Loop,
    data: Encodings,
    public: torch.nn.Module,
    cached_epoch: Callable[[int], None],
) -> None:
    """Time an epoch from the cache, a straightforward step, and our encoder; print both ratios."""
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    encoder = loop.segmenter.sam.image_encoder

    def encode(module: torch.nn.Module, bf16: bool = False) -> Features:
        with torch.no_grad(), common.bf16(bf16):
            return (module(images),)

    splits: dict[str, dict[str, float]] = {}
    steps = -(-args.images // args.batch_size)
    loop.seconds.clear()

    def cached() -> None:
        cached_epoch(args.images)
        splits["cached"] = loop.split(steps)

    def straightforward() -> None:
        loop.step(lambda: (encode(public), data.prompts(range(args.batch_size))), "encoder and data")
        splits["straightforward"] = loop.split(1)

    seconds = common.measure(
        {
            "cached": cached,
            "straightforward": straightforward,
            "float32": lambda: encode(encoder),
            "bf16": lambda: encode(encoder, bf16=True),
        },
        args.repeats,
    )
    step, reference = seconds["cached"] / steps, seconds["straightforward"]
    where = f"{args.model_type} at {args.image_size}, batch {args.batch_size}"
    common.report(
        f"a cached epoch, {where}",
        ratio=reference / step,
        cached_images_per_s=args.batch_size / step,
        straightforward_images_per_s=args.batch_size / reference,
        cached_step_s=step,
        straightforward_step_s=reference,
        split_s=splits,
    )
    for name in ("float32", "bf16"):
        ours = seconds[name] + EPOCHS * step
        common.report(
            f"{EPOCHS} epochs, computed, encoded once in {name}, {where}",
            ratio=EPOCHS * reference / ours,
            ours_s_an_image=ours / args.batch_size,
            straightforward_s_an_image=EPOCHS * reference / args.batch_size,
            encoder_s=seconds[name],
        )


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
