"""BDD100K's semantic segmentation: finding, pairing and reading its files."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image

from utils.data.classes import IGNORE_LABEL, NUM_CLASSES
from utils.data.image_files import ABSURD_SIZE, DAMAGED, FORMATS, MAX_PIXELS, read_picture_file
from utils.runtime.errors import UserError
from utils.runtime.files import is_folder, listed


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
    image_dir: Path
    mask_dir: Path  # where the masks are, or were looked for first
    base: Path  # the folder that the layout of the images is in
    images_without_mask: list[Path]
    masks_without_image: list[Path]
    notes: list[str]  # one for each place that is not in the folder the user named


class LabelError(UserError):
    """A mask that can be read but does not hold train ids."""


# The two forms in which BDD100K has been given out; `{split}` is train, val or test.
_IMAGE_DIRS = ("images/10k/{split}", "seg/images/{split}")
_MASK_DIRS = ("labels/sem_seg/masks/{split}", "seg/labels/{split}")
_COLOUR_DIRS = ("labels/sem_seg/colormaps/{split}", "seg/color_labels/{split}")  # pictures for people
_MAX_DEPTH = 2  # folders below the named one that are searched: the archives hold a folder `bdd100k` themselves
_TRAIN_ID = "_train_id"  # what the older form appends to a mask's name
_TRAIN_ID_HINT = "use labels/sem_seg/masks/<split>/<name>.png or seg/labels/<split>/<name>_train_id.png"
_LABEL_ID_HINT = (
    "probably Cityscapes' label ids, not train ids: map each by id2label[id].trainId of "
    "cityscapesscripts.helpers.labels"
)
_MAX_LABEL_ID = 33  # Cityscapes' label ids; its train ids end at 18
NUM_FIRST_MASKS = 16  # of a split, spread over it, that are read before the others
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


def match_key(name: str) -> str:
    """What names are compared by: macOS stores an accent as a character of its own (NFD), others do not (NFC)."""
    return unicodedata.normalize("NFC", name)


def find_split(root: Path, split: str) -> Split:
    """Find a split's images and masks, and pair them by file stem, sorted by name.

    Images and masks are searched for in both layouts of BDD100K: in `root`, up to two folders below it, and above it
    if `root` is a folder inside a layout. A mask is `<name>.png` or `<name>_train_id.png`, the suffix in any case.

    A split without masks anywhere has no labels (`test`): all its images are kept, with `mask=None`. Otherwise an
    image without a mask, or a mask without an image, is listed in the result and not paired.

    Raises:
        UserError: `root` is no folder or cannot be read, has no such split, holds it twice, the split holds no image,
            or there are files where masks belong, but no mask of any image.
    """
    if Path(split).name != split or split in ("", ".."):  # it names a folder to read and one to write: none elsewhere
        raise UserError(f"split {split!r}: not a plain folder name (use train, val or test)")
    if not is_folder(root):
        raise UserError(f"{root}: no such folder (point --bdd100k_root at the unpacked BDD100K)")
    base, image_dir = _find_images(root, split)
    images = _by_name([path for path in _visible(image_dir) if path.suffix.lower() in IMAGE_SUFFIXES], "image")
    images = dict(sorted(images.items(), key=lambda entry: entry[1].stem))  # not quite the order of file names
    mask_dir, masks, orphans = _find_masks(root, base, image_dir, images, split)
    notes = [] if base == root else [f"{split}: the images are in {image_dir}"]
    if masks and not mask_dir.is_relative_to(base):
        notes.append(f"{split}: the masks are in {mask_dir}")
    return Split(
        items=[Item(path.stem, path, masks.get(key)) for key, path in images.items() if key in masks or not masks],
        labelled=bool(masks),
        image_dir=image_dir,
        mask_dir=mask_dir,
        base=base,
        images_without_mask=[path for key, path in images.items() if masks and key not in masks],
        masks_without_image=orphans,
        notes=notes,
    )


def _find_images(root: Path, split: str) -> tuple[Path, Path]:
    """The folder that holds a layout, and the split's images in it."""
    empty = None
    for bases in _levels(root):
        found = {}
        for base in bases:
            folders = [folder for folder in _in(base, _IMAGE_DIRS, split) if is_folder(folder)]
            filled = [folder for folder in folders if any(p.suffix.lower() in IMAGE_SUFFIXES for p in _visible(folder))]
            if filled:
                found[base] = filled[0]
            elif folders:
                empty = empty or folders[0]
        if len(found) > 1:
            first, second, *_ = found
            raise UserError(
                f"{root}: holds split {split!r} more than once, in {first} and in {second} "
                f"(give one of them, such as --bdd100k_root {first})"
            )
        if found:
            return next(iter(found.items()))
    if empty:
        raise UserError(f"{empty}: no .jpg or .png image (or WebP, BMP, TIFF) in this folder")
    places = " or ".join(map(str, _in(root, _IMAGE_DIRS, split)))
    raise UserError(f"{root}: no images of split {split!r} (looked for {places}, here and up to two folders below)")


def _find_masks(
    root: Path, base: Path, image_dir: Path, images: Mapping[str, Path], split: str
) -> tuple[Path, dict[str, Path], list[Path]]:
    """The folder of a split's masks, the masks by the keys of `images`, and those of no image.

    Without any mask, the folder is the one that the layout of the images has.
    """
    own = _in(base, _MASK_DIRS, split)
    if image_dir == _in(base, _IMAGE_DIRS, split)[1]:
        own.reverse()  # the folder of the same layout first
    for folder in own:
        masks, orphans = _masks_in(folder, images)
        if masks:
            return folder, masks, orphans
    for bases in _levels(root):  # archives that were unpacked into folders of their own
        elsewhere = {}
        for other in bases:
            for folder in _in(other, _MASK_DIRS, split) if other != base else ():
                masks, orphans = _masks_in(folder, images)
                if masks:
                    elsewhere[folder] = masks, orphans
        if len(elsewhere) > 1:
            first, second, *_ = elsewhere
            raise UserError(f"{root}: holds masks of split {split!r} in {first} and in {second}; keep one")
        for folder, (masks, orphans) in elsewhere.items():
            return folder, masks, orphans
    example = next(iter(images.values()))
    needed = f"image {example.name} needs {example.stem}.png or {example.stem}{_TRAIN_ID}.png"
    for folder in own:
        if found := _visible(folder):
            jpeg = "; JPEG changes labels, save them as PNG" if found[0].suffix.lower() in (".jpg", ".jpeg") else ""
            raise UserError(
                f"{folder}: holds {len(found):,} files, such as {found[0].name}, but no mask here belongs "
                f"to any image of {image_dir} ({needed}{jpeg})"
            )
        if _masks_in(folder.parent, images)[0]:
            raise UserError(f"{folder.parent}: holds masks of split {split!r} (move them into {folder})")
    for folder in _in(base, _COLOUR_DIRS, split):
        if found := _visible(folder):
            raise UserError(
                f"{folder}: holds colour pictures, such as {found[0].name}, but there are no masks of "
                f"train ids in {own[0]} ({_TRAIN_ID_HINT})"
            )
    return own[0], {}, []


def _masks_in(folder: Path, images: Mapping[str, Path]) -> tuple[dict[str, Path], list[Path]]:
    """The folder's masks by the keys of `images`, and its masks of no image."""
    files = [path for path in _visible(folder) if path.suffix.lower() == ".png"]
    marked = [path for path in files if path.stem.lower().endswith(_TRAIN_ID)]
    by_name = _by_name(files, "mask") | _by_name(marked, "mask", len(_TRAIN_ID))
    masks = {key: by_name[key] for key in images if key in by_name}
    used = set(masks.values())
    # Beside masks that are marked as such, the others are pictures of them: a_train_color.png.
    return masks, [path for path in marked or files if path not in used]


def _by_name(paths: list[Path], what: str, suffix: int = 0) -> dict[str, Path]:
    """Paths by what they are matched by: the stem, without the last `suffix` characters."""
    found: dict[str, Path] = {}
    for path in paths:
        stem = path.stem[: len(path.stem) - suffix]
        other = found.setdefault(match_key(stem), path)
        if other is not path:
            if other.stem == path.stem:
                raise UserError(f"{path}: a second {what} named {stem!r} beside {other.name}; keep one")
            raise UserError(
                f"{path}: a second {what} of this name, which is written {path.name!a} here and "
                f"{other.name!a} there (in another case or Unicode form); keep one"
            )
    return found


def _in(base: Path, folders: tuple[str, ...], split: str) -> list[Path]:
    return [base / folder.format(split=split) for folder in folders]


def _levels(root: Path) -> Iterator[list[Path]]:
    """Where a layout may begin, the likeliest first: `root`, folders below it, and a folder that it is inside of."""
    level = [root]
    for depth in range(_MAX_DEPTH + 1):
        if depth:
            level = [path for folder in level for path in _folders(folder)]
        yield level
    parts = Path(os.path.abspath(root)).parts
    for folder in (*_IMAGE_DIRS, *_MASK_DIRS):
        pattern = Path(folder).parts  # the last is any split
        for count in range(1, len(pattern) + 1):
            tail = parts[-count:]
            if tail[: len(pattern) - 1] == pattern[:count][: len(pattern) - 1]:
                yield [Path(*parts[:-count])]


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:  # which knows folders without a look at each of ten thousand images
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []  # one that may not be read is not searched


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
        UserError: the file is missing or damaged, or is of another size; a `LabelError`, it is colour-coded or holds
            other labels.
    """
    with _opened(path) as image:
        if image.mode != "L":
            modes = {"P": "a colour-coded (palette)", "RGB": "a colour-coded (RGB)", "RGBA": "a colour-coded (RGBA)"}
            kind = modes.get(image.mode, f"no 8-bit greyscale (Pillow mode {image.mode})")
            raise LabelError(f"{path}: {kind} picture, not one train id per pixel ({_TRAIN_ID_HINT})")
        if (image.height, image.width) != (height, width):
            raise UserError(
                f"{path}: mask is {image.width}x{image.height}, its image {width}x{height} (they must be of one size)"
            )
        image.load()  # as in read_image
        mask = np.asarray(image)
    present = np.flatnonzero(count_labels(mask))
    foreign = [int(label) for label in present if label >= NUM_CLASSES and label != IGNORE_LABEL]
    if foreign:
        shown = ", ".join(map(str, foreign[:10])) + (f" and {len(foreign) - 10} more" if len(foreign) > 10 else "")
        hint = f"{_LABEL_ID_HINT}; or {_TRAIN_ID_HINT}" if present[-1] <= _MAX_LABEL_ID else _TRAIN_ID_HINT
        raise LabelError(f"{path}: holds labels {shown}, allowed are 0-{NUM_CLASSES - 1} and {IGNORE_LABEL} ({hint})")
    return mask


def read_item(item: Item) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an image, (H, W, 3) uint8 RGB, and its mask, (H, W) uint8, so that they lie on each other.

    An image whose EXIF says how to turn it is turned if the mask has the size of the turned one.

    Raises:
        UserError: as of `read_image` and `read_mask`; or EXIF turns the image and the sizes cannot tell whether the
            mask was drawn on the turned one.
    """
    if item.mask is None:
        return read_image(item.image), None
    image = read_image(item.image, upright=_is_drawn_upright(item.image, item.mask))
    return image, read_mask(item.mask, *image.shape[:2])


def _is_drawn_upright(image: Path, mask: Path) -> bool:
    with _opened(image) as opened:
        size, orientation = opened.size, _orientation(opened)
    if orientation not in _UPRIGHT:
        return False
    with _opened(mask) as opened:
        mask_size = opened.size
    if orientation in (5, 6, 7, 8) and size[0] != size[1]:
        return mask_size == size[::-1]
    if mask_size != size:
        return False  # which `read_mask` tells
    raise UserError(
        f"{image}: EXIF orientation {orientation}, so that viewers show it turned, and the size of {mask} "
        "does not tell on which view it was drawn (if on the turned one, turn the pixels, as `mogrify "
        "-auto-orient` does; if on the stored one, remove the tag, as `exiftool -Orientation=` does)"
    )


def check_first_masks(split: Split) -> str | None:
    """Read some masks, spread over the split, so that labels of another kind are told before any work.

    Masks that cannot be read are left to whoever reads them all.

    Returns:
        A line to warn with if the labels are allowed, but their shares are those of another kind.

    Raises:
        LabelError: some do not hold train ids.
    """
    masks = [item.mask for item in split.items if item.mask]
    chosen = sorted({round(i * (len(masks) - 1) / (NUM_FIRST_MASKS - 1)) for i in range(NUM_FIRST_MASKS) if masks})
    counts = np.zeros(256, dtype=np.int64)
    wrong = []
    for path in (masks[index] for index in chosen):
        try:
            height, width = read_size(path)
            counts += count_labels(read_mask(path, height, width))
        except LabelError as error:
            wrong.append(error)
        except UserError:
            continue
    if wrong:
        raise LabelError(f"{wrong[0]}; wrong labels in {len(wrong)} of the {len(chosen)} masks checked")
    # Of label ids, 7 is the road, and no mask has 255. Of train ids, 7 is traffic signs, and 0 the road.
    if counts[IGNORE_LABEL] or counts[7] <= max(counts.sum() / 8, counts[0]):
        return None
    share = 100 * counts[7] / counts.sum()
    return (
        f"{split.mask_dir}: label 7 (traffic sign) is {share:.0f} % of the {len(chosen)} masks checked, more than "
        f"label 0 (road); look at them before training ({_LABEL_ID_HINT}; or {_TRAIN_ID_HINT})"
    )
