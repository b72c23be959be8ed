"""utils.compare: two results of infer_bdd100k.py side by side, from files made by hand."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.inputs import write_split
from utils import compare
from utils.data.classes import BDD100K, ClassTable, SemanticClass
from utils.data.datasets import NpyFolder
from utils.evaluate.comparison import choose_changed
from utils.evaluate.gallery import LABEL_MAPS, ScoredImage, encode_labels, save_label_maps
from utils.evaluate.metrics import results_dict
from utils.evaluate.page import Row
from utils.evaluate.plots import HATCH
from utils.runtime.text import display_width


def write(folder: Path, results: Mapping[str, Any]) -> Path:
    folder.mkdir()
    (folder / "evaluation_results.json").write_text(json.dumps({"boxes": "oracle", **results}))
    return folder


def result(folder: Path, miou: float, classes: list[tuple[str, float | None, int]]) -> Path:
    """Write `evaluation_results.json` with (name, IoU, ground-truth pixels) of each class."""
    per_class = [{"id": i, "name": name, "iou": iou, "gt_pixels": n} for i, (name, iou, n) in enumerate(classes)]
    return write(folder, {"miou": miou, "per_class": per_class})


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def run(*folders: Path) -> None:
    compare.main(compare.get_args_parser().parse_args([str(folder) for folder in folders]))


def test_a_line_for_each_class_of_the_ground_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = result(tmp_path / "before", 0.375, [("road", 0.5, 1000), ("wall", None, 0), ("traffic sign", 0.25, 7)])
    after = result(tmp_path / "after", 0.5, [("road", 0.75, 1000), ("wall", None, 0), ("traffic sign", 0.25, 7)])
    run(before, after)
    assert words(capsys.readouterr().out) == [
        ["IoU", "gt", "pixels", "before", "after"],
        ["0.", "road", "1000", "0.5000", "0.7500"],
        ["2.", "traffic", "sign", "7", "0.2500", "0.2500"],
        ["mIoU", "0.3750", "0.5000"],
        ["boxes:", "oracle"],
    ]


def test_test_time_augmentation_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = result(tmp_path / "plain", 0.5, [("road", 0.5, 1000)])
    read = json.loads((plain / "evaluation_results.json").read_text())
    run(write(tmp_path / "same", {**read, "tta": False}), plain)
    assert "tta" not in capsys.readouterr().out
    run(plain, write(tmp_path / "mirrored", {**read, "tta": True}))
    assert capsys.readouterr().out.endswith("\ntta: no, yes\n")


def test_any_number_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (result(tmp_path / name, 0.5, [("road", 0.5, 1000)]) for name in ("a", "b"))
    (tmp_path / "x").mkdir()
    copied = json.loads((one / "evaluation_results.json").read_text())
    semantic = write(tmp_path / "x" / "a", {**copied, "boxes": "none"})
    run(one, two, semantic)
    printed = words(capsys.readouterr().out)
    assert printed[0][3:] == [f"{tmp_path.name}/a", f"{tmp_path.name}/b", "x/a"]  # two are named "a"
    assert printed[2:] == [["mIoU", "0.5000", "0.5000", "0.5000"], ["boxes:", "oracle,", "oracle,", "none"]]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        ("demo/before demo/after", "before after"),
        ("work_dir/box/eval-val work_dir/semantic/eval-val", "box/eval-val semantic/eval-val"),
        ("/w/a/eval-val /v/a/eval-val b", "w/a/eval-val v/a/eval-val b"),
        ("a x/a", "a x/a"),
        ("/a a", "/a a"),
        (". a", ". a"),
    ],
)
def test_names_are_as_long_as_they_must_be(folders: str, names: str) -> None:
    assert compare.short_names([Path(folder) for folder in folders.split()]) == names.split()


def test_results_of_different_map_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A result that an earlier version wrote does not name its rule: a threshold where it had boxes."""
    former = result(tmp_path / "former", 0.25, [("road", 0.25, 1000)])
    results = json.loads((former / "evaluation_results.json").read_text())
    now = write(tmp_path / "now", {**results, "map_rule": "argmax"})
    semantic = write(tmp_path / "semantic", {**results, "boxes": "none"})
    run(former, now, semantic)
    assert words(capsys.readouterr().out)[-1] == ["map", "rule:", "threshold,", "argmax,", "argmax"]


def test_what_the_metric_gives_where_nothing_is_labelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = results_dict(torch.zeros(len(BDD100K), len(BDD100K) + 1, dtype=torch.int64), BDD100K)
    folders = [write(tmp_path / name, nothing) for name in ("before", "after")]
    run(*folders)
    assert words(capsys.readouterr().out)[1:] == [["mIoU", "nan", "nan"], ["boxes:", "oracle"]]


def with_images(folder: Path, mious: list[float | None], **changes: Any) -> Path:
    """Write a result of all 19 classes with these images, of which only the road is labelled."""
    matrix = torch.zeros(len(BDD100K), len(BDD100K) + 1, dtype=torch.int64)
    matrix[0, 0] = 1000
    images = [
        {"name": f"image-{i}", "miou": miou, "pixel_accuracy": miou, "iou": {} if miou is None else {"road": miou}}
        for i, miou in enumerate(mious)
    ]
    return write(folder, {**results_dict(matrix, BDD100K), "data": "nowhere", "images": images, **changes})


def test_a_page_with_the_changes_of_each_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [with_images(Path(name), mious) for name, mious in (("a", [0.5, 0.25, None]), ("b", [0.25, 0.75, None]))]
    compare.main(compare.get_args_parser().parse_args([*map(str, folders), "--html"]))
    printed = capsys.readouterr().out
    assert "Page: comparison.html (no pictures: nowhere: no such folder; check the path" in printed
    page = Path("comparison.html").read_text()
    assert "no pictures: nowhere: no such folder" in page
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    rows = json.loads(content)["rows"]
    assert [(row["name"], row["values"]) for row in rows] == [
        ("image-0", [-0.25]),
        ("image-1", [0.5]),
        ("image-2", [None]),
    ]
    assert [row["classes"] for row in rows] == [{"0": [-0.25]}, {"0": [0.5]}, {}]


def test_the_images_that_changed_most_are_chosen() -> None:
    changes = [0.0, 0.1, -0.5, 0.2, None, 0.3]
    poles: dict[int, list[float | None]] = {0: [0.9], 1: [-0.1], 3: [None]}
    rows = [Row(f"{i}", [change], {5: poles[i]} if i in poles else {}) for i, change in enumerate(changes)]
    assert choose_changed(rows, 3, BDD100K.names) == {
        2: "mIoU changed most",
        5: "mIoU changed most",
        0: "pole changed most",
    }
    assert set(choose_changed(rows, 40, BDD100K.names)) == {0, 1, 2, 3, 5}  # an image that did not change is not shown


def rename_road(folder: Path, name: str, **more: Any) -> None:
    path = folder / "evaluation_results.json"
    results = json.loads(path.read_text())
    results["per_class"][0]["name"] = name
    for image in results["images"]:
        image["iou"] = {name: image["iou"]["road"]}
    path.write_text(json.dumps({**results, **more}))


def test_a_page_has_the_names_and_colours_of_its_own_classes(tmp_path: Path) -> None:
    folders = [with_images(tmp_path / name, [0.5]) for name in ("a", "b")]
    target = tmp_path / "new" / "folder" / "page.html"
    name = "$x_{<b>$"  # matplotlib would parse it, and HTML too
    own = ClassTable((SemanticClass(0, name, (1, 2, 3)), *BDD100K.classes[1:]))
    for folder in folders:
        rename_road(folder, name, classes=own.to_plain())
    compare.main(compare.get_args_parser().parse_args([*map(str, folders), "--html", str(target)]))
    page = target.read_text()
    assert "$x_{&lt;b&gt;$</text>" in page and "x_{<b>" not in page and "road" not in page
    assert ".c0 { background: rgb(1, 2, 3); }" in page


def test_evaluations_of_other_classes_are_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    folders = [with_images(tmp_path / name, [0.5]) for name in ("a", "b")]
    rename_road(folders[1], "道路")
    line = error_of(compare, *folders)
    assert f"{folders[0]} has the classes road, sidewalk, building" in line
    assert f"{folders[1]} has the classes 道路, sidewalk, building" in line
    assert line.count("\n") == 0


@pytest.mark.parametrize("table", [3, {}, {"classes": []}, BDD100K.select(["car"], other=False).to_plain()])
def test_a_foreign_class_table(table: Any, tmp_path: Path, error_of: Callable[..., str]) -> None:
    folders = [with_images(tmp_path / name, [0.5], classes=table) for name in ("a", "b")]
    assert f"{folders[0]}/evaluation_results.json: not a result of infer_bdd100k.py" in html_error(error_of, *folders)


def test_a_comparison_is_straight_with_wide_names() -> None:
    entries: list[compare.ClassResult] = [
        {"id": i, "name": name, "iou": 0.5, "gt_pixels": 9}
        for i, name in enumerate(("road", "人行横道与非机动车混合车道"))
    ]
    lines = compare.format_comparison({"a": {"miou": 0.5, "boxes": "none", "per_class": entries}}).split("\n")
    assert len({display_width(line) for line in lines[:4]}) == 1


def test_pictures_that_the_evaluation_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.zeros((8, 8), np.uint8)
    data = write_split(tmp_path / "val", {"image-0": (np.zeros((8, 8, 3), np.uint8), labels)})
    folders = [with_images(tmp_path / name, [miou], data=str(data)) for name, miou in (("a", 0.5), ("b", 0.25))]
    compare.main(compare.get_args_parser().parse_args([*map(str, folders), "--html", str(tmp_path / "page.html")]))
    advice = "label_maps.zip: no such file; evaluate again, without --report_images 0"
    assert advice in capsys.readouterr().out and advice in (tmp_path / "page.html").read_text()


def html_error(error_of: Callable[..., str], *folders: Path) -> str:
    return error_of(compare, *folders, "--html", folders[0].parent / "page.html")


def test_pages_that_cannot_be_made(tmp_path: Path, error_of: Callable[..., str]) -> None:
    good = with_images(tmp_path / "good", [0.5])
    read = json.loads((good / "evaluation_results.json").read_text())
    assert f"--html {good}: is a folder; give the folders first" in error_of(compare, good, "--html", good)
    assert "give two folders or more" in html_error(error_of, good)
    former = write(tmp_path / "former", {name: read[name] for name in read if name != "images"})
    assert f"{former}: was evaluated by an older version" in html_error(error_of, good, former)
    other = with_images(tmp_path / "other", [0.5, 0.5])
    assert f"{good} and {other} have different images" in html_error(error_of, good, other)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "images",
    [3, [], [3], [{}], [{"name": 3, "miou": 0.5, "iou": {}}], [{"name": "a", "miou": "x", "iou": {}}]]
    + [[{"name": "a", "miou": 0.5, "iou": {"road": 7}}], [{"name": "a", "miou": 0.5, "iou": 3}]],
)
def test_images_of_a_foreign_file(images: Any, tmp_path: Path, error_of: Callable[..., str]) -> None:
    folders = [with_images(tmp_path / "good", [0.5]), with_images(tmp_path / "foreign", [], images=images)]
    assert "foreign/evaluation_results.json: not a result of infer_bdd100k.py" in html_error(error_of, *folders)


def test_other_data_is_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    before = result(tmp_path / "before", 0.5, [("road", 0.5, 1000)])
    after = result(tmp_path / "after", 0.5, [("road", 0.5, 1001)])
    line = error_of(compare, before, after)
    assert f"{before} and {after} were measured on different data; evaluate both on the same" in line


def test_other_sizes_are_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    before = result(tmp_path / "before", 0.5, [("road", 0.5, 1000)])
    read = json.loads((before / "evaluation_results.json").read_text())
    read["per_class"][0]["gt_pixels"] = 4000
    after = write(tmp_path / "after", {**read, "eval_size": "original"})
    line = error_of(compare, before, after)
    assert f"{before} has --eval_size frame and {after} original; evaluate both alike" in line


def test_a_folder_without_a_result(tmp_path: Path, error_of: Callable[..., str]) -> None:
    good = result(tmp_path / "good", 0.5, [("road", 0.5, 1000)])
    line = error_of(compare, good, tmp_path / "nowhere")
    assert "evaluation_results.json: no such file; give an --output_dir of infer_bdd100k.py" in line


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"3",
        b"[]",
        b'{"miou": 0.5, "boxes": "oracle"}',
        b'{"miou": 0.5, "boxes": "oracle", "per_class": 3}',
        b'{"miou": 0.5, "boxes": "oracle", "per_class": [{"iou": 0.5}]}',
        b'{"miou": 0.5, "boxes": "oracle", "per_class": [{"id": 0, "name": null, "iou": 0.5, "gt_pixels": 9}]}',
        b'{"miou": 0.5, "boxes": "oracle", "per_class": [{"id": 0, "name": "road", "iou": null, "gt_pixels": 9}]}',
        b'{"miou": 1' + b"0" * 400 + b', "boxes": "oracle", "per_class": []}',
    ],
)
def test_a_foreign_file(content: bytes, tmp_path: Path, error_of: Callable[..., str]) -> None:
    good = result(tmp_path / "good", 0.5, [("road", 0.5, 1000)])
    (tmp_path / "foreign").mkdir()
    path = tmp_path / "foreign" / "evaluation_results.json"
    path.write_bytes(content)
    line = error_of(compare, good, path.parent)
    assert re.fullmatch(rf"error: {path}: not (JSON \(.*\); give an --output_dir|a result) of infer_bdd100k\.py", line)


def test_pictures_have_the_classes_of_the_evaluations(tmp_path: Path) -> None:
    """The data have road as 0 and car as 13; the evaluated model has car as 0, and no road."""
    cars = BDD100K.select(["car", "sky"], other=False)
    labels = np.zeros((16, 16), np.uint8)
    labels[:, 8:] = 13
    data = write_split(tmp_path / "val", {"image-0": (np.zeros((16, 16, 3), np.uint8), labels)})
    matrix = torch.zeros(2, 3, dtype=torch.int64)
    matrix[0, 0] = 128
    for name, miou in (("a", 0.5), ("b", 0.25)):
        images = [{"name": "image-0", "miou": miou, "iou": {"car": miou}}]
        results = {**results_dict(matrix, cars), "classes": cars.to_plain(), "data": str(data), "images": images}
        folder = write(tmp_path / name, results)
        prediction = encode_labels(np.zeros((16, 16), np.uint8), NpyFolder(data), 0)
        save_label_maps(folder / LABEL_MAPS, [ScoredImage(0, matrix.numpy(), prediction)])
    page = tmp_path / "page.html"
    compare.main(compare.get_args_parser().parse_args([str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(page)]))
    (truth,) = re.findall(r'data-layer="0" src="data:image/png;base64,([^"]*)"', page.read_text())
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(truth))).convert("RGB"))
    assert (shown[:, 8:] == (0, 0, 142)).all()  # car
    assert {tuple(color) for color in shown[:, :8].reshape(-1, 3).tolist()} == set(HATCH)
