"""The metric: one confusion matrix over a whole data set, and pure functions from it to numbers and text.

It is BDD100K's own (toolkit `bdd100k.eval.seg`; the tests compare with it): pixels that the ground truth leaves
unlabelled are left out, pixels that no class claims are misses of their true class, and mIoU is the mean over the
classes that occur in the ground truth. Counts are summed over the data set before anything is divided.

A class that the ground truth lacks has no IoU: `nan` here and in print, `null` in JSON (the toolkit writes 0 and leaves
it out of the mean as well). Where it was predicted all the same, those pixels are misses of their true classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from utils.data.classes import CLASSES, IGNORE_LABEL, NUM_CLASSES

NO_CLASS = NUM_CLASSES  # column of the pixels that no class claims
_COLUMNS = NUM_CLASSES + 1
# Rows that exist only while counting: what to leave out, and what to complain about.
_IGNORED_ROW, _INVALID_ROW, _ROWS = NUM_CLASSES, NUM_CLASSES + 1, NUM_CLASSES + 2


class ConfusionMatrix:
    """Counts of (true class, predicted class) over any number of label maps.

    `matrix` is (19, 20) int64: a row per true class, a column per predicted class, and a last column for pixels that no
    class claims. Being plain counts, it may be summed over processes in place.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(NUM_CLASSES, _COLUMNS, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one or more label maps.

        Args:
            prediction: (..., H, W), any integer type, on the device of `target`; a value outside 0-18 is no class.
            target: same shape; 0-18, and 255 for pixels to leave out.

        Raises:
            ValueError: shapes differ, a map is not of integers, or `target` holds another value; nothing is counted.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
        for name, labels in (("prediction", prediction), ("target", target)):
            if labels.is_floating_point() or labels.dtype == torch.bool:
                raise ValueError(f"{name} must hold integers, got {labels.dtype}")
        prediction, target = prediction.long(), target.long()  # in int8, -1 would equal 255
        is_class = (target >= 0) & (target < NUM_CLASSES)
        rows = torch.where(is_class, target, torch.where(target == IGNORE_LABEL, _IGNORED_ROW, _INVALID_ROW))
        columns = torch.where((prediction >= 0) & (prediction < NUM_CLASSES), prediction, NO_CLASS)
        # Unlabelled pixels get a row of their own, instead of being selected away, so that every shape stays known.
        counts = torch.bincount((rows * _COLUMNS + columns).flatten(), minlength=_ROWS * _COLUMNS)
        counts = counts.view(_ROWS, _COLUMNS)
        if counts[_INVALID_ROW].any():
            wrong = target[~is_class & (target != IGNORE_LABEL)].unique()[:8].tolist()
            raise ValueError(f"target must be 0-{NUM_CLASSES - 1} or {IGNORE_LABEL}, got {wrong}")
        self.matrix += counts[:NUM_CLASSES].to(self.matrix.device)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add another's counts to this one's."""
        self.matrix += other.matrix.to(self.matrix.device)


def _counts(matrix: Tensor) -> Tensor:
    """The matrix on the CPU in float64, in which pixel counts are exact up to 2^53."""
    if matrix.shape != (NUM_CLASSES, _COLUMNS):
        raise ValueError(f"a confusion matrix is ({NUM_CLASSES}, {_COLUMNS}), got {tuple(matrix.shape)}")
    return matrix.cpu().double()


def target_pixels(matrix: Tensor) -> Tensor:
    """Labelled pixels of each true class: (19, 20) -> (19,) int64."""
    return matrix.cpu().sum(dim=1)


def predicted_pixels(matrix: Tensor) -> Tensor:
    """Labelled pixels that were predicted as each class: (19, 20) -> (19,) int64."""
    return matrix.cpu()[:, :NUM_CLASSES].sum(dim=0)


def iou_per_class(matrix: Tensor) -> Tensor:
    """Intersection over union: (19, 20) -> (19,) float64, `nan` for classes that the ground truth lacks."""
    counts = _counts(matrix)
    hits, truth = counts.diagonal(), counts.sum(dim=1)
    union = truth + counts[:, :NUM_CLASSES].sum(dim=0) - hits
    return torch.where(truth > 0, hits / union, torch.nan)


def precision_per_class(matrix: Tensor) -> Tensor:
    """Share of each class's predicted pixels that are right: (19, 20) -> (19,) float64, `nan` if there are none."""
    counts = _counts(matrix)
    return counts.diagonal() / counts[:, :NUM_CLASSES].sum(dim=0)  # 0 / 0 is nan


def recall_per_class(matrix: Tensor) -> Tensor:
    """Share of each class's true pixels that were found: (19, 20) -> (19,) float64, `nan` if there are none."""
    counts = _counts(matrix)
    return counts.diagonal() / counts.sum(dim=1)


def mean_iou(matrix: Tensor) -> float:
    """mIoU: the mean IoU of the classes that occur in the ground truth; `nan` if nothing is labelled."""
    return iou_per_class(matrix).nanmean().item()


def pixel_accuracy(matrix: Tensor) -> float:
    """Share of the labelled pixels that were given their true class; `nan` if nothing is labelled."""
    counts = _counts(matrix)
    return (counts.diagonal().sum() / counts.sum()).item()


def unclaimed_share(matrix: Tensor) -> float:
    """Share of the labelled pixels that no class claimed; `nan` if nothing is labelled."""
    counts = _counts(matrix)
    return (counts[:, NO_CLASS].sum() / counts.sum()).item()


def format_report(matrix: Tensor) -> str:
    """The result block of the specification: mIoU and the IoU of each class. No newline at its end."""
    ious = iou_per_class(matrix).tolist()
    return "\n".join(
        [
            "评估结果",
            "=" * 60,
            f"整体 mIoU: {mean_iou(matrix):.4f}",
            "",
            "每个类别的 IoU:",
            "-" * 60,
            *(f"{c.id:2d}. {c.name:<20}: {iou:.4f}" for c, iou in zip(CLASSES, ious)),
            "=" * 60,
        ]
    )


def format_details(matrix: Tensor, box_source: str) -> str:
    """What an honest reader needs beside the block: pixels, precision and recall per class, and how boxes were made.

    `box_source` is `"oracle"` where the boxes were taken from the ground truth, `"none"` where there were none;
    anything else is printed as it is.
    """
    truth, precision, recall = target_pixels(matrix), precision_per_class(matrix), recall_per_class(matrix)
    total = int(truth.sum())
    lines = [f"{'class':<24}{'gt pixels':>14}{'share':>9}{'precision':>11}{'recall':>9}"]
    for c in CLASSES:
        pixels = int(truth[c.id])
        share = pixels / total if total else math.nan
        lines.append(f"{c.id:2d}. {c.name:<20}{pixels:>14d}{share:>9.2%}{precision[c.id]:>11.4f}{recall[c.id]:>9.4f}")
    lines.append(
        f"pixel accuracy: {pixel_accuracy(matrix):.4f} of {total} labelled pixels; "
        f"{unclaimed_share(matrix):.2%} of them were claimed by no class"
    )
    lines.append("mIoU is the mean over the classes that occur in the ground truth; the others are nan")
    if box_source == "oracle":
        lines.append(
            "oracle boxes: every class box was taken from the ground truth; these figures are an upper bound, "
            "not what the model reaches from the image alone"
        )
    elif box_source == "none":
        lines.append("no boxes: every map was made from the image alone")
    else:
        lines.append(f"boxes: {box_source}")
    return "\n".join(lines)


def results_dict(matrix: Tensor) -> dict[str, Any]:
    """Every figure as plain numbers, lists and dicts, strict JSON: what is undefined is None.

    `confusion_matrix` has a row per true and a column per predicted class; `unclaimed` is the column of no class, so
    that a class's row and its entry there sum to its `gt_pixels`.
    """
    truth, predicted = target_pixels(matrix).tolist(), predicted_pixels(matrix).tolist()
    columns = [f(matrix).tolist() for f in (iou_per_class, precision_per_class, recall_per_class)]
    return {
        "miou": _number(mean_iou(matrix)),
        "pixel_accuracy": _number(pixel_accuracy(matrix)),
        "unclaimed_share": _number(unclaimed_share(matrix)),
        "labelled_pixels": sum(truth),
        "per_class": [
            {
                "id": c.id,
                "name": c.name,
                "iou": _number(iou),
                "precision": _number(precision),
                "recall": _number(recall),
                "gt_pixels": truth[c.id],
                "predicted_pixels": predicted[c.id],
            }
            for c, iou, precision, recall in zip(CLASSES, *columns)
        ],
        "confusion_matrix": matrix[:, :NUM_CLASSES].tolist(),
        "unclaimed": matrix[:, NO_CLASS].tolist(),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
