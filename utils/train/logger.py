"""A run's readable files: its starts, its configuration, one JSON line an epoch, a curve; TensorBoard and W&B."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import utils
from utils.evaluate.plots import save_loss_curve
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, is_file

Config = dict[str, int | float | str | None]  # flags and what was derived from them, by name
Record = dict[str, float]  # an epoch's figures by name

CONFIG = "config.json"
STARTS = "starts.jsonl"
MAX_STARTS = 1 << 20  # bytes of it that are kept; a start has some hundred
WANDB_ID = "wandb_id.txt"  # with it, a resumed run continues the same W&B run


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
    """Writes each epoch's figures to `log.jsonl`, `loss_curve.png` and, if requested, TensorBoard and W&B."""

    def __init__(
        self,
        folder: Path,
        *,
        history: list[Record],
        config: Config,
        resumed: bool,
        tensorboard: bool,
        wandb: bool,
    ) -> None:
        """Open the loggers, and record this start and its configuration.

        Args:
            folder: the run's folder.
            history: the epochs before this start; `log.jsonl` is cut back to them.
            config: the resolved configuration, written to `config.json`.
            resumed: whether the run is resumed; TensorBoard or W&B may then fail, with a warning.

        Raises:
            UserError: TensorBoard or W&B cannot be used and the run is new, or a file cannot be written.
        """
        self.folder = folder
        self.history = list(history)
        self._warned = False

        def start(make: Callable[[], Any]) -> Any:
            try:
                return make()
            except UserError as error:
                if not resumed:
                    raise
                self._warn(str(error))
                return None

        self._writer = start(lambda: _tensorboard_writer(folder, first_epoch=len(history))) if tensorboard else None
        self._wandb = start(lambda: _wandb_run(folder, config)) if wandb else None
        # A link in a folder from elsewhere is replaced, not read or written through.
        starts = folder / STARTS
        has_starts = is_file(starts) and not starts.is_symlink() and starts.stat().st_size < MAX_STARTS
        earlier = starts.read_bytes() if has_starts else b""
        with atomic_write(starts) as file:
            file.write(earlier + (json.dumps(_this_start(len(history))) + "\n").encode())
        with atomic_write(folder / CONFIG) as file:
            file.write((json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        self._write_log()

    def log_epoch(self, record: Record) -> None:
        """Record an epoch; `record["epoch"]` is its number, from 0. TensorBoard and W&B may fail, with a warning.

        Raises:
            UserError: `log.jsonl` or the curve cannot be written.
        """
        self.history.append(record)
        self._write_log()
        save_loss_curve(self.folder / "loss_curve.png", self.history)
        scalars = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "epoch"}
        with self._dispensable():
            if self._writer:
                for key, value in scalars.items():
                    self._writer.add_scalar(key, value, record["epoch"])
                self._writer.flush()
        with self._dispensable():
            if self._wandb:
                self._wandb.log(scalars, step=record["epoch"])

    def close(self) -> None:
        with self._dispensable():
            if self._writer:
                self._writer.close()
        with self._dispensable():
            if self._wandb:
                self._wandb.finish()

    def _write_log(self) -> None:
        # Rewritten as a whole, as an appended line could be cut off.
        with atomic_write(self.folder / "log.jsonl") as file:
            file.write("".join(map(_line, self.history)).encode())

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


def _tensorboard_writer(folder: Path, first_epoch: int) -> Any:
    writer = _summary_writer()
    try:
        return writer(str(folder / "tensorboard"), purge_step=first_epoch)
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
    return run
