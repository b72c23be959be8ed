"""Training and encoding vit_b on a CUDA card: kernels, time and memory.

    python -m benchmarks.gpu                              # vit_b at 1024, batch 4, fp16, within 11 GB
    python -m benchmarks.gpu --prompt_mode semantic
    python -m benchmarks.gpu --prompt_mode semantic --image_size 576x1024    # training alone
    python -m benchmarks.gpu --batch_size 16 --amp_dtype bf16 --memory_gb 70 --compile
    python -m benchmarks.gpu --amp_dtype bf16 --memory_gb 70 --compile --epoch_images 7000

Prints a line for a step with the encoder in it, one for each way to take a step on stored encodings (`--step_mode` of
train_bdd100k.py), and one for encoding, at a square size, which is all that the public package takes. A line has the
time of a step, its kernels and their time by PyTorch's profiler, and the peak memory; the cap is on what PyTorch
reserves, to which the card's driver adds some hundred MB. Training is the product's loop. Images, encodings and labels
are on the card. `--epoch_images` trains an epoch on as many synthetic encodings, drawn and gathered by the product's
loader.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from segment_anything import sam_model_registry
from utils.cache.resident import ResidentLoader
from utils.data.augment import View
from utils.data.boxes import class_boxes
from utils.data.classes import NUM_CLASSES
from utils.data.datasets import BoxPromptDataset, Found, Sample, TrainingSampler
from utils.data.frame import ImageSize, frame_size, image_size
from utils.model.feature_pca import FeaturePCA
from utils.model.segmenter import SEGMENTERS, Features, Segmenter
from utils.runtime import cli
from utils.runtime.device import Precision, resolve_precision, telling_out_of_memory
from utils.runtime.errors import UserError
from utils.train.captured import CapturedSteps
from utils.train.loop import Progress, train_one_epoch
from utils.train.optim import TrainState, build_optimizer, build_scheduler
from utils.train.step import EagerSteps, Steps

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
    parser.add_switch("compile", help="measure compiled steps and the compiled public encoder too, minutes more")
    parser.add_flag("epoch_images", type=cli.positive_int, help="train an epoch of so many images (box mode)")
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


def kernels(function: Callable[[], Any]) -> tuple[int, float]:
    """The number of kernels and copies of `function` on the card, and the sum of their seconds."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        function()
        torch.cuda.synchronize()
    on_card = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    times = [event.self_device_time_total for event in on_card if not event.name.startswith("Optimizer")]
    return len(times), sum(times) / 1e6


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
    if prompt_mode != "box":
        del batch["class_ids"], batch["boxes"]
    return {**{key: value.cuda() for key, value in batch.items()}, "name": [str(i) for i in range(batch_size)]}


def stored(segmenter: Segmenter, features: Features) -> list[Tensor]:
    """What a cache has of features. The projection is one of zeros, which takes as long as any."""
    if segmenter.feature_blocks:
        segmenter.feature_pca = FeaturePCA.blank(features).to(features[0].device)
        features = segmenter.feature_pca.reduce(features)
    embeddings, *rest = features
    return [embeddings.half(), *rest]


def build_steps(args: argparse.Namespace, segmenter: Segmenter, precision: Precision, step_mode: str) -> Steps:
    optimizer = build_optimizer(segmenter, lr=5e-5, weight_decay=0.01)
    scheduler = build_scheduler(optimizer, "constant", total_steps=1, warmup_steps=0)
    state = TrainState(optimizer, scheduler, precision.grad_scaler())
    if step_mode == "eager":
        return EagerSteps(segmenter, state, precision, clip_grad_norm=1.0)
    batch = args.batch_size if step_mode == "compiled" else 0
    return CapturedSteps(segmenter, state, precision, 1.0, compiled_batch=batch)


def training(args: argparse.Namespace, precision: Precision) -> None:
    sam = sam_model_registry[args.model_type](image_size=frame_size(args.image_size))
    segmenter = SEGMENTERS[args.prompt_mode](sam).to(precision.device)
    batch = random_batch(args.batch_size, args.image_size, args.prompt_mode, args.classes)
    with precision.autocast():
        features = stored(segmenter, segmenter.encode(precision.images(batch["image"])))
    images = batch.pop("image")
    cached = {**batch, "features": features} | ({"image": images} if segmenter.takes_pixels else {})
    ways = {"uncached, captured": {**batch, "image": images}, "eager": cached, "captured": cached}
    if args.compile:
        ways["compiled"] = cached
    reference: float | None = None
    for name, data in ways.items():
        # Away, as in a run whose images are all in the cache.
        sam.image_encoder.to(precision.device if "image" in data and "features" not in data else "cpu")
        steps = build_steps(args, segmenter, precision, name.rpartition(" ")[2])
        batches = [data] * STEPS
        epoch = partial(run_epoch, steps, batches)
        peaks = peak_gb(epoch)
        step_s = seconds({name: epoch}, args.repeats)[name] / STEPS
        count, kernel_s = kernels(epoch)
        reference = reference or step_s
        where = f"{args.model_type} at {args.image_size}, batch {args.batch_size}, {args.amp_dtype}"
        common.report(
            f"training {name if name.startswith('uncached') else f'cached, {name}'}, {args.prompt_mode} mode, {where}",
            ratio=reference / step_s,
            step_s=step_s,
            kernels=count / STEPS,
            kernel_s=kernel_s / STEPS,
            images_per_s=args.batch_size / step_s,
            peak_gpu_gb=peaks,
            cap_gb=args.memory_gb,
            gpu=torch.cuda.get_device_name(),
        )
        del steps, epoch
        torch.cuda.empty_cache()


def run_epoch(steps: Steps, batches: Any) -> None:
    train_one_epoch(steps, batches, grad_acc_steps=1, progress=Progress(epoch=0))


class SyntheticDataset(BoxPromptDataset):
    """Images whose encodings are random and whose labels are stripes of 6 to 14 classes."""

    def __init__(self, args: argparse.Namespace, count: int) -> None:
        height, width = frame_size(args.image_size)
        items = [SimpleNamespace(name=str(i)) for i in range(count)]
        self.source: Any = SimpleNamespace(items=items, image_size=args.image_size, folder="")
        self.indices, self.num_views, self.epoch, self.seed = list(range(count)), 1, 0, 0
        self.classes_per_image, self.bbox_shift = None, 20
        channels = sam_model_registry[args.model_type]().prompt_encoder.embed_dim
        self.embeddings = torch.randn(64, channels, height // 16, width // 16).half()
        stripes = [np.linspace(0, k, width, endpoint=False).astype(np.uint8) for k in range(6, 15)]
        self.labels = [torch.from_numpy(np.tile(stripe, (height, 1))) for stripe in stripes]
        self.boxes = [class_boxes(labels.numpy(), NUM_CLASSES) for labels in self.labels]

    def num_prompts(self) -> list[int]:
        return [len(self.boxes[i % len(self.boxes)][0]) for i in self.indices]

    def read_view(self, source_index: int, number: int, view: View) -> Sample:
        labels = self.labels[source_index % len(self.labels)]
        return {"labels": labels, "features": (self.embeddings[source_index % len(self.embeddings)],)}

    def find(self, labels: np.ndarray) -> Found:
        return self.boxes[int(labels[0, -1]) - 5]


def full_epoch(args: argparse.Namespace, precision: Precision) -> None:
    """An epoch of the product's loader and loop, after one that warms up."""
    sam = sam_model_registry[args.model_type](image_size=frame_size(args.image_size))
    segmenter = SEGMENTERS["box"](sam).to(precision.device)
    sam.image_encoder.cpu()
    dataset = SyntheticDataset(args, args.epoch_images)
    sampler = TrainingSampler(dataset.num_prompts(), batch_size=args.batch_size, rank=0, world_size=1, seed=0)
    places = dict.fromkeys(("features", "labels"), precision.device)
    loader = ResidentLoader(dataset, sampler, precision.device, places)
    load_s = common.measure({"": lambda: list(loader.load())}, 1)[""]
    steps = build_steps(args, segmenter, precision, "compiled" if args.compile else "captured")
    epoch = partial(run_epoch, steps, loader)
    epoch()
    epoch_s = seconds({"": epoch}, 1)[""]
    common.report(
        f"an epoch of {args.epoch_images} images, box mode, {args.model_type} at {args.image_size}, "
        f"batch {args.batch_size}, {args.amp_dtype}, {'compiled' if args.compile else 'captured'}",
        ratio=None,
        epoch_s=epoch_s,
        images_per_s=args.epoch_images / epoch_s,
        minutes_of_100_epochs=100 * epoch_s / 60,
        load_s=load_s,
        peak_gpu_gb=torch.cuda.max_memory_reserved() / 1e9,
        gpu=torch.cuda.get_device_name(),
    )


@torch.no_grad()
def encoding(args: argparse.Namespace, precision: Precision) -> None:
    ours, public = common.build_pair(args.model_type, args.image_size)
    encoders: dict[str, Any] = {"ours": ours.image_encoder, "public": public}
    for encoder in encoders.values():
        encoder.to(precision.device).requires_grad_(False)
    if args.compile:
        encoders["public_compiled"] = torch.compile(public, dynamic=False)
    for batch_size in sorted({1, args.batch_size}):
        images = torch.randn(batch_size, 3, args.image_size, args.image_size, device=precision.device)

        def encode(name: str, images: Tensor = images) -> Tensor:
            with precision.autocast():
                return encoders[name](images)

        peaks = {name: peak_gb(partial(encode, name)) for name in encoders}
        times = seconds({name: partial(encode, name) for name in encoders}, args.repeats)
        common.report(
            f"encoder, {args.model_type} at {args.image_size}, batch {batch_size}, {args.amp_dtype}",
            ratio=times["public"] / times["ours"],
            **{f"{name}_s": time / batch_size for name, time in times.items()},  # of an image
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
        if args.epoch_images:
            full_epoch(args, precision)


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
