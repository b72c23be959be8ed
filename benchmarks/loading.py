"""Loading training data: the cache's files at start, then batches from memory against batches from worker processes.

    python -m benchmarks.loading                      # 256 images of vit_b at 1024: 0.8 GB of features and labels
    python -m benchmarks.loading --device cuda        # to a card
    python -m benchmarks.loading --model_type vit_tiny --image_size 64 --images 4 --repeats 1    # a few seconds

The features are random, and their files are in the page cache. Files are read by as many threads as there are cores.
Prints a line for each of:

- checking the cache, as each start of a run does: the SHA-256 of each entry is compared. `ratio` is its speed against
  `plain`, which reads the files into memory and does nothing else;
- loading features and labels into memory (`--cache_device`), with the boxes of all classes, against `plain` too;
- loading them again into the same memory, which the process already has, against `plain` too;
- an epoch of batches on the device, without training. `ratio` is samples per second from memory against those of
  `--num_workers` processes. `draw_s_of_7000` is the time of drawing 7,000 images' prompts, which the epoch includes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.training import cached_dataset, write_split
from segment_anything import sam_model_registry
from segment_anything.build_sam import CONFIGS
from utils.cache.keys import Request
from utils.cache.reader import check_entries, entry_path, threads
from utils.cache.resident import ResidentLoader
from utils.data.datasets import BoxPromptDataset, TrainingBatch
from utils.data.frame import side_length
from utils.data.loaders import training_loader, training_sampler
from utils.runtime import cli
from utils.runtime.device import Precision, resolve_precision


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_flag("model_type", choices=list(CONFIGS), default="vit_b", help="decides the size of features")
    parser.add_flag("image_size", type=side_length, default=1024, help="of the images, in pixels")
    parser.add_flag("images", type=cli.positive_int, default=256, help="in the split")
    parser.add_flag("batch_size", type=cli.positive_int, default=4, help="images of a batch")
    parser.add_flag("num_workers", type=cli.non_negative_int, default=2, help="processes of the loader")
    parser.add_flag("device", default="cpu", help="where the batches are: cpu, cuda or cuda:N")
    parser.add_flag("repeats", type=cli.positive_int, default=3, help="times that each is measured; medians count")
    return parser


def read_plainly(paths: list[Path], buffers: np.ndarray) -> None:
    """Read the files as the fastest program would, with nothing checked, each into a row of `buffers`."""

    def read(path: Path, buffer: Any) -> None:
        with open(path, "rb", buffering=0) as file:
            file.readinto(buffer)

    with threads() as pool:
        list(pool.map(read, paths, buffers))


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(args: argparse.Namespace) -> None:
    precision = resolve_precision(args.device, local_rank=0, local_world_size=1, use_amp=False, amp_dtype="auto")
    with tempfile.TemporaryDirectory() as name:
        source = write_split(Path(name) / "npy", args.images, args.image_size)
        sam = sam_model_registry[args.model_type](image_size=args.image_size)
        dataset = BoxPromptDataset(source, classes_per_image=None, bbox_shift=20, seed=0)
        dataset.use(cached_dataset(Path(name), source, sam).cache, takes_pixels=False)
        compare_files(args, dataset, precision)
        compare_batches(args, dataset, precision)


def compare_files(args: argparse.Namespace, dataset: BoxPromptDataset, precision: Precision) -> None:
    cache: Any = dataset.cache
    source = dataset.source
    of_features = [entry_path(cache.folder, item.name) for item in source.items]
    of_labels = [source.folder / "gts" / f"{item.name}.npy" for item in source.items]
    request = Request(source, num_views=1, passes=2)

    def check() -> None:
        checked = list(check_entries(cache.folder, request, cache.identity, range(len(source.items))))
        assert not any(entry.problem for entry in checked)

    def load() -> None:
        loader(args, dataset, precision)
        finish(precision.device)

    loaded = loader(args, dataset, precision)

    def load_again() -> None:
        list(loaded.load())
        finish(precision.device)

    paths = of_features + of_labels
    buffers = np.empty((len(paths), max(path.stat().st_size for path in paths)), np.uint8)
    buffers.fill(0)  # now the process has this memory
    seconds = common.measure(
        {
            "plain features": lambda: read_plainly(of_features, buffers),
            "plain": lambda: read_plainly(paths, buffers),
            "check": check,
            "load": load,
            "load again": load_again,
        },
        args.repeats,
    )
    gb = {
        "features": sum(path.stat().st_size for path in of_features) / 1e9,
        "labels": sum(path.stat().st_size for path in of_labels) / 1e9,
    }
    where = f"{args.images} images at {args.image_size}"
    for what, size, plain in (
        ("check", gb["features"], seconds["plain features"]),
        ("load", sum(gb.values()), seconds["plain"]),
        ("load again", sum(gb.values()), seconds["plain"]),
    ):
        common.report(
            f"{what} the cache of {where}",
            ratio=plain / seconds[what],
            gb_per_s=size / seconds[what],
            plain_gb_per_s=size / plain,
            seconds=seconds[what],
            gb=size,
            device=str(precision.device),
        )


def loader(args: argparse.Namespace, dataset: BoxPromptDataset, precision: Precision) -> ResidentLoader:
    sampler = training_sampler(dataset, batch_size=args.batch_size, seed=0, grad_acc_steps=1)
    resident = ResidentLoader(
        dataset, sampler, precision.device, dict.fromkeys(("features", "labels"), precision.device)
    )
    for _ in resident.load():
        pass
    return resident


def compare_batches(args: argparse.Namespace, dataset: BoxPromptDataset, precision: Precision) -> None:
    resident = loader(args, dataset, precision)
    options: dict[str, Any] = {"batch_size": args.batch_size, "seed": 0, "grad_acc_steps": 1, "precision": precision}
    workers = training_loader(dataset, num_workers=args.num_workers, **options)

    def to_device(batch: TrainingBatch) -> list[Tensor]:
        tensors = [batch["labels"], batch["class_ids"], batch["boxes"], batch["valid"], *batch["features"]]
        return [precision.to_device(tensor) for tensor in tensors]

    def epoch(batches: Any) -> None:
        for batch in batches:
            to_device(batch)
        finish(precision.device)

    seconds = common.measure(
        {
            "memory": lambda: epoch(resident),
            "workers": lambda: epoch(workers),
            "draw": lambda: [resident.draw(indexes) for indexes in resident.batch_sampler],
        },
        args.repeats,
    )
    common.report(
        f"an epoch of batches of {args.batch_size}, {args.images} images at {args.image_size}",
        ratio=seconds["workers"] / seconds["memory"],
        samples_per_s=args.images / seconds["memory"],
        workers_samples_per_s=args.images / seconds["workers"],
        num_workers=args.num_workers,
        draw_s_of_7000=7000 * seconds["draw"] / args.images,
        device=str(precision.device),
    )


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
