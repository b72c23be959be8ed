"""BDD100K's semantic segmentation: the one table of its 19 classes, and finding, pairing and reading its files.

Ids, names and colours are the `trainId` table of BDD100K (and of Cityscapes, which it follows).
"""

from __future__ import annotations

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

IGNORE_LABEL = 255  # not labelled: in no loss, in no metric, never turned into a class
MAX_PIXELS = (1 << 28) // 3  # 256 MiB of RGB, which is Pillow's own limit; a picture that claims more is not read
MAX_JPEG_SCANS = 100  # a progressive JPEG has about ten; each is a pass over the whole picture, be it of a few bytes


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
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")  # in any case

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
    if not root.is_dir():
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
        if (root / layout.images.format(split=split)).is_dir():
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
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a JPEG or PNG without decoding it yet; whatever Pillow finds wrong, then or later, is a `UserError`."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would keep us waiting
        raise UserError(f"{path}: not a regular file; take it out of the folder")
    if path.is_file() and path.stat().st_size > 4 * MAX_PIXELS:  # JPEGs are read whole, be it a terabyte of holes
        raise UserError(f"{path}: has more bytes than the largest picture that is read (it is damaged: get it again)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and the like, which says nothing of the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("JPEG", "PNG")) as image:
                image.verify()  # a PNG's checksums, which decoding alone does not compare; nothing for a JPEG
            with Image.open(path, formats=("JPEG", "PNG")) as image:
                if image.height * image.width > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{path}: its header claims an absurd size, above {MAX_PIXELS / 1e6:.0f} megapixels "
                        "(the file is damaged: get it again)") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: neither a JPEG nor a PNG image (the file is damaged: get it again)") from None
    except UserError:
        raise
    except Exception as error:  # damaged bytes lead Pillow to almost any: a PNG without pixels, to an IndexError
        if isinstance(error, OSError) and error.errno is not None:  # the system's word: no such file, no permission
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        raise UserError(f"{path}: cannot be decoded: {error} (the file is damaged: get it again)") from None


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, from its header alone.

    Raises:
        UserError: the file is missing or is no image.
    """
    with _opened(path) as image:
        return image.height, image.width


def read_image(path: Path, *, upright: bool = False) -> np.ndarray:
    """Read an image whole as (H, W, 3) uint8 RGB; greyscale becomes RGB.

    Pixels come as they are stored, since the mask was drawn on the stored ones; only with `upright` is a picture
    turned as its EXIF orientation says, which is how every viewer shows it.

    Raises:
        UserError: the file is missing, truncated (which OpenCV would fill with grey), damaged, or not of 8 bits.
    """
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path}: not an 8-bit image (Pillow mode {image.mode}); convert it to 8 bits a channel")
        if image.format != "PNG":
            _check_jpeg(path)
        turn = _UPRIGHT.get(_orientation(image)) if upright else None
        image.load()  # np.asarray would swallow some errors of decoding
        picture = image if turn is None else image.transpose(turn)
        return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))  # convert() copies RGB too


def _orientation(image: Image.Image) -> object:
    """EXIF's orientation, 1-8 where it is told; damaged EXIF tells none, and says nothing of the pixels."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return None


def _check_jpeg(path: Path) -> None:
    """Check that a JPEG's last scan is followed by the end-of-image marker, and that it has not thousands of scans.

    Neither marker can occur inside a scan. Pillow notices a file that is cut off, but takes one whose missing end was
    filled with zeros, which is what an interrupted download or a full disk may leave, for an image with a flat lower
    part.
    """
    data = path.read_bytes()
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise UserError(f"{path}: truncated, the JPEG has no end (the file is damaged: get it again)")
    if (scans := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
        raise UserError(f"{path}: has {scans} scans, which would take hours to decode (save it anew, or leave it out)")


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
