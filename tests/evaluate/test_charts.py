"""utils.evaluate.charts: the pictures are read back, and their pixels looked at."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.helpers.tables import MANY, ONE, THREE
from utils.data.classes import BDD100K, ClassTable, SemanticClass
from utils.evaluate import charts


def read(path: Path) -> np.ndarray:
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert pixels is not None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def where(picture: np.ndarray, color: str | tuple[int, int, int]) -> np.ndarray:
    rgb = tuple(bytes.fromhex(color[1:])) if isinstance(color, str) else color
    return (picture == rgb).all(axis=2)


def history(*figures: str, epochs: int = 6) -> list[dict[str, Any]]:
    """Epochs of falling loss and rising mIoU, which every other one has; its best is the last but one."""
    records: list[dict[str, Any]] = []
    for epoch in range(epochs):
        values = {"val_miou": 0.1 * epoch if epoch % 2 else math.nan, "dice": 0.4 / (epoch + 1), "lr": 1e-3}
        records.append({"epoch": epoch, "train_loss": 1 / (epoch + 1), **{key: values[key] for key in figures}})
    return records


def test_loss_falls_and_miou_rises_in_charts_of_their_own(tmp_path: Path) -> None:
    charts.save_loss_curve(tmp_path / "all.png", history("val_miou", "lr"), best=5)
    charts.save_loss_curve(tmp_path / "loss.png", history())
    both, loss = read(tmp_path / "all.png"), read(tmp_path / "loss.png")
    for color, falls in ((charts.LOSS_COLOR, True), (charts.MIOU_COLOR, False)):
        ys, xs = np.nonzero(where(both, color))
        left, right = (ys[abs(xs - end) < 20].max() for end in (xs.min(), xs.max()))  # the legend is above
        assert (right > left + 50) == falls and (right < left - 50) != falls
    assert where(both, charts.BEST_COLOR).any()
    assert not where(loss, charts.MIOU_COLOR).any() and not where(loss, charts.BEST_COLOR).any()
    assert loss.shape[0] < 0.6 * both.shape[0]  # charts without figures are left out
    charts.save_loss_curve(tmp_path / "one.png", history(epochs=1))  # one epoch is a point
    assert where(read(tmp_path / "one.png"), charts.LOSS_COLOR).sum() >= 5


def test_the_best_epoch_is_marked_where_it_is(tmp_path: Path) -> None:
    columns = []
    for best in (1, 5):
        charts.save_loss_curve(tmp_path / "a.png", history("val_miou"), best=best)
        picture = read(tmp_path / "a.png")[60:]  # below the title
        columns.append(np.median(np.nonzero(where(picture, charts.BEST_COLOR))[1]) / picture.shape[1])
    assert columns[0] < 0.5 < columns[1]


def test_each_part_of_the_loss_has_a_line(tmp_path: Path) -> None:
    charts.save_loss_curve(tmp_path / "a.png", history("dice"), parts=["dice"])
    assert where(read(tmp_path / "a.png"), charts._PART_COLORS[0]).sum() > 200


def test_a_class_without_pixels_has_no_curve(tmp_path: Path) -> None:
    def drawn(*with_iou: str) -> int:
        records = history()
        for record in records:
            record |= {f"iou/{name}": 0.5 if name in with_iou else math.nan for name in BDD100K.names}
        charts.save_class_curves(tmp_path / "a.png", records, "iou/", BDD100K.names, best=3)
        return int(where(read(tmp_path / "a.png"), charts.MIOU_COLOR).sum())

    assert drawn() == 0
    one, two = drawn("road"), drawn("road", "bicycle")
    assert one > 0 and abs(two - 2 * one) < 0.1 * two


def test_bars_of_labels_have_their_classes_colours_and_lengths(tmp_path: Path) -> None:
    pixels = [0] * len(BDD100K.classes)
    pixels[0], pixels[13], pixels[18] = 999_000, 990, 10
    charts.save_label_distribution(
        tmp_path / "a.png", "train", pixels, [10 * bool(n) for n in pixels], total=20, classes=BDD100K
    )
    picture = read(tmp_path / "a.png")
    half = picture.shape[1] // 2

    def length(color: tuple[int, int, int], side: slice) -> int:
        return int(where(picture[:, side], color).any(axis=0).sum())

    left, right = slice(half), slice(half, None)
    road, car, bicycle = (length(BDD100K.classes[i].color, left) for i in (0, 13, 18))
    assert road > car > bicycle > 10
    assert abs((road - car) - 3 * (car - bicycle) / 2) < 0.1 * road  # three decades apart, and two
    assert length(BDD100K.classes[0].color, right) == length(BDD100K.classes[18].color, right)
    assert length(BDD100K.classes[16].color, left) == 0
    charts.save_label_distribution(
        tmp_path / "b.png", "train", [0] * 19, [0] * 19, total=3, classes=BDD100K
    )  # nothing labelled


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import utils.evaluate.plots; from utils.evaluate import charts; "
        f"charts.save_loss_curve(Path({str(tmp_path / 'a.png')!r}), [dict(epoch=1, train_loss=0.5)]); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize("classes", [ONE, THREE, MANY], ids=len)
@pytest.mark.filterwarnings("error")
def test_charts_of_any_number_of_classes(classes: ClassTable, tmp_path: Path) -> None:
    number = len(classes)
    records = [{"epoch": e, "train_loss": 1.0, **{f"iou/{name}": 0.5 for name in classes.names}} for e in range(2)]
    charts.save_class_curves(tmp_path / "a.png", records, "iou/", classes.names, best=1)
    curves = read(tmp_path / "a.png")
    lines = where(curves, charts.MIOU_COLOR)
    starts = lines & ~np.roll(lines, 1, axis=1)
    assert starts.any(axis=1).sum() >= math.ceil(number / 10) and lines.sum() >= 30 * number
    assert (curves[:, -1] == 255).all()
    images = [1] * number
    charts.save_label_distribution(tmp_path / "b.png", "train", [100] * number, images, 2, classes)
    bars = read(tmp_path / "b.png")
    rows = [where(bars, c.color).any(axis=1).nonzero()[0] for c in classes]
    assert all(len(row) >= 15 for row in rows) and len(bars) < 300 + 28 * number
    assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)
    left = next(column for column in range(bars.shape[1]) if where(bars, classes.classes[0].color)[:, column].any())
    assert all((bars[row[0] : row[-1], 2 : left - 5] < 128).any() for row in rows)  # a name beside each


def test_a_class_in_no_image_has_no_bar(tmp_path: Path) -> None:
    charts.save_label_distribution(tmp_path / "a.png", "train", [9, 0, 9], [1, 0, 1], 1, THREE)
    picture = read(tmp_path / "a.png")
    assert where(picture, THREE.classes[0].color).sum() > 1000
    assert not where(picture, THREE.classes[1].color).any()


def test_white_bars_have_an_edge(tmp_path: Path) -> None:
    white = ClassTable((SemanticClass(0, "line", (255, 255, 255)),))
    charts.save_label_distribution(tmp_path / "a.png", "train", [9], [1], 1, white)
    assert where(read(tmp_path / "a.png"), (153, 153, 153)).sum() > 100
