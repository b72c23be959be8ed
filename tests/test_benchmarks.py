"""The speed benchmarks run on a tiny model, and their lines are consistent. No time is asserted."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    common,
    encoder,
    export,
    frames,
    gpu,
    inference,
    loading,
    preprocessing,
    public,
    semantic,
    training,
)
from segment_anything import build_sam_vit_tiny
from tests.helpers.scripts import TINY, lines_of
from utils.data.bdd100k import find_split
from utils.data.datasets import TrainingBatch

pytestmark = pytest.mark.slow


def test_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    float32, bf16 = lines_of(capsys, encoder, *TINY)
    assert float32["relative_error"] < 1e-5 and bf16["relative_error"] < 0.05
    assert float32["ratio"] == pytest.approx(float32["public_float32_s"] / float32["ours_s"], rel=1e-3)
    assert float32["public_float32_s"] == bf16["public_float32_s"]


def test_the_products_of_the_encoder() -> None:
    """Against the count that is known of vit_b at 1024, less the projections of what pads its windows, 70 x 70."""
    products = encoder.matrix_products("vit_b", 1024)
    padding = 8 * (70**2 - 64**2) * 4 * 768**2 * 2e-9
    assert encoder.gflop(products) == pytest.approx(972 - padding, rel=0.01)
    assert (300, 196, 64, 196) in products  # 25 windows of 12 heads


def test_export(capsys: pytest.CaptureFixture[str]) -> None:
    float32, int8 = lines_of(capsys, export, *TINY)
    assert float32["ratio"] == pytest.approx(float32["pytorch_s"] / float32["onnxruntime_s"], rel=1e-3)
    assert float32["share_of_other_pixels"] <= 1e-3
    assert int8["file_mb"] < 0.7 * float32["file_mb"]


def test_inference(capsys: pytest.CaptureFixture[str]) -> None:
    float32, bf16 = lines_of(capsys, inference, *TINY, "--classes", 3)
    assert float32["per_class_float32_s"] == bf16["per_class_float32_s"]


def test_loading(capsys: pytest.CaptureFixture[str]) -> None:
    check, load, again, epoch = lines_of(capsys, loading, *TINY, "--images", 3, "--batch_size", 2, "--num_workers", 0)
    assert 0 < check["gb"] < load["gb"]
    assert again["gb"] == load["gb"]
    for line in (check, load, again):
        assert line["ratio"] == pytest.approx(line["gb_per_s"] / line["plain_gb_per_s"], rel=1e-2)
    assert epoch["ratio"] == pytest.approx(epoch["samples_per_s"] / epoch["workers_samples_per_s"], rel=1e-2)


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    memory, *lines, classes = lines_of(capsys, training, *TINY, "--images", 2, "--batch_size", 2)
    assert memory["images"] == [2, 16]
    assert memory["ratio"] == pytest.approx(memory["peaks_mb"][1] / memory["peaks_mb"][0], rel=1e-3)
    assert len(lines) == 4  # an epoch and many of them, in float32 and in bf16
    for epoch, many in (lines[:2], lines[2:]):
        parts = epoch["split_s"]["cached"]
        assert list(parts) == ["data", "encoder", "decoder", "loss", "backward", "optimizer"]
        assert epoch["straightforward_step_s"] == lines[0]["straightforward_step_s"]
        # The sum that the ratio is computed from.
        ours = 2 * many["ours_s_an_image"]
        assert ours == pytest.approx(many["encoder_s"] + 100 * epoch["cached_step_s"], rel=0.01)
    assert classes["ratio"] == pytest.approx(classes["step_s"] / classes["one_class_step_s"], rel=1e-2)
    one, every = classes["peaks_mb"].values()
    assert every >= one == pytest.approx(memory["peaks_mb"][1], rel=1e-3)


@pytest.mark.parametrize("name", semantic.ROWS)
def test_each_row_of_the_semantic_benchmark_takes_a_step(name: str) -> None:
    row = semantic.ROWS[name]
    segmenter = row.build(build_sam_vit_tiny(image_size=(32, 48))).train()
    images, labels = torch.rand(2, 3, 32, 48), torch.arange(19, dtype=torch.uint8).repeat_interleave(81)[:1536]
    labels = labels.view(1, 32, 48).repeat(2, 1, 1)
    batch: TrainingBatch = {"labels": labels, "valid": torch.ones(2, dtype=torch.bool)}
    if segmenter.PROMPTS:
        batch |= semantic.random_boxes(labels, row.classes, np.random.default_rng(0))
    features = segmenter.inputs(images)
    losses = segmenter.losses(segmenter(features, *(batch[key] for key in segmenter.PROMPTS)), batch)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in segmenter.mask_decoder.parameters())


@torch.no_grad()
def test_the_control_of_pixels_alone_takes_nothing_of_the_encoder() -> None:
    segmenter = semantic.ROWS["pixels-alone"].build(build_sam_vit_tiny(image_size=64))
    images = torch.rand(1, 3, 64, 64)
    *encoded, pixels = segmenter.inputs(images)
    (masks,) = segmenter((*encoded, pixels))
    assert masks.equal(segmenter((*map(torch.randn_like, encoded), pixels))[0])
    assert not masks.equal(segmenter((*encoded, 1 - pixels))[0])


def test_the_frames_benchmark_wants_two_frames(error_of: Callable[..., str]) -> None:
    assert "both 64; give two frames" in error_of(frames, "--image_size", 64, "--against", 64)


def test_frames(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model_type", "vit_tiny", "--image_size", "32x64", "--against", 64, "--images", 2, "--repeats", 1]
    lines = lines_of(capsys, frames, *flags)
    assert len(lines) == 8 and all("vit_tiny at 32x64 against 64" in line["figure"] for line in lines)
    for line in lines:
        kind = "bytes" if "bytes" in line["figure"] else "s"
        assert line["ratio"] == pytest.approx(line[f"frame_{kind}"] / line[f"against_{kind}"], rel=1e-2)
    box = next(line for line in lines if line["figure"].startswith("cached bytes of an image, box mode"))
    assert box["against_bytes"] - box["frame_bytes"] == pytest.approx(128 * 8 * 2, abs=64)  # float16 of 8 tokens less


def test_copies_make_up_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = preprocessing.write_dataset
    small = {"height": 144, "width": 256, "num_workers": 1}
    monkeypatch.setattr(preprocessing, "write_dataset", lambda root, counts, seed: scenes(root, counts, seed, **small))
    monkeypatch.setattr(preprocessing, "DRAWN", 2)
    preprocessing.write_copies(tmp_path, 5)
    assert len(find_split(tmp_path, "train").items) == 5


def test_preprocessing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = preprocessing.write_dataset
    small = {"height": 144, "width": 256, "num_workers": 1}
    monkeypatch.setattr(preprocessing, "write_dataset", lambda root, counts, seed: scenes(root, counts, seed, **small))
    given: list[tuple[Any, ...]] = []
    written: list[dict[str, bytes]] = []

    def recorded(run: Callable[..., None], root: Path, output: Path, *rest: Any) -> None:
        run(root, output, *rest)
        given.append(rest)
        written.append({path.name + path.parent.name: path.read_bytes() for path in output.rglob("*.npy")})

    for name in ("run_script", "run_loop"):
        monkeypatch.setattr(preprocessing, name, partial(recorded, getattr(preprocessing, name)))
    flags = ["--images", 4, "--image_size", 64, "--image_dtype", "uint8", "--repeats", 1]
    (line,) = lines_of(capsys, preprocessing, *flags)
    size = line["disk_mb_per_s"] * line["split_s"]["writing the bytes"] * 1e6  # of what was written to measure the disk
    assert size == pytest.approx(4 * 64**2 * 4, rel=1e-2)
    settings = preprocessing.Settings(64, "uint8", "stretch")
    loop, two, one, unsynced = given
    assert (loop, two, one, unsynced) == (
        (settings, preprocessing.write),
        (2, settings),
        (1, settings),
        (settings, preprocessing.save),
    )
    split = line["split_s"]
    assert line["limit_s"] == pytest.approx(split["decoding, one process"] / 2 + split["writing the bytes"], rel=1e-2)
    assert len(written) == 4 and all(files == written[0] for files in written)
    assert sum(map(len, written[0].values())) == pytest.approx(size, rel=0.1)  # the rest are the headers
    for ratio, seconds in (("ratio", "loop_s"), ("unsynced_ratio", "unsynced_loop_s"), ("own_ratio", "one_process_s")):
        assert line[ratio] == pytest.approx(line[seconds] / line["two_processes_s"], rel=1e-2)


def test_gpu_says_that_it_needs_one(error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA card" in error_of(gpu)


def test_without_the_public_package_they_say_how_to_have_it(
    error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(common, "public_sam", public.public_sam.__wrapped__)  # which remembers no import
    monkeypatch.setattr(public, "OWN_FOLDER", Path("nowhere"))
    line = error_of(encoder, *TINY)
    assert "segment-anything==1.0, to compare with, is not installed; pip install --upgrade --no-deps --target" in line


def test_functions_are_measured_in_turn() -> None:
    calls: list[str] = []
    seconds = common.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b"] and seconds.keys() == {"a", "b"}
