"""utils.evaluate.examples: which images are drawn, and that no more predictions are kept than these."""

from __future__ import annotations

import math
import random
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.helpers.inputs import write_split
from utils.data.classes import BDD100K, ClassTable
from utils.data.datasets import NpyFolder
from utils.evaluate import examples as module
from utils.evaluate.examples import Examples, draw_examples


def labels(index: int) -> np.ndarray:
    return np.full((4, 6), index, dtype=np.uint8)


def run(mious: dict[int, float], count: int, number: int) -> Examples:
    examples = Examples(count, number)
    for index, miou in mious.items():
        if examples.add(index, miou):
            examples.keep(index, labels(index))
    return examples


def test_half_are_spread_and_half_are_the_worst_of_the_rest() -> None:
    mious = {index: 1 - index / 100 for index in range(41)}  # the last are the worst
    examples = run(mious, 41, 8)
    chosen = examples.choose()
    # 0, 13, 27 and 40 are spread; the worst of the others are 39 to 36. The worst comes first.
    assert [example.index for example in chosen] == [40, 39, 38, 37, 36, 27, 13, 0]
    assert [example.rank for example in chosen] == [1, 2, 3, 4, 5, 14, 28, 41]
    assert all(example.miou == mious[example.index] for example in chosen)
    for example in chosen:
        prediction = examples.take(example.index)
        assert prediction is not None and (prediction == labels(example.index)).all()
    assert all(examples.take(index) is None for index in range(41))  # no other was kept


@pytest.mark.parametrize(("count", "number"), [(5, 5), (5, 20), (1, 20), (1, 1), (7, 1), (7, 2), (7, 6), (7, 0)])
def test_there_are_as_many_as_were_asked_for(count: int, number: int) -> None:
    examples = run(dict.fromkeys(range(count), 0.5), count, number)
    chosen = examples.choose()
    assert len({example.index for example in chosen}) == len(chosen) == min(count, number)
    assert all(examples.take(example.index) is not None for example in chosen)


def test_images_without_a_label_are_never_the_worst() -> None:
    chosen = run({0: 0.9, 1: math.nan, 2: 0.8, 3: math.nan, 4: 0.7, 5: 0.9}, 6, 4).choose()
    assert [example.index for example in chosen] == [4, 2, 0, 5]


def test_processes_choose_what_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    mious = {index: rng.choice([0.1, 0.2, 0.3, 0.4, math.nan]) for index in range(50)}  # with many ties
    expected = run(mious, 50, 12).choose()
    shares = [{index: miou for index, miou in mious.items() if index % 3 == rank} for rank in range(3)]
    processes = [run(share, 50, 12) for share in shares]
    monkeypatch.setattr(module.distributed, "all_gather", lambda share: shares)
    for process in processes:
        assert process.choose() == expected
    for example in expected:
        having = [rank for rank, process in enumerate(processes) if process.take(example.index) is not None]
        assert having == [example.index % 3]


def test_pictures_name_the_image_and_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    source = NpyFolder(write_split(tmp_path / "val", {"a": (pixels, labels(255)), "b": (pixels, labels(3))}))
    examples = run({0: math.nan, 1: 0.25}, 2, 2)
    (tmp_path / "masks").mkdir()
    masks = {name: tmp_path / "masks" / f"{name}.png" for name in ("a", "b")}
    for value, path in zip((255, 7), masks.values()):
        cv2.imwrite(str(path), labels(value))
    drawn: dict[str, tuple[int, int, str, str]] = {}

    def save(
        path: Path, image: np.ndarray, target: np.ndarray, prediction: np.ndarray, classes: ClassTable, **texts: str
    ) -> None:
        drawn[path.name] = int(target[0, 0]), int(prediction[0, 0]), texts["title"], texts["figures"]

    monkeypatch.setattr(module, "save_comparison", save)
    draw_examples(tmp_path, examples, source, BDD100K, masks)
    assert drawn == {
        "b.png": (7, 1, "b", "mIoU 0.250, rank 1 of 2 (1 = worst)"),
        "a.png": (255, 0, "a", "no labelled pixel"),
    }
