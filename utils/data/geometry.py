"""Resizing images and masks to the frame, and predictions back to the original size.

`stretch` resizes both sides to the frame's. `pad` keeps the aspect ratio: the picture fills the frame on one axis, and
the rest is padded at the bottom or the right, as in SAM. One convention holds throughout, so that image, mask and
prediction align: a pixel's value is at its centre (OpenCV's default for images, `align_corners=False` in PyTorch).
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

# SAM pads with zeros *after* subtracting its pixel mean. Here the model normalises the padding, too, so the padding is
# that mean, (123.675, 116.28, 103.53), and becomes the zeros that the frozen encoder was trained with.
PAD_COLOR = (124, 116, 104)  # RGB


def fitted_size(height: int, width: int, image_size: ImageSize | Sequence[int], resize_mode: str) -> Size:
    """The (height, width) of a picture in the frame; the rest of the frame is padding.

    Raises:
        ValueError: unknown `resize_mode`.
    """
    rows, columns = frame_size(image_size)
    if resize_mode == "stretch":
        return rows, columns
    if resize_mode == "pad":
        scale = min(rows / height, columns / width)
        # Rounded as in SAM; a picture of extreme shape keeps one pixel.
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    raise ValueError(f"resize_mode must be one of {RESIZE_MODES}, got {resize_mode!r}")


def pixels_in_box(box: Sequence[float], size: tuple[int, int], fitted: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of a picture with their centres in a box of the frame; at least one of each.

    Args:
        box: xyxy in pixels of the frame, inclusive corners, inside the picture.
        size: (height, width) of the picture.
        fitted: (height, width) of the picture in the frame (`fitted_size`).
    """
    slices = []
    for first, last, side, fitted_side in zip((box[1], box[0]), (box[3], box[2]), size, fitted):
        scale = side / fitted_side  # pixels of the picture in a pixel of the frame
        start = min(max(0, math.ceil(first * scale - 0.5)), side - 1)
        slices.append(slice(start, max(start + 1, math.ceil((last + 1) * scale - 0.5))))
    return slices[0], slices[1]


def resize_image(image: np.ndarray, image_size: ImageSize | Sequence[int], resize_mode: str) -> np.ndarray:
    """Resize an RGB image, (height, width, 3) uint8, to the frame: (H, W, 3) uint8."""
    height, width = fitted_size(image.shape[0], image.shape[1], image_size, resize_mode)
    # Area averaging keeps thin objects (poles, lane marks) when shrinking, but does not interpolate when a side grows.
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    frame = np.empty((*frame_size(image_size), 3), dtype=np.uint8)
    frame[:height, :width] = resized
    frame[height:] = frame[:, width:] = PAD_COLOR  # only the padding: filling all of it takes longer
    return frame


def resize_mask(mask: np.ndarray, image_size: ImageSize | Sequence[int], resize_mode: str) -> np.ndarray:
    """Resize a mask, (height, width) uint8, to the frame: (H, W) uint8, nearest label, padding 255."""
    height, width = fitted_size(mask.shape[0], mask.shape[1], image_size, resize_mode)
    frame = np.full(frame_size(image_size), IGNORE_LABEL, dtype=np.uint8)
    # INTER_NEAREST would be half a pixel off from the image.
    frame[:height, :width] = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return frame


def to_bytes(image: np.ndarray) -> np.ndarray:
    """A stored image as uint8, for display: floating point in [0, 1] is scaled; what is not finite becomes black."""
    if image.dtype == np.uint8:
        return image
    return np.nan_to_num(image.astype(np.float32) * 255, posinf=0, neginf=0).round().clip(0, 255).astype(np.uint8)


def unframe(
    image: np.ndarray, mask: np.ndarray, height: int, width: int, resize_mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image and a mask of the frame back to the original size, for display.

    Args:
        image: (H, W, 3), uint8, or floating point in [0, 1].
        mask: (H, W) uint8.

    Returns:
        (height, width, 3) uint8 and (height, width) uint8.
    """
    rows, columns = fitted_size(height, width, mask.shape, resize_mode)
    size = (width, height)
    return (
        cv2.resize(to_bytes(image[:rows, :columns]), size, interpolation=cv2.INTER_LINEAR),
        cv2.resize(mask[:rows, :columns], size, interpolation=cv2.INTER_NEAREST_EXACT),
    )


def restore(logits: torch.Tensor, height: int, width: int, resize_mode: str) -> torch.Tensor:
    """Resize logits of the frame to the original size of the picture.

    Args:
        logits: (..., H, W) floating point at the frame's full size (upsample those of the mask decoder first).

    Returns:
        (..., height, width) of the same dtype, bilinear. The padding is cropped first, so that it does not mix into the
        picture's border.

    Raises:
        ValueError: `resize_mode` is unknown.
    """
    import torch.nn.functional as F  # preprocessing's worker processes need no torch

    *leading, rows, columns = logits.shape
    fitted_height, fitted_width = fitted_size(height, width, (rows, columns), resize_mode)
    cropped = logits[..., :fitted_height, :fitted_width]
    planes = cropped.reshape(-1, 1, fitted_height, fitted_width)  # ... x h x w  ->  N x 1 x h x w
    resized = F.interpolate(planes, size=(height, width), mode="bilinear", align_corners=False)
    return resized.reshape(*leading, height, width)
