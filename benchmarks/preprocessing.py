"""pre_bdd100k.py on two processes against one, and against decoding and then writing alone.

    python -m benchmarks.preprocessing
    python -m benchmarks.preprocessing --image_dtype uint8 --images 1024    # less than a third of the bytes
    python -m benchmarks.preprocessing --images 4 --image_size 64 --repeats 1    # a few seconds

On drawn scenes of BDD100K's size, 1280 x 720; of 32 of them there are as many copies as it takes. Both runs are the
script itself; `ratio` counts everything, starting Python and the processes included, and `steady_ratio` only the images
beyond a quarter of them, as the start is paid once however many there are. `limit_s` is the decoding of the images
and masks shared by two processes, and after it the bytes of the output at the rate that one large file is written and
synced at in the same run; who overlaps the two can take less. The default writes 3.5 GB to the folder for temporary
files, and removes them, three times for each repeat, and a quarter of that twice.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np

import pre_bdd100k
from benchmarks import common
from utils import cli
from utils.bdd100k import find_split, read_image, read_mask
from utils.manifest import IMAGE_DTYPES
from utils.scenes import write_dataset

DRAWN = 32  # different scenes


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_flag("images", type=cli.positive_int, default=256, help="images to preprocess")
    parser.add_flag("image_size", type=cli.image_size, default=1024, help="side of the arrays written")
    parser.add_flag("image_dtype", choices=IMAGE_DTYPES, default="float32", help="what the images are written in")
    parser.add_flag("repeats", type=cli.positive_int, default=3, help="times that each is measured; medians count")
    return parser


def write_copies(root: Path, splits: dict[str, int]) -> None:
    """A data set of `DRAWN` scenes, in as many copies as make up the number of images asked for."""
    write_dataset(root, {name: min(count, DRAWN) for name, count in splits.items()}, seed=0)
    for name, count in splits.items():
        items = find_split(root, name).items
        for i in range(len(items), count):
            for path in (items[i % DRAWN].image, items[i % DRAWN].mask):
                assert path is not None
                shutil.copy(path, path.with_stem(f"{path.stem}-{i}"))


def preprocess(root: Path, output: Path, split: str, num_workers: int, args: argparse.Namespace) -> None:
    """The command line. A process of its own, as its workers import what started them."""
    flags = ["--bdd100k_root", root, "--output_path", output, "--splits", split, "--num_workers", num_workers]
    flags += ["--image_size", args.image_size, "--image_dtype", args.image_dtype]
    command = [sys.executable, pre_bdd100k.__file__, *map(str, flags)]
    subprocess.run(command, check=True, capture_output=True)


def decode(root: Path) -> None:
    for item in find_split(root, "train").items:
        height, width = read_image(item.image).shape[:2]
        if item.mask:
            read_mask(item.mask, height, width)


def write(path: Path, size: int) -> None:
    """`size` bytes, on the disk when it returns."""
    piece = os.urandom(2**20)
    with path.open("wb") as file:
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def main(args: argparse.Namespace) -> None:
    few = max(1, args.images // 4)
    cv2.setNumThreads(0)  # as in pre_bdd100k.py's own processes: one process is one core
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, output = folder / "bdd100k", folder / "npy"
        write_copies(root, {"train": args.images, "val": few})
        num_bytes = args.images * args.image_size**2 * (3 * np.dtype(args.image_dtype).itemsize + 1)
        functions: dict[str, Callable[[], None]] = {
            "decode": lambda: decode(root),
            "write": lambda: write(folder / "bytes", num_bytes),
        }
        for split, suffix in (("train", ""), ("val", ", few")):
            for num_workers, kind in ((1, "one"), (2, "two")):
                functions[kind + suffix] = partial(preprocess, root, output, split, num_workers, args)
                functions[f"{kind}{suffix}, removed"] = partial(shutil.rmtree, output)  # in no figure
        seconds = common.measure(functions, args.repeats)
    limit = seconds["decode"] / 2 + seconds["write"]
    steady = {kind: seconds[kind] - seconds[f"{kind}, few"] for kind in ("one", "two")}
    common.report(
        f"preprocessing {args.images} images to {args.image_size} in {args.image_dtype}",
        ratio=seconds["one"] / seconds["two"],
        steady_ratio=steady["one"] / steady["two"],
        one_process_s=seconds["one"],
        two_processes_s=seconds["two"],
        limit_s=limit,
        of_limit=limit / seconds["two"],
        steady_of_limit=limit * (1 - few / args.images) / steady["two"],
        split_s={"decoding, one process": seconds["decode"], "writing the bytes": seconds["write"]},
        disk_mb_per_s=num_bytes / seconds["write"] / 1e6,
    )


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
