"""Programs of PyTorch: the checkpoint's maps, for any number of pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.inputs import IMAGE_SIZE
from tests.helpers.scripts import run_script
from utils.data.classes import BDD100K
from utils.data.frame import ImageSize, frame_size
from utils.export import __main__ as export
from utils.export import torch_program
from utils.export.trained import load_trained
from utils.model.prediction import predict
from utils.runtime.device import Precision

pytestmark = pytest.mark.slow


def random_pictures(count: int, image_size: ImageSize) -> torch.Tensor:
    """Blocks of random colour: N x H x W x 3 uint8."""
    height, width = frame_size(image_size)
    blocks = np.random.default_rng(count).integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
    return torch.from_numpy(blocks.repeat(8, axis=1).repeat(8, axis=2))


@pytest.mark.parametrize(
    ("image_size", "flags"),
    [(IMAGE_SIZE, ["--logits"]), ("32x64", ["--image_layout", "nhwc", "--image_dtype", "float32"])],
)
def test_class_maps_of_any_batch(image_size: ImageSize, flags: list[str], sam_file: Path, tmp_path: Path) -> None:
    best, path = write_checkpoint(tmp_path / "best.pth", sam_file, "semantic", image_size), tmp_path / "model.pt2"
    source = ["--model_checkpoint", best, "--sam_checkpoint", sam_file, "--format", "torch"]
    run_script(export, *source, "--output", path, *flags)
    about = {torch_program.METADATA: ""}
    program = torch.export.load(path, extra_files=about).module()
    metadata = json.loads(about[torch_program.METADATA])
    assert metadata["image_size"] == str(image_size) and json.loads(metadata["class_names"]) == list(BDD100K.names)
    model = load_trained(best, sam_file).model
    for count in (1, 3, 8):
        pictures = random_pictures(count, image_size)
        batch = pictures.float() / 255 if "float32" in flags else pictures.permute(0, 3, 1, 2)
        with torch.no_grad():
            class_maps, *logits = program(batch)
        predictions = predict(model, {"image": pictures}, Precision(torch.device("cpu")))
        expected = torch.stack([prediction.label_map(image_size) for prediction in predictions])
        assert class_maps.dtype == torch.uint8 and len(expected.unique()) > 3
        assert (class_maps != expected).float().mean() <= 1e-4
        for x in logits:
            assert x.shape == (count, 19, *frame_size(image_size)) and torch.equal(x.argmax(dim=1), class_maps.long())
        assert len(logits) == ("--logits" in flags)


def test_what_does_not_fit(sam_file: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    flags = ["--sam_checkpoint", sam_file, "--format", "torch", "--model_checkpoint"]
    box, semantic = (write_checkpoint(tmp_path / f"{mode}.pth", sam_file, mode) for mode in ("box", "semantic"))
    line = error_of(export, *flags, box, "--output", tmp_path / "m.pt2")
    assert "--format torch: exports semantic models; use --format onnx or hf for a box model" in line
    line = error_of(export, *flags, semantic, "--output", tmp_path / "m.pth")
    assert f"{tmp_path / 'm.pth'}: is no name of a PyTorch program; give --output m.pth.pt2" in line
    line = error_of(export, *flags, semantic, "--output", tmp_path / "m.pt2", "--precision", "float16")
    assert "--precision: --format torch of a semantic model does not take it; leave it out" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box.pth", "semantic.pth"]
