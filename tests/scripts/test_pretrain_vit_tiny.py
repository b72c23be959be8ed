"""tools/pretrain_vit_tiny.py: a few steps write a file that loads, a stopped run resumes, bad flags are rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segment_anything import build_sam_vit_tiny
from segment_anything.build_sam import fit_positions
from tests.helpers.inputs import write_split
from tests.helpers.scripts import run_script
from tools import pretrain_vit_tiny
from utils.data.boxes import mask_box
from utils.data.classes import IGNORE_LABEL
from utils.runtime.errors import UserError

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


def test_frames_take_turns_on_one_table_of_positions(tmp_path: Path) -> None:
    """The saved square fits every frame, and at those of training its positions are the trained ones."""
    torch.save(build_sam_vit_tiny(image_size=512).state_dict(), tmp_path / "init.pth")
    flags = ["--image_size", "64x288", 64, "--init", tmp_path / "init.pth", "--num_scenes", 2, "--device", "cpu"]
    run_script(pretrain_vit_tiny, "--output", tmp_path / "sam.pth", *flags, *FEW)
    table = torch.load(tmp_path / "sam.pth", weights_only=True)["image_encoder.pos_embed"]
    assert table.shape == (1, 18, 18, 192)
    assert table[:, :4].abs().min() > 0 and table[:, 4:].abs().max() > 0  # the first frame's, the second's
    for frame in ((64, 288), (64, 64), (96, 160)):
        sam = build_sam_vit_tiny(tmp_path / "sam.pth", image_size=frame)
        structure = build_sam_vit_tiny(image_size=frame)
        trained = fit_positions(structure, dict(build_sam_vit_tiny(tmp_path / "sam.pth", image_size=288).state_dict()))
        assert all(value.equal(trained[key]) for key, value in sam.state_dict().items())
        if frame != (96, 160):  # where the prompt encoder puts its coordinates
            assert sam.prompt_encoder.input_image_size == structure.prompt_encoder.input_image_size


@pytest.mark.parametrize("frames", [[(64, 64)], [(64, 96)], [(288, 512), (256, 256)], [(320, 192), (64, 64)]])
def test_prompts_have_the_same_coordinates_in_training_and_in_the_saved_file(
    frames: list[tuple[int, int]], tmp_path: Path
) -> None:
    side = pretrain_vit_tiny.square_side(frames)
    torch.save(pretrain_vit_tiny.load_sam(None, side).state_dict(), tmp_path / "sam.pth")
    for frame in frames:
        saved = build_sam_vit_tiny(tmp_path / "sam.pth", image_size=frame).prompt_encoder
        trained = build_sam_vit_tiny(image_size=frame).prompt_encoder
        assert saved.input_image_size == trained.input_image_size
        assert saved.get_dense_pe().shape == trained.get_dense_pe().shape


def test_a_stopped_run_resumes_exactly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    flags = ["--data", data, "--num_steps", 4, "--batch_size", 1, "--device", "cpu"]
    run_script(pretrain_vit_tiny, "--output", tmp_path / "whole.pth", *flags)

    monkeypatch.setattr(pretrain_vit_tiny, "SAVE_EVERY", 2)
    save_state = pretrain_vit_tiny.save_state

    def save_and_stop(*state: Any) -> None:
        save_state(*state)
        raise UserError("stopped")

    monkeypatch.setattr(pretrain_vit_tiny, "save_state", save_and_stop)
    assert "stopped" in error_of(pretrain_vit_tiny, "--output", tmp_path / "sam.pth", *flags)
    assert not (tmp_path / "sam.pth").exists()
    monkeypatch.setattr(pretrain_vit_tiny, "save_state", save_state)

    line = error_of(pretrain_vit_tiny, "--output", tmp_path / "sam.pth", *flags, "--lr", 1e-4)
    assert f"{tmp_path}/sam.pth.state: was saved with --lr 0.0008" in line
    run_script(pretrain_vit_tiny, "--output", tmp_path / "sam.pth", *flags)
    whole, resumed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pth", "sam.pth"))
    assert all(whole[key].equal(resumed[key]) for key in whole)
    assert [path.name for path in tmp_path.glob("*.state")] == []

    (tmp_path / "sam.pth.state").write_bytes(b"torn")
    line = error_of(pretrain_vit_tiny, "--output", tmp_path / "sam.pth", *flags)
    assert "sam.pth.state: not the state of a stopped run" in line and "delete the file" in line


def test_a_frame_that_the_data_do_not_have(npy: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    flags = ["--output", tmp_path / "sam.pth", "--data", npy / "train", "--image_size", "64x96"]
    line = error_of(pretrain_vit_tiny, *flags, *FEW)
    assert "has image size 64; leave out --image_size" in line


def test_prompts_that_stand_for_nothing_weigh_nothing() -> None:
    losses = {key: torch.tensor([[1.0, 2.0, 50.0, 50.0]]) for key in ("dice", "bce", "iou")}
    assert pretrain_vit_tiny.mean_loss(losses, torch.tensor([[True, True, False, False]])).item() == 4.5
    assert pretrain_vit_tiny.mean_loss(losses, torch.zeros(1, 4, dtype=torch.bool)).item() == 0


def test_a_batch_has_the_masks_of_its_boxes() -> None:
    """Objects or all of a kind, mirrored or not, at the pictures' size or another."""
    objects = np.zeros((64, 96), dtype=np.int16)
    objects[4:24, 2:22], objects[30:50, 40:80], objects[60:62, 90:93] = 1, 2, 3  # the last is below MIN_PIXELS
    labels = np.where(objects == 1, 13, np.where(objects > 1, 8, IGNORE_LABEL)).astype(np.uint8)
    image = np.repeat(np.uint8(objects * 50)[..., None], 3, axis=2)
    picture = pretrain_vit_tiny.make_picture(image, objects, labels)
    assert [sorted(boxes) for boxes in picture.boxes] == [[1, 2], [9, 14]]

    samples = pretrain_vit_tiny.Samples([picture], 4, torch.device("cpu"))
    mirrored, kinds = 0, 0
    for seed, frame in enumerate([(64, 96)] * 8 + [(64, 64)] * 8):
        images, labelled, boxes, valid = samples.batch(1, frame, np.random.default_rng(seed))
        assert images.shape == (1, 3, *frame) and labelled.shape == (1, *frame)
        assert valid.tolist() == [[True, True, False, False]]
        mirrored += int(images[0, 0, :, -frame[1] // 3 :].sum() > images[0, 0, :, : frame[1] // 3].sum())
        kinds += int((labelled == pretrain_vit_tiny.OTHER).sum() == 0)
        for prompt in range(2):
            tight = torch.from_numpy(mask_box((labelled[0] == prompt).numpy()))
            sides = (tight[2:] - tight[:2]).repeat(2)
            assert ((boxes[0, prompt] - tight).abs() <= sides / 10 + 1.5).all()
        assert (labelled == IGNORE_LABEL).sum() > 0
    assert 0 < mirrored < 16 and 0 < kinds < 16
