"""Models that `utils.export` wrote as ONNX, behind the interface of `Segmenter`, so that they are scored alike.

A file may come from anybody. It is checked before onnxruntime sees it: operators of ONNX alone, no loops, no weights
outside its folder, no tensor larger than any of ours, and the inputs and outputs that its metadata promises.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.data.classes import BDD100K, ClassTable, read_class_table
from utils.data.frame import ImageSize, frame_size, is_image_size
from utils.data.manifest import RESIZE_MODES
from utils.model.checkpoint import ModelInfo
from utils.model.segmenter import SEGMENTERS, Features, Segmenter
from utils.runtime.choices import IMAGE_LAYOUTS
from utils.runtime.errors import UserError
from utils.runtime.files import is_file, open_untrusted

SUFFIX = ".onnx"
FORMAT_VERSION = 1
MAX_FILE = 1 << 31  # bytes; a protobuf cannot be larger
MAX_ELEMENTS = 2**31  # of one tensor; the logits of the largest frame have 319 million for a picture
BATCH, PICTURE = "batch", "images"
EXPORTED = "give a file that python -m utils.export wrote"


def missing_packages(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def is_onnx(path: Path | None) -> bool:
    return path is not None and path.suffix.lower() == SUFFIX


def parts_of(path: Path) -> list[Path]:
    """The file of a semantic model, or both files of a box model, of which `path` is one."""
    for part in (".encoder", ".decoder"):
        if path.stem.endswith(part):
            name = path.stem.removesuffix(part)
            return [path.with_name(f"{name}{each}{path.suffix}") for each in (".encoder", ".decoder")]
    return [path]


class OnnxSegmenter(Segmenter):
    """What ONNX models of both modes share: a session and a device."""

    def __init__(self, classes: ClassTable, device: torch.device) -> None:
        nn.Module.__init__(self)  # there is no SAM to freeze
        self.classes = classes
        self.device = device

    def train(self, mode: bool = True) -> OnnxSegmenter:
        if mode:
            raise NotImplementedError("an ONNX model cannot be trained")
        self.training = False
        return self

    def _run(self, session: Any, source: Path, names: list[str], inputs: dict[str, np.ndarray]) -> list[Tensor]:
        try:
            outputs = session.run(names, inputs)
        except Exception as error:  # onnxruntime's own types, which it does not document
            raise UserError(f"{source}: onnxruntime cannot run it ({_first_line(error)}); {EXPORTED}") from None
        return [torch.from_numpy(output).to(self.device) for output in outputs]


class OnnxSemanticSegmenter(OnnxSegmenter):
    """A semantic model. Its masks are the logits at the frame's size, or its class maps as ones among zeros."""

    PROMPTS = ()

    def __init__(self, path: Path, session: Any, metadata: dict[str, str], device: torch.device) -> None:
        super().__init__(_classes(path, metadata), device)
        self.path, self.session, self.metadata = path, session, metadata
        self.has_logits = len(session.get_outputs()) == 2
        self.size = frame_size(_info(path, metadata).image_size)

    def inputs(self, images: Tensor, features: Features | None = None) -> Features:
        """The pictures as the file takes them; it encodes them itself."""
        if self.metadata["image_dtype"] == "float32" and images.dtype == torch.uint8:
            images = images.float() / 255
        elif self.metadata["image_dtype"] == "uint8" and images.dtype != torch.uint8:
            images = (images.float() * 255).round().to(torch.uint8)
        if self.metadata["image_layout"] == "nhwc":
            images = images.permute(0, 2, 3, 1)
        return (images,)

    def forward(self, features: Features) -> tuple[Tensor]:
        pictures = {PICTURE: np.ascontiguousarray(features[0].cpu().numpy())}
        name = "logits" if self.has_logits else "class_map"
        (output,) = self._run(self.session, self.path, [name], pictures)
        if output.ndim != 3 + self.has_logits or output.shape[-2:] != self.size or len(output) != len(features[0]):
            _refuse(self.path, f"its {name} has the shape {'x'.join(map(str, output.shape))}")
        if not self.has_logits:
            count = len(self.classes)
            output = F.one_hot(output.long().clamp(max=count - 1), count).permute(0, 3, 1, 2).float()
        return (output,)


class OnnxBoxSegmenter(OnnxSegmenter):
    """A box model: an encoder for one picture and a decoder for some boxes."""

    PROMPTS = ("boxes",)

    def __init__(
        self, paths: Sequence[Path], sessions: Sequence[Any], classes: ClassTable, device: torch.device
    ) -> None:
        super().__init__(classes, device)
        self.paths, self.sessions = paths, sessions

    def inputs(self, images: Tensor, features: Features | None = None) -> Features:
        pixels = images.float() * (1.0 if images.dtype == torch.uint8 else 255.0)
        embeddings = [
            self._run(self.sessions[0], self.paths[0], ["image_embeddings"], {"input_image": picture})[0]
            for picture in np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())
        ]
        return (torch.cat(embeddings),)

    def forward(self, features: Features, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Decode Q boxes of one image, as `BoxSegmenter.forward`."""
        (embeddings,) = features
        count = boxes.shape[1]
        inputs = {
            "image_embeddings": embeddings.cpu().numpy(),
            "point_coords": boxes[0].reshape(count, 2, 2).cpu().numpy(),
            "point_labels": np.tile(np.array([2, 3], np.float32), (count, 1)),
            "mask_input": np.zeros((1, 1, 4 * embeddings.shape[2], 4 * embeddings.shape[3]), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.ones(2, np.float32),  # masks of the original size are not used
        }
        masks, scores = self._run(self.sessions[1], self.paths[1], ["low_res_masks", "iou_predictions"], inputs)
        return masks[:, 0][None], scores[:, 0][None]


def load_onnx(
    path: Path, device: torch.device, frame: tuple[ImageSize, str] | None
) -> tuple[OnnxSemanticSegmenter | OnnxBoxSegmenter, ModelInfo]:
    """Load the file of a semantic model, or both files of a box model.

    Args:
        path: the file, or one of the two.
        device: runs onnxruntime's CUDA or CPU provider; predictions are there.
        frame: image size and resize mode of the data, which must be the model's; None for no data.

    Raises:
        UserError: a file is missing, damaged, unsafe, or not one that `utils.export` wrote; it does not fit the data;
            or onnxruntime is not installed.
    """
    if missing := missing_packages("onnx", "onnxruntime"):
        raise UserError(f"{path}: needs {' and '.join(missing)}; run pip install {' '.join(missing)}")
    paths = parts_of(path)
    for part in paths:
        if not is_file(part):
            raise UserError(f"{part}: no such file; {EXPORTED}")
    read = [_read(part, frame) for part in paths]
    infos = [info for _, _, info in read]
    if len({info.prompt_mode == "box" for info in infos} | {len(paths) == 2}) > 1:
        raise UserError(
            f"{path}: a box model is named NAME.encoder.onnx and NAME.decoder.onnx, and a semantic one has neither "
            "ending; rename it"
        )
    if read[0][1] != read[-1][1]:
        raise UserError(f"{paths[0]} and {paths[1]}: are of two models; export both again")
    sessions = [load_session(part, device, content) for part, (content, _, _) in zip(paths, read)]
    if len(paths) == 2:
        return OnnxBoxSegmenter(paths, sessions, _classes(path, read[0][1]), device), infos[0]
    return OnnxSemanticSegmenter(path, sessions[0], read[0][1], device), infos[0]


def _read(path: Path, frame: tuple[ImageSize, str] | None) -> tuple[bytes | None, dict[str, str], ModelInfo]:
    """Check a file. Returns its content, or None if its weights are a second file; its metadata; and the model."""
    import onnx
    from google.protobuf.message import DecodeError

    with open_untrusted(path, MAX_FILE, fix=EXPORTED) as file:
        content = file.read()
    try:
        model = onnx.load_model_from_string(content)
    except (DecodeError, ValueError):
        _refuse(path, "truncated, or not an ONNX file")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    info = _info(path, metadata)
    if frame:
        info.require_same(replace(info, image_size=frame[0], resize_mode=frame[1]), path)
    has_external_weights = _check_graph(path, model)
    try:
        onnx.checker.check_model(str(path) if has_external_weights else model)
        shapes = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    except Exception as error:  # the checker's and the inference's own types; also a ValueError for a huge protobuf
        _refuse(path, f"not a valid model ({_first_line(error)})")
    for value in (*shapes.input, *shapes.output, *shapes.value_info):
        if math.prod(dim for dim in _dims(value) if isinstance(dim, int)) > MAX_ELEMENTS:
            _refuse(
                path, f"its tensor {value.name} has the shape {'x'.join(map(str, _dims(value)))}, which is too large"
            )
    _check_interface(path, model.graph, info, metadata)
    return None if has_external_weights else content, metadata, info


def _info(path: Path, metadata: dict[str, str]) -> ModelInfo:
    """The model that the metadata names."""
    names = ("model_type", "image_size", "resize_mode", "sam_sha256", "prompt_mode")
    if "format_version" not in metadata or not metadata.keys() >= {*names, "class_names"}:
        _refuse(path, "has no metadata of this project")
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise UserError(
            f"{path}: format {metadata['format_version'][:20]}, this version reads {FORMAT_VERSION}; export it again"
        )
    _classes(path, metadata)
    fields: dict[str, Any] = {name: metadata[name] for name in names}
    if fields["image_size"].isdecimal() and len(fields["image_size"]) < 6:
        fields["image_size"] = int(fields["image_size"])
    info = ModelInfo(**fields)
    if not is_image_size(info.image_size) or info.resize_mode not in RESIZE_MODES:
        _refuse(
            path, f"image size {str(info.image_size)[:20]} with resize mode {info.resize_mode[:20]} is not supported"
        )
    if info.prompt_mode not in SEGMENTERS:
        _refuse(path, f"prompt mode {info.prompt_mode[:20]} is unknown to this version")
    return info


def _classes(path: Path, metadata: dict[str, str]) -> ClassTable:
    """The classes that the metadata names; a file without the entry "classes" has BDD100K's."""
    try:
        table = read_class_table(json.loads(metadata["classes"])) if "classes" in metadata else BDD100K
    except (ValueError, RecursionError):
        _refuse(path, "its metadata have no valid table of classes")
    try:
        names = json.loads(metadata["class_names"])
    except (ValueError, RecursionError):
        names = None
    if names != list(table.names):
        count = len(names) if isinstance(names, list) else 0
        wrong = "those of its table" if "classes" in metadata else f"BDD100K's {len(table)}"
        _refuse(path, f"has {count} classes, which are not {wrong}")
    return table


def _check_graph(path: Path, model: Any) -> bool:
    """Check operators and weights; returns whether the weights are in the second file."""
    import onnx

    if model.functions or any(each.domain not in ("", "ai.onnx") for each in model.opset_import):
        _refuse(path, "has operators that are not ONNX's own")
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            _refuse(path, f"has a loop or a branch ({node.op_type})")
    weights = f"{path.name}.data"
    places = {
        entry.value
        for tensor in _tensors(model.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model.graph))
    if external and places != {weights}:
        _refuse(path, f"its weights are in {', '.join(sorted(places))[:200]}; only {weights} beside it is read")
    if external and not is_file(path.with_name(weights)):
        raise UserError(f"{path}: its weights are missing; put {weights} beside it")
    return external


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    sparse = list(graph.sparse_initializer)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _check_interface(path: Path, graph: Any, info: ModelInfo, metadata: dict[str, str]) -> None:
    """Check the inputs and outputs that this module uses."""
    import onnx

    height, width = frame_size(info.image_size)
    uint8, float32 = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
    weights = {tensor.name for tensor in graph.initializer}
    found_inputs = {value.name: _form(value) for value in graph.input if value.name not in weights}
    found_outputs = {value.name: _form(value) for value in graph.output}
    if info.prompt_mode == "semantic":
        layout, dtype = metadata.get("image_layout"), metadata.get("image_dtype")
        if layout not in IMAGE_LAYOUTS or dtype not in ("uint8", "float32"):
            _refuse(path, f"takes pictures as {str(dtype)[:20]} {str(layout)[:20]}, which is not supported")
        picture = (3, height, width) if layout == "nchw" else (height, width, 3)
        inputs = {PICTURE: (uint8 if dtype == "uint8" else float32, (BATCH, *picture))}
        outputs = {
            "class_map": (uint8, (BATCH, height, width)),
            "logits": (float32, (BATCH, len(_classes(path, metadata)), height, width)),
        }
        fits = found_inputs == inputs and found_outputs in (outputs, {"class_map": outputs["class_map"]})
    elif ".encoder." in path.name[-13:]:
        fits = found_inputs == {"input_image": (float32, ("height", "width", 3))} and [*found_outputs] == [
            "image_embeddings"
        ]
    else:
        fits = {*found_inputs} == set(DECODER_INPUTS) and {*found_outputs} == set(DECODER_OUTPUTS)
    if not fits:
        _refuse(path, f"its inputs and outputs are not those of a {info.prompt_mode} model of {info.image_size} pixels")


DECODER_INPUTS = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size")
DECODER_OUTPUTS = ("masks", "iou_predictions", "low_res_masks")


def _form(value: Any) -> tuple[int, tuple[int | str, ...]]:
    return value.type.tensor_type.elem_type, tuple(_dims(value))


def _dims(value: Any) -> list[int | str]:
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim]


def load_session(path: Path, device: torch.device, content: bytes | None = None) -> Any:
    """An onnxruntime session on a device; `content` is the file's, if it has been read.

    Raises:
        UserError: onnxruntime cannot load the file, or does not support the device.
    """
    import onnxruntime

    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise UserError("--device cuda: onnxruntime has no CUDA provider; install onnxruntime-gpu, or use --device cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, too
    providers: list[Any] = [provider]
    if device.type == "cuda":
        providers = [(provider, {"device_id": device.index or 0}), "CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(path if content is None else content, options, providers=providers)
    except Exception as error:  # onnxruntime's own types, which it does not document
        _refuse(path, f"onnxruntime cannot load it ({_first_line(error)})")


def _refuse(path: Path, wrong: str) -> NoReturn:
    raise UserError(f"{path}: {wrong}; {EXPORTED}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
