"""A run's readable files: its starts, its configuration, its figures and curves, pictures; TensorBoard and W&B.

In `log.jsonl`, `results.csv`, TensorBoard and W&B, epochs count from 0; in names of pictures and in charts, from 1.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import utils
from utils.data.classes import IGNORE_LABEL
from utils.evaluate.charts import is_number, save_class_curves, save_loss_curve
from utils.runtime import distributed
from utils.runtime.errors import UserError, printable
from utils.runtime.files import atomic_write, is_file, make_folder
from utils.train.samples import Picture, ValidationSample, mosaic

Config = dict[str, int | float | str | None]  # flags and what was derived from them, by name
Record = dict[str, float]  # an epoch's figures by name

CONFIG = "config.json"
STARTS = "starts.jsonl"
MAX_STARTS = 1 << 20  # bytes of it that are kept; a start has some hundred
WANDB_ID = "wandb_id.txt"  # with it, a resumed run continues the same W&B run
SAMPLES = "val_samples"  # a folder with a mosaic for each validation
CLASS_IOU = "val_iou/"  # before a class's name, in an epoch's figures

# The groups in which TensorBoard and W&B show an epoch's figures; the others are of training.
_GROUPS = {"val_miou": "val/miou", "val_seconds": "speed/val_seconds"} | {
    key: f"speed/{key}" for key in ("seconds", "images_per_second")
}


def require_loggers(*, tensorboard: bool, wandb: bool) -> None:
    """Check before long work that the requested loggers can be imported, and that W&B is logged in.

    Raises:
        UserError: a logger cannot be used.
    """
    if tensorboard:
        _summary_writer()
    if wandb:
        login = _wandb("login")
        if os.environ.get("WANDB_MODE", "online") in ("online", "shared", "run"):
            with _wandb_problems():
                login()


class RunLogger:
    """Writes each epoch's figures, curves and pictures and, if requested, TensorBoard and W&B.

    TensorBoard and W&B also get the loss within an epoch. TensorBoard's epochs and steps are two runs, because it drops
    what a resumed run will write again by a single number.
    """

    def __init__(
        self,
        folder: Path,
        *,
        history: list[Record],
        config: Config,
        resumed: bool,
        tensorboard: bool,
        wandb: bool,
        parts: Sequence[str] = (),
        steps: int = 0,
    ) -> None:
        """Open the loggers, and record this start and its configuration.

        Args:
            folder: the run's folder.
            history: the epochs before this start; `log.jsonl` and the like are cut back to them.
            config: the resolved configuration, written to `config.json`.
            resumed: whether the run is resumed; TensorBoard or W&B may then fail, with a warning.
            parts: names of the loss's parts, for the curve.
            steps: the run's optimizer steps before this start.

        Raises:
            UserError: TensorBoard or W&B cannot be used and the run is new, or a file cannot be written.
        """
        self.folder = folder
        self.history = list(history)
        self.parts = parts
        self._warned = False

        def start(make: Callable[[], Any]) -> Any:
            try:
                return make()
            except UserError as error:
                if not resumed:
                    raise
                self._warn(str(error))
                return None

        board = folder / "tensorboard"
        is_new = not (history and any(board.glob("events.*")))
        self._writer = start(lambda: _tensorboard_writer(board, len(history))) if tensorboard else None
        self._step_writer = start(lambda: _tensorboard_writer(board / "steps", steps + 1)) if self._writer else None
        self._wandb = start(lambda: _wandb_run(folder, config)) if wandb else None
        with self._dispensable():
            if self._writer and is_new:
                _add_hyper_parameters(self._writer, config)
        # A link in a folder from elsewhere is replaced, not read or written through.
        starts = folder / STARTS
        has_starts = is_file(starts) and not starts.is_symlink() and starts.stat().st_size < MAX_STARTS
        earlier = starts.read_bytes() if has_starts else b""
        with atomic_write(starts) as file:
            file.write(earlier + (json.dumps(_this_start(len(history))) + "\n").encode())
        with atomic_write(folder / CONFIG) as file:
            file.write((json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        pictures = self.folder / SAMPLES
        if pictures.is_symlink():
            pictures.unlink()
        counted = {_picture_name(epoch) for epoch in range(len(history))}
        for path in pictures.glob("epoch_*.jpg"):
            if path.name not in counted:  # of an epoch that is trained again
                path.unlink()
        self._write_log()

    @property
    def takes_steps(self) -> bool:
        """Whether `log_step` has somewhere to write to."""
        return self._step_writer is not None or self._wandb is not None

    def log_step(self, step: int, figures: Record) -> None:
        """Record figures of the run's last optimizer steps, up to `step` of them in all."""
        scalars = {f"step/{key}": value for key, value in figures.items()}
        with self._dispensable():
            if self._step_writer:
                for tag, value in scalars.items():
                    self._step_writer.add_scalar(tag, value, step)
        with self._dispensable():
            if self._wandb:
                self._wandb.log(scalars, step=step)

    def flush(self) -> None:
        """Hand over what is recorded, before a checkpoint from which it will not be recorded again."""
        with self._dispensable():
            if self._step_writer:
                self._step_writer.flush()

    def log_epoch(
        self, record: Record, *, steps: int = 0, best: int | None = None, samples: Sequence[ValidationSample] = ()
    ) -> None:
        """Record an epoch; `record["epoch"]` is its number, from 0. TensorBoard and W&B may fail, with a warning.

        Args:
            steps: the run's optimizer steps at its end.
            best: the epoch of the best model so far.
            samples: of this epoch's validation.

        Raises:
            UserError: a file cannot be written.
        """
        self.history.append(record)
        self._write_log()
        save_loss_curve(self.folder / "loss_curve.png", self.history, self.parts, best)
        epoch = int(record["epoch"])
        if names := [key.removeprefix(CLASS_IOU) for key in record if key.startswith(CLASS_IOU)]:
            save_class_curves(self.folder / "class_iou.png", self.history, CLASS_IOU, names, best)
        picture = Picture.of(mosaic(samples)) if samples else None
        if picture:
            make_folder(self.folder / SAMPLES, "-work_dir")
            with atomic_write(self.folder / SAMPLES / _picture_name(epoch)) as file:
                file.write(picture.jpeg)
        scalars = {_tag(key): value for key, value in record.items() if is_number(value) and key != "epoch"}
        with self._dispensable():
            if self._writer:
                for tag, value in scalars.items():
                    self._writer.add_scalar(tag.replace(" ", "_"), value, epoch)
                if picture:
                    _add_picture(self._writer, "val/samples", picture, epoch)
                self._writer.flush()
        with self._dispensable():
            if self._wandb:
                pictures = {"val/samples": [_wandb_picture(sample) for sample in samples]} if samples else {}
                self._wandb.log({"epoch": epoch, **scalars, **pictures}, step=steps)

    def close(self) -> None:
        with self._dispensable():
            for writer in filter(None, (self._writer, self._step_writer)):
                writer.close()
        with self._dispensable():
            if self._wandb:
                self._wandb.finish()

    def _write_log(self) -> None:
        # Rewritten as a whole, as an appended line could be cut off.
        with atomic_write(self.folder / "log.jsonl") as file:
            file.write("".join(map(_line, self.history)).encode())
        with atomic_write(self.folder / "results.csv") as file:
            file.write(_table(self.history).encode())

    @contextmanager
    def _dispensable(self) -> Iterator[None]:
        """A context of TensorBoard or W&B, whose failure does not stop the run; the first one is printed."""
        try:
            yield
        except Exception as error:  # a full disk, a lost connection or process: each has its own
            self._warn(_reason(error))

    def _warn(self, reason: str) -> None:
        if not self._warned:
            print(
                f"warning: TensorBoard or W&B failed ({reason}); training continues, and "
                f"{self.folder / 'log.jsonl'} has every figure",
                file=sys.stderr,
                flush=True,
            )
        self._warned = True


def _this_start(epoch: int) -> dict[str, str | int | None]:
    """What tells later how this start was made: the command, where, and the versions; None where unknown."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "epoch": epoch,
        "command": distributed.command_line(),
        "folder": os.getcwd(),
        "version": utils.__version__,
        "commit": _commit(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _commit(clone: Path) -> str | None:
    """The hash of a clone's commit, with "-dirty" if files differ from it; None if it is no clone, or without git."""
    if not (clone / ".git").exists():  # do not name the commit of a repository that an installation lies in
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip() or None
    return None


def _line(record: Record) -> str:
    """The record as strict JSON, which has neither NaN nor infinity: they become null."""
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(values) + "\n"


def _table(history: Sequence[Record]) -> str:
    """The records as CSV: a column for each figure of any of them; what is missing or not finite is empty."""
    # An epoch with a validation has all figures, in their order.
    columns = dict.fromkeys(key for record in sorted(history, key=len, reverse=True) for key in record)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["epoch"], lineterminator="\n")
    writer.writeheader()
    for record in history:
        writer.writerow({key: value for key, value in record.items() if is_number(value)})
    return text.getvalue()


def _picture_name(epoch: int) -> str:
    return f"epoch_{epoch + 1:03d}.jpg"


def _tag(key: str) -> str:
    """The group and name of an epoch's figure in TensorBoard and W&B."""
    return key if key.startswith(CLASS_IOU) else _GROUPS.get(key, f"train/{key.removeprefix('train_')}")


def _add_hyper_parameters(writer: Any, config: Config) -> None:
    """Add the configuration for TensorBoard's HPARAMS page, beside the figures that it compares runs by."""
    from torch.utils.tensorboard.summary import hparams

    values = {key: value for key, value in config.items() if value is not None}
    for summary in hparams(values, {"val/miou": 0.0, "train/loss": 0.0}):
        writer.file_writer.add_summary(summary)


def _add_picture(writer: Any, tag: str, picture: Picture, step: int) -> None:
    """Add a JPEG; `add_image` would make a PNG of several times the size."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    size = {"height": picture.height, "width": picture.width}
    image = Summary.Image(**size, colorspace=3, encoded_image_string=picture.jpeg)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _wandb_picture(sample: ValidationSample) -> Any:
    """A picture with two masks, which W&B's viewer shows and hides class by class."""
    names = dict(enumerate(sample.classes.names))
    masks = {
        "ground truth": {"mask_data": sample.target, "class_labels": names | {IGNORE_LABEL: "not labelled"}},
        "prediction": {"mask_data": sample.prediction, "class_labels": names | {IGNORE_LABEL: "no class"}},
    }
    caption = f"{printable(sample.name)}, mIoU {sample.miou:.3f}"
    return _wandb("Image")(sample.image, masks=masks, caption=caption, file_type="jpg")


def _tensorboard_writer(folder: Path, first_step: int) -> Any:
    """A writer that drops what an earlier start wrote of `first_step` and later ones."""
    writer = _summary_writer()
    try:
        return writer(str(folder), purge_step=first_step)
    except Exception as error:  # the folder is not writable, or libraries do not fit each other
        raise UserError(f"--use_tensorboard: {_reason(error)}") from None


def _summary_writer() -> Any:
    return _import("torch.utils.tensorboard", "SummaryWriter", "--use_tensorboard", "TensorBoard", "tensorboard")


def _wandb(attribute: str) -> Any:
    return _import("wandb", attribute, "-use_wandb", "Weights & Biases", "wandb")


def _import(module: str, attribute: str, flag: str, name: str, package: str) -> Any:
    """Import `attribute` from `module`, which needs `package`."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a version conflict may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise UserError(f'{flag} needs {name}: pip install -e ".[log]"') from None
        where = None
        with suppress(Exception):  # the module has no location
            spec = importlib.util.find_spec(package)
            where = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
        reason = f"{type(error).__name__}: {_reason(error)}"
        raise UserError(
            f"{flag}: {name} cannot be imported from {where or package} ({reason}); "
            f"pip install -U {package}, or remove the other file or folder of that name"
        ) from None


@contextmanager
def _wandb_problems() -> Iterator[None]:
    """A context that turns any error of W&B into one line."""
    try:
        yield
    except (Exception, SystemExit) as error:  # no account, no network, a service that does not start
        reason = _reason(error)
        raise UserError(f"-use_wandb: {reason} (WANDB_MODE=offline needs neither account nor network)") from None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _wandb_run(folder: Path, config: Config) -> Any:
    init = _wandb("init")
    # Without a connection, finishing would wait for ever; unsent figures stay in the folder for `wandb sync`.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
    settings: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = (folder / WANDB_ID).read_text().strip()
        if re.fullmatch(r"[\w-]{1,64}", known, re.ASCII):
            settings = {"id": known, "resume": "allow"}
    # WANDB_MODE=offline keeps everything in the run's folder.
    with _wandb_problems():
        run = init(project="sam-bdd100k", name=folder.name, dir=str(folder), config=config, **settings)
    with atomic_write(folder / WANDB_ID) as file:
        file.write(f"{run.id}\n".encode())
    with _wandb_problems():
        for group in ("train", "val", CLASS_IOU.rstrip("/"), "speed"):  # W&B's own step is the optimizer's
            run.define_metric(f"{group}/*", step_metric="epoch")
    return run
