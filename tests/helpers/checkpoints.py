"""Checkpoints of random weights, as training would write them."""

from __future__ import annotations

from pathlib import Path

import torch

from segment_anything.build_sam import file_digest
from tests.helpers.inputs import IMAGE_SIZE
from utils.data.classes import BDD100K, ClassTable
from utils.data.frame import ImageSize
from utils.model.checkpoint import ModelInfo, save_best
from utils.model.segmenter import build_model


def write_checkpoint(
    path: Path,
    sam_file: Path,
    prompt_mode: str,
    image_size: ImageSize = IMAGE_SIZE,
    resize_mode: str = "stretch",
    classes: ClassTable = BDD100K,
) -> Path:
    """Write a best checkpoint of `vit_tiny` whose decoder tells classes apart somehow."""
    model = build_model("vit_tiny", sam_file, image_size=image_size, prompt_mode=prompt_mode, classes=classes)
    torch.manual_seed(4)
    for parameter in model.mask_decoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    info = ModelInfo("vit_tiny", image_size, resize_mode, file_digest(sam_file), prompt_mode)
    save_best(path, model, info, epoch=7, metrics={"val_miou": 0.25}, args={"lr": 1e-4, "resume": None})
    return path
