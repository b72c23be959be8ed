"""Pictures: label maps in BDD100K's colours, comparisons, the confusion matrix.

matplotlib's `Figure` is used without `pyplot`: no global state, no display, and a figure is freed with its last
reference. Every PNG is written atomically.
"""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from utils.data.bdd100k import count_labels
from utils.data.classes import CLASS_NAMES, CLASSES, NUM_CLASSES, PALETTE
from utils.runtime.files import atomic_write

_DPI = 100
_PANEL_WIDTH, _MARGIN, _TITLE_HEIGHT, _LEGEND_ROW = 640, 12, 34, 26  # pixels
_LEGEND_ENTRY_WIDTH = 150  # pixels, an upper bound of the average at the legend's font size
_LINE_COLOR = (235, 235, 235)  # RGB; far from every class's colour


def colorize(labels: np.ndarray) -> np.ndarray:
    """Paint a label map in BDD100K's colours: (H, W) uint8 -> (H, W, 3) uint8 RGB; no class is black."""
    if labels.dtype != np.uint8:
        raise ValueError(f"labels must be uint8, got {labels.dtype}")
    return PALETTE.take(labels, axis=0)  # in a third of the time of PALETTE[labels]


def overlay(image: np.ndarray, labels: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Lay BDD100K's colours over a picture, with light lines between classes. Pixels of no class stay unchanged.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8 ids; 255 and all other values outside 0-18 are no class.
        opacity: share of the colour, 0 to 1.

    Returns:
        (H, W, 3) uint8 RGB, a new array.

    Raises:
        ValueError: the sizes differ, or one of the two is not uint8.
    """
    if labels.shape != image.shape[:2] or image.dtype != np.uint8:
        raise ValueError(f"image {image.dtype} {image.shape} and labels {labels.shape}: must be uint8, of one size")
    shown = cv2.addWeighted(image, 1 - opacity, colorize(labels), opacity, 0)
    # A pixel is on a line if its neighbour to the right or below has another class. Large pictures are viewed shrunk,
    # so their lines are thicker.
    step = max(1, max(labels.shape) // 1500)
    border = np.zeros(labels.shape, dtype=bool)
    border[:, :-step] = labels[:, :-step] != labels[:, step:]
    border[:-step] |= labels[:-step] != labels[step:]
    shown[border] = _LINE_COLOR
    return cv2.copyTo(image, (labels >= NUM_CLASSES).view(np.uint8), shown)


def legend_entries(*label_maps: np.ndarray) -> list[tuple[str, tuple[int, int, int]]]:
    """Name and colour of each class in any of the maps, by id; then black if a pixel is no class."""
    occurs = np.zeros(256, dtype=bool)
    for labels in label_maps:
        occurs |= count_labels(labels) > 0
    entries = [(c.name, c.color) for c in CLASSES if occurs[c.id]]
    if occurs[NUM_CLASSES:].any():
        entries.append(("unlabelled / no class", (0, 0, 0)))
    return entries


def save_labels(path: Path, labels: np.ndarray) -> None:
    """Write a label map, (H, W) uint8, as the single-channel PNG of train ids that BDD100K's toolkit reads."""
    _, png = cv2.imencode(".png", labels)
    with atomic_write(path) as file:
        file.write(png.tobytes())


def save_comparison(path: Path, image: np.ndarray, target: np.ndarray | None, prediction: np.ndarray) -> None:
    """Write one PNG: image, ground truth and prediction side by side, above a legend of their classes.

    Args:
        path: where to write.
        image: (H, W, 3) uint8 RGB.
        target: (H, W) uint8 ids, 255 = not labelled; None leaves out its panel.
        prediction: (H, W) uint8 ids, 255 = no class.

    Raises:
        ValueError: the sizes differ, or a map is not uint8.
    """
    maps = [prediction] if target is None else [target, prediction]
    if any(labels.shape != image.shape[:2] for labels in maps):
        raise ValueError(f"image {image.shape[:2]} and labels {[labels.shape for labels in maps]} differ in size")
    height = max(1, round(_PANEL_WIDTH * image.shape[0] / image.shape[1]))
    size = (_PANEL_WIDTH, height)
    # Panels are resized here to their final size, so that labels keep their exact colours.
    shrinking = image.shape[1] > _PANEL_WIDTH
    panels = [("image", cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR))]
    titles = ["prediction"] if target is None else ["ground truth", "prediction"]
    panels += [
        (title, cv2.resize(colorize(labels), size, interpolation=cv2.INTER_NEAREST))
        for title, labels in zip(titles, maps)
    ]

    entries = legend_entries(*maps)
    width = len(panels) * (_PANEL_WIDTH + _MARGIN) + _MARGIN
    rows = math.ceil(len(entries) * _LEGEND_ENTRY_WIDTH / width)
    bottom = rows * _LEGEND_ROW + _MARGIN
    total_height = bottom + height + _TITLE_HEIGHT
    figure = _figure(width, total_height)
    for i, (title, pixels) in enumerate(panels):
        left = _MARGIN + i * (_PANEL_WIDTH + _MARGIN)
        figure.figimage(pixels, left, bottom, origin="upper")
        figure.text(
            (left + _PANEL_WIDTH / 2) / width, (bottom + height + 9) / total_height, title, ha="center", fontsize=13
        )
    handles = [Patch(facecolor=np.divide(color, 255).tolist(), edgecolor="0.6", label=name) for name, color in entries]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=math.ceil(len(entries) / rows),
        frameon=False,
        fontsize=10.5,
        handlelength=1.3,
        handleheight=1.1,
        columnspacing=1.6,
        borderaxespad=0.2,
    )
    _save(figure, path)


def save_confusion_matrix(path: Path, matrix: np.ndarray) -> None:
    """Write a heat map of the classes that each true class was predicted as.

    Args:
        path: where to write.
        matrix: (19, 20) counts, a row for each true class and a last column for no class; an array or a CPU tensor.
    """
    counts = np.asarray(matrix)
    if counts.shape != (NUM_CLASSES, NUM_CLASSES + 1):
        raise ValueError(f"a confusion matrix is ({NUM_CLASSES}, {NUM_CLASSES + 1}), got {counts.shape}")
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)

    figure = _figure(1180, 1000)
    axes = figure.add_axes((0.12, 0.13, 0.79, 0.81))
    heat = matplotlib.colormaps["Blues"].with_extremes(bad="0.96")  # rows without pixels are nan: light grey
    drawn = axes.imshow(shares, cmap=heat, vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(np.nan_to_num(shares) >= 0.01):
        share = shares[row, column]
        axes.text(
            column,
            row,
            f"{share:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if share > 0.55 else "black",
        )
    axes.set_xticks(range(NUM_CLASSES + 1), [*CLASS_NAMES, "no class"], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(NUM_CLASSES), CLASS_NAMES)
    # Classes missing from the data stay, so that matrices are easy to compare, but in grey.
    for tick, occurs in [
        *zip(axes.get_xticklabels(), counts.any(axis=0) | np.append(totals[:, 0] > 0, False)),
        *zip(axes.get_yticklabels(), totals[:, 0] > 0),
    ]:
        tick.set_color("black" if occurs else "0.7")
    axes.set_xticks(np.arange(NUM_CLASSES) + 0.5, minor=True)
    axes.set_yticks(np.arange(NUM_CLASSES - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="0.88", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("prediction")
    axes.set_ylabel("ground truth")
    axes.set_title("Where the pixels of each class went (each row sums to 1)", pad=12)
    figure.colorbar(drawn, cax=figure.add_axes((0.93, 0.13, 0.018, 0.81)))
    _save(figure, path)


def _figure(width: int, height: int) -> Figure:
    """An empty figure of this size in pixels, on its own canvas."""
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        # Level 1 takes half the time, and files are only 4 % larger.
        figure.savefig(file, format="png", dpi=_DPI, pil_kwargs={"compress_level": 1})
