"""On a card: the same figures as on the CPU, half precision, the cache, resuming, NCCL. Skipped where there is none."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import infer_bdd100k
import train_bdd100k
from benchmarks import common, gpu
from segment_anything.modeling import image_encoder
from tests.helpers.faults import free_port
from tests.helpers.oracles import relative_error
from tests.helpers.scripts import ONE_THREAD, TINY, good_flags, lines_of, log_of, read_results, run_script
from utils.model import checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NEEDS_BF16 = pytest.mark.skipif(  # of the 2080 Ti and its like
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="the card has no bf16"
)
REPOSITORY = Path(train_bdd100k.__file__).parent
MODES = ("box", "semantic")

Train = Callable[..., Path]
TrainByItself = Callable[..., tuple[Path, str]]


@pytest.fixture
def train_by_itself(sam_file: Path, npy: Path) -> TrainByItself:
    """A function that trains on the card in processes of their own, and returns the run's folder and what was said."""

    def train(work_dir: Path, *flags: object, launcher: tuple[object, ...] = ()) -> tuple[Path, str]:
        data = ["-i", npy / "train", "-model_type", "vit_tiny", "-checkpoint", sam_file, "-work_dir", work_dir]
        words = [sys.executable, *launcher, REPOSITORY / "train_bdd100k.py", *data, "-num_workers", 2, *flags]
        environment = {**os.environ, **ONE_THREAD, "NCCL_DEBUG": "VERSION"}
        done = subprocess.run(
            [str(word) for word in words], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        (folder,) = work_dir.iterdir()
        return folder, done.stdout + done.stderr

    return train


def weights(folder: Path) -> torch.Tensor:
    state = checkpoint.load_checkpoint(folder / checkpoint.LATEST)["model"]
    return torch.cat([value.flatten().double().cpu() for value in state.values()])


def assert_alike(run: Path, other: Path) -> None:
    """Epoch for epoch, but for how a card rounds: cuDNN convolves float32 as tf32, and some sums have no order."""
    for ours, theirs in zip(log_of(run), log_of(other), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=2e-3)
        assert ours["val_miou"] == pytest.approx(theirs["val_miou"], abs=2e-3)
        assert ours["optimizer_steps"] == theirs["optimizer_steps"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", ["off", "auto"])
def test_training_and_evaluating_as_on_a_cpu(
    mode: str, cache: str, train: Train, sam_file: Path, npy: Path, tmp_path: Path
) -> None:
    flags = ["--prompt_mode", mode, "-num_epochs", 2, "--val_npy_path", npy / "val", "--augment", "none"]
    runs = []
    for device in ("cuda", "cpu"):
        folder = "off" if cache == "off" else tmp_path / f"cache of {device}"
        own = ["--device", device, "--cache_embeddings", folder, "--cache_dtype", "float32", "-num_workers", 2]
        runs.append(train(tmp_path / f"work of {device}", *flags, *own))
    on_card, on_cpu = runs
    assert_alike(on_card, on_cpu)

    scores = []
    for device in ("cpu", "cuda"):
        flags = ["--model_checkpoint", on_cpu / checkpoint.LATEST, "--device", device, "--cache_embeddings", "off"]
        run_script(infer_bdd100k, *good_flags(sam_file, npy, tmp_path / device), *flags)
        scores.append(read_results(tmp_path / device / "out")["miou"])
    assert scores[1] == pytest.approx(scores[0], abs=2e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=NEEDS_BF16)])
def test_half_precision_is_near_float32(
    mode: str, dtype: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompt_mode", mode, "-num_epochs", 3, "--device", "cuda", "-batch_size", 2, "--grad_acc_steps", 1]
    # The scaler skips some steps, so the weights hardly move.
    flags += ["--augment", "none", "--cache_embeddings", "off", "-lr", 1e-7]
    exact = log_of(train(tmp_path / "float32", *flags))[-1]
    half = log_of(train(tmp_path / dtype, *flags, "-use_amp", "--amp_dtype", dtype))[-1]
    announced = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    assert f"on cuda, {announced}" in capsys.readouterr().out
    assert half["train_loss"] == pytest.approx(exact["train_loss"], rel=0.03)
    assert half["optimizer_steps"] + half["skipped_steps"] == exact["optimizer_steps"]


@pytest.mark.parametrize("mode", MODES)
def test_memory_of_the_card_or_the_host_changes_no_bit(
    mode: str, train_by_itself: TrainByItself, tmp_path: Path
) -> None:
    flags = ["--prompt_mode", mode, "--deterministic", "-batch_size", 2, "--augment", "full", "--cache_views", 3]
    flags += ["-num_epochs", 4, "--grad_acc_steps", 1, "--cache_embeddings", tmp_path / "cache", "-lr", 1e-3]
    expected, said = train_by_itself(tmp_path / "off", *flags, "--cache_device", "off")
    assert "kept in memory" not in said
    for where, told in (("cpu", "the host"), ("cuda", "the card"), ("auto", "the card")):
        folder, said = train_by_itself(tmp_path / where, *flags, "--cache_device", where)
        assert f"labels on {told}\n" in said
        assert torch.equal(weights(folder), weights(expected))


@pytest.mark.parametrize("mode", MODES)
def test_deterministic_runs_are_the_same_to_the_bit_resumed_or_not(
    mode: str, train_by_itself: TrainByItself, npy: Path, tmp_path: Path
) -> None:
    flags = ["--prompt_mode", mode, "--deterministic", "-use_amp", "--amp_dtype", "fp16", "-batch_size", 1]
    flags += ["--val_npy_path", npy / "val", "--lr_scheduler", "constant", "--warmup_epochs", 0, "--augment", "flip"]
    flags += ["--cache_embeddings", "off", "--grad_acc_steps", 1]
    first, _ = train_by_itself(tmp_path / "first", *flags, "-num_epochs", 2)
    second, _ = train_by_itself(tmp_path / "second", *flags, "-num_epochs", 1)
    train_by_itself(tmp_path / "second", *flags, "-num_epochs", 2, "--resume", second)
    assert torch.equal(weights(first), weights(second))
    assert all(record["optimizer_steps"] > 0 for record in log_of(first))


@pytest.mark.parametrize("cache", ["off", "auto"])
def test_one_process_of_nccl_is_one_without(
    cache: str, train: Train, train_by_itself: TrainByItself, npy: Path, tmp_path: Path
) -> None:
    flags = ["-num_epochs", 2, "--val_npy_path", npy / "val", "--device", "cuda", "--cache_embeddings"]
    folders = ("off", "off") if cache == "off" else (tmp_path / "cache of nccl", tmp_path / "cache of one")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=1", f"--master_port={free_port()}")
    launched, said = train_by_itself(tmp_path / "nccl", *flags, folders[0], "--distributed", launcher=launcher)
    assert "NCCL version" in said
    assert_alike(launched, train(tmp_path / "alone", *flags, folders[1]))


def test_a_card_that_is_really_full_is_told_in_one_line(
    sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        data = ["-i", npy / "train", "-model_type", "vit_tiny", "-checkpoint", sam_file, "-work_dir", tmp_path]
        line = error_of(train_bdd100k, *data, "--device", "cuda", "-num_epochs", 1, "--cache_embeddings", "off")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "the GPU's memory is full; lower -batch_size" in line


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.float16, 1e-2), pytest.param(torch.bfloat16, 5e-2, marks=NEEDS_BF16)],
)
def test_the_encoder_takes_a_fused_kernel_and_equals_the_public_one(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1024, where global blocks attend from 4,096 places to as many."""
    ours, public = common.build_pair("vit_tiny", 1024)
    images = torch.randn(2, 3, 1024, 1024)
    expected = public.cuda()(images.cuda())
    encoder = ours.image_encoder.cuda()
    assert image_encoder._has_triton(torch.device("cuda", 0)) or torch.cuda.get_device_capability() < (8, 0)
    # With this, PyTorch raises an error where it would have taken another kernel. Triton's is none of PyTorch's.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]), torch.autocast("cuda", dtype, dtype != torch.float32):
        actual = encoder(images.cuda())
        monkeypatch.setattr(image_encoder, "_has_triton", lambda device: False)
        without_triton = encoder(images.cuda())
    assert relative_error(without_triton.float().cpu(), expected.cpu()) < tolerance
    assert relative_error(actual.float().cpu(), expected.cpu()) < tolerance


@pytest.mark.parametrize("mode", MODES)
def test_the_benchmark(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        lines = lines_of(capsys, gpu, *TINY, "--prompt_mode", mode, "--memory_gb", 2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    uncached, *cached = (line for line in lines if "step_s" in line)
    assert uncached["ratio"] == 1 and len(cached) == 2
    for line in (uncached, *cached):
        assert line["ratio"] == pytest.approx(uncached["step_s"] / line["step_s"], rel=1e-3)
        assert line["kernels"] > 100 and 0 < line["kernel_s"] < 1
        assert 0 < line["peak_gpu_gb"]["allocated"] <= line["peak_gpu_gb"]["reserved"] <= line["cap_gb"] == 2
    encoders = [line for line in lines if "public_s" in line]
    assert encoders
    for line in encoders:
        assert line["ratio"] == pytest.approx(line["public_s"] / line["ours_s"], rel=1e-3)
