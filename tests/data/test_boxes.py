"""utils.data.boxes: boxes by a slow search over pixels, boxes brought into the frame, and the limits of jitter."""

import numpy as np
import pytest

from utils.data.boxes import class_boxes, jitter_boxes, mask_box, to_frame
from utils.data.frame import frame_size
from utils.data.geometry import fitted_size, resize_mask


def slow_box(mask: np.ndarray) -> list[int]:
    pixels = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    xs, ys = zip(*pixels)
    return [min(xs), min(ys), max(xs), max(ys)]


def test_boxes_worked_by_hand() -> None:
    labels = np.full((4, 6), 255, dtype=np.uint8)
    labels[1:3, 2:5] = 13  # 2 rows, 3 columns
    labels[0, 0] = labels[3, 5] = 18  # opposite corners
    labels[2, 2] = 0  # one pixel
    class_ids, boxes = class_boxes(labels, 19)
    assert class_ids.dtype == boxes.dtype == np.int64
    assert class_ids.tolist() == [0, 13, 18]
    assert boxes.tolist() == [[2, 2, 2, 2], [2, 1, 4, 2], [0, 0, 5, 3]]


@pytest.mark.parametrize("seed", range(12))
def test_boxes_equal_slow_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.full(rng.integers(1, 24, 2), 255, dtype=np.uint8)
    for k in rng.permutation(19)[: rng.integers(1, 20)]:
        labels[rng.random(labels.shape) < rng.choice([0.01, 0.1])] = k
    class_ids, boxes = class_boxes(labels, 19)
    present = sorted(set(labels.ravel().tolist()) - {255})
    assert class_ids.tolist() == present
    assert boxes.shape == (len(present), 4)
    for k, box in zip(present, boxes.tolist()):
        assert box == slow_box(labels == k)
        assert box == mask_box(labels == k).tolist()


def test_all_classes_and_no_class() -> None:
    class_ids, boxes = class_boxes(np.arange(19, dtype=np.uint8)[None], 19)
    assert class_ids.tolist() == list(range(19))
    assert boxes.tolist() == [[k, 0, k, 0] for k in range(19)]
    class_ids, boxes = class_boxes(np.full((5, 7), 255, dtype=np.uint8), 19)
    assert class_ids.shape == (0,)
    assert boxes.shape == (0, 4)


@pytest.mark.parametrize("value", [19, 31, 32, 42, 254])
def test_label_that_is_no_class_is_an_error(value: int) -> None:
    labels = np.zeros((3, 3), dtype=np.uint8)
    labels[1, 1] = value
    with pytest.raises(ValueError, match=rf"labels must be 0-18 or 255, got \[{value}\]"):
        class_boxes(labels, 19)


def test_arrays_of_another_kind_are_errors() -> None:
    with pytest.raises(ValueError, match="uint8"):
        class_boxes(np.zeros((3, 3), dtype=np.int64), 19)
    with pytest.raises(ValueError, match="uint8"):
        class_boxes(np.zeros((3, 3, 3), dtype=np.uint8), 19)
    with pytest.raises(ValueError, match="bool"):
        mask_box(np.zeros((3, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="empty"):
        mask_box(np.zeros((3, 3), dtype=bool))


def random_boxes(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    corners = np.sort(rng.integers(0, size, (n, 2, 2)), axis=1)
    return np.concatenate([corners[:, 0], corners[:, 1]], axis=1)


def test_frame_worked_by_hand() -> None:
    boxes = np.array([[0, 0, 1279, 719], [100, 50, 100, 50], [-40, 700.25, 90.75, 9999]])
    stretched = to_frame(boxes, 720, 1280, 1024, "stretch")  # 0.8 in x, 64 / 45 in y
    assert stretched.dtype == np.float32
    y_50, y_700 = 50.5 * 64 / 45 - 0.5, 700.75 * 64 / 45 - 0.5
    expected = [[0, 0.5 * 64 / 45 - 0.5, 1023, 719.5 * 64 / 45 - 0.5], [79.9, y_50, 79.9, y_50], [0, y_700, 72.5, 1023]]
    assert stretched == pytest.approx(np.array(expected), abs=1e-3)
    padded = to_frame(boxes, 720, 1280, 1024, "pad")  # 0.8 in both; the picture is 576 rows high
    expected = [[0, 0, 1023, 575], [79.9, 39.9, 79.9, 39.9], [0, 560.1, 72.5, 575]]
    assert padded == pytest.approx(np.array(expected), abs=1e-3)
    # Outside the picture: a line on the border that is nearest.
    assert to_frame(np.array([[1300, 5, 1400, 5]]), 720, 1280, 1024, "pad")[0, [0, 2]].tolist() == [1023, 1023]
    assert to_frame(np.zeros((0, 4)), 720, 1280, 1024, "pad").shape == (0, 4)
    with pytest.raises(ValueError, match="resize_mode must be one of"):
        to_frame(boxes, 720, 1280, 1024, "crop")


@pytest.mark.parametrize("mode", ["stretch", "pad"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((720, 1280), 256),
        ((720, 1280), 1024),
        ((96, 54), 64),
        ((45, 80), 80),
        ((720, 1280), "576x1024"),
        ((96, 54), "64x96"),
        ((45, 80), "64x80"),
        ((54, 96), "96x64"),
    ],
)
def test_box_in_the_frame_is_the_box_of_the_resized_mask(shape: tuple[int, int], size: int | str, mode: str) -> None:
    """Within a pixel: the mask keeps whole pixels, by their centres, and no scale here exceeds 2."""
    rng = np.random.default_rng(max(frame_size(size)))
    for _ in range(20):
        xs, ys = np.sort(rng.integers(0, shape[1], 2)), np.sort(rng.integers(0, shape[0], 2))
        box = np.array([xs[0], ys[0], xs[1], ys[1]])
        mask = np.full(shape, 255, dtype=np.uint8)
        mask[box[1] : box[3] + 1, box[0] : box[2] + 1] = 13
        _, boxes = class_boxes(resize_mask(mask, size, mode), 19)
        mapped = to_frame(box[None], *shape, size, mode)
        assert np.abs(mapped - boxes).max(initial=0) <= 1  # K is 0 if so thin a box has no pixel left
        height, width = fitted_size(*shape, size, mode)
        assert (mapped >= 0).all() and (mapped <= [width - 1, height - 1] * 2).all()


def test_a_frame_that_is_no_square_worked_by_hand() -> None:
    boxes = np.array([[0, 0, 1279, 719], [100, 50, 100, 50], [-40, 700.25, 90.75, 9999]])
    expected = np.array([[0, 0, 1023, 575], [79.9, 39.9, 79.9, 39.9], [0, 560.1, 72.5, 575]])
    for mode in ("stretch", "pad"):  # the frame has the picture's shape
        assert to_frame(boxes, 720, 1280, "576x1024", mode) == pytest.approx(expected, abs=1e-3)
    upright = np.array([[0, 0, 719, 1279], [719, 1279, 900, 1500]])  # 0.45 in both; the picture is 324 columns wide
    assert to_frame(upright, 1280, 720, "576x1024", "pad") == pytest.approx(
        np.array([[0, 0, 323, 575], [323, 575, 323, 575]]), abs=0.3
    )


@pytest.mark.parametrize(("image_size", "corner"), [("64x96", [95, 63]), ("96x64", [63, 95]), (64, [63, 63])])
def test_jitter_is_clipped_on_each_axis_by_its_own_side(image_size: int | str, corner: list[int]) -> None:
    boxes = np.tile([0, 0, *corner], (300, 1))
    moved = jitter_boxes(boxes, image_size, 20, np.random.default_rng(0))
    assert moved.min(axis=0)[:2].tolist() == [0, 0]
    assert moved.max(axis=0)[2:].tolist() == corner
    assert (moved[:, 2:] < corner).any(axis=0).all() and (moved[:, :2] > 0).any(axis=0).all()


@pytest.mark.parametrize("max_shift", [1, 5, 20, 500])
def test_jitter_stays_inside_its_limits(max_shift: int) -> None:
    rng = np.random.default_rng(max_shift)
    size = 256
    boxes = random_boxes(rng, 4000, size)
    boxes[:200, 2:] = boxes[:200, :2]  # single pixels
    moved = jitter_boxes(boxes, size, max_shift, rng)
    assert moved.dtype == boxes.dtype
    assert moved.shape == boxes.shape
    assert moved.min() >= 0
    assert moved.max() <= size - 1
    assert (moved[:, :2] <= moved[:, 2:]).all()
    for box, new in zip(boxes.tolist(), moved.tolist()):
        for axis in (0, 1):
            side = box[axis + 2] - box[axis] + 1
            limit = min(max_shift, int(side / 10 + 0.5))
            assert abs(new[axis] - box[axis]) <= limit
            assert abs(new[axis + 2] - box[axis + 2]) <= limit
    assert (moved[:200] == boxes[:200]).all()


def test_jitter_is_uniform_and_independent_per_coordinate() -> None:
    # Sides of 60 and 30 pixels: up to 6 and 3 pixels, each whole shift equally often.
    boxes = np.tile([100, 100, 159, 129], (20_000, 1))
    shifts = jitter_boxes(boxes, 1024, 20, np.random.default_rng(0)) - boxes
    for column, limit in enumerate([6, 3, 6, 3]):
        values, counts = np.unique(shifts[:, column], return_counts=True)
        assert values.tolist() == list(range(-limit, limit + 1))
        expected = 20_000 / (2 * limit + 1)
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    correlation = np.corrcoef(shifts.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.05


def test_jitter_is_clipped_into_the_image() -> None:
    boxes = np.tile([0, 0, 255, 255], (200, 1))
    moved = jitter_boxes(boxes, 256, 20, np.random.default_rng(0))
    assert moved.min() == 0
    assert moved.max() == 255
    assert moved[:, 0].max() == 20
    assert moved[:, 2].min() == 235


def test_jitter_depends_on_its_generator_alone() -> None:
    boxes = random_boxes(np.random.default_rng(1), 50, 256)
    before = boxes.copy()
    first, again, other = (jitter_boxes(boxes, 256, 20, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert (first == again).all()
    assert (first != other).any()
    assert (boxes == before).all()


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_no_shift_is_identity(dtype: type) -> None:
    boxes: np.ndarray = random_boxes(np.random.default_rng(2), 50, 256).astype(dtype)
    same = jitter_boxes(boxes, 256, 0, np.random.default_rng(0))
    assert same.dtype == dtype
    assert (same == boxes).all()
    assert jitter_boxes(boxes[:0], 256, 20, np.random.default_rng(0)).shape == (0, 4)
