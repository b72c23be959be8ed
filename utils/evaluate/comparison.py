"""The page that compares evaluations of the same images, from the files that `infer_bdd100k.py` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.data.classes import BDD100K, ClassTable, read_class_table
from utils.data.datasets import NpyFolder
from utils.data.geometry import resize_mask
from utils.evaluate.gallery import (
    LABEL_MAPS,
    Card,
    change_layer,
    class_layer,
    make_card,
    read_label_maps,
    read_shown,
)
from utils.evaluate.metrics import ImageFigures
from utils.evaluate.page import Row, write_comparison_page
from utils.runtime.errors import UserError, printable

SHOWN = 40  # images


def write_comparison(path: Path, evaluations: Mapping[Path, Mapping[str, Any]], names: Sequence[str]) -> str | None:
    """Write a page that compares evaluations with the first one.

    Args:
        evaluations: the content of `evaluation_results.json` by its folder, two or more, checked by `utils.compare`.
        names: what the page calls them.

    Returns:
        Why the page has no pictures; None if it has.

    Raises:
        UserError: an evaluation lacks its images' figures, or has other images; or the page cannot be written.
    """
    figures_of = [_figures_by_image(folder, results) for folder, results in evaluations.items()]
    classes = _class_table(*next(iter(evaluations.items())))
    first, *others = figures_of
    for folder, figures in zip(list(evaluations)[1:], others):
        if figures.keys() != first.keys():
            raise UserError(f"{next(iter(evaluations))} and {folder} have different images; evaluate the same split")
    rows = [_row(name, [figures[name] for figures in figures_of], classes.names) for name in first]
    chosen = choose_changed(rows, SHOWN, classes.names)
    try:
        cards, missing = _cards(evaluations, figures_of, list(first), chosen, classes), None
    except UserError as error:
        cards, missing = [], printable(f"no pictures: {error}")
    write_comparison_page(
        path,
        classes=classes,
        names=names,
        results=list(evaluations.values()),
        rows=rows,
        cards=cards,
        missing=missing,
    )
    return missing


def _class_table(folder: Path, results: Mapping[str, Any]) -> ClassTable:
    """The classes of an evaluation. A file without a table has those of BDD100K."""
    try:
        classes = read_class_table(results["classes"]) if "classes" in results else BDD100K
    except ValueError:
        classes = None
    if classes is None or [(c["id"], c["name"]) for c in results["per_class"]] != list(enumerate(classes.names)):
        raise UserError(f"{folder}/evaluation_results.json: not a result of infer_bdd100k.py")
    return classes


def _figures_by_image(folder: Path, results: Mapping[str, Any]) -> dict[str, ImageFigures]:
    images = results.get("images")
    if images is None:
        raise UserError(f"{folder}: was evaluated by an older version, without figures of each image; evaluate again")
    try:
        figures = {image["name"]: image for image in images}
        values = [value for image in images for value in (image["miou"], *image["iou"].values()) if value is not None]
        is_valid = all(isinstance(name, str) for name in figures) and all(
            isinstance(value, float | int) and 0 <= value <= 1 for value in values
        )
    except (KeyError, TypeError, AttributeError):
        is_valid = False
    if not (is_valid and figures):
        raise UserError(f"{folder}/evaluation_results.json: not a result of infer_bdd100k.py")
    return figures


def _row(name: str, figures: Sequence[ImageFigures], class_names: Sequence[str]) -> Row:
    """The changes of an image from the first evaluation to each other one."""
    first, *others = figures
    return Row(
        name=printable(name),
        values=[_change(first["miou"], other["miou"]) for other in others],
        classes={
            class_id: [_change(first["iou"][class_name], other["iou"].get(class_name)) for other in others]
            for class_id, class_name in enumerate(class_names)
            if class_name in first["iou"]
        },
    )


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def choose_changed(rows: Sequence[Row], number: int, class_names: Sequence[str]) -> dict[int, str]:
    """Choose images: half by the change of their mIoU, the rest by that of a class, each class in turn.

    Returns:
        The reason for each chosen image, by its index.
    """

    def by_change(values: Mapping[int, Sequence[float | None]]) -> list[int]:
        size = {
            index: max((abs(value) for value in row if value is not None), default=0) for index, row in values.items()
        }
        return sorted((index for index in size if size[index]), key=lambda index: -size[index])

    number = min(number, len(rows))
    by_miou = by_change({index: row.values for index, row in enumerate(rows)})
    chosen = dict.fromkeys(by_miou[: -(-number // 2)], "mIoU changed most")
    orders = {
        class_id: by_change({index: row.classes[class_id] for index, row in enumerate(rows) if class_id in row.classes})
        for class_id in range(len(class_names))
    }
    for rank in range(len(rows)):
        for class_id, order in orders.items():
            if rank < len(order) and len(chosen) < number:
                chosen.setdefault(order[rank], f"{class_names[class_id]} changed most")
    return chosen


def _cards(
    evaluations: Mapping[Path, Mapping[str, Any]],
    figures_of: Sequence[Mapping[str, ImageFigures]],
    names: Sequence[str],
    chosen: Mapping[int, str],
    classes: ClassTable,
) -> list[Card]:
    """Chosen images with ground truth, each prediction, and the changes from the first to each other one as layers."""
    data = next(iter(evaluations.values())).get("data")
    source = NpyFolder(Path(str(data)))
    source.use_classes(classes, match=True)
    position = {item.name: index for index, item in enumerate(source.items)}
    if unknown := [names[index] for index in chosen if names[index] not in position]:
        raise UserError(f"{data}: lacks the image {unknown[0]}; it was preprocessed again since the evaluation")
    maps_of = []
    for folder, figures in zip(evaluations, figures_of):
        order = {name: index for index, name in enumerate(figures)}  # of the images in the archive
        found = read_label_maps(folder / LABEL_MAPS, [order[names[index]] for index in chosen])
        maps_of.append({index: found[order[names[index]]] for index in chosen})
    cards = []
    for index, reason in chosen.items():
        photo, target = read_shown(source, position[names[index]])
        first, *others = (resize_mask(maps[index], target.shape, "stretch") for maps in maps_of)
        layers = [class_layer(labels, len(classes)) for labels in (target, first, *others)]
        layers += [change_layer(target, first, other) for other in others]
        cards.append(make_card(index, reason, photo, layers, classes))
    return cards
