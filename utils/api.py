"""Segment pictures in a notebook or a program.

from utils.api import load_run

model = load_run("work_dir/RUN")
result = model.segment("street.jpg")
result.label_map  # (H, W) uint8 ids of model.classes, 255 = no class
result.overlay()  # (H + h, W, 3) uint8 RGB
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.bdd100k import read_image
from utils.data.classes import ClassTable
from utils.data.datasets import collate_pictures
from utils.evaluate.plots import OverlayStyle
from utils.model import checkpoint
from utils.model.checkpoint import ModelInfo
from utils.model.onnx_model import OnnxSemanticSegmenter, is_onnx, load_onnx
from utils.model.prediction import predict
from utils.model.segmenter import Segmenter
from utils.runtime.choices import MapRule
from utils.runtime.device import Precision, resolve_precision
from utils.runtime.errors import UserError

_NAME = "picture"


@dataclass(frozen=True)
class Result:
    """A segmented picture.

    `image` is (H, W, 3) uint8 RGB; `label_map` is (H, W) uint8 ids of `classes`, 255 = no class.
    """

    image: np.ndarray
    label_map: np.ndarray
    classes: ClassTable

    def overlay(self, opacity: float = 0.5) -> np.ndarray:
        """The colours over the picture, above a legend where it has room: (H + h, W, 3) uint8 RGB.

        Args:
            opacity: share of the colours, 0 to 1.
        """
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity must be from 0 to 1, not {opacity}")
        return OverlayStyle(self.classes, opacity).draw(self.image, self.label_map)


@dataclass(frozen=True)
class Model:
    """A fine-tuned model that segments one picture at a time."""

    segmenter: Segmenter
    info: ModelInfo
    precision: Precision

    @property
    def classes(self) -> ClassTable:
        return self.segmenter.classes

    def segment(
        self,
        image: str | Path | np.ndarray,
        *,
        tta: bool = False,
        boxes: Mapping[str, Any] | Any | None = None,
        class_ids: Sequence[int] | None = None,
    ) -> Result:
        """Segment a picture, as `infer_bdd100k.py --images` does.

        Args:
            image: a file, or (H, W, 3) uint8 RGB.
            tta: average with the mirror image; for semantic models.
            boxes: for box models: boxes by class name, or (K, 4) with `class_ids`. Boxes are x1, y1, x2, y2 in pixels
                of the picture; corners are inclusive.
            class_ids: K ids of `classes`.

        Raises:
            ValueError: an argument does not fit the model or has another shape or type.
            UserError: the file cannot be read, or `boxes` names an unknown class.
        """
        is_semantic = not self.segmenter.PROMPTS
        if is_semantic and (boxes is not None or class_ids is not None):
            raise ValueError("a semantic model takes the image alone; leave out boxes and class_ids")
        if not is_semantic and (tta or boxes is None):
            raise ValueError("a box model needs boxes" if not tta else "a box model takes no tta")
        detected = None if is_semantic else {_NAME: self._prompts(boxes, class_ids)}
        if isinstance(image, str | Path):
            image = read_image(Path(image), upright=True)
        if not isinstance(image, np.ndarray):
            raise ValueError(f"image must be a file or (H, W, 3) uint8 RGB, not {type(image).__name__}")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"image must be (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}")
        size, mode = self.info.image_size, self.info.resize_mode
        batch = collate_pictures([(_NAME, image)], detected, size, mode, tta=tta)
        rule: MapRule = "argmax" if is_semantic else "box_threshold"
        (prediction,) = predict(self.segmenter, batch, self.precision, rule)
        labels = prediction.original_label_map(image.shape[0], image.shape[1], image_size=size, resize_mode=mode)
        return Result(image, labels.cpu().numpy(), self.classes)

    def _prompts(self, boxes: Any, class_ids: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
        """Class ids, (K,) int64, and boxes, (K, 4) float64."""
        if isinstance(boxes, Mapping):
            if class_ids is not None:
                raise ValueError("boxes by class name need no class_ids; leave them out")
            # Pairs, as two names may be one class.
            of_class = [(self.classes.id_of(name), _rows_of_four(some)) for name, some in boxes.items()]
            ids = [i for i, some in of_class for _ in some]
            found = np.concatenate([*(some for _, some in of_class), np.zeros((0, 4))])
        else:
            ids, found = [] if class_ids is None else [*class_ids], _rows_of_four(boxes)
        if len(found) != len(ids):
            raise ValueError(f"boxes must be (K, 4) with K class_ids, not {found.shape} with {len(ids)}")
        if not all(isinstance(i, int | np.integer) and 0 <= i < len(self.classes) for i in ids):
            raise ValueError(f"class_ids must be integers from 0 to {len(self.classes) - 1}")
        if not np.isfinite(found).all() or (found[:, 2:] < found[:, :2]).any():
            raise ValueError("boxes must be finite, with x1 <= x2 and y1 <= y2")
        return np.array(ids, dtype=np.int64), found


def _rows_of_four(boxes: Any) -> np.ndarray:
    """(K, 4) float64; one box may come as four numbers."""
    try:
        found = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("boxes must be numbers: x1, y1, x2, y2 of each box") from None
    if found.ndim > 2 or (found.size and found.shape[-1] != 4):
        raise ValueError(f"boxes must be (K, 4), not {found.shape}")
    return found.reshape(-1, 4)


def load_run(path: str | Path, sam_checkpoint: str | Path | None = None, *, device: str | None = None) -> Model:
    """Load a run's folder, its best checkpoint, or an exported `.onnx` file.

    Args:
        path: the folder or file.
        sam_checkpoint: the SAM file; None for the one that the run was trained on. ONNX files need none.
        device: "cpu", "cuda" or "cuda:N"; None is CUDA if available.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    path = Path(path)
    precision = resolve_precision(device, local_rank=0, local_world_size=1, use_amp=False, amp_dtype="auto")
    if is_onnx(path):
        exported, info = load_onnx(path, precision.device, None)
        if isinstance(exported, OnnxSemanticSegmenter) and not exported.has_logits:
            raise UserError(f"{path}: pictures need logits; export the model again with --logits")
        return Model(exported, info, precision)
    state = checkpoint.load_checkpoint(path)
    recorded: Any = state["args"].get("checkpoint") if "args" in state else None
    if sam_checkpoint is None and not isinstance(recorded, str | os.PathLike):
        raise UserError(f"{path}: names no SAM file; give sam_checkpoint")
    model, info = checkpoint.rebuild(state, path, Path(sam_checkpoint or recorded))
    return Model(model.to(precision.device).eval(), info, precision)
