"""Samples, their randomness, and the order of images over processes."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.conftest import IMAGE_SIZE
from utils.boxes import class_boxes
from utils.dataset import FILLER, BoxPromptDataset, EvaluationDataset, NpyFolder, TrainingSampler
from utils.errors import UserError


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def dataset(npy: Path, **changes: Any) -> BoxPromptDataset:
    return BoxPromptDataset(NpyFolder(npy / "train"), **{"classes_per_image": 2, "bbox_shift": 20, "seed": 5, **changes})


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)


def test_a_sample_depends_on_seed_epoch_and_index_alone(npy: Path) -> None:
    forwards, backwards = dataset(npy), dataset(npy)
    first = [forwards[i] for i in range(7)]
    second = [backwards[i] for i in reversed(range(7))][::-1]
    assert all(equal(a, b) for a, b in zip(first, second))
    loader = DataLoader(dataset(npy), batch_size=None, num_workers=2)
    assert all(equal(a, b) for a, b in zip(first, loader))
    for other in (dataset(npy, seed=6), dataset(npy)):
        if other.seed == 5:
            other.set_epoch(1)
        assert not all(torch.equal(other[i]["boxes"], first[i]["boxes"]) for i in range(7))


def test_prompts_are_boxes_of_present_classes(npy: Path) -> None:
    for exact in (True, False):
        data = dataset(npy, bbox_shift=0 if exact else 20)
        for i in range(7):
            sample = data[i]
            present, boxes = class_boxes(sample["labels"].numpy())
            assert sample["valid"].all()
            assert len(set(sample["class_ids"].tolist())) == 2
            for class_id, box in zip(sample["class_ids"].tolist(), sample["boxes"].numpy()):
                tight = boxes[present.tolist().index(class_id)]
                limit = 0 if exact else np.minimum(20, (tight[2:] - tight[:2] + 6) // 10)[[0, 1, 0, 1]]
                assert (np.abs(box - tight) <= limit).all()
                assert (box[:2] >= 0).all()
                assert (box[:2] <= box[2:]).all()
                assert (box[2:] < IMAGE_SIZE).all()


def test_prompts_beyond_the_present_classes_are_not_valid(npy: Path) -> None:
    data = dataset(npy, classes_per_image=19)
    sample = data[0]
    present, _ = class_boxes(sample["labels"].numpy())
    assert sample["valid"].sum() == len(present)
    assert sorted(sample["class_ids"][sample["valid"]].tolist()) == present.tolist()
    assert set(sample["class_ids"][~sample["valid"]].tolist()) == {255}
    assert not data[FILLER]["valid"].any()


def test_an_image_without_labelled_pixels_is_left_out(npy: Path, tmp_path: Path) -> None:
    shutil.copytree(npy / "train", tmp_path / "train")
    name = edit_first_item(tmp_path / "train", {"pixels": [0] * 19, "ignored": IMAGE_SIZE**2})
    np.save(tmp_path / "train" / "gts" / f"{name}.npy", np.full((IMAGE_SIZE, IMAGE_SIZE), 255, np.uint8))
    data = dataset(tmp_path)
    assert len(data) == 6
    assert name not in {data[i]["name"] for i in range(6)}
    assert len(EvaluationDataset(data.source)) == 7  # it still is part of the split


def edit_first_item(folder: Path, changes: dict[str, Any]) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["items"][0].update(changes)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest["items"][0]["name"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sampler_covers_each_image_once_and_keeps_processes_in_step(world_size: int) -> None:
    ranks = [
        list(TrainingSampler(23, batch_size=2, rank=rank, world_size=world_size, seed=1)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(TrainingSampler(23, batch_size=2, rank=0, world_size=world_size, seed=1))
    images = [i for batches in ranks for batch in batches for i in batch if i != FILLER]
    assert sorted(images) == list(range(23))


def test_optimizer_steps_see_the_same_images_in_every_layout() -> None:
    def steps(world_size: int, grad_acc_steps: int) -> list[set[int]]:
        ranks = [
            list(TrainingSampler(23, batch_size=2, rank=r, world_size=world_size, seed=1)) for r in range(world_size)
        ]
        return [
            {i for batches in ranks for batch in batches[k : k + grad_acc_steps] for i in batch} - {FILLER}
            for k in range(0, len(ranks[0]), grad_acc_steps)
        ]

    assert steps(1, 4) == steps(2, 2) == steps(4, 1)


def test_epochs_differ() -> None:
    sampler = TrainingSampler(23, batch_size=23, rank=0, world_size=1, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_folder_refuses_damaged_files_and_runs_no_pickle(npy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    shutil.copytree(npy / "train", folder)
    victim = sorted((folder / "imgs").iterdir())[3]
    whole = victim.read_bytes()
    ran = tmp_path / "ran"
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([Payload(ran)], dtype=object), allow_pickle=True)
    contents = {
        "truncated": whole[:-10],
        "damaged": b"not an array",
        "pickled objects": pickled.read_bytes(),
        "expected uint8": _npy_bytes(tmp_path, np.zeros((8, 8, 3), np.uint8)),
        "damaged, or not": pickle.dumps(Payload(ran)),
    }
    for message, content in contents.items():
        victim.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            NpyFolder(folder)
        assert str(victim) in str(caught.value)
        assert "\n" not in str(caught.value)
    victim.unlink()
    with pytest.raises(UserError, match="no such file"):
        NpyFolder(folder)
    assert not ran.exists()


def _npy_bytes(tmp_path: Path, array: np.ndarray) -> bytes:
    np.save(tmp_path / "array.npy", array)
    return (tmp_path / "array.npy").read_bytes()


def test_folder_refuses_what_is_no_labelled_split(npy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        NpyFolder(tmp_path / "none")
    with pytest.raises(UserError, match=r"manifest.json: not found"):
        NpyFolder(tmp_path)
    label = next((npy / "train" / "gts").iterdir())
    shutil.copytree(npy / "train", tmp_path / "train")
    wrong = np.load(label)
    wrong[0, 0] = 42
    np.save(tmp_path / "train" / "gts" / label.name, wrong)
    data = dataset(tmp_path)
    index = next(i for i, item in enumerate(data.source.items) if item.name == label.stem)
    with pytest.raises(UserError, match=r"got \[42\]"):
        data[index]
