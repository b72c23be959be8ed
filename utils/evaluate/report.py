"""The result of an evaluation: printed, and written as text, JSON, CSV, a picture and an HTML page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.data.classes import BDD100K, ClassTable
from utils.evaluate.annotators import FILES
from utils.evaluate.gallery import LABEL_MAPS, Card
from utils.evaluate.metrics import (
    ImageFigures,
    describe_boxes,
    format_details,
    format_report,
    image_figures,
    results_dict,
)
from utils.evaluate.page import report_rows, write_report_page
from utils.evaluate.plots import save_confusion_matrix
from utils.runtime import distributed
from utils.runtime.choices import MAP_RULES, MapRule
from utils.runtime.errors import UserError, printable
from utils.runtime.files import atomic_write, is_folder, listed, read_json

_SIZES = {"frame": "in the preprocessed frame", "original": "at the original size of the images"}
_TTA = "test-time augmentation: the class probabilities of each image and of its mirror image are averaged\n"

IMAGE_SCORES = "image_scores.csv"
PAGE = "report.html"
_EXPORTS = [name for names in FILES.values() for name in names]
_RESULTS = (
    "evaluation_results.txt",
    "evaluation_results.json",
    IMAGE_SCORES,
    "confusion_matrix.png",
    PAGE,
    LABEL_MAPS,
    *_EXPORTS,
)
_PICTURES = ("visualizations", "predictions")
_RECORD = ".pictures.json"  # the pictures that an evaluation wrote; the next one removes them


def begin_results(output_dir: Path, pictures: Mapping[str, Iterable[str]]) -> None:
    """Remove the results and pictures of an earlier evaluation.

    Pictures without a record may be the user's. They stay, with a message, unless this evaluation replaces them.

    Args:
        pictures: names of the pictures that this evaluation will write, by their folder in `output_dir`.

    Raises:
        UserError: a file cannot be removed or written.
    """
    record = output_dir / _RECORD
    coming = [(folder, name) for folder, names in pictures.items() for name in names]
    old = [output_dir / folder / f"{name}.png" for folder, name in (*_read_record(record), *coming)]
    removed = _remove([*(output_dir / name for name in _RESULTS), *old])
    _remove([record])
    if removed:
        distributed.say(printable(f"{output_dir}: removed {removed:,} files of an earlier evaluation"))
    for folder in _PICTURES:
        _tell_others(output_dir / folder)
    if coming:
        with atomic_write(record) as file:
            file.write(json.dumps({folder: list(names) for folder, names in pictures.items()}).encode())


def begin_pictures(folder: Path, suffix: str, is_new: Callable[[str], bool]) -> None:
    """Remove the pictures of an earlier run that this one replaces; report the others, which stay.

    Args:
        is_new: whether this run writes a picture of that name, without the suffix.

    Raises:
        UserError: a file cannot be removed.
    """
    old = [path for path in _entries(folder) if path.suffix == suffix and is_new(path.stem)]
    if _remove(old):
        distributed.say(printable(f"{folder}: replacing {len(old):,} pictures of an earlier run"))
    _tell_others(folder)


def remove_exports(output_dir: Path) -> None:
    """Remove an earlier run's files for annotation tools; raises as `begin_pictures`."""
    _remove(output_dir / name for name in _EXPORTS)


def _read_record(record: Path) -> list[tuple[str, str]]:
    """Folder and name of each recorded picture; none if the record is damaged."""
    try:
        content = read_json(record, "")
    except UserError:
        return []
    found = content.items() if isinstance(content, dict) else ()
    return [
        (folder, name)
        for folder, names in found
        if folder in _PICTURES and isinstance(names, list)
        for name in names
        if isinstance(name, str)
        and Path(name).name == name
        and "\0" not in name  # names must not lead out of the folder
    ]


def _remove(paths: Iterable[Path]) -> int:
    """Remove files; returns how many existed."""
    count = 0
    for path in paths:
        try:
            path.unlink()
            count += 1
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be removed ({error.strerror}); give another --output_dir") from None
    return count


def _entries(folder: Path) -> list[Path]:
    return [path for path in listed(folder) if not path.name.startswith(".")] if is_folder(folder) else []


def _tell_others(folder: Path) -> None:
    if others := _entries(folder):
        distributed.say(printable(f"{folder}: {len(others):,} other files stay, such as {others[0].name}"))


def write_report(
    output_dir: Path,
    counts: Mapping[str, Tensor],
    *,
    classes: ClassTable,
    model: str,
    data: str,
    box_source: str,
    eval_size: str,
    map_rule: MapRule,
    tta: bool = False,
    note: str = "",
    cards: Callable[[], Sequence[Card]] = tuple,
) -> None:
    """Print the result, and write it as text, JSON, CSV, a picture of the confusion matrix, and a page.

    Args:
        counts: the confusion matrix of each image by its name, (N, N + 1) integers on the CPU.
        classes: the N classes.
        box_source: see `format_details`.
        eval_size: "frame" or "original".
        map_rule: how masks became a map.
        tta: whether mirror images were averaged in.
        note: what else the reader must know, "" for nothing.
        cards: makes the images to show in the page, by their position in `counts`. It reads files, so it is called
            after the figures are written.
    """
    every = torch.stack(list(counts.values()))
    matrix = every.sum(dim=0)
    figures = results_dict(matrix, classes)
    images = [image_figures(name, each, classes) for name, each in counts.items()]
    details = format_details(matrix, box_source, classes)
    highest = f"each pixel goes to its highest {'average probability' if tta else 'logit'}"
    rule = highest if box_source == "none" else f"{map_rule}: {MAP_RULES[map_rule]}"
    report = format_report(matrix, classes)
    text = f"{report}\n\n{details}\nmap rule: {rule}\n{_TTA if tta else ''}scored {_SIZES[eval_size]}\n"
    text += f"{note}\n" if note else ""
    origin = {"model": model, "data": data, "boxes": box_source, "map_rule": map_rule, "eval_size": eval_size}
    others: dict[str, Any] = {} if classes == BDD100K else {"classes": classes.to_plain()}
    if note:
        others["note"] = note
    results = json.dumps({**origin, "tta": tta, **others, **figures, "images": images}, indent=1, ensure_ascii=False)
    print(f"\n{text}")
    outputs = {
        "evaluation_results.txt": text,
        "evaluation_results.json": results + "\n",
        IMAGE_SCORES: format_image_scores(images, classes.names),
    }
    for name, content in outputs.items():
        with atomic_write(output_dir / name) as file:
            file.write(content.encode(errors="backslashreplace"))  # a path need not be valid text
    save_confusion_matrix(output_dir / "confusion_matrix.png", matrix.numpy(), classes)
    write_report_page(
        output_dir / PAGE,
        classes=classes,
        facts={"Model": model, "Data": data, "Boxes": box_source, "Scored": _SIZES[eval_size], "Map rule": rule},
        notes=[describe_boxes(box_source), *([_TTA.strip()] if tta else []), *([note] if note else [])],
        figures=figures,
        images=images,
        rows=report_rows(images, every.numpy(), classes),
        cards=cards(),
    )
    print(f"Results: {output_dir}\nReport: {output_dir / PAGE}")


def format_image_scores(images: Sequence[ImageFigures], class_names: Sequence[str]) -> str:
    """A CSV with a line for each image: mIoU, pixel accuracy, and the IoU of each class in its ground truth."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["name", "miou", "pixel_accuracy", *class_names])
    for image in images:
        row = [image["miou"], image["pixel_accuracy"], *(image["iou"].get(name) for name in class_names)]
        writer.writerow([image["name"], *("" if value is None else f"{value:.6f}" for value in row)])
    return buffer.getvalue()
