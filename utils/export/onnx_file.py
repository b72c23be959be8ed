"""ONNX: a semantic model as one file from picture to class map, a box model as an encoder and a decoder."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.export.graph import BoxesToMasks, PictureToEmbedding, decoder_example, semantic_graph
from utils.export.trained import Options, Trained
from utils.model.checkpoint import ModelInfo
from utils.model.onnx_model import FORMAT_VERSION, PICTURE, SUFFIX, missing_packages, parts_of
from utils.runtime.errors import UserError

OPSET = 18  # onnxruntime 1.14 and TensorRT 10 read it
MAX_BATCH = 1024
# A protobuf, and so an ONNX file, holds less than 2 GiB. The weights of a larger model are a second file.
MAX_WEIGHTS = 2_000_000_000
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def outputs(output: Path, info: ModelInfo) -> list[Path]:
    """The files that are written: `output`, or in box mode <output>.encoder.onnx and <output>.decoder.onnx."""
    if missing := missing_packages(*NEEDED):
        raise UserError(f"--format onnx needs {', '.join(missing)}; run pip install {' '.join(missing)}")
    if output.suffix != SUFFIX:
        raise UserError(f"{output}: is no name of an ONNX file; give --output {output.name}{SUFFIX}")
    if len(parts_of(output)) > 1:
        raise UserError(
            f"{output}: .encoder and .decoder are the endings of a box model's files; give another --output"
        )
    if info.prompt_mode == "semantic":
        return [output]
    return parts_of(output.with_suffix(f".encoder{SUFFIX}"))


def write(trained: Trained, paths: list[Path], options: Options) -> list[str]:
    """Write the model; returns notes for the user."""
    metadata = {"format_version": str(FORMAT_VERSION), "precision": options.precision, **trained.metadata()}
    if trained.info.prompt_mode == "semantic":
        if options.precision == "float16":
            trained.model.half()
        graph, example = semantic_graph(trained, options)
        metadata |= {"image_layout": options.image_layout, "image_dtype": options.image_dtype}
        batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        _export(graph, {PICTURE: example}, {PICTURE: {0: batch}}, graph.output_names, paths[0], metadata)
        return []
    encoder, decoder = paths
    sam = trained.model.sam
    if options.precision == "float16":
        sam.image_encoder.half()  # nearly all of the model; boxes need float32
    height, width = sam.frame_size
    sides = {0: torch.export.Dim("height", min=1, max=height), 1: torch.export.Dim("width", min=1, max=width)}
    picture = {"input_image": torch.zeros(height - 1, width - 1, 3)}
    _export(PictureToEmbedding(sam), picture, {"input_image": sides}, ["image_embeddings"], encoder, metadata)
    boxes = decoder_example(sam)
    prompts = {0: torch.export.Dim("boxes", min=1, max=MAX_BATCH), 1: torch.export.Dim("points", min=1, max=MAX_BATCH)}
    shapes = {name: prompts if name.startswith("point_") else None for name in boxes}
    names = ["masks", "iou_predictions", "low_res_masks"]
    _export(BoxesToMasks(sam, trained.info.resize_mode), boxes, shapes, names, decoder, metadata)
    return []


def _export(
    module: nn.Module,
    example: Mapping[str, Tensor],
    dynamic_shapes: Mapping[str, Any],
    output_names: Sequence[str],
    path: Path,
    metadata: Mapping[str, str],
) -> None:
    """Export a module, check the graph, and write it atomically.

    Args:
        example: the inputs by name, in the order of `forward`.
        dynamic_shapes: by input, as for `torch.export`.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PyTorch's own code
        program = torch.onnx.export(
            module,
            tuple(example.values()),
            dynamo=True,
            dynamic_shapes=tuple(dynamic_shapes[name] for name in example),
            input_names=list(example),
            output_names=list(output_names),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model
    quantizes = metadata["precision"] == "int8"
    linear = [str(node.name) for node in model.graph if quantizes and _is_linear_of_encoder(node)]
    for graph in (model.graph, *model.functions.values()):
        for node in graph:  # PyTorch notes the paths and lines of its source there
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
    noted: Any
    for noted in (model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        noted.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.producer_name, model.producer_version = "sam-bdd100k", metadata["version"]
    _save(model, path, linear)


def _is_linear_of_encoder(node: Any) -> bool:
    """Whether it is a linear layer of an encoder block: nearly all of the weights and of the arithmetic."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    # Tables of relative positions have four dimensions.
    return (
        weight is not None and weight.is_initializer() and len(weight.shape) == 2 and "image_encoder.blocks." in scopes
    )


def _save(model: Any, path: Path, quantized: list[str]) -> None:
    """Check and write a model.

    Args:
        quantized: names of the linear layers that get weights of 8 bits, none for no quantization.
    """
    import onnx
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    weights = f"{path.name}.data" if size > MAX_WEIGHTS else None
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as folder:
            written = Path(folder) / path.name
            onnx_ir.save(model, written, external_data=weights)
            if quantized:
                _quantize(written, quantized)
                weights = None  # what is left of the largest model is small enough
            onnx.checker.check_model(str(written), full_check=True)  # with shape inference
            for file in Path(folder).iterdir():
                _flush(file)
            if weights:
                os.replace(written.with_name(weights), path.with_name(weights))
            os.replace(written, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _flush(path: Path) -> None:
    """Write a file to the disk before it replaces another."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _quantize(path: Path, nodes: list[str]) -> None:
    """Replace the weights of linear layers by 8 bits; their inputs are quantized at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addFilter(_is_no_advice)
    try:
        quantize_dynamic(
            path,
            path,
            nodes_to_quantize=nodes,
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.getLogger().removeFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()  # which would need optional packages
