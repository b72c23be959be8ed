"""Checkpoints as safetensors: everything that reads a best checkpoint reads them, damaged ones are rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import infer_bdd100k
import train_bdd100k
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.scripts import good_flags, read_results, run_script
from utils import ckpt_convert
from utils.export import __main__ as export
from utils.model.checkpoint import BEST, load_checkpoint
from utils.runtime.errors import UserError


@pytest.fixture(scope="module")
def best(sam_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / BEST, sam_file, "box")


@pytest.fixture
def written(best: Path, sam_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "decoder.safetensors"
    source = ["--model_checkpoint", best.parent, "--sam_checkpoint", sam_file]
    run_script(export, *source, "--format", "safetensors", "--output", path)
    return path


def test_it_holds_what_the_checkpoint_holds(best: Path, written: Path) -> None:
    expected, state = load_checkpoint(best), load_checkpoint(written)
    tensors, others = state.pop("model"), expected.pop("model")  # type: ignore[misc]
    assert state == expected and state["args"] == {"lr": 1e-4, "resume": None}
    assert tensors.keys() == others.keys() == load_file(written).keys()
    assert all(torch.equal(value, others[key]) for key, value in tensors.items())


def test_a_frame_that_is_no_square(sam_file: Path, tmp_path: Path) -> None:
    wide = write_checkpoint(tmp_path / "wide.pth", sam_file, "semantic", "32x64", "pad")
    flags = ["--sam_checkpoint", sam_file, "--format", "safetensors", "--output", tmp_path / "wide.safetensors"]
    run_script(export, "--model_checkpoint", wide, *flags)
    assert load_checkpoint(tmp_path / "wide.safetensors")["info"] == load_checkpoint(wide)["info"]


@pytest.mark.slow
def test_the_scripts_take_it(best: Path, written: Path, sam_file: Path, npy: Path, tmp_path: Path) -> None:
    for name, path in (("a", best), ("b", written)):
        flags = good_flags(sam_file, npy, tmp_path)
        run_script(infer_bdd100k, *flags, "--model_checkpoint", path, "--output_dir", tmp_path / name)
        flags = ["--sam_checkpoint", sam_file, "--output", tmp_path / f"{name}.pth"]
        run_script(ckpt_convert, "--model_checkpoint", path, *flags)
    results = [read_results(tmp_path / name) for name in "ab"]
    assert results[0].pop("model") != results[1].pop("model") and results[0] == results[1]
    one, other = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in "ab")
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_given_to_the_wrong_flag(
    written: Path, best: Path, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    flags = ["--model_checkpoint", best, "--sam_checkpoint", written, "--output", tmp_path / "out.pth"]
    assert f"{written}: not a SAM state dict, but a fine-tuned decoder" in error_of(ckpt_convert, *flags)
    assert f"{written}: holds no state to resume from" in error_of(train_bdd100k, "--resume", written)
    sam = tmp_path / "sam.safetensors"
    save_file(torch.load(sam_file, weights_only=True), sam)
    flags = [*good_flags(sam_file, npy, tmp_path), "--model_checkpoint", sam]
    assert f"{sam}: not a checkpoint of train_bdd100k.py" in error_of(infer_bdd100k, *flags)


def test_damage_is_found(written: Path) -> None:
    content = written.read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    values = [header.index(text) for text in (b"stretch", b"vit_tiny", b"val_miou", b"0.25", b"128, 64")]  # of metadata
    values.append(header.index(b"metadata_sha256"))  # damaged, its name must not look like a file of before
    for at in (9, 2000, *values, len(content) // 2, len(content) - 1):  # in the header and in the weights
        written.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(UserError, match=rf"{written}: (truncated, or )?not a checkpoint of train_bdd100k\.py"):
            load_checkpoint(written)
    for length in (9, 2000, len(content) // 2, len(content) - 1):
        written.write_bytes(content[:length])
        with pytest.raises(UserError, match=rf"{written}: truncated, or not a checkpoint of train_bdd100k\.py"):
            load_checkpoint(written)


def test_a_name_of_another_kind(best: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    flags = ["--sam_checkpoint", sam_file, "--format", "safetensors", "--output", tmp_path / "x.pth"]
    assert "give --output x.pth.safetensors" in error_of(export, "--model_checkpoint", best, *flags)


def test_a_file_of_before_its_metadata_had_a_checksum(best: Path, written: Path) -> None:
    with safe_open(written, "pt") as file:
        metadata = file.metadata()
    del metadata["metadata_sha256"]
    save_file(load_file(written), written, metadata)
    assert load_checkpoint(written)["info"] == load_checkpoint(best)["info"]
