"""Boxes around masks, the prompts of SAM's mask decoder.

A box is `(x_min, y_min, x_max, y_max)` in pixels of the network's H x W frame, x to the right and y down, with
**inclusive** corners inside the image: `0 <= x_min <= x_max <= W - 1`, the same for y. A box around a single pixel has
equal corners and a side of 1.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from utils.data.classes import IGNORE_LABEL
from utils.data.frame import ImageSize, frame_size
from utils.data.geometry import fitted_size

_INVALID_BIT = 31


@cache
def _class_bits(first: int, last: int, num_classes: int) -> np.ndarray:
    """(256,) uint32: each label as a set of the classes `first` to `last`; a bitwise OR is their union."""
    bits = np.zeros(256, dtype=np.uint32)
    bits[num_classes:IGNORE_LABEL] = 1 << _INVALID_BIT
    bits[first : last + 1] = 1 << np.arange(last + 1 - first, dtype=np.uint32)
    return bits


def class_boxes(labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The tight box of every class in a label map.

    Args:
        labels: (H, W) uint8, ids below `num_classes` and 255 = not labelled.

    Returns:
        The K class ids in ascending order, (K,) int64, and their boxes, (K, 4) int64. K is 0 if nothing is labelled.

    Raises:
        ValueError: `labels` is not an (H, W) uint8 array, or holds a value that is neither a class nor 255.
    """
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError(f"labels must be (H, W) uint8, got {labels.shape} {labels.dtype}")
    found = [
        _boxes_of(labels, first, min(first + _INVALID_BIT, num_classes) - 1, num_classes)
        for first in range(0, num_classes, _INVALID_BIT)
    ]
    class_ids, boxes = (np.concatenate(parts) for parts in zip(*found))
    return class_ids, boxes


def _boxes_of(labels: np.ndarray, first: int, last: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """`class_boxes` of the classes `first` to `last`, as many as fit into the bits of a number."""
    # One pass instead of one for each class: each row and each column becomes the set of its classes.
    bits = _class_bits(first, last, num_classes)
    pixel_sets = bits.take(labels, mode="wrap")  # H x W; no label is out of bounds, and wrapping is fastest
    in_row = np.bitwise_or.reduce(pixel_sets, axis=1)  # H
    in_column = np.bitwise_or.reduce(pixel_sets, axis=0)  # W
    union = int(np.bitwise_or.reduce(in_row))
    if union >> _INVALID_BIT:
        wrong = [int(v) for v in np.unique(labels) if v >= num_classes and v != IGNORE_LABEL]
        raise ValueError(f"labels must be 0-{num_classes - 1} or {IGNORE_LABEL}, got {wrong}")
    present = np.array([k for k in range(last + 1 - first) if union >> k & 1], dtype=np.int64)
    x_min, x_max = _extent(in_column, present)
    y_min, y_max = _extent(in_row, present)
    return first + present, np.stack([x_min, y_min, x_max, y_max], axis=1)


def _extent(sets: np.ndarray, class_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last position of each class along an axis: `sets` (N,) uint32 -> two (K,) int64."""
    present = (sets[None, :] >> class_ids[:, None].astype(np.uint32)) & 1  # K x N
    return present.argmax(axis=1), len(sets) - 1 - present[:, ::-1].argmax(axis=1)


def mask_box(mask: np.ndarray) -> np.ndarray:
    """The tight box of one mask: (H, W) bool -> (4,) int64.

    Raises:
        ValueError: the mask is empty, or is not an (H, W) bool array.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"a mask must be (H, W) bool, got {mask.shape} {mask.dtype}")
    xs = np.flatnonzero(mask.any(axis=0))
    ys = np.flatnonzero(mask.any(axis=1))
    if not xs.size:
        raise ValueError("an empty mask has no box")
    return np.array([xs[0], ys[0], xs[-1], ys[-1]], dtype=np.int64)


def to_frame(boxes: np.ndarray, height: int, width: int, image_size: ImageSize, resize_mode: str) -> np.ndarray:
    """Map boxes of an original image to the frame, as `utils.data.geometry` maps the image.

    Corners move like pixel centres. The result is within 0.5 + |1 - scale| / 2 pixels of the tight box of the resized
    mask.

    Args:
        boxes: (K, 4) xyxy in pixels of the original image, inclusive corners, integers or not; min <= max.

    Returns:
        (K, 4) float32, clipped to the picture without its padding; min <= max on both axes. A box outside the picture
        becomes a line on its border.

    Raises:
        ValueError: unknown `resize_mode`.
    """
    fitted_height, fitted_width = fitted_size(height, width, image_size, resize_mode)
    fitted = np.array([fitted_width, fitted_height] * 2)
    mapped = (boxes + 0.5) * fitted / np.array([width, height] * 2) - 0.5  # K x 4
    return np.clip(mapped, 0, fitted - 1).astype(np.float32)


def jitter_boxes(boxes: np.ndarray, image_size: ImageSize, max_shift: int, rng: np.random.Generator) -> np.ndarray:
    """Shift each coordinate of each box by a random integer, as boxes drawn by people are loose.

    The shift is uniform in [-m, m], where m is the smaller of `max_shift` and a tenth of the box's side along that axis
    (rounded half up). SAM was trained with similar noise (Kirillov et al. 2023, appendix A: standard deviation 10 % of
    the side, at most 20 pixels). A shift of 20 pixels regardless of the side would move a pole out of its own box.

    Args:
        boxes: (K, 4), integers inside the image.
        image_size: of the frame; the result is clipped to its pixels.
        max_shift: the largest shift in pixels; 0 returns the boxes unchanged.
        rng: the source of randomness.

    Returns:
        (K, 4) of the dtype of `boxes`; min <= max on both axes.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.int64) + 1  # K x 2
    # At most (side + 5) // 10 at either end, so that the two ends of a side cannot cross.
    limit = np.minimum(max_shift, (sides + 5) // 10)[:, [0, 1, 0, 1]]  # K x 4
    shifts = rng.integers(-limit, limit, endpoint=True)
    height, width = frame_size(image_size)
    return np.clip(boxes + shifts, 0, np.array([width - 1, height - 1] * 2)).astype(boxes.dtype)
