"""Fixtures that several test modules share: a random SAM file and small preprocessed splits of drawn scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pre_bdd100k
from segment_anything import build_sam_vit_tiny
from utils.scenes import write_dataset

IMAGE_SIZE = 64


@pytest.fixture(scope="session")
def sam_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `vit_tiny` checkpoint of random weights at IMAGE_SIZE."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sam") / "sam_vit_tiny.pth"
    torch.save(build_sam_vit_tiny(image_size=IMAGE_SIZE).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes in BDD100K's layout: 7 to train on, 3 to validate."""
    root = tmp_path_factory.mktemp("scenes")
    write_dataset(root, {"train": 7, "val": 3}, seed=0, height=144, width=256)
    return root


@pytest.fixture(scope="session")
def npy(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scenes`, preprocessed at IMAGE_SIZE to uint8: npy / "train" and npy / "val"."""
    output = tmp_path_factory.mktemp("npy")
    arguments = ["--bdd100k_root", scenes, "--output_path", output, "--image_size", IMAGE_SIZE]
    parser = pre_bdd100k.get_args_parser()
    options = [*arguments, "--image_dtype", "uint8", "--num_workers", 1]
    assert not pre_bdd100k.main(parser.parse_args([str(option) for option in options]))
    return output
