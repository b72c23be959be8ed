"""Drawn scenes: reproducible, labelled exactly, with every class, in BDD100K's layout, and not told by colour alone."""

from __future__ import annotations

import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils import scenes
from utils.data.bdd100k import find_split
from utils.data.classes import BDD100K, IGNORE_LABEL
from utils.runtime.cli import run
from utils.runtime.errors import UserError
from utils.scenes import light
from utils.scenes.__main__ import main
from utils.scenes.painter import Painter
from utils.scenes.shapes import Pose

SIZE = (144, 256)


def draw(seed: int) -> scenes.Scene:
    return scenes.draw_scene(np.random.default_rng(seed), *SIZE)


@pytest.fixture(scope="module")
def drawn() -> list[scenes.Scene]:
    return [draw(seed) for seed in range(18)]


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_seed_same_scene_other_seed_another(drawn: list[scenes.Scene]) -> None:
    again = draw(0)
    for name in ("image", "mask", "instances"):
        np.testing.assert_array_equal(getattr(drawn[0], name), getattr(again, name))
        assert (getattr(drawn[0], name) != getattr(drawn[1], name)).any()


def test_shapes_dtypes_and_ids(drawn: list[scenes.Scene]) -> None:
    for scene in drawn:
        assert scene.image.shape == (*SIZE, 3) and scene.image.dtype == np.uint8
        assert scene.mask.shape == SIZE and scene.mask.dtype == np.uint8
        assert scene.instances.shape == SIZE and scene.instances.dtype == np.uint16
        assert set(np.unique(scene.mask)) <= {*range(len(BDD100K)), IGNORE_LABEL}


def test_every_instance_has_one_class_and_every_pixel_an_instance(drawn: list[scenes.Scene]) -> None:
    for scene in drawn:
        assert scene.instances.min() > 0
        for i in np.unique(scene.instances):
            assert len(np.unique(scene.mask[scene.instances == i])) == 1
        assert len(np.unique(scene.instances[scene.mask == 13])) > 1  # cars are told apart


def test_all_classes_and_unlabelled_pixels_occur(drawn: list[scenes.Scene]) -> None:
    pixels = np.bincount(np.concatenate([scene.mask.ravel() for scene in drawn]), minlength=256)
    assert (pixels[: len(BDD100K)] >= 20).all(), pixels[: len(BDD100K)]
    assert 0 < pixels[IGNORE_LABEL] < 0.1 * pixels.sum()


@pytest.mark.parametrize("corners", [[(10, 5), (80, 20), (40, 63)], [(-30, -9), (70.3, 8.6), (31.7, 500)]])
def test_a_polygon_covers_the_same_pixels_in_image_and_instances(corners: list[tuple[float, float]]) -> None:
    painter = Painter(np.random.default_rng(0), 64, 96)
    painter.begin("car")
    painter.fill_pixels(np.array([corners]), np.array([200, 100, 50]))
    painted = painter.pixels[..., 0] == 200
    assert 0 < painted.sum() < painted.size
    np.testing.assert_array_equal(painted, painter.instances == 1)


def test_a_box_shows_the_faces_that_look_at_the_camera() -> None:
    painter = Painter(np.random.default_rng(0), 64, 96)
    painter.begin("car")
    grey = np.full(3, 100.0)
    low, tall, box = (-1, 0, -1), (1, 9, 1), Pose(10, 20)
    assert painter.solid(box, low, tall, grey).keys() == {"back", "left"}
    assert painter.solid(Pose(-10, 20), low, (1, 0.5, 1), grey).keys() == {"back", "right", "top"}
    assert painter.solid(Pose(10, 20, np.pi), low, tall, grey).keys() == {"front", "right"}


def test_wires_are_seen_but_not_labelled() -> None:
    painter = Painter(np.random.default_rng(0), 64, 96)
    before = painter.pixels.copy()
    painter.draw_line(np.array([(-3.0, 1.5, 9.0), (3.0, 1.5, 9.0)]), np.full(3, 200.0))
    assert (painter.pixels[..., :3] != before[..., :3]).any() and not painter.instances.any()


def test_wet_ground_mirrors_what_stands_above_it() -> None:
    image = np.full((120, 160, 3), 60, np.float32)
    image[20:50, 60:100] = (250, 0, 0)  # above the horizon at 60, mirrored at 70-100
    wet = np.zeros((120, 160), bool)
    wet[60:, 40:] = True
    mirrored = light.mirror_in_the_road(np.random.default_rng(0), image, wet, horizon=60, rain=1.0)
    np.testing.assert_array_equal(mirrored[~wet], image[~wet])
    red = mirrored[60:, 40:, 0] - mirrored[60:, 40:, 1]
    assert red[15:35, 25:55].min() > 10 and red[50:].max() < red[15:35, 25:55].min()


def test_driving_blurs_the_edges_and_not_the_vanishing_point() -> None:
    stripes = np.zeros((120, 160, 3), np.float32)
    stripes[:, ::4] = stripes[:, 1::4] = 200
    blurred = light.driving_blur(stripes, (80.0, 60.0), 0.05)
    contrast = blurred[..., 0].reshape(120, 40, 4).std(axis=2)
    assert contrast[60, 19:21].min() > 60 and contrast[:, 0].max() < 40
    flat = np.full((120, 160, 3), 90, np.float32)
    np.testing.assert_allclose(light.driving_blur(flat, (30.0, 60.0), 0.05), flat, rtol=1e-5)


def test_rain_and_the_windscreen_add_light() -> None:
    drizzle, downpour = (light.rain_streaks(np.random.default_rng(0), 120, 160, rain) for rain in (0.2, 1.0))
    assert drizzle.min() == 0 and downpour.max() <= 1
    assert 0 < (drizzle > 0).mean() < (downpour > 0).mean() < 0.5
    image = np.full((120, 160, 3), 100, np.float32)
    reflected = light.windscreen(np.random.default_rng(0), image)
    assert reflected.shape == (120, 160, 1) and 0 <= reflected.min() < reflected.max() <= 20


def test_it_rains_at_day_dusk_and_night() -> None:
    lights = [light.random_light(np.random.default_rng(seed)) for seed in range(200)]
    for night in (True, False):
        rain = [one.rain > 0 for one in lights if one.night is night]
        assert 0.05 < np.mean(rain) < 0.4


def test_colour_alone_does_not_tell_the_class(drawn: list[scenes.Scene]) -> None:
    image = np.concatenate([scene.image[::2, ::2].reshape(-1, 3) for scene in drawn]).astype(np.float32)
    mask = np.concatenate([scene.mask[::2, ::2].ravel() for scene in drawn])
    per_class = [image[mask == c] for c in range(len(BDD100K))]
    assert min(float(pixels.std(axis=0).mean()) for pixels in per_class) > 15  # no class has one colour
    means = np.stack([pixels.mean(axis=0) for pixels in per_class])
    nearest = np.argmin(((image[:, None] - means) ** 2).sum(axis=-1), axis=1)
    ious = [((nearest == c) & (mask == c)).sum() / ((nearest == c) | (mask == c)).sum() for c in range(len(BDD100K))]
    assert np.mean(ious) < 0.25


def test_dataset_is_read_by_find_split_and_written_the_same_whatever_the_counts_or_workers(tmp_path: Path) -> None:
    scenes.write_dataset(tmp_path / "a", {"train": 3, "val": 1}, 5, 0, *SIZE)
    scenes.write_dataset(tmp_path / "b", {"train": 2}, 5, 2, *SIZE)
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert len(a) == 8 and len(b) == 4
    assert all(a[name] == content for name, content in b.items())
    assert len(set(a.values())) == len(a)  # train and val, and one index and the next, differ

    split = find_split(tmp_path / "a", "train")
    assert split.labelled and not split.images_without_mask and not split.masks_without_image
    assert [item.name for item in split.items] == ["train_000000", "train_000001", "train_000002"]
    item = split.items[0]
    mask = cv2.imread(str(item.mask), cv2.IMREAD_UNCHANGED)
    assert mask is not None and mask.shape == SIZE and mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {*range(len(BDD100K)), IGNORE_LABEL}


def test_written_files_hold_the_scene_in_rgb(tmp_path: Path) -> None:
    scenes.write_dataset(tmp_path, {"val": 1}, 0, 0, *SIZE)
    item = find_split(tmp_path, "val").items[0]
    seed = [0, zlib.crc32(b"val"), 0]
    scene = scenes.draw_scene(np.random.default_rng(seed), *SIZE)
    image = cv2.imread(str(item.image), cv2.IMREAD_COLOR)
    assert image is not None
    assert np.abs(image[..., ::-1].astype(int) - scene.image).mean() < 4  # JPEG is lossy
    np.testing.assert_array_equal(cv2.imread(str(item.mask), cv2.IMREAD_UNCHANGED), scene.mask)


def test_a_folder_of_another_data_set_is_refused(tmp_path: Path) -> None:
    scenes.write_dataset(tmp_path, {"val": 2}, 0, 0, *SIZE)
    scenes.write_dataset(tmp_path, {"val": 2}, 1, 0, *SIZE)  # the same names: replaced
    with pytest.raises(UserError, match=r"val_000001\.jpg"):
        scenes.write_dataset(tmp_path, {"val": 1}, 0, 0, *SIZE)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--train", "0", "--val", "0"], 1, "nothing to draw"),
        (["--height", "10"], 1, "too small"),
        (["--output_dir", "{file}"], 1, "cannot write"),
        (["--train", "-1"], 2, "at least 0"),
        (["--seed", "x"], 2, "expected a number"),
    ],
)
def test_bad_input_is_told_in_one_line(
    flags: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    flags = [flag.format(file=tmp_path / "file") for flag in flags]
    monkeypatch.setattr("sys.argv", ["scenes", "--output_dir", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as exit_info:
        run(main)
    error = capsys.readouterr().err
    assert exit_info.value.code == status
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
