"""Building SAM and loading its checkpoints strictly, with a clear error for every file that does not fit."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, SupportsIndex

import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils import foreign

PATCH_SIZE = 16


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one line: the file, the problem, the fix."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """The file does not exist; a FileNotFoundError, as in the public package."""


class FineTunedError(CheckpointError):
    """A checkpoint of `train_bdd100k.py` instead of a SAM file."""


@dataclass(frozen=True)
class SamConfig:
    """The sizes of a SAM. The defaults are the same in all of Meta's models."""

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    image_size: int = 1024
    window_size: int = 14
    prompt_embed_dim: int = 256
    decoder_mlp_dim: int = 2048


CONFIGS = {
    "vit_h": SamConfig(1280, 32, 16, (7, 15, 23, 31)),
    "vit_l": SamConfig(1024, 24, 16, (5, 11, 17, 23)),
    "vit_b": SamConfig(768, 12, 12, (2, 5, 8, 11)),
    # 5 M parameters, for demonstrations and tests on a CPU. Not one of Meta's.
    "vit_tiny": SamConfig(
        192, 8, 6, (1, 3, 5, 7), image_size=256, window_size=8, prompt_embed_dim=128, decoder_mlp_dim=1024
    ),
}

_META_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
_META_FILES = {"vit_h": "sam_vit_h_4b8939.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_b": "sam_vit_b_01ec64.pth"}


def build_sam_of_type(
    model_type: str,
    checkpoint: str | Path | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    check_hash: bool = False,
) -> Sam:
    """Build a SAM in eval mode, on the CPU, in float32.

    Args:
        model_type: a key of `CONFIGS`.
        checkpoint: a SAM state dict to load; None leaves the weights random.
        image_size: side of the square input in pixels, or its (H, W), multiples of 16; None is the model's own.
            Positions of a square checkpoint are resampled to another square. A non-square frame gets their top-left
            part, as SAM pads below and to the right; if a side is longer, they are first resampled to the square of
            that side. A checkpoint of a non-square frame loads only at that frame.
        check_hash: compare the file with the hash in its name; see `check_file_hash`.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of this model or image size.
        ValueError: no model takes the image size.
    """
    config = CONFIGS[model_type]
    if image_size is None:
        image_size = config.image_size
    sides = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    whole = (isinstance(n, SupportsIndex) and int(n) > 0 and int(n) % PATCH_SIZE == 0 for n in sides)
    if len(sides) != 2 or not all(whole):
        raise ValueError(f"image_size must be a multiple of {PATCH_SIZE}, got {image_size}")
    height, width = int(sides[0]), int(sides[1])
    grid_size = (height // PATCH_SIZE, width // PATCH_SIZE)
    path = Path(checkpoint) if checkpoint is not None else None
    state = read_state_dict(path, model_type) if path else {}
    trained_size = PATCH_SIZE * _square_side(state) if _square_side(state) else config.image_size
    side = height if height == width else max(height, width, trained_size)  # of the square of positions
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=(height, width),
            patch_size=PATCH_SIZE,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
            out_chans=config.prompt_embed_dim,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=config.prompt_embed_dim,
            image_embedding_size=grid_size,
            input_image_size=(side, side),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=config.prompt_embed_dim, num_heads=8, mlp_dim=config.decoder_mlp_dim
            ),
            transformer_dim=config.prompt_embed_dim,
        ),
    )
    sam.prompt_encoder.position_grid_size = (side // PATCH_SIZE, side // PATCH_SIZE)
    if path:
        if check_hash:
            check_file_hash(path)
        load_state_dict(sam, state, model_type=model_type, source=path)
    return sam.eval()


build_sam_vit_h = partial(build_sam_of_type, "vit_h")
build_sam_vit_l = partial(build_sam_of_type, "vit_l")
build_sam_vit_b = partial(build_sam_of_type, "vit_b")
build_sam_vit_tiny = partial(build_sam_of_type, "vit_tiny")
build_sam = build_sam_vit_h  # the public package's name for it

sam_model_registry = {
    "default": build_sam_vit_h,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
    "vit_tiny": build_sam_vit_tiny,
}


def read_state_dict(path: Path, model_type: str) -> dict[str, Tensor]:
    """Read a SAM state dict from a PyTorch or a safetensors file, without running code in it.

    Wrappers of trainers (MedSAM's `{"model": ...}`, DDP's prefix) are removed, and the names of Hugging Face's
    `SamModel` are replaced by SAM's.

    Raises:
        CheckpointError: `path` is missing, unreadable, or holds anything but named tensors.
        FineTunedError: it is a checkpoint of `train_bdd100k.py`.
    """
    fetch = _fetch_hint(path, model_type)
    try:
        mode = os.stat(path).st_mode
        if S_ISDIR(mode) and (path / "model.safetensors").exists():
            raise CheckpointError(f"{path}: a folder; give the file {path / 'model.safetensors'}")
        if not S_ISREG(mode):
            raise FileNotFoundError
        payload = foreign.load(path)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingCheckpointError(f"{path}: no such checkpoint{fetch}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except CheckpointError:
        raise
    except ValueError as error:
        kind = foreign.kind_of_file(path)
        if kind in (None, foreign.SAM, foreign.OURS):
            kind = f"truncated, or not a PyTorch checkpoint of plain tensors{fetch}"
        raise CheckpointError(f"{path}: {kind}") from error
    state = foreign.sam_state(payload)
    kind = foreign.kind_of(_names(payload)) or foreign.kind_of_file(path)  # a safetensors file has it in its metadata
    if kind == foreign.OURS:
        raise FineTunedError(f"{path}: not a SAM state dict, but {foreign.OURS}")
    if state is None or kind not in (None, foreign.SAM):
        known = kind not in (None, foreign.SAM)
        raise CheckpointError(f"{path}: {kind if known else f'does not hold a SAM state dict{fetch}'}")
    return state


def _names(payload: Any) -> Iterator[str]:
    """The keys of nested dicts, two levels deep."""
    for key, value in payload.items() if isinstance(payload, dict) else ():
        yield str(key)
        yield from map(str, value) if isinstance(value, dict) else ()


def load_state_dict(sam: Sam, state: dict[str, Tensor], *, model_type: str, source: Path) -> None:
    """Load a complete SAM state dict strictly, with positions resampled to the model's image size.

    Raises:
        CheckpointError: names keys that are missing, unknown or of another shape, and the model that would fit; or the
            frame, if the positions are of another frame that is not square.
    """
    embedding = state.get("image_encoder.pos_embed")
    actual = next(
        (
            name
            for name, c in CONFIGS.items()
            if embedding is not None and embedding.ndim == 4 and c.embed_dim == embedding.shape[3]
        ),
        None,
    )
    if actual not in (None, model_type):
        raise CheckpointError(f"{source}: a checkpoint of {actual}, not of {model_type}; give model_type {actual}")
    expected = sam.state_dict()
    global_blocks = [i for i, size in enumerate(sam.image_encoder.window_sizes) if not size]
    depends_on_size = {"image_encoder.pos_embed"} | {
        f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in global_blocks for axis in "hw"
    }
    grid_size = sam.prompt_encoder.image_embedding_size
    if (
        actual
        and embedding is not None
        and embedding.numel()
        and not _square_side(state)
        and embedding.shape[1:3] != grid_size
    ):
        height, width = (PATCH_SIZE * side for side in embedding.shape[1:3])
        raise CheckpointError(
            f"{source}: its positions fit only the frame {height}x{width}; use the image size {height}x{width}"
        )
    # A non-square frame has the top-left part of a square's positions.
    side = None if grid_size[0] == grid_size[1] or not _square_side(state) else max(*grid_size, _square_side(state))
    fitted = {key: _fit_positions(state[key], expected[key], side) for key in depends_on_size & state.keys()}
    state = {**state, **fitted}

    missing = [key for key in expected if key not in state]
    foreign = [key for key in state if key not in expected]
    reshaped = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    for what, keys in (("lacks", missing), ("has foreign", foreign), ("has other shapes of", reshaped)):
        if keys:
            some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            raise CheckpointError(
                f"{source}: not a {model_type} SAM checkpoint: it {what} {len(keys)} of {len(expected)} keys ({some})"
                + _fetch_hint(source, model_type)
            )
    sam.load_state_dict(state, strict=True)


def check_file_hash(path: Path) -> None:
    """Compare a file with the hash in its name, as in `sam_vit_b_01ec64.pth`.

    Meta's names hold the beginning of the MD5; those of PyTorch Hub, `name-<hash>.pth`, of the SHA-256.

    Raises:
        CheckpointError: the name holds no hash, or neither digest begins with it.
    """
    match = re.search(r"[-_]([0-9a-f]{6,64})\.pth$", path.name)
    if match is None:
        raise CheckpointError(f"{path}: its name holds no hash to compare with")
    digests = {name: file_digest(path, name) for name in ("sha256", "md5")}
    if not any(digest.startswith(match[1]) for digest in digests.values()):
        raise CheckpointError(
            f"{path}: damaged or renamed: its name has the hash {match[1]}, but its SHA-256 begins with "
            f"{digests['sha256'][:8]} and its MD5 with {digests['md5'][:8]}; download it again"
        )


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file, read in pieces; an `OSError` names the file."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return digest.hexdigest()


def _square_side(state: dict[str, Tensor]) -> int:
    """The side of the grid of a state dict's position embeddings; 0 if the grid is not square."""
    table = state.get("image_encoder.pos_embed")
    return table.shape[1] if table is not None and table.ndim == 4 and table.shape[1] == table.shape[2] else 0


def _fit_positions(value: Tensor, target: Tensor, side: int | None) -> Tensor:
    """Resample a position table to another grid: `pos_embed` in two dimensions, relative positions in one.

    Any other tensor is returned unchanged, and will be rejected for its shape.

    Args:
        value: 1 x H x W x C, or 2L - 1 distances x C.
        target: of the wanted shape.
        side: of a square whose top-left part is the wanted grid; None to resample to the wanted grid.
    """
    if value.ndim != target.ndim or value.shape[-1] != target.shape[-1] or not value.numel():
        return value
    if value.ndim == 4:
        if value.shape[0] != 1:
            return value
        height, width = target.shape[1:3]
        size = (height, width) if side is None else (side, side)
        return _resample(value.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)[:, :height, :width]
    count = len(target)
    distances = _resample(value.T[None], (count if side is None else 2 * side - 1,))[0].T
    start = (len(distances) - count) // 2  # the middle one is 0
    return distances[start : start + count]


def _resample(x: Tensor, size: Sequence[int]) -> Tensor:
    """N x C x ... -> N x C x `size`, of one dimension or two."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x.float(), tuple(size), mode="bicubic" if x.ndim == 4 else "linear", align_corners=False)


def _fetch_hint(path: Path, model_type: str) -> str:
    if model_type not in _META_FILES:
        return "; this repository has one: assets/sam_vit_tiny_scenes.pth"
    return f"; download it with: wget -P {path.parent} {_META_URL}{_META_FILES[model_type]}"
