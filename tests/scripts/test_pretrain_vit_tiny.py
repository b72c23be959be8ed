"""tools/pretrain_vit_tiny.py: two steps write a file that loads, and bad flags are rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from segment_anything import build_sam_vit_tiny
from tests.helpers.inputs import write_split
from tests.helpers.scripts import run_script
from tools import pretrain_vit_tiny

pytestmark = pytest.mark.slow

FEW = ["--num_steps", 2, "--batch_size", 2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    labels = np.zeros((256, 256), dtype=np.uint8)
    labels[100:] = 13
    return write_split(tmp_path / "npy", {"a": (rng.integers(0, 256, (256, 256, 3), dtype=np.uint8), labels)})


def test_drawn_scenes_leave_a_file_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pretrain_vit_tiny, "usable_cores", lambda: 1
    )  # starting processes would take longer than it saves
    run_script(pretrain_vit_tiny, "--output", tmp_path / "sam.pth", "--num_scenes", 2, *FEW)
    build_sam_vit_tiny(tmp_path / "sam.pth")
    assert {value.dtype for value in torch.load(tmp_path / "sam.pth", weights_only=True).values()} == {torch.float16}


def test_a_split_leaves_a_file_that_loads(data: Path, tmp_path: Path) -> None:
    run_script(pretrain_vit_tiny, "--output", tmp_path / "new" / "sam.pth", "--data", data, *FEW)
    build_sam_vit_tiny(tmp_path / "new" / "sam.pth")


def test_an_output_that_cannot_be_is_told_before_the_work(tmp_path: Path, error_of: Callable[..., str]) -> None:
    (tmp_path / "file").touch()
    line = error_of(pretrain_vit_tiny, "--output", tmp_path / "file" / "sam.pth", "--num_steps", 10**6)
    assert f"{tmp_path}/file: cannot be created" in line and "--output" in line
    line = error_of(pretrain_vit_tiny, "--output", tmp_path, "--num_steps", 10**6)
    assert f"{tmp_path}: is a folder" in line


def test_data_of_another_frame(npy: Path, tmp_path: Path) -> None:
    run_script(pretrain_vit_tiny, "--output", tmp_path / "sam.pth", "--data", npy / "train", "--use_amp", *FEW)
    sam = build_sam_vit_tiny(tmp_path / "sam.pth", image_size=64)
    saved = torch.load(tmp_path / "sam.pth", weights_only=True)["image_encoder.pos_embed"]
    assert saved.shape == (1, 4, 4, 192)
    assert sam.image_encoder.pos_embed is not None and sam.image_encoder.pos_embed.equal(saved.float())


def test_a_frame_that_is_no_square(npy: Path, tmp_path: Path) -> None:
    """Initial weights may be those of a square. The saved file loads with the positions of training."""
    torch.save(build_sam_vit_tiny(image_size=512).state_dict(), tmp_path / "init.pth")
    flags = ["--image_size", "64x96", "--init", tmp_path / "init.pth", "--num_scenes", 2, "--num_steps", 1]
    trained = pretrain_vit_tiny.load_sam(tmp_path / "init.pth", "64x96")
    run_script(pretrain_vit_tiny, "--output", tmp_path / "sam.pth", *flags, "--batch_size", 1)
    sam = build_sam_vit_tiny(tmp_path / "sam.pth", image_size=(64, 96))
    assert sam.image_encoder.pos_embed is not None and sam.image_encoder.pos_embed.shape == (1, 4, 6, 192)
    assert sam.prompt_encoder.input_image_size == trained.prompt_encoder.input_image_size == (256, 256)


def test_a_frame_that_the_data_do_not_have(npy: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    flags = ["--output", tmp_path / "sam.pth", "--data", npy / "train", "--image_size", "64x96"]
    line = error_of(pretrain_vit_tiny, *flags, *FEW)
    assert "has image size 64; leave out --image_size 64x96" in line


def test_prompts_that_stand_for_nothing_weigh_nothing() -> None:
    instances = np.zeros((64, 64), dtype=np.uint16)
    instances[:20], instances[30:] = 1, 2
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    *_, boxes, valid = pretrain_vit_tiny.make_sample(image, instances, 4, np.random.default_rng(0))
    assert valid.tolist() == [True, True, False, False] and not boxes[2:].any()

    losses = {key: torch.tensor([[1.0, 2.0, 50.0, 50.0]]) for key in ("dice", "bce", "iou")}
    assert pretrain_vit_tiny.mean_loss(losses, torch.from_numpy(valid)[None]).item() == 4.5
    assert pretrain_vit_tiny.mean_loss(losses, torch.zeros(1, 4, dtype=torch.bool)).item() == 0
