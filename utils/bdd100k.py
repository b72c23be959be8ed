"""BDD100K's semantic segmentation: the one table of its 19 classes, and finding and pairing its files.

Ids, names and colours are the `trainId` table of BDD100K (and of Cityscapes, which it follows).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError

IGNORE_LABEL = 255  # not labelled: in no loss, in no metric, never turned into a class


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


PALETTE = _palette()  # (256, 3) uint8 RGB by id; every id that is no class, 255 above all, is black


@dataclass(frozen=True)
class Item:
    """One image of a split; `mask` is None where the split has no labels."""

    name: str
    image: Path
    mask: Path | None


@dataclass(frozen=True)
class Split:
    """A split's images paired with their masks by name, and what could not be paired."""

    items: list[Item]
    labelled: bool
    images_without_mask: list[Path]
    masks_without_image: list[Path]


@dataclass(frozen=True)
class _Layout:
    images: str
    masks: str
    mask_suffix: str


# The two forms in which BDD100K has been given out; `{split}` is train, val or test.
_LAYOUTS = (
    _Layout("images/10k/{split}", "labels/sem_seg/masks/{split}", ".png"),
    _Layout("seg/images/{split}", "seg/labels/{split}", "_train_id.png"),
)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def find_split(root: Path, split: str) -> Split:
    """Find a split's images and masks in either layout of BDD100K and pair them by file stem, sorted by name.

    A split whose mask folder is missing or empty has no labels (`test`): all its images are kept, with `mask=None`.
    Otherwise an image without a mask, or a mask without an image, is listed in the result and not paired.

    Raises:
        UserError: `root` is no folder, has no such split, or the split holds no image.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (point --bdd100k_root at the unpacked BDD100K)")
    layout = next((lay for lay in _LAYOUTS if (root / lay.images.format(split=split)).is_dir()), None)
    if layout is None:
        places = " or ".join(str(root / lay.images.format(split=split)) for lay in _LAYOUTS)
        raise UserError(f"{root}: no images of split {split!r} (looked for {places})")
    image_dir, mask_dir = (root / folder.format(split=split) for folder in (layout.images, layout.masks))

    images: dict[str, Path] = {}
    for path in sorted(image_dir.iterdir()):
        if path.suffix.lower() in _IMAGE_SUFFIXES:
            if path.stem in images:
                raise UserError(f"{path}: a second image named {path.stem!r} beside {images[path.stem].name}; keep one")
            images[path.stem] = path
    if not images:
        raise UserError(f"{image_dir}: no .jpg or .png image in this folder")
    masks = {path.name.removesuffix(layout.mask_suffix): path for path in mask_dir.glob(f"*{layout.mask_suffix}")}
    if not masks:
        return Split([Item(name, path, None) for name, path in images.items()], False, [], [])
    return Split(
        items=[Item(name, images[name], masks[name]) for name in images if name in masks],
        labelled=True,
        images_without_mask=[path for name, path in images.items() if name not in masks],
        masks_without_image=[path for name, path in sorted(masks.items()) if name not in images],
    )
