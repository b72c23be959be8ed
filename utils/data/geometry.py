"""The frame that images and masks are resized to, and the way back to the original size.

`stretch` resizes both sides to the frame's. `pad` keeps the aspect ratio: the picture fills the frame on one axis, and
the rest is padded at the bottom or the right, as SAM does. Everything here follows one convention: a pixel is a small
square and its value sits at its centre (OpenCV's default for images, `align_corners=False` in PyTorch), so that image,
mask and prediction never drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from utils.data.classes import IGNORE_LABEL
from utils.data.frame import ImageSize, Size, frame_size
from utils.data.manifest import RESIZE_MODES

if TYPE_CHECKING:
    import torch

# SAM pads with zeros *after* subtracting its pixel mean. Here the model normalises what it is given, padding included,
# so the padding has to hold that mean, (123.675, 116.28, 103.53), for the frozen encoder to see the zeros it knows.
PAD_COLOR = (124, 116, 104)  # RGB


def fitted_size(height: int, width: int, image_size: ImageSize | Sequence[int], resize_mode: str) -> Size:
    """The (height, width) that a picture takes up in the frame; the rest of the frame is padding.

    Raises:
        ValueError: unknown `resize_mode`.
    """
    rows, columns = frame_size(image_size)
    if resize_mode == "stretch":
        return rows, columns
    if resize_mode == "pad":
        scale = min(rows / height, columns / width)
        # Rounded as SAM rounds; a picture of extreme shape still keeps one pixel.
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    raise ValueError(f"resize_mode must be one of {RESIZE_MODES}, got {resize_mode!r}")


def pixels_in_box(box: Sequence[float], size: tuple[int, int], fitted: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of a picture whose centres lie in a box of the frame; at least one of each.

    Args:
        box: xyxy in pixels of the frame, inclusive corners, inside the picture.
        size: (height, width) of the picture.
        fitted: (height, width) that the picture takes up in the frame (`fitted_size`).
    """
    slices = []
    for first, last, side, fitted_side in zip((box[1], box[0]), (box[3], box[2]), size, fitted):
        scale = side / fitted_side  # pixels of the picture in one of the frame, which reaches from n to n + 1
        start = min(max(0, math.ceil(first * scale - 0.5)), side - 1)
        slices.append(slice(start, max(start + 1, math.ceil((last + 1) * scale - 0.5))))
    return slices[0], slices[1]


def resize_image(image: np.ndarray, image_size: ImageSize, resize_mode: str) -> np.ndarray:
    """Bring an RGB image, (height, width, 3) uint8, into the frame: (H, W, 3) uint8."""
    height, width = fitted_size(image.shape[0], image.shape[1], image_size, resize_mode)
    # Area averaging keeps thin things (poles, lane marks) when shrinking, but is no interpolation when a side grows.
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    frame = np.empty((*frame_size(image_size), 3), dtype=np.uint8)
    frame[:height, :width] = resized
    frame[height:] = frame[:, width:] = PAD_COLOR  # painting all of it would take longer than all the rest
    return frame


def resize_mask(mask: np.ndarray, image_size: ImageSize, resize_mode: str) -> np.ndarray:
    """Bring a mask of labels, (height, width) uint8, into the frame: (H, W) uint8, no new labels, the padding 255."""
    height, width = fitted_size(mask.shape[0], mask.shape[1], image_size, resize_mode)
    frame = np.full(frame_size(image_size), IGNORE_LABEL, dtype=np.uint8)
    # INTER_NEAREST takes the upper left of the candidates, half a pixel off from how the image is sampled.
    frame[:height, :width] = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return frame


def unframe(
    image: np.ndarray, mask: np.ndarray, height: int, width: int, resize_mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """Bring an image and a mask of the frame back to the original size, to be looked at.

    Args:
        image: (H, W, 3), uint8, or floating in [0, 1].
        mask: (H, W) uint8.

    Returns:
        (height, width, 3) uint8 and (height, width) uint8.
    """
    if image.dtype != np.uint8:
        image = (image.astype(np.float32) * 255).round().astype(np.uint8)
    rows, columns = fitted_size(height, width, mask.shape, resize_mode)
    size = (width, height)
    return (
        cv2.resize(image[:rows, :columns], size, interpolation=cv2.INTER_LINEAR),
        cv2.resize(mask[:rows, :columns], size, interpolation=cv2.INTER_NEAREST_EXACT),
    )


def restore(logits: torch.Tensor, height: int, width: int, resize_mode: str) -> torch.Tensor:
    """Bring logits of the frame back to the original size of the picture, for an argmax or a threshold there.

    Args:
        logits: (..., H, W) floating point, over the whole frame at its full size (upsample what the mask decoder gives
            first). Any number of leading dimensions.

    Returns:
        (..., height, width), of the same dtype; bilinear. The padding is cropped before resizing, so none of it is
        mixed into the picture's border.

    Raises:
        ValueError: `resize_mode` is unknown.
    """
    import torch.nn.functional as F  # here, not above: preprocessing's worker processes need no torch

    *leading, rows, columns = logits.shape
    fitted_height, fitted_width = fitted_size(height, width, (rows, columns), resize_mode)
    cropped = logits[..., :fitted_height, :fitted_width]
    planes = cropped.reshape(-1, 1, fitted_height, fitted_width)  # ... x h x w  ->  N x 1 x h x w
    resized = F.interpolate(planes, size=(height, width), mode="bilinear", align_corners=False)
    return resized.reshape(*leading, height, width)
