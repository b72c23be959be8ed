"""The fine-tuned model that is exported, and what the exported file says about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import utils
from utils.data.classes import BDD100K
from utils.model import checkpoint
from utils.model.checkpoint import Checkpoint, ModelInfo
from utils.model.segmenter import Segmenter
from utils.runtime.choices import MODEL_TYPES
from utils.runtime.errors import UserError


@dataclass(frozen=True)
class Options:
    """How a model is exported; a box model has only `precision`."""

    image_layout: str  # of IMAGE_LAYOUTS
    image_dtype: str  # uint8 of 0..255, or float32 of [0, 1]
    logits: bool  # also return the logits
    precision: str  # of EXPORT_PRECISIONS; int8 is for ONNX alone


@dataclass(frozen=True)
class Trained:
    """A fine-tuned model on the CPU, in eval mode, and its origin."""

    model: Segmenter
    info: ModelInfo
    epoch: int | None
    miou: float | None  # of the run's validation; None without one
    state: Checkpoint | None = None  # the file that the model was built from

    def metadata(self) -> dict[str, str]:
        """What a program needs to use the model, and where the model comes from."""
        table = self.model.classes
        colors = [list(c.color) for c in table]
        classes = {"class_names": json.dumps(table.names), "class_colors": json.dumps(colors)}
        if table != BDD100K:  # a file without the entry has BDD100K's
            classes["classes"] = json.dumps(table.to_plain())
        return {key: str(value) for key, value in asdict(self.info).items()} | classes | self._provenance()

    def _provenance(self) -> dict[str, str]:
        origin = {"version": utils.__version__, "epoch": self.epoch, "val_miou": self.miou}
        return {key: str(value) for key, value in origin.items() if value is not None}


def load_trained(
    model_checkpoint: Path,
    sam_checkpoint: Path,
    *,
    model_type: str | None = None,
    check_hash: bool = False,
    before_sam: Callable[[ModelInfo], None] = lambda info: None,
) -> Trained:
    """Load a checkpoint and the SAM file that it was trained on.

    Args:
        model_type: None for the checkpoint's.
        before_sam: further checks, which need not wait for the large file.

    Raises:
        UserError: a file is missing, damaged or of another kind, or the two do not belong together.
    """
    state = checkpoint.load_checkpoint(model_checkpoint)
    info = state["info"]
    if info.model_type not in MODEL_TYPES:
        types = ", ".join(MODEL_TYPES)
        raise UserError(f"{model_checkpoint}: model type {info.model_type} is unknown; give a checkpoint of {types}")
    checkpoint.require_model_type(state, model_type or info.model_type, model_checkpoint)
    before_sam(info)
    model, info = checkpoint.rebuild(state, model_checkpoint, sam_checkpoint, check_hash=check_hash)
    epoch, miou = state.get("epoch"), state.get("metrics", {}).get("val_miou")
    return Trained(
        model.eval(), info, epoch if isinstance(epoch, int) else None, miou if isinstance(miou, float) else None, state
    )
