"""The frame: sizes, sampling positions, padding, and the way back."""

import cv2
import numpy as np
import pytest
import torch

from utils.data.geometry import (
    PAD_COLOR,
    fitted_size,
    pixels_in_box,
    resize_image,
    resize_mask,
    restore,
    to_bytes,
    unframe,
)


@pytest.mark.parametrize(
    ("height", "width", "size", "mode", "expected"),
    [
        (720, 1280, 1024, "stretch", (1024, 1024)),
        (720, 1280, 1024, "pad", (576, 1024)),
        (1280, 720, 1024, "pad", (1024, 576)),
        (360, 480, 256, "pad", (192, 256)),
        (600, 600, 32, "pad", (32, 32)),
        (5, 16, 32, "pad", (10, 32)),
        (333, 1000, 64, "pad", (21, 64)),  # 21.312 goes down
        (227, 640, 64, "pad", (23, 64)),  # 22.7 goes up
        (25, 32, 16, "pad", (13, 16)),  # 12.5 goes up, as SAM rounds (Python's round would give 12)
        (1, 5000, 64, "pad", (1, 64)),  # never nothing
        (720, 1280, "576x1024", "stretch", (576, 1024)),
        (720, 1280, "576x1024", "pad", (576, 1024)),  # nothing to pad
        (1280, 720, "576x1024", "pad", (576, 324)),  # upright: as high as the frame
        (720, 1280, "1024x576", "pad", (324, 576)),
        (1080, 1080, "576x1024", "pad", (576, 576)),
        (300, 1000, "576x1024", "pad", (307, 1024)),  # wider than the frame: as wide as it
        (7, 3, "32x48", "pad", (32, 14)),  # 13.7 goes up
        (5000, 1, "32x48", "pad", (32, 1)),
        (1, 5000, (32, 48), "pad", (1, 48)),
    ],
)
def test_fitted_size(height, width, size, mode, expected):
    assert fitted_size(height, width, size, mode) == expected


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="resize_mode must be one of"):
        fitted_size(4, 4, 16, "crop")


def test_shrinking_averages_and_growing_interpolates():
    columns = np.array([0, 100, 200, 40], dtype=np.uint8)
    image = np.broadcast_to(columns[None, :, None], (4, 4, 3)).copy()
    assert resize_image(image, 2, "stretch")[0, :, 0].tolist() == [50, 120]
    assert resize_image(image, 1, "stretch")[0, :, 0].tolist() == [85]  # all four; bilinear would see two of them
    # Twice as wide: values sit at pixel centres, so new pixels lie a quarter of the way between old ones.
    assert resize_image(image, 8, "stretch")[0, :, 0].tolist() == [0, 25, 75, 125, 175, 160, 80, 40]


def test_channels_keep_their_order():
    image = np.zeros((6, 9, 3), dtype=np.uint8)
    image[:] = (10, 20, 30)
    assert resize_image(image, 16, "stretch").reshape(-1, 3).tolist() == [[10, 20, 30]] * 256


def test_padding_is_at_the_bottom_and_right_and_vanishes_in_the_model():
    wide, tall = np.full((8, 16, 3), 200, np.uint8), np.full((16, 8, 3), 200, np.uint8)
    frame = resize_image(wide, 32, "pad")
    assert (frame[:16] == 200).all() and (frame[16:] == PAD_COLOR).all()
    frame = resize_image(tall, 32, "pad")
    assert (frame[:, :16] == 200).all() and (frame[:, 16:] == PAD_COLOR).all()
    # SAM's own padding is 0 after its normalisation; ours is within half a grey level of that.
    normalised = (np.array(PAD_COLOR) - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
    assert np.abs(normalised).max() < 0.5 / 57


@pytest.mark.parametrize(("shape", "size"), [((8, 16), "32x48"), ((16, 8), "32x48"), ((8, 16), "48x32")])
def test_a_frame_that_is_no_square_is_padded(shape, size):
    rows, columns = (int(side) for side in size.split("x"))
    height, width = fitted_size(shape[0], shape[1], size, "pad")
    assert (height, width) == {((8, 16), "32x48"): (24, 48), ((16, 8), "32x48"): (32, 16)}.get((shape, size), (16, 32))
    frame = resize_image(np.full((*shape, 3), 200, np.uint8), size, "pad")
    labels = resize_mask(np.full(shape, 13, np.uint8), size, "pad")
    assert frame.shape == (rows, columns, 3) and labels.shape == (rows, columns)
    inside = (np.arange(rows) < height)[:, None] & (np.arange(columns) < width)
    assert (frame[inside] == 200).all() and (frame[~inside] == PAD_COLOR).all()
    assert (labels[inside] == 13).all() and (labels[~inside] == 255).all()


def test_a_frame_that_is_no_square_is_filled():
    ramp = np.broadcast_to(np.arange(6, dtype=np.uint8), (4, 6))
    assert resize_mask(ramp.copy(), "2x3", "stretch").tolist() == [[1, 3, 5]] * 2
    assert resize_mask(ramp.T.copy(), "3x2", "stretch").tolist() == [[1, 1], [3, 3], [5, 5]]
    image = np.broadcast_to(np.array([0, 100, 200, 40], np.uint8)[None, :, None], (4, 4, 3)).copy()
    assert resize_image(image, "1x2", "stretch")[..., 0].tolist() == [[50, 120]]
    assert resize_image(image, "2x1", "stretch")[..., 0].tolist() == [[85], [85]]


def test_mask_padding_is_not_labelled():
    frame = resize_mask(np.full((8, 16), 13, np.uint8), 32, "pad")
    assert (frame[:16] == 13).all() and (frame[16:] == 255).all()


def test_mask_takes_the_pixel_at_the_centre():
    columns = np.broadcast_to(np.arange(6, dtype=np.uint8), (6, 6)).copy()
    # The centres of thirds of six pixels are pixels 1 and 4; OpenCV's INTER_NEAREST would take 0 and 3.
    assert resize_mask(columns, 2, "stretch").tolist() == [[1, 4], [1, 4]]
    assert resize_mask(columns.T, 2, "stretch").tolist() == [[1, 1], [4, 4]]


@pytest.mark.parametrize("mode", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(54, 96), (96, 54), (40, 30)])
def test_mask_and_image_are_sampled_at_the_same_places(mode, shape):
    """A ramp resized as an image and as a mask differs by half an original pixel at the most, and not on average."""
    ramp = np.broadcast_to(np.arange(shape[1], dtype=np.uint8), shape).copy()
    height, width = fitted_size(shape[0], shape[1], 64, mode)
    labels = resize_mask(ramp, 64, mode)[:height, :width].astype(float)
    exact = cv2.resize(ramp.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    inner = slice(2, -2)  # at the border bilinear sampling has nothing to go on beyond the last pixel
    difference = (labels - exact)[:, inner]
    assert np.abs(difference).max() <= 0.5 + 1e-5
    assert abs(difference.mean()) < 0.02


def test_mask_gets_no_new_labels():
    mask = np.random.default_rng(0).choice(np.array([0, 7, 18, 255], np.uint8), (45, 80))
    for mode in ("stretch", "pad"):
        assert set(np.unique(resize_mask(mask, 64, mode))) == {0, 7, 18, 255}


def test_restore_by_hand():
    logits = torch.tensor([[0.0, 8.0], [0.0, 8.0]])
    # Half-pixel centres: twice the size puts a quarter of the neighbour into each inner pixel.
    assert restore(logits, 4, 4, "stretch").tolist() == [[0, 2, 6, 8]] * 4


def test_restore_crops_before_it_resizes():
    logits = torch.zeros(4, 4)
    logits[2:] = 1000.0  # the padding under a picture twice as wide as high
    assert restore(logits, 8, 16, "pad").abs().max() == 0
    assert restore(logits.T, 16, 8, "pad").abs().max() == 0
    assert restore(logits, 8, 16, "stretch").abs().max() == 1000


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0, 3)])
def test_restore_keeps_leading_dimensions_and_dtype(leading):
    logits = torch.randn(*leading, 16, 16, dtype=torch.float64)
    restored = restore(logits, 9, 12, "pad")
    assert restored.shape == (*leading, 9, 12) and restored.dtype == torch.float64
    if leading == (2, 3):  # each plane by itself
        assert torch.equal(restored[1, 2], restore(logits[1, 2], 9, 12, "pad"))


def test_restore_passes_gradients():
    logits = torch.zeros(2, 16, 16, requires_grad=True)
    restore(logits, 9, 12, "pad").sum().backward()
    assert logits.grad is not None and logits.grad[:, :12].sum() == pytest.approx(2 * 9 * 12)
    assert (logits.grad[:, 12:] == 0).all()


def test_restore_from_a_frame_that_is_no_square():
    columns = torch.arange(8.0).expand(1, 4, 8)  # a picture of 9 x 12 padded into 4 x 8 takes 4 x 5 of it
    assert restore(columns, 4, 8, "stretch").equal(columns)
    assert restore(columns, 4, 5, "pad").equal(columns[..., :5])
    assert restore(columns, 9, 12, "pad").max() == 4


@pytest.mark.parametrize("size", [192, "192x256", "256x192"])
@pytest.mark.parametrize("mode", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(30, 40), (48, 32)])
def test_there_and_back(mode, shape, size):
    """A mask brought into a finer frame and back as logits is the same mask: no shift, no mirrored axes."""
    mask = np.zeros(shape, np.uint8)
    mask[: shape[0] // 2, 10:] = 1
    mask[shape[0] // 2 + 3 :, : shape[1] // 3] = 2
    in_frame = resize_mask(mask, size, mode)
    frame = torch.from_numpy(in_frame).long()
    black = np.zeros((*in_frame.shape, 3), np.uint8)
    assert np.array_equal(unframe(black, in_frame, shape[0], shape[1], mode)[1], mask)
    logits = torch.stack([(frame == label).float() for label in range(3)])
    assert torch.equal(restore(logits, shape[0], shape[1], mode).argmax(0), torch.from_numpy(mask).long())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_an_image_to_show_has_no_value_that_is_none(dtype):
    stored = np.array([0, 0.5, 1, 1.5, -1, np.nan, np.inf, -np.inf], dtype)
    assert to_bytes(stored).tolist() == [0, 128, 255, 255, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_unframe_crops_the_padding_and_comes_back_to_the_size(dtype):
    # 2 x 4 in a frame of 4: the upper half is the picture, blue on the left and red on the right.
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2, 2] = image[:2, 2:, 0] = 200
    image[2:] = 77
    mask = np.full((4, 4), 255, np.uint8)
    mask[:2, :2], mask[:2, 2:] = 3, 5
    stored = image if dtype == "uint8" else image.astype(np.float32) / 255
    picture, labels = unframe(stored, mask, 2, 4, "pad")
    assert picture.dtype == labels.dtype == np.uint8
    assert picture.tolist() == image[:2].tolist()
    assert labels.tolist() == [[3, 3, 5, 5]] * 2
    picture, labels = unframe(stored, mask, 20, 40, "pad")
    assert picture.shape == (20, 40, 3) and 77 not in picture
    assert labels[:, :20].tolist() == [[3] * 20] * 20


@pytest.mark.parametrize(
    ("height", "width", "mode"), [(64, 64, "stretch"), (45, 80, "stretch"), (45, 80, "pad"), (300, 200, "pad")]
)
@pytest.mark.parametrize("size", [64, "64x96"])
def test_a_box_holds_the_pixels_whose_centres_lie_in_it(height, width, mode, size):
    fitted = fitted_size(height, width, size, mode)
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = np.sort(rng.integers(0, fitted[1], 2))
        y = np.sort(rng.integers(0, fitted[0], 2))
        rows, columns = pixels_in_box((x[0], y[0], x[1], y[1]), (height, width), fitted)
        for part, (first, last), side, fitted_side in ((rows, y, height, fitted[0]), (columns, x, width, fitted[1])):
            centres = (np.arange(side) + 0.5) * fitted_side / side  # in the frame, whose pixel n reaches to n + 1
            held = np.flatnonzero((centres >= first) & (centres < last + 1))
            assert np.arange(side)[part].tolist() == held.tolist() or (not held.size and part.stop == part.start + 1)


def test_a_box_in_the_frame_holds_its_corners():
    assert pixels_in_box((3, 5, 3, 9), (64, 64), (64, 64)) == (slice(5, 10), slice(3, 4))
    assert pixels_in_box((63, 0, 63, 63), (64, 64), (64, 64)) == (slice(0, 64), slice(63, 64))
    # Between pixels, as a detector's boxes lie: the pixels that it covers by half or more.
    assert pixels_in_box((2.4, 2.6, 7.4, 7.6), (64, 64), (64, 64)) == (slice(3, 9), slice(2, 8))
    # Ten times smaller than the frame: a line between two centres still holds one pixel.
    assert pixels_in_box((6, 6, 7, 7), (6, 6), (64, 64)) == (slice(1, 2), slice(1, 2))
