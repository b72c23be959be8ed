"""Images of a report: which to show, their layers as small pictures, and the predictions kept for `utils.compare`."""

from __future__ import annotations

import base64
import io
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from utils.data.classes import IGNORE_LABEL, MAX_CLASSES, ClassTable
from utils.data.datasets import NpyFolder
from utils.data.geometry import resize_image, resize_mask, to_bytes
from utils.evaluate.metrics import mean_iou
from utils.evaluate.plots import HATCH, WRONG, stripes
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, open_untrusted

LABEL_MAPS = "label_maps.zip"
_LONGEST_SIDE = 720  # pixels of an image in the report
_IMAGE_BYTES = 115_000  # of all layers of an image: 60 images take 9.2 MB in base64
_MAP_BYTES = 1 << 20  # the most that a label map may take in the archive
_PHOTO_QUALITY = 80

FIXED = (20, 120, 240)  # RGB of pixels that became right
# A layer holds ids of classes and these marks.
_PAPER, _STRIPE, _CLEAR, _WRONG, _FIXED = range(MAX_CLASSES, MAX_CLASSES + 5)
_MARK_COLORS = [*HATCH[0], *HATCH[1], 0, 0, 0, *WRONG, *FIXED]
_MARK_OPACITIES = [255, 255, 0, 255, 255]


@dataclass(frozen=True)
class ScoredImage:
    """An image's confusion matrix and its prediction at the size of the report."""

    index: int  # in the split
    counts: np.ndarray  # (N, N + 1) integers
    prediction: bytes  # PNG of ids; b"" if no image is shown

    @property
    def miou(self) -> float:
        """The mean over the classes in the image's ground truth; `nan` if nothing is labelled."""
        return mean_iou(torch.from_numpy(self.counts))


@dataclass(frozen=True)
class Card:
    """An image to show, with layers over it."""

    index: int
    reason: str  # why it was chosen
    width: int
    height: int
    photo: str  # the address of a picture, which holds the picture itself
    layers: Sequence[str]  # the same


def wrong_pixels(counts: np.ndarray) -> np.ndarray:
    """Pixels of each class that were missed or taken for it: (..., N, N + 1) -> (..., N)."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return counts.sum(axis=-1) + counts[..., :-1].sum(axis=-2) - 2 * hits


def choose_images(
    mious: Sequence[float], counts: np.ndarray, number: int, class_names: Sequence[str]
) -> dict[int, str]:
    """Choose images to show: a third has the lowest mIoU, a third the most wrong pixels of a class, the rest is spread.

    Args:
        mious: of each image; `nan` if nothing is labelled, which is not low.
        counts: confusion matrices, one for each image.
        number: of images to choose.
        class_names: for the reasons.

    Returns:
        The reason for each chosen image, by its index.
    """
    number = min(number, len(mious))
    by_miou = [int(index) for index in np.argsort(mious, kind="stable") if not math.isnan(mious[index])]
    chosen = dict.fromkeys(by_miou[: math.ceil(number / 3)], "lowest mIoU")

    wrong = wrong_pixels(counts)
    classes = np.flatnonzero(counts.sum(axis=(0, 2)))
    worst_of = {int(c): np.argsort(-wrong[:, c], kind="stable") for c in classes}
    for rank in range(len(mious)):
        for class_id, order in worst_of.items():
            index = int(order[rank])
            if len(chosen) < math.ceil(2 * number / 3) and wrong[index, class_id]:
                chosen.setdefault(index, f"most wrong pixels of {class_names[class_id]}")

    rest = [index for index in range(len(mious)) if index not in chosen]
    for position in np.linspace(0, len(rest) - 1, number - len(chosen)).round().astype(int):
        chosen[rest[position]] = "even sample"
    return chosen


def shown_size(source: NpyFolder, index: int) -> tuple[int, int]:
    """The (height, width) of an image in the report: the original's shape, no larger than the frame resolves."""
    item, (rows, columns) = source.items[index], source.fitted_size(index)
    scale = min(1, _LONGEST_SIDE / max(item.height, item.width), max(rows / item.height, columns / item.width))
    return max(1, round(item.height * scale)), max(1, round(item.width * scale))


def encode_labels(labels: np.ndarray, source: NpyFolder, index: int) -> bytes:
    """A label map, in the frame or at the original size, as a PNG of ids at the size of the report."""
    if labels.shape == source.frame_size:
        rows, columns = source.fitted_size(index)
        labels = labels[:rows, :columns]  # without the padding
    return cv2.imencode(".png", resize_mask(labels, shown_size(source, index), "stretch"))[1].tobytes()


def decode_labels(png: bytes) -> np.ndarray:
    """The label map of `encode_labels`, (H, W) uint8.

    Raises:
        ValueError: it is not such a PNG.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.mode != "L" or max(image.size) > _LONGEST_SIDE:
                raise ValueError("not a label map")
            return np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's errors of a damaged file
        raise ValueError(str(error)) from None


def save_label_maps(path: Path, images: Sequence[ScoredImage]) -> None:
    """Write the predictions of all images, in their order, for `read_label_maps`."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for image in images:
            archive.writestr(zipfile.ZipInfo(f"{image.index:06d}.png"), image.prediction)


def read_label_maps(path: Path, indexes: Iterable[int]) -> dict[int, np.ndarray]:
    """Read predictions that `save_label_maps` wrote, by their index.

    Raises:
        UserError: the file is missing, damaged, or another file.
        UnreadableError: the system does not let us read it.
    """
    maps = {}
    with open_untrusted(path, fix="evaluate again, without --report_images 0") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                for index in indexes:
                    entry = archive.getinfo(f"{index:06d}.png")
                    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _MAP_BYTES:
                        raise ValueError("not a label map")
                    maps[index] = decode_labels(archive.read(entry))
        except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError, EOFError, struct.error) as error:
            raise UserError(f"{path}: damaged, or not of infer_bdd100k.py ({error}); evaluate again") from None
    return maps


def class_layer(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """A layer in the colours of the classes; what is not labelled, or of no class, is hatched."""
    return np.where(labels < num_classes, labels, np.where(stripes(labels.shape), _STRIPE, _PAPER))


def error_layer(target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """A layer that marks wrong pixels; what is not labelled is hatched."""
    return _mark(target, np.where(prediction != target, _WRONG, _CLEAR))


def change_layer(target: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """A layer that marks pixels that became right or wrong; what is not labelled is hatched."""
    was, is_now = before == target, after == target
    return _mark(target, np.where(was & ~is_now, _WRONG, np.where(~was & is_now, _FIXED, _CLEAR)))


def _mark(target: np.ndarray, marks: np.ndarray) -> np.ndarray:
    return np.where(target == IGNORE_LABEL, np.where(stripes(target.shape), _STRIPE, _CLEAR), marks)


def read_shown(source: NpyFolder, index: int, target: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """An image and its ground truth at the size of the report, (H, W, 3) uint8 RGB and (H, W) uint8.

    Args:
        target: the ground truth at the original size; None for that of the frame.
    """
    rows, columns = source.fitted_size(index)
    image, size = source.read_image(index)[:rows, :columns], shown_size(source, index)
    if target is None:
        target = source.read_labels(index)[:rows, :columns]
    return resize_image(to_bytes(image), size, "stretch"), resize_mask(target, size, "stretch")


def report_cards(
    source: NpyFolder,
    images: Sequence[ScoredImage],
    number: int,
    classes: ClassTable,
    masks: Mapping[str, Path] | None = None,
) -> list[Card]:
    """The images of a report, with ground truth, prediction and errors as layers.

    Args:
        images: all of the split, in its order.
        number: of images to show.
        classes: those of the labels and predictions.
        masks: the original masks by name, to show instead of those of the frame.
    """
    counts = np.stack([image.counts for image in images])
    cards = []
    chosen = choose_images([image.miou for image in images], counts, number, classes.names)
    for index, reason in chosen.items():
        item = source.items[index]
        original = source.read_original_mask(masks[item.name], item.height, item.width) if masks else None
        photo, target = read_shown(source, index, original)
        prediction = decode_labels(images[index].prediction)
        layers = [class_layer(labels, len(classes)) for labels in (target, prediction)]
        cards.append(make_card(index, reason, photo, [*layers, error_layer(target, prediction)], classes))
    return cards


def make_card(index: int, reason: str, photo: np.ndarray, layers: Sequence[np.ndarray], classes: ClassTable) -> Card:
    """Encode an image and its layers, smaller if they would take too many bytes."""
    height, width = photo.shape[:2]
    for scale in (1, 0.75, 0.5, 0.35):
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        encoded = [_jpeg(resize_image(photo, size, "stretch"))]
        encoded += [_png(resize_mask(layer, size, "stretch"), classes) for layer in layers]
        if sum(map(len, encoded)) <= _IMAGE_BYTES:
            break
    photo_address, *addresses = (
        f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        for kind, data in zip(("jpeg", *["png"] * len(layers)), encoded)
    )
    return Card(index, reason, width, height, photo_address, addresses)


def _jpeg(image: np.ndarray) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, _PHOTO_QUALITY]
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def _png(layer: np.ndarray, classes: ClassTable) -> bytes:
    """A PNG of palette indexes: those of the classes, then those of the marks."""
    number = len(classes)
    image = Image.fromarray(np.where(layer >= _PAPER, layer - _PAPER + number, layer).astype(np.uint8))
    image.putpalette(bytes([*classes.palette[:number].ravel(), *_MARK_COLORS]))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=bytes([255] * number + _MARK_OPACITIES))
    return buffer.getvalue()
