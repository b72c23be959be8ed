"""`manifest.json`: the description of a preprocessed split, written by `pre_bdd100k.py`."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.data.bdd100k import MAX_PIXELS
from utils.data.classes import BDD100K, ClassTable
from utils.data.description import DEFAULT, Description, load_description, read_plain_description
from utils.data.frame import ImageSize, frame_size, is_image_size
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, exists, is_folder, read_json

FORMAT_VERSION = 1
IMAGE_DTYPES = ("float32", "float16", "uint8")
RESIZE_MODES = ("stretch", "pad")

Source = list[str | int]  # identifies a file: real path, bytes, time of modification in ns


def source_of(path: Path) -> Source:
    """Identify a file, or the target of a link.

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
    class_names: list[str] = field(default_factory=lambda: list(BDD100K.names))
    # The source files of each image's arrays by name: image and mask. While `complete` is False, also of arrays not yet
    # written. None in a manifest of an older version.
    sources: dict[str, list[Source]] | None = None
    dataset: dict[str, Any] | None = None  # `Description.to_plain`; None for BDD100K

    @cached_property
    def description(self) -> Description:
        return load_description(DEFAULT) if self.dataset is None else read_plain_description(self.dataset)

    @property
    def classes(self) -> ClassTable:
        return BDD100K if self.dataset is None else self.description.classes

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`, atomically."""
        fields = {key: value for key, value in asdict(self).items() if value is not None}
        with atomic_write(folder / "manifest.json") as file:
            file.write(json.dumps(fields, indent=1).encode())


def read_manifest(folder: Path, *, allow_incomplete: bool = False) -> Manifest:
    """Read `folder/manifest.json`.

    Raises:
        UserError: `folder` or its manifest is missing, the manifest is not of this format, or (unless
            `allow_incomplete`) preprocessing was stopped before its end.
    """
    path = folder / "manifest.json"
    if not is_folder(folder):
        raise UserError(f"{folder}: no such folder; check the path, or create it with pre_bdd100k.py")
    if not exists(path):
        splits = sorted(split.parent for split in folder.glob("*/manifest.json"))
        found = (
            f"holds splits; give one of them, such as {splits[0]}" if splits else "was not written by pre_bdd100k.py"
        )
        raise UserError(f"{path}: no such file; {folder} {found}")
    fields = read_json(path, "run pre_bdd100k.py again with --overwrite")
    try:
        manifest = Manifest(**{**fields, "items": [ManifestItem(**item) for item in fields["items"]]})
        wrong = None if _is_valid(manifest) else "not a manifest of pre_bdd100k.py"
    except (ValueError, TypeError, KeyError, AttributeError):
        wrong = "not a manifest of pre_bdd100k.py"
    version = fields.get("format_version", FORMAT_VERSION) if isinstance(fields, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:
        wrong = f"format {version!r}, this version reads {FORMAT_VERSION}"
    if wrong:
        raise UserError(f"{path}: {wrong}; run pre_bdd100k.py again with --overwrite")
    if not (manifest.complete or allow_incomplete):
        raise UserError(f"{path}: preprocessing was stopped before its end; run pre_bdd100k.py again to resume")
    return manifest


def _is_valid(manifest: Manifest) -> bool:
    """Whether every field has a value that this program writes."""
    return (
        is_image_size(manifest.image_size)
        and manifest.image_dtype in IMAGE_DTYPES
        and manifest.resize_mode in RESIZE_MODES
        and isinstance(manifest.labelled, bool)
        and isinstance(manifest.complete, bool)
        and manifest.class_names == list(manifest.classes.names)
        and all(_is_item(item, manifest) for item in manifest.items)
        and len({item.name for item in manifest.items}) == len(manifest.items)
        and (manifest.sources is None or all(_is_source(s) for files in manifest.sources.values() for s in files))
    )


def _is_source(source: Any) -> bool:
    return isinstance(source, list) and [type(field) for field in source] == [str, int, int]


def _is_item(item: ManifestItem, manifest: Manifest) -> bool:
    sizes = (item.height, item.width, item.ignored, *item.pixels)
    return (
        # Names become file names and must not lead out of the folder.
        isinstance(item.name, str)
        and Path(item.name).name == item.name not in ("", "..")
        and "\0" not in item.name
        and isinstance(item.pixels, list)
        and len(item.pixels) == (len(manifest.classes) if manifest.labelled else 0)
        and all(type(size) is int for size in sizes)
        and item.height > 0
        and item.width > 0
        and item.height * item.width <= MAX_PIXELS
        and all(0 <= count <= math.prod(frame_size(manifest.image_size)) for count in (item.ignored, *item.pixels))
    )
