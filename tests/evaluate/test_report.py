"""The report: the same text printed and written, and what it was measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.tables import MANY, THREE
from utils.data.classes import BDD100K, ClassTable, read_class_table
from utils.evaluate.report import begin_pictures, begin_results, write_report
from utils.runtime.choices import MapRule
from utils.runtime.errors import UserError

RESULTS = ("evaluation_results.txt", "evaluation_results.json", "confusion_matrix.png")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_an_evaluation_wrote_goes_and_what_it_did_not_write_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin_results(tmp_path, {"visualizations": ["a"], "predictions": ["a", "b"]})
    assert capsys.readouterr().out == ""
    touch(*(tmp_path / name for name in RESULTS), tmp_path / "visualizations/a.png")
    touch(*(tmp_path / "predictions" / name for name in ("a.png", "b.png")))
    mine = [tmp_path / name for name in ("mine.txt", "visualizations/mine.png", "predictions/mine.png")]
    touch(*mine, tmp_path / "predictions/c.png")  # the last as by an older version
    begin_results(tmp_path, {"visualizations": [], "predictions": ["c"]})
    (tmp_path / ".pictures.json").unlink()
    assert files(tmp_path) == {str(path.relative_to(tmp_path)) for path in mine}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}: removed 7 files of an earlier evaluation"
    assert said[1] == f"{tmp_path}/visualizations: 1 other files stay, such as mine.png"
    assert len(said) == 3


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "3",
        '{"visualizations": 3}',
        '{"visualizations": [3, "../mine", "/mine", "", "a\\u0000"]}',
        '{"..": ["mine"], "": ["mine"], "/": ["mine"]}',
    ],
)
def test_a_damaged_or_hostile_record_removes_nothing_else(tmp_path: Path, record: str) -> None:
    touch(tmp_path / "mine.png", tmp_path / "visualizations/other.png")
    (tmp_path / ".pictures.json").write_text(record)
    begin_results(tmp_path, {})
    assert files(tmp_path) == {"mine.png", "visualizations/other.png"}


def test_a_result_that_cannot_be_removed(tmp_path: Path) -> None:
    touch(tmp_path / "evaluation_results.txt/a")
    with pytest.raises(UserError, match=r"evaluation_results\.txt: cannot be removed \(.*give another --output_dir"):
        begin_results(tmp_path, {})


def test_pictures_of_this_run_go_and_others_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin_pictures(tmp_path / "nowhere", ".jpg", lambda name: True)
    assert capsys.readouterr().out == ""
    touch(*(tmp_path / name for name in ("a.jpg", "a.png", "b.jpg", ".a.jpg")))
    begin_pictures(tmp_path, ".jpg", lambda name: name == "a")
    assert files(tmp_path) == {"a.png", "b.jpg", ".a.jpg"}
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: replacing 1 pictures of an earlier run",
        f"{tmp_path}: 2 other files stay, such as a.png",
    ]


@pytest.mark.parametrize(
    ("box_source", "map_rule", "eval_size", "says"),
    [
        (
            "oracle",
            "argmax",
            "frame",
            [
                "oracle boxes: taken from the ground truth",
                "in the preprocessed frame",
                "map rule: argmax: the highest logit among the classes whose box holds the pixel",
            ],
        ),
        ("oracle", "threshold", "frame", ["map rule: threshold: the highest logit above 0, inside or"]),
        (
            "none",
            "argmax",
            "original",
            [
                "no boxes: every map was predicted from the image alone",
                "at the original size",
                "map rule: each pixel goes to",
            ],
        ),
        ("det.json", "box_threshold", "frame", ["boxes: det.json", "map rule: box_threshold: the highest logit"]),
    ],
)
def test_says_what_was_measured_on_what(
    box_source: str,
    map_rule: MapRule,
    eval_size: str,
    says: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    matrix = torch.zeros(19, 20, dtype=torch.int64)
    matrix[0, 0], matrix[0, 13] = 3, 1
    write_report(
        tmp_path,
        {"a": matrix},
        classes=BDD100K,
        model="m.pth",
        data="val",
        box_source=box_source,
        eval_size=eval_size,
        map_rule=map_rule,
    )
    text = (tmp_path / "evaluation_results.txt").read_text()
    assert text in capsys.readouterr().out
    assert all(sentence in text for sentence in says) and "整体 mIoU: 0.7500" in text
    results = json.loads((tmp_path / "evaluation_results.json").read_text())
    assert (results["model"], results["data"], results["miou"]) == ("m.pth", "val", 0.75)
    assert (results["boxes"], results["map_rule"], results["eval_size"]) == (box_source, map_rule, eval_size)
    assert results["tta"] is False and "test-time augmentation" not in text
    assert (tmp_path / "confusion_matrix.png").stat().st_size > 0


@pytest.mark.parametrize("classes", [BDD100K, THREE, MANY], ids=len)
def test_results_name_their_own_classes(classes: ClassTable, tmp_path: Path) -> None:
    number = len(classes)
    matrix = torch.eye(number, number + 1, dtype=torch.int64)
    write_report(
        tmp_path,
        {"a": matrix},
        classes=classes,
        model="m.pth",
        data="val",
        box_source="none",
        eval_size="frame",
        map_rule="argmax",
    )
    results = json.loads((tmp_path / "evaluation_results.json").read_text())
    assert [entry["name"] for entry in results["per_class"]] == list(classes.names)
    assert results["images"][0]["iou"] == dict.fromkeys(classes.names, 1.0)
    if classes is BDD100K:
        assert "classes" not in results
    else:
        assert read_class_table(results["classes"]) == classes
    header = (tmp_path / "image_scores.csv").read_text().splitlines()[0]
    assert header == ",".join(["name", "miou", "pixel_accuracy", *classes.names])
    page = (tmp_path / "report.html").read_text()
    assert f"{classes.names[-1]} as {classes.names[-1]}: 1 pixels" in page and "no class: " not in page
