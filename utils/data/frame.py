"""The size of the frame that images and masks are resized to.

An image size is a side in pixels, such as 1024, for a square frame, or "HxW", such as "576x1024". Flags, manifests,
checkpoints, caches and messages all use this form.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from utils.runtime.cli import number

ImageSize = int | str
Size = tuple[int, int]  # (height, width) in pixels

MAX_IMAGE_SIZE = 4096  # four times SAM's own, a limit for the memory that a file can claim


def frame_size(image_size: ImageSize | Sequence[int]) -> Size:
    """The (height, width) of an image size; a (height, width) is returned as it is."""
    if isinstance(image_size, int):
        return image_size, image_size
    if isinstance(image_size, str):
        image_size = [int(side) for side in image_size.split("x")]
    height, width = image_size
    return height, width


def image_size_of(size: Size) -> ImageSize:
    """The image size of a frame of (height, width)."""
    height, width = size
    return height if height == width else f"{height}x{width}"


def is_image_size(value: Any) -> bool:
    """Whether it is a valid image size. Models also need multiples of 16."""
    if isinstance(value, str) and not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", value, re.ASCII):
        return False
    if type(value) not in (int, str):
        return False
    size = frame_size(value)
    return image_size_of(size) == value and all(0 < side <= MAX_IMAGE_SIZE for side in size)


def image_size(text: str) -> ImageSize:
    """Parse a side length in pixels, or HEIGHTxWIDTH; see `side_length`."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(sides):
        raise argparse.ArgumentTypeError(f"expected a side such as 1024, or HxW such as 576x1024, got {text!r}")
    return image_size_of((side_length(sides[0]), side_length(sides[-1])))


def side_length(text: str) -> int:
    """Parse a side length in pixels: a positive multiple of 16, the patch size of SAM's encoder, up to 4096."""
    value = number(int, 1, maximum=MAX_IMAGE_SIZE)(text)
    if value % 16:
        lower = max(16, value // 16 * 16)
        raise argparse.ArgumentTypeError(
            f"must be a multiple of 16, the encoder's patch size (such as {lower} or {lower + 16}), got {value}"
        )
    return value
