"""Exported models have the classes of their checkpoint, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.inputs import IMAGE_SIZE
from tests.helpers.scripts import run_script
from utils.data.classes import ClassTable, SemanticClass
from utils.export import __main__ as export
from utils.export import torch_program
from utils.export.trained import load_trained
from utils.model.onnx_model import load_onnx
from utils.model.prediction import predict
from utils.model.segmenter import Segmenter
from utils.runtime.device import Precision
from utils.runtime.errors import UserError

pytestmark = pytest.mark.slow

THREE = ClassTable(
    (
        SemanticClass(0, "lane", (10, 20, 30), "flat", ("line",)),
        SemanticClass(1, "Car", (0, 0, 142)),
        SemanticClass(2, "other", (96, 96, 96)),
    ),
    selected_from=("lane", "Car", "tree", "sky"),
)
CPU = torch.device("cpu")


def exported(tmp_path: Path, sam_file: Path, mode: str, kind: str, name: str, *flags: object) -> tuple[Path, Path]:
    best = write_checkpoint(tmp_path / "best.pth", sam_file, mode, classes=THREE)
    source = ["--model_checkpoint", best, "--sam_checkpoint", sam_file, "--format", kind]
    run_script(export, *source, "--output", tmp_path / name, *flags)
    return best, tmp_path / name


def pictures() -> torch.Tensor:
    blocks = np.random.default_rng(2).integers(0, 256, (3, IMAGE_SIZE // 8, IMAGE_SIZE // 8, 3), dtype=np.uint8)
    return torch.from_numpy(blocks.repeat(8, axis=1).repeat(8, axis=2))


def maps_of(model: Segmenter) -> torch.Tensor:
    predictions = predict(model, {"image": pictures()}, Precision(CPU))
    return torch.stack([prediction.label_map(IMAGE_SIZE) for prediction in predictions])


def check_metadata(metadata: dict[str, str]) -> None:
    assert json.loads(metadata["class_names"]) == list(THREE.names)
    assert json.loads(metadata["class_colors"]) == [list(c.color) for c in THREE]
    assert json.loads(metadata["classes"]) == THREE.to_plain()


@pytest.mark.parametrize("flags", [[], ["--logits"]])
def test_onnx(flags: list[object], tmp_path: Path, sam_file: Path) -> None:
    best, path = exported(tmp_path, sam_file, "semantic", "onnx", "m.onnx", *flags)
    check_metadata({entry.key: entry.value for entry in onnx.load(path).metadata_props})
    model, _ = load_onnx(path, CPU, None)
    assert model.classes == THREE
    expected = maps_of(load_trained(best, sam_file).model)
    assert len(expected.unique()) > 1
    assert (maps_of(model) != expected).float().mean() <= 1e-4


def test_boxes_of_onnx(tmp_path: Path, sam_file: Path) -> None:
    exported(tmp_path, sam_file, "box", "onnx", "m.onnx")
    assert load_onnx(tmp_path / "m.encoder.onnx", CPU, None)[0].classes == THREE


@pytest.mark.parametrize(
    ("key", "value"), [("classes", "[]"), ("classes", "[" * 100_000), ("class_names", '["lane", "Car"]')]
)
def test_a_bad_table_is_one_line(key: str, value: str, tmp_path: Path, sam_file: Path) -> None:
    _, path = exported(tmp_path, sam_file, "semantic", "onnx", "m.onnx")
    model: Any = onnx.load(path)
    next(entry for entry in model.metadata_props if entry.key == key).value = value
    onnx.save(model, path)
    with pytest.raises(UserError, match="class"):
        load_onnx(path, CPU, None)


def test_torch_program(tmp_path: Path, sam_file: Path) -> None:
    best, path = exported(tmp_path, sam_file, "semantic", "torch", "m.pt2")
    about = {torch_program.METADATA: ""}
    program = torch.export.load(path, extra_files=about).module()
    check_metadata(json.loads(about[torch_program.METADATA]))
    expected = maps_of(load_trained(best, sam_file).model)
    assert (program(pictures().permute(0, 3, 1, 2))[0] != expected).float().mean() <= 1e-4


def test_safetensors(tmp_path: Path, sam_file: Path) -> None:
    best, path = exported(tmp_path, sam_file, "semantic", "safetensors", "m.safetensors")
    model = load_trained(path, sam_file).model
    assert model.classes == THREE
    assert torch.equal(maps_of(model), maps_of(load_trained(best, sam_file).model))


def test_hugging_face(tmp_path: Path, sam_file: Path) -> None:
    _, path = exported(tmp_path, sam_file, "box", "hf", "m")
    check_metadata(json.loads((path / "config.json").read_text())["sam_bdd100k"])
