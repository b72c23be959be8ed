"""Scoring a labelled set in any prompt mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.utils.data import DataLoader

from utils.data.datasets import EvaluationBatch
from utils.evaluate.metrics import ConfusionMatrix
from utils.model.prediction import Prediction, predict
from utils.model.segmenter import Segmenter
from utils.runtime import distributed
from utils.runtime.choices import MapRule
from utils.runtime.device import Precision
from utils.runtime.progress import progress_bar


def predictions_and_labels(
    model: Segmenter, loader: Iterable[EvaluationBatch], precision: Precision, rule: MapRule = "argmax"
) -> Iterator[tuple[Prediction, Tensor]]:
    """The prediction for each image, and its labels in the frame."""
    for batch in loader:
        yield from zip(predict(model, batch, precision, rule), precision.to_device(batch["labels"]))


def evaluate(model: Segmenter, loader: DataLoader, precision: Precision) -> ConfusionMatrix:
    """Score predictions in the frame. Each process scores its share of the set; the counts are summed."""
    confusion = ConfusionMatrix(len(model.classes), precision.device)
    progress = progress_bar(loader, "validation", unit="batch", disable=not distributed.is_main(), leave=False)
    for prediction, labels in predictions_and_labels(model, progress, precision):
        confusion.update(prediction.label_map(labels.shape), labels)
    distributed.all_reduce_sum(confusion.matrix)
    return confusion
