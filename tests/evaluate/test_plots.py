"""utils.evaluate.plots: the pictures are read back, and their pixels looked at."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.data.classes import CLASSES, PALETTE
from utils.evaluate import plots
from utils.evaluate.plots import (
    colorize,
    legend_entries,
    overlay,
    save_comparison,
    save_confusion_matrix,
)

GREY = (123, 117, 109)  # of the image; no class has this colour


def read(path: Path) -> np.ndarray:
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert pixels is not None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def where(pixels: np.ndarray, color: Sequence[int]) -> np.ndarray:
    return (pixels[..., 0] == color[0]) & (pixels[..., 1] == color[1]) & (pixels[..., 2] == color[2])


def image(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def test_colorize_is_the_palette_and_255_is_black() -> None:
    labels = np.array([[*range(19), 255, 19]], dtype=np.uint8)
    colors = colorize(labels)
    assert colors.dtype == np.uint8
    assert colors.shape == (1, 21, 3)
    assert colors[0].tolist() == [list(c.color) for c in CLASSES] + [[0, 0, 0]] * 2
    with pytest.raises(ValueError, match="uint8"):
        colorize(labels.astype(np.int64))


def test_overlay_blends_draws_lines_and_leaves_the_rest() -> None:
    picture = np.full((4, 6, 3), (100, 40, 200), dtype=np.uint8)
    picture[0, 0] = (0, 0, 0)
    picture.setflags(write=False)
    labels = np.full((4, 6), 255, dtype=np.uint8)
    labels[:2, :3] = 18  # bicycle, (119, 11, 32)
    labels[:2, 3:] = 13  # car, (0, 0, 142)
    labels[3, 5] = 19  # no class either
    shown = overlay(picture, labels)
    line, bare = list(plots._LINE_COLOR), [100, 40, 200]
    # A line on bicycle's side divides it from the car; both are divided from what is no class by lines within them.
    assert shown[0].tolist() == [[60, 6, 16], [110, 26, 116], line, [50, 20, 171], [50, 20, 171], [50, 20, 171]]
    assert shown[1].tolist() == [line] * 6
    assert shown[2].tolist() == shown[3].tolist() == [bare] * 6
    assert shown.dtype == np.uint8
    quarter = overlay(picture, labels, opacity=0.25)
    assert quarter[0, 4].tolist() == [75, 30, 186]  # 0.75 * 200 + 0.25 * 142 = 185.5
    assert overlay(picture, labels, opacity=1)[0, :2].tolist() == [[119, 11, 32]] * 2
    assert (picture[0, 1:] == bare).all()  # the picture itself is not drawn on


def test_overlay_of_one_class_has_no_line_and_of_none_is_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (overlay(picture, np.full((5, 7), 255, dtype=np.uint8)) == picture).all()
    road = overlay(picture, np.zeros((5, 7), dtype=np.uint8)).astype(int)
    assert (np.abs(road - (picture / 2 + np.array(CLASSES[0].color) / 2)) <= 0.5).all()
    assert overlay(picture[:1, :1], np.zeros((1, 1), dtype=np.uint8)).shape == (1, 1, 3)


def test_lines_grow_with_the_picture() -> None:
    for width, thickness in ((1280, 1), (4000, 2), (6000, 4)):
        labels = np.zeros((8, width), dtype=np.uint8)
        labels[:, 100:] = 13
        line = where(overlay(np.zeros((8, width, 3), dtype=np.uint8), labels), plots._LINE_COLOR)
        assert np.flatnonzero(line[0]).tolist() == list(range(100 - thickness, 100))


def test_overlay_of_unlike_sizes_or_types_is_an_error() -> None:
    labels = np.zeros((4, 6), dtype=np.uint8)
    for bad_image, bad_labels in (
        (image(6, 4), labels),
        (image(4, 6).astype(np.float32), labels),
        (image(4, 6), labels.astype(np.int64)),
    ):
        with pytest.raises(ValueError, match="uint8"):
            overlay(bad_image, bad_labels)


def test_saved_labels_are_one_channel_of_the_very_values(tmp_path: Path) -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    plots.save_labels(tmp_path / "x.png", labels)
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), labels)


def test_legend_names_what_occurs_in_any_map() -> None:
    target = np.array([[13, 13], [0, 0]], dtype=np.uint8)
    prediction = np.array([[10, 10], [0, 0]], dtype=np.uint8)
    road, sky, car = (("road", (128, 64, 128)), ("sky", (70, 130, 180)), ("car", (0, 0, 142)))
    assert legend_entries(target, prediction) == [road, sky, car]
    prediction[0, 0] = 255
    assert legend_entries(target, prediction)[-1] == ("unlabelled / no class", (0, 0, 0))
    assert legend_entries(np.full((2, 2), 255, dtype=np.uint8)) == [("unlabelled / no class", (0, 0, 0))]


@pytest.mark.parametrize(("height", "width"), [(72, 128), (256, 256), (720, 1280), (90, 60)])
def test_comparison_shows_image_truth_and_prediction_in_exact_colors(tmp_path: Path, height: int, width: int) -> None:
    target = np.full((height, width), 0, dtype=np.uint8)
    target[: height // 2] = 255
    prediction = np.full((height, width), 13, dtype=np.uint8)
    save_comparison(tmp_path / "a.png", image(height, width), target, prediction)
    pixels = read(tmp_path / "a.png")
    panel = 640 * round(640 * height / width)
    shown = [where(pixels, color) for color in (GREY, CLASSES[0].color, CLASSES[13].color)]
    for mask, area in zip(shown, (panel, panel / 2, panel)):
        assert area * 0.99 <= mask.sum() <= area * 1.01 + 400  # and the patch in the legend
    # From left to right; the unlabelled half is black and above the road.
    image_x, road_x, car_x = (np.flatnonzero(mask.sum(axis=0) > 30).mean() for mask in shown)
    assert image_x < road_x < car_x
    black = where(pixels, (0, 0, 0))
    assert black.sum() >= panel / 2 * 0.99
    columns = slice(int(road_x) - 20, int(road_x) + 20)
    assert np.argwhere(black[:, columns])[:, 0].mean() < np.argwhere(shown[1][:, columns])[:, 0].mean()
    # No colour of a class that is not there, in the legend or elsewhere (but greys, which smooth black text has too).
    assert not any(where(pixels, c.color).any() for c in CLASSES if c.id not in (0, 13) and len(set(c.color)) > 1)


def test_comparison_keeps_left_and_right_and_top_and_bottom(tmp_path: Path) -> None:
    target = np.array([[0, 2], [8, 10]], dtype=np.uint8).repeat(50, axis=0).repeat(80, axis=1)
    save_comparison(tmp_path / "a.png", PALETTE[target], target, target)
    pixels = read(tmp_path / "a.png")
    height = 640 * 100 // 160
    block = PALETTE[np.array([[0, 2], [8, 10]], dtype=np.uint8).repeat(height // 2, axis=0).repeat(320, axis=1)]
    top = next(y for y in range(pixels.shape[0]) if (pixels[y, 100] == CLASSES[0].color).all())
    for i in (1, 2):  # the label panels, to the pixel
        left = plots._MARGIN + i * (640 + plots._MARGIN)
        assert (pixels[top : top + height, left : left + 640] == block).all()


def test_comparison_without_truth_has_two_panels(tmp_path: Path) -> None:
    labels = np.full((40, 60), 5, dtype=np.uint8)
    save_comparison(tmp_path / "three.png", image(40, 60), labels, labels)
    save_comparison(tmp_path / "two.png", image(40, 60), None, labels)
    three, two = read(tmp_path / "three.png"), read(tmp_path / "two.png")
    assert three.shape[1] - two.shape[1] == 640 + plots._MARGIN
    assert where(three, CLASSES[5].color).sum() > 1.9 * where(two, CLASSES[5].color).sum()


def test_comparison_of_unlike_sizes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in size"):
        save_comparison(tmp_path / "a.png", image(40, 60), None, np.zeros((60, 40), dtype=np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_confusion_matrix_is_darkest_where_pixels_went(tmp_path: Path) -> None:
    matrix = np.zeros((19, 20), dtype=np.int64)
    matrix[0, 0], matrix[3, 19], matrix[18, 10] = 10**10, 5, 1  # all of a class, however small, is full colour
    save_confusion_matrix(tmp_path / "cm.png", matrix)
    pixels = read(tmp_path / "cm.png")
    height, width = pixels.shape[:2]
    left, bottom, w, h = 0.12 * width, 0.13 * height, 0.79 * width, 0.81 * height
    top = height - bottom - h

    def cell(row: int, column: int) -> np.ndarray:  # its upper left part, beside the number
        return pixels[int(top + (row + 0.2) * h / 19), int(left + (column + 0.15) * w / 20)]

    for row in range(19):
        for column in range(20):
            blue = cell(row, column)
            if (row, column) in ((0, 0), (3, 19), (18, 10)):
                assert blue.sum() < 300
            elif row in (0, 3, 18):
                assert blue.sum() > 720
            else:  # no such pixel in the ground truth: grey
                assert len(set(blue.tolist())) == 1
                assert 700 < blue.sum() < 750


def test_confusion_matrix_takes_tensors_and_nothing_of_another_shape(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_confusion_matrix(tmp_path / "cm.png", torch.zeros(19, 20, dtype=torch.int64))
    assert read(tmp_path / "cm.png").size
    with pytest.raises(ValueError, match=r"\(19, 20\)"):
        save_confusion_matrix(tmp_path / "cm.png", np.zeros((19, 19), dtype=np.int64))


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    labels = np.zeros((8, 8), dtype=np.uint8)

    def fail(self: object, file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(plots.Figure, "savefig", fail)
        with pytest.raises(RuntimeError, match="stopped here"):
            save_comparison(path, image(8, 8), labels, labels)
    assert path.read_bytes() == b"old"
    save_comparison(path, image(8, 8), labels, labels)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
