"""Exported models have the classes of their checkpoint, in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import infer_bdd100k
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.inputs import IMAGE_SIZE, write_split
from tests.helpers.scripts import good_flags, read_results, run_script
from utils.api import load_run
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
        SemanticClass(1, "小汽车", (0, 0, 142), aliases=("car",)),
        SemanticClass(2, "other", (96, 96, 96)),
    ),
    selected_from=("lane", "小汽车", "tree", "sky"),
)
FOUR = ClassTable((*THREE.classes[:2], SemanticClass(2, "tree", (0, 99, 0)), SemanticClass(3, "sky", (0, 0, 255))))
CPU = torch.device("cpu")
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors", "hf": ""}
Exported = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def exported(sam_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A function that exports a model of THREE, once in each form, and returns its checkpoint and the file."""

    folder = tmp_path_factory.mktemp("exported")
    checkpoints = {
        mode: write_checkpoint(folder / f"{mode}.pth", sam_file, mode, classes=THREE) for mode in ("box", "semantic")
    }

    @cache
    def exported(mode: str, kind: str, *flags: str) -> tuple[Path, Path]:
        best, path = checkpoints[mode], folder / f"{'_'.join([mode, *flags])}{SUFFIXES[kind]}"
        source = ["--model_checkpoint", best, "--sam_checkpoint", sam_file, "--format", kind]
        assert not run_script(export, *source, "--output", path, *flags)
        return best, path.with_suffix(".decoder.onnx") if (mode, kind) == ("box", "onnx") else path

    return exported


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with the classes FOUR, of which THREE selects two."""
    rng = np.random.default_rng(5)
    labels = rng.choice([0, 1, 2, 3, 255], (3, 4, 4)).astype(np.uint8).repeat(16, 1).repeat(16, 2)
    folder = tmp_path_factory.mktemp("four")
    write_split(
        folder / "val", {name: (image, each) for name, image, each in zip("abc", pictures().numpy(), labels)}, FOUR
    )
    return folder


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
def test_onnx(flags: list[str], exported: Exported, sam_file: Path) -> None:
    best, path = exported("semantic", "onnx", *flags)
    check_metadata({entry.key: entry.value for entry in onnx.load(path).metadata_props})
    model, _ = load_onnx(path, CPU, None)
    assert model.classes == THREE
    expected = maps_of(load_trained(best, sam_file).model)
    assert len(expected.unique()) > 1
    assert (maps_of(model) != expected).float().mean() <= 1e-4


@pytest.mark.parametrize("mode", ["box", "semantic"])
def test_files_need_no_table_of_their_own(
    mode: str, exported: Exported, data: Path, sam_file: Path, tmp_path: Path
) -> None:
    """Scored on data of which they select some classes, and called in a notebook, as their checkpoint."""
    onnx_flags = ["--logits"] if mode == "semantic" else []
    best, onnx_path = exported(mode, "onnx", *onnx_flags)
    run_script(infer_bdd100k, *good_flags(sam_file, data, tmp_path), "--model_checkpoint", best)
    expected = read_results(tmp_path / "out")
    picture = pictures()[0].numpy()
    boxes: dict[str, Any] = {"boxes": {"car": [[3, 5, 40, 50]], "lane": [[20, 9, 60, 63]]}} if mode == "box" else {}
    ours = load_run(best, sam_file, device="cpu").segment(picture, **boxes).label_map
    assert expected["miou"] > 0 and len(np.unique(ours)) > 1
    for path in (onnx_path, exported(mode, "safetensors")[1]):
        sam = sam_file if path.suffix == ".safetensors" else None
        flags = ["--val_npy_path", data / "val", "--model_type", "vit_tiny", "--output_dir", tmp_path / path.suffix]
        flags += ["--sam_checkpoint", sam] if sam else []
        assert not run_script(infer_bdd100k, *flags, "--model_checkpoint", path, "--device", "cpu")
        found = read_results(tmp_path / path.suffix)
        assert [c["name"] for c in found["per_class"]] == list(THREE.names)
        assert found["miou"] == pytest.approx(expected["miou"], abs=1e-4)
        model = load_run(path, sam, device="cpu")
        assert model.classes == THREE and (model.segment(picture, **boxes).label_map == ours).mean() > 0.999


def test_pictures_need_logits(exported: Exported) -> None:
    with pytest.raises(UserError, match="pictures need logits; export the model again with --logits"):
        load_run(exported("semantic", "onnx")[1], device="cpu")


@pytest.mark.parametrize(
    ("key", "value"), [("classes", "[]"), ("classes", "[" * 100_000), ("class_names", '["lane", "小汽车"]')]
)
def test_a_bad_table_is_one_line(key: str, value: str, exported: Exported, tmp_path: Path) -> None:
    model: Any = onnx.load(exported("semantic", "onnx")[1])
    next(entry for entry in model.metadata_props if entry.key == key).value = value
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UserError, match="class"):
        load_onnx(tmp_path / "m.onnx", CPU, None)


def test_torch_program(exported: Exported, sam_file: Path) -> None:
    best, path = exported("semantic", "torch")
    about = {torch_program.METADATA: ""}
    program = torch.export.load(path, extra_files=about).module()
    check_metadata(json.loads(about[torch_program.METADATA]))
    expected = maps_of(load_trained(best, sam_file).model)
    assert (program(pictures().permute(0, 3, 1, 2))[0] != expected).float().mean() <= 1e-4


def test_safetensors(exported: Exported, sam_file: Path) -> None:
    best, path = exported("semantic", "safetensors")
    model = load_trained(path, sam_file).model
    assert model.classes == THREE
    assert torch.equal(maps_of(model), maps_of(load_trained(best, sam_file).model))


def test_hugging_face(exported: Exported) -> None:
    _, path = exported("box", "hf")
    check_metadata(json.loads((path / "config.json").read_text())["sam_bdd100k"])
