"""Write small inputs: preprocessed splits, pictures, a video, detections."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

import pre_bdd100k
from utils.data.classes import BDD100K, IGNORE_LABEL, ClassTable
from utils.data.description import Description, Layout, train_ids
from utils.data.frame import image_size_of
from utils.data.manifest import Manifest, ManifestItem
from utils.scenes import write_dataset

IMAGE_SIZE = 64


def write_split(
    folder: Path, items: Mapping[str, tuple[np.ndarray, np.ndarray]], classes: ClassTable = BDD100K
) -> Path:
    """Write a split as pre_bdd100k.py does, from (image, labels) by name. Images keep their dtype."""
    for kind in ("imgs", "gts"):
        (folder / kind).mkdir(parents=True)
    entries = []
    for name, (image, labels) in items.items():
        np.save(folder / "imgs" / f"{name}.npy", image)
        np.save(folder / "gts" / f"{name}.npy", labels)
        height, width = labels.shape
        counts = np.bincount(labels.ravel(), minlength=256).tolist()
        entries.append(ManifestItem(name, height, width, counts[: len(classes)], counts[IGNORE_LABEL]))
    size = image_size_of((height, width))
    manifest = Manifest(size, str(image.dtype), "stretch", labelled=True, complete=True, items=entries)
    if classes != BDD100K:
        layout = Layout("images/{split}/{stem}.*", "masks/{split}/{stem}.png")
        dataset = Description("drawn", classes, train_ids(classes), (layout,)).to_plain()
        manifest = replace(manifest, class_names=list(classes.names), dataset=dataset)
    manifest.write(folder)
    return folder


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Write JPEGs of mixed sizes. Returns their (height, width) by name."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    sizes = {"wide": (30, 90), "tall": (101, 40), "tiny": (7, 5), "large": (300, 401)}
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.jpg")
    return sizes


def write_video(path: Path) -> Path:
    """Write a video of five frames, 48 x 64 pixels, at 10 frames a second."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for i in range(5):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    return path


def write_detections(path: Path, names: list[str], category: str = "car") -> Path:
    """Write Scalabel boxes: one box, twice, for each image name."""
    box = {"x1": 20, "y1": 30, "x2": 200.5, "y2": 120}
    frames = [{"name": f"{name}.jpg", "labels": [{"category": category, "box2d": box}] * 2} for name in names]
    path.write_text(json.dumps(frames))
    return path


def draw_scenes(root: Path, *, seed: int) -> Path:
    """Draw scenes in BDD100K's layout: 7 for training, 3 for validation."""
    write_dataset(root, {"train": 7, "val": 3}, seed=seed, height=144, width=256)
    return root


def preprocess(scenes: Path, output: Path) -> Path:
    """Preprocess scenes to uint8 at IMAGE_SIZE, into the folders "train" and "val" of `output`."""
    arguments = ["--bdd100k_root", scenes, "--output_path", output, "--image_size", IMAGE_SIZE]
    options = [*arguments, "--image_dtype", "uint8", "--num_workers", 1]
    parser = pre_bdd100k.get_args_parser()
    assert not pre_bdd100k.main(parser.parse_args([str(option) for option in options]))
    return output
