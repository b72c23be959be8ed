"""pre_bdd100k.py on two processes against a plain loop through the same calls, and against decoding and writing alone.

    python -m benchmarks.preprocessing
    python -m benchmarks.preprocessing --image_dtype uint8 --images 2048    # less than a third of the bytes an image
    python -m benchmarks.preprocessing --images 4 --image_size 64 --repeats 1    # a few seconds

On drawn scenes of BDD100K's size, 1280 x 720; of 32 of them there are as many copies as it takes. The loop decodes,
resizes and writes one image after the other on one core, by the script's own functions, and each file is on the disk
before the next step; `ratio` is against it. `unsynced_ratio` is against the same loop with plain `numpy.save`, which
leaves the bytes for the system to write some time later, and `own_ratio` against the script on one process, which
writes an image while it decodes the next. The script's times count everything, starting Python and the processes
included. `limit_s` is the decoding of the images and masks shared by two processes, and after it the bytes of the
output at the rate that one large file is written and synced at in the same run; who overlaps the two can take less.
The default writes 3.5 GB to the folder for temporary files, and removes them, five times for each repeat.
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
from pre_bdd100k import Job, Settings, prepare, write
from utils.data.bdd100k import find_split, read_image, read_mask
from utils.data.frame import side_length
from utils.data.manifest import IMAGE_DTYPES
from utils.runtime import cli
from utils.scenes import write_dataset

DRAWN = 32  # different scenes


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_flag("images", type=cli.positive_int, default=256, help="images to preprocess")
    parser.add_flag("image_size", type=side_length, default=1024, help="side of the arrays written")
    parser.add_flag("image_dtype", choices=IMAGE_DTYPES, default="float32", help="what the images are written in")
    parser.add_flag("repeats", type=cli.positive_int, default=3, help="times that each is measured; medians count")
    return parser


def write_copies(root: Path, count: int) -> None:
    """A data set of `DRAWN` scenes, in as many copies as make up the number of images asked for."""
    write_dataset(root, {"train": min(count, DRAWN)}, seed=0)
    items = find_split(root, "train").items
    for i in range(len(items), count):
        for path in (items[i % DRAWN].image, items[i % DRAWN].mask):
            assert path is not None
            shutil.copy(path, path.with_stem(f"{path.stem}-{i}"))


def run_script(root: Path, output: Path, num_workers: int, settings: Settings) -> None:
    """The command line. A process of its own, as its workers import what started them."""
    flags = ["--bdd100k_root", str(root), "--output_path", str(output), "--splits", "train"]
    flags += ["--num_workers", str(num_workers), *str(settings).split()]
    subprocess.run([sys.executable, pre_bdd100k.__file__, *flags], check=True, capture_output=True)


def run_loop(root: Path, output: Path, settings: Settings, writer: Callable[[dict[Path, np.ndarray]], None]) -> None:
    for kind in ("imgs", "gts"):
        (output / kind).mkdir(parents=True)
    for item in find_split(root, "train").items:
        _, arrays = prepare(Job(item, output, settings))
        writer(arrays)


def save(arrays: dict[Path, np.ndarray]) -> None:
    for path, array in arrays.items():
        np.save(path, array)


def decode(root: Path) -> None:
    for item in find_split(root, "train").items:
        height, width = read_image(item.image).shape[:2]
        if item.mask:
            read_mask(item.mask, height, width)


def write_bytes(path: Path, size: int) -> None:
    """`size` bytes, on the disk when it returns."""
    piece = os.urandom(2**20)
    with path.open("wb") as file:
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
        file.flush()
        os.fsync(file.fileno())


def main(args: argparse.Namespace) -> None:
    settings = Settings(args.image_size, args.image_dtype, "stretch")
    cv2.setNumThreads(0)  # as in pre_bdd100k.py's own processes: one process is one core
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, output = folder / "bdd100k", folder / "npy"
        write_copies(root, args.images)
        num_bytes = args.images * args.image_size**2 * (3 * np.dtype(args.image_dtype).itemsize + 1)
        functions: dict[str, Callable[[], None]] = {
            "decode": lambda: decode(root),
            "write": lambda: write_bytes(folder / "bytes", num_bytes),
            "write, removed": (folder / "bytes").unlink,  # in no figure, as the others
        }
        writing: dict[str, Callable[[], None]] = {
            "loop": partial(run_loop, root, output, settings, write),
            "two": partial(run_script, root, output, 2, settings),
            "one": partial(run_script, root, output, 1, settings),
            "unsynced loop": partial(run_loop, root, output, settings, save),
        }
        for kind, function in writing.items():
            functions |= {kind: function, f"{kind}, removed": partial(shutil.rmtree, output)}
        seconds = common.measure(functions, args.repeats)
    limit = seconds["decode"] / 2 + seconds["write"]
    common.report(
        f"preprocessing {args.images} images to {args.image_size} in {args.image_dtype}",
        ratio=seconds["loop"] / seconds["two"],
        unsynced_ratio=seconds["unsynced loop"] / seconds["two"],
        own_ratio=seconds["one"] / seconds["two"],
        two_processes_s=seconds["two"],
        one_process_s=seconds["one"],
        loop_s=seconds["loop"],
        unsynced_loop_s=seconds["unsynced loop"],
        limit_s=limit,
        of_limit=limit / seconds["two"],
        split_s={"decoding, one process": seconds["decode"], "writing the bytes": seconds["write"]},
        disk_mb_per_s=num_bytes / seconds["write"] / 1e6,
    )


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
