"""Scenes written as a data set in BDD100K's layout, each a function of seed, split and index alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write
from utils.runtime.process_pool import run_jobs
from utils.runtime.progress import progress_bar
from utils.scenes.scene import check_size, draw_scene

IMAGES, MASKS = "images/10k", "labels/sem_seg/masks"  # BDD100K's current layout


def write_dataset(
    root: Path, counts: Mapping[str, int], seed: int, num_workers: int = 0, height: int = 720, width: int = 1280
) -> None:
    """Write `counts[split]` scenes of each split in BDD100K's current layout, each a function of (seed, split, index).

    Raises:
        UserError: the size is too small, `root` cannot be written to, or holds files of another data set.
    """
    check_size(height, width)
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    ours = {f"{scene_name(*job)}{suffix}" for job in jobs for suffix in (".jpg", ".png")}
    write = partial(_write_scenes, root, seed, height, width)
    try:
        for folder in (root / kind / split for split in counts for kind in (IMAGES, MASKS)):
            folder.mkdir(parents=True, exist_ok=True)
            strays = sorted(path.name for path in folder.glob("[!.]*") if path.name not in ours)
            if strays:
                raise UserError(f"{folder}: holds {strays[0]}, not of this data set (give an empty --output_dir)")
        with progress_bar(total=len(jobs), desc="scenes", unit="scene") as bar:
            run_jobs(write, jobs, num_workers, bar.update)
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot write: {error.strerror}") from error


def scene_name(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


def _write_scenes(root: Path, seed: int, height: int, width: int, jobs: list[tuple[str, int]]) -> list[None]:
    for split, index in jobs:
        _write_scene(root, seed, height, width, split, index)
    return [None] * len(jobs)


def _write_scene(root: Path, seed: int, height: int, width: int, split: str, index: int) -> None:
    scene = draw_scene(np.random.default_rng([seed, zlib.crc32(split.encode()), index]), height, width)
    name = scene_name(split, index)
    for path, array in (
        (root / IMAGES / split / f"{name}.jpg", scene.image[..., ::-1]),  # OpenCV's order: blue, green, red
        (root / MASKS / split / f"{name}.png", scene.mask),
    ):
        with atomic_write(path) as file:
            file.write(cv2.imencode(path.suffix, np.ascontiguousarray(array))[1].tobytes())
