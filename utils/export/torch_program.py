"""PyTorch: a semantic model as one program from picture to class map, which runs without this project."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import torch

from utils.export.graph import semantic_graph
from utils.export.trained import Options, Trained
from utils.model.checkpoint import ModelInfo
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write

METADATA = "metadata.json"  # an extra file of the program


def outputs(output: Path, info: ModelInfo) -> list[Path]:
    if info.prompt_mode != "semantic":
        raise UserError("--format torch: exports semantic models; use --format onnx or hf for a box model")
    if output.suffix != ".pt2":
        raise UserError(f"{output}: is no name of a PyTorch program; give --output {output.name}.pt2")
    return [output]


def write(trained: Trained, paths: list[Path], options: Options) -> list[str]:
    """Write the program, for any number of pictures; returns notes for the user."""
    graph, example = semantic_graph(trained, options)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PyTorch's own code
        program = torch.export.export(graph, (example,), dynamic_shapes=({0: batch},))
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(trained.metadata(), indent=1)})
    with atomic_write(paths[0]) as file:
        file.write(buffer.getbuffer())
    return []
