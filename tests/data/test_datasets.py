"""Samples, their randomness, and the order of images over processes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

import pre_bdd100k
from tests.helpers.inputs import IMAGE_SIZE, write_split
from tests.helpers.oracles import Payload
from tests.helpers.scripts import run_script
from utils.data.boxes import class_boxes
from utils.data.classes import BDD100K, IGNORE_LABEL, ClassTable, SemanticClass
from utils.data.datasets import (
    FILLER,
    BoxPromptDataset,
    EvaluationDataset,
    NpyFolder,
    Sample,
    SemanticDataset,
    TrainingDataset,
    TrainingSampler,
    collate_evaluation,
    collate_training,
    validation_dataset,
)
from utils.data.geometry import PAD_COLOR
from utils.data.loaders import Loader, evaluation_loader, sample_bytes, training_loader
from utils.runtime.device import Precision
from utils.runtime.errors import UnreadableError, UserError


def dataset(npy: Path, **changes: Any) -> BoxPromptDataset:
    options = {"classes_per_image": 2, "bbox_shift": 20, "seed": 5, **changes}
    return BoxPromptDataset(NpyFolder(npy / "train"), **options)


def equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)


def test_a_sample_depends_on_seed_epoch_and_index_alone(npy: Path) -> None:
    forwards, backwards = dataset(npy), dataset(npy)
    first = [forwards[i] for i in range(7)]
    second = [backwards[i] for i in reversed(range(7))][::-1]
    assert all(equal(a, b) for a, b in zip(first, second))
    loader = Loader(dataset(npy), batch_size=None, num_workers=2)
    assert all(equal(a, b) for a, b in zip(first, loader))
    for other in (dataset(npy, seed=6), dataset(npy)):
        if other.seed == 5:
            other.set_epoch(1)
        assert not all(torch.equal(other[i]["boxes"], first[i]["boxes"]) for i in range(7))


def test_workers_take_over_each_new_epoch(npy: Path) -> None:
    data = dataset(npy, classes_per_image=3)
    sampler = TrainingSampler([1] * len(data), batch_size=3, rank=0, world_size=1, seed=0)
    loaders = [Loader(data, batch_sampler=sampler, num_workers=workers) for workers in (0, 2)]
    for epoch in (0, 1):
        data.set_epoch(epoch)
        sampler.set_epoch(epoch)
        here, in_workers = (list(loader) for loader in loaders)
        assert len(here) == len(in_workers) == 3
        assert all(equal(a, b) for a, b in zip(here, in_workers))


def split_of(folder: Path, *labels: np.ndarray) -> Path:
    """`folder / "train"`, a split of black images "0", "1", ... with these labels."""
    write_split(folder / "train", {str(i): (np.zeros((*m.shape, 3), np.uint8), m) for i, m in enumerate(labels)})
    return folder


def labels_of(*class_ids: int) -> np.ndarray:
    """32 x 32: 255, with an 8 x 8 block of each class along the diagonal."""
    labels = np.full((32, 32), 255, np.uint8)
    for i, class_id in enumerate(class_ids):
        labels[8 * i : 8 * i + 8, 8 * i : 8 * i + 8] = class_id
    return labels


def over_epochs(data: TrainingDataset, count: int) -> list[Sample]:
    samples = []
    for epoch in range(count):
        data.set_epoch(epoch)
        samples.append(data[0])
    return samples


def test_every_class_of_an_image_is_drawn_alike(tmp_path: Path) -> None:
    data = dataset(split_of(tmp_path, labels_of(0, 7, 18)), classes_per_image=1)
    drawn = [sample["class_ids"].item() for sample in over_epochs(data, 60)]
    counts = [drawn.count(class_id) for class_id in (0, 7, 18)]
    assert sum(counts) == 60
    assert min(counts) >= 10  # about 20 each


@pytest.mark.parametrize(("bbox_shift", "most"), [(0, 0), (2, 2), (20, 3)])
def test_jitter_reaches_its_bounds_and_not_beyond(tmp_path: Path, bbox_shift: int, most: int) -> None:
    """A box of side 28, close to the border, moves by a tenth of it at the most, or by `bbox_shift` if that is less."""
    labels = np.full((32, 32), 255, np.uint8)
    labels[3:31, 2:30] = 4
    data = dataset(split_of(tmp_path, labels), classes_per_image=1, bbox_shift=bbox_shift)
    boxes = torch.stack([sample["boxes"][0] for sample in over_epochs(data, 80)])
    moved = boxes - torch.tensor([2, 3, 29, 30])
    assert (moved.min(), moved.max()) == (-most, most)
    assert torch.equal(moved, moved.round())
    assert (boxes.min(), boxes.max()) == (2 - min(most, 2), min(30 + most, 31))  # inside the image


def test_prompts_are_boxes_of_present_classes(npy: Path) -> None:
    for exact in (True, False):
        data = dataset(npy, bbox_shift=0 if exact else 20)
        for i in range(7):
            sample = data[i]
            present, boxes = class_boxes(sample["labels"].numpy(), 19)
            assert sample["valid"].all()
            assert len(set(sample["class_ids"].tolist())) == 2
            for class_id, box in zip(sample["class_ids"].tolist(), sample["boxes"].numpy()):
                tight = boxes[present.tolist().index(class_id)]
                limit = 0 if exact else np.minimum(20, (tight[2:] - tight[:2] + 6) // 10)[[0, 1, 0, 1]]
                assert (np.abs(box - tight) <= limit).all()
                assert (box[:2] >= 0).all()
                assert (box[:2] <= box[2:]).all()
                assert (box[2:] < IMAGE_SIZE).all()


@pytest.mark.parametrize("classes_per_image", [None, 19])
def test_all_classes_that_occur_are_prompts_each_once(classes_per_image: int | None, npy: Path) -> None:
    data = dataset(npy, classes_per_image=classes_per_image)
    for i in range(7):
        sample = data[i]
        present, _ = class_boxes(sample["labels"].numpy(), 19)
        assert sorted(sample["class_ids"].tolist()) == present.tolist()
        assert sample["valid"].all() and len(sample["valid"]) == len(sample["boxes"]) == len(present)


def test_a_batch_pads_prompts_to_the_most_that_an_image_has(tmp_path: Path) -> None:
    source = split_of(tmp_path, labels_of(0, 7, 18), labels_of(4), np.full((32, 32), 255, np.uint8))
    data = dataset(source, classes_per_image=None, bbox_shift=0)
    assert len(data) == 2  # the third has nothing to teach
    batch = collate_training([data[0], data[1]])
    assert batch["class_ids"].tolist() == [[0, 7, 18], [4, 255, 255]]
    assert batch["valid"].tolist() == [[True] * 3, [True, False, False]]
    first, second = batch["boxes"].tolist()
    assert first == [[0, 0, 7, 7], [8, 8, 15, 15], [16, 16, 23, 23]] and second == [[0, 0, 7, 7], [0] * 4, [0] * 4]
    assert batch["boxes"].dtype == torch.float32 and batch["name"] == ["0", "1"]
    # A crop that shows nothing labelled has no class; the decoder is given one box all the same.
    nothing: Any = {**data[1], **{key: data[1][key][:0] for key in ("class_ids", "boxes", "valid")}}
    batch = collate_training([nothing])
    assert (batch["class_ids"].tolist(), batch["valid"].tolist()) == ([[255]], [[False]])
    semantic = SemanticDataset(NpyFolder(source / "train"), seed=0)
    assert collate_training([semantic[0], semantic[1]])["valid"].tolist() == [True, True]


def test_the_filler_is_an_image_of_which_no_prompt_counts(npy: Path) -> None:
    filler, first = dataset(npy)[FILLER], dataset(npy)[0]
    assert not filler.pop("valid").any()
    assert first.pop("valid").all()
    assert equal(filler, first)


def test_semantic_samples_are_mirrored_half_of_the_time_with_their_labels(npy: Path) -> None:
    source = NpyFolder(npy / "train")
    data = SemanticDataset(source, seed=1)
    mirrored = []
    for epoch in range(8):
        data.set_epoch(epoch)
        for index in range(len(data)):
            image, labels = source.read(index)
            sample = data[index]
            assert sample.keys() == {"image", "labels", "valid", "name"}
            flip = not np.array_equal(sample["labels"], labels)
            mirrored.append(flip)
            step = -1 if flip else 1
            assert np.array_equal(sample["image"], image[:, ::step])
            assert np.array_equal(sample["labels"], labels[:, ::step])
            assert sample["valid"].item() is True
    assert 0.3 < np.mean(mirrored) < 0.7
    again = SemanticDataset(source, seed=1)
    again.set_epoch(7)
    assert equal(again[3], data[3])
    assert not data[FILLER]["valid"]


@pytest.mark.parametrize("augment", ["flip", "full"])
def test_augmented_samples_depend_on_seed_epoch_and_index_alone(augment: str, npy: Path) -> None:
    data, again = (dataset(npy, augment=augment, num_views=2, bbox_shift=0, classes_per_image=19) for _ in range(2))
    samples = []
    for epoch in range(3):
        data.set_epoch(epoch)
        samples.append([data[i] for i in range(7)])
        again.set_epoch(epoch)
        assert all(equal(again[i], samples[-1][i]) for i in reversed(range(7)))
        loader = Loader(data, batch_size=None, num_workers=2 if epoch == 0 else 0)
        assert all(equal(a, b) for a, b in zip(samples[-1], loader))
    assert not all(equal(a, b) for a, b in zip(samples[0], samples[1]))
    for sample in (sample for epoch in samples for sample in epoch):  # prompts are of the view, not of the image
        present, boxes = class_boxes(sample["labels"].numpy(), 19)
        order = sample["class_ids"][sample["valid"]].argsort()
        assert sample["class_ids"][sample["valid"]][order].tolist() == present.tolist()
        assert np.array_equal(sample["boxes"][sample["valid"]][order], boxes)


def test_augmentation_leaves_the_padding_alone(scenes: Path, tmp_path: Path) -> None:
    flags = ["--bdd100k_root", scenes, "--output_path", tmp_path, "--image_size", IMAGE_SIZE, "--resize_mode", "pad"]
    assert not run_script(pre_bdd100k, *flags, "--image_dtype", "uint8", "--splits", "train", "--num_workers", 1)
    data = SemanticDataset(NpyFolder(tmp_path / "train"), seed=0, augment="full", num_views=4)
    for sample in over_epochs(data, 5):
        below = 9 * IMAGE_SIZE // 16  # where scenes of 144 x 256 end
        assert (sample["image"][below:] == torch.tensor(PAD_COLOR)).all()
        assert (sample["labels"][below:] == 255).all()
        assert (sample["labels"][:below] != 255).float().mean() > 0.5


def test_without_augmentation_nothing_more_is_drawn(npy: Path) -> None:
    assert all(equal(dataset(npy)[i], dataset(npy, augment="none", num_views=1)[i]) for i in range(7))
    source = NpyFolder(npy / "train")
    plain = SemanticDataset(source, seed=1, augment="none", num_views=1)
    for index in range(7):
        image, labels = source.read(index)
        assert np.array_equal(plain[index]["image"], image) and np.array_equal(plain[index]["labels"], labels)


def test_a_crop_that_leaves_no_label_has_no_prompt_that_counts(tmp_path: Path) -> None:
    labels = np.full((32, 32), 255, np.uint8)
    labels[0, 0] = 4
    data = dataset(split_of(tmp_path, labels), augment="full", num_views=4)
    counts = {int(sample["valid"].sum()) for sample in over_epochs(data, 20)}
    assert counts == {0, 1}
    semantic = SemanticDataset(data.source, seed=1, augment="full", num_views=4)
    assert {bool(sample["valid"]) for sample in over_epochs(semantic, 20)} == {False, True}


def test_evaluation_without_boxes_has_none(npy: Path) -> None:
    assert EvaluationDataset(NpyFolder(npy / "val"), None)[0].keys() == {"image", "labels", "name"}


def test_detected_boxes_are_brought_into_the_frame(npy: Path) -> None:
    source = NpyFolder(npy / "val")
    name = source.items[1].name  # 144 x 256, stretched to 64 x 64
    data = EvaluationDataset(source, {name: (np.array([13]), np.array([[0.0, 0.0, 255.0, 71.0]]))})
    assert data[1]["class_ids"].tolist() == [13]
    np.testing.assert_allclose(data[1]["boxes"], [[0, 0, 63, 31.28]], atol=0.01)  # clipped to pixel centres
    assert (data[0]["class_ids"].shape, data[0]["boxes"].shape) == ((0,), (0, 4))


def test_evaluation_takes_the_tight_box_of_every_class(tmp_path: Path) -> None:
    data = EvaluationDataset(NpyFolder(split_of(tmp_path, labels_of(9, 3), labels_of()) / "train"), "oracle")
    batch = collate_evaluation([data[0], data[1]])
    assert batch["image"].shape == (2, 32, 32, 3)
    assert batch["labels"].shape == (2, 32, 32)
    assert batch["name"] == ["0", "1"]
    assert batch["class_ids"][0].tolist() == [3, 9]
    assert batch["boxes"][0].tolist() == [[8, 8, 15, 15], [0, 0, 7, 7]]
    assert (batch["class_ids"][1].shape, batch["boxes"][1].shape) == ((0,), (0, 4))


def test_an_image_without_labelled_pixels_is_left_out(npy: Path, tmp_path: Path) -> None:
    shutil.copytree(npy / "train", tmp_path / "train")
    name = edit_first_item(tmp_path / "train", {"pixels": [0] * 19, "ignored": IMAGE_SIZE**2})
    np.save(tmp_path / "train" / "gts" / f"{name}.npy", np.full((IMAGE_SIZE, IMAGE_SIZE), 255, np.uint8))
    data = dataset(tmp_path)
    assert len(data) == 6
    assert name not in {data[i]["name"] for i in range(6)}
    assert len(EvaluationDataset(data.source, "oracle")) == 7  # it still is part of the split


def test_a_split_without_a_labelled_pixel_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image has a labelled pixel; check the masks given to pre_bdd100k"):
        dataset(split_of(tmp_path, labels_of()))


def edit_first_item(folder: Path, changes: dict[str, Any]) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["items"][0].update(changes)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest["items"][0]["name"]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 40])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sampler_covers_each_image_once_and_keeps_processes_in_step(world_size: int, batch_size: int) -> None:
    samplers = [
        TrainingSampler([1] * 23, batch_size=batch_size, rank=rank, world_size=world_size, seed=1)
        for rank in range(world_size)
    ]
    ranks = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in ranks} == {len(sampler) for sampler in samplers} == {len(ranks[0])}
    assert all(0 < len(batch) <= batch_size for batches in ranks for batch in batches)
    images = [i for batches in ranks for batch in batches for i in batch if i != FILLER]
    assert sorted(images) == list(range(23))


def test_optimizer_steps_see_the_same_images_in_every_layout() -> None:
    counts = np.random.default_rng(0).integers(1, 20, 23).tolist()

    def steps(world_size: int, grad_acc_steps: int) -> list[set[int]]:
        layout: dict[str, int] = {"batch_size": 2, "world_size": world_size, "grad_acc_steps": grad_acc_steps}
        ranks = [list(TrainingSampler(counts, **layout, rank=rank, seed=1)) for rank in range(world_size)]
        return [
            {i for batches in ranks for batch in batches[k : k + grad_acc_steps] for i in batch} - {FILLER}
            for k in range(0, len(ranks[0]), grad_acc_steps)
        ]

    assert steps(1, 4) == steps(2, 2) == steps(4, 1)


def test_images_with_as_many_prompts_share_a_batch_within_their_optimizer_step() -> None:
    counts = np.random.default_rng(0).integers(1, 20, 64).tolist()

    def batches(grad_acc_steps: int) -> list[list[int]]:
        return list(TrainingSampler(counts, batch_size=4, rank=0, world_size=1, seed=1, grad_acc_steps=grad_acc_steps))

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(counts[i] for i in batch) for batch in batches)

    in_turn, alike = batches(1), batches(4)
    for start in range(0, 16, 4):
        drawn, sorted_ = ([i for batch in some[start : start + 4] for i in batch] for some in (in_turn, alike))
        assert set(drawn) == set(sorted_) and [counts[i] for i in sorted_] == sorted(counts[i] for i in drawn)
    assert sum(counts) < padded(alike) < 1.25 * sum(counts) < padded(in_turn)


def test_the_number_of_prompts_is_known_before_an_image_is_read(npy: Path) -> None:
    for classes_per_image in (None, 3, 1):
        data = dataset(npy, classes_per_image=classes_per_image)
        assert data.num_prompts() == [len(data[i]["boxes"]) for i in range(7)]
    assert SemanticDataset(NpyFolder(npy / "train"), seed=0).num_prompts() == [1] * 7


def test_epochs_differ() -> None:
    sampler = TrainingSampler([1] * 23, batch_size=23, rank=0, world_size=1, seed=1)
    first = list(sampler)
    assert first != [list(range(23))]  # shuffled
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
    with pytest.raises(UserError, match=r"manifest.json: no such file"):
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
    evaluation = EvaluationDataset(data.source, "oracle")
    with pytest.raises(UserError, match=rf"{label.name}: labels must be 0-18 or 255, got \[42\]; run pre_bdd100k"):
        evaluation[index]


def test_an_unlabelled_split_is_refused(npy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "test"
    shutil.copytree(npy / "val", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"labelled": False, "items": [{**item, "pixels": []} for item in manifest["items"]]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"{folder}: this split has no labels \(gts/\); give one that has"):
        NpyFolder(folder)


def test_a_file_that_changes_or_goes_after_the_check_is_named(tmp_path: Path) -> None:
    data = dataset(split_of(tmp_path, labels_of(1)))
    path, ran = tmp_path / "train" / "gts" / "0.npy", tmp_path / "ran"
    np.save(path, np.array([Payload(ran)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=rf"{path}: holds pickled objects, which are never loaded"):
        data[0]
    assert not ran.exists()
    np.load(path, allow_pickle=True)  # the payload is live: a reader that allows pickles runs it
    assert ran.exists()
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: no such file; run pre_bdd100k\.py again"):
        data[0]


@pytest.mark.parametrize("call", ["builtins.open", "numpy.load"])
def test_what_the_system_says_of_a_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    data = dataset(split_of(tmp_path, labels_of(1)))

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(UnreadableError) as error:
        patch.setattr(call, refuse)
        data[0]
    assert str(error.value) == f"{tmp_path / 'train' / 'gts' / '0.npy'}: cannot be read (Stale file handle)"


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_signal_to_all_of_a_job_leaves_the_loading_to_who_started_it(kind: str, npy: Path) -> None:
    class Signalled:
        def __getitem__(self, index: int) -> Any:
            for number in (signal.SIGINT, signal.SIGTERM) if get_worker_info() else ():
                os.kill(os.getpid(), number)
            return data[index]

        def __len__(self) -> int:
            return len(data)

        def num_prompts(self) -> list[int]:
            return [1] * len(data)

    options: dict[str, Any] = {"batch_size": 2, "num_workers": 1, "precision": Precision(torch.device("cpu"))}
    data: TrainingDataset | EvaluationDataset
    if kind == "training":
        data = dataset(npy)
        loader = training_loader(Signalled(), seed=0, grad_acc_steps=1, **options)  # type: ignore[arg-type]
    else:
        data = EvaluationDataset(NpyFolder(npy / "val"), "oracle")
        loader = evaluation_loader(Signalled(), **options)  # type: ignore[arg-type]
    assert len(list(loader)) == -(-len(data) // 2)


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_no_more_shared_memory_is_asked_for_than_there_are_batches(
    kind: str, npy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "utils.data.loaders.require_shared_memory", lambda size, workers, count: needed.append((size, count))
    )
    options: dict[str, Any] = {"batch_size": 2, "num_workers": 2, "precision": Precision(torch.device("cpu"))}
    data: TrainingDataset | EvaluationDataset
    if kind == "training":
        data = dataset(npy)
        training_loader(data, seed=0, grad_acc_steps=1, **options)
    else:
        data = EvaluationDataset(NpyFolder(npy / "val"), "oracle")
        evaluation_loader(data, **options)
    assert needed == [(2 * sample_bytes(data[0]), -(-len(data) // 2))]


def test_pixels_are_counted_for_each_class_of_a_longer_table(npy: Path) -> None:
    """The ids of the data's classes stay, but the table has one more class."""
    source = NpyFolder(npy / "val")
    counts = source.class_pixels().tolist()
    source.use_classes(ClassTable((*BDD100K.classes, SemanticClass(19, "tunnel", (1, 2, 3)))), match=True)
    assert source.class_pixels().tolist() == [*counts, 0]


def test_other_classes_change_labels_and_counts_alone(tmp_path: Path) -> None:
    labels = np.zeros((16, 16), np.uint8)  # road, 0
    labels[0, :4], labels[1, :7], labels[2, :2] = 13, 5, IGNORE_LABEL  # car; pole
    source = NpyFolder(write_split(tmp_path, {"x": (np.zeros((16, 16, 3), np.uint8), labels)}))
    digest, items = source.digest, source.items
    source.use_classes(BDD100K.select(["car", "road"], other=False))
    assert source.items[0].pixels == [4, 256 - 4 - 7 - 2] and source.items[0].ignored == 7 + 2
    assert np.array_equal(source.read_labels(0)[:3, 0], [0, IGNORE_LABEL, IGNORE_LABEL])
    assert source.digest == digest
    Image.fromarray(np.array([[13, 0, 5, IGNORE_LABEL]], np.uint8)).save(tmp_path / "mask.png")
    mask = source.read_original_mask(tmp_path / "mask.png", 1, 4)
    assert mask.tolist() == [[0, 1, IGNORE_LABEL, IGNORE_LABEL]]
    with pytest.raises(UserError, match="no labelled pixel of the classes sky"):
        source.use_classes(BDD100K.select(["sky"], other=False))
    source.use_classes(BDD100K)
    assert np.array_equal(source.read_labels(0), labels) and source.items == items


def test_validation_data_of_other_classes(tmp_path: Path) -> None:
    def table(names: str) -> ClassTable:
        return ClassTable(tuple(SemanticClass(i, name, (i, 0, 0)) for i, name in enumerate(names)))

    three, two = table("abc"), table("ab")
    items = {"x": (np.zeros((16, 16, 3), np.uint8), np.ones((16, 16), np.uint8))}
    source = NpyFolder(write_split(tmp_path / "train", items, three))
    other = write_split(tmp_path / "other", items, two)
    said = rf"{other}: has 2 classes \(a, b\), but the training data have 3 \(a, b, c\); preprocess both alike"
    with pytest.raises(UserError, match=said):
        validation_dataset(other, source, "semantic")
    source.use_classes(three.select(["b", "a"], other=False))
    with pytest.raises(UserError, match=said):
        validation_dataset(other, source, "semantic")
    assert validation_dataset(write_split(tmp_path / "val", items, three), source, "semantic")[0]["labels"].max() == 0
