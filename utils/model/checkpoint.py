"""Checkpoints: the trained decoder, and the metadata to rebuild the model around it.

`medsam_model_best.pth` holds the mask decoder alone (keys `mask_decoder.*`; 16 MB for vit_b, 39 MB in semantic mode).
`medsam_model_latest.pth` adds the state of the run for `--resume`. Both hold plain tensors, numbers, strings, lists and
dicts, and load with `weights_only=True`. `python -m utils.export --format safetensors` writes what a best file holds as
safetensors.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import NotRequired

from segment_anything.build_sam import file_digest
from segment_anything.utils import foreign
from segment_anything.utils.plain_load import load_plain
from utils.data.classes import BDD100K, ClassTable, read_class_table
from utils.data.frame import ImageSize, is_image_size
from utils.data.manifest import RESIZE_MODES
from utils.model.segmenter import INFER_FLAGS, SEGMENTERS, CheckpointFlags, Segmenter, build_model
from utils.model.semantic_decoder import of_classes
from utils.model.tensor_files import read_tensors, write_tensors
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, cannot_be_read, is_file, is_folder

FORMAT_VERSION = 1
BEST = "medsam_model_best.pth"
LATEST = "medsam_model_latest.pth"
DECODER_PREFIX = "mask_decoder."


@dataclass(frozen=True)
class ModelInfo:
    """The model and the frame that a decoder was trained with. It works with no other."""

    model_type: str
    image_size: ImageSize
    resize_mode: str
    sam_sha256: str
    prompt_mode: str = "box"

    def require_same(self, other: ModelInfo, source: Path) -> None:
        """Raise a `UserError` unless the checkpoint `source` with this info fits a model with the info `other`."""
        for field in fields(self):
            theirs, ours = getattr(self, field.name), getattr(other, field.name)
            if theirs != ours:
                what = field.name.replace("_", " ")
                raise UserError(f"{source}: was trained with {what} {theirs}, not {ours}; {_FIXES[field.name]}")


_FIXES = {
    "model_type": "give that model type",
    "image_size": "preprocess the data at that --image_size",
    "resize_mode": "preprocess the data with that --resize_mode",
    "sam_sha256": "give the SAM file it was trained on (these are SHA-256 sums)",
    "prompt_mode": "give that --prompt_mode",
}
_IN_JSON = (
    "format_version",
    "class_names",
    "classes",
    "epoch",
    "metrics",
    "args",
)  # the entries beside "info" and "model"
Plain = dict[str, Any]  # flags or figures by name: numbers, strings and None; see `is_flat`


class Checkpoint(TypedDict):
    """The content of a checkpoint, checked by `load_checkpoint`."""

    format_version: int
    info: ModelInfo  # in the file, its fields
    class_names: list[str]
    classes: ClassTable  # in the file, as by `ClassTable.to_plain`; a file without it is of BDD100K's classes
    epoch: int
    metrics: Plain
    args: Plain
    model: dict[str, Tensor]  # the decoder's state dict, with DECODER_PREFIX
    run_state: NotRequired[Any]  # of a `latest`; train_bdd100k.py checks it


def save_best(path: Path, model: Segmenter, info: ModelInfo, *, epoch: int, metrics: Plain, args: Plain) -> None:
    """Write the trained part of `model` and its metadata, atomically."""
    save_whole(path, _decoder_payload(model, info, epoch=epoch, metrics=metrics, args=args))


def save_latest(
    path: Path,
    model: Segmenter,
    info: ModelInfo,
    *,
    epoch: int,
    metrics: Plain,
    args: Plain,
    run_state: Mapping[str, object],
    keep: int,
) -> None:
    """Write a `save_best` checkpoint that also holds the state of the run.

    Args:
        run_state: of optimizer, scheduler, scaler, random generators and progress.
        keep: number of earlier files that are kept, as by `atomic_write`.
    """
    payload = _decoder_payload(model, info, epoch=epoch, metrics=metrics, args=args)
    save_whole(path, {**payload, "run_state": run_state}, keep=keep)


def in_folder(path: Path, name: str) -> Path:
    """The file `name` in `path` if it is a run's folder, otherwise `path` itself."""
    return path / name if is_folder(path) else path


def load_checkpoint(path: Path, flags: CheckpointFlags = INFER_FLAGS) -> Checkpoint:
    """Read a checkpoint of this project, or the best one in a run's folder. No code in the file runs.

    Raises:
        UserError: it is missing, damaged, or another kind of file.
        UnreadableError: the system does not let us read it.
    """
    path = in_folder(path, BEST)
    if not is_file(path):
        raise UserError(f"{path}: no such checkpoint (train_bdd100k.py writes {BEST} and {LATEST})")
    try:
        payload: Any = _load_safetensors(path) if foreign.is_safetensors(path) else load_plain(path, strict=True)
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except ValueError:
        payload = None
    wrong = _wrong_with(payload) if _is_checkpoint(payload) else _kind_of_other(path, payload, flags)
    if wrong:
        raise UserError(f"{path}: {wrong}")
    return payload | {"info": ModelInfo(**payload["info"]), "classes": _classes_of(payload)}


def save_safetensors(path: Path, state: Checkpoint) -> None:
    """Write the decoder of a checkpoint as safetensors, atomically. `load_checkpoint` reads the file like a best one.

    The metadata holds the fields of "info" as they are and the other entries as JSON.

    Raises:
        UserError: the file cannot be written.
    """
    info = {key: str(value) for key, value in asdict(state["info"]).items()}
    plain = {**state, "classes": state["classes"].to_plain()}
    others = {key: json.dumps(plain.get(key)) for key in _IN_JSON}
    write_tensors(path, {key: value.contiguous() for key, value in state["model"].items()}, {**info, **others})


def _load_safetensors(path: Path) -> Any:
    """The payload of a file of `save_safetensors`, not yet checked, or None if it is damaged or of another kind."""
    tensors, metadata = read_tensors(path) or ({}, {})
    info: dict[str, Any] = {field.name: metadata.get(field.name) for field in fields(ModelInfo)}
    if re.fullmatch(r"\d{1,9}", info["image_size"] or "", re.ASCII):
        info["image_size"] = int(info["image_size"])
    try:
        others = {key: json.loads(metadata[key]) for key in _IN_JSON if key in metadata or key != "classes"}
    except (KeyError, ValueError, RecursionError):
        return None
    return {**others, "info": info, "model": tensors}


def _kind_of_other(path: Path, payload: object, flags: CheckpointFlags) -> str:
    """What a file is that is not a checkpoint of ours, and what to do; `payload` is None if it cannot be loaded."""
    kind = foreign.kind_of_file(path)
    if kind == foreign.SAM or (payload is not None and kind in (None, foreign.OURS)):
        return (
            f"not a checkpoint of train_bdd100k.py (give a SAM checkpoint as {flags.sam} and a fine-tuned one as "
            f"{flags.ours}){f'; it is {kind}' if kind == foreign.SAM else ''}"
        )
    if kind in (None, foreign.OURS):
        return "truncated, or not a checkpoint of train_bdd100k.py; give another one"
    return f"not a checkpoint of train_bdd100k.py, but {kind}"


def _wrong_with(payload: Checkpoint) -> str | None:
    """What is wrong with a checkpoint whose entries have the right types."""
    if payload["format_version"] != FORMAT_VERSION:
        return f"format {payload['format_version']}, this version reads {FORMAT_VERSION}"
    if "classes" not in payload and payload["class_names"] != list(BDD100K.names):
        given = f"trained on {len(payload['class_names'])} classes, which are not BDD100K's {len(BDD100K)}"
        return f"{given}, and holds no table of classes; train again"
    try:
        is_table = list(_classes_of(payload).names) == payload["class_names"]
    except ValueError:
        is_table = False
    if not is_table:
        return "not a checkpoint of train_bdd100k.py: its table of classes is damaged; give another one"
    info: Any = payload["info"]
    if info.keys() != {field.name for field in fields(ModelInfo)}:
        return "does not say which model it belongs to; give a file that train_bdd100k.py wrote"
    if not is_image_size(info["image_size"]) or info["resize_mode"] not in RESIZE_MODES:
        return (
            f"image size {info['image_size']} with resize mode {info['resize_mode']} is not supported; "
            "give a file that train_bdd100k.py wrote"
        )
    if info["prompt_mode"] not in SEGMENTERS:
        return f"prompt mode {info['prompt_mode']} is unknown to this version"
    return None


def _classes_of(payload: Any) -> ClassTable:
    return read_class_table(payload["classes"]) if "classes" in payload else BDD100K


def _is_checkpoint(payload: Any) -> bool:
    """Whether all that `load_checkpoint` and `load_decoder` use is present and of its type."""
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
    """Whether it is a dict of numbers, strings and None by name."""
    return isinstance(record, dict) and all(
        isinstance(key, str) and isinstance(value, int | float | str | None) for key, value in record.items()
    )


def require_model_type(state: Checkpoint, model_type: str, source: Path) -> None:
    """Raise a `UserError` unless the checkpoint `source` is for this size of SAM."""
    actual = state["info"].model_type
    if actual != model_type:
        raise UserError(
            f"{source}: a decoder for {actual}, not {model_type}; "
            f"give --model_type {actual} and the SAM file it was trained on"
        )


def rebuild(
    state: Checkpoint,
    source: Path,
    sam_checkpoint: Path,
    *,
    frame: tuple[ImageSize, str] | None = None,
    check_hash: bool = False,
) -> tuple[Segmenter, ModelInfo]:
    """Build the model of the checkpoint `source` on its SAM file.

    Args:
        frame: image size and resize mode of the data, which must be the checkpoint's; None for no data.
        check_hash: compare the SAM file with the hash in its name.

    Raises:
        UserError: the SAM file is missing, damaged or another one, or the checkpoint does not fit it or the data.
    """
    info = state["info"]
    image_size, resize_mode = frame or (info.image_size, info.resize_mode)
    model = build_model(
        info.model_type,
        sam_checkpoint,
        image_size=image_size,
        prompt_mode=info.prompt_mode,
        check_hash=check_hash,
        classes=state["classes"],
        decoder=state["model"],
    )
    here = ModelInfo(info.model_type, image_size, resize_mode, file_digest(sam_checkpoint), info.prompt_mode)
    info.require_same(here, source)
    load_decoder(model, state["model"], source)
    return model, here


def load_decoder(model: Segmenter, state: Mapping[str, Tensor], source: Path) -> None:
    """Load a checkpoint's "model" strictly.

    Raises:
        UserError: names keys that are missing, unknown or of another shape.
    """
    require_same_decoder(state, _decoder_state(model), source)
    model.mask_decoder.load_state_dict({key.removeprefix(DECODER_PREFIX): value for key, value in state.items()})


def init_decoder(model: Segmenter, info: ModelInfo, source: Path) -> list[str]:
    """Start the decoder of `model` from the one of an earlier checkpoint, class by class.

    Parts that belong to a class are copied where the checkpoint has a class of the same name or alias, and otherwise
    stay as they are. All others are copied.

    Args:
        info: of the model. The frame may be another one.
        source: the checkpoint, or a run's folder.

    Returns:
        The names of the classes that the checkpoint does not have, none in box mode.

    Raises:
        UserError: the file cannot be read, belongs to another SAM file or prompt mode, or is of an earlier version.
    """
    state = load_checkpoint(source, CheckpointFlags(sam="-checkpoint", ours="--init_decoder"))
    replace(state["info"], image_size=info.image_size, resize_mode=info.resize_mode).require_same(info, source)
    ours = _decoder_state(model)
    theirs = dict(state["model"])
    found = [state["classes"].find(c) for c in model.classes]
    if info.prompt_mode == "semantic":
        if not any("detail_path." in key for key in theirs):
            raise UserError(
                f"{source}: a decoder of an earlier version, without the detail path; it can be scored, exported and "
                "resumed, but a new run starts from a decoder of this version"
            )
        known = [(i, j) for i, j in enumerate(found) if j is not None]
        for key in filter(of_classes, ours.keys() & theirs.keys()):
            new = ours[key].clone()
            if new.shape[1:] != theirs[key].shape[1:] or len(theirs[key]) != len(state["classes"]):
                continue  # `load_decoder` names it
            for i, j in known:
                new[i] = theirs[key][j].to(new)
            theirs[key] = new
    load_decoder(model, theirs, source)
    return [c.name for c, j in zip(model.classes, found) if j is None] if info.prompt_mode == "semantic" else []


def require_same_decoder(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path) -> None:
    """Raise a `UserError` unless `state`, of which `source` is the file, has the names and shapes of `expected`."""
    wrong = sorted(expected.keys() ^ state.keys()) or [k for k in expected if state[k].shape != expected[k].shape]
    if wrong:
        some = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(f"{source}: its mask decoder does not fit: {len(wrong)} keys differ ({some})")


def _decoder_state(model: Segmenter) -> dict[str, Tensor]:
    return {DECODER_PREFIX + key: value for key, value in model.mask_decoder.state_dict().items()}


def _decoder_payload(model: Segmenter, info: ModelInfo, *, epoch: int, metrics: Plain, args: Plain) -> Plain:
    return {
        "format_version": FORMAT_VERSION,
        "info": asdict(info),
        "class_names": list(model.classes.names),
        "classes": model.classes.to_plain(),
        "epoch": epoch,
        "metrics": metrics,
        "args": args,
        "model": _decoder_state(model),
    }


def save_whole(path: Path, payload: Mapping[str, object], *, keep: int = 0) -> None:
    """Write with `torch.save`, atomically; `keep` as for `atomic_write`.

    Raises:
        UserError: the file cannot be written.
    """
    # Serialised first: then a full disk is an error of `atomic_write`, which leaves the old file intact.
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    with atomic_write(path, keep=keep) as file:
        file.write(buffer.getbuffer())
