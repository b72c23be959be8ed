"""Pictures: label maps in the colours of their classes, comparisons, the confusion matrix.

matplotlib's `Figure` is used without `pyplot`: no global state, no display, and a figure is freed with its last
reference. Every PNG is written atomically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.data.bdd100k import count_labels
from utils.data.classes import IGNORE_LABEL, ClassTable
from utils.evaluate.lettering import letter_ticks, save_figure, short_names, shown_names, text_width, write_text
from utils.runtime.files import atomic_write

_DPI = 100

_LINE_COLOR = (235, 235, 235)  # RGB; far from every class's colour
_PAPER, _FAINT = (255, 255, 255), (110, 110, 110)
HATCH = _PAPER, (175, 175, 175)  # RGB between the stripes and of a stripe: no class looks like that, unlike black
WRONG = (232, 64, 24)  # RGB of wrong pixels; far from every class's colour
_NARROWEST, _LONGEST = 480, 2048  # pixels of a comparison's panel; other pictures are enlarged or shrunk
_MARGIN = 12
Legend = list[tuple[str, tuple[int, int, int] | None]]  # names and colours; None is hatching


def colorize(labels: np.ndarray, classes: ClassTable) -> np.ndarray:
    """Paint a label map in the colours of its classes: (H, W) uint8 -> (H, W, 3) uint8 RGB; no class is hatched."""
    if labels.dtype != np.uint8:
        raise ValueError(f"labels must be uint8, got {labels.dtype}")
    colors = _paint(labels, classes)
    _hatch(colors, labels >= len(classes))
    return colors


def _paint(labels: np.ndarray, classes: ClassTable) -> np.ndarray:
    """`classes.palette[labels]` in a tenth of its time."""
    return cv2.applyColorMap(labels, classes.palette[:, None])


def _hatch(pixels: np.ndarray, where: np.ndarray) -> None:
    """Draw grey diagonal stripes on white where the mask is set."""
    if where.any():
        pixels[where] = np.array(HATCH, dtype=np.uint8)[stripes(where.shape)[where].astype(np.uint8)]


def stripes(shape: tuple[int, ...]) -> np.ndarray:
    """Which pixels of an (H, W) picture are on a diagonal stripe, bool."""
    period = max(8, max(shape) // 80)  # large pictures are viewed shrunk
    return np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % period < period // 4


def overlay(image: np.ndarray, labels: np.ndarray, classes: ClassTable, opacity: float = 0.5) -> np.ndarray:
    """Lay the colours of the classes over a picture, with light lines between them. Pixels of no class stay unchanged.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8 ids; 255 and all other values that are not in the table are no class.
        classes: those of the labels.
        opacity: share of the colour, 0 to 1.

    Returns:
        (H, W, 3) uint8 RGB, a new array.

    Raises:
        ValueError: the sizes differ, or one of the two is not uint8.
    """
    if labels.shape != image.shape[:2] or image.dtype != np.uint8 or labels.dtype != np.uint8:
        raise ValueError(
            f"image {image.dtype} {image.shape} and labels {labels.dtype} {labels.shape}: must be uint8, of one size"
        )
    shown = cv2.addWeighted(image, 1 - opacity, _paint(labels, classes), opacity, 0)
    # A pixel is on a line if its neighbour to the right or below has another class, or that to the left or above has
    # none. Large pictures are viewed shrunk, so their lines are thicker.
    step = max(1, max(labels.shape) // 640)
    bare = labels >= len(classes)
    border = np.zeros(labels.shape, dtype=bool)
    border[:, :-step] = labels[:, :-step] != labels[:, step:]
    border[:-step] |= labels[:-step] != labels[step:]
    border[:, step:] |= bare[:, :-step]
    border[step:] |= bare[:-step]
    shown[border] = _LINE_COLOR
    return cv2.copyTo(image, bare.view(np.uint8), shown)


@dataclass(frozen=True)
class OverlayStyle:
    """How overlays of pictures and videos look."""

    classes: ClassTable
    opacity: float = 0.5  # share of the colour, 0 to 1
    class_ids: Sequence[int] | None = None  # those that are painted; None for all
    fixed_legend: bool = False  # name all of them in every picture, so that a video's legend does not jump

    def draw(self, image: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The overlay above its legend. Without room for a legend, a picture stays without one.

        Args:
            image: (H, W, 3) uint8 RGB.
            labels: (H, W) uint8 ids, 255 = no class.

        Returns:
            (H + h, W, 3) uint8 RGB.
        """
        painted = np.array(range(len(self.classes)) if self.class_ids is None else self.class_ids, dtype=np.uint8)
        table = np.full(256, IGNORE_LABEL, dtype=np.uint8)
        table[painted] = painted
        labels = cv2.LUT(labels, table)
        drawn = overlay(image, labels, self.classes, self.opacity)
        named = legend_entries(self.classes, painted if self.fixed_legend else labels)
        legend = draw_legend([entry for entry in named if entry[1]], image.shape[1], max(13, max(image.shape) // 70))
        return np.concatenate([drawn, legend]) if legend.shape[1] == image.shape[1] else drawn


def legend_entries(classes: ClassTable, *label_maps: np.ndarray) -> Legend:
    """Name and colour of each class in any of the maps, by id; then None, for hatching, if a pixel is no class."""
    occurs = np.zeros(256, dtype=bool)
    for labels in label_maps:
        occurs |= count_labels(labels) > 0
    entries: Legend = [(name, c.color) for c, name in zip(classes, shown_names(classes.names)) if occurs[c.id]]
    if occurs[len(classes) :].any():
        entries.append(("unlabelled / no class", None))
    return entries


def draw_legend(entries: Legend, width: int, size: int) -> np.ndarray:
    """Patches and names in rows, (h, width, 3) uint8 RGB; wider if the longest name needs it.

    Args:
        size: of the font, in pixels.
    """
    gap = size // 2
    widths = [2 * size + gap + text_width(name, size) + 2 * gap for name, _ in entries]
    width = max([width, *(entry + 2 * gap for entry in widths)])
    places, x, row = [], gap, 0
    for entry in widths:
        if x + entry > width and x > gap:
            x, row = gap, row + 1
        places.append((x, row))
        x += entry
    step = 2 * size
    strip = np.full(((row + 1) * step if entries else 0, width, 3), _PAPER, dtype=np.uint8)
    for (name, color), (x, row) in zip(entries, places):
        top, right = row * step + gap, x + 2 * size - gap
        patch = strip[top : top + size, x:right]
        if color is None:
            _hatch(patch, np.ones(patch.shape[:2], dtype=bool))
        else:
            patch[:] = color
        cv2.rectangle(strip, (x, top), (right - 1, top + size - 1), _FAINT)
        write_text(strip, name, x + 2 * size, top + round(0.85 * size), size)
    return strip


def save_labels(path: Path, labels: np.ndarray) -> None:
    """Write a label map, (H, W) uint8, as the single-channel PNG of train ids that BDD100K's toolkit reads."""
    _write_png(path, labels)


def _write_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) BGR uint8."""
    _, png = cv2.imencode(".png", pixels)
    with atomic_write(path) as file:
        file.write(png.tobytes())


def error_map(image: np.ndarray, target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Show where a prediction is wrong: red on the picture in grey; pixels without a label are hatched.

    Args:
        image: (H, W, 3) uint8 RGB.
        target: (H, W) uint8 ids, 255 = not labelled.
        prediction: (H, W) uint8 ids, 255 = no class, which is wrong.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    shown = cv2.addWeighted(grey, 0.6, np.full_like(grey, 255), 0.15, 0)
    labelled = target != IGNORE_LABEL
    shown[labelled & (target != prediction)] = WRONG
    _hatch(shown, ~labelled)
    return shown


def save_comparison(
    path: Path,
    image: np.ndarray,
    target: np.ndarray,
    prediction: np.ndarray,
    classes: ClassTable,
    title: str,
    figures: str = "",
) -> None:
    """Write one PNG: image, ground truth, prediction and errors, each at the image's size, and a legend.

    Small images are enlarged by a whole number, so that the text fits. Images wider or higher than 2048 are shrunk.

    Args:
        path: where to write.
        image: (H, W, 3) uint8 RGB.
        target: (H, W) uint8 ids, 255 = not labelled.
        prediction: (H, W) uint8 ids, 255 = no class.
        classes: those of the two maps.
        title: stands above, on the left; cut off if it is too long.
        figures: stand above, on the right.

    Raises:
        ValueError: the sizes differ, or a map is not uint8.
    """
    if any(labels.shape != image.shape[:2] for labels in (target, prediction)):
        raise ValueError(f"image {image.shape[:2]}, labels {target.shape} and {prediction.shape} differ in size")
    height, width = image.shape[:2]
    longest = max(height, width)
    scale = _LONGEST / longest if longest > _LONGEST else max(1, min(round(_NARROWEST / width), _LONGEST // longest))
    if scale != 1:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        target, prediction = (
            cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
            for labels in (target, prediction)
        )
    labelled = target != IGNORE_LABEL
    wrong = int(np.count_nonzero(labelled & (target != prediction))) / max(1, int(np.count_nonzero(labelled)))
    panels = [
        ("image", image),
        ("ground truth", colorize(target, classes)),
        ("prediction", colorize(prediction, classes)),
        (f"errors: {wrong:.1%} of the labelled pixels", error_map(image, target, prediction)),
    ]
    columns = 2 if width >= height else 4
    canvas_width = max(columns * (width + _MARGIN) + _MARGIN, 2 * _NARROWEST)
    size = max(15, canvas_width // 90)
    line = 2 * size
    legend = draw_legend(legend_entries(classes, target, prediction), canvas_width, size)
    step = line + height
    canvas = np.full((line + len(panels) // columns * step + _MARGIN, legend.shape[1], 3), _PAPER, dtype=np.uint8)
    baseline = round(1.4 * size)
    left = canvas.shape[1] - _MARGIN - text_width(figures, size)
    write_text(canvas, figures, left, baseline, size)
    write_text(canvas[:, : left - _MARGIN], title, _MARGIN, baseline, size)
    for i, (caption, pixels) in enumerate(panels):
        x, y = _MARGIN + i % columns * (width + _MARGIN), line + i // columns * step
        write_text(canvas, caption, x, y + baseline, size, _FAINT)
        canvas[y + line : y + line + height, x : x + width] = pixels
    _write_png(path, cv2.cvtColor(np.concatenate([canvas, legend]), cv2.COLOR_RGB2BGR))


def save_confusion_matrix(path: Path, matrix: np.ndarray, classes: ClassTable) -> None:
    """Write a heat map of the classes that each true class was predicted as.

    The picture grows with the classes. With many of them cells and letters are small.

    Args:
        path: where to write.
        matrix: (N, N + 1) counts, a row for each true class and a last column for no class; an array or a CPU tensor.
        classes: the N classes.
    """
    counts, number = np.asarray(matrix), len(classes)
    if counts.shape != (number, number + 1):
        raise ValueError(f"a confusion matrix is ({number}, {number + 1}), got {counts.shape}")
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)

    names = short_names(classes.names)
    shrink = min(1.0, max(0.5, 29 / number))  # of a cell
    letters = 10 if shrink == 1 else 8
    # Pixels: of the cells, and of the room around them.
    cells = max(400.0, 932.2 * (number + 1) * shrink / 20), max(300.0, 810.0 * number * shrink / 19)
    longest = max(text_width(name, 13) for name in names)
    left, bottom, right, top = max(141.6, longest + 50.0), max(130.0, 0.75 * longest + 50), 106.2, 60.0
    width, height = left + cells[0] + right, bottom + cells[1] + top
    figure = _figure(width, height)
    area = left / width, bottom / height, cells[0] / width, cells[1] / height
    axes = figure.add_axes(area)
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
            fontsize=letters - 2,
            color="white" if share > 0.55 else "black",
        )
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor", "fontsize": letters}
    columns = letter_ticks(axes.xaxis, range(number + 1), [*names, "no class"], **turned)
    rows = letter_ticks(axes.yaxis, range(number), names, fontsize=letters)
    # Classes missing from the data stay, so that matrices are easy to compare, but in grey.
    for tick, occurs in [
        *zip(columns, counts.any(axis=0) | np.append(totals[:, 0] > 0, False)),
        *zip(rows, totals[:, 0] > 0),
    ]:
        tick.set_color("black" if occurs else "0.7")
    axes.set_xticks(np.arange(number) + 0.5, minor=True)
    axes.set_yticks(np.arange(number - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="0.88", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("prediction")
    axes.set_ylabel("ground truth")
    axes.set_title("Where the pixels of each class went (each row sums to 1)", pad=12)
    figure.colorbar(drawn, cax=figure.add_axes((1 - 82.6 / width, area[1], 21.24 / width, area[3])))
    save_figure(figure, path)


def _figure(width: float, height: float) -> Figure:
    """An empty figure of this size in pixels, on its own canvas."""
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure
