"""safetensors: the checkpoint itself, in a format that other programs read and that no pickle is in."""

from __future__ import annotations

from pathlib import Path

from utils.export.trained import Options, Trained
from utils.model.checkpoint import ModelInfo, save_safetensors
from utils.runtime.errors import UserError


def outputs(output: Path, info: ModelInfo) -> list[Path]:
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: is no name of a safetensors file; give --output {output.name}.safetensors")
    return [output]


def write(trained: Trained, paths: list[Path], options: Options) -> list[str]:
    """Write the decoder; returns notes for the user."""
    assert trained.state is not None, "not loaded from a file"
    save_safetensors(paths[0], trained.state)
    return ["it holds the decoder alone; give it as --model_checkpoint, with the SAM file it was trained on"]
