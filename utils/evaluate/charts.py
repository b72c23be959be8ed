"""Charts: how a run went, epoch by epoch, and which labels a split has.

As in `utils.evaluate.plots`, figures are made without `pyplot`, and every file is written atomically. In a chart epochs
count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.data.classes import ClassTable
from utils.evaluate.lettering import letter, letter_ticks, placeholder, save_figure, short_names

_DPI = 100
LOSS_COLOR, MIOU_COLOR, BEST_COLOR = "#1f4e8c", "#d1660f", "#2a7f3e"
_PART_COLORS = ("#7fa7d6", "#c28bc9", "#79b791", "#b8a15a")

History = Sequence[Mapping[str, Any]]  # one record for each epoch, by figure; see `Run.finish_epoch`


def save_loss_curve(path: Path, history: History, parts: Sequence[str] = (), best: int | None = None) -> None:
    """Write three charts, one above the other: the loss and its parts, validation mIoU, the learning rate.

    A chart without figures is left out.

    Args:
        path: where to write.
        history: records with "epoch" and "train_loss"; some with "val_miou", `parts` and "lr".
        parts: names of the loss's parts.
        best: the best model's epoch.
    """
    has_miou, has_lr = (any(is_number(record.get(key)) for record in history) for key in ("val_miou", "lr"))
    heights = [3.0, *[2.2] * has_miou, *[1.2] * has_lr]
    figure = Figure(figsize=(9.6, sum(heights) * 1.15), dpi=_DPI, layout="constrained")
    panels = iter(figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0])

    axes = next(panels)
    for part, color in zip(parts, _PART_COLORS):
        _plot(axes, history, part, color, width=1.2, label=part)
    _plot(axes, history, "train_loss", LOSS_COLOR, label="training loss" + (", their sum" if parts else ""))
    axes.set_ylabel("training loss")
    axes.legend(frameon=False, ncols=3)
    if has_miou:
        axes = next(panels)
        _plot(axes, history, "val_miou", MIOU_COLOR)
        axes.set_ylabel("validation mIoU")
    if best is not None:
        score = history[best].get("val_miou")
        axes.axvline(best + 1, color=BEST_COLOR, linewidth=1, linestyle="--")
        figure.suptitle(
            f"Best model: epoch {best + 1}"
            + (f", validation mIoU {score:.4f}" if is_number(score) else f", loss {history[best]['train_loss']:.4f}"),
            color=BEST_COLOR,
        )
    if has_lr:
        axes = next(panels)
        _plot(axes, history, "lr", "0.35")
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(0, 0))
    axes.set_xlabel("epoch")
    _number_epochs(axes, history)
    save_figure(figure, path)


def save_class_curves(
    path: Path, history: History, key: str, class_names: Sequence[str], best: int | None = None
) -> None:
    """Write a small chart for each class: its IoU in each validation, on the same axes.

    Args:
        path: where to write.
        history: records, some of them with the IoU of each class.
        key: prefix of a class's name among the figures of a record.
        class_names: one for each chart.
        best: the best model's epoch; its IoU stands in the titles.
    """
    number = len(class_names)
    columns = min(number, 5 if number <= 50 else 10)
    rows = math.ceil(number / columns)
    width, height = max(7.2, 2.4 * columns), 8.4 + 1.8 * (rows - 4)
    figure = Figure(figsize=(width, height), dpi=_DPI)  # laid out here: the search for a layout takes twice the time
    room = {"left": 0.42 / width, "right": 1 - 0.12 / width, "bottom": 0.504 / height, "top": 1 - 0.672 / height}
    grid = figure.subplots(
        rows, columns, sharex=True, sharey=True, squeeze=False, gridspec_kw={**room, "hspace": 0.28, "wspace": 0.08}
    )
    validated = [record for record in history if any(name.startswith(key) for name in record)]
    if best is not None and history[best] not in validated:  # of an older version
        best = None
    shown = history[best] if best is not None else validated[-1]
    # Before the curves: each curve would set the limits of all charts anew.
    grid[0, 0].set_ylim(0, 1)
    _number_epochs(grid[0, 0], history, most_ticks=4)
    for axes, name, called in zip(grid.flat, class_names, short_names(class_names)):
        iou = shown.get(f"{key}{name}")
        missing = not is_number(iou)
        title = f"{called}: not in this split" if missing else f"{called}  {iou:.3f}"
        color = "0.6" if missing else "black"
        letter(axes.set_title(placeholder(title), fontsize=10, loc="left", color=color), title)
        _plot(axes, validated, f"{key}{name}", MIOU_COLOR)
        if best is not None:
            axes.axvline(best + 1, color=BEST_COLOR, linewidth=1, linestyle="--")
    for axes in grid.flat[number:]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    for axes in grid.flat[number - columns : number]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    which = f"the best epoch, {best + 1}, is dashed" if best is not None else f"after epoch {shown['epoch'] + 1}"
    figure.suptitle(f"Validation IoU of each class; {which}", y=1 - 0.168 / height)
    save_figure(figure, path)


def save_label_distribution(
    path: Path, split: str, pixels: Sequence[int], images: Sequence[int], total: int, classes: ClassTable
) -> None:
    """Write two bar charts: the share of each class in the labelled pixels, and of the images in which it occurs.

    Args:
        path: where to write.
        split: its name, for the title.
        pixels: labelled pixels of each class, (N,).
        images: images with a pixel of each class, (N,).
        total: labelled images.
        classes: the N classes.
    """
    figure = Figure(figsize=(10, max(2.4, 6.4 + 0.27 * (len(classes) - 19))), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = [np.divide(c.color, 255).tolist() for c in classes]
    shares = [count / max(1, sum(pixels)) for count in pixels]
    least = min((share for share in shares if share), default=1.0)
    # From the decade below the rarest class, so that it has a bar.
    floor = 10.0 ** (math.ceil(math.log10(least)) - 1)
    for axes, values, title in (
        (left, shares, "Share of the labelled pixels (logarithmic)"),
        (right, [count / max(1, total) for count in images], "Share of the images in which the class occurs"),
    ):
        lengths = [max(value, floor) for value in values] if axes is left else values
        drawn = axes.barh(range(len(classes)), lengths, color=colors)
        for bar, c in zip(drawn, classes):
            if min(c.color) > 225:  # hardly visible on white
                bar.set_edgecolor("0.6")
        axes.bar_label(drawn, [_percent(value) if value else "none" for value in values], padding=3, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    left.set_xscale("log")
    left.set_xlim(floor, 8)  # room for the numbers
    left.minorticks_off()
    right.set_xlim(0, 1.15)
    decades = range(0, round(math.log10(floor)) - 1, -1 if floor > 5e-8 else -3)  # more texts would overlap
    for axes, ticks in ((left, [10.0**decade for decade in reversed(decades)]), (right, np.linspace(0, 1, 5).tolist())):
        axes.set_xticks(ticks, [_percent(tick) for tick in ticks], fontsize=9)
    letter_ticks(left.yaxis, range(len(classes)), short_names(classes.names))
    if len(classes) > 19:
        left.margins(y=0.95 / len(classes))  # as wide as with 19
    left.invert_yaxis()
    figure.suptitle(f"Labels of {split}: {total:,} images, {sum(pixels):,} labelled pixels")
    save_figure(figure, path)


def _percent(share: float) -> str:
    """Three significant digits, never as a power of ten."""
    return f"{np.format_float_positional(100 * share, precision=3, fractional=False, trim='-')}%"


def _plot(axes: Axes, history: History, key: str, color: str, *, width: float = 1.8, label: str | None = None) -> None:
    """Plot a figure over the epochs that have it, with markers if there are few points."""
    points = [(record["epoch"] + 1, record[key]) for record in history if is_number(record.get(key))]
    x, y = zip(*points) if points else ((), ())
    marker = "o" if len(points) <= 40 else None
    axes.plot(x, y, color=color, linewidth=width, marker=marker, markersize=2 * width, label=label)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def _number_epochs(axes: Axes, history: History, most_ticks: int = 10) -> None:
    axes.set_xlim(0.5, len(history) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(most_ticks, integer=True, min_n_ticks=1))


def is_number(value: Any) -> bool:
    """Whether a figure can be drawn: it is there, and finite."""
    return isinstance(value, int | float) and math.isfinite(value)
