"""utils.data.frame: an image size as flags, manifests and checkpoints have it, and the frame that it means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from utils.data.frame import MAX_IMAGE_SIZE, frame_size, image_size_of, is_image_size


@pytest.mark.parametrize(
    ("image_size", "size"),
    [(512, (512, 512)), ("576x1024", (576, 1024)), ("1024x576", (1024, 576)), (MAX_IMAGE_SIZE, (4096, 4096))],
)
def test_an_image_size_is_a_frame_and_back(image_size: int | str, size: tuple[int, int]) -> None:
    assert is_image_size(image_size)
    assert frame_size(image_size) == size
    assert image_size_of(size) == image_size


def test_the_size_of_an_array() -> None:
    assert frame_size(np.zeros((3, 5)).shape) == (3, 5)
    assert image_size_of(np.zeros((3, 5)).shape) == "3x5"
    assert image_size_of(np.zeros((4, 4)).shape) == 4


BAD: list[Any] = [
    0,
    -16,
    4097,
    32.0,
    True,
    None,
    [32, 64],
    (32, 64),
    "",
    "32",
    "x",
    "32x",
    "x32",
    "32x64x3",
    "0x32",
    "32x0",
    "032x64",
    "32x64 ",
    "32x64\n",
    "-32x64",
    "4097x16",
    "16x5000",
    "32X64",
    "٣٢x64",
    "512x512",
]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_what_is_no_image_size(value: Any) -> None:
    """A square has one form alone, or the same data would count as data of two sizes."""
    assert not is_image_size(value)
