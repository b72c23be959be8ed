"""The one table of the 19 classes: the `trainId` ids, names and colours of BDD100K, which follows Cityscapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORE_LABEL = 255  # not labelled: ignored by losses and metrics, never a class


@dataclass(frozen=True)
class SemanticClass:
    id: int
    name: str
    color: tuple[int, int, int]  # RGB


CLASSES = (
    SemanticClass(0, "road", (128, 64, 128)),
    SemanticClass(1, "sidewalk", (244, 35, 232)),
    SemanticClass(2, "building", (70, 70, 70)),
    SemanticClass(3, "wall", (102, 102, 156)),
    SemanticClass(4, "fence", (190, 153, 153)),
    SemanticClass(5, "pole", (153, 153, 153)),
    SemanticClass(6, "traffic light", (250, 170, 30)),
    SemanticClass(7, "traffic sign", (220, 220, 0)),
    SemanticClass(8, "vegetation", (107, 142, 35)),
    SemanticClass(9, "terrain", (152, 251, 152)),
    SemanticClass(10, "sky", (70, 130, 180)),
    SemanticClass(11, "person", (220, 20, 60)),
    SemanticClass(12, "rider", (255, 0, 0)),
    SemanticClass(13, "car", (0, 0, 142)),
    SemanticClass(14, "truck", (0, 0, 70)),
    SemanticClass(15, "bus", (0, 60, 100)),
    SemanticClass(16, "train", (0, 80, 100)),
    SemanticClass(17, "motorcycle", (0, 0, 230)),
    SemanticClass(18, "bicycle", (119, 11, 32)),
)
CLASS_NAMES = tuple(c.name for c in CLASSES)
NUM_CLASSES = len(CLASSES)


def _palette() -> np.ndarray:
    palette = np.zeros((256, 3), dtype=np.uint8)
    for c in CLASSES:
        palette[c.id] = c.color
    return palette


PALETTE = _palette()  # (256, 3) uint8 RGB by id; every other id, such as 255, is black
