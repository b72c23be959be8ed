"""Charts: how a run went, epoch by epoch, and which labels a split has.

As in `utils.evaluate.plots`, figures are made without `pyplot`, and every file is written atomically. In a chart epochs
count from 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import MaxNLocator

from utils.data.classes import BDD100K, CLASS_NAMES, NUM_CLASSES, ClassTable
from utils.runtime.files import atomic_write

_DPI = 100
# Fonts with Chinese, which Matplotlib's own lacks; used where installed.
_WIDE_FONTS = {
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
}
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
    _save(figure, path)


def save_class_curves(path: Path, history: History, key: str, best: int | None = None) -> None:
    """Write a small chart for each class: its IoU in each validation, on the same axes.

    Args:
        path: where to write.
        history: records, some of them with the IoU of each class.
        key: prefix of a class's name among the figures of a record.
        best: the best model's epoch; its IoU stands in the titles.
    """
    columns = 5
    rows = math.ceil(NUM_CLASSES / columns)
    figure = Figure(figsize=(12, 8.4), dpi=_DPI)  # laid out here: the search for a layout takes twice the time
    room = {"left": 0.035, "right": 0.99, "bottom": 0.06, "top": 0.92, "hspace": 0.28, "wspace": 0.08}
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, gridspec_kw=room)
    validated = [record for record in history if any(name.startswith(key) for name in record)]
    if best is not None and history[best] not in validated:  # of an older version
        best = None
    shown = history[best] if best is not None else validated[-1]
    for axes, name in zip(grid.flat, CLASS_NAMES):
        iou = shown.get(f"{key}{name}")
        missing = not is_number(iou)
        axes.set_title(
            f"{name}: not in this split" if missing else f"{name}  {iou:.3f}",
            fontsize=10,
            loc="left",
            color="0.6" if missing else "black",
        )
        _plot(axes, validated, f"{key}{name}", MIOU_COLOR)
        if best is not None:
            axes.axvline(best + 1, color=BEST_COLOR, linewidth=1, linestyle="--")
        axes.set_ylim(0, 1)
    for axes in grid.flat[NUM_CLASSES:]:
        axes.set_axis_off()
    for axes in grid[-1, :-1]:
        axes.set_xlabel("epoch")
    grid[-2, -1].tick_params(labelbottom=True)
    _number_epochs(grid[0, 0], history, most_ticks=4)
    which = f"the best epoch, {best + 1}, is dashed" if best is not None else f"after epoch {shown['epoch'] + 1}"
    figure.suptitle(f"Validation IoU of each class; {which}")
    _save(figure, path)


def save_label_distribution(
    path: Path,
    split: str,
    pixels: Sequence[int],
    images: Sequence[int],
    total: int,
    classes: ClassTable = BDD100K,
) -> None:
    """Write two bar charts: the share of each class in the labelled pixels, and of the images in which it occurs.

    Args:
        path: where to write.
        split: its name, for the title.
        pixels: labelled pixels of each class.
        images: images with a pixel of each class.
        total: labelled images.
    """
    figure = Figure(figsize=(10, max(6.4, 1 + 0.25 * len(classes))), dpi=_DPI, layout="constrained")
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
        drawn = axes.barh(classes.names, [max(value, floor) for value in values], color=colors)
        axes.bar_label(drawn, [_percent(value) if value else "none" for value in values], padding=3, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    left.set_xscale("log")
    left.set_xlim(floor, 8)  # room for the numbers
    left.minorticks_off()
    right.set_xlim(0, 1.15)
    for axes, ticks in ((left, 10.0 ** np.arange(round(math.log10(floor)), 1)), (right, np.linspace(0, 1, 5))):
        axes.set_xticks(ticks, [_percent(tick) for tick in ticks], fontsize=9)
    left.invert_yaxis()
    fonts = [*matplotlib.rcParams["font.family"], *sorted({*get_font_names()} & _WIDE_FONTS)]
    left.tick_params(axis="y", labelfontfamily=fonts)
    figure.suptitle(f"Labels of {split}: {total:,} images, {sum(pixels):,} labelled pixels")
    _save(figure, path)


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


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a class's name, without a font for it
        # Level 1 takes half the time, and files are only 4 % larger.
        figure.savefig(file, format="png", dpi=_DPI, pil_kwargs={"compress_level": 1})
