"""Training vit_b on a CUDA card within the memory of a small one, and the encoder against the public package's.

    python -m benchmarks.gpu                              # vit_b at 1024, batch 4, fp16, within 11 GB
    python -m benchmarks.gpu --prompt_mode semantic
    python -m benchmarks.gpu --prompt_mode semantic --image_size 576x1024    # training alone
    python -m benchmarks.gpu --batch_size 8 --amp_dtype bf16 --memory_gb 24

Prints a line for training with the encoder in each step, one for training on stored encodings, and one for the
encoder at a square size, which is all that the public package takes. Each has the peak memory of the card; the cap is
on what PyTorch reserves, to which the card's driver adds some hundred MB. Training is the product's loop. Loading data
is left out: images, encodings and labels are on the card.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import common
from segment_anything import sam_model_registry
from utils.data.classes import NUM_CLASSES
from utils.data.frame import ImageSize, frame_size, image_size
from utils.model.feature_pca import FeaturePCA
from utils.model.segmenter import SEGMENTERS, Features, Segmenter
from utils.runtime import cli
from utils.runtime.device import Precision, resolve_precision, telling_out_of_memory
from utils.runtime.errors import UserError
from utils.train.loop import Progress, train_one_epoch
from utils.train.optim import TrainState, build_optimizer, build_scheduler

WARM_UP = 3
STEPS = 4  # of training that are timed together


def get_args_parser() -> cli.Parser:
    parser = common.get_args_parser(__doc__, image_size)
    parser.set_defaults(repeats=10)
    parser.add_flag("batch_size", type=cli.positive_int, default=4, help="images a step")
    parser.add_flag("amp_dtype", choices=("fp16", "bf16"), default="fp16", help="what autocast computes in")
    parser.add_flag("prompt_mode", choices=list(SEGMENTERS), default="box", help="as of train_bdd100k.py")
    parser.add_flag("classes", type=cli.number(int, 1, maximum=NUM_CLASSES), default=11, help="of an image (box mode)")
    parser.add_flag("memory_gb", type=cli.positive_float, default=11, help="of the card, to stay within")
    return parser


def peak_gb(function: Callable[[], Any]) -> dict[str, float]:
    """Warm up, and measure the most memory that the tensors of `function` take, and that PyTorch holds for them."""
    for _ in range(WARM_UP):
        function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    return {"allocated": torch.cuda.max_memory_allocated() / 1e9, "reserved": torch.cuda.max_memory_reserved() / 1e9}


def seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median of each, measured in turn until the card has done its work."""

    def done(function: Callable[[], Any]) -> None:
        function()
        torch.cuda.synchronize()

    return common.measure({name: partial(done, function) for name, function in functions.items()}, repeats)


def random_batch(batch_size: int, image_size: ImageSize, prompt_mode: str, classes: int) -> dict[str, Any]:
    """Images of random labels, in box mode with so many classes in a box each, on the card."""
    height, width = frame_size(image_size)
    size = (batch_size, height, width)
    corners = torch.tensor([0, 0, width - 1, height - 1], dtype=torch.float32)
    batch = {
        "image": torch.randint(256, (*size, 3), dtype=torch.uint8),
        "labels": torch.randint(classes, size, dtype=torch.uint8),
        "class_ids": torch.arange(classes).repeat(batch_size, 1),
        "boxes": corners.repeat(batch_size, classes, 1),
        "valid": torch.ones((batch_size, classes) if prompt_mode == "box" else batch_size, dtype=torch.bool),
    }
    return {**{key: value.cuda() for key, value in batch.items()}, "name": [str(i) for i in range(batch_size)]}


def stored(segmenter: Segmenter, features: Features) -> list[Tensor]:
    """What a cache has of features. The projection is one of zeros, which takes as long as any."""
    if segmenter.feature_blocks:
        segmenter.feature_pca = FeaturePCA.blank(features).to(features[0].device)
        features = segmenter.feature_pca.reduce(features)
    embeddings, *rest = features
    return [embeddings.half(), *rest]


def training(args: argparse.Namespace, precision: Precision) -> None:
    sam = sam_model_registry[args.model_type](image_size=frame_size(args.image_size))
    segmenter = SEGMENTERS[args.prompt_mode](sam).to(precision.device)
    optimizer = build_optimizer(segmenter, lr=5e-5, weight_decay=0.01)
    scheduler = build_scheduler(optimizer, "constant", total_steps=1, warmup_steps=0)
    scaler = precision.grad_scaler()

    def epoch(batch: dict[str, Any]) -> None:
        """`STEPS` steps of the product's loop."""
        train_one_epoch(
            segmenter,
            DataLoader([batch] * STEPS, batch_size=None),  # type: ignore[arg-type]  # a list is a data set
            TrainState(optimizer, scheduler, scaler),
            precision=precision,
            grad_acc_steps=1,
            clip_grad_norm=1.0,
            progress=Progress(epoch=0),
        )

    batch = random_batch(args.batch_size, args.image_size, args.prompt_mode, args.classes)
    peaks = {"uncached": peak_gb(partial(epoch, batch))}
    with precision.autocast():
        features = stored(segmenter, segmenter.encode(precision.images(batch["image"])))
    images = batch.pop("image")
    cached = {**batch, "features": features} | ({"image": images} if segmenter.takes_pixels else {})
    # Away, as in a run whose images are all in the cache.
    segmenter.sam.image_encoder.cpu()
    images = images.cpu()
    peaks["cached"] = peak_gb(partial(epoch, cached))
    segmenter.sam.image_encoder.to(precision.device)
    batch["image"] = images.to(precision.device)
    epochs: dict[str, Callable[[], Any]] = {"uncached": partial(epoch, batch), "cached": partial(epoch, cached)}
    times = seconds(epochs, args.repeats)
    where = f"{args.model_type} at {args.image_size}, batch {args.batch_size}, {args.amp_dtype}"
    for name in epochs:
        common.report(
            f"training {name}, {args.prompt_mode} mode, {where}",
            ratio=times["uncached"] / times[name],
            step_s=times[name] / STEPS,
            uncached_step_s=times["uncached"] / STEPS,
            images_per_s=args.batch_size * STEPS / times[name],
            peak_gpu_gb=peaks[name],
            cap_gb=args.memory_gb,
            gpu=torch.cuda.get_device_name(),
        )


@torch.no_grad()
def encoding(args: argparse.Namespace, precision: Precision) -> None:
    ours, public = common.build_pair(args.model_type, args.image_size)
    encoders = {"ours": ours.image_encoder, "public": public}
    images = torch.randn(1, 3, args.image_size, args.image_size, device=precision.device)

    def encode(name: str) -> Tensor:
        with precision.autocast():
            return encoders[name](images)

    peaks = {}
    for name, encoder in encoders.items():
        encoder.to(precision.device)
        peaks[name] = peak_gb(partial(encode, name))
        encoder.cpu()
    for encoder in encoders.values():
        encoder.to(precision.device)
    times = seconds({name: partial(encode, name) for name in encoders}, args.repeats)
    common.report(
        f"encoder, {args.model_type} at {args.image_size}, batch 1, {args.amp_dtype}",
        ratio=times["public"] / times["ours"],
        ours_s=times["ours"],
        public_s=times["public"],
        peak_gpu_gb=peaks,
        gpu=torch.cuda.get_device_name(),
    )


def main(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA card here, and this benchmark measures one; the others run on a CPU")
    precision = resolve_precision("cuda:0", local_rank=0, local_world_size=1, use_amp=True, amp_dtype=args.amp_dtype)
    total = torch.cuda.get_device_properties(0).total_memory
    args.memory_gb = min(args.memory_gb, total / 1e9)
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_gb * 1e9 / total))
    with telling_out_of_memory("lower --batch_size or raise --memory_gb"):
        training(args, precision)
        torch.cuda.empty_cache()
        if isinstance(args.image_size, int):
            encoding(args, precision)


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
