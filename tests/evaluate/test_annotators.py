"""utils.evaluate.annotators: what is written is read back, by pycocotools and by the formats' definitions."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tests.helpers.tables import table_of
from utils.data.classes import BDD100K
from utils.evaluate import annotators
from utils.evaluate.annotators import FILES, WRITERS, export_predictions, require_exportable
from utils.evaluate.plots import save_labels
from utils.runtime.choices import PREDICTION_FORMATS
from utils.runtime.errors import UserError

SMALL = np.array([[255, 0, 0, 13], [0, 0, 255, 255], [0, 255, 13, 13]], dtype=np.uint8)  # road and car
PATHS = ("drive/a.jpg", "drive/city & co/b<é>.png", "drive/none.jpg", "drive/all.jpg")


@pytest.fixture
def maps() -> dict[str, np.ndarray]:
    """Label maps by the name of their PNG: small, ragged with every class, without any class, and of one."""
    rng = np.random.default_rng(0)
    ragged = rng.choice([*range(19), 255], size=(37, 53)).astype(np.uint8)
    none, large = np.full((5, 4), 255, np.uint8), np.full((300, 400), 18, np.uint8)
    return {"a": SMALL, "b": ragged, "none": none, "all": large}


@pytest.fixture
def export(maps: dict[str, np.ndarray], tmp_path: Path) -> Callable[[str], str]:
    """A function that exports `maps` to `tmp_path` for a tool."""
    (tmp_path / "predictions").mkdir()
    for name, labels in maps.items():
        save_labels(tmp_path / "predictions" / f"{name}.png", labels)
    pictures = {name: tmp_path / path for name, path in zip(maps, PATHS)}
    return lambda tool: "\n".join(
        export_predictions(tool, tmp_path, tmp_path / "predictions", pictures, BDD100K, model='run "1" <&>')
    )


def masks_to_map(size: tuple[int, int], masks: Iterator[tuple[str, np.ndarray]]) -> np.ndarray:
    """Join the masks, which must not overlap or be empty, to a label map."""
    labels = np.full(size, 255, np.uint8)
    for name, mask in masks:
        assert mask.any() and (labels[mask] == 255).all()
        labels[mask] = BDD100K.names.index(name)
    return labels


def alternating(counts: list[int], size: tuple[int, int], order: str = "C") -> np.ndarray:
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size, order=order)  # type: ignore[call-overload]


def test_the_flag_has_every_tool() -> None:
    assert PREDICTION_FORMATS == ("png", *WRITERS) == ("png", *FILES)


def test_cvat_reads_back(export: Callable[[str], str], maps: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert str(tmp_path / "predictions_cvat.zip") in export("cvat")
    with zipfile.ZipFile(tmp_path / "predictions_cvat.zip") as archive:
        root = ElementTree.fromstring(archive.read("annotations.xml"))
        raw = json.loads(archive.read("labels.json"))
    labels = [(label.findtext("name"), label.findtext("color")) for label in root.iterfind("meta/task/labels/label")]
    assert labels == [(label["name"], label["color"]) for label in raw]
    assert labels[0] == ("road", "#804080") and [name for name, _ in labels] == list(BDD100K.names)
    assert root.findtext("version") == "1.1" and root.findtext("meta/task/name") == 'run "1" <&>'
    images = root.findall("image")
    assert [image.get("name") for image in images] == [path.removeprefix("drive/") for path in PATHS]
    assert [image.get("id") for image in images] == ["0", "1", "2", "3"]
    for image, expected in zip(images, maps.values()):
        size = int(image.get("height", 0)), int(image.get("width", 0))

        def masks(image: ElementTree.Element = image, size: tuple[int, int] = size) -> Iterator[tuple[str, np.ndarray]]:
            for mask in image.iterfind("mask"):
                left, top, width, height = (int(mask.get(key, "")) for key in ("left", "top", "width", "height"))
                whole = np.zeros(size, dtype=bool)
                counts = [int(count) for count in mask.get("rle", "").split(",")]
                whole[top : top + height, left : left + width] = alternating(counts, (height, width))
                yield mask.get("label", ""), whole

        assert np.array_equal(masks_to_map(size, masks()), expected)


def test_cvat_masks_are_cut_to_their_extent_and_begin_with_background(
    export: Callable[[str], str], tmp_path: Path
) -> None:
    export("cvat")
    with zipfile.ZipFile(tmp_path / "predictions_cvat.zip") as archive:
        image = ElementTree.fromstring(archive.read("annotations.xml")).find("image")
    assert image is not None
    place = {"source": "auto", "occluded": "0", "z_order": "0", "top": "0", "height": "3"}
    assert [mask.attrib for mask in image] == [
        # . # #      . #
        # # # .      . .
        # # . .      # #
        {"label": "road", "rle": "1, 4, 1, 1, 2", "left": "0", "width": "3", **place},
        {"label": "car", "rle": "1, 1, 2, 2", "left": "2", "width": "2", **place},
    ]


def decode_rle_pack(data: list[int]) -> np.ndarray:
    """Decode the format of the npm package rle-pack, as Label Studio does in the browser."""
    bits = "".join(f"{byte:08b}" for byte in data)
    at = 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        is_run = read(1)
        count = read(sizes[read(2)]) + 1
        values += [read(word)] * count if is_run else [read(word) for _ in range(count)]
    assert len(values) == total and at <= len(bits) < at + 8
    return np.array(values)


def test_label_studio_reads_back(export: Callable[[str], str], maps: dict[str, np.ndarray], tmp_path: Path) -> None:
    said = export("labelstudio")
    assert f"_DOCUMENT_ROOT={tmp_path} label-studio\n    add {tmp_path / 'drive'} as local storage" in said
    interface = ElementTree.fromstring((tmp_path / "predictions_labelstudio.xml").read_text())
    assert [label.get("value") for label in interface.iter("Label")] == list(BDD100K.names)
    image, brush = interface.find("Image"), interface.find("BrushLabels")
    assert image is not None and brush is not None
    tasks = json.loads((tmp_path / "predictions_labelstudio.json").read_text())
    addresses = ["a.jpg", "city%20%26%20co/b%3C%C3%A9%3E.png", "none.jpg", "all.jpg"]
    assert [task["data"] for task in tasks] == [{"image": f"/data/local-files/?d=drive/{path}"} for path in addresses]
    assert image.attrib["value"] == "$image"
    for task, expected in zip(tasks, maps.values()):
        (prediction,) = task["predictions"]
        assert prediction["model_version"] == 'run "1" <&>'
        regions = prediction["result"]
        assert len({region["id"] for region in regions}) == len(regions)
        found = []
        for region in regions:
            assert (region["original_height"], region["original_width"]) == expected.shape
            assert (region["from_name"], region["to_name"]) == (brush.get("name"), image.get("name"))
            assert region["type"] == "brushlabels" and region["value"]["format"] == "rle"
            (name,) = region["value"]["brushlabels"]
            rgba = decode_rle_pack(region["value"]["rle"]).reshape(*expected.shape, 4)
            assert (rgba == rgba[..., :1]).all() and set(np.unique(rgba)) <= {0, 255}
            found.append((name, rgba[..., 3] == 255))
        assert np.array_equal(masks_to_map(expected.shape, iter(found)), expected)


def test_label_studios_bits() -> None:
    """Checked with `decode_rle` of label-studio-sdk 2.1.2."""
    # 12 values | 8 bits each, runs of 4, 8, 12 or 16 bits | 4 zeros | 8 times 255 | filling
    bits = f"{12:032b}" + "00111" + "0011011110111111" + "1000011" + "00000000" + "1000111" + "11111111" + "00000"
    expected = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert annotators._label_studio_rle(np.array([False, True, True])).tolist() == expected
    for count in (1, 4, 5, 64, 65, 1024, 1025, 16384, 16385, 32768, 40000):  # around the ends of the four sizes
        for first in (False, True):
            pixels = np.repeat([first, not first, first], [count, 1, count])
            decoded = decode_rle_pack(annotators._label_studio_rle(pixels).tolist())
            assert np.array_equal(decoded, np.repeat(255 * pixels, 4))


def test_coco_reads_back(export: Callable[[str], str], maps: dict[str, np.ndarray], tmp_path: Path) -> None:
    export("coco")
    with zipfile.ZipFile(tmp_path / "predictions_coco.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "unpacked" / "annotations" / "instances_default.json"))
    names = {category["id"]: category["name"] for category in coco.dataset["categories"]}
    assert names == {i + 1: name for i, name in enumerate(BDD100K.names)}
    images = coco.dataset["images"]
    assert [image["file_name"] for image in images] == [path.removeprefix("drive/") for path in PATHS]
    assert [(image["height"], image["width"]) for image in images] == [labels.shape for labels in maps.values()]
    assert [annotation["id"] for annotation in coco.dataset["annotations"]] == [*range(1, 1 + 2 + 19 + 1)]
    for image, expected in zip(images, maps.values()):
        found = []
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            rle = coco.annToRLE(annotation)
            assert annotation["area"] == coco_mask.area(rle) and annotation["iscrowd"] == 0
            assert annotation["bbox"] == coco_mask.toBbox(rle).tolist()
            found.append((names[annotation["category_id"]], coco.annToMask(annotation).astype(bool)))
        assert np.array_equal(masks_to_map(expected.shape, iter(found)), expected)


def test_one_picture_lies_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drive").mkdir()
    monkeypatch.chdir(tmp_path / "drive")
    save_labels(tmp_path / "drive" / "a.png", SMALL)
    export_predictions("labelstudio", tmp_path, tmp_path / "drive", {"a": Path("a.jpg")}, BDD100K, model="")
    (task,) = json.loads((tmp_path / "predictions_labelstudio.json").read_text())
    assert task["data"]["image"] == "/data/local-files/?d=drive/a.jpg"


@pytest.mark.parametrize("tool", WRITERS)
def test_a_missing_prediction_leaves_no_new_file_and_the_old(tool: str, tmp_path: Path) -> None:
    save_labels(tmp_path / "a.png", SMALL)
    pictures = {name: tmp_path / f"{name}.jpg" for name in ("a", "b")}
    old = tmp_path / FILES[tool][0]
    old.write_text("old")
    with pytest.raises(UserError, match=r"b\.png: no such file"):
        export_predictions(tool, tmp_path, tmp_path, pictures, BDD100K, model="")
    assert old.read_text() == "old" and {path.name for path in tmp_path.iterdir()} == {"a.png", old.name}


@pytest.mark.parametrize("name", ["a\x07.jpg", "a\n.jpg", os.fsdecode(b"a\xff.jpg")])
def test_a_path_that_no_tool_takes(name: str, tmp_path: Path) -> None:
    require_exportable({"b": tmp_path / "街　景.jpg"})
    with pytest.raises(UserError, match="no control characters in a path; rename the picture"):
        require_exportable({"b": tmp_path / "b.jpg", "a": tmp_path / name})


@pytest.mark.parametrize("tool", WRITERS)
def test_other_classes_have_their_names_in_each_file(tool: str, tmp_path: Path) -> None:
    classes = table_of("道路", "<a&b>", *(f"class {i}" for i in range(148)))
    save_labels(tmp_path / "a.png", np.array([[0, 1, 149, 255]], dtype=np.uint8))
    export_predictions(tool, tmp_path, tmp_path, {"a": tmp_path / "a.jpg"}, classes, model="")
    if tool == "labelstudio":
        interface = ElementTree.fromstring((tmp_path / FILES[tool][1]).read_bytes())
        assert [label.get("value") for label in interface.iter("Label")] == list(classes.names)
        (task,) = json.loads((tmp_path / FILES[tool][0]).read_text())
        named = [region["value"]["brushlabels"][0] for region in task["predictions"][0]["result"]]
    else:
        with zipfile.ZipFile(tmp_path / FILES[tool][0]) as archive:
            if tool == "cvat":
                root = ElementTree.fromstring(archive.read("annotations.xml"))
                named = [mask.get("label") for mask in root.iter("mask")]
            else:
                content = json.loads(archive.read("annotations/instances_default.json"))
                names = {category["id"]: category["name"] for category in content["categories"]}
                named = [names[annotation["category_id"]] for annotation in content["annotations"]]
    assert named == ["道路", "<a&b>", "class 147"]
