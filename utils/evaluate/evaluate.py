"""Scoring a labelled set: what the model says of each image against its labels. No prompt mode is known here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.evaluate.metrics import ConfusionMatrix
from utils.model.prediction import Prediction, predict
from utils.model.segmenter import Segmenter
from utils.runtime import distributed
from utils.runtime.choices import MapRule
from utils.runtime.device import Precision


def predictions_and_labels(
    model: Segmenter, loader: Iterable[dict[str, Any]], precision: Precision, rule: MapRule = "argmax"
) -> Iterator[tuple[Prediction, Tensor]]:
    """What the model says of each image, and its labels in the frame."""
    for batch in loader:
        yield from zip(predict(model, batch, precision, rule), precision.to_device(batch["labels"]))


def evaluate(model: Segmenter, loader: DataLoader, precision: Precision) -> ConfusionMatrix:
    """Score predictions in the frame over this process's share of a set, and sum over the processes."""
    confusion = ConfusionMatrix(precision.device)
    progress = tqdm(loader, desc="validation", unit="batch", disable=not distributed.is_main(), leave=False)
    for prediction, labels in predictions_and_labels(model, progress, precision):
        confusion.update(prediction.label_map(labels.shape), labels)
    distributed.all_reduce_sum(confusion.matrix)
    return confusion
