"""Views: image and labels change alike, nothing is invented, and chance comes from where it is said to."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from utils.data.augment import MIN_CROP_AREA, View, draw_view, fixed_view
from utils.data.geometry import PAD_COLOR

SIDE = 48
FRAME = (SIDE, SIDE)


def scene() -> tuple[np.ndarray, np.ndarray]:
    """An image whose colour says its label: S x S x 3 uint8, and S x S uint8 of 0, 7, 13 and 255."""
    labels = np.full((SIDE, SIDE), 7, np.uint8)
    labels[:20] = 0
    labels[10:40, 24:] = 13
    labels[:, :4] = 255
    return np.stack([labels, 255 - labels, labels // 2], axis=2), labels


def test_the_first_two_views_are_the_image_and_its_mirror_image() -> None:
    image, labels = scene()
    assert fixed_view("a", 0) == View()
    assert np.array_equal(fixed_view("a", 0).image(image, FRAME), image)
    assert np.array_equal(fixed_view("a", 0).labels(labels, FRAME), labels)
    assert np.array_equal(fixed_view("a", 1).image(image, FRAME), image[:, ::-1])
    assert np.array_equal(fixed_view("a", 1).labels(labels, FRAME), labels[:, ::-1])


def test_further_views_are_a_function_of_name_and_number() -> None:
    assert fixed_view("a", 2) == fixed_view("a", 2)
    assert len({fixed_view(name, number) for name in ("a", "b", "路", "\udcff") for number in (2, 3, 4)}) == 12


@pytest.mark.parametrize("size", [FRAME, (30, SIDE), (SIDE, 30)])
def test_image_and_labels_are_cropped_alike_and_no_label_is_invented(size: tuple[int, int]) -> None:
    image, labels = scene()
    rng = np.random.default_rng(0)
    for _ in range(30):
        drawn = draw_view(rng)
        view = View(drawn.mirrored, drawn.window)
        seen, found = view.image(image, size).numpy().astype(int), view.labels(labels, size)
        assert seen.shape == image.shape and found.shape == labels.shape and found.dtype == np.uint8
        assert set(np.unique(found)) <= {0, 7, 13, 255}
        seen, found = seen[: size[0], : size[1]], found[: size[0], : size[1]]
        # Only where two labels meet is the colour in between.
        assert (np.abs(seen[..., 0] - found) < 1).mean() > 0.85
        inside = cv2.erode(found, np.ones((3, 3))) == cv2.dilate(found, np.ones((3, 3)))
        assert (np.abs(seen[..., 0] - found)[inside] < 1).all()


def test_padding_stays_what_and_where_it_is() -> None:
    """And the picture beside it, 30 x 48 or 48 x 30, is seen as by itself."""
    image, labels = scene()
    rng = np.random.default_rng(0)
    for view in (View(mirrored=True), View(window=(0, 0, 0.5, 0.5)), View(brightness=0.5), draw_view(rng)):
        for size in ((30, SIDE), (SIDE, 30)):
            picture = np.s_[: size[0], : size[1]]
            frame, marks = np.full_like(image, PAD_COLOR), np.full_like(labels, 255)
            frame[picture], marks[picture] = image[picture], labels[picture]
            seen, found = view.image(frame, size).numpy(), view.labels(marks, size)
            alone, marks_alone = np.ascontiguousarray(frame[picture]), np.ascontiguousarray(marks[picture])
            assert np.array_equal(seen[picture], view.image(alone, size).numpy())
            assert np.array_equal(found[picture], view.labels(marks_alone, size))
            seen[picture], found[picture] = PAD_COLOR, 255
            assert (seen == PAD_COLOR).all() and (found == 255).all()


def test_a_window_is_in_shares_of_the_pictures_own_sides() -> None:
    """The right half of a picture of 30 x 48 has columns 24 to 47, each twice; the lower half rows 15 to 29."""
    columns = np.tile(np.arange(SIDE, dtype=np.uint8), (SIDE, 1))
    seen = View(window=(0, 0.5, 1, 0.5)).labels(columns, (30, SIDE))
    assert np.array_equal(seen[:30], np.tile(np.repeat(np.arange(24, 48, dtype=np.uint8), 2), (30, 1)))
    seen = View(window=(0.5, 0, 0.5, 1)).labels(np.ascontiguousarray(columns.T), (30, SIDE))
    assert np.array_equal(seen[:30], np.tile(np.repeat(np.arange(15, 30, dtype=np.uint8), 2)[:, None], (1, SIDE)))


def test_windows_stay_inside_and_reach_their_bounds() -> None:
    rng = np.random.default_rng(0)
    views = [draw_view(rng) for _ in range(400)]
    windows = np.array([view.window for view in views])
    assert windows.min() >= 0
    assert (windows[:, :2] + windows[:, 2:]).max() <= 1
    areas = windows[:, 2] * windows[:, 3]
    assert MIN_CROP_AREA * 0.9 < areas.min() < 0.55 and areas.max() > 0.9
    assert 0.4 < np.mean([view.mirrored for view in views]) < 0.6
    for what in ("brightness", "contrast"):
        values = [getattr(view, what) for view in views]
        assert 0.75 <= min(values) < 0.8 and 1.2 < max(values) <= 1.25


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_every_type_that_images_are_stored_in(dtype: Any) -> None:
    image, _ = scene()
    reference = View(True, (0.1, 0.2, 0.7, 0.75), 1.2, 0.8).image(image, FRAME).numpy() / 255
    stored = image if dtype == np.uint8 else (image / 255).astype(dtype)
    view = View(True, (0.1, 0.2, 0.7, 0.75), 1.2, 0.8).image(stored, FRAME).numpy()
    assert view.dtype == dtype and view.flags.c_contiguous
    scale = 255 if dtype == np.uint8 else 1
    assert np.abs(view.astype(np.float64) / scale - reference).max() < 0.02
    assert view.min() >= 0 and view.max() <= scale


def test_brightness_and_contrast_leave_labels_alone() -> None:
    image, labels = scene()
    assert np.array_equal(View(brightness=1.2, contrast=0.8).labels(labels, FRAME), labels)
    darker = View(brightness=0.5).image(image, FRAME).numpy()
    assert np.abs(darker.astype(int) - image // 2).max() <= 1
    flat = View(contrast=0.5).image(image, FRAME).numpy()
    assert flat.std() < 0.6 * image.std()
