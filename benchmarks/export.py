"""onnxruntime against this project's PyTorch code: a picture to its class map, on the CPU.

    python -m benchmarks.export
    python -m benchmarks.export --model_type vit_tiny --image_size 64 --repeats 1    # under a minute

The semantic model has random weights. It is exported by `utils.export` in float32 and with int8 weights. Prints a line
for each, with the PyTorch time over onnxruntime's as `ratio`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from segment_anything import sam_model_registry
from utils.export import onnx_file
from utils.export.trained import Options, Trained
from utils.model.checkpoint import ModelInfo
from utils.model.onnx_model import load_session
from utils.model.prediction import predict
from utils.model.segmenter import SemanticSegmenter
from utils.runtime import cli
from utils.runtime.device import Precision


def get_args_parser() -> cli.Parser:
    return common.get_args_parser(__doc__)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    precision = Precision(torch.device("cpu"))
    model = SemanticSegmenter(sam_model_registry[args.model_type](image_size=args.image_size)).eval()
    info = ModelInfo(args.model_type, args.image_size, "stretch", "0" * 64, "semantic")
    picture = torch.randint(0, 256, (1, args.image_size, args.image_size, 3), dtype=torch.uint8)

    def pytorch() -> np.ndarray:
        (prediction,) = predict(model, {"image": picture}, precision)
        return prediction.label_map(info.image_size).numpy()

    def onnx_map(session: Any) -> np.ndarray:
        return session.run(["class_map"], {"images": pixels})[0][0]

    functions: dict[str, Callable[[], np.ndarray]] = {"PyTorch": pytorch}
    sizes = {}
    pixels = np.ascontiguousarray(picture.permute(0, 3, 1, 2).numpy())
    with tempfile.TemporaryDirectory() as folder:
        for name in ("float32", "int8"):
            path = Path(folder) / f"{name}.onnx"
            onnx_file.write(Trained(model, info, None, None), [path], Options("nchw", "uint8", False, name))
            session = load_session(path, precision.device)
            functions[name] = partial(onnx_map, session)
            sizes[name] = path.stat().st_size / 1e6
    maps = {name: function() for name, function in functions.items()}  # the first call takes memory
    seconds = common.measure(functions, args.repeats)
    for name, size in sizes.items():
        common.report(
            f"ONNX in {name}, {args.model_type} at {args.image_size}",
            ratio=seconds["PyTorch"] / seconds[name],
            pytorch_s=seconds["PyTorch"],
            onnxruntime_s=seconds[name],
            share_of_other_pixels=float((maps[name] != maps["PyTorch"]).mean()),
            file_mb=size,
        )


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
