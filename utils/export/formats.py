"""The formats of `utils.export`, one entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from utils.export import hugging_face, onnx_file, safetensors_file, torch_program
from utils.export.trained import Options, Trained
from utils.model.checkpoint import ModelInfo
from utils.runtime.errors import UserError


@dataclass(frozen=True)
class Format:
    """How a format is written."""

    # --output and the model's info -> the paths that will be written. Raises a UserError if the format does not fit.
    outputs: Callable[[Path, ModelInfo], list[Path]]
    # Writes them, each completely or not at all, and returns notes for the user.
    write: Callable[[Trained, list[Path], Options], list[str]]
    # The flags about the model's content that it takes, by prompt mode.
    flags: Mapping[str, frozenset[str]]


ABOUT_MAPS = frozenset({"image_layout", "image_dtype", "logits"})
PRECISION = frozenset({"precision"})

FORMATS = {  # the keys are EXPORT_FORMATS
    "onnx": Format(onnx_file.outputs, onnx_file.write, {"semantic": ABOUT_MAPS | PRECISION, "box": PRECISION}),
    "torch": Format(torch_program.outputs, torch_program.write, {"semantic": ABOUT_MAPS}),
    "safetensors": Format(safetensors_file.outputs, safetensors_file.write, {}),
    "hf": Format(hugging_face.outputs, hugging_face.write, {}),
}


def check_flags(name: str, info: ModelInfo, given: Set[str]) -> None:
    """Raise a `UserError` if a given flag has no effect on that format."""
    unused = given & (ABOUT_MAPS | PRECISION) - FORMATS[name].flags.get(info.prompt_mode, frozenset())
    for flag in sorted(unused):
        raise UserError(f"--{flag}: --format {name} of a {info.prompt_mode} model does not take it; leave it out")
