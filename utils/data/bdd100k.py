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

from utils.data.classes import BDD100K, IGNORE_LABEL
from utils.data.description import Labels
from utils.data.image_files import ABSURD_SIZE, DAMAGED, FORMATS, IMAGE_SUFFIXES, MAX_PIXELS, read_picture_file
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
    """A split's images paired with their masks by name, and the files without a partner."""

    items: list[Item]
    labelled: bool
    image_dir: Path
    mask_dir: Path  # where the masks are, or were first searched
    base: Path  # the folder that holds the layout of the images
    images_without_mask: list[Path]
    masks_without_image: list[Path]
    notes: list[str]  # about images or masks found in another folder than the user gave
    labels: Labels | None = None  # what the masks hold, None for BDD100K's train ids


class LabelError(UserError):
    """A readable mask with other values than the data set's."""


# The two official layouts; `{split}` is train, val or test.
_IMAGE_DIRS = ("images/10k/{split}", "seg/images/{split}")
_MASK_DIRS = ("labels/sem_seg/masks/{split}", "seg/labels/{split}")
_COLOUR_DIRS = ("labels/sem_seg/colormaps/{split}", "seg/color_labels/{split}")  # pictures for people
_MAX_DEPTH = 2  # levels of folders that are searched: the archives contain a folder `bdd100k`
_TRAIN_ID = "_train_id"  # the end of a mask's name in the older layout
_TRAIN_ID_HINT = "use labels/sem_seg/masks/<split>/<name>.png or seg/labels/<split>/<name>_train_id.png"
_LABEL_ID_HINT = (
    "probably Cityscapes' label ids, not train ids: map each by id2label[id].trainId of "
    "cityscapesscripts.helpers.labels"
)
_MAX_LABEL_ID = 33  # Cityscapes' label ids; its train ids end at 18
_UNLISTED = 254  # marks values that are not listed; above all class ids
NUM_FIRST_MASKS = 16  # spread over the split, read before the others
_LOSSLESS = ("PNG", "BMP", "TIFF")  # the formats of masks, as Pillow calls them
# Picture formats that are not supported.
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl")

# The transpose that turns stored pixels upright, by EXIF orientation; 1 is upright.
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
    """The form in which names are compared: macOS stores accents as separate characters (NFD), others do not (NFC)."""
    return unicodedata.normalize("NFC", name)


def find_split(root: Path, split: str) -> Split:
    """Find a split's images and masks, and pair them by file stem, sorted by name.

    Both layouts of BDD100K are detected: in `root`, up to two folders below it, and above it if `root` is a folder
    inside a layout. A mask is `<name>.png` or `<name>_train_id.png`, the suffix in any case.

    A split without any mask has no labels (`test`): all its images are kept with `mask=None`. Otherwise images without
    a mask and masks without an image are listed in the result.

    Raises:
        UserError: `root` is not a folder or cannot be read, has no such split, holds it twice, the split holds no
            image, or the mask folder holds files but no mask of any image.
    """
    if Path(split).name != split or split in ("", ".."):  # it is a folder to read and one to write
        raise UserError(f"split {split!r}: not a plain folder name (use train, val or test)")
    if not is_folder(root):
        raise UserError(f"{root}: no such folder; give the unpacked BDD100K as --bdd100k_root")
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
    """The folder that holds a layout, and the split's image folder in it."""
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
    places = " or ".join(map(str, _in(root, _IMAGE_DIRS, split)))
    missing = f"{root}: no images of split {split!r} (searched {places}, here and up to two folders below)"
    raise UserError(f"{empty}: no .jpg or .png image (or WebP, BMP, TIFF) in this folder" if empty else missing)


def _find_masks(
    root: Path, base: Path, image_dir: Path, images: Mapping[str, Path], split: str
) -> tuple[Path, dict[str, Path], list[Path]]:
    """The folder of a split's masks, the masks by the keys of `images`, and the masks without an image.

    Without any mask, the folder is that of the images' layout.
    """
    own = _in(base, _MASK_DIRS, split)
    if image_dir == _in(base, _IMAGE_DIRS, split)[1]:
        own.reverse()  # the same layout first
    for folder in own:
        masks, orphans = _masks_in(folder, images)
        if masks:
            return folder, masks, orphans
    for bases in _levels(root):  # archives unpacked into separate folders
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
    if wrong := _unusable_masks(own, _in(base, _COLOUR_DIRS, split), image_dir, images):
        raise UserError(wrong)
    return own[0], {}, []


def _unusable_masks(
    mask_dirs: list[Path], colour_dirs: list[Path], image_dir: Path, images: Mapping[str, Path]
) -> str | None:
    """Why a split without a usable mask is not simply unlabelled, if so."""
    example = next(iter(images.values()))
    needed = f"image {example.name} needs {example.stem}.png or {example.stem}{_TRAIN_ID}.png"
    for folder in mask_dirs:
        if found := _visible(folder):
            jpeg = "; JPEG changes labels, save them as PNG" if found[0].suffix.lower() in (".jpg", ".jpeg") else ""
            return (
                f"{folder}: holds {len(found):,} files, such as {found[0].name}, but no mask here belongs "
                f"to any image of {image_dir} ({needed}{jpeg})"
            )
        if _masks_in(folder.parent, images)[0]:
            return f"{folder.parent}: holds the masks of split {folder.name!r}; move them into {folder}"
    for folder in colour_dirs:
        if found := _visible(folder):
            return (
                f"{folder}: holds colour pictures, such as {found[0].name}, but {mask_dirs[0]} has no masks of train "
                f"ids ({_TRAIN_ID_HINT})"
            )
    return None


def _masks_in(folder: Path, images: Mapping[str, Path]) -> tuple[dict[str, Path], list[Path]]:
    """The folder's masks by the keys of `images`, and its masks without an image."""
    files = [path for path in _visible(folder) if path.suffix.lower() == ".png"]
    marked = [path for path in files if path.stem.lower().endswith(_TRAIN_ID)]
    by_name = _by_name(files, "mask") | _by_name(marked, "mask", len(_TRAIN_ID))
    masks = {key: by_name[key] for key in images if key in by_name}
    used = set(masks.values())
    # If some masks are marked, unmarked files are colour pictures such as a_train_color.png.
    return masks, [path for path in marked or files if path not in used]


def _by_name(paths: list[Path], what: str, suffix: int = 0) -> dict[str, Path]:
    """Paths by `match_key` of their stem without the last `suffix` characters."""
    found: dict[str, Path] = {}
    for path in paths:
        stem = path.stem[: len(path.stem) - suffix]
        other = found.setdefault(match_key(stem), path)
        if other is not path:
            is_same = other.stem == path.stem
            name = f"{stem!r}" if is_same else f"{path.name!a}"  # forms that look alike are escaped
            twin = other.name if is_same else f"{other.name!a}, in another case or Unicode form"
            raise UserError(f"{path}: a second {what} named {name} beside {twin}; keep one")
    return found


def _in(base: Path, folders: tuple[str, ...], split: str) -> list[Path]:
    return [base / folder.format(split=split) for folder in folders]


def _levels(root: Path) -> Iterator[list[Path]]:
    """Where a layout may begin, the likeliest first: `root`, folders below it, and folders above it."""
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
        with os.scandir(folder) as entries:  # faster than a status call for each of ten thousand images
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []  # an unreadable folder is not searched


def _visible(folder: Path) -> list[Path]:
    """The folder's entries by name, without hidden ones (macOS archives contain `._x.jpg` for every `x.jpg`)."""
    return [path for path in listed(folder) if not path.name.startswith(".")] if is_folder(folder) else []


def foreign_pictures(folder: Path) -> list[Path]:
    """Pictures of a folder in formats that are not supported."""
    return [path for path in _visible(folder) if path.suffix.lower() in FOREIGN_SUFFIXES]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture without decoding it; all errors of Pillow within the context become a `UserError`."""
    picture = read_picture_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd EXIF and the like, not about pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(picture.data), formats=FORMATS) as image:
                if image.height * image.width > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if picture.exif:
                    image.info["exif"] = picture.exif  # where Pillow looks for it
                yield image
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise almost anything in Pillow
        reason = f"cannot be decoded: {error} {DAMAGED}"
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            reason = ABSURD_SIZE
        elif isinstance(error, Image.UnidentifiedImageError):
            reason = f"cannot be decoded: its header is invalid {DAMAGED}"
        raise UserError(f"{path}: {reason}") from None


def read_size(path: Path) -> tuple[int, int]:
    """Read the (height, width) of an image file without decoding it.

    Raises:
        UserError: the file is missing or truncated, or is not an image.
    """
    with _opened(path) as image:
        return image.height, image.width


def read_image(path: Path, *, upright: bool = False) -> np.ndarray:
    """Read a complete image as (H, W, 3) uint8 RGB; greyscale becomes RGB.

    Args:
        path: the file.
        upright: turn the picture by its EXIF orientation, as viewers do. Without it, pixels come as stored: BDD100K's
            masks were drawn on these.

    Raises:
        UserError: the file is missing, truncated (OpenCV would fill it with grey), damaged, not of 8 bits, or of a
            format that is not supported.
    """
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path}: not an 8-bit image (Pillow mode {image.mode}); convert it to 8 bits a channel")
        # Pillow turns a TIFF itself.
        turn = _UPRIGHT.get(_orientation(image)) if upright and image.format != "TIFF" else None
        image.load()  # np.asarray hides some decoding errors
        picture = image if turn is None else image.transpose(turn)
        return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))  # convert() copies RGB too


def _orientation(image: Image.Image) -> object:
    """EXIF's orientation, 1-8, or None; damaged EXIF counts as none, as the pixels may be intact."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return None


def count_labels(mask: np.ndarray) -> np.ndarray:
    """Count the pixels of an (H, W) uint8 mask with each of the 256 values, int64.

    Counts are exact up to 2^24 and rounded above, never to 0.
    """
    # np.bincount takes two to three times as long: it converts pixels to eight bytes first.
    return cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel().astype(np.int64)


def read_mask(path: Path, height: int, width: int, labels: Labels | None = None) -> np.ndarray:
    """Read a mask as (height, width) uint8 class ids; 255 is not labelled.

    Args:
        labels: what its values mean; None for BDD100K's train ids.

    Raises:
        UserError: the file is missing, damaged, or of another size.
        LabelError: the mask is of another kind than `labels` says, of a lossy format, or holds values that are not
            listed.
    """
    with _opened(path) as image:
        if labels:
            _require_kind(path, image, labels)
        elif image.mode != "L":
            modes = {"P": "a colour-coded (palette)", "RGB": "a colour-coded (RGB)", "RGBA": "a colour-coded (RGBA)"}
            kind = modes.get(image.mode, f"not an 8-bit greyscale (Pillow mode {image.mode})")
            raise LabelError(f"{path}: {kind} picture, not one train id per pixel ({_TRAIN_ID_HINT})")
        if image.format not in _LOSSLESS:  # whatever its name says
            raise LabelError(f"{path}: is a {image.format} picture, which changes values; save the mask as PNG")
        if (image.height, image.width) != (height, width):
            raise UserError(
                f"{path}: mask is {image.width}x{image.height}, its image {width}x{height} (sizes must be equal)"
            )
        image.load()  # as in read_image
        if labels:
            return _class_ids(path, image, labels)
        mask = np.asarray(image)
    present = np.flatnonzero(count_labels(mask))
    foreign = [int(label) for label in present if label >= len(BDD100K) and label != IGNORE_LABEL]
    if foreign:
        shown = ", ".join(map(str, foreign[:10])) + (f" and {len(foreign) - 10} more" if len(foreign) > 10 else "")
        hint = f"{_LABEL_ID_HINT}; or {_TRAIN_ID_HINT}" if present[-1] <= _MAX_LABEL_ID else _TRAIN_ID_HINT
        raise LabelError(f"{path}: holds labels {shown}, allowed are 0-{len(BDD100K) - 1} and {IGNORE_LABEL} ({hint})")
    return mask


def _require_kind(path: Path, image: Image.Image, labels: Labels) -> None:
    """Raise LabelError if the picture cannot hold values of the kind that `labels` says."""
    modes = {"L": "8-bit greyscale", "P": "palette", "RGB": "RGB", "RGBA": "RGB", "1": "1-bit"}
    found = modes.get(image.mode, f"Pillow mode {image.mode}")
    allowed: tuple[str, ...] = ("L", "P")
    kind, needs = "ids", "one byte a pixel (8-bit greyscale, or a palette)"
    if labels.kind == "colors":
        allowed = ("P", "RGB", "RGBA")
        kind, needs = "colors", "an RGB or a palette picture"
    if image.mode not in allowed:
        raise LabelError(f"{path}: a mask of kind {kind} is {needs}, but this is {found}; see the description's labels")


def _class_ids(path: Path, image: Image.Image, labels: Labels) -> np.ndarray:
    """The class of each pixel by its value, (H, W) uint8."""
    if labels.kind == "ids":
        values = np.asarray(image)
        table = np.full(256, _UNLISTED, dtype=np.uint8)
    else:
        channels = np.asarray(image if image.mode in ("RGB", "RGBA") else image.convert("RGB"))
        if channels.shape[2] == 4 and (channels[..., 3] != 255).any():
            raise LabelError(
                f"{path}: has transparent pixels, which have no colour; save the mask without transparency"
            )
        red, green, blue = (channels[..., i].astype(np.int32) for i in range(3))
        values = (red << 16) | (green << 8) | blue
        table = np.full(1 << 24, _UNLISTED, dtype=np.uint8)
    for value, class_id in [*labels.class_ids.items(), *((value, IGNORE_LABEL) for value in labels.ignored)]:
        table[value if isinstance(value, int) else (value[0] << 16) | (value[1] << 8) | value[2]] = class_id
    mask = table[values]
    unlisted = mask == _UNLISTED
    if not unlisted.any():
        return mask
    if labels.unlisted == "error":
        found = np.unique(values[unlisted]).tolist()
        texts = [str(v) if labels.kind == "ids" else f"[{v >> 16}, {v >> 8 & 255}, {v & 255}]" for v in found[:10]]
        shown = ", ".join(texts) + (f" and {len(found) - 10:,} more" if len(found) > 10 else "")
        what = "values" if labels.kind == "ids" else "colors"
        raise LabelError(
            f"{path}: holds {what} {shown}, which the description does not list; add them to values or to ignore, or "
            "set unlisted: ignore"
        )
    mask[unlisted] = IGNORE_LABEL
    return mask


def read_item(item: Item, labels: Labels | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an image, (H, W, 3) uint8 RGB, and its mask, (H, W) uint8 class ids, aligned with each other.

    If EXIF turns the image, it is turned if the mask has the size of the turned image. `labels` is as in `read_mask`.

    Raises:
        UserError: as `read_image` and `read_mask`; or EXIF turns the image, and the sizes do not show whether the mask
            was drawn on the turned image.
    """
    if item.mask is None:
        return read_image(item.image), None
    image = read_image(item.image, upright=_is_drawn_upright(item.image, item.mask))
    height, width, _ = image.shape
    return image, read_mask(item.mask, height, width, labels)


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
        return False  # `read_mask` raises the error
    raise UserError(
        f"{image}: EXIF orientation {orientation}: viewers show it turned, and the size of {mask} does not "
        "show whether it was drawn on the turned image (if so, turn the pixels with `mogrify -auto-orient`; if not, "
        "remove the tag with `exiftool -Orientation=`)"
    )


def check_first_masks(split: Split) -> str | None:
    """Read some masks, spread over the split, to detect labels that are not the data set's before any work.

    Masks that cannot be read are skipped.

    Returns:
        A warning if BDD100K's labels are valid, but their shares are not those of train ids.

    Raises:
        LabelError: some masks hold other values.
    """
    masks = [item.mask for item in split.items if item.mask]
    chosen = sorted({round(i * (len(masks) - 1) / (NUM_FIRST_MASKS - 1)) for i in range(NUM_FIRST_MASKS) if masks})
    counts = np.zeros(256, dtype=np.int64)
    wrong = []
    for path in (masks[index] for index in chosen):
        try:
            height, width = read_size(path)
            counts += count_labels(read_mask(path, height, width, split.labels))
        except LabelError as error:
            wrong.append(error)
        except UserError:
            continue
    if wrong:
        raise LabelError(f"{wrong[0]}; wrong labels in {len(wrong)} of the {len(chosen)} masks checked")
    # Among label ids, 7 is road, and masks have no 255. Among train ids, 7 is traffic sign, and 0 is road.
    if split.labels or counts[IGNORE_LABEL] or counts[7] <= max(counts.sum() / 8, counts[0]):
        return None
    share = 100 * counts[7] / counts.sum()
    return (
        f"{split.mask_dir}: label 7 (traffic sign) is {share:.0f} % of the {len(chosen)} masks checked, more than "
        f"label 0 (road); look at them before training ({_LABEL_ID_HINT}; or {_TRAIN_ID_HINT})"
    )
