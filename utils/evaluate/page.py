"""HTML pages: the report of an evaluation, and the comparison of several. Each is one file that loads nothing.

A Content-Security-Policy in the page allows only its own style and script, by their hashes. Jinja2 escapes all text.
Style attributes are not allowed, so charts of matplotlib lose theirs in `inline_svg`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import utils
from utils.data.classes import ClassTable
from utils.evaluate.gallery import FIXED, Card, wrong_pixels
from utils.evaluate.lettering import short_names
from utils.evaluate.metrics import Figures, ImageFigures
from utils.evaluate.plots import HATCH, WRONG
from utils.runtime.errors import printable
from utils.runtime.files import atomic_write
from utils.runtime.text import display_width

_INK = "#010203"  # stands for the colour of the page's text
SERIES_COLORS = ("#3b82d0", "#d9730d", "#2f9e6e", "#a05cc8", "#c23b62", "#7f8a1c")  # readable on white and on black
_SHADES = 20  # of a cell in the confusion matrix


@dataclass(frozen=True)
class Row:
    """What the page's script knows of an image: values to sort by, those of classes by their ids."""

    name: str
    values: Sequence[float | None]  # mIoU, or its change to each other evaluation
    classes: Mapping[int, Sequence[float | None]]  # IoU, or its changes; None where the ground truth lacks the class
    wrong: Mapping[int, int] | None = None  # pixels missed or taken for each class
    wrong_total: int | None = None


def report_rows(images: Sequence[ImageFigures], counts: np.ndarray, classes: ClassTable) -> list[Row]:
    """The rows of a report; `counts` are the confusion matrices, one for each image."""
    truth, predicted, wrong = counts.sum(axis=2), counts[:, :, :-1].sum(axis=1), wrong_pixels(counts)
    hits = np.trace(counts, axis1=1, axis2=2)
    return [
        Row(
            name=printable(image["name"]),
            values=[image["miou"]],
            classes={c.id: [image["iou"].get(c.name)] for c in classes if truth[i, c.id] or predicted[i, c.id]},
            wrong={c.id: int(wrong[i, c.id]) for c in classes if wrong[i, c.id]},
            wrong_total=int(truth[i].sum() - hits[i]),
        )
        for i, image in enumerate(images)
    ]


def write_report_page(
    path: Path,
    *,
    classes: ClassTable,
    facts: Mapping[str, str],
    notes: Sequence[str],
    figures: Figures,
    images: Sequence[ImageFigures],
    rows: Sequence[Row],
    cards: Sequence[Card],
) -> None:
    """Write the report of an evaluation.

    Args:
        classes: those of the model.
        facts: what was measured: model, data and settings by name.
        notes: sentences that say what the figures mean.
        images: figures of all images.
        rows: the same for the script, see `report_rows`.
        cards: images to show, with the layers ground truth, prediction and errors.
    """
    scores = {image["name"]: image["miou"] for image in images if image["miou"] is not None}
    mious = list(scores.values())
    chart = None
    if mious:
        chart = inline_svg(_histogram({"": mious}), "distribution", f"Distribution of the mIoU of {len(mious)} images")
    matrix = np.column_stack([figures["confusion_matrix"], figures["unclaimed"]])
    _write(
        path,
        "report.html",
        title=f"mIoU {_decimal(figures['miou'])}: {facts['Model']}",
        facts=facts,
        notes=notes,
        figures=figures,
        classes=classes,
        taken_for=_taken_for(matrix, classes.names),
        matrix=matrix.tolist(),
        images=images,
        median=float(np.median(mious)) if mious else None,
        worst=min(scores.items(), key=itemgetter(1), default=None),
        chart=chart,
        data={"rows": [vars(row) for row in rows], "signed": False},
        layers=["Ground truth", "Prediction", "Errors"],
        shown_layer=2,
        cards=cards,
    )


def write_comparison_page(
    path: Path,
    *,
    classes: ClassTable,
    names: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    cards: Sequence[Card],
    missing: str | None,
) -> None:
    """Write the comparison of evaluations with the first one.

    Args:
        classes: those of all evaluations.
        names: what to call the evaluations.
        results: the content of `evaluation_results.json` of each.
        rows: the changes of all images.
        cards: images to show; their layers are the ground truth, each prediction, and the changes to each other one.
        missing: why there are no cards.
    """
    names = [printable(name) for name in names]
    first, *others = names
    mious_of = {
        name: [image["miou"] for image in each["images"] if image["miou"] is not None]
        for name, each in zip(names, results)
    }
    charts = []
    if all(mious_of.values()):
        descriptions = ("IoU of each class in each evaluation", "Distribution of the mIoU of the images")
        figures = (_class_chart(names, results, classes.names), _histogram(mious_of))
        charts = [inline_svg(figure, text.split()[0], text) for figure, text in zip(figures, descriptions)]
    _write(
        path,
        "comparison.html",
        title=f"Comparison of {', '.join(names)}",
        names=names,
        results=results,
        classes=classes,
        charts=charts,
        missing=missing,
        data={"rows": [vars(row) for row in rows], "signed": True},
        layers=["Ground truth", *names, *(f"{first} to {other}" for other in others)],
        shown_layer=1 + len(names),
        cards=cards,
    )


def _class_chart(names: Sequence[str], results: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> Figure:
    """The IoU of each class of the ground truth, a dot for each evaluation."""
    present = [entry["id"] for entry in results[0]["per_class"] if entry["iou"] is not None]
    figure = Figure(figsize=(7.2, 0.9 + 0.27 * len(present)))
    shown = short_names(class_names)
    labels = [shown[class_id] for class_id in present]
    left = max(0.16, 0.012 * max(map(display_width, labels), default=0))
    axes = figure.add_axes((left, 0.5 / figure.get_figheight(), 0.98 - left, 1 - 0.9 / figure.get_figheight()))
    ious = np.array([[each["per_class"][class_id]["iou"] for class_id in present] for each in results])
    heights = np.arange(len(present))
    entries = []
    axes.hlines(heights, ious.min(axis=0), ious.max(axis=0), color=_INK, alpha=0.3, linewidth=1.5)
    for name, values, color in zip(names, ious, _colors(len(names))):
        entries.append((axes.scatter(values, heights, s=42, color=color, zorder=3), name))
    axes.set_yticks(heights, labels)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.margins(y=max(0.05, 0.6 / max(1, len(present) - 1)))  # room for the outermost dots
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("IoU")
    _style(axes, entries, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _taken_for(matrix: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """For each class, the other class that most of its pixels were taken for; "" if there is none."""
    names = [*class_names, "no class"]
    sentences = []
    for class_id, counts in enumerate(matrix.tolist()):
        missed = [0 if column == class_id else count for column, count in enumerate(counts)]
        most = int(np.argmax(missed))
        share = missed[most] / max(1, sum(counts))
        shown = "under 1%" if share < 0.005 else f"{share:.0%}"
        sentences.append(f"{names[most]} ({shown} of its pixels)" if missed[most] else "")
    return sentences


def _histogram(mious_of: Mapping[str, Sequence[float]]) -> Figure:
    """Images by their mIoU; several evaluations as lines."""
    figure = Figure(figsize=(7.2, 2.7))
    axes = figure.add_axes((0.08, 0.19, 0.9, 0.76))
    bins = np.linspace(0, 1, 41).tolist()
    entries = []
    for (name, mious), color in zip(mious_of.items(), _colors(len(mious_of))):
        if len(mious_of) == 1:
            axes.hist(mious, bins, color=color)
        else:
            axes.hist(mious, bins, color=color, histtype="step", linewidth=1.8)
        line = axes.axvline(float(np.median(mious)), color=color, linestyle="--", linewidth=1.4)
        entries.append((line, f"{name} median {np.median(mious):.3f}".strip()))
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("mIoU of an image")
    axes.set_ylabel("images")
    _style(axes, entries)
    return figure


def _colors(count: int) -> list[str]:
    return [SERIES_COLORS[i % len(SERIES_COLORS)] for i in range(count)]


def _style(axes: Axes, entries: Sequence[tuple[Artist, str]], **where: Any) -> None:
    """Draw axes and text in the colour of the page's text, and a legend with these entries and options."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.grid(axis="x", color=_INK, alpha=0.12)
    axes.set_axisbelow(True)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(_INK)
    # Texts are set afterwards, as matplotlib hides labels that begin with _ and parses those with $.
    legend = axes.legend(
        *zip(*((each, "-") for each, _ in entries)), frameon=False, labelcolor=_INK, fontsize=9, **where
    )
    for text, (_, label) in zip(legend.get_texts(), entries):
        text.set_parse_math(False)
        text.set_text(label)


_FONT = re.compile(r"([\d.]+)px")


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """A figure as an SVG element in the page's font, without style attributes; _INK becomes the page's text colour.

    Args:
        name: unique in the page; ids in the element depend on it.
        description: for readers who do not see it.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has other fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        for key in [key for key in element.attrib if key.startswith("{")]:
            element.set(key.rpartition("}")[2], element.attrib.pop(key))  # xlink:href
        for declaration in element.attrib.pop("style", "").split(";"):
            key, _, value = (part.strip() for part in declaration.partition(":"))
            if key == "font" and (size := _FONT.search(value)):
                element.set("font-size", size[1])
            elif key and key != "font-family":
                element.set(key, "currentColor" if value == _INK else value)
    for child in list(root):
        if child.tag == "metadata" or child.find("style") is not None:
            root.remove(child)
    for key in ("width", "height"):
        root.attrib.pop(key)
    root.attrib.update({"role": "img", "aria-label": description, "class": "chart"})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _write(path: Path, template: str, *, classes: ClassTable, **values: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("utils.evaluate"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["ascii"] = str.isascii
    environment.filters.update(printable=printable, decimal=_decimal, percent=_percent, shade=_shade)
    style = environment.get_template("page.css").render(
        classes=classes, class_names=classes.names, wrong=WRONG, fixed=FIXED, hatch=HATCH, shades=_SHADES
    )
    script = environment.get_template("page.js").render()
    html = environment.get_template(template).render(
        **values,
        classes=classes,
        style=Markup(style),
        script=Markup(script),
        policy="; ".join(
            [
                "default-src 'none'",
                "img-src data:",
                f"style-src '{_hash(style)}'",
                f"script-src '{_hash(script)}'",
                "base-uri 'none'",
                "form-action 'none'",
                "require-trusted-types-for 'script'",
            ]
        ),
        class_names=classes.names,
        version=utils.__version__,
    )
    with atomic_write(path) as file:
        file.write(html.encode(errors="backslashreplace"))  # a path need not be valid text


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _decimal(value: float | None, signed: bool = False) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:+.4f}".replace("-", "−") if signed else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2%}"


def _shade(share: float) -> int:
    """The shade of a cell, 0 to _SHADES; a square root makes small shares visible."""
    return round(math.sqrt(share) * _SHADES)
