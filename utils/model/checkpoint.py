"""Checkpoints: what was trained, with what is needed to rebuild the model around it.

`medsam_model_best.pth` holds the mask decoder alone (keys `mask_decoder.*`; of vit_b 16 MB, in semantic mode 39 MB);
`medsam_model_latest.pth` holds the state of the run beside it, for `--resume`. Both are plain tensors, numbers,
strings, lists and dicts, so that they load with `weights_only=True`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segment_anything.utils import foreign
from segment_anything.utils.plain_load import load_plain
from utils.data.classes import CLASS_NAMES
from utils.data.frame import ImageSize, is_image_size
from utils.data.manifest import RESIZE_MODES
from utils.model.segmenter import INFER_FLAGS, SEGMENTERS, CheckpointFlags, Segmenter
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, cannot_be_read, is_file, is_folder

FORMAT_VERSION = 1
BEST = "medsam_model_best.pth"
LATEST = "medsam_model_latest.pth"
DECODER_PREFIX = "mask_decoder."


@dataclass(frozen=True)
class ModelInfo:
    """What a trained decoder belongs to; it is of no use with anything else."""

    model_type: str
    image_size: ImageSize
    resize_mode: str
    sam_sha256: str
    prompt_mode: str = "box"

    def require_same(self, other: ModelInfo, source: Path) -> None:
        """Raise a `UserError` unless `source`, of which this was read, fits a model described by `other`."""
        for field in fields(self):
            theirs, ours = getattr(self, field.name), getattr(other, field.name)
            if theirs != ours:
                what = field.name.replace("_", " ")
                raise UserError(f"{source}: was trained with {what} {theirs}, not {ours}; {_FIXES[field.name]}")


_FIXES = {
    "model_type": "give the model type it was trained with",
    "image_size": "preprocess the data at that --image_size",
    "resize_mode": "preprocess the data with that --resize_mode",
    "sam_sha256": "give the same SAM file it was trained on (these are SHA-256 sums)",
    "prompt_mode": "give that --prompt_mode",
}


def save_best(path: Path, model: Segmenter, info: ModelInfo, *, epoch: int, metrics: dict, args: dict) -> None:
    """Write the trained part of `model` and its metadata, atomically."""
    save_whole(path, _decoder_payload(model, info, epoch=epoch, metrics=metrics, args=args))


def save_latest(
    path: Path, model: Segmenter, info: ModelInfo, *, epoch: int, metrics: dict, args: dict, run_state: dict, keep: int
) -> None:
    """As `save_best`, with the state of the run: optimizer, scheduler, scaler, RNG, and what the loop counts.

    Args:
        keep: so many earlier ones stay, under the names of `utils.runtime.files.earlier`.
    """
    payload = _decoder_payload(model, info, epoch=epoch, metrics=metrics, args=args)
    save_whole(path, {**payload, "run_state": run_state}, keep=keep)


def in_folder(path: Path, name: str) -> Path:
    """The file of that name, if `path` is a run's folder; else `path`, which is the file itself."""
    return path / name if is_folder(path) else path


def load_checkpoint(path: Path, flags: CheckpointFlags = INFER_FLAGS) -> dict[str, Any]:
    """Read a checkpoint of this project, or the best one of a run's folder, without running what a pickle may hold.

    Raises:
        UserError: it is missing, damaged, or another kind of file; an `UnreadableError`, the system does not let us
            read it.
    """
    path = in_folder(path, BEST)
    if not is_file(path):
        raise UserError(f"{path}: no such checkpoint (train_bdd100k.py writes {BEST} and {LATEST})")
    try:
        payload = load_plain(path, strict=True)
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except ValueError:
        payload = None
    if not _is_checkpoint(payload):
        kind = foreign.kind_of_file(path)
        if kind not in (None, foreign.OURS, foreign.SAM):
            raise UserError(f"{path}: not a checkpoint of train_bdd100k.py, but {kind}")
        if kind != foreign.SAM and payload is None:
            raise UserError(f"{path}: truncated, or not a checkpoint of train_bdd100k.py; take another one")
        raise UserError(
            f"{path}: not a checkpoint of train_bdd100k.py (give a SAM checkpoint as {flags.sam} and a "
            f"fine-tuned one as {flags.ours}){f'; it is {kind}' if kind == foreign.SAM else ''}"
        )
    if payload["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: format {payload['format_version']}, this version reads {FORMAT_VERSION}")
    if payload["class_names"] != list(CLASS_NAMES):
        count = len(payload["class_names"])
        raise UserError(f"{path}: trained on {count} classes, which are not BDD100K's {len(CLASS_NAMES)}")
    if payload["info"].keys() != {field.name for field in fields(ModelInfo)}:
        raise UserError(f"{path}: does not say which model it belongs to; give a file that train_bdd100k.py wrote")
    payload["info"] = ModelInfo(**payload["info"])
    if not (is_image_size(payload["info"].image_size) and payload["info"].resize_mode in RESIZE_MODES):
        raise UserError(
            f"{path}: of image size {payload['info'].image_size}, resize mode "
            f"{payload['info'].resize_mode}: no model is of these; give a file that train_bdd100k.py wrote"
        )
    if payload["info"].prompt_mode not in SEGMENTERS:
        raise UserError(f"{path}: of prompt mode {payload['info'].prompt_mode}, which this version does not know")
    return payload


def _is_checkpoint(payload: Any) -> bool:
    """Whether all that `load_checkpoint` and `load_decoder` look at is there and of its type."""
    kinds = {"format_version": int, "class_names": list, "info": dict, "model": dict}
    return (
        isinstance(payload, dict)
        and all(type(payload.get(key)) is kind for key, kind in kinds.items())
        and all(
            type(value) is str or (key == "image_size" and type(value) is int) for key, value in payload["info"].items()
        )
        and all(is_flat(payload.get(key, {})) for key in ("args", "metrics"))
        and all(
            isinstance(key, str) and isinstance(value, Tensor) and value.is_floating_point()
            for key, value in payload["model"].items()
        )
    )


def is_flat(record: Any) -> bool:
    """Whether it is a dict of numbers, strings and None by name, as flags and figures are."""
    return isinstance(record, dict) and all(
        isinstance(key, str) and isinstance(value, int | float | str | None) for key, value in record.items()
    )


def load_decoder(model: Segmenter, state: dict[str, Tensor], source: Path) -> None:
    """Load a checkpoint's "model" strictly.

    Raises:
        UserError: names the keys that are missing, foreign or of another shape.
    """
    require_same_decoder(state, _decoder_state(model), source)
    model.mask_decoder.load_state_dict({key.removeprefix(DECODER_PREFIX): value for key, value in state.items()})


def require_same_decoder(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path) -> None:
    """Raise a `UserError` unless `state`, of which `source` is the file, has the names and shapes of `expected`."""
    wrong = sorted(expected.keys() ^ state.keys()) or [k for k in expected if state[k].shape != expected[k].shape]
    if wrong:
        some = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(f"{source}: its mask decoder does not fit: {len(wrong)} keys differ ({some})")


def _decoder_state(model: Segmenter) -> dict[str, Tensor]:
    return {DECODER_PREFIX + key: value for key, value in model.mask_decoder.state_dict().items()}


def _decoder_payload(model: Segmenter, info: ModelInfo, *, epoch: int, metrics: dict, args: dict) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "info": asdict(info),
        "class_names": list(CLASS_NAMES),
        "epoch": epoch,
        "metrics": metrics,
        "args": args,
        "model": _decoder_state(model),
    }


def save_whole(path: Path, payload: dict[str, Any], *, keep: int = 0) -> None:
    """`torch.save`, atomically; `keep` as of `atomic_write`.

    Raises:
        UserError: the file cannot be written.
    """
    # Serialised before the file is opened: a full disk is then an error of writing, which leaves the old file alone.
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    with atomic_write(path, keep=keep) as file:
        file.write(buffer.getbuffer())
