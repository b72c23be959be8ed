"""Pictures of a run's data: the same few validation images after each epoch, and augmented training images."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.data.classes import BDD100K, ClassTable
from utils.data.datasets import EvaluationDataset, NpyFolder, TrainingDataset, collate_evaluation
from utils.data.geometry import to_bytes
from utils.evaluate.lettering import text_width, write_text
from utils.evaluate.metrics import ConfusionMatrix, mean_iou
from utils.evaluate.plots import Legend, colorize, draw_legend, legend_entries, overlay
from utils.model.prediction import predict
from utils.model.segmenter import Segmenter
from utils.runtime.device import Precision
from utils.runtime.errors import printable
from utils.runtime.files import atomic_write

NUM_SAMPLES = 4
WIDTH, GAP, TEXT, FONT = 480, 6, 22, 14  # pixels: of a picture, between pictures, of a line of text, of letters
_JPEG_QUALITY = 88
_BOX_COLOR = (255, 255, 0)


@dataclass(frozen=True)
class ValidationSample:
    """A validation image and what the model makes of it, as small pictures of the image's own shape."""

    name: str
    image: np.ndarray  # h x w x 3 uint8 RGB; no side is longer than WIDTH
    target: np.ndarray  # h x w uint8, 255 = not labelled
    prediction: np.ndarray  # h x w uint8, 255 = no class
    miou: float  # of this image, in the frame
    classes: ClassTable = BDD100K


class ValidationSamples:
    """A few validation images, the same in every epoch and every start."""

    def __init__(self, dataset: EvaluationDataset) -> None:
        self.dataset = dataset
        self.indexes = varied_images(dataset.source, range(len(dataset)), NUM_SAMPLES)
        self.latest: list[ValidationSample] = []

    def update(self, model: Segmenter, precision: Precision) -> None:
        """Segment the images. This process does so alone, so that it may be called in the main one only.

        Raises:
            UserError: a file can no longer be read.
        """
        self.latest = [self._sample(index, model, precision) for index in self.indexes]

    def _sample(self, index: int, model: Segmenter, precision: Precision) -> ValidationSample:
        source, stored = self.dataset.source, self.dataset[index]
        (prediction,) = predict(model, collate_evaluation([stored]), precision)
        labels = stored["labels"]
        predicted = prediction.label_map(labels.shape).cpu()
        confusion = ConfusionMatrix(len(source.classes))
        confusion.update(predicted, labels)
        views = source.read_image(index), labels.numpy(), predicted.numpy()
        image, target, shown = (_picture(source, index, view) for view in views)
        return ValidationSample(
            source.items[index].name, image, target, shown, mean_iou(confusion.matrix), source.classes
        )


def varied_images(source: NpyFolder, indexes: Sequence[int], count: int) -> list[int]:
    """Choose images from all over the split that show many classes.

    The split is cut into `count` sections, as neighbours may be frames of one video. From each comes the image that
    adds the most classes to those before it.

    Args:
        indexes: the images to choose from, in order.
    """
    chosen: list[int] = []
    seen: set[int] = set()
    for section in np.array_split(indexes, min(count, len(indexes))):
        classes = {i: {c for c, pixels in enumerate(source.items[i].pixels) if pixels} for i in section.tolist()}
        best = max(classes, key=lambda i: (len(classes[i] - seen), len(classes[i])))
        chosen.append(best)
        seen |= classes[best]
    return chosen


def mosaic(samples: Sequence[ValidationSample]) -> np.ndarray:
    """Image, ground truth and prediction of each sample in a row, above a legend: H x W x 3 uint8 RGB."""
    rows = [
        {
            printable(sample.name): sample.image,
            "ground truth": colorize(sample.target, sample.classes),
            f"prediction, mIoU {sample.miou:.3f}": colorize(sample.prediction, sample.classes),
        }
        for sample in samples
    ]
    label_maps = [labels for sample in samples for labels in (sample.target, sample.prediction)]
    return _sheet(rows, legend_entries(samples[0].classes, *label_maps))


def training_sheet(dataset: TrainingDataset) -> np.ndarray:
    """What training sees of a few images, labels laid over them: as stored, and as drawn in the first three epochs.

    In box mode, boxes are drawn as they are given to the model, with their jitter.

    Returns:
        H x W x 3 uint8 RGB.
    """
    source = dataset.source
    drawn = copy.copy(dataset)  # the loader's own keeps its epoch
    drawn.has_images = True
    rows, label_maps = [], []
    for index in varied_images(source, dataset.indices, NUM_SAMPLES):
        labels = source.read_labels(index)
        stored = overlay(to_bytes(source.read_image(index)), labels, source.classes)
        row = {f"{printable(source.items[index].name)}, as stored": _picture(source, index, stored)}
        label_maps.append(labels)
        for epoch in range(3):
            drawn.set_epoch(epoch)
            sample = drawn[dataset.indices.index(index)]
            labels = sample["labels"].numpy()
            view = overlay(to_bytes(sample["image"].numpy()), labels, source.classes)
            for box in sample.get("boxes", ()):
                left, top, right, bottom = box.round().int().tolist()
                cv2.rectangle(view, (left, top), (right, bottom), _BOX_COLOR, max(1, round(view.shape[1] / WIDTH)))
            row[f"epoch {epoch + 1}"] = _picture(source, index, view)
            label_maps.append(labels)
        rows.append(row)
    entries = legend_entries(source.classes, *label_maps)
    painted: Legend = [(name, color) for name, color in entries if color]  # an overlay has no hatching
    return _sheet(rows, painted)


def save_training_sheet(path: Path, dataset: TrainingDataset) -> None:
    """Write `training_sheet` as a JPEG. Raises `UserError` if it cannot be written, or an image cannot be read."""
    picture = Picture.of(training_sheet(dataset))
    with atomic_write(path) as file:
        file.write(picture.jpeg)


@dataclass(frozen=True)
class Picture:
    """An encoded picture."""

    height: int
    width: int
    jpeg: bytes

    @classmethod
    def of(cls, pixels: np.ndarray) -> Picture:
        """Encode H x W x 3 uint8 RGB."""
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
        return cls(pixels.shape[0], pixels.shape[1], file.getvalue())


def _picture(source: NpyFolder, index: int, frame: np.ndarray) -> np.ndarray:
    """A frame without its padding, in the shape of the original: H x W (x 3) -> h x w (x 3) uint8, see `WIDTH`."""
    item = source.items[index]
    height, width = source.fitted_size(index)
    scale = WIDTH / max(item.height, item.width)
    size = (max(1, round(scale * item.width)), max(1, round(scale * item.height)))
    picture = frame[:height, :width]
    if picture.ndim == 2:
        return cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST)
    return cv2.resize(to_bytes(picture), size, interpolation=cv2.INTER_AREA if width > WIDTH else cv2.INTER_LINEAR)


def _sheet(rows: Sequence[dict[str, np.ndarray]], legend: Legend) -> np.ndarray:
    """Rows of titled pictures, above a legend."""
    width = max(map(len, rows)) * (WIDTH + GAP) + GAP
    heights = [TEXT + max(len(picture) for picture in row.values()) + GAP for row in rows]
    sheet = np.full((sum(heights), width, 3), 255, dtype=np.uint8)
    top = 0
    for row, height in zip(rows, heights):
        for column, (title, picture) in enumerate(row.items()):
            left = GAP + column * (WIDTH + GAP)
            write_text(sheet, _fitting(title), left, top + TEXT - 6, FONT)
            sheet[top + TEXT :, left:][: picture.shape[0], : picture.shape[1]] = picture
        top += height
    return np.concatenate([sheet, draw_legend(legend, width, FONT)])


def _fitting(text: str) -> str:
    """The text, its middle left out if it is wider than a picture."""
    keep = len(text)
    shown = text
    while text_width(shown, FONT) > WIDTH and keep > 8:
        keep -= 2
        shown = f"{text[: keep // 2]}…{text[-keep // 2 :]}"
    return shown
