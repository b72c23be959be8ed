"""utils.evaluate.plots: the pictures are read back, and their pixels looked at."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.helpers.tables import MANY, ONE, THREE, table_of
from utils.data.classes import BDD100K, ClassTable
from utils.evaluate import plots
from utils.evaluate.plots import (
    OverlayStyle,
    colorize,
    error_map,
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


def test_colorize_is_the_palette_and_hatches_no_class() -> None:
    labels = np.array([[*range(19)]], dtype=np.uint8)
    colors = colorize(labels, BDD100K)
    assert colors.dtype == np.uint8
    assert colors.tolist() == [[list(c.color) for c in BDD100K.classes]]
    with pytest.raises(ValueError, match="uint8"):
        colorize(labels.astype(np.int64), BDD100K)
    for no_class in (255, 19):
        labels = np.zeros((64, 96), dtype=np.uint8)
        labels[20:60, 30:80] = no_class
        colors = colorize(labels, BDD100K)
        hatched = colors[20:60, 30:80].reshape(-1, 3)
        # Light, of two greys that no class has, each row and column with both; road around it.
        assert {tuple(color) for color in hatched.tolist()} == set(plots.HATCH)
        assert not set(plots.HATCH) & {c.color for c in BDD100K.classes}
        stripes = where(colors[20:60, 30:80], plots.HATCH[1])
        assert stripes.any(axis=0).all() and stripes.any(axis=1).all() and 0.1 < stripes.mean() < 0.5
        assert where(colors, BDD100K.classes[0].color).sum() == 64 * 96 - 40 * 50


def test_overlay_blends_draws_lines_and_leaves_the_rest() -> None:
    picture = np.full((4, 6, 3), (100, 40, 200), dtype=np.uint8)
    picture[0, 0] = (0, 0, 0)
    picture.setflags(write=False)
    labels = np.full((4, 6), 255, dtype=np.uint8)
    labels[:2, :3] = 18  # bicycle, (119, 11, 32)
    labels[:2, 3:] = 13  # car, (0, 0, 142)
    labels[3, 5] = 19  # no class either
    shown = overlay(picture, labels, BDD100K)
    line, bare = list(plots._LINE_COLOR), [100, 40, 200]
    # A line on bicycle's side divides it from the car; both are divided from what is no class by lines within them.
    assert shown[0].tolist() == [[60, 6, 16], [110, 26, 116], line, [50, 20, 171], [50, 20, 171], [50, 20, 171]]
    assert shown[1].tolist() == [line] * 6
    assert shown[2].tolist() == shown[3].tolist() == [bare] * 6
    assert shown.dtype == np.uint8
    quarter = overlay(picture, labels, BDD100K, opacity=0.25)
    assert quarter[0, 4].tolist() == [75, 30, 186]  # 0.75 * 200 + 0.25 * 142 = 185.5
    assert overlay(picture, labels, BDD100K, opacity=1)[0, :2].tolist() == [[119, 11, 32]] * 2
    assert (picture[0, 1:] == bare).all()  # the picture itself is not drawn on


def test_overlay_of_one_class_has_no_line_and_of_none_is_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (overlay(picture, np.full((5, 7), 255, dtype=np.uint8), BDD100K) == picture).all()
    road = overlay(picture, np.zeros((5, 7), dtype=np.uint8), BDD100K).astype(int)
    assert (np.abs(road - (picture / 2 + np.array(BDD100K.classes[0].color) / 2)) <= 0.5).all()
    assert overlay(picture[:1, :1], np.zeros((1, 1), dtype=np.uint8), BDD100K).shape == (1, 1, 3)


def test_a_class_on_bare_ground_has_lines_on_all_sides() -> None:
    labels = np.full((9, 12), 255, dtype=np.uint8)
    labels[2:7, 3:9] = 13
    line = where(overlay(image(9, 12), labels, BDD100K), plots._LINE_COLOR)
    expected = np.zeros((9, 12), dtype=bool)
    expected[2:7, 3:9] = True
    expected[3:6, 4:8] = False
    assert (line == expected).all()


def test_lines_grow_with_the_picture() -> None:
    for width, thickness in ((640, 1), (1280, 2), (4000, 6)):
        labels = np.zeros((8, width), dtype=np.uint8)
        labels[:, 100:] = 13
        line = where(overlay(np.zeros((8, width, 3), dtype=np.uint8), labels, BDD100K), plots._LINE_COLOR)
        assert np.flatnonzero(line[0]).tolist() == list(range(100 - thickness, 100))


def test_overlay_of_unlike_sizes_or_types_is_an_error() -> None:
    labels = np.zeros((4, 6), dtype=np.uint8)
    for bad_image, bad_labels in (
        (image(6, 4), labels),
        (image(4, 6).astype(np.float32), labels),
        (image(4, 6), labels.astype(np.int64)),
    ):
        with pytest.raises(ValueError, match="uint8"):
            overlay(bad_image, bad_labels, BDD100K)


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
    assert legend_entries(BDD100K, target, prediction) == [road, sky, car]
    prediction[0, 0] = 255
    assert legend_entries(BDD100K, target, prediction)[-1] == ("unlabelled / no class", None)
    assert legend_entries(BDD100K, np.full((2, 2), 255, dtype=np.uint8)) == [("unlabelled / no class", None)]


def legend_below(drawn: np.ndarray, height: int) -> list[int]:
    """The classes with a patch in the legend of an overlay."""
    return [c.id for c in BDD100K.classes if where(drawn[height:], c.color).sum() > 50]


def test_overlay_has_a_legend_of_the_classes_that_occur() -> None:
    picture = image(360, 640)
    labels = np.full((360, 640), 255, dtype=np.uint8)
    labels[:100], labels[200:, :9], labels[200:, 20:] = 10, 14, 0
    drawn = OverlayStyle(BDD100K).draw(picture, labels)
    assert (drawn[:360] == overlay(picture, labels, BDD100K)).all()
    assert legend_below(drawn, 360) == [0, 10, 14]
    assert (OverlayStyle(BDD100K).draw(picture, np.full_like(labels, 255)) == picture).all()  # nothing to name
    opaque = OverlayStyle(BDD100K, opacity=1).draw(picture, labels)
    assert (opaque[:360] == overlay(picture, labels, BDD100K, opacity=1)).all()


def test_overlay_of_chosen_classes_leaves_the_others_as_they_are() -> None:
    picture = image(360, 640)
    labels = np.zeros((360, 640), dtype=np.uint8)
    labels[100:200], labels[300:] = 13, 10
    drawn = OverlayStyle(BDD100K, class_ids=[13, 11]).draw(picture, labels)
    assert legend_below(drawn, 360) == [13]
    assert where(drawn[:90], GREY).all() and where(drawn[205:360], GREY).all()
    assert not where(drawn[100:200], GREY).any()


def test_a_fixed_legend_does_not_jump() -> None:
    style = OverlayStyle(BDD100K, class_ids=[18, 2, 13], fixed_legend=True)
    picture = image(360, 640)
    legends = [style.draw(picture, np.full((360, 640), c, dtype=np.uint8))[360:] for c in (2, 18, 255)]
    assert legends[0].size and all((legend == legends[0]).all() for legend in legends)
    assert legend_below(legends[0], 0) == [2, 13, 18]


@pytest.mark.parametrize(("height", "width", "has_legend"), [(90, 60, False), (641, 359, True), (720, 180, True)])
def test_a_legend_fits_the_picture_or_is_left_out(height: int, width: int, has_legend: bool) -> None:
    labels = np.arange(height * width, dtype=np.uint32).reshape(height, width) % 19
    drawn = OverlayStyle(BDD100K).draw(image(height, width), labels.astype(np.uint8))
    assert drawn.shape[1] == width
    assert legend_below(drawn, height) == (list(range(19)) if has_legend else [])


def panels(path: Path, height: int, width: int, columns: int = 2) -> list[np.ndarray]:
    """The four panels of a comparison of that size, in their order."""
    pixels = read(path)
    size = max(15, max(columns * (width + plots._MARGIN) + plots._MARGIN, 2 * plots._NARROWEST) // 90)
    found = []
    for i in range(4):
        x = plots._MARGIN + i % columns * (width + plots._MARGIN)
        y = 4 * size + i // columns * (2 * size + height)
        found.append(pixels[y : y + height, x : x + width])
    return found


@pytest.mark.parametrize(("height", "width", "columns"), [(720, 1280, 2), (359, 641, 2), (700, 500, 4)])
def test_comparison_shows_all_at_the_original_size_in_exact_colors(
    tmp_path: Path, height: int, width: int, columns: int
) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    target, prediction = (rng.choice(np.array([0, 8, 13, 18, 255], dtype=np.uint8), (height, width)) for _ in range(2))
    save_comparison(tmp_path / "a.png", picture, target, prediction, BDD100K, "name", "mIoU 0.5")
    shown = panels(tmp_path / "a.png", height, width, columns)
    expected = [
        picture,
        colorize(target, BDD100K),
        colorize(prediction, BDD100K),
        error_map(picture, target, prediction),
    ]
    for pixels, panel in zip(shown, expected):
        assert (pixels == panel).all()


def test_comparison_names_the_classes_of_both_maps(tmp_path: Path) -> None:
    target, prediction = (np.full((300, 500), c, dtype=np.uint8) for c in (0, 13))
    target[:100] = 255
    save_comparison(tmp_path / "a.png", image(300, 500), target, prediction, BDD100K, "name")
    pixels = read(tmp_path / "a.png")
    legend = pixels[-30:]
    assert [c.id for c in BDD100K.classes if where(legend, c.color).sum() > 50] == [0, 13]
    with_stripes = where(legend, plots.HATCH[1]).sum()
    save_comparison(tmp_path / "a.png", image(300, 500), prediction, prediction, BDD100K, "name")
    assert with_stripes > where(read(tmp_path / "a.png")[-30:], plots.HATCH[1]).sum() + 50


def test_errors_are_red_on_grey_and_what_is_not_labelled_is_hatched() -> None:
    picture = np.full((20, 40, 3), (10, 200, 30), dtype=np.uint8)
    target, prediction = (np.zeros((20, 40), dtype=np.uint8) for _ in range(2))
    target[:, :10], prediction[:, 5:20], prediction[10:, 20:30] = 255, 13, 255
    shown = error_map(picture, target, prediction)
    wrong = where(shown, plots.WRONG)
    assert wrong[:, 10:20].all() and wrong[10:, 20:30].all() and wrong.sum() == 300
    assert (where(shown, plots.HATCH[0]) | where(shown, plots.HATCH[1]))[:, :10].all()
    grey = shown[:, 30:]
    assert (grey == grey[0, 0, 0]).all() and plots.HATCH[1][0] > grey[0, 0, 0] > 0


@pytest.mark.parametrize(
    "title", ["街道_0001", "a\nb\0c", "\udcff\ud800", "\u202e" * 9, "x" * 5000, "", "😀", "<b>%s{}"]
)
def test_comparison_takes_any_name(tmp_path: Path, title: str) -> None:
    labels = np.zeros((40, 60), dtype=np.uint8)
    save_comparison(tmp_path / "a.png", image(40, 60), labels, labels, BDD100K, title, "mIoU 1.000")
    head = np.asarray((read(tmp_path / "a.png")[:30] < 128).any(axis=(0, 2)))
    assert head[: len(head) // 2].any() == bool(title)
    assert head[len(head) // 2 :].any()
    if title == "街道_0001":  # drawn, not replaced by question marks
        save_comparison(tmp_path / "b.png", image(40, 60), labels, labels, BDD100K, "??_0001", "mIoU 1.000")
        assert (read(tmp_path / "a.png")[:30] != read(tmp_path / "b.png")[:30]).any()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (8, 8), (90, 60)])
def test_comparison_of_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    labels = np.full((height, width), 13, dtype=np.uint8)
    save_comparison(tmp_path / "a.png", image(height, width), labels, labels, BDD100K, "name", "mIoU 1.000")
    pixels = read(tmp_path / "a.png")
    assert max(pixels.shape) < 5000
    assert where(pixels, BDD100K.classes[13].color).sum() > 2 * 480


def test_comparison_of_unlike_sizes_is_an_error(tmp_path: Path) -> None:
    labels = np.zeros((40, 60), dtype=np.uint8)
    for target, prediction in ((labels, labels.T), (labels.T, labels)):
        with pytest.raises(ValueError, match="differ in size"):
            save_comparison(tmp_path / "a.png", image(40, 60), target, prediction, BDD100K, "name")
    assert list(tmp_path.iterdir()) == []


def test_confusion_matrix_is_darkest_where_pixels_went(tmp_path: Path) -> None:
    matrix = np.zeros((19, 20), dtype=np.int64)
    matrix[0, 0], matrix[3, 19], matrix[18, 10] = 10**10, 5, 1  # all of a class, however small, is full colour
    save_confusion_matrix(tmp_path / "cm.png", matrix, BDD100K)
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
    save_confusion_matrix(tmp_path / "cm.png", torch.zeros(19, 20, dtype=torch.int64), BDD100K)
    assert read(tmp_path / "cm.png").size
    with pytest.raises(ValueError, match=r"\(19, 20\)"):
        save_confusion_matrix(tmp_path / "cm.png", np.zeros((19, 19), dtype=np.int64), BDD100K)


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    matrix = np.zeros((19, 20), dtype=np.int64)

    def fail(self: object, file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(plots.Figure, "savefig", fail)
        with pytest.raises(RuntimeError, match="stopped here"):
            save_confusion_matrix(path, matrix, BDD100K)
    assert path.read_bytes() == b"old"
    save_confusion_matrix(path, matrix, BDD100K)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_other_tables_have_their_own_colors_and_names() -> None:
    labels = np.array([[0, 1, 2, 3, 255]], dtype=np.uint8).repeat(40, axis=0).repeat(40, axis=1)
    colors = colorize(labels, THREE)
    for c in THREE:
        assert (colors[:, 40 * c.id : 40 * c.id + 40] == c.color).all()
    assert {tuple(color) for color in colors[:, 120:].reshape(-1, 3).tolist()} == set(plots.HATCH)
    shown = overlay(image(40, 200), labels, THREE, opacity=1)
    assert (shown[:, 45:75] == THREE.classes[1].color).all() and where(shown[:, 125:], GREY).all()
    assert legend_entries(THREE, labels[:, 40:80]) == [("机动车", THREE.classes[1].color)]
    assert legend_entries(table_of("ไทย", "a"), labels[:, :40]) == [("class 0", (0, 0, 211))]


def test_a_legend_of_150_classes_names_those_that_occur_in_rows() -> None:
    def legend(ids: range, fixed: bool = False) -> np.ndarray:
        labels = np.resize(np.array(ids, dtype=np.uint8), (720, 1280))
        drawn = OverlayStyle(MANY, opacity=1, fixed_legend=fixed).draw(image(720, 1280), labels)
        assert drawn.shape[1] == 1280
        return drawn[720:]

    def named(strip: np.ndarray) -> list[int]:
        return [c.id for c in MANY if where(strip, c.color).sum() > 50]

    few, every = legend(range(20, 25)), legend(range(150))
    assert named(few) == list(range(20, 25)) and named(every) == list(range(150))
    assert len(few) < 50 < 8 * len(few) < len(every) < 720
    assert (legend(range(20, 25), fixed=True) == every).all()


@pytest.mark.parametrize("classes", [ONE, THREE], ids=len)
@pytest.mark.filterwarnings("error")
def test_confusion_matrix_of_few_classes_in_chinese(classes: ClassTable, tmp_path: Path) -> None:
    number = len(classes)
    matrix = np.eye(number, number + 1, dtype=np.int64)
    save_confusion_matrix(tmp_path / "a.png", matrix, classes)
    pixels = read(tmp_path / "a.png")
    left, top, bottom = 141, 60, len(pixels) - 130
    for row in range(number):
        y = top + round((row + 0.5) * (bottom - top) / number)
        assert (pixels[y - 12 : y + 12, left - 45 : left - 4] < 128).any()
    save_confusion_matrix(tmp_path / "b.png", matrix, table_of(*(f"路{name}" for name in classes.names)))
    changed = np.nonzero((pixels != read(tmp_path / "b.png")).any(axis=2))
    assert changed[1].min() < left - 30 and changed[0].max() > bottom + 5


def test_confusion_matrix_of_150_classes_is_large_enough_for_its_numbers(tmp_path: Path) -> None:
    matrix = np.zeros((150, 151), dtype=np.int64)
    matrix[range(150), range(150)] = 9
    matrix[7, 149] = 1
    save_confusion_matrix(tmp_path / "a.png", matrix, MANY)
    pixels = read(tmp_path / "a.png")
    height, width = pixels.shape[:2]
    assert 3000 < width < 5000 and 3000 < height < 5000
    # The lone cell is as wide as its number, which is drawn in it.
    right, top = width - 107, 60
    cell = (932.2 / 40, 810 / 38)
    x, y = round(right - 1.5 * cell[0]), round(top + 7.5 * cell[1])
    shown = pixels[y - 10 : y + 11, x - 14 : x + 15].max(axis=2) < 110
    assert shown.any() and not shown[:, [0, -1]].any() and not shown[[0, -1]].any()
