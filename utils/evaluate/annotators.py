"""Saved predictions as files that annotation tools import: CVAT, Label Studio, and COCO's JSON.

A picture has one mask for each class in it. Masks are exact run lengths; pixels of no class are in no mask. Everything
is written from the PNGs of `--save_predictions`, one picture at a time: several processes can have saved them, and a
thousand pictures need no more memory than one.
"""

from __future__ import annotations

import json
import os
import shlex
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote
from xml.etree.ElementTree import Element, SubElement, tostring
from xml.sax.saxutils import escape

import numpy as np

from utils.data.bdd100k import read_mask, read_size
from utils.data.classes import ClassTable
from utils.data.description import train_ids
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write


class Labelled(NamedTuple):
    """A picture and its predicted classes."""

    path: str  # below the folder of all pictures, with slashes
    labels: np.ndarray  # (H, W) uint8, 255 = no class


def require_exportable(pictures: Mapping[str, Path]) -> None:
    """Check that the files to import can hold the pictures' paths.

    Raises:
        UserError: a path has control characters, or bytes that are no text.
    """
    for path in pictures.values():
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in str(path)):
            raise UserError(f"{path}: annotation tools take no control characters in a path; rename the picture")


def export_predictions(
    tool: str, output_dir: Path, predictions: Path, pictures: Mapping[str, Path], classes: ClassTable, *, model: str
) -> list[str]:
    """Write the files of a tool to `output_dir`, atomically.

    Args:
        tool: a key of `WRITERS`.
        predictions: the folder with the PNG of train ids of each picture.
        pictures: the picture's file by the name of its PNG; at least one.
        classes: those of the PNGs.
        model: what predicted, for the tools that show it.

    Returns:
        Lines that tell the user what was written.

    Raises:
        UserError: a PNG cannot be read, or a file cannot be written.
    """
    paths = {name: Path(os.path.abspath(path)) for name, path in pictures.items()}
    root = Path(os.path.commonpath([path.parent for path in paths.values()]))

    def labelled() -> Iterator[Labelled]:
        for name, path in paths.items():
            prediction = predictions / f"{name}.png"
            labels = read_mask(prediction, *read_size(prediction), train_ids(classes))
            yield Labelled(path.relative_to(root).as_posix(), labels)

    return WRITERS[tool](output_dir, root, labelled(), classes, model)


def write_cvat(
    output_dir: Path, root: Path, pictures: Iterator[Labelled], classes: ClassTable, model: str
) -> list[str]:
    """Write "CVAT 1.1" XML, and the labels as CVAT's raw label editor takes them."""
    archive = output_dir / FILES["cvat"][0]
    labels: list[dict[str, Any]] = [
        {"name": c.name, "color": _hex(c.color), "type": "any", "attributes": []} for c in classes
    ]
    meta = Element("meta")
    task = SubElement(meta, "task")
    SubElement(task, "name").text = model
    SubElement(task, "mode").text = "annotation"
    described = SubElement(task, "labels")
    for label in labels:
        element = SubElement(described, "label")
        for key in ("name", "color", "type"):
            SubElement(element, key).text = label[key]
        SubElement(element, "attributes")
    with _zip_member(archive, "annotations.xml", {"labels.json": json.dumps(labels, indent=1)}) as file:
        file.write(b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
        file.write(tostring(meta))
        for index, picture in enumerate(pictures):
            height, width = picture.labels.shape
            image = Element("image", id=str(index), name=picture.path, width=str(width), height=str(height))
            for class_id, mask in _masks(picture.labels, len(classes)):
                rows, columns = _extent(mask)
                place = {"left": columns.start, "top": rows.start}
                size = {"width": columns.stop - columns.start, "height": rows.stop - rows.start}
                numbers = {key: str(value) for key, value in {"occluded": 0, "z_order": 0, **place, **size}.items()}
                rle = ", ".join(map(str, _run_lengths(mask[rows, columns].ravel()).tolist()))
                SubElement(image, "mask", {"label": classes.names[class_id], "source": "auto", "rle": rle, **numbers})
            file.write(b"\n" + tostring(image))
        file.write(b"\n</annotations>\n")
    return [f"For CVAT, format CVAT 1.1: {archive}"]


def write_label_studio(
    output_dir: Path, root: Path, pictures: Iterator[Labelled], classes: ClassTable, model: str
) -> list[str]:
    """Write tasks with predicted brush masks, and the labelling interface that they belong to.

    Pictures are addressed as local files below the parent of `root`.
    """
    tasks, interface = (output_dir / name for name in FILES["labelstudio"])
    with atomic_write(tasks) as file:
        file.write(b"[")
        for index, picture in enumerate(pictures):
            height, width = picture.labels.shape
            regions = [
                {
                    "id": f"class-{class_id}",
                    "type": "brushlabels",
                    "from_name": "label",
                    "to_name": "image",
                    "original_width": width,
                    "original_height": height,
                    "image_rotation": 0,
                    "value": {
                        "format": "rle",
                        "rle": _label_studio_rle(mask.ravel()).tolist(),
                        "brushlabels": [classes.names[class_id]],
                    },
                }
                for class_id, mask in _masks(picture.labels, len(classes))
            ]
            address = f"/data/local-files/?d={quote(f'{root.name}/{picture.path}')}"
            task = {"data": {"image": address}, "predictions": [{"model_version": model, "result": regions}]}
            file.write(b",\n" * (index > 0) + _json(task))
        file.write(b"]\n")
    with atomic_write(interface) as file:
        labels = "".join(f'    <Label value="{escape(c.name)}" background="{_hex(c.color)}"/>\n' for c in classes)
        file.write(
            '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
            f'  <BrushLabels name="label" toName="image">\n{labels}  </BrushLabels>\n</View>\n'.encode()
        )
    serving = "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT"
    return [
        f"For Label Studio: {tasks}, with the labelling interface {interface}",
        f"    {serving}={shlex.quote(str(root.parent))} label-studio",
        f"    add {root} as local storage before importing",
    ]


def write_coco(
    output_dir: Path, root: Path, pictures: Iterator[Labelled], classes: ClassTable, model: str
) -> list[str]:
    """Write COCO's instances, one for each class of a picture. A category's id is its train id plus 1."""
    archive = output_dir / FILES["coco"][0]
    images, count = [], 0
    with _zip_member(archive, "annotations/instances_default.json") as file:
        categories = [{"id": c.id + 1, "name": c.name, "supercategory": ""} for c in classes]
        info = {"description": f"predicted by {model}"}
        file.write(b'{"info":%b,\n"licenses":[],\n"categories":%b,\n"annotations":[' % (_json(info), _json(categories)))
        for image_id, picture in enumerate(pictures, start=1):
            height, width = picture.labels.shape
            images.append({"id": image_id, "file_name": picture.path, "height": height, "width": width})
            for class_id, mask in _masks(np.asfortranarray(picture.labels), len(classes)):
                rows, columns = _extent(mask)
                annotation = {
                    "id": count + 1,
                    "image_id": image_id,
                    "category_id": class_id + 1,
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
                    "segmentation": {"size": [height, width], "counts": _run_lengths(mask.ravel(order="F")).tolist()},
                }
                file.write(b",\n" * (count > 0) + _json(annotation))
                count += 1
        file.write(b'],\n"images":%b}\n' % _json(images))
    return [f"For COCO's tools: {archive}"]


WRITERS: dict[str, Callable[[Path, Path, Iterator[Labelled], ClassTable, str], list[str]]] = {
    "cvat": write_cvat,
    "labelstudio": write_label_studio,
    "coco": write_coco,
}
FILES = {
    "cvat": ("predictions_cvat.zip",),
    "labelstudio": ("predictions_labelstudio.json", "predictions_labelstudio.xml"),
    "coco": ("predictions_coco.zip",),
}


def _masks(labels: np.ndarray, num_classes: int) -> Iterator[tuple[int, np.ndarray]]:
    """The id and the mask, H x W bool, of each class in a label map."""
    for class_id in np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[:num_classes]).tolist():
        yield class_id, labels == class_id


def _extent(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns that hold a mask, which is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _run_lengths(pixels: np.ndarray) -> np.ndarray:
    """The lengths of alternating runs of False and True, False first, of N bool."""
    starts = np.flatnonzero(np.diff(pixels, prepend=False))  # the first run has length 0 if it is True
    return np.diff(starts, prepend=0, append=len(pixels))


def _label_studio_rle(pixels: np.ndarray) -> np.ndarray:
    """Encode N bool as Label Studio does RGBA pixels of 0 or 255: (bytes,) uint8.

    The format is that of the npm package rle-pack. The head: the number of values in 32 bits, then all less 1 the bits
    of a value in 5, and four sizes of run lengths in 4 each. Each run: a 1, the index of its size in 2, the length less
    1, and the value.
    """
    bits = np.array([4, 8, 12, 16])
    longest = 1 << bits[-1]
    lengths = 4 * _run_lengths(pixels)
    values = 255 * (np.arange(len(lengths)) % 2)
    # A long run is cut into pieces; the first run may be empty and has none.
    pieces = -(-lengths // longest)
    last = np.cumsum(pieces) - 1
    sizes = np.full(pieces.sum(), longest)
    sizes[last[pieces > 0]] = (lengths - (pieces - 1) * longest)[pieces > 0]
    which = np.searchsorted(1 << bits, sizes)
    code = (((4 | which) << bits[which]) | (sizes - 1)) << 8 | np.repeat(values, pieces)
    head = (4 * len(pixels) << 21) | (7 << 16) | sum((int(n) - 1) << shift for n, shift in zip(bits, (12, 8, 4, 0)))
    codes, widths = np.append(head, code), np.append(53, 11 + bits[which])
    position = np.arange(widths.sum()) - np.repeat(np.cumsum(widths) - widths, widths)  # of a bit in its code
    return np.packbits((np.repeat(codes, widths) >> (np.repeat(widths, widths) - 1 - position)) & 1)


@contextmanager
def _zip_member(path: Path, name: str, others: Mapping[str, str] | None = None) -> Iterator[IO[bytes]]:
    """Open the member `name` of a new archive for writing, after `others` with their text."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, text in (others or {}).items():
            archive.writestr(other, text)
        with archive.open(name, "w", force_zip64=True) as member:
            yield member


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
