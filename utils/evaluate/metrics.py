"""The metric: one confusion matrix over a whole data set, and pure functions from it to numbers and text.

It equals BDD100K's own (toolkit `bdd100k.eval.seg`; the tests compare with it). Unlabelled pixels are ignored. Pixels
predicted as no class are misses of their true class. mIoU is the mean over the classes in the ground truth. Counts are
summed over the data set before any division.

A class missing from the ground truth has no IoU: `nan` here and in print, `null` in JSON (the toolkit writes 0, and
ignores it in the mean, too). Pixels predicted as such a class are misses of their true classes.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

from utils.data.classes import CLASSES, IGNORE_LABEL, NUM_CLASSES

NO_CLASS = NUM_CLASSES  # column of the pixels predicted as no class
_COLUMNS = NUM_CLASSES + 1
# Further rows while counting: pixels to ignore, and invalid labels.
_IGNORED_ROW, _INVALID_ROW, _ROWS = NUM_CLASSES, NUM_CLASSES + 1, NUM_CLASSES + 2


class ConfusionMatrix:
    """Counts of (true class, predicted class) over any number of label maps.

    `matrix` is (19, 20) int64: a row for each true class, a column for each predicted class, and a last column for no
    class. It may be summed over processes in place.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(NUM_CLASSES, _COLUMNS, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one or more label maps; arguments and errors are those of `count_pixels`."""
        self.matrix += count_pixels(prediction, target).to(self.matrix.device)


def count_pixels(prediction: Tensor, target: Tensor) -> Tensor:
    """Count the pixels of one or more label maps: (19, 20) int64, as `ConfusionMatrix.matrix`.

    Args:
        prediction: (..., H, W), any integer type, on the device of `target`; a value outside 0-18 is no class.
        target: same shape; 0-18, and 255 for pixels to ignore.

    Raises:
        ValueError: shapes differ, a map is not of integers, or `target` holds another value.
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
    # Unlabelled pixels are counted in their own row: selecting the others would need a synchronisation.
    counts = torch.bincount((rows * _COLUMNS + columns).flatten(), minlength=_ROWS * _COLUMNS)
    counts = counts.view(_ROWS, _COLUMNS)
    if counts[_INVALID_ROW].any():
        wrong = target[~is_class & (target != IGNORE_LABEL)].unique()[:8].tolist()
        raise ValueError(f"target must be 0-{NUM_CLASSES - 1} or {IGNORE_LABEL}, got {wrong}")
    return counts[:NUM_CLASSES]


def _counts(matrix: Tensor) -> Tensor:
    """The matrix on the CPU in float64, which is exact up to 2^53."""
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
    """Share of each class's predicted pixels that are correct: (19, 20) -> (19,) float64, `nan` if there are none."""
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
    """Share of the labelled pixels that are predicted correctly; `nan` if nothing is labelled."""
    counts = _counts(matrix)
    return (counts.diagonal().sum() / counts.sum()).item()


def unclaimed_share(matrix: Tensor) -> float:
    """Share of the labelled pixels that are predicted as no class; `nan` if nothing is labelled."""
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
    """The text after the result block: pixels, precision and recall per class, and the source of the boxes.

    `box_source` is "oracle" for boxes from the ground truth, "none" without boxes; any other value is printed.
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
        f"{unclaimed_share(matrix):.2%} of them predicted as no class"
    )
    lines.append("mIoU is the mean over the classes in the ground truth; the others are nan")
    lines.append(describe_boxes(box_source))
    return "\n".join(lines)


def describe_boxes(box_source: str) -> str:
    """What the source of the boxes means for the figures, see `format_details`."""
    sources = {
        "oracle": "oracle boxes: taken from the ground truth; these figures are an upper bound, not the result from "
        "the image alone",
        "none": "no boxes: every map was predicted from the image alone",
    }
    return sources.get(box_source, f"boxes: {box_source}")


class ClassFigures(TypedDict):
    """The figures of one class; None is undefined."""

    id: int
    name: str
    iou: float | None
    precision: float | None
    recall: float | None
    gt_pixels: int
    predicted_pixels: int


class Figures(TypedDict):
    """All figures as plain values for strict JSON; None is undefined."""

    miou: float | None
    pixel_accuracy: float | None
    unclaimed_share: float | None
    labelled_pixels: int
    per_class: list[ClassFigures]
    confusion_matrix: list[list[int]]  # a row for each true class, a column for each predicted class
    unclaimed: list[int]  # pixels predicted as no class, for each true class


def results_dict(matrix: Tensor) -> Figures:
    """The figures of a confusion matrix, (19, 20)."""
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


class ImageFigures(TypedDict):
    """The figures of one image; None is undefined."""

    name: str
    miou: float | None  # over the classes in the image's ground truth
    pixel_accuracy: float | None
    iou: dict[str, float]  # of the classes in the image's ground truth, by name


def image_figures(name: str, matrix: Tensor) -> ImageFigures:
    """The figures of one image by its confusion matrix, (19, 20)."""
    ious = iou_per_class(matrix).tolist()
    return {
        "name": name,
        "miou": _number(mean_iou(matrix)),
        "pixel_accuracy": _number(pixel_accuracy(matrix)),
        "iou": {c.name: iou for c, iou in zip(CLASSES, ious) if not math.isnan(iou)},
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
