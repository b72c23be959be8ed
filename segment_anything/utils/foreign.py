"""Checkpoints of other programs: SAM files in other forms are converted, and other models are named."""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from segment_anything.utils.plain_load import MAX_PICKLE, is_archive, load_plain, require_readable

OURS = "a fine-tuned decoder of train_bdd100k.py"
SAM = "a SAM checkpoint"
# The kind of a file by names in it; the first match counts. Names may have prefixes, such as DDP's "module.".
_KINDS = (
    (r"^class_names$[\s\S]*^sam_sha256$|^sam_sha256$[\s\S]*^class_names$", OURS),
    (
        r"^pytorch-lightning_version$",
        "a checkpoint of PyTorch Lightning: save the SAM in it by itself, with torch.save(sam.state_dict(), FILE)",
    ),
    (
        r"^base_model\.model\.|\.lora_[AB]\.",
        "a LoRA adapter of PEFT: merge it into its SAM and save that, with torch.save(sam.state_dict(), FILE)",
    ),
    (r"^ultralytics\.", "a checkpoint of Ultralytics (FastSAM, or another YOLO), which is not supported"),
    (r"(^|\.)mask_decoder\.h[fq]_token\.", "a checkpoint of SAM-HQ, which is not supported"),
    (
        r"(^|\.)image_encoder\.patch_embed\.seq\.",
        "a checkpoint of MobileSAM, or of another SAM on TinyViT, which is not supported",
    ),
    (r"(^|\.)(detector|detector_model|tracker_model)\.", "a checkpoint of SAM 3, which is not supported"),
    (
        r"(^|\.)(image_encoder\.trunk|vision_encoder\.backbone|memory_attention|sam_mask_decoder)\.",
        "a checkpoint of SAM 2, which is not supported",
    ),
    (
        r"(^|\.)(image_encoder\.blocks|vision_encoder\.layers)\.0\.[\s\S]*(^|\.)mask_decoder\."
        r"|(^|\.)mask_decoder\.[\s\S]*(^|\.)(image_encoder\.blocks|vision_encoder\.layers)\.0\.",
        SAM,
    ),
)
# Positions of Hugging Face's `SamModel`, under two names.
SHARED_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
SHARED_POSITIONS_AGAIN = "shared_image_embedding.positional_embedding"
_WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys under which trainers store a state dict
_PREFIXES = ("module.", "_orig_mod.")  # of DDP and of torch.compile

# Parts of names in SAM and in Hugging Face's `SamModel`. With a dot first they stand anywhere, else they begin a name.
# They are replaced one after another. The general ones come last.
_HUGGING_FACE_PARTS = (
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", SHARED_POSITIONS),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    ("prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.neck.0.", "vision_encoder.neck.conv1."),
    ("image_encoder.neck.1.", "vision_encoder.neck.layer_norm1."),
    ("image_encoder.neck.2.", "vision_encoder.neck.conv2."),
    ("image_encoder.neck.3.", "vision_encoder.neck.layer_norm2."),
    ("image_encoder.blocks.", "vision_encoder.layers."),
    ("image_encoder.", "vision_encoder."),
    (".norm_final_attn.", ".layer_norm_final_attn."),
    *((f".norm{i}.", f".layer_norm{i}.") for i in range(1, 5)),
)
# The three layers of each MLP of the mask decoder: only the middle one has a number there.
_MLP_LAYER = re.compile(r"((?:_mlps\.\d|iou_prediction_head)\.)(layers\.\d|proj_in|proj_out)(?=\.)")
_MLP_LAYERS = {"layers.0": "proj_in", "layers.1": "layers.0", "layers.2": "proj_out"}


def hugging_face_name(key: str) -> str:
    """The name in `SamModel` of a tensor of SAM."""
    return _renamed(key, _HUGGING_FACE_PARTS, _MLP_LAYERS)


def _from_hugging_face(key: str) -> str:
    """The name in SAM of a tensor of `SamModel`, which has SHARED_POSITIONS a second time."""
    key = SHARED_POSITIONS if key == SHARED_POSITIONS_AGAIN else key
    return _renamed(
        key, [(theirs, ours) for ours, theirs in _HUGGING_FACE_PARTS], {b: a for a, b in _MLP_LAYERS.items()}
    )


def _renamed(key: str, parts: Iterable[tuple[str, str]], layers: Mapping[str, str]) -> str:
    for old, new in parts:
        if old.startswith("."):
            key = key.replace(old, new)
        elif key.startswith(old):
            key = new + key[len(old) :]
    return _MLP_LAYER.sub(lambda match: match[1] + layers.get(match[2], match[2]), key)


def load(path: Path) -> Any:
    """Load a PyTorch or a safetensors file without running its code; raises as `load_plain`."""
    if not is_safetensors(path):
        return load_plain(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        require_readable(path)
        raise ValueError(f"{path}: damaged, or not a file of plain tensors") from error


def sam_state(payload: Any) -> dict[str, Tensor] | None:
    """Find the state dict in a loaded file; None if there is none.

    Wrappers of trainers are removed, and the names of Hugging Face's `SamModel` become SAM's. Whether it is a SAM is
    not checked.
    """
    if not isinstance(payload, dict):
        return None
    for key in _WRAPPERS:
        if isinstance(inner := payload.get(key), dict) and kind_of(map(str, inner)) == SAM:
            payload = inner
    if not payload or not all(
        isinstance(key, str) and isinstance(value, Tensor) and value.is_floating_point()
        for key, value in payload.items()
    ):
        return None
    state: dict[str, Tensor] = payload
    while any(state and all(key.startswith(prefix) for key in state) for prefix in _PREFIXES):
        state = {key.partition(".")[2]: value for key, value in state.items()}
    if any(key.startswith("vision_encoder.") for key in state) and kind_of(state) == SAM:
        state = {_from_hugging_face(key): value for key, value in state.items()}
    return state


def kind_of(names: Iterable[str]) -> str | None:
    """The kind of a file with these names, and what to do with it; None if unknown."""
    text = "\n".join(names)
    return next((kind for pattern, kind in _KINDS if re.search(pattern, text, re.MULTILINE)), None)


def kind_of_file(path: Path) -> str | None:
    """The kind of a file that could not be loaded; no code of it runs, and no tensor is read."""
    try:
        return kind_of(_names_in(path))
    except Exception:  # damaged bytes can raise almost anything in the parsers
        return None


def _names_in(path: Path) -> list[str]:
    if is_safetensors(path):
        with open(path, "rb") as file:
            header: Mapping[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return [*header, *header.get("__metadata__", {})]
    if is_archive(path):
        with zipfile.ZipFile(path) as archive:
            (member,) = (one for one in archive.infolist() if one.filename.endswith("/data.pkl"))
            with archive.open(member) as file:
                streams = [io.BytesIO(file.read(MAX_PICKLE))]
    else:
        with open(path, "rb") as file:
            stream = io.BytesIO(file.read(MAX_PICKLE))
        streams = [stream] * 4  # the fourth is the object
    names: list[str] = []
    for stream in streams:
        names += (str(argument) for opcode, argument, _ in pickletools.genops(stream) if isinstance(argument, str))
    return names


def is_safetensors(path: Path) -> bool:
    """Whether it begins as a safetensors file does. Raises OSError if it is unreadable."""
    with open(path, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length <= min(MAX_PICKLE, path.stat().st_size - 8)
