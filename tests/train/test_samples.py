"""utils.train.samples: which images are shown, and what of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.inputs import write_split
from tests.helpers.training import CPU
from utils.data.classes import BDD100K, IGNORE_LABEL
from utils.data.datasets import EvaluationDataset, NpyFolder, SemanticDataset, training_dataset
from utils.evaluate.plots import Legend
from utils.model.segmenter import build_model
from utils.train import samples
from utils.train.samples import ValidationSample, ValidationSamples, mosaic, training_sheet, varied_images


def split(folder: Path, *classes: list[int]) -> NpyFolder:
    """Images with stripes of some classes each."""
    items = {}
    for number, some in enumerate(classes):
        labels = np.repeat(np.array(some, np.uint8), -(-64 // len(some)))[:64, None].repeat(64, axis=1)
        items[f"image{number}"] = (np.full((64, 64, 3), 40 * number, np.uint8), labels)
    return NpyFolder(write_split(folder, items))


def test_images_come_from_all_over_the_split_and_show_many_classes(tmp_path: Path) -> None:
    source = split(tmp_path / "a", [0], [0, 1], [0, 1, 2], [7], [2, 1], [0, 8, 9])
    assert varied_images(source, range(6), 3) == [1, 2, 5]
    assert varied_images(source, [0, 1], 4) == [0, 1]


def test_validation_images_stay_the_same_and_have_the_shape_of_the_original(
    tmp_path: Path, sam_file: Path, npy: Path
) -> None:
    dataset = EvaluationDataset(NpyFolder(npy / "val"), "oracle")
    shown = ValidationSamples(dataset)
    model = build_model("vit_tiny", sam_file, image_size=64)
    shown.update(model, CPU)
    first = shown.latest
    shown.update(model, CPU)
    assert [sample.name for sample in first] == [dataset.source.items[i].name for i in range(3)]
    for before, after in zip(first, shown.latest):
        assert before.image.shape == (270, 480, 3)  # of scenes of 144 x 256, stretched to a square
        assert before.target.shape == before.prediction.shape == (270, 480)
        assert (before.prediction == after.prediction).all() and 0 <= before.miou <= 1
    classes = {int(label) for label in np.unique(first[0].target)}
    assert classes <= {int(label) for label in np.unique(dataset.source.read_labels(0))}


def test_a_mosaic_has_a_row_for_each_sample_in_the_classes_colours() -> None:
    target, prediction = np.full((2, 30, samples.WIDTH), 13, np.uint8)
    prediction[:] = IGNORE_LABEL
    image = np.zeros((30, samples.WIDTH, 3), np.uint8)
    picture = mosaic([ValidationSample(f"{i}\udcff", image, target, prediction, 0.5) for i in range(3)])
    blue = (picture == BDD100K.classes[13].color).all(axis=2)
    assert picture.shape[1] == 3 * (samples.WIDTH + samples.GAP) + samples.GAP
    left = samples.GAP * 2 + samples.WIDTH
    assert blue[:, left : left + samples.WIDTH].all(axis=1).sum() == 3 * 30
    assert not blue[:, left + samples.WIDTH :].any()


@pytest.mark.parametrize(("mode", "has_boxes"), [("box", True), ("semantic", False)])
def test_the_training_sheet_shows_views_as_training_draws_them(mode: str, has_boxes: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"augment": "full", "num_views": 4, "seed": 1, "bbox_shift": 3, "classes_per_image": None}
    dataset = training_dataset(split(tmp_path / "a", [0, 13], [1, 5]), mode, **options)
    dataset.set_epoch(7)
    dataset.use(SimpleNamespace(read=lambda index, view: ()), takes_pixels=False)
    picture = training_sheet(dataset)
    assert picture.shape[1] == 4 * (samples.WIDTH + samples.GAP) + samples.GAP
    assert (picture == samples._BOX_COLOR).all(axis=2).any() == has_boxes
    assert dataset.epoch == 7 and not dataset.has_images  # the loader's own is untouched
    assert (training_sheet(dataset) == picture).all()


def test_legends_name_hatching_only_where_it_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legends: list[list[str]] = []

    def draw(entries: Legend, width: int, size: int) -> np.ndarray:
        legends.append([name for name, _ in entries])
        return np.zeros((1, width, 3), np.uint8)

    monkeypatch.setattr(samples, "draw_legend", draw)
    source = split(tmp_path / "a", [0, 13, 255])
    dataset = SemanticDataset(source, seed=1, augment="none", num_views=1)
    dataset.use(SimpleNamespace(read=lambda index, view: ()), takes_pixels=False)
    training_sheet(dataset)
    mosaic([ValidationSample("a", *source.read(0), source.read_labels(0), 0.5)])
    assert legends == [["road", "car"], ["road", "car", "unlabelled / no class"]]
