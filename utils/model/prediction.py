"""From the decoder's logits to label maps, in the frame and at any original size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from segment_anything.modeling import Sam
from utils.data.classes import IGNORE_LABEL
from utils.data.datasets import EvaluationBatch, ImageBatch
from utils.data.frame import ImageSize, Size, frame_size
from utils.data.geometry import fitted_size, pixels_in_box, restore
from utils.model.segmenter import Features, Segmenter
from utils.runtime.choices import MapRule
from utils.runtime.device import Precision


@dataclass(frozen=True)
class Prediction:
    """The decoder's result for one image: K masks and the class of each."""

    low_res_masks: Tensor  # K x h x w logits, or logarithms of class probabilities
    class_ids: Tensor  # K int64; in box mode a class may have several masks
    boxes: Tensor | None = None  # K x 4 xyxy in pixels of the frame, on the CPU: a mask covers no pixel outside its box
    threshold: float = -math.inf  # a mask covers the pixels whose logit is above it

    def label_map(self, image_size: ImageSize | Sequence[int]) -> Tensor:
        """The classes in the frame: H x W uint8, 255 where no mask covers the pixel."""
        size = frame_size(image_size)
        planes = (self._frame_logits(i, size) for i in range(len(self.class_ids)))
        return merge_masks(planes, self.class_ids, self.threshold, size, self._regions(size, size))

    def original_label_map(self, height: int, width: int, *, image_size: ImageSize, resize_mode: str) -> Tensor:
        """The classes in the original image, height x width uint8: logits are cropped and resized, then merged."""
        frame = frame_size(image_size)
        planes = (restore(self._frame_logits(i, frame), height, width, resize_mode) for i in range(len(self.class_ids)))
        regions = self._regions((height, width), fitted_size(height, width, image_size, resize_mode))
        return merge_masks(planes, self.class_ids, self.threshold, (height, width), regions)

    def _frame_logits(self, index: int, size: Size) -> Tensor:
        mask = self.low_res_masks[index].float()[None, None]
        return F.interpolate(mask, size, mode="bilinear", align_corners=False)[0, 0]

    def _regions(self, size: tuple[int, int], fitted: tuple[int, int]) -> list[tuple[slice, slice]] | None:
        return None if self.boxes is None else [pixels_in_box(box, size, fitted) for box in self.boxes.tolist()]


def merge_masks(
    planes: Iterable[Tensor],
    class_ids: Tensor,
    threshold: float,
    size: tuple[int, int],
    regions: Iterable[tuple[slice, slice]] | None = None,
) -> Tensor:
    """Merge masks into one label map: the highest logit wins, and must be above the threshold.

    Args:
        planes: K times H x W logits, one at a time: 19 planes of 50 megapixels would take 4 GB.
        class_ids: K int64.
        size: (H, W).
        regions: K times the rows and columns that a mask may cover; None for everywhere.

    Returns:
        H x W uint8 on the device of `class_ids`, 255 where no mask covers the pixel.
    """
    best = torch.full(size, threshold, device=class_ids.device)
    label_map = torch.full(size, IGNORE_LABEL, dtype=torch.uint8, device=class_ids.device)
    everywhere = (slice(None), slice(None))
    for plane, class_id, region in zip(planes, class_ids.to(torch.uint8), regions or [everywhere] * len(class_ids)):
        wins = plane[region] > best[region]
        best[region] = torch.where(wins, plane[region], best[region])
        label_map[region] = torch.where(wins, class_id, label_map[region])
    return label_map


def features_of(model: Segmenter, batch: ImageBatch, precision: Precision) -> Features:
    """The features that `model.forward` takes, from a cache or encoded now."""
    if "features" not in batch:
        return model.inputs(precision.images(batch["image"]))
    features = model.restore(tuple(precision.to_device(feature) for feature in batch["features"]))
    return model.inputs(precision.images(batch["image"]), features) if model.takes_pixels else features


def mirror(frame: Tensor, width: int, dim: int) -> Tensor:
    """Mirror the picture, the first `width` columns of a frame along `dim`; the padding after it stays."""
    picture, padding = frame.split([width, frame.shape[dim] - width], dim)
    return torch.cat([picture.flip(dim), padding], dim)


def average_mirrored(masks: Tensor, of_mirrored: Tensor, width: int, size: Size) -> Tensor:
    """Average the class probabilities of a picture and of its mirror image.

    They are averaged at the frame's size: at the size of the masks, the axis of the mirror may lie inside a pixel.

    Args:
        masks: K x h x w logits of the K classes.
        of_mirrored: the same of the mirror image.
        width: of the picture in the frame.

    Returns:
        K x H x W float32, logarithms of the probabilities up to a constant. They are resized as logits are.
    """
    ours, theirs = (
        F.interpolate(logits.float()[None], size, mode="bilinear", align_corners=False)[0].log_softmax(dim=0)
        for logits in (masks, of_mirrored)
    )
    return torch.logaddexp(ours, mirror(theirs, width, dim=2))


def _semantic_masks(model: Segmenter, batch: EvaluationBatch, precision: Precision) -> Iterator[Tensor]:
    """The masks of each image of a batch; averaged with those of its mirror image where `predict` is asked for it."""
    with precision.autocast():
        masks = model(features_of(model, batch, precision))[0]
    widths = batch.get("mirror_width")
    if not widths:
        yield from masks
        return
    images = torch.stack([mirror(image, width, dim=1) for image, width in zip(batch["image"], widths)])
    with precision.autocast():
        of_mirrored = model(features_of(model, {"image": images}, precision))[0]
    for ours, theirs, width in zip(masks, of_mirrored, widths):
        yield average_mirrored(ours, theirs, width, frame_size(images.shape[1:3]))


MAX_PROMPTS = 64  # boxes decoded at once; hundreds of detections would take gigabytes at 1024 x 1024


@torch.no_grad()
def predict(
    model: Segmenter, batch: EvaluationBatch, precision: Precision, rule: MapRule = "argmax"
) -> Iterator[Prediction]:
    """Segment the images of a batch.

    They are encoded together. In semantic mode they are also decoded together; in box mode one image at a time, at most
    MAX_PROMPTS boxes in a call. Masks of boxes and full-size averages are computed when their image is asked for.

    Args:
        batch: with boxes in box mode. In semantic mode, "mirror_width" asks for the average with mirror images, which
            needs "image".
        rule: how masks become one map; "argmax" needs a box for every class in the image.
    """
    model.eval()
    if not model.PROMPTS:
        class_ids = precision.to_device(torch.arange(len(model.classes)))
        yield from (Prediction(masks, class_ids) for masks in _semantic_masks(model, batch, precision))
        return
    with precision.autocast():
        features = features_of(model, batch, precision)
    threshold = -math.inf if rule == "argmax" else Sam.mask_threshold
    for i in range(len(features[0])):
        feature = tuple(feature[i : i + 1] for feature in features)
        boxes, class_ids = batch["boxes"][i].float(), precision.to_device(batch["class_ids"][i])
        some_boxes = precision.to_device(boxes)[None].split(MAX_PROMPTS, dim=1)
        with precision.autocast():
            masks = [model(feature, some)[0][0] for some in some_boxes] if len(class_ids) else [features[0][:0]]
        bounds = None if rule == "threshold" else boxes
        yield Prediction(torch.cat(masks), class_ids, bounds, threshold)
