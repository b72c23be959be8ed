"""What a frame of the pictures' shape saves against a square one: encoder, cache and training steps.

    python -m benchmarks.frames
    python -m benchmarks.frames --model_type vit_tiny --image_size 32x64 --against 64 --repeats 1 --images 2   # seconds

Everything is measured in turn in one run, `--image_size` beside `--against`, and every ratio is of the first to the
second. Weights are random. The caches are made as `--cache_embeddings` makes them, in float16, in semantic mode with
the reduction of encoder blocks; only the values in them are random, which changes neither size nor time. `bytes` are of
an image's entry on disk. A step is the product's own loop on a batch from the cache, without augmentation: in semantic
mode, and in box mode with all 11 classes of an image.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.training import CLASSES, PRECISIONS, Loop, write_split
from segment_anything import sam_model_registry
from segment_anything.build_sam import CONFIGS
from segment_anything.modeling import Sam
from utils.cache.keys import CacheKey, Request
from utils.cache.writer import prepare_caches
from utils.data.datasets import BoxPromptDataset, NpyFolder, SemanticDataset, TrainingDataset
from utils.data.frame import ImageSize, frame_size, image_size
from utils.model.checkpoint import ModelInfo
from utils.model.segmenter import SEGMENTERS, Features, Segmenter
from utils.runtime import cli
from utils.runtime.errors import UserError

MODES = {"semantic": "semantic mode", "box": f"box mode, {CLASSES} classes"}


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_flag("model_type", choices=list(CONFIGS), default="vit_b", help="which SAM, with random weights")
    parser.add_flag("image_size", type=image_size, default="576x1024", help="the frame that is measured")
    parser.add_flag("against", type=image_size, default=1024, help="the frame it is measured against")
    parser.add_flag("images", type=cli.positive_int, default=4, help="images of a cached epoch, and of a cache")
    parser.add_flag("batch_size", type=cli.positive_int, default=1, help="images a step")
    parser.add_flag("repeats", type=cli.positive_int, default=3, help="times that each is measured; medians count")
    return parser


def without_encoder(segmenter: Segmenter, image: Tensor) -> Segmenter:
    """Let it encode in no time: random features of the shapes that those of the image, 1 x 3 x H x W, have."""
    like = segmenter.encode(image)

    def encode(x: Tensor) -> Features:
        return tuple(torch.randn(len(x), *feature.shape[1:]) for feature in like)

    segmenter._encode = encode  # type: ignore[method-assign]
    return segmenter


def make_dataset(source: NpyFolder, mode: str) -> TrainingDataset:
    if mode == "box":
        return BoxPromptDataset(source, classes_per_image=None, bbox_shift=20, seed=0)
    return SemanticDataset(source, seed=0, augment="none", num_views=1)


class Frame:
    """A SAM at one frame, with cached data and a training loop of each mode."""

    def __init__(self, folder: Path, image_size: ImageSize, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.image = torch.rand(1, 3, *frame_size(image_size))
        self.sam = sam_model_registry[args.model_type](image_size=frame_size(image_size))
        self.bytes: dict[str, float] = {}
        self.steps: dict[tuple[str, str], Callable[[], None]] = {}
        source = write_split(folder / "npy", args.images, image_size)
        for mode in MODES:
            # Semantic mode replaces the decoder.
            sam = Sam(self.sam.image_encoder, self.sam.prompt_encoder, copy.deepcopy(self.sam.mask_decoder))
            segmenter = without_encoder(SEGMENTERS[mode](sam), self.image)
            dataset = make_dataset(source, mode)
            info = ModelInfo("random", image_size, source.resize_mode, "0" * 64, mode)
            precision = PRECISIONS["float32"]
            (cache,) = prepare_caches(
                str(folder / mode),
                [Request(source, num_views=1, passes=100)],
                segmenter,
                precision,
                CacheKey.of(segmenter, info, precision, "float16"),
                batch_size=1,
                num_workers=0,
            )
            assert cache is not None, "a folder was given"
            dataset.use(cache, takes_pixels=segmenter.takes_pixels)
            segmenter.feature_pca = cache.feature_pca
            entries = [path.stat().st_size for path in (folder / mode / source.folder.name).glob("*.safetensors")]
            self.bytes[mode] = sum(entries) / len(entries)
            for kind, precision in PRECISIONS.items():
                loop = Loop(segmenter, dataset, precision, args.batch_size)
                self.steps[mode, kind] = partial(loop.epoch, args.images)

    def encode(self, kind: str) -> None:
        with torch.no_grad(), PRECISIONS[kind].autocast():
            self.sam.image_encoder(self.image)


def main(args: argparse.Namespace) -> None:
    if args.image_size == args.against:
        raise UserError(f"--image_size and --against are both {args.against}; give two frames")
    with tempfile.TemporaryDirectory() as name:
        frames = [Frame(Path(name) / str(size), size, args) for size in (args.image_size, args.against)]
        functions: dict[str, Callable[[], Any]] = {}
        for kind in PRECISIONS:  # the two frames of each figure one right after the other
            functions |= {f"encoder {kind} {i}": partial(frame.encode, kind) for i, frame in enumerate(frames)}
            for mode in MODES:
                functions |= {f"{mode} {kind} {i}": frame.steps[mode, kind] for i, frame in enumerate(frames)}
        for function in functions.values():  # the first call takes memory anew
            function()
        seconds = common.measure(functions, args.repeats)

    def report(figure: str, of_frame: float, of_other: float, **figures: Any) -> None:
        where = f"{args.model_type} at {args.image_size} against {args.against}"
        common.report(f"{figure}, {where}", ratio=of_frame / of_other, **figures)

    for kind in PRECISIONS:
        ours, theirs = (seconds[f"encoder {kind} {i}"] for i in range(2))
        report(f"encoder in {kind}", ours, theirs, frame_s=ours, against_s=theirs)
    for mode, words in MODES.items():
        size, other = (frame.bytes[mode] for frame in frames)
        report(f"cached bytes of an image, {words}", size, other, frame_bytes=size, against_bytes=other)
    steps = -(-args.images // args.batch_size)
    for mode, words in MODES.items():
        for kind in PRECISIONS:
            ours, theirs = (seconds[f"{mode} {kind} {i}"] / steps for i in range(2))
            figure = f"a cached step in {kind}, {words}, batch {args.batch_size}"
            report(figure, ours, theirs, frame_s=ours, against_s=theirs)


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
