"""Folders for transformers: SAM's tensors under its names; masks are compared where transformers is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from segment_anything import build_sam_vit_b
from segment_anything.build_sam import read_state_dict
from segment_anything.utils import foreign
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.inputs import IMAGE_SIZE
from tests.helpers.scripts import run_script
from utils.export import __main__ as export
from utils.export.hugging_face import FILES, to_hugging_face
from utils.export.trained import load_trained


@pytest.fixture(scope="module")
def best(sam_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.pth", sam_file, "box")


@pytest.fixture
def folder(best: Path, sam_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    source = ["--model_checkpoint", best, "--sam_checkpoint", sam_file, "--format", "hf"]
    run_script(export, *source, "--output", tmp_path / "hf")
    said = capsys.readouterr().out
    assert "note: only mask 0 was trained" in said and f"stretched to {IMAGE_SIZE}x{IMAGE_SIZE}" in said
    return tmp_path / "hf"


def test_the_tensors_are_the_models(folder: Path, best: Path, sam_file: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    state = read_state_dict(folder / "model.safetensors", "vit_tiny")  # its reader of Hugging Face's names
    expected = load_trained(best, sam_file).model.sam.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_every_name_of_vit_b_is_hugging_faces() -> None:
    with torch.device("meta"):
        state = build_sam_vit_b().state_dict()
    renamed = to_hugging_face(state)
    assert len(renamed) == len(state) + 1
    kept = {key for key in renamed if key in state}  # names that both have
    assert {key.split(".")[0] for key in kept} == {"mask_decoder", "prompt_encoder"}
    assert {foreign._from_hugging_face(key) for key in renamed} == set(state)
    assert renamed["mask_decoder.output_hypernetworks_mlps.3.proj_out.weight"].shape == (32, 256)
    assert renamed["vision_encoder.layers.11.layer_norm2.weight"].shape == (768,)


def test_sizes_are_the_models(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    vision, prompts, decoder = (config[f"{part}_config"] for part in ("vision", "prompt_encoder", "mask_decoder"))
    assert (vision["hidden_size"], vision["num_hidden_layers"], vision["num_attention_heads"]) == (192, 8, 6)
    assert vision["global_attn_indexes"] == [1, 3, 5, 7] and vision["image_size"] == prompts["image_size"] == IMAGE_SIZE
    assert prompts["hidden_size"] == decoder["hidden_size"] == vision["output_channels"] == 128
    assert config["sam_bdd100k"]["epoch"] == "7"
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"longest_edge": IMAGE_SIZE} and processor["image_mean"] == [0.485, 0.456, 0.406]
    assert processor["pad_size"] == {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def test_what_does_not_fit(best: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    flags = ["--sam_checkpoint", sam_file, "--format", "hf", "--output", tmp_path / "hf", "--model_checkpoint"]
    semantic = write_checkpoint(tmp_path / "semantic.pth", sam_file, "semantic")
    assert "SamModel takes boxes; use --format onnx or torch" in error_of(export, *flags, semantic)
    wide = write_checkpoint(tmp_path / "wide.pth", sam_file, "box", "32x64")
    assert "SamModel takes square frames, not 32x64; use --format onnx" in error_of(export, *flags, wide)
    line = error_of(export, *flags, best, "--image_layout", "nhwc")
    assert "--image_layout: --format hf of a box model does not take it" in line
    assert not (tmp_path / "hf").exists()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("of value")
    line = error_of(export, *flags, best)
    assert f"{tmp_path / 'hf' / 'config.json'}: already exists; add --overwrite to replace it" in line
    assert (tmp_path / "hf" / "config.json").read_text() == "of value"


@pytest.mark.slow
def test_transformers_gives_the_same_masks(folder: Path, best: Path, sam_file: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    theirs = transformers.SamModel.from_pretrained(folder).eval()
    processor = transformers.SamProcessor.from_pretrained(folder)
    picture = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    boxes = torch.tensor([[3.0, 4, 40, 50], [0, 0, 63, 63]])
    inputs = processor(picture, input_boxes=[boxes.tolist()], return_tensors="pt")
    model = load_trained(best, sam_file).model
    with torch.no_grad():
        found = theirs(**inputs, multimask_output=False)
        masks, scores = model(model.inputs(torch.from_numpy(picture).permute(2, 0, 1)[None]), boxes[None])
    torch.testing.assert_close(found.pred_masks[:, :, 0], masks, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.iou_scores[:, :, 0], scores, rtol=1e-3, atol=1e-3)
