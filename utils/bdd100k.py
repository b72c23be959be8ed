"""BDD100K's semantic segmentation: the one table of its 19 classes, and finding, pairing and reading its files.

Ids, names and colours are the `trainId` table of BDD100K (and of Cityscapes, which it follows).
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image

from utils.errors import UserError
from utils.files import is_folder, listed
from utils.image_files import ABSURD_SIZE, DAMAGED, FORMATS, MAX_PIXELS, read_picture_file

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
    mask_dir: Path  # where masks were looked for
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
_TRAIN_ID_HINT = "use labels/sem_seg/masks/<split>/<name>.png or seg/labels/<split>/<name>_train_id.png"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # in any case
# Pictures too, but not read here.
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl")

# What turns the stored pixels upright, by EXIF orientation; 1 is upright already.
_UPRIGHT: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def find_split(root: Path, split: str) -> Split:
    """Find a split's images and masks in either layout of BDD100K and pair them by file stem, sorted by name.

    A split whose mask folder is missing or empty has no labels (`test`): all its images are kept, with `mask=None`.
    Otherwise an image without a mask, or a mask without an image, is listed in the result and not paired.

    Raises:
        UserError: `root` is no folder, has no such split, the split holds no image, or no image has a mask though
            there are masks.
    """
    if Path(split).name != split or split in ("", ".."):  # it names a folder to read and one to write: none elsewhere
        raise UserError(f"split {split!r}: not a plain folder name (use train, val or test)")
    if not is_folder(root):
        raise UserError(f"{root}: no such folder (point --bdd100k_root at the unpacked BDD100K)")
    layout = _find_layout(root, split)
    image_dir, mask_dir = (root / folder.format(split=split) for folder in (layout.images, layout.masks))

    images: dict[str, Path] = {}
    for path in _visible(image_dir):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in images:
                raise UserError(f"{path}: a second image named {path.stem!r} beside {images[path.stem].name}; keep one")
            images[path.stem] = path
    images = dict(sorted(images.items()))  # by stem, which is not quite the order of the file names
    if not images:
        raise UserError(f"{image_dir}: no .jpg or .png image in this folder")
    masks = {
        path.name.removesuffix(layout.mask_suffix): path
        for path in _visible(mask_dir)
        if path.name.endswith(layout.mask_suffix)
    }
    if not masks:
        return Split([Item(name, path, None) for name, path in images.items()], False, mask_dir, [], [])
    items = [Item(name, images[name], masks[name]) for name in images if name in masks]
    if not items:
        name = next(iter(images))
        raise UserError(f"{mask_dir}: no mask here belongs to any image of {image_dir} "
                        f"({images[name].name} needs {name}{layout.mask_suffix})")
    return Split(
        items=items,
        labelled=True,
        mask_dir=mask_dir,
        images_without_mask=[path for name, path in images.items() if name not in masks],
        masks_without_image=[path for name, path in sorted(masks.items()) if name not in images],
    )


def _find_layout(root: Path, split: str) -> _Layout:
    for layout in _LAYOUTS:
        if is_folder(root / layout.images.format(split=split)):
            return layout
    # The archives hold a folder `bdd100k` themselves, so the data often lie one level deeper than meant.
    for layout in _LAYOUTS:
        for deeper in sorted(root.glob(f"*/{layout.images.format(split=split)}")):
            found = root / deeper.relative_to(root).parts[0]
            raise UserError(f"{root}: no images of split {split!r} here, but in {found} (use --bdd100k_root {found})")
    places = " or ".join(str(root / layout.images.format(split=split)) for layout in _LAYOUTS)
    raise UserError(f"{root}: no images of split {split!r} (looked for {places})")


def _visible(folder: Path) -> list[Path]:
    """The folder's entries by name, without hidden ones (macOS packs a `._x.jpg` beside every `x.jpg`)."""
    return [path for path in listed(folder) if not path.name.startswith(".")] if is_folder(folder) else []


def foreign_pictures(folder: Path) -> list[Path]:
    """Pictures of a folder that are of formats that are not read here."""
    return [path for path in _visible(folder) if path.suffix.lower() in FOREIGN_SUFFIXES]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture without decoding it yet; whatever Pillow finds wrong, then or later, is a `UserError`."""
    picture = read_picture_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and the like, which says nothing of the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(picture.data), formats=FORMATS) as image:
                if image.height * image.width > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if picture.exif:
                    image.info["exif"] = picture.exif  # where Pillow looks for it
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{path}: {ABSURD_SIZE}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: cannot be decoded: its header makes no sense {DAMAGED}") from None
    except UserError:
        raise
    except Exception as error:  # damaged bytes lead Pillow to almost any
        raise UserError(f"{path}: cannot be decoded: {error} {DAMAGED}") from None


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, not decoded.

    Raises:
        UserError: the file is missing or truncated, or is no image.
    """
    with _opened(path) as image:
        return image.height, image.width


def read_image(path: Path, *, upright: bool = False) -> np.ndarray:
    """Read an image whole as (H, W, 3) uint8 RGB; greyscale becomes RGB.

    Pixels come as they are stored, since the mask was drawn on the stored ones; only with `upright` is a picture
    turned as its EXIF orientation says, which is how every viewer shows it.

    Raises:
        UserError: the file is missing, truncated (which OpenCV would fill with grey), damaged, not of 8 bits, or of
            a format that is not read.
    """
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path}: not an 8-bit image (Pillow mode {image.mode}); convert it to 8 bits a channel")
        # Of a TIFF, Pillow turns the pixels itself.
        turn = _UPRIGHT.get(_orientation(image)) if upright and image.format != "TIFF" else None
        image.load()  # np.asarray would swallow some errors of decoding
        picture = image if turn is None else image.transpose(turn)
        return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))  # convert() copies RGB too


def _orientation(image: Image.Image) -> object:
    """EXIF's orientation, 1-8 where it is told; damaged EXIF tells none, and says nothing of the pixels."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return None


def count_labels(mask: np.ndarray) -> np.ndarray:
    """How many pixels of an (H, W) uint8 mask have each of the 256 values, int64.

    Counts are exact up to 2^24, and rounded above, never to 0.
    """
    # np.bincount would make eight bytes of each pixel first, which takes two to three times as long.
    return cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel().astype(np.int64)


def read_mask(path: Path, height: int, width: int) -> np.ndarray:
    """Read a mask of train ids as (height, width) uint8 holding 0-18 and 255 only.

    Raises:
        UserError: the file is missing or damaged, is colour-coded, is of another size, or holds other labels.
    """
    with _opened(path) as image:
        if image.mode != "L":
            modes = {"P": "a colour-coded (palette)", "RGB": "a colour-coded (RGB)", "RGBA": "a colour-coded (RGBA)"}
            kind = modes.get(image.mode, f"no 8-bit greyscale (Pillow mode {image.mode})")
            raise UserError(f"{path}: {kind} picture, not one train id per pixel ({_TRAIN_ID_HINT})")
        if (image.height, image.width) != (height, width):
            raise UserError(f"{path}: mask is {image.width}x{image.height}, its image {width}x{height} "
                            "(they must be of one size)")
        image.load()  # as in read_image
        mask = np.asarray(image)
    present = np.flatnonzero(count_labels(mask))
    foreign = [int(label) for label in present if label >= NUM_CLASSES and label != IGNORE_LABEL]
    if foreign:
        shown = ", ".join(map(str, foreign[:10])) + (f" and {len(foreign) - 10} more" if len(foreign) > 10 else "")
        raise UserError(f"{path}: holds labels {shown}, allowed are 0-{NUM_CLASSES - 1} and {IGNORE_LABEL} "
                        f"({_TRAIN_ID_HINT})")
    return mask
