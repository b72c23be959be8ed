"""Images of a report: which are chosen, what their layers mark, and the archive of predictions."""

from __future__ import annotations

import base64
import io
import math
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.helpers.inputs import write_split
from tests.helpers.tables import MANY, ONE
from utils.data.classes import BDD100K, ClassTable
from utils.data.datasets import NpyFolder
from utils.data.manifest import Manifest, ManifestItem
from utils.evaluate import gallery
from utils.evaluate.gallery import (
    ScoredImage,
    change_layer,
    choose_images,
    class_layer,
    decode_labels,
    encode_labels,
    error_layer,
    make_card,
    read_label_maps,
    read_shown,
    save_label_maps,
    shown_size,
)
from utils.evaluate.plots import HATCH, WRONG
from utils.runtime.errors import UserError

ROAD, POLE, SKY = 0, 5, 10


def counts_of(*wrong: dict[int, int]) -> np.ndarray:
    """Confusion matrices of images in which that many pixels of each class were taken for sky; 100 are right."""
    counts = np.zeros((len(wrong), len(BDD100K), len(BDD100K) + 1), np.int64)
    for matrix, pixels in zip(counts, wrong):
        for class_id, number in pixels.items():
            matrix[class_id, class_id] = 100
            matrix[class_id, SKY] = number
    return counts


def painted(address: str) -> np.ndarray:
    """The pixels of a picture in the page, (H, W, 4)."""
    kind, _, data = address.partition(";base64,")
    assert kind.startswith("data:image/")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def test_the_worst_images_those_worst_for_a_class_and_a_sample_are_chosen() -> None:
    count = 90
    mious = [0.5 + index / 1000 for index in range(count)]
    mious[40], mious[41] = 0.1, float("nan")
    wrong = [{ROAD: 1, POLE: 1} for _ in range(count)]
    wrong[70][POLE], wrong[60][ROAD] = 90, 80
    chosen = choose_images(mious, counts_of(*wrong), 9, BDD100K.names)
    assert list(chosen)[:3] == [40, 0, 1]  # a third
    assert {
        70: "most wrong pixels of pole",
        60: "most wrong pixels of road",
    }.items() <= chosen.items()
    assert len(chosen) == 9
    sample = [index for index, reason in chosen.items() if reason == "even sample"]
    assert len(sample) == 3 and sample[0] < 10 and sample[-1] == count - 1 and 30 < sample[1] < 60


def test_images_that_nobody_labelled_are_chosen_last() -> None:
    assert choose_images([math.nan, 0.5], counts_of({}, {ROAD: 0}), 1, BDD100K.names) == {1: "lowest mIoU"}
    mious, counts = [math.nan, math.nan, 0.5, math.nan], counts_of({}, {}, {ROAD: 0}, {})
    reasons = choose_images(mious, counts, 4, BDD100K.names)
    assert reasons.keys() == {0, 1, 2, 3}
    assert [index for index, reason in reasons.items() if reason == "lowest mIoU"] == [2]


@pytest.mark.parametrize("number", [0, 1, 2, 3, 7, 8, 100])
def test_as_many_images_as_asked_for(number: int) -> None:
    chosen = choose_images([0.5] * 8, counts_of(*[{ROAD: 1}] * 8), number, BDD100K.names)
    assert len(chosen) == min(8, number) and set(chosen) <= set(range(8))


def test_layers_mark_errors_changes_and_what_has_no_class() -> None:
    target = np.array([[ROAD, ROAD, ROAD, ROAD, 255, 255]], np.uint8).repeat(16, axis=0)
    before = np.array([[ROAD, SKY, ROAD, SKY, ROAD, ROAD]], np.uint8).repeat(16, axis=0)
    after = np.array([[ROAD, ROAD, SKY, 255, SKY, SKY]], np.uint8).repeat(16, axis=0)
    photo = np.zeros((16, 6, 3), np.uint8)
    card = make_card(
        0,
        "",
        photo,
        [class_layer(after, len(BDD100K)), error_layer(target, before), change_layer(target, before, after)],
        BDD100K,
    )
    classes, errors, changes = map(painted, card.layers)
    red, blue = [*WRONG, 255], [20, 120, 240, 255]
    assert np.array_equal(classes[0, :3], [[*BDD100K.palette[i], 255] for i in (ROAD, ROAD, SKY)])
    hatch = {tuple(color) for color in classes[:, 3, :3].tolist()}
    assert hatch == set(HATCH) and not hatch & {tuple(color) for color in BDD100K.palette[: len(BDD100K)].tolist()}
    assert (errors[:, [1, 3]] == red).all() and not errors[:, [0, 2], 3].any()
    assert (changes[:, 1] == blue).all() and (changes[:, 2] == red).all()
    assert not changes[:, [0, 3], 3].any()  # as it was: right, and wrong in another way
    for layer in (errors, changes):
        assert set(layer[:, 4, 3]) == {0, 255}  # hatched, and transparent between


def test_an_image_stays_within_its_bytes_whatever_is_in_it() -> None:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (405, 720, 3), dtype=np.uint8)
    noise = [class_layer(rng.integers(0, len(BDD100K), (405, 720), dtype=np.uint8), len(BDD100K)) for _ in range(2)]
    card = make_card(3, "why", photo, noise, BDD100K)
    assert (card.index, card.reason, card.width, card.height) == (3, "why", 720, 405)
    assert sum(map(len, (card.photo, *card.layers))) <= 10e6 / 60
    flat = make_card(0, "", np.full_like(photo, 9), [np.zeros((405, 720), np.uint8)], BDD100K)
    assert painted(flat.photo).shape == (405, 720, 4)  # a picture that fits is not made smaller


def test_pictures_have_the_originals_shape(tmp_path: Path) -> None:
    """A padded frame of 64 x 64 with a picture of 90 x 160 in its upper part."""
    image, labels = np.zeros((64, 64, 3), np.float32), np.full((64, 64), 255, np.uint8)
    image[:36], labels[:36] = 1, SKY
    folder = write_split(tmp_path / "val", {"a": (image, labels)})
    item = ManifestItem("a", 90, 160, np.bincount(labels[:36].ravel(), minlength=len(BDD100K)).tolist(), 28 * 64)
    Manifest(64, "float32", "pad", labelled=True, complete=True, items=[item]).write(folder)
    source = NpyFolder(folder)
    assert shown_size(source, 0) == (36, 64)
    photo, target = read_shown(source, 0)
    assert photo.shape == (36, 64, 3) and (photo == 255).all() and (target == SKY).all()
    assert (decode_labels(encode_labels(labels, source, 0)) == SKY).all()
    original = np.full((90, 160), POLE, np.uint8)  # scored at the original size
    assert (decode_labels(encode_labels(original, source, 0)) == POLE).all()
    assert (read_shown(source, 0, original)[1] == POLE).all()


def test_large_pictures_are_shown_smaller(tmp_path: Path) -> None:
    pixels = np.zeros((900, 1600), np.uint8)
    folder = write_split(tmp_path / "val", {"a": (np.zeros((900, 1600, 3), np.uint8), pixels)})
    assert shown_size(NpyFolder(folder), 0) == (405, 720)


def png_of(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def test_predictions_come_back_from_their_archive(tmp_path: Path) -> None:
    maps = [np.full((4, 6), value, np.uint8) for value in (0, 18, 255)]
    images = [ScoredImage(index, np.zeros(0), png_of(labels)) for index, labels in enumerate(maps)]
    save_label_maps(tmp_path / "maps.zip", images)
    found = read_label_maps(tmp_path / "maps.zip", [2, 0])
    assert found.keys() == {0, 2} and all(np.array_equal(found[index], maps[index]) for index in found)


def archive_of(path: Path, content: bytes, name: str = "000000.png", compression: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, content)
    return path


@pytest.mark.parametrize("case", ["missing", "cut", "not a zip", "no such image", "bomb", "huge", "color", "not a PNG"])
def test_damaged_or_hostile_archives_are_told_in_one_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "maps.zip"
    good = png_of(np.arange(24, dtype=np.uint8).reshape(4, 6))
    if case == "cut":
        archive_of(path, good[: len(good) // 2])
    elif case == "not a zip":
        path.write_bytes(good)
    elif case == "no such image":
        archive_of(path, good, name="../../000000.png")
    elif case == "bomb":
        archive_of(path, bytes(1 << 24), compression=zipfile.ZIP_DEFLATED)
    elif case == "huge":
        archive_of(path, png_of(np.zeros((8000, 8000), np.uint8)))
    elif case == "color":
        archive_of(path, png_of(np.zeros((4, 6, 3), np.uint8)))
    elif case == "not a PNG":
        archive_of(path, b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"maps\.zip: (damaged, or not of .*evaluate again|no such file)"):
        gallery.read_label_maps(path, [0])


@pytest.mark.parametrize("classes", [ONE, MANY], ids=len)
def test_layers_of_any_number_of_classes_have_five_colours_more(classes: ClassTable) -> None:
    labels = np.array([[0, len(classes) - 1, len(classes), 255]], np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    layers = [class_layer(labels, len(classes)), error_layer(labels, np.zeros_like(labels))]
    card = make_card(0, "", np.zeros((16, 64, 3), np.uint8), layers, classes)
    image = Image.open(io.BytesIO(base64.b64decode(card.layers[0].partition(",")[2])))
    assert image.mode == "P" and len(image.getpalette() or ()) == 3 * (len(classes) + 5)
    shown, errors = map(painted, card.layers)
    assert (shown[:, :16] == [*classes.classes[0].color, 255]).all()
    assert (shown[:, 16:32] == [*classes.classes[-1].color, 255]).all()
    assert {tuple(color) for color in shown[:, 32:, :3].reshape(-1, 3).tolist()} == set(HATCH)
    assert not errors[:, :16, 3].any() and (errors[:, 32:48] == [*WRONG, 255]).all()
