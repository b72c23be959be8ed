"""`manifest.json`: what `pre_bdd100k.py` wrote into a split's folder, so that its readers need not guess."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from utils.bdd100k import CLASS_NAMES, NUM_CLASSES
from utils.errors import UserError
from utils.files import atomic_write

FORMAT_VERSION = 1
IMAGE_DTYPES = ("float32", "float16", "uint8")
RESIZE_MODES = ("stretch", "pad")


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
    image_size: int
    image_dtype: str
    resize_mode: str
    labelled: bool
    complete: bool  # False until every image of the split has been tried
    items: list[ManifestItem]
    format_version: int = FORMAT_VERSION
    class_names: list[str] = field(default_factory=lambda: list(CLASS_NAMES))

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`, atomically."""
        with atomic_write(folder / "manifest.json") as file:
            file.write(json.dumps(asdict(self), indent=1).encode())


def read_manifest(folder: Path, *, allow_incomplete: bool = False) -> Manifest:
    """Read `folder/manifest.json`.

    Raises:
        UserError: `folder` or its manifest is missing, is not a manifest of this format, or (unless
            `allow_incomplete`) is of a run that was stopped before its end.
    """
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (make it with pre_bdd100k.py)")
    try:
        fields = json.loads(path.read_bytes())
        if fields.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path}: format {fields.get('format_version')!r}, this version reads {FORMAT_VERSION}; "
                            "run pre_bdd100k.py again with --overwrite")
        manifest = Manifest(**{**fields, "items": [ManifestItem(**item) for item in fields["items"]]})
        _check(manifest)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {folder} was not written by pre_bdd100k.py") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not a manifest of pre_bdd100k.py; run it again with --overwrite") from None
    if not (manifest.complete or allow_incomplete):
        raise UserError(f"{path}: preprocessing was stopped before its end; run pre_bdd100k.py again to go on")
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ValueError unless every field is what this program would have written."""
    counts = NUM_CLASSES if manifest.labelled else 0
    good = (
        isinstance(manifest.image_size, int)
        and manifest.image_size > 0
        and manifest.image_dtype in IMAGE_DTYPES
        and manifest.resize_mode in RESIZE_MODES
        and manifest.class_names == list(CLASS_NAMES)
        and all(
            # Names become file names: none may lead out of the folder.
            Path(item.name).name == item.name not in ("", "..")
            and item.height > 0
            and item.width > 0
            and len(item.pixels) == counts
            for item in manifest.items
        )
    )
    if not good:
        raise ValueError("a field has a value that pre_bdd100k.py does not write")
