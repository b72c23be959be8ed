"""utils/cache/resident.py and --cache_device: the batches of the loader, value for value, from memory."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train_bdd100k
from tests.helpers.inputs import write_split
from tests.helpers.scripts import run_script, training_flags
from utils.cache import resident
from utils.cache.reader import EmbeddingCache, entry_path
from utils.cache.resident import ResidentLoader, resident_loader
from utils.data.augment import View
from utils.data.datasets import (
    NpyFolder,
    TrainingDataset,
    TrainingSampler,
    collate_training,
    training_dataset,
)
from utils.data.loaders import Loader
from utils.model import checkpoint
from utils.runtime import distributed
from utils.runtime.device import Precision
from utils.runtime.errors import UserError

HEIGHT, WIDTH = 48, 64
CPU = torch.device("cpu")
ON_CPU = dict.fromkeys(("features", "image", "labels"), CPU)
Make = Callable[..., TrainingDataset]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that makes a training data set of seven images with stored features of random values."""

    def data_set(mode: str = "box", *, dtype: Any = np.uint8, **changed: Any) -> TrainingDataset:
        rng = np.random.default_rng(0)
        items = {}
        for i in range(8):
            labels = np.full((HEIGHT, WIDTH), 255, np.uint8)
            for class_id in rng.choice(19, size=i, replace=False):  # the first image has no label
                y, x = rng.integers(0, 30, size=2)
                labels[y : y + 16, x : x + 16] = class_id
            image = rng.integers(0, 256, size=(HEIGHT, WIDTH, 3)).astype(dtype)
            items[f"image{i}"] = (image if dtype == np.uint8 else image / dtype(255), labels)
        folder = tmp_path / "npy" / "train"
        if not folder.exists():
            write_split(folder, items)
        flags = {"classes_per_image": None, "bbox_shift": 20, "augment": "none", "num_views": 1, "seed": 3, **changed}
        dataset = training_dataset(NpyFolder(folder), mode, **flags)
        dataset.use(cached(tmp_path / "cache", dataset, mode), takes_pixels=mode == "semantic")
        return dataset

    return data_set


def cached(folder: Path, dataset: TrainingDataset, mode: str) -> EmbeddingCache:
    """A cache of random features, of the types that a mode stores."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    for item in dataset.source.items:
        tensors = {}
        for view in range(dataset.num_views):
            tensors[f"{view}.0"] = torch.randn(8, 3, 4).half()
            if mode == "semantic":
                tensors[f"{view}.1"] = torch.randint(256, (5, 3, 4, 2), dtype=torch.uint8)
                tensors[f"{view}.2"] = torch.randn(2, 5)
        save_file(tensors, entry_path(folder, item.name), {"binding": "it", "image_sha256": item.name})
    return EmbeddingCache(folder, [(item.name, item.name) for item in dataset.source.items], "it", None)


def sampler_of(dataset: TrainingDataset, rank: int = 0, world_size: int = 1, **changed: Any) -> TrainingSampler:
    layout = {"batch_size": 2, "grad_acc_steps": 2, "seed": 3, **changed}
    return TrainingSampler(dataset.num_prompts(), rank=rank, world_size=world_size, **layout)


def loaded(dataset: TrainingDataset, sampler: TrainingSampler) -> ResidentLoader:
    loader = ResidentLoader(dataset, sampler, CPU, ON_CPU)
    assert sum(loader.load()) == len(dataset)
    return loader


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal in keys and their order, types, dtypes, shapes and values."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs):
            assert_same(our, their)
    elif isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
        assert ours.is_contiguous() and torch.equal(ours, theirs)
    else:
        assert ours == theirs


DATA_SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "all boxes": ("box", {}),
    "two boxes": ("box", {"classes_per_image": 2}),
    "boxes, mirrored": ("box", {"augment": "flip", "num_views": 2, "bbox_shift": 0}),
    "boxes, cropped": ("box", {"augment": "full", "num_views": 5, "classes_per_image": 3}),
    "semantic": ("semantic", {}),
    "semantic, mirrored": ("semantic", {"augment": "flip", "num_views": 2}),
    "semantic, cropped": ("semantic", {"augment": "full", "num_views": 4, "seed": 2**40}),
}


@pytest.mark.parametrize("name", DATA_SETS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_batches_are_the_loaders(name: str, world_size: int, make: Make) -> None:
    mode, changed = DATA_SETS[name]
    dataset = make(mode, **changed)
    for rank in range(world_size):
        sampler = sampler_of(dataset, rank, world_size)
        ours = loaded(dataset, sampler)
        theirs = Loader(dataset, batch_sampler=sampler, collate_fn=collate_training)
        for epoch, first_step in ((0, 0), (1, 0), (5, 1)):  # the last as of a resumed run
            dataset.set_epoch(epoch)
            sampler.set_epoch(epoch, first_step=first_step)
            batches = list(zip(ours, theirs, strict=True))
            assert len(batches) == len(ours) == len(theirs) > 0
            for our, their in batches:
                assert_same(our, their)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_pixels_of_every_stored_type(dtype: Any, make: Make) -> None:
    dataset = make("semantic", dtype=dtype, augment="full", num_views=3)
    sampler = sampler_of(dataset)
    theirs = Loader(dataset, batch_sampler=sampler, collate_fn=collate_training)
    for our, their in zip(loaded(dataset, sampler), theirs, strict=True):
        assert_same(our, their)


def test_a_filler_counts_nothing(make: Make) -> None:
    dataset = make("box")
    sampler = sampler_of(dataset, rank=2, world_size=3, batch_size=4, grad_acc_steps=1)
    (batch,) = loaded(dataset, sampler)
    assert not batch["valid"].any() and len(batch["name"]) == 1


def test_it_is_read_in_parts_that_are_smaller_than_the_split(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make("semantic", augment="flip", num_views=2)
    sampler = sampler_of(dataset)
    whole = list(loaded(dataset, sampler))
    tensors = resident.view_tensors(dataset.read_view(0, 0, View())).values()
    size = sum(tensor.nbytes for part in tensors for tensor in part)
    monkeypatch.setattr(resident, "STAGED_BYTES", 2 * 3 * size)
    loader = ResidentLoader(dataset, sampler, CPU, ON_CPU)
    assert list(loader.load()) == [3, 3, 1]
    for our, their in zip(loader, whole, strict=True):
        assert_same(our, their)


def of_flag(where: str, dataset: TrainingDataset) -> ResidentLoader | None:
    return resident_loader(where, dataset, batch_size=2, seed=3, grad_acc_steps=1, precision=Precision(CPU))


def test_what_is_kept_is_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    loader = of_flag("cpu", make("semantic", augment="flip", num_views=2))
    assert loader and len(loader) == 4
    assert loader.batch_sampler.batch_size == 2 and loader.batch_sampler.seed == 3
    told = r"train: kept in memory: 0 MiB of features, 0 MiB of pixels, 0 MiB of labels on the host\n"
    assert re.search(told, capsys.readouterr().out)


def test_auto_keeps_nothing_without_a_card(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert of_flag("auto", make()) is None and of_flag("off", make()) is None
    assert not capsys.readouterr().out


def test_flags_that_cannot_be_followed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make()
    monkeypatch.setattr(resident, "available_memory", lambda: 2000)
    with pytest.raises(UserError, match=r"^--cache_device cpu: .* take 0 MiB .* the host has 0 MiB to spare; set"):
        of_flag("cpu", dataset)
    dataset.use(None, takes_pixels=False)
    assert of_flag("auto", dataset) is None
    with pytest.raises(UserError, match=r"no cached features; set --cache_embeddings to a folder, or --cache_device"):
        of_flag("cpu", dataset)


@pytest.mark.parametrize(
    ("where", "card", "host", "expected"),
    [
        ("auto", 60, 0, ["cuda", "cuda", "cuda"]),
        ("auto", 59, 100, ["cuda", "cuda", "cpu"]),
        ("auto", 35, 30, ["cuda", "cpu", "cuda"]),
        ("auto", 9, 60, ["cpu", "cpu", "cpu"]),
        ("auto", -1, 60, ["cpu", "cpu", "cpu"]),
        ("auto", 59, 9, None),
        ("cuda", 60, 0, ["cuda", "cuda", "cuda"]),
        ("cpu", 60, 60, ["cpu", "cpu", "cpu"]),
    ],
)
def test_each_part_goes_where_there_is_room(
    where: str, card: int, host: int, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_step = 1000 * resident.STEP_BYTES_PER_PIXEL + resident.SPARE_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (card + of_step, 1000 + of_step))
    monkeypatch.setattr(resident, "available_memory", lambda: math.ceil(host / resident.HOST_SHARE))
    sizes = {"features": 25, "image": 25, "labels": 10}
    places = resident._places(where, sizes, 1000, torch.device("cuda", 0))
    assert (places and [place.type for place in places.values()]) == expected


def test_a_full_card_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 8 * 2**30))
    monkeypatch.setattr(resident, "available_memory", lambda: 4 * 2**30)
    sizes, card = {"features": 9 * 2**30, "labels": 2**30}, torch.device("cuda", 0)
    with pytest.raises(UserError, match=r"cuda: the training data take 10.0 GiB of memory, but the card has 5.0 GiB"):
        resident._places("cuda", sizes, 0, card)
    assert resident._places("auto", sizes, 0, card) is None
    told = "but the card has 5.0 GiB and the host has 3.0 GiB to spare; they are read from the disk\n"
    assert capsys.readouterr().out.endswith(told)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("on_card", [(), ("features",), ("features", "labels"), ("features", "image", "labels")])
def test_the_batches_are_the_loaders_on_a_card(on_card: tuple[str, ...], make: Make) -> None:
    dataset = make("semantic", augment="full", num_views=3)
    sampler, card = sampler_of(dataset), torch.device("cuda", 0)
    ours = ResidentLoader(dataset, sampler, card, {**ON_CPU, **dict.fromkeys(on_card, card)})
    assert sum(ours.load()) == len(dataset)
    for our, their in zip(ours, Loader(dataset, batch_sampler=sampler, collate_fn=collate_training), strict=True):
        moved = {key: their[key].to(card) for key in ("valid", "labels", "image")}
        assert_same(our, {**their, **moved, "features": [feature.to(card) for feature in their["features"]]})


def test_a_process_needs_its_share_of_the_hosts_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make()
    needed = len(dataset) * (8 * 3 * 4 * 2 + HEIGHT * WIDTH)
    monkeypatch.setattr(resident, "available_memory", lambda: math.ceil(needed / resident.HOST_SHARE))
    assert of_flag("cpu", dataset)
    monkeypatch.setattr(distributed, "local_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"the host has 0 MiB to spare for each process"):
        of_flag("cpu", dataset)


def test_memory_that_the_system_does_not_give(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident.mmap, "mmap", raise_(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))))
    with pytest.raises(
        UserError, match=r"^no memory for the training data \(Cannot allocate memory\); set --cache_dev"
    ):
        of_flag("cpu", make())


def raise_(error: Exception) -> Callable[..., Any]:
    def function(*_: object) -> Any:
        raise error

    return function


def test_an_entry_that_is_damaged_in_use(make: Make) -> None:
    dataset = make()
    path = entry_path(dataset.cache.folder, "image5")  # type: ignore[union-attr]
    path.write_bytes(path.read_bytes()[:-100])
    threads = torch.get_num_threads()
    with pytest.raises(UserError, match=r"image5.safetensors: became unreadable while it was in use"):
        of_flag("cpu", dataset)
    assert torch.get_num_threads() == threads


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["box", "semantic"])
def test_a_run_is_the_same_from_memory(mode: str, npy: Path, sam_file: Path, tmp_path: Path) -> None:
    """Weights and losses are equal to the bit."""
    flags = ["--prompt_mode", mode, "--augment", "flip", "--cache_embeddings", tmp_path / "cache", "-batch_size", 2]
    flags += ["--grad_acc_steps", 1, "-lr", 1e-3, "-num_epochs", 3]
    runs = {}
    for where in ("off", "cpu"):
        work_dir = tmp_path / where
        run_script(train_bdd100k, *training_flags(npy / "train", sam_file, work_dir), *flags, "--cache_device", where)
        (folder,) = work_dir.iterdir()
        saved = checkpoint.load_checkpoint(folder / checkpoint.LATEST)
        runs[where] = saved["model"], [record["train_loss"] for record in saved["run_state"]["history"]]
    (theirs, their_losses), (ours, our_losses) = runs.values()
    assert our_losses == their_losses and len(our_losses) == 3
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
