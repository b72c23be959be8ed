"""Helpers for generating masks without prompts: point grids, crops, run lengths, and tables of masks.

Boxes are xyxy in pixels with inclusive corners. A run-length encoding (RLE) is COCO's uncompressed one,
`{"size": [H, W], "counts": [...]}`: lengths of alternating runs of False and True, down the columns, False first.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import ItemsView, Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segment_anything.modeling.common import ArgumentError

Column = Tensor | np.ndarray | list[Any]


class Rle(TypedDict):
    """An uncompressed run-length encoding."""

    size: list[int]  # [H, W]
    counts: list[int]


class MaskData:
    """A table: named columns of equal length, one row per mask. A column is a tensor, an array or a list."""

    def __init__(self, **kwargs: Column) -> None:
        self._stats: dict[str, Any] = {}
        for name, column in kwargs.items():
            self[name] = column

    def __setitem__(self, key: str, item: Column) -> None:
        if not isinstance(item, Tensor | np.ndarray | list):
            raise ArgumentError(f"{key} must be a tensor, an array or a list, got {type(item).__name__}")
        self._stats[key] = item

    def __delitem__(self, key: str) -> None:
        del self._stats[key]

    def __getitem__(self, key: str) -> Any:
        return self._stats[key]

    def items(self) -> ItemsView[str, Any]:
        return self._stats.items()

    def filter(self, keep: Tensor) -> None:
        """Keep the rows that `keep` selects, a boolean mask or indices. Indices also set the order."""
        rows = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
        on_cpu = rows.cpu()
        for key, column in self._stats.items():
            if isinstance(column, Tensor):
                self._stats[key] = column[rows.to(column.device)]
            elif isinstance(column, np.ndarray):
                self._stats[key] = column[on_cpu.numpy()]
            else:
                self._stats[key] = [column[row] for row in on_cpu.tolist()]

    def cat(self, new_stats: MaskData) -> None:
        """Append the rows of `new_stats`. New columns are copied."""
        for key, column in new_stats.items():
            if key not in self._stats:
                self._stats[key] = copy.deepcopy(column)
            elif isinstance(column, Tensor):
                self._stats[key] = torch.cat([self._stats[key], column])
            elif isinstance(column, np.ndarray):
                self._stats[key] = np.concatenate([self._stats[key], column])
            else:
                self._stats[key] = self._stats[key] + copy.deepcopy(column)

    def to_numpy(self) -> None:
        """Turn the tensors into arrays."""
        for key, column in self._stats.items():
            if isinstance(column, Tensor):
                self._stats[key] = column.detach().cpu().numpy()


# --- Points and crops


def build_point_grid(n_per_side: int) -> np.ndarray:
    """The centres of n x n equal cells of the unit square, row by row, n^2 x 2 (x, y) float64."""
    margin = 1 / (2 * n_per_side)
    ticks = np.linspace(margin, 1 - margin, n_per_side)
    return np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)


def build_all_layer_point_grids(n_per_side: int, n_layers: int, scale_per_layer: int) -> list[np.ndarray]:
    """A grid for the whole image and one for each layer of crops, each `scale_per_layer` times coarser."""
    return [build_point_grid(int(n_per_side / scale_per_layer**layer)) for layer in range(n_layers + 1)]


def generate_crop_boxes(
    im_size: tuple[int, ...], n_layers: int, overlap_ratio: float
) -> tuple[list[list[int]], list[int]]:
    """The whole image, then layers of 2 x 2, 4 x 4, ... overlapping crops, each layer column by column.

    Args:
        im_size: (H, W) of the image.
        overlap_ratio: overlap in the first layer over the image's shorter side; it halves from layer to layer.

    Returns:
        The boxes, xyxy with exclusive lower right corners, and the layer of each.
    """
    height, width = im_size
    boxes, layers = [[0, 0, width, height]], [0]
    for layer in range(1, n_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / per_side))
        crop_width, crop_height = (
            math.ceil((overlap * (per_side - 1) + length) / per_side) for length in (width, height)
        )
        for column, row in itertools.product(range(per_side), repeat=2):
            x, y = column * (crop_width - overlap), row * (crop_height - overlap)
            boxes.append([x, y, min(x + crop_width, width), min(y + crop_height, height)])
            layers.append(layer)
    return boxes, layers


def uncrop_boxes_xyxy(boxes: Tensor, crop_box: Sequence[int]) -> Tensor:
    """Boxes of a crop, ... x 4, as boxes of the image."""
    return boxes + torch.tensor([*crop_box[:2], *crop_box[:2]], device=boxes.device)


def uncrop_points(points: Tensor, crop_box: Sequence[int]) -> Tensor:
    """Points of a crop, ... x 2 (x, y), as points of the image."""
    return points + torch.as_tensor(crop_box[:2], device=points.device)


def uncrop_masks(masks: Tensor, crop_box: Sequence[int], orig_h: int, orig_w: int) -> Tensor:
    """Masks of a crop, ... x h x w, as masks of the image, ... x `orig_h` x `orig_w`: False outside the crop."""
    x0, y0, x1, y1 = crop_box
    if (x0, y0, x1, y1) == (0, 0, orig_w, orig_h):
        return masks
    return F.pad(masks, (x0, orig_w - x1, y0, orig_h - y1), value=0)


def is_box_near_crop_edge(
    boxes: Tensor, crop_box: Sequence[int], orig_box: Sequence[int], atol: float = 20.0
) -> Tensor:
    """Tell which boxes, N x 4 in the crop, are within `atol` pixels of a crop edge that is not an image edge."""
    in_image = uncrop_boxes_xyxy(boxes, crop_box).float()
    to_crop, to_image = ((in_image - torch.as_tensor(box, device=boxes.device)).abs() for box in (crop_box, orig_box))
    return ((to_crop <= atol) & (to_image > atol)).any(dim=1)


def box_xyxy_to_xywh(box_xyxy: Any) -> Any:
    """A copy of one box as (x, y, width, height)."""
    box = copy.deepcopy(box_xyxy)
    for low, high in ((0, 2), (1, 3)):
        box[high] = box[high] - box[low]
    return box


def batch_iterator(batch_size: int, *args: Any) -> Iterator[list[Any]]:
    """Slices of at most `batch_size` of each argument; all have one length."""
    if not args or any(len(arg) != len(args[0]) for arg in args):
        raise ArgumentError(f"batches need arguments of one length, got {[len(arg) for arg in args]}")
    for start in range(0, len(args[0]), batch_size):
        yield [arg[start : start + batch_size] for arg in args]


# --- Masks


def calculate_stability_score(masks: Tensor, mask_threshold: float, threshold_offset: float) -> Tensor:
    """IoU of each mask at a higher and a lower threshold: ... x H x W logits -> ... float32, NaN if both are empty.

    The mask at the higher threshold lies within the other, so the IoU is the ratio of their areas.
    """
    # int32 holds any area, takes half the memory of int64, and ONNX can sum it.
    inner, outer = (
        (masks > mask_threshold + offset).sum(dim=(-2, -1), dtype=torch.int32)
        for offset in (threshold_offset, -threshold_offset)
    )
    return inner / outer


def batched_mask_to_box(masks: Tensor) -> Tensor:
    """The boxes of boolean masks, ... x H x W -> ... x 4 int64; [0, 0, 0, 0] for an empty one."""
    lows, highs = [], []
    for across in (-2, -1):  # columns that hold anything, then rows
        occupied = masks.any(dim=across)
        length = occupied.shape[-1]
        index = torch.arange(length, device=masks.device)
        lows.append(torch.where(occupied, index, length).amin(dim=-1))
        highs.append(torch.where(occupied, index, -1).amax(dim=-1))
    boxes = torch.stack(lows + highs, dim=-1)
    return torch.where(boxes[..., 2:3] < 0, 0, boxes)


def mask_to_rle_pytorch(tensor: Tensor) -> list[Rle]:
    """Boolean masks, N x H x W -> the RLE of each."""
    _, height, width = tensor.shape
    encoded: list[Rle] = []
    # One at a time: CUDA cannot list the changes of more than 2^31 pixels at once.
    for mask in tensor:
        pixels = F.pad(mask.T.flatten(), (1, 0))  # False first: its run has length 0 if the mask begins with True
        starts = (pixels[1:] != pixels[:-1]).nonzero().flatten().tolist()
        counts = np.diff([0, *starts, height * width]).tolist()
        encoded.append({"size": [height, width], "counts": counts})
    return encoded


def rle_to_mask(rle: Rle) -> np.ndarray:
    """An RLE -> H x W bool."""
    height, width = rle["size"]
    counts = rle["counts"]
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def area_from_rle(rle: Rle) -> int:
    """The number of pixels of the mask."""
    return sum(rle["counts"][1::2])


def coco_encode_rle(uncompressed_rle: Rle) -> dict[str, list[int] | str]:
    """An RLE with its counts compressed to COCO's string.

    Raises:
        ImportError: pycocotools is not installed.
    """
    from pycocotools import mask as coco

    encoded = coco.frPyObjects(uncompressed_rle, *uncompressed_rle["size"])
    return {**encoded, "counts": encoded["counts"].decode()}  # JSON holds no bytes


def remove_small_regions(mask: np.ndarray, area_thresh: float, mode: str) -> tuple[np.ndarray, bool]:
    """Fill the holes ("holes") or remove the parts ("islands") of a mask that are smaller than `area_thresh` pixels.

    Pixels that touch at a corner are connected. A mask with only small parts keeps the largest.

    Args:
        mask: H x W bool.

    Returns:
        The mask, and whether it was changed.
    """
    import cv2  # only this function needs it

    if mode not in ("holes", "islands"):
        raise ArgumentError(f"mode must be holes or islands, got {mode!r}")
    parts = ~mask if mode == "holes" else mask
    _, labels, stats, _ = cv2.connectedComponentsWithStats(parts.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    small = areas < area_thresh
    small[0] = False  # the rest of the picture
    if not small.any():
        return mask, False
    if mode == "holes":
        return mask | small[labels], True
    kept = ~small
    kept[0] = False
    if not kept.any():
        kept[1 + areas[1:].argmax()] = True
    return kept[labels], True
