"""Hugging Face: a box model as a folder that transformers' `SamModel` and `SamProcessor` load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from segment_anything.build_sam import CONFIGS, PATCH_SIZE
from segment_anything.utils.foreign import SHARED_POSITIONS, SHARED_POSITIONS_AGAIN, hugging_face_name
from utils.export.trained import Options, Trained
from utils.model.checkpoint import ModelInfo
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, make_folder

FILES = ("model.safetensors", "config.json", "preprocessor_config.json")


def outputs(output: Path, info: ModelInfo) -> list[Path]:
    if info.prompt_mode != "box":
        raise UserError("--format hf: SamModel takes boxes; use --format onnx or torch for a semantic model")
    if not isinstance(info.image_size, int):
        raise UserError(f"--format hf: SamModel takes square frames, not {info.image_size}; use --format onnx")
    return [output / name for name in FILES]


def write(trained: Trained, paths: list[Path], options: Options) -> list[str]:
    """Write the folder; returns notes for the user."""
    weights = save(to_hugging_face(trained.model.sam.state_dict()), {"format": "pt"})
    make_folder(paths[0].parent, "--output")
    for path, content in zip(paths, (weights, _json(model_config(trained)), _json(processor_config(trained)))):
        with atomic_write(path) as file:
            file.write(content)
    side = trained.info.image_size
    notes = ["only mask 0 was trained: call the model with multimask_output=False"]
    if trained.info.resize_mode == "stretch":
        notes.append(
            f"it was trained on pictures stretched to {side}x{side}, but SamProcessor pads: stretch pictures and boxes "
            "to that size first"
        )
    return notes


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A SAM state dict with the names of `SamModel`."""
    theirs = {hugging_face_name(key): value.contiguous() for key, value in state.items()}
    return {**theirs, SHARED_POSITIONS_AGAIN: theirs[SHARED_POSITIONS].clone()}


def model_config(trained: Trained) -> dict[str, Any]:
    """The `config.json` of `SamModel`. Sizes that are the same in every SAM are its defaults."""
    info, config = trained.info, CONFIGS[trained.info.model_type]
    size = {"image_size": info.image_size, "patch_size": PATCH_SIZE}
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "dtype": "float32",
        "vision_config": {
            "hidden_size": config.embed_dim,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.num_heads,
            "mlp_dim": 4 * config.embed_dim,
            "global_attn_indexes": list(config.global_attn_indexes),
            "window_size": config.window_size,
            "output_channels": config.prompt_embed_dim,
            "num_pos_feats": config.prompt_embed_dim // 2,
            **size,
        },
        "prompt_encoder_config": {"hidden_size": config.prompt_embed_dim, **size},
        "mask_decoder_config": {"hidden_size": config.prompt_embed_dim, "mlp_dim": config.decoder_mlp_dim},
        "sam_bdd100k": trained.metadata(),
    }


def processor_config(trained: Trained) -> dict[str, Any]:
    """The `preprocessor_config.json` of `SamProcessor`: SAM's scaling, normalisation and padding, at this size."""
    side = trained.info.image_size
    assert isinstance(side, int)
    sam = trained.model.sam
    mean, std = ([round(value / 255, 6) for value in x.flatten().tolist()] for x in (sam.pixel_mean, sam.pixel_std))
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": side},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_pad": True,
        "pad_size": {"height": side, "width": side},
        "mask_size": {"longest_edge": side // 4},
        "mask_pad_size": {"height": side // 4, "width": side // 4},
    }


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
