"""Detected boxes in the JSON format of Scalabel and of BDD100K's detection task (`det_20`).

    [{"name": "a.jpg", "labels": [{"category": "car", "box2d": {"x1": 10, "y1": 20, "x2": 30, "y2": 40}}]}, ...]

or a dict with such a list as "frames". Corners are **inclusive**, as in Scalabel: a box is x2 - x1 + 1 pixels wide, and
one with equal corners is a single pixel. Other fields (score, attributes, ...) are ignored.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.bdd100k import IMAGE_SUFFIXES, match_key
from utils.data.classes import ClassTable
from utils.runtime.errors import UserError
from utils.runtime.files import read_json

_FORMAT_HINT = "give the JSON of a split in Scalabel's format, such as det_20's det_val.json"


@dataclass(frozen=True)
class Detections:
    """The boxes of each image, and the number of boxes of other categories."""

    # By `match_key` of the image name without suffix, one entry for each frame: class ids, (K,) int64, and boxes, (K,
    # 4) float64 xyxy in pixels of the original image, inclusive corners, not clipped, in the file's order.
    boxes: dict[str, tuple[np.ndarray, np.ndarray]]
    left_out: dict[str, int]  # by category in lower case


def read_detections(path: Path, classes: ClassTable) -> Detections:
    """Read a detection file. Categories match names and aliases in any case; labels without a box are skipped.

    Raises:
        UserError: the file cannot be read, has another format, an image twice or an invalid box, or has labels but no
            box of a known category.
    """
    boxes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    left_out: Counter[str] = Counter()
    labelled = False
    for index, frame in enumerate(_read_frames(path)):
        name, labels = _check_frame(path, index, frame)
        # A frame's name need not have a suffix, and may have dots.
        stem = match_key(Path(name).stem if name.lower().endswith(IMAGE_SUFFIXES) else Path(name).name)
        if stem in boxes:
            raise UserError(f"{path}: image {stem!r} is in more than one frame; put all its labels into one")
        labelled = labelled or bool(labels)
        class_ids: list[int] = []
        corners: list[list[float]] = []
        for number, label in enumerate(labels):
            where = f"{path}: image {name!r}, label {number}"
            if not isinstance(label, dict):
                raise UserError(f"{where} is not an object with category and box2d; {_FORMAT_HINT}")
            if label.get("box2d") is None:  # such as the polygons of lanes and drivable areas
                continue
            category = label.get("category")
            if not isinstance(category, str):
                raise UserError(f"{where} has a box2d but no category; use one of: {_known(classes)}")
            class_id = classes.ids_by_name.get(category.lower())
            if class_id is None:
                left_out[category.lower()] += 1
                continue
            class_ids.append(class_id)
            corners.append(_check_box(f"{where} ({category})", label["box2d"]))
        boxes[stem] = np.array(class_ids, dtype=np.int64), np.array(corners, dtype=np.float64).reshape(-1, 4)
    if labelled and not any(len(class_ids) for class_ids, _ in boxes.values()):
        unknown = ", ".join(map(repr, sorted(left_out)[:10]))
        more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
        reason = f"no category of its boxes is known, only {unknown}{more}; rename them to: {_known(classes)}"
        raise UserError(f"{path}: {reason if left_out else f'no label has a box2d; {_FORMAT_HINT}'}")
    return Detections(boxes, dict(sorted(left_out.items())))


def _known(classes: ClassTable) -> str:
    aliases = sorted((c.group, alias) for c in classes for alias in c.aliases)
    return ", ".join(dict.fromkeys((*classes.names, *(alias for _, alias in aliases))))


def _read_frames(path: Path) -> list[Any]:
    content = read_json(path, _FORMAT_HINT)
    frames = content.get("frames") if isinstance(content, dict) else content
    if not isinstance(frames, list) or not frames:
        raise UserError(f'{path}: no list of frames, by itself or as "frames" of a dict; {_FORMAT_HINT}')
    return frames


def _check_frame(path: Path, index: int, frame: Any) -> tuple[str, list[Any]]:
    """The name and the labels of a frame; the labels may be null, [] or missing."""
    name = frame.get("name") if isinstance(frame, dict) else None
    if not isinstance(name, str) or not Path(name).stem:
        raise UserError(f"{path}: frame {index} has no image name; {_FORMAT_HINT}")
    labels = frame.get("labels")
    if labels is not None and not isinstance(labels, list):
        raise UserError(f"{path}: image {name!r}: its labels are not a list; {_FORMAT_HINT}")
    return name, labels or []


def _check_box(where: str, box: Any) -> list[float]:
    """x1, y1, x2, y2 of a label's `box2d`."""
    values: list[Any] = [box.get(key) for key in ("x1", "y1", "x2", "y2")] if isinstance(box, dict) else [None]
    wrong = None
    # bool is an int in Python; NaN compares as false.
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6 for v in values):
        wrong = "must have x1, y1, x2, y2 as finite numbers of pixels (below a million)"
    elif values[2] < values[0] or values[3] < values[1]:
        wrong = "has x1 > x2 or y1 > y2"
    if wrong:
        raise UserError(f"{where}: box2d {_shown(box)} {wrong}")
    return [float(value) for value in values]


def _shown(box: Any) -> str:
    try:
        return json.dumps(box)[:100]
    except RecursionError:
        return "(deeply nested)"
