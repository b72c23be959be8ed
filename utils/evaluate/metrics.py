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

from utils.data.classes import IGNORE_LABEL, ClassTable
from utils.runtime.text import class_column, display_width, pad


class ConfusionMatrix:
    """Counts of (true class, predicted class) over any number of label maps.

    `matrix` is (N, N + 1) int64 for N classes: a row for each true class, a column for each predicted class, and a last
    column for no class. It may be summed over processes in place.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one or more label maps; arguments and errors are those of `count_pixels`."""
        self.matrix += count_pixels(prediction, target, len(self.matrix)).to(self.matrix.device)


def count_pixels(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of one or more label maps: (N, N + 1) int64 for N classes, as `ConfusionMatrix.matrix`.

    Args:
        prediction: (..., H, W), any integer type, on the device of `target`; a value outside 0 to N - 1 is no class.
        target: same shape; 0 to N - 1, and 255 for pixels to ignore.

    Raises:
        ValueError: shapes differ, a map is not of integers, or `target` holds another value.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    for name, labels in (("prediction", prediction), ("target", target)):
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"{name} must hold integers, got {labels.dtype}")
    prediction, target = prediction.long(), target.long()  # in int8, -1 would equal 255
    no_class = num_classes  # the last column
    ignored_row, invalid_row = num_classes, num_classes + 1  # further rows while counting
    is_class = (target >= 0) & (target < num_classes)
    rows = torch.where(is_class, target, torch.where(target == IGNORE_LABEL, ignored_row, invalid_row))
    columns = torch.where((prediction >= 0) & (prediction < num_classes), prediction, no_class)
    # Unlabelled pixels are counted in their own row: selecting the others would need a synchronisation.
    shape = num_classes + 2, num_classes + 1
    counts = torch.bincount((rows * shape[1] + columns).flatten(), minlength=shape[0] * shape[1]).view(shape)
    if counts[invalid_row].any():
        wrong = target[~is_class & (target != IGNORE_LABEL)].unique()[:8].tolist()
        raise ValueError(f"target must be 0-{num_classes - 1} or {IGNORE_LABEL}, got {wrong}")
    return counts[:num_classes]


def _counts(matrix: Tensor) -> Tensor:
    """The matrix on the CPU in float64, which is exact up to 2^53."""
    number = len(matrix)
    if matrix.shape != (number, number + 1):
        raise ValueError(f"a confusion matrix is ({number}, {number + 1}), got {tuple(matrix.shape)}")
    return matrix.cpu().double()


def target_pixels(matrix: Tensor) -> Tensor:
    """Labelled pixels of each true class: (N, N + 1) -> (N,) int64."""
    return matrix.cpu().sum(dim=1)


def predicted_pixels(matrix: Tensor) -> Tensor:
    """Labelled pixels that were predicted as each class: (N, N + 1) -> (N,) int64."""
    return matrix.cpu()[:, :-1].sum(dim=0)


def iou_per_class(matrix: Tensor) -> Tensor:
    """Intersection over union: (N, N + 1) -> (N,) float64, `nan` for classes that the ground truth lacks."""
    counts = _counts(matrix)
    hits, truth = counts.diagonal(), counts.sum(dim=1)
    union = truth + counts[:, :-1].sum(dim=0) - hits
    return torch.where(truth > 0, hits / union, torch.nan)


def precision_per_class(matrix: Tensor) -> Tensor:
    """Share of each class's predicted pixels that are correct: (N, N + 1) -> (N,) float64, `nan` if there are none."""
    counts = _counts(matrix)
    return counts.diagonal() / counts[:, :-1].sum(dim=0)  # 0 / 0 is nan


def recall_per_class(matrix: Tensor) -> Tensor:
    """Share of each class's true pixels that were found: (N, N + 1) -> (N,) float64, `nan` if there are none."""
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
    return (counts[:, -1].sum() / counts.sum()).item()


def format_report(matrix: Tensor, classes: ClassTable) -> str:
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
            *(f"{label}: {iou:.4f}" for label, iou in zip(class_column(classes.names), ious, strict=True)),
            "=" * 60,
        ]
    )


def format_details(matrix: Tensor, box_source: str, classes: ClassTable) -> str:
    """The text after the result block: pixels, precision and recall per class, and the source of the boxes.

    `box_source` is "oracle" for boxes from the ground truth, "none" without boxes; any other value is printed.
    """
    truth, precision, recall = target_pixels(matrix), precision_per_class(matrix), recall_per_class(matrix)
    total = int(truth.sum())
    labels = class_column(classes.names)
    lines = [f"{pad('class', display_width(labels[0]))}{'gt pixels':>14}{'share':>9}{'precision':>11}{'recall':>9}"]
    for i, label in enumerate(labels):
        pixels = int(truth[i])
        share = pixels / total if total else math.nan
        lines.append(f"{label}{pixels:>14d}{share:>9.2%}{precision[i]:>11.4f}{recall[i]:>9.4f}")
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


def results_dict(matrix: Tensor, classes: ClassTable) -> Figures:
    """The figures of a confusion matrix, (N, N + 1)."""
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
            for c, iou, precision, recall in zip(classes, *columns, strict=True)
        ],
        "confusion_matrix": matrix[:, :-1].tolist(),
        "unclaimed": matrix[:, -1].tolist(),
    }


class ImageFigures(TypedDict):
    """The figures of one image; None is undefined."""

    name: str
    miou: float | None  # over the classes in the image's ground truth
    pixel_accuracy: float | None
    iou: dict[str, float]  # of the classes in the image's ground truth, by name


def image_figures(name: str, matrix: Tensor, classes: ClassTable) -> ImageFigures:
    """The figures of one image by its confusion matrix, (N, N + 1)."""
    ious = iou_per_class(matrix).tolist()
    return {
        "name": name,
        "miou": _number(mean_iou(matrix)),
        "pixel_accuracy": _number(pixel_accuracy(matrix)),
        "iou": {class_name: iou for class_name, iou in zip(classes.names, ious, strict=True) if not math.isnan(iou)},
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
