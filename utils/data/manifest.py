"""`manifest.json`: what `pre_bdd100k.py` wrote into a split's folder, so that its readers need not guess."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.data.bdd100k import MAX_PIXELS
from utils.data.classes import CLASS_NAMES, NUM_CLASSES
from utils.data.frame import ImageSize, frame_size, is_image_size
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, cannot_be_read, is_folder, read_json

FORMAT_VERSION = 1
IMAGE_DTYPES = ("float32", "float16", "uint8")
RESIZE_MODES = ("stretch", "pad")

Source = list[str | int]  # what tells a file from any other: real path, bytes, time of modification in ns


def source_of(path: Path) -> Source:
    """Identify a file, or the one that a link leads to.

    Raises:
        OSError: it is missing.
    """
    status = path.stat()
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class ManifestItem:
    """One image: `height` and `width` are the original's; `pixels` counts each class in the resized mask."""

    name: str
    height: int
    width: int
    pixels: list[int]  # one count per class, [] where the split has no labels
    ignored: int  # pixels of value 255


@dataclass(frozen=True)
class Manifest:
    image_size: ImageSize
    image_dtype: str
    resize_mode: str
    labelled: bool
    complete: bool  # False until every image of the split has been tried
    items: list[ManifestItem]
    format_version: int = FORMAT_VERSION
    class_names: list[str] = field(default_factory=lambda: list(CLASS_NAMES))
    # The files that each image's arrays are made of: image and mask, by name. While `complete` is False, also of those
    # that are not written yet. None: an older version wrote this.
    sources: dict[str, list[Source]] | None = None

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`, atomically."""
        fields = {key: value for key, value in asdict(self).items() if key != "sources" or value is not None}
        with atomic_write(folder / "manifest.json") as file:
            file.write(json.dumps(fields, indent=1).encode())


def read_manifest(folder: Path, *, allow_incomplete: bool = False) -> Manifest:
    """Read `folder/manifest.json`.

    Raises:
        UserError: `folder` or its manifest is missing, is not a manifest of this format, or (unless
            `allow_incomplete`) is of a run that was stopped before its end.
    """
    path = folder / "manifest.json"
    if not is_folder(folder):
        raise UserError(f"{folder}: no such folder (make it with pre_bdd100k.py)")
    try:
        fields = read_json(path)
        if fields.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: format {fields.get('format_version')!r}, this version reads {FORMAT_VERSION}; "
                "run pre_bdd100k.py again with --overwrite"
            )
        manifest = Manifest(**{**fields, "items": [ManifestItem(**item) for item in fields["items"]]})
        _check(manifest)
    except FileNotFoundError:
        for split in sorted(folder.glob("*/manifest.json")):
            raise UserError(f"{folder}: is above the splits; give one of them, such as {split.parent}") from None
        raise UserError(f"{path}: not found; {folder} was not written by pre_bdd100k.py") from None
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not a manifest of pre_bdd100k.py; run it again with --overwrite") from None
    if not (manifest.complete or allow_incomplete):
        raise UserError(f"{path}: preprocessing was stopped before its end; run pre_bdd100k.py again to go on")
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ValueError unless every field is what this program would have written."""
    good = (
        is_image_size(manifest.image_size)
        and manifest.image_dtype in IMAGE_DTYPES
        and manifest.resize_mode in RESIZE_MODES
        and isinstance(manifest.labelled, bool)
        and isinstance(manifest.complete, bool)
        and manifest.class_names == list(CLASS_NAMES)
        and all(_is_item(item, manifest) for item in manifest.items)
        and len({item.name for item in manifest.items}) == len(manifest.items)
        and (manifest.sources is None or all(_is_source(s) for files in manifest.sources.values() for s in files))
    )
    if not good:
        raise ValueError("a field has a value that pre_bdd100k.py does not write")


def _is_source(source: Any) -> bool:
    return isinstance(source, list) and [type(field) for field in source] == [str, int, int]


def _is_item(item: ManifestItem, manifest: Manifest) -> bool:
    sizes = (item.height, item.width, item.ignored, *item.pixels)
    return (
        # Names become file names: none may lead out of the folder.
        isinstance(item.name, str)
        and Path(item.name).name == item.name not in ("", "..")
        and "\0" not in item.name
        and isinstance(item.pixels, list)
        and len(item.pixels) == (NUM_CLASSES if manifest.labelled else 0)
        and all(type(size) is int for size in sizes)
        and item.height > 0
        and item.width > 0
        and item.height * item.width <= MAX_PIXELS
        and all(0 <= count <= math.prod(frame_size(manifest.image_size)) for count in (item.ignored, *item.pixels))
    )
