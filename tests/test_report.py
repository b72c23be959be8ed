"""The report: the same text printed and written, and what it was measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from utils.prediction import MapRule
from utils.report import write_report


@pytest.mark.parametrize(
    ("box_source", "map_rule", "eval_size", "says"),
    [
        ("oracle", "argmax", "frame",
         ["oracle boxes: every class box was taken from the ground truth", "S x S frame",
          "map rule: argmax: a pixel goes to the highest logit among the classes whose box holds it"]),
        ("oracle", "threshold", "frame", ["map rule: threshold: a pixel goes to the highest logit above 0, inside or"]),
        ("none", "argmax", "original",
         ["no boxes: every map was made from the image alone", "at the original size", "map rule: each pixel goes to"]),
        ("det.json", "box_threshold", "frame", ["boxes: det.json", "map rule: box_threshold: the same, but only"]),
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
        tmp_path, matrix, model="m.pth", data="val", box_source=box_source, eval_size=eval_size, map_rule=map_rule
    )
    text = (tmp_path / "evaluation_results.txt").read_text()
    assert text in capsys.readouterr().out
    assert all(sentence in text for sentence in says) and "整体 mIoU: 0.7500" in text
    results = json.loads((tmp_path / "evaluation_results.json").read_text())
    assert (results["model"], results["data"], results["miou"]) == ("m.pth", "val", 0.75)
    assert (results["boxes"], results["map_rule"], results["eval_size"]) == (box_source, map_rule, eval_size)
    assert (tmp_path / "confusion_matrix.png").stat().st_size > 0
