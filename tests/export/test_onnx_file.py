"""ONNX files of both modes: the checkpoint's maps in every form, the public package's masks, one line for bad files."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from PIL import Image

import infer_bdd100k
import utils
from benchmarks.public import public_sam
from segment_anything.build_sam import file_digest
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.inputs import IMAGE_SIZE, pictures, write_detections, write_split
from tests.helpers.oracles import public_tiny, relative_error
from tests.helpers.scripts import read_results, run_script
from utils.data.classes import BDD100K
from utils.data.frame import ImageSize, frame_size
from utils.export import __main__ as export
from utils.export import onnx_file
from utils.export.trained import load_trained
from utils.model.checkpoint import BEST
from utils.model.prediction import predict
from utils.model.segmenter import Segmenter
from utils.runtime.device import Precision

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "segment_onnx.py"
ON_CPU = Precision(torch.device("cpu"))


def make_run(
    folder: Path, sam_file: Path, prompt_mode: str, image_size: ImageSize = IMAGE_SIZE, resize_mode: str = "stretch"
) -> Path:
    """A run's folder with a best checkpoint."""
    folder.mkdir()
    write_checkpoint(folder / BEST, sam_file, prompt_mode, image_size, resize_mode)
    return folder


def exported(run: Path, sam_file: Path, output: Path, *flags: object) -> Path:
    source = ["--model_checkpoint", run, "--sam_checkpoint", sam_file]
    run_script(export, *source, "--format", "onnx", "--output", output, *flags)
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def semantic_run(folder: Path, sam_file: Path) -> Path:
    return make_run(folder / "semantic", sam_file, "semantic")


@pytest.fixture(scope="module")
def semantic(folder: Path, semantic_run: Path, sam_file: Path) -> Path:
    return exported(semantic_run, sam_file, folder / "semantic.onnx", "--logits")


@pytest.fixture(scope="module")
def box_run(folder: Path, sam_file: Path) -> Path:
    return make_run(folder / "box", sam_file, "box", resize_mode="pad")


@pytest.fixture(scope="module")
def box(folder: Path, box_run: Path, sam_file: Path) -> tuple[Path, Path]:
    exported(box_run, sam_file, folder / "box.onnx")
    return folder / "box.encoder.onnx", folder / "box.decoder.onnx"


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def random_pictures(count: int, image_size: ImageSize = IMAGE_SIZE) -> np.ndarray:
    """Blocks of random colour: N x H x W x 3 uint8."""
    height, width = frame_size(image_size)
    blocks = np.random.default_rng(count).integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def maps_of(model: Segmenter, images: np.ndarray) -> np.ndarray:
    predictions = predict(model, {"image": torch.from_numpy(images)}, ON_CPU)
    return np.stack([prediction.label_map(images.shape[1:3]).numpy() for prediction in predictions])


def test_class_maps_and_logits_of_any_batch(semantic: Path, semantic_run: Path, sam_file: Path) -> None:
    model = load_trained(semantic_run, sam_file).model
    session = session_of(semantic)
    for count in (1, 3, 8):
        images = random_pictures(count)
        class_map, logits = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
        expected = maps_of(model, images)
        assert class_map.dtype == np.uint8 and len(np.unique(expected)) > 3
        assert (class_map != expected).mean() <= 1e-4
        assert (logits.argmax(axis=1) == class_map).all()
        with torch.no_grad():
            masks = model(model.inputs(torch.from_numpy(images).permute(0, 3, 1, 2)))[0]
        assert logits.dtype == np.float32
        assert relative_error(logits, F.interpolate(masks, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")) < 1e-4


@pytest.fixture(scope="module")
def wide_run(folder: Path, sam_file: Path) -> Path:
    return make_run(folder / "wide", sam_file, "semantic", "32x64")


@pytest.fixture(scope="module")
def wide(folder: Path, wide_run: Path, sam_file: Path) -> Path:
    """A file without logits, for floats with the channels last."""
    return exported(wide_run, sam_file, folder / "wide.onnx", "--image_layout", "nhwc", "--image_dtype", "float32")


def test_a_frame_that_is_no_square_in_rows_and_floats(wide: Path, wide_run: Path, sam_file: Path) -> None:
    session = session_of(wide)
    assert [output.name for output in session.get_outputs()] == ["class_map"]
    images = random_pictures(3, "32x64")
    (class_map,) = session.run(None, {"images": images.astype(np.float32) / 255})
    assert (class_map != maps_of(load_trained(wide_run, sam_file).model, images)).mean() <= 1e-4


def test_what_a_file_says_about_itself(semantic: Path, sam_file: Path) -> None:
    about = session_of(semantic).get_modelmeta().custom_metadata_map
    assert json.loads(about.pop("class_names")) == list(BDD100K.names)
    assert json.loads(about.pop("class_colors")) == [list(c.color) for c in BDD100K.classes]
    assert about == {
        "format_version": "1",
        "model_type": "vit_tiny",
        "image_size": str(IMAGE_SIZE),
        "resize_mode": "stretch",
        "prompt_mode": "semantic",
        "image_layout": "nchw",
        "image_dtype": "uint8",
        "precision": "float32",
        "sam_sha256": file_digest(sam_file),
        "epoch": "7",
        "val_miou": "0.25",
        "version": utils.__version__,
    }
    content = semantic.read_bytes()
    assert b".py" not in content and b"pkg.torch" not in content  # PyTorch's notes have paths of this machine
    (opset,) = onnx.load(semantic).opset_import
    assert (opset.domain, opset.version) == ("", 18)


def test_half_precision(tmp_path: Path, semantic_run: Path, semantic: Path, sam_file: Path) -> None:
    half = exported(semantic_run, sam_file, tmp_path / "half.onnx", "--precision", "float16")
    kinds = {tensor.data_type for tensor in onnx.load(half).graph.initializer if len(tensor.dims) > 1}
    assert TensorProto.FLOAT16 in kinds
    assert half.stat().st_size < 0.6 * semantic.stat().st_size
    images = {"images": random_pictures(3).transpose(0, 3, 1, 2)}
    (ours,), (expected, _) = session_of(half).run(None, images), session_of(semantic).run(None, images)
    assert (ours != expected).mean() < 0.03


def test_weights_of_8_bits(tmp_path: Path, semantic_run: Path, semantic: Path, sam_file: Path) -> None:
    small = exported(semantic_run, sam_file, tmp_path / "int8.onnx", "--precision", "int8")
    nodes = [node.op_type for node in onnx.load(small).graph.node]
    assert nodes.count("MatMulInteger") == 4 * 8  # of the encoder's 8 blocks
    assert small.stat().st_size < 0.7 * semantic.stat().st_size
    images = {"images": random_pictures(3).transpose(0, 3, 1, 2)}
    (ours,), (expected, _) = session_of(small).run(None, images), session_of(semantic).run(None, images)
    assert 0 < (ours != expected).mean() < 0.2  # of a random decoder


# --- Boxes


def decode(session: Any, embedding: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """Masks, scores and small masks of Q boxes, xyxy in pixels of the frame."""
    inputs = {
        "image_embeddings": embedding,
        "point_coords": boxes.reshape(-1, 2, 2).astype(np.float32),
        "point_labels": np.tile(np.array([[2, 3]], np.float32), (len(boxes), 1)),
        "mask_input": np.zeros((1, 1, IMAGE_SIZE // 4, IMAGE_SIZE // 4), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array(size, np.float32),
    }
    return session.run(["masks", "iou_predictions", "low_res_masks"], inputs)


def test_boxes_give_the_public_predictors_masks(box: tuple[Path, Path], box_run: Path, sam_file: Path) -> None:
    """Pictures of other shapes than the frame, one box at a time and all together."""
    encoder, decoder = map(session_of, box)
    predictor = public_sam().SamPredictor(public_tiny(load_trained(box_run, sam_file).model.sam))
    for height, width in ((48, 90), (130, 70)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        predictor.set_image(image)
        scaled = predictor.transform.apply_image(image).astype(np.float32)
        (embedding,) = encoder.run(None, {"input_image": scaled})
        assert relative_error(embedding, predictor.get_image_embedding()) < 1e-5
        boxes = np.array([[3, 5, 40, 30], [10, 10, 60, 40], [0, 0, width - 1, height - 1]], np.float32)
        in_frame = predictor.transform.apply_boxes(boxes, (height, width))
        together = decode(decoder, embedding, in_frame, (height, width))
        for i, one in enumerate(boxes):
            expected = predictor.predict(box=one, multimask_output=False, return_logits=True)
            alone = decode(decoder, embedding, in_frame[i : i + 1], (height, width))
            for value, group, public in zip(alone, together, expected):
                assert relative_error(value[0], public) < 1e-4
                assert relative_error(group[i], public) < 1e-4


def test_infer_scores_boxes_as_the_checkpoint(
    box: tuple[Path, Path], box_run: Path, sam_file: Path, npy: Path, tmp_path: Path
) -> None:
    split = tmp_path / "val"
    shutil.copytree(npy / "val", split)
    manifest = split / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"stretch"', '"pad"'))
    names = [path.stem for path in sorted((split / "imgs").iterdir())]
    boxes = write_detections(tmp_path / "boxes.json", names)
    for flags in ([], ["--boxes", boxes], ["--save_predictions"]):
        theirs = score(split, tmp_path / "theirs", "--model_checkpoint", box_run, *on_sam(sam_file), *flags)
        ours = score(split, tmp_path / "ours", "--model_checkpoint", box[1], *flags)
        assert ours["miou"] == pytest.approx(theirs["miou"], abs=5e-5)


# --- infer_bdd100k.py


def on_sam(sam_file: Path) -> list[object]:
    return ["--sam_checkpoint", sam_file, "--model_type", "vit_tiny"]


def score(split: Path, output: Path, *flags: object) -> dict[str, Any]:
    run_script(infer_bdd100k, "--val_npy_path", split, "--num_workers", 0, "--output_dir", output, *flags)
    return read_results(output)


@pytest.mark.parametrize("flags", [[], ["--tta"], ["--save_predictions", "--visualize", "--batch_size", 3]])
def test_infer_scores_as_the_checkpoint(
    flags: list[object], semantic: Path, semantic_run: Path, sam_file: Path, npy: Path, tmp_path: Path
) -> None:
    theirs = score(npy / "val", tmp_path / "theirs", "--model_checkpoint", semantic_run, *on_sam(sam_file), *flags)
    ours = score(npy / "val", tmp_path / "ours", "--model_checkpoint", semantic, *flags)
    assert ours["miou"] == pytest.approx(theirs["miou"], abs=5e-5)
    for path in (tmp_path / "theirs").glob("predictions/*.png"):
        expected, actual = (np.asarray(Image.open(p)) for p in (path, tmp_path / "ours" / "predictions" / path.name))
        assert (expected != actual).mean() <= 1e-3


def test_infer_scores_a_file_without_logits_in_the_frame(
    wide: Path, wide_run: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    labels = np.random.default_rng(0).integers(0, 19, (3, 4, 8), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    images = random_pictures(3, "32x64")
    split = write_split(tmp_path / "val", {f"{i}": (images[i], labels[i]) for i in range(3)})
    theirs = score(split, tmp_path / "theirs", "--model_checkpoint", wide_run, *on_sam(sam_file))
    ours = score(split, tmp_path / "ours", "--model_checkpoint", wide, "--batch_size", 2)
    assert ours["miou"] == pytest.approx(theirs["miou"], abs=5e-5)
    (tmp_path / "p.jpg").touch()
    for flags in (["--tta"], ["--images", tmp_path], ["--save_predictions"], ["--visualize"]):
        assert "--logits" in error_of(infer_bdd100k, "--model_checkpoint", wide, "--val_npy_path", split, *flags)


def test_infer_segments_pictures(
    semantic: Path, semantic_run: Path, sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = pictures(tmp_path / "in")
    flags = ["--images", tmp_path / "in", "--save_predictions", "--batch_size", 3]
    run_script(infer_bdd100k, "--model_checkpoint", semantic, *flags, "--output_dir", tmp_path / "ours")
    theirs = ["--model_checkpoint", semantic_run, *on_sam(sam_file), "--output_dir", tmp_path / "theirs"]
    run_script(infer_bdd100k, *theirs, *flags)
    for name in sizes:
        ours, expected = (np.asarray(Image.open(tmp_path / w / f"predictions/{name}.png")) for w in ("ours", "theirs"))
        assert (ours != expected).mean() <= 1e-3


# --- Bad files


def edited(source: Path, target: Path, edit: Callable[[Any], object]) -> Path:
    model = onnx.load(source)
    edit(model)
    target.write_bytes(model.SerializeToString())
    return target


def set_metadata(key: str, value: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        (entry,) = (entry for entry in model.metadata_props if entry.key == key)
        entry.value = value

    return edit


def without_metadata(model: Any) -> None:
    del model.metadata_props[:]


def weights_elsewhere(location: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return edit


def huge_tensor(model: Any) -> None:
    shape = helper.make_tensor("huge_shape", TensorProto.INT64, [3], [100_000, 100_000, 100_000])
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("ConstantOfShape", ["huge_shape"], ["huge"]))


def huge_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 1_000_000


def endless_loop(model: Any) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", [""], [], body=body))


def foreign_operator(model: Any) -> None:
    model.opset_import.append(helper.make_opsetid("evil", 1))


def unknown_operator(model: Any) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


BAD_FILES: list[tuple[Callable[[Any], None], str]] = [
    (set_metadata("class_names", '["cat", "dog"]'), "has 2 classes"),
    (set_metadata("class_names", "[" * 100_000), "has 0 classes"),
    (set_metadata("image_size", "1024"), "was trained with image size 1024, not 64"),
    (set_metadata("image_size", "9" * 5000), "is not supported"),
    (set_metadata("prompt_mode", "text"), "prompt mode text"),
    (set_metadata("format_version", "2"), "format 2"),
    (set_metadata("image_layout", "chwn"), "chwn"),
    (without_metadata, "no metadata of this project"),
    (weights_elsewhere("../../../../etc/passwd"), "its weights are in ../../../../etc/passwd"),
    (weights_elsewhere("/etc/passwd"), "its weights are in /etc/passwd"),
    (weights_elsewhere("bad.onnx.data"), "its weights are missing"),
    (huge_tensor, "too large"),
    (huge_input, "error"),
    (endless_loop, "has a loop or a branch (Loop)"),
    (foreign_operator, "operators that are not ONNX's own"),
    (unknown_operator, "not a valid model"),
]


@pytest.mark.parametrize(("edit", "message"), BAD_FILES, ids=[message for _, message in BAD_FILES])
def test_a_bad_file_is_one_line(
    edit: Callable[[Any], None],
    message: str,
    semantic: Path,
    npy: Path,
    tmp_path: Path,
    error_of: Callable[..., str],
) -> None:
    bad = edited(semantic, tmp_path / "bad.onnx", edit)
    flags = ["--model_checkpoint", bad, "--val_npy_path", npy / "val", "--output_dir", tmp_path / "out"]
    line = error_of(infer_bdd100k, *flags)
    assert message in line and "bad.onnx" in line and len(line) < 700
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 1, 1000, 5_000_000, -1])
def test_a_truncated_file_is_one_line(
    keep: int, semantic: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    (tmp_path / "bad.onnx").write_bytes(semantic.read_bytes()[:keep])
    line = error_of(infer_bdd100k, "--model_checkpoint", tmp_path / "bad.onnx", "--val_npy_path", npy / "val")
    assert "bad.onnx" in line and "utils.export" in line


def test_other_files_and_flags(
    semantic: Path, box: tuple[Path, Path], npy: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    def error(model: Path, *flags: object) -> str:
        line = error_of(infer_bdd100k, "--model_checkpoint", model, "--val_npy_path", npy / "val", *flags)
        assert not (tmp_path / "out").exists()
        return line

    for flags in (
        ["--sam_checkpoint", sam_file],
        ["--use_amp"],
        ["--cache_embeddings", tmp_path / "cache"],
        ["--boxes", tmp_path / "boxes.json"],
        ["--model_type", "vit_b"],
    ):
        assert str(flags[0]) in error(semantic, *flags, "--output_dir", tmp_path / "out")
    assert "no such file" in error(tmp_path / "none.onnx")
    assert "resize mode pad" in error(box[0])
    (tmp_path / "alone.encoder.onnx").write_bytes(box[0].read_bytes())
    assert "alone.decoder.onnx: no such file" in error(tmp_path / "alone.encoder.onnx")
    (tmp_path / "renamed.onnx").write_bytes(box[0].read_bytes())
    assert "error" in error(tmp_path / "renamed.onnx")


# --- utils.export


def test_export_writes_all_or_nothing(
    semantic_run: Path, semantic: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    source = ["--sam_checkpoint", sam_file, "--format", "onnx", "--model_checkpoint"]

    def error(run: Path, output: Path, *flags: object) -> str:
        return error_of(export, *source, run, "--output", output, *flags)

    before = semantic.read_bytes()
    assert "already exists" in error(semantic_run, semantic)
    assert "no name of an ONNX file" in error(semantic_run, tmp_path / "model.pt")
    assert "another --output" in error(semantic_run, tmp_path / "a.encoder.onnx")
    assert "cannot be written" in error(semantic_run, tmp_path / "none" / "a.onnx")
    assert "--model_type vit_tiny" in error(semantic_run, tmp_path / "a.onnx", "--model_type", "vit_b")
    other = tmp_path / "other_sam.pth"
    state = torch.load(sam_file, weights_only=True)
    torch.save({key: value + 1 for key, value in state.items()}, other)
    assert "SHA-256" in error_of(
        export,
        "--model_checkpoint",
        semantic_run,
        "--sam_checkpoint",
        other,
        "--format",
        "onnx",
        "--output",
        tmp_path / "a.onnx",
    )
    assert semantic.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other_sam.pth"]


def test_weights_in_a_second_file(
    semantic_run: Path, semantic: Path, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    """As of models that a protobuf cannot hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "MAX_WEIGHTS", 1_000_000)
        large = exported(semantic_run, sam_file, tmp_path / "large.onnx", "--logits")
    assert large.stat().st_size < 2_000_000 < (tmp_path / "large.onnx.data").stat().st_size
    flags = ["--model_checkpoint", large, "--val_npy_path", npy / "val"]
    ours = score(npy / "val", tmp_path / "out", "--model_checkpoint", large)
    theirs = score(npy / "val", tmp_path / "out", "--model_checkpoint", semantic)
    assert ours["miou"] == theirs["miou"]
    os.truncate(tmp_path / "large.onnx.data", 1000)
    assert "large.onnx" in error_of(infer_bdd100k, *flags)
    (tmp_path / "large.onnx.data").unlink()
    assert "put large.onnx.data beside it" in error_of(infer_bdd100k, *flags)


# --- The example


def test_the_example_needs_three_packages() -> None:
    tree = ast.parse(EXAMPLE.read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"numpy", "PIL", "onnxruntime"}


def run_example(model: Path, picture: Path, output: Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLE, model, picture, output],
        capture_output=True,
        text=True,
        cwd=output.parent,
        env={**os.environ, "PYTHONPATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("mode", "height"), [("stretch", IMAGE_SIZE), ("pad", IMAGE_SIZE // 2)])
def test_the_example_draws_what_infer_segments(mode: str, height: int, semantic: Path, tmp_path: Path) -> None:
    """A picture of the frame's width, which is not resized: Pillow and OpenCV differ in that."""
    model = edited(semantic, tmp_path / "model.onnx", set_metadata("resize_mode", mode))
    Image.fromarray(random_pictures(1)[0, :height]).save(tmp_path / "in.png")
    shares = run_example(model, tmp_path / "in.png", tmp_path / "map.png")
    flags = ["--images", tmp_path / "in.png", "--save_predictions", "--output_dir", tmp_path / "out"]
    run_script(infer_bdd100k, "--model_checkpoint", model, *flags)
    expected = np.asarray(Image.open(tmp_path / "out" / "predictions" / "in.png"))
    drawn = Image.open(tmp_path / "map.png")
    assert (np.asarray(drawn) == expected).mean() > 0.999
    colors = np.array([c.color for c in BDD100K.classes], np.uint8)
    assert (np.asarray(drawn.convert("RGB")) == colors[np.asarray(drawn)]).all()
    assert shares.count("\n") == sum(np.bincount(np.asarray(drawn).ravel()) >= 0.001 * height * IMAGE_SIZE)
    Image.fromarray(random_pictures(1, "96x200")[0]).save(tmp_path / "other.png")
    run_example(model, tmp_path / "other.png", tmp_path / "other_map.png")
    assert Image.open(tmp_path / "other_map.png").size == (200, 96)
