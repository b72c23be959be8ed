"""utils.data.detections: Scalabel's JSON, hand-made, as BDD100K and detectors write it, and what is wrong with it."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.data.classes import BDD100K, ClassTable, SemanticClass
from utils.data.datasets import detected_prompts
from utils.data.detections import Detections, read_detections
from utils.runtime.errors import UserError


def label(category: Any = "car", x1: Any = 10, y1: Any = 20, x2: Any = 30, y2: Any = 40, **fields: Any) -> dict:
    return {"category": category, "box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2}, **fields}


def frame(*labels: Any, name: str = "a.jpg") -> dict:
    return {"name": name, "labels": list(labels)}


LANE = {"category": "lane", "poly2d": [{"vertices": [[0, 0], [9, 9]], "types": "LL", "closed": False}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "det_val.json"


def read(path: Path, content: Any) -> Detections:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_detections(path, BDD100K)


def error(path: Path, content: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, content)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_file_worked_by_hand(path: Path) -> None:
    frames = [
        {
            "name": "b1c66a42-6f7d68ca.jpg",
            "attributes": {"weather": "clear"},
            "timestamp": 10000,
            "labels": [
                label("car", 45.24, 254.53, 357.8, 487.9, id="0", attributes={"occluded": True}, score=0.9),
                label("traffic light", 7, 8, 7, 8, id="1"),  # inclusive: one pixel
                label("car", -1.5, 0, 1280, 719.5, id="2"),
            ],
        },
        frame(label("pedestrian"), name="val/c.d.png"),
        {"name": "null.jpg", "labels": None},
        {"name": "missing.jpg"},
        frame(name="empty.jpg"),
        frame(name="my.drive_000000"),  # frames of a video, whose name has a dot
        frame(name="my.drive_000001"),
    ]
    detections = read(path, frames)
    assert list(detections.boxes) == [
        *("b1c66a42-6f7d68ca", "c.d", "null", "missing", "empty"),
        *("my.drive_000000", "my.drive_000001"),
    ]
    assert detections.left_out == {}
    class_ids, boxes = detections.boxes["b1c66a42-6f7d68ca"]
    assert class_ids.tolist() == [13, 6, 13]
    assert boxes.tolist() == [[45.24, 254.53, 357.8, 487.9], [7, 8, 7, 8], [-1.5, 0, 1280, 719.5]]
    assert detections.boxes["c.d"][0].tolist() == [11]
    for class_ids, boxes in detections.boxes.values():
        assert class_ids.dtype == np.int64 and boxes.dtype == np.float64
        assert boxes.shape == (len(class_ids), 4)
    assert [len(detections.boxes[name][0]) for name in ("null", "missing", "empty")] == [0, 0, 0]


def test_dict_with_frames_is_the_same(path: Path) -> None:
    frames = [frame(label("bus"), label("Trailer"))]
    plain = read(path, frames)
    wrapped = read(path, {"frames": frames, "groups": None, "config": None})
    assert wrapped.left_out == plain.left_out == {"trailer": 1}
    assert [a.tolist() for a in wrapped.boxes["a"]] == [a.tolist() for a in plain.boxes["a"]]


def test_every_name_of_a_class(path: Path) -> None:
    det_20 = [
        "pedestrian",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
        "traffic light",
        "traffic sign",
    ]
    first_release = [
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motor",
        "bike",
        "traffic light",
        "traffic sign",
    ]
    expected = [11, 12, 13, 14, 15, 16, 17, 18, 6, 7]
    for names in (det_20, first_release):
        for spelt in (names, [name.upper() for name in names], [name.title() for name in names]):
            assert read(path, [frame(*map(label, spelt))]).boxes["a"][0].tolist() == expected
    assert read(path, [frame(*map(label, BDD100K.names))]).boxes["a"][0].tolist() == list(range(19))


def test_other_categories_are_left_out_and_counted(path: Path) -> None:
    # Nobody looks at the box of a label that is left out.
    detections = read(
        path,
        [
            frame(label("other vehicle"), label("car"), label("trailer", x1="?")),
            frame(label("Other Vehicle"), label("other person"), LANE, name="b.jpg"),
        ],
    )
    assert detections.left_out == {"other person": 1, "other vehicle": 2, "trailer": 1}
    assert detections.boxes["a"][0].tolist() == [13]
    assert detections.boxes["b"][1].shape == (0, 4)


def test_no_known_category_names_unknown_and_known(path: Path) -> None:
    message = error(path, [frame(label("other vehicle"), label("Vehicle")), frame(name="b.jpg")])
    assert "'other vehicle', 'vehicle';" in message
    for name in ("pedestrian", "motor", "bike", *BDD100K.names):
        assert name in message
    message = error(path, [frame(*(label(f"thing {i:02}") for i in range(13)))])
    assert "'thing 09' and 3 more;" in message and "thing 10" not in message


def test_labels_without_a_box_are_skipped(path: Path) -> None:
    polygon = {**LANE, "category": "drivable area", "box2d": None}
    detections = read(path, [frame(LANE, label(), polygon, {"category": "car"}, {"category": None})])
    assert detections.boxes["a"][0].tolist() == [13]
    assert detections.left_out == {}
    assert "no label has a box2d" in error(path, [frame(LANE, polygon)])


def test_nothing_found_anywhere_is_no_error(path: Path) -> None:
    assert set(read(path, [frame(), {"name": "b.jpg", "labels": None}]).boxes) == {"a", "b"}


@pytest.mark.parametrize("value", [None, "7", True, [1], "NaN", "Infinity", "-Infinity", "1e400", "9" * 400, -1e6])
@pytest.mark.parametrize("key", ["x1", "y2"])
def test_box_of_anything_but_finite_numbers(path: Path, key: str, value: Any) -> None:
    text = json.dumps([frame(label("bus"), label("car", **{key: "@"}), name="val/a.jpg")])
    bare = isinstance(value, str) and value != "7"  # as JSON of its own; Python's reader takes NaN and Infinity too
    message = error(path, text.replace('"@"', value if bare else json.dumps(value)))
    assert message.startswith("image 'val/a.jpg', label 1 (car): box2d ")
    assert "finite numbers" in message and len(message) < 300


@pytest.mark.parametrize("box", [[1, 2, 3, 4], "1 2 3 4", {}, {"x1": 1, "y1": 2, "x2": 3}, 5, False])
def test_box_of_another_structure(path: Path, box: Any) -> None:
    message = error(path, [frame({"category": "car", "box2d": box})])
    assert message.startswith("image 'a.jpg', label 0 (car): box2d ") and "finite numbers" in message


@pytest.mark.parametrize("corners", [{"x1": 30.1}, {"y2": 19}, {"x1": 5, "x2": -5}])
def test_empty_box(path: Path, corners: dict[str, float]) -> None:
    message = error(path, [frame(label(), label("Rider", **corners))])
    assert message.startswith("image 'a.jpg', label 1 (Rider): box2d ") and "has x1 > x2 or y1 > y2" in message


@pytest.mark.parametrize("second", ["a.jpg", "a.png", "val/a.jpg"])
def test_image_twice(path: Path, second: str) -> None:
    assert "image 'a' is in more than one frame" in error(path, [frame(label()), frame(name=second)])


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "name,x1,y1\n", "[" * 100_000])
def test_not_json(path: Path, text: str) -> None:
    assert error(path, text).startswith("not JSON (")


def test_number_of_thousands_of_digits(path: Path) -> None:
    error(path, "9" * 5000)  # Python from 3.10.7 on refuses to convert it; before, it is JSON, but no frames


@pytest.mark.parametrize(
    "content",
    [None, 3, "x", [], {}, {"frames": None}, {"frames": {}}, {"frames": []}, {"annotations": [], "images": []}],
)
def test_json_without_frames(path: Path, content: Any) -> None:
    assert error(path, json.dumps(content)).startswith("no list of frames")


# The last is the layout of BDD100K's one-file-per-image labels.
@pytest.mark.parametrize(
    "bad",
    [
        None,
        7,
        "a.jpg",
        [],
        {},
        {"labels": []},
        {"name": 5},
        {"name": ""},
        {"name": "/"},
        {"timestamp": 10000, "objects": [label()]},
    ],
)
def test_frame_without_a_name(path: Path, bad: Any) -> None:
    assert error(path, [frame(label()), bad]).startswith("frame 1 has no image name; ")


@pytest.mark.parametrize("labels", [{}, {"0": label()}, "car", 0, True])
def test_labels_that_are_no_list(path: Path, labels: Any) -> None:
    assert error(path, [{"name": "a.jpg", "labels": labels}]).startswith("image 'a.jpg': its labels are not a list")


@pytest.mark.parametrize("bad", [None, 3, "car", ["car", 1, 2, 3, 4]])
def test_label_that_is_no_object(path: Path, bad: Any) -> None:
    assert error(path, [frame(label(), bad)]).startswith("image 'a.jpg', label 1 is not an object")


@pytest.mark.parametrize("category", [None, 3, ["car"]])
def test_box_without_a_category(path: Path, category: Any) -> None:
    message = error(path, [frame(label(category))])
    assert message.startswith("image 'a.jpg', label 0 has a box2d but no category") and "traffic sign" in message


def test_file_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"det_val\.json: no such file"):
        read_detections(path, BDD100K)
    with pytest.raises(UserError, match="not a regular file"):
        read_detections(tmp_path, BDD100K)
    path.write_bytes(b"\xff\xd8\xff\xe0 a JPEG \x00\x9d")
    with pytest.raises(UserError, match="not JSON"):
        read_detections(path, BDD100K)


def test_byte_order_mark_is_no_harm(path: Path) -> None:
    path.write_text(json.dumps([frame(label())]), encoding="utf-8-sig")
    assert len(read_detections(path, BDD100K).boxes) == 1


def test_names_match_in_either_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    box = {"category": "car", "box2d": {"x1": 0, "y1": 0, "x2": 3, "y2": 3}}
    path = tmp_path / "det.json"
    for written, asked in ((composed, decomposed), (decomposed, composed)):
        path.write_text(json.dumps([{"name": f"{written}.jpg", "labels": [box]}]))
        found = detected_prompts(read_detections(path, BDD100K).boxes, asked, 8, 8, 8, "stretch")
        assert found["class_ids"].tolist() == [13]


def test_categories_are_names_and_aliases_of_the_table(path: Path) -> None:
    classes = ClassTable(
        (SemanticClass(0, "Lane Marking", (1, 2, 3), aliases=("Line",)), SemanticClass(1, "bike", (4, 5, 6)))
    )
    labels = [label(category=c) for c in ("lane marking", "LINE", "Bike", "car")]
    path.write_text(json.dumps([frame(*labels)]))
    detections = read_detections(path, classes)
    assert detections.boxes["a"][0].tolist() == [0, 0, 1]
    assert detections.left_out == {"car": 1}
    path.write_text(json.dumps([frame(label(category="car"))]))
    with pytest.raises(UserError, match=r"rename them to: Lane Marking, bike, Line$"):
        read_detections(path, classes)


def test_known_categories_of_bdd100k_are_listed_names_first(path: Path) -> None:
    path.write_text(json.dumps([frame(label(category="ufo"))]))
    with pytest.raises(UserError, match=r"motorcycle, bicycle, pedestrian, bike, motor$"):
        read_detections(path, BDD100K)
