"""The images of a split that are drawn: some are spread evenly over it, the others are the worst."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.data.classes import ClassTable
from utils.data.datasets import NpyFolder
from utils.data.geometry import unframe
from utils.evaluate.plots import save_comparison
from utils.runtime import distributed
from utils.runtime.progress import progress_bar


@dataclass(frozen=True)
class Example:
    """An image to draw: `rank` 1 has the lowest mIoU of all."""

    index: int
    miou: float  # nan if nothing is labelled
    rank: int


class Examples:
    """Chooses images while a split is scored, and keeps their predictions until they are drawn.

    Half of them are spread evenly over the split, the others are the worst of the rest by mIoU. Each process sees a
    share of the split. Predictions are kept as PNG, about 20 KB each.

        examples = Examples(count=1000, number=20)
        for index in share:
            if examples.add(index, miou):
                examples.keep(index, prediction)
        for example in examples.choose():
            prediction = examples.take(example.index)  # None if another process has it
    """

    def __init__(self, count: int, number: int) -> None:
        """Choose `number` of `count` images, all of them if there are fewer."""
        number = min(number, count)
        self._worst_number = (number + 1) // 2 if number < count else 0
        self._spread = set(np.linspace(0, count - 1, number - self._worst_number).round().astype(int).tolist())
        self._mious: dict[int, float] = {}
        self._worst: list[tuple[float, int]] = []  # a heap; the best of the worst is first
        self._maps: dict[int, np.ndarray] = {}

    def add(self, index: int, miou: float) -> bool:
        """Take the score of an image; returns whether its prediction should be kept."""
        self._mious[index] = miou
        if index in self._spread:
            return True
        heapq.heappush(self._worst, (-_order(miou), -index))
        if len(self._worst) <= self._worst_number:
            return True
        dropped = -heapq.heappop(self._worst)[1]
        self._maps.pop(dropped, None)
        return dropped != index

    def keep(self, index: int, prediction: np.ndarray) -> None:
        """Keep a prediction, (H, W) uint8."""
        self._maps[index] = cv2.imencode(".png", prediction)[1]

    def choose(self) -> list[Example]:
        """The images to draw, the same in every process, the worst first."""
        mious = {index: miou for share in distributed.all_gather(self._mious) for index, miou in share.items()}
        order = sorted(mious, key=lambda index: (_order(mious[index]), index))
        worst = [index for index in order if index not in self._spread][: self._worst_number]
        ranks = {index: rank for rank, index in enumerate(order, start=1)}
        chosen = sorted(self._spread.union(worst), key=ranks.__getitem__)
        return [Example(index, mious[index], ranks[index]) for index in chosen]

    def take(self, index: int) -> np.ndarray | None:
        """The prediction of an image that this process has, (H, W) uint8."""
        png = self._maps.pop(index, None)
        return None if png is None else cv2.imdecode(png, cv2.IMREAD_GRAYSCALE)


def draw_examples(
    folder: Path, examples: Examples, source: NpyFolder, classes: ClassTable, masks: Mapping[str, Path] | None = None
) -> None:
    """Draw the chosen images as `<folder>/<name>.png`; each process draws those that it has scored.

    Args:
        classes: those of the labels and predictions.
        masks: the original masks by name, to draw instead of those of the frame.
    """
    chosen = examples.choose()
    is_quiet = not chosen or not distributed.is_main()
    for example in progress_bar(chosen, "drawing", unit="image", disable=is_quiet):
        prediction = examples.take(example.index)
        if prediction is None:
            continue
        item = source.items[example.index]
        image, target = unframe(*source.read(example.index), item.height, item.width, source.resize_mode)
        if masks:
            target = source.read_original_mask(masks[item.name], item.height, item.width)
        figures = f"mIoU {example.miou:.3f}, rank {example.rank:,} of {len(source.items):,} (1 = worst)"
        save_comparison(
            folder / f"{item.name}.png",
            image,
            target,
            prediction,
            classes,
            title=item.name,
            figures="no labelled pixel" if math.isnan(example.miou) else figures,
        )


def _order(miou: float) -> float:
    return math.inf if math.isnan(miou) else miou
