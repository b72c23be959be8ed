"""What several tests share: the public `segment-anything` package to compare with, the figure the comparison is made
in, and a pickle that tells whether it was run."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import io
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from segment_anything.build_sam import CONFIGS
from segment_anything.modeling import Sam
from utils.runtime.errors import UserError

_NAME = "segment_anything"


@functools.cache
def public_sam() -> ModuleType:
    """The public package, whose import name is that of ours, imported beside it.

    It is imported while ours is out of `sys.modules`, and taken out again, so that `import segment_anything` means our
    package before and after. Its parts are reached as attributes: `public_sam().modeling.image_encoder.Block`.

    Raises:
        UserError: it is not installed, or ours is in its place.
    """
    folder = _public_folder()
    ours, path = _take_out(), sys.path.copy()
    sys.path.insert(0, str(folder))
    try:
        public = importlib.import_module(_NAME)
        importlib.import_module(f"{_NAME}.utils.onnx")  # a part that the package does not import by itself
    finally:
        _take_out()
        sys.modules.update(ours)
        sys.path[:] = path
    # What installs ours over the public one would have us compare with ourselves.
    where = Path(str(public.__file__)).resolve()
    if where.parents[1] != folder.resolve() or hasattr(public, "build_sam_vit_tiny"):
        raise UserError(f"{where} is not the public segment-anything==1.0; {_HOW_TO_INSTALL}")
    return public


OWN_FOLDER = Path(sys.prefix) / "oracle"  # where the Makefile puts it, and nothing can collide with it
_HOW_TO_INSTALL = f"pip install --upgrade --no-deps --target {OWN_FOLDER} segment-anything==1.0"


def _public_folder() -> Path:
    """The folder that the public package is in: its own, or else the one that pip puts packages into."""
    if (OWN_FOLDER / _NAME).is_dir():
        return OWN_FOLDER
    try:
        return Path(str(importlib.metadata.distribution("segment-anything").locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"segment-anything==1.0, to compare with, is not installed; {_HOW_TO_INSTALL}") from None


def public_tiny(ours: Sam) -> Any:
    """A SAM of the public package that is our `vit_tiny` `ours`, its weights and its image size included."""
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


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]
    return {name: sys.modules.pop(name) for name in names}


def relative_error(actual: Any, expected: Any) -> float:
    """Norm of the difference over the norm of `expected`, in float64; arrays or tensors of one shape."""
    actual, expected = (torch.as_tensor(np.asarray(value), dtype=torch.float64) for value in (actual, expected))
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


class Payload:
    """Unpickling it makes the file `path`, as a hostile file would run something worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


# Opcodes of protocol 2 that make a tensor of four zeros out of the storage "0" of a `torch_archive`.
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    b"K\0K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)


def torch_archive(opcodes: bytes, storage: bytes = bytes(16)) -> bytes:
    """A file of `torch.save`'s form whose pickle is {"a": what the opcodes leave}."""
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
