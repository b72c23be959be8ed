"""utils.api: the label maps of infer_bdd100k.py, and one line for what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import infer_bdd100k
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.inputs import write_detections
from tests.helpers.scripts import run_script
from utils.api import Model, load_run
from utils.data.classes import BDD100K
from utils.data.detections import read_detections
from utils.runtime.errors import UserError


@pytest.fixture(scope="module")
def boxed(sam_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    best = write_checkpoint(tmp_path_factory.mktemp("box") / "best.pth", sam_file, "box")
    return load_run(best, sam_file, device="cpu")


@pytest.mark.parametrize("mode", ["semantic", "box"])
def test_label_maps_are_those_of_infer(mode: str, tmp_path: Path, sam_file: Path) -> None:
    best = write_checkpoint(tmp_path / "best.pth", sam_file, mode)
    pixels = np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    flags: list[Any] = ["--images", tmp_path / "in", "--save_predictions", "--output_dir", tmp_path / "out"]
    flags += ["--model_checkpoint", best, "--sam_checkpoint", sam_file, "--device", "cpu", "--model_type", "vit_tiny"]
    given: dict[str, Any] = {}
    if mode == "box":
        detections = write_detections(tmp_path / "det.json", ["a"])
        flags += ["--boxes", detections]
        ids, boxes = read_detections(detections, BDD100K).boxes["a"]
        given = {"class_ids": ids, "boxes": boxes}
    run_script(infer_bdd100k, *flags)
    expected = np.asarray(Image.open(tmp_path / "out" / "predictions" / "a.png"))
    model = load_run(best, sam_file, device="cpu")
    for image in (pixels, tmp_path / "in" / "a.png"):
        result = model.segment(image, **given)
        assert np.array_equal(result.label_map, expected) and result.overlay().shape[1:] == (96, 3)
    if mode == "box":
        by_name = model.segment(pixels, boxes={"Car": boxes})
        assert np.array_equal(by_name.label_map, expected)


def test_what_does_not_fit(tmp_path: Path, sam_file: Path) -> None:
    best = write_checkpoint(tmp_path / "best.pth", sam_file, "semantic")
    with pytest.raises(UserError, match="names no SAM file"):
        load_run(best)
    model = load_run(best, sam_file, device="cpu")
    with pytest.raises(ValueError, match="uint8 RGB"):
        model.segment(np.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="opacity must be from 0 to 1, not 50"):
        model.segment(np.zeros((8, 8, 3), np.uint8)).overlay(50)
    with pytest.raises(ValueError, match="leave out boxes"):
        model.segment(np.zeros((8, 8, 3), np.uint8), boxes={"car": [[0, 0, 1, 1]]})


@pytest.mark.parametrize("image", [None, [1, 2], Image.new("RGB", (8, 8))])
def test_an_image_of_another_type(image: Any, boxed: Model) -> None:
    with pytest.raises(ValueError, match=rf"must be a file or .*RGB, not {type(image).__name__}"):
        boxed.segment(image, boxes={})


def test_two_names_of_one_class(boxed: Model) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    one, two = [0, 0, 20, 20], [30, 10, 50, 30]
    expected = boxed.segment(picture, boxes={"person": [one, two]}).label_map
    assert np.array_equal(boxed.segment(picture, boxes={"person": one, "pedestrian": two}).label_map, expected)
    assert not np.array_equal(boxed.segment(picture, boxes={"person": two}).label_map, expected)


def test_a_run_names_its_sam_file(tmp_path: Path, sam_file: Path) -> None:
    path = write_checkpoint(tmp_path / "best.pth", sam_file, "semantic")
    state = torch.load(path, weights_only=True)
    state["args"]["checkpoint"] = str(sam_file)
    torch.save(state, path)
    model = load_run(path, device="cpu")
    assert model.segment(np.zeros((8, 12, 3), np.uint8), tta=True).label_map.shape == (8, 12)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "a box model needs boxes"),
        ({"boxes": {"car": [1, 2, 3]}}, r"must be \(K, 4\)"),
        ({"boxes": {"car": ["a", "b", "c", "d"]}}, "boxes must be numbers"),
        ({"boxes": [[0, 0, 1, 1]]}, "with K class_ids"),
        ({"boxes": [[0, 0, 1, 1]], "class_ids": [19]}, "integers from 0 to 18"),
        ({"boxes": [[0, 0, 1, 1]], "class_ids": [-1]}, "integers from 0 to 18"),
        ({"boxes": [[0, 0, 1, 1]], "class_ids": [1.5]}, "integers from 0 to 18"),
        ({"boxes": [[2, 0, 1, 1]], "class_ids": [3]}, "x1 <= x2"),
        ({"boxes": [[0, 0, 1, float("nan")]], "class_ids": [3]}, "finite"),
        ({"boxes": {"car": [0, 0, 1, 1]}, "class_ids": [3]}, "leave them out"),
        ({"boxes": {"car": [0, 0, 1, 1]}, "tta": True}, "takes no tta"),
    ],
)
def test_boxes_that_do_not_fit(given: dict[str, Any], said: str, boxed: Model) -> None:
    with pytest.raises(ValueError, match=said):
        boxed.segment(np.zeros((8, 8, 3), np.uint8), **given)


def test_boxes_of_an_unknown_class_and_no_boxes(boxed: Model) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="no class 'lorry'"):
        boxed.segment(picture, boxes={"lorry": [0, 0, 1, 1]})
    assert (boxed.segment(picture, boxes={}).label_map == 255).all()
