"""train_bdd100k.py --prompt_mode semantic: what it writes, that it learns, resuming, inference on its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import infer_bdd100k
import train_bdd100k
from segment_anything.build_sam import file_digest
from segment_anything.modeling import Sam
from tests.helpers.inputs import IMAGE_SIZE, write_split
from tests.helpers.scripts import good_flags, log_of, read_results, run_script
from tests.helpers.training import train as train_epoch
from utils.cache.writer import use_caches
from utils.data.classes import ClassTable
from utils.data.datasets import FILLER, EvaluationDataset, NpyFolder, SemanticDataset
from utils.model import checkpoint
from utils.model.checkpoint import ModelInfo
from utils.model.segmenter import SEGMENTERS, Segmenter, SemanticSegmenter, build_model
from utils.runtime.device import Precision

pytestmark = pytest.mark.slow

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def run(train: Train, npy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["--prompt_mode", "semantic", "-num_epochs", 2, "--val_npy_path", npy / "val", "-lr", "1e-3"]
    return train(tmp_path_factory.mktemp("semantic"), *flags)


def test_log_and_checkpoint(run: Path) -> None:
    for record in log_of(run):
        assert record["train_loss"] == pytest.approx(record["ce"] + record["dice"])
        assert record["val_miou"] > 0
    best = checkpoint.load_checkpoint(run / checkpoint.BEST)
    assert best["info"].prompt_mode == "semantic"
    assert all(key.startswith("mask_decoder.") for key in best["model"])


def test_inference_finds_what_validation_found(run: Path, sam_file: Path, npy: Path, tmp_path: Path) -> None:
    flags = ["--model_checkpoint", run / checkpoint.LATEST]
    run_script(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), *flags)
    assert read_results(tmp_path / "out")["miou"] == log_of(run)[-1]["val_miou"]


def test_resumed_equals_straight_bit_for_bit(train: Train, run: Path, npy: Path, tmp_path: Path) -> None:
    flags = ["--prompt_mode", "semantic", "--val_npy_path", npy / "val", "-lr", "1e-3"]
    folder = train(tmp_path, *flags, "-num_epochs", 1, "--lr_scheduler", "constant", "--warmup_epochs", 0)
    train(tmp_path, *flags, "-num_epochs", 2, "--lr_scheduler", "constant", "--warmup_epochs", 0, "--resume", folder)
    straight = train(
        tmp_path / "straight", *flags, "-num_epochs", 2, "--lr_scheduler", "constant", "--warmup_epochs", 0
    )
    resumed, unbroken = (checkpoint.load_checkpoint(f / checkpoint.LATEST)["model"] for f in (folder, straight))
    for key, value in unbroken.items():
        assert torch.equal(resumed[key], value), key


def test_a_run_of_an_earlier_version_is_resumed(train: Train, npy: Path, tmp_path: Path) -> None:
    """It does not name its loss, and a flag of box mode had another default."""
    flags = ["--prompt_mode", "semantic", "--val_npy_path", npy / "val", "--lr_scheduler", "constant"]
    folder = train(tmp_path, *flags, "-num_epochs", 1)
    state = torch.load(folder / checkpoint.LATEST, weights_only=True)
    del state["args"]["losses"]
    state["args"]["classes_per_image"] = 1
    torch.save(state, folder / checkpoint.LATEST)
    train(tmp_path, *flags, "-num_epochs", 2, "--resume", folder)
    assert len(log_of(folder)) == 2


class WithoutPixels(SemanticSegmenter):
    """Has an earlier decoder, without the detail path."""

    def __init__(self, sam: Sam, classes: ClassTable) -> None:
        super().__init__(sam, classes, pixel_channels=0)


def test_an_earlier_decoder_is_resumed_and_scored(
    train: Train, sam_file: Path, npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--prompt_mode", "semantic", "--val_npy_path", npy / "val", "--lr_scheduler", "constant"]
    with monkeypatch.context() as patch:
        patch.setitem(SEGMENTERS, "semantic", WithoutPixels)
        folder = train(tmp_path, *flags, "-num_epochs", 1)
    before = checkpoint.load_checkpoint(folder / checkpoint.LATEST)["model"]
    train(tmp_path, *flags, "-num_epochs", 2, "--resume", folder)
    after = checkpoint.load_checkpoint(folder / checkpoint.LATEST)["model"]
    assert before.keys() == after.keys() and not any("detail_path" in key for key in after)
    run_script(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), "--model_checkpoint", folder / checkpoint.LATEST)
    assert read_results(tmp_path / "out")["miou"] == log_of(folder)[-1]["val_miou"]


@pytest.mark.parametrize("prompt_mode", ["semantic", "box"])
def test_the_cache_spares_pixels_where_none_are_taken(
    prompt_mode: str, sam_file: Path, npy: Path, tmp_path: Path
) -> None:
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE, prompt_mode=prompt_mode)
    source = NpyFolder(npy / "val")
    info = ModelInfo("vit_tiny", source.image_size, source.resize_mode, file_digest(sam_file), prompt_mode)
    dataset = EvaluationDataset(source, "oracle" if prompt_mode == "box" else None)
    cpu = Precision(torch.device("cpu"))
    use_caches({dataset: 1}, model, info, cpu, where=str(tmp_path), dtype="float32", batch_size=1, num_workers=0)
    assert dataset.cache and ("image" in dataset[0]) == (prompt_mode == "semantic")


@pytest.mark.parametrize("prompt_mode", ["semantic", "box"])
def test_another_image_size_than_the_sam_files(prompt_mode: str, train: Train, sam_file: Path, tmp_path: Path) -> None:
    side = IMAGE_SIZE + 32
    rng = np.random.default_rng(0)
    items = {
        name: (rng.integers(0, 256, (side, side, 3), dtype=np.uint8), rng.integers(0, 3, (side, side), dtype=np.uint8))
        for name in "abc"
    }
    data = write_split(tmp_path / "npy" / "val", items)
    flags = ["-i", data, "--val_npy_path", data, "--prompt_mode", prompt_mode, "-num_epochs", 3]
    folder = train(tmp_path / "work", *flags, "--augment", "full", "--cache_views", 2)
    assert (tmp_path / "npy" / "embeddings").is_dir()  # sizes of what is cached follow the manifest too
    flags = ["--model_checkpoint", folder / checkpoint.LATEST]
    run_script(infer_bdd100k, *good_flags(sam_file, tmp_path / "npy", tmp_path), *flags)
    # Not to the bit: what validation read from the cache was reduced.
    assert read_results(tmp_path / "out")["miou"] == pytest.approx(log_of(folder)[-1]["val_miou"], abs=1e-3)


def test_resuming_in_another_mode_names_it(
    run: Path, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    flags = ["-i", npy / "train", "-model_type", "vit_tiny", "-checkpoint", sam_file, "-work_dir", tmp_path]
    flags += ["--device", "cpu", "--resume", run, "-num_epochs", 3]
    line = error_of(train_bdd100k, *flags, "--prompt_mode", "box")
    assert line.endswith("--prompt_mode is box, but the run has semantic. Use the run's values, or start a new run")


def test_it_learns_two_scenes_by_heart(train: Train, sam_file: Path, tmp_path: Path) -> None:
    # The long form, 8 drawn scenes to a mIoU above 0.85, takes minutes: docs/RESULTS.md.
    rng = np.random.default_rng(0)
    items = {}
    for name in ("a", "b"):
        labels = np.full((IMAGE_SIZE, IMAGE_SIZE), 10, np.uint8)  # sky over road, with a car and a tree in it
        labels[IMAGE_SIZE // 2 :] = 0
        x = int(rng.integers(4, 40))
        labels[36:48, x : x + 16] = 13
        labels[8:40, 60 - x : 64 - x // 2] = 8
        labels[:3] = 255
        colors = rng.integers(0, 256, (256, 3), dtype=np.uint8)
        items[name] = (colors[labels], labels)
    data = write_split(tmp_path / "data", items)
    flags = ["-i", data, "--val_npy_path", data, "--val_every", 60, "-num_epochs", 60, "-lr", "2e-3"]
    flags += ["--augment", "flip", "--warmup_epochs", 2, "-weight_decay", 0]
    folder = train(tmp_path / "work", "--prompt_mode", "semantic", *flags)
    assert log_of(folder)[-1]["val_miou"] > 0.85


def test_any_layout_of_a_batch_takes_the_same_step(sam_file: Path, npy: Path) -> None:
    def flat(model: Segmenter) -> torch.Tensor:
        return torch.cat([p.detach().flatten().double() for p in model.mask_decoder.parameters()])

    data = SemanticDataset(NpyFolder(npy / "train"), seed=0)
    layouts = [[[0, 1, 2]], [[0], [1], [2]], [[0, 1], [2]], [[0, 1], [2], [FILLER]]]
    ends = []
    for layout in layouts:
        torch.manual_seed(0)
        model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE, prompt_mode="semantic")
        start = flat(model)
        loader = [default_collate([data[i] for i in batch]) for batch in layout]
        train_epoch(model, loader, grad_acc_steps=len(layout))
        ends.append(flat(model))
    for end in ends[1:]:
        assert (end - ends[0]).norm() < 1e-5 * (ends[0] - start).norm()
