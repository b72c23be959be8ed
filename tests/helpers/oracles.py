"""Compare with the public `segment-anything` package, and build checkpoints that run code when unpickled."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.public import public_sam
from segment_anything.build_sam import CONFIGS
from segment_anything.modeling import Sam


def public_tiny(ours: Sam) -> Any:
    """The public package's copy of our `vit_tiny`, with its weights and image size."""
    config, side = CONFIGS["vit_tiny"], ours.prompt_encoder.input_image_size[0]
    modeling = public_sam().modeling
    theirs = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=side,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            out_chans=config.prompt_embed_dim,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
        ),
        prompt_encoder=modeling.PromptEncoder(
            config.prompt_embed_dim, ours.prompt_encoder.image_embedding_size, (side, side), mask_in_chans=16
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer=modeling.TwoWayTransformer(2, config.prompt_embed_dim, 8, config.decoder_mlp_dim),
            transformer_dim=config.prompt_embed_dim,
        ),
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.eval()


def relative_error(actual: Any, expected: Any) -> float:
    """Norm of the difference over the norm of `expected`, in float64; arrays or tensors of one shape."""
    actual, expected = (torch.as_tensor(np.asarray(value), dtype=torch.float64) for value in (actual, expected))
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


class Payload:
    """An object that creates the file `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


# Pickle opcodes (protocol 2) that build a tensor of four zeros from the storage "0" of a `torch_archive`.
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    b"K\0K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)


def torch_archive(opcodes: bytes, storage: bytes = bytes(16)) -> bytes:
    """A file in `torch.save`'s format whose pickle is {"a": the opcodes' result}."""
    buffer = io.BytesIO()
    members = {
        "data.pkl": b"\x80\x02}X\x01\0\0\0a" + opcodes + b"s.",
        "byteorder": b"little",
        "data/0": storage,
        "version": b"3\n",
    }
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()
