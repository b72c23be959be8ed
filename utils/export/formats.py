"""The formats of `utils.export`, one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.export import hugging_face, onnx_file, safetensors_file, torch_program
from utils.export.trained import Options, Trained
from utils.model.checkpoint import ModelInfo


@dataclass(frozen=True)
class Format:
    """How a format is written."""

    # --output and the model's info -> the paths that will be written. Raises a UserError if the format does not fit.
    outputs: Callable[[Path, ModelInfo], list[Path]]
    # Writes them, each completely or not at all, and returns notes for the user.
    write: Callable[[Trained, list[Path], Options], list[str]]


FORMATS = {  # the keys are EXPORT_FORMATS
    "onnx": Format(onnx_file.outputs, onnx_file.write),
    "torch": Format(torch_program.outputs, torch_program.write),
    "safetensors": Format(safetensors_file.outputs, safetensors_file.write),
    "hf": Format(hugging_face.outputs, hugging_face.write),
}
