"""Boxes that a detector found, read from the JSON that Scalabel and BDD100K's detection task (`det_20`) use.

    [{"name": "a.jpg", "labels": [{"category": "car", "box2d": {"x1": 10, "y1": 20, "x2": 30, "y2": 40}}]}, ...]

or a dict that holds such a list as "frames". Corners are **inclusive**, as Scalabel has them: a box is x2 - x1 + 1
pixels wide, so that one with equal corners is a single pixel. Other fields (score, attributes, ...) are not looked at.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.bdd100k import match_key
from utils.data.classes import CLASS_NAMES
from utils.runtime.errors import UserError
from utils.runtime.files import cannot_be_read, read_json

# Names of det_20 and of BDD100K's first release that differ from those of the 19 classes.
_SYNONYMS = {"pedestrian": "person", "bike": "bicycle", "motor": "motorcycle"}
_CLASS_IDS = {name: class_id for class_id, name in enumerate(CLASS_NAMES)}
_CLASS_IDS |= {synonym: _CLASS_IDS[name] for synonym, name in _SYNONYMS.items()}

_FORMAT_HINT = "give the JSON of a whole split in Scalabel's format, such as det_20's det_val.json"


@dataclass(frozen=True)
class Detections:
    """The boxes of each image, and the labels that are of none of the 19 classes."""

    # By `match_key` of the image name without suffix, one entry per frame: class ids, (K,) int64, and boxes, (K, 4)
    # float64 xyxy in pixels of the original image, inclusive. K is 0 where nothing was found. In the file's order, a
    # class any number of times; not clipped, since the file need not know the image's size.
    boxes: dict[str, tuple[np.ndarray, np.ndarray]]
    left_out: dict[str, int]  # boxes per category, in lower case, that maps to no class


def read_detections(path: Path) -> Detections:
    """Read a detection file. Categories are matched whatever their case; labels without a box are skipped.

    Raises:
        UserError: the file cannot be read, is not of this format, holds an image twice or a box that is none, or has
            labels but not one box of a known category.
    """
    boxes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    left_out: Counter[str] = Counter()
    labelled = False
    for index, frame in enumerate(_read_frames(path)):
        name, labels = _check_frame(path, index, frame)
        stem = match_key(Path(name).stem)
        if stem in boxes:
            raise UserError(f"{path}: image {stem!r} is in more than one frame; keep one, with all its labels")
        labelled = labelled or bool(labels)
        class_ids: list[int] = []
        corners: list[list[float]] = []
        for number, label in enumerate(labels):
            where = f"{path}: image {name!r}, label {number}"
            if not isinstance(label, dict):
                raise UserError(f"{where} is not an object with category and box2d; {_FORMAT_HINT}")
            if label.get("box2d") is None:  # a polygon, such as those of lanes and drivable areas
                continue
            category = label.get("category")
            if not isinstance(category, str):
                raise UserError(f"{where} has a box2d but no category; name one of: {_known()}")
            class_id = _CLASS_IDS.get(category.lower())
            if class_id is None:
                left_out[category.lower()] += 1
                continue
            class_ids.append(class_id)
            corners.append(_check_box(f"{where} ({category})", label["box2d"]))
        boxes[stem] = np.array(class_ids, dtype=np.int64), np.array(corners, dtype=np.float64).reshape(-1, 4)
    if labelled and not any(len(class_ids) for class_ids, _ in boxes.values()):
        if not left_out:
            raise UserError(f"{path}: none of its labels has a box2d; {_FORMAT_HINT}")
        unknown = ", ".join(map(repr, sorted(left_out)[:10])) + (
            f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
        )
        raise UserError(f"{path}: no category of its boxes is known, only {unknown}; rename them to: {_known()}")
    return Detections(boxes, dict(sorted(left_out.items())))


def _known() -> str:
    return ", ".join(_CLASS_IDS)


def _read_frames(path: Path) -> list[Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file ({_FORMAT_HINT})") from None
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except ValueError as error:  # not JSON, not text, a number of thousands of digits, absurdly deep
        raise UserError(f"{path}: not JSON ({error}); {_FORMAT_HINT}") from None
    frames = content.get("frames") if isinstance(content, dict) else content
    if not isinstance(frames, list) or not frames:
        raise UserError(f'{path}: no list of frames, by itself or as "frames" of a dict; {_FORMAT_HINT}')
    return frames


def _check_frame(path: Path, index: int, frame: Any) -> tuple[str, list[Any]]:
    """The name and the labels of a frame; a frame in which nothing was found has null, [] or no labels at all."""
    name = frame.get("name") if isinstance(frame, dict) else None
    if not isinstance(name, str) or not Path(name).stem:
        raise UserError(f"{path}: frame {index} has no image name; {_FORMAT_HINT}")
    labels = frame.get("labels")
    if labels is not None and not isinstance(labels, list):
        raise UserError(f"{path}: image {name!r}: its labels are no list; {_FORMAT_HINT}")
    return name, labels or []


def _check_box(where: str, box: Any) -> list[float]:
    """x1, y1, x2, y2 of a label's `box2d`."""
    values: list[Any] = [box.get(key) for key in ("x1", "y1", "x2", "y2")] if isinstance(box, dict) else [None]
    # bool is an int to Python. A coordinate beyond a million is in no image; NaN compares as false.
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6 for v in values):
        raise UserError(
            f"{where}: box2d {_shown(box)} must hold x1, y1, x2, y2, finite numbers of pixels (below a million)"
        )
    x1, y1, x2, y2 = map(float, values)
    if x2 < x1 or y2 < y1:
        raise UserError(f"{where}: box2d {_shown(box)} is empty; its corners must be x1 <= x2 and y1 <= y2")
    return [x1, y1, x2, y2]


def _shown(box: Any) -> str:
    try:
        return json.dumps(box)[:100]
    except RecursionError:
        return "(deeply nested)"
