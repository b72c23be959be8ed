"""A training run's folder: where it is, what is written into it, and how a stopped run is taken up again."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.model import checkpoint
from utils.model.checkpoint import BEST, LATEST, ModelInfo
from utils.model.segmenter import TRAIN_FLAGS, Segmenter
from utils.runtime import distributed
from utils.runtime.errors import DivergedError, LostPeerError, NotSavedError, UnreadableError, UserError
from utils.runtime.files import exists, free_room, is_folder, listed, remove_temporaries, require_writable, status
from utils.runtime.signals import StopSignals
from utils.train.logger import CONFIG, RunLogger
from utils.train.loop import Progress

AUTO = Path("auto")  # as --resume
_FORMER_LOSSES = {"box": "dice + bce + iou", "semantic": "ce + dice"}  # of runs that do not name theirs


class FinishedError(UserError):
    """The run to resume has all its epochs, or has stopped early."""


@dataclass(frozen=True)
class Latest:
    """A run's `latest`, read to be gone on with."""

    path: Path
    state: Any

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.state["run_state"]["history"]


def find_latest(resume: Path, work_dir: Path, task_name: str) -> Path | None:
    """The file that `--resume` means.

    Args:
        resume: a run's folder, of which it is the newest `latest` that can be read, with a warning if that is an
            earlier one; the file itself; or AUTO for the task's folder in `work_dir` that was last saved to, None if
            it has none.

    Raises:
        UserError: there is a `latest`, or a run's folder, but none that can be read.
    """
    if resume != AUTO:
        return _newest_good(resume) if is_folder(resume) else resume
    pattern = re.compile(re.escape(task_name) + r"-\d{8}-\d{4}(-\d+)?")
    candidates = listed(work_dir) if is_folder(work_dir) else []
    folders = [folder for folder in candidates if pattern.fullmatch(folder.name) and _versions(folder)]
    if not folders:
        return None
    return _newest_good(max(folders, key=_last_saved))


def _last_saved(folder: Path) -> float:
    return max(found.st_mtime for found in map(status, _versions(folder)) if found)


def _newest_good(folder: Path) -> Path:
    """The run's newest `latest` that can be read."""
    if not _versions(folder) and exists(folder / CONFIG):
        raise UserError(
            f"{folder}: nothing was saved there, so there is nothing to resume; run the same command without --resume"
        )
    errors = []
    for path in _versions(folder) or [folder / LATEST]:
        try:
            checkpoint.load_checkpoint(path, TRAIN_FLAGS)
        except UnreadableError:
            raise  # it may be intact, and the one before would cost what was trained since
        except UserError as error:
            errors.append(error)
            continue
        if path.name != LATEST:
            print(
                f"warning: {errors[0] if errors else f'{folder / LATEST} is missing'}; going on from {path.name}, "
                "the one before",
                file=sys.stderr,
                flush=True,
            )
        return path
    raise errors[0]


def _versions(folder: Path) -> list[Path]:
    """The run's `latest` and the numbered ones before it, newest first."""
    number = re.compile(re.escape(Path(LATEST).stem) + r"(?:\.(\d+))?" + re.escape(Path(LATEST).suffix))
    names = listed(folder) if is_folder(folder) else []
    found = {path: match for path in names if (match := number.fullmatch(path.name)) and exists(path)}
    return sorted(found, key=lambda path: int(found[path][1] or 0))


def read_latest(
    path: Path,
    *,
    config: Mapping[str, Any],
    kept: Mapping[str, str],
    num_epochs: int,
    choose_by_miou: bool,
    patience: int | None = None,
) -> Latest:
    """Read a run's `latest` and check all that can be checked before the data and the SAM file are read.

    Args:
        path: as `find_latest` gives it.
        config: the configuration of this start, and
        kept: keys of it that must be as the run began, and how the user knows them. The states that are loaded would
            override some of them without a word; to change the others midway makes two runs of one.
        num_epochs: what the run is to have when it ends, the epochs before resuming included.
        choose_by_miou: as of `Run`.
        patience: as of `plateau`.

    Raises:
        UserError: `path` is nothing, or of a run that began with other settings; a `FinishedError`, of one that has its
            epochs already or has stopped early.
    """
    state = checkpoint.load_checkpoint(path, TRAIN_FLAGS)
    if "run_state" not in state:
        raise UserError(f"{path}: holds no state to resume from; give the run's {LATEST}")
    if not (isinstance(state.get("args"), dict) and _is_run_state(state["run_state"])):
        raise UserError(f"{path}: its state is not one that train_bdd100k.py wrote; start a new run")
    state["args"].setdefault("losses", _FORMER_LOSSES.get(state["args"].get("prompt_mode", "")))
    for key, name in kept.items():
        if key not in state["args"]:
            raise UserError(f"{path}: was begun by a version that knew no {name}; start a new run")
        now, then = config[key], state["args"][key]
        if now != then and key == "losses" and config["prompt_mode"] == state["args"]["prompt_mode"]:
            raise UserError(
                f"{path}: an earlier version trained it with the loss {then}, this one has {now}; start a new run"
            )
        if now != then:
            raise UserError(f"{name} is {now}, but {path} began with {then}; give it so, or start a new run")
    latest = Latest(path, state)
    stopped = plateau(latest.history, patience)
    if len(latest.history) >= num_epochs:
        raise FinishedError(
            f"{path}: already trained for {len(latest.history)} epochs; raise -num_epochs"
            f"{' and --patience' if stopped else ''} to go on"
        )
    if stopped:
        raise FinishedError(f"{path}: {stopped}; raise --patience, or leave it out, to go on")
    if any("val_miou" in record for record in latest.history) and not choose_by_miou:
        raise UserError(f"{path}: its best model was chosen by mIoU; give --val_npy_path again, or start a new run")
    return latest


def plateau(history: Sequence[Mapping[str, Any]], patience: int | None) -> str | None:
    """What to say of a run that stops early: its best validation is followed by `patience` or more that are no better.

    Args:
        history: the run's epochs; those with a "val_miou" had a validation.
        patience: a number of validations; None for no limit.

    Returns:
        One sentence without a full stop; None of a run that is to go on.
    """
    best, miou, since = None, -math.inf, 0
    for record in history:
        if "val_miou" in record and record["val_miou"] > miou:  # the rule by which `best` is written
            best, miou, since = record["epoch"], record["val_miou"], 0
        elif "val_miou" in record:
            since += 1
    if patience is None or since < patience:
        return None
    return (
        f"stopped early after epoch {history[-1]['epoch']}: val mIoU has not improved for {since} validations "
        f"since the best, {miou:.4f} of epoch {best}"
    )


def require_room(work_dir: Path, latest: Latest | None, model: Segmenter, keep_last: int) -> None:
    """Check that the run's folder can be written and has room for its checkpoints, before long work.

    Raises:
        UserError: it cannot, or has not.
    """
    folder = latest.path.parent if latest else work_dir
    require_writable(folder, "-work_dir" if latest is None else "folder: copy the run to one that can be written")
    of_weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # The best has the weights; each latest, those that are kept and the one that is being written, two moments too.
    needed = of_weights * (1 + 3 * (keep_last + 2))
    taken = sum(path.stat().st_size for path in folder.glob("*.pth")) if latest else 0
    place = next(path for path in (folder, *folder.absolute().parents) if exists(path))
    if needed > taken + shutil.disk_usage(place).free:
        raise UserError(
            f"{folder}: the checkpoints need {(needed - taken) / 2**20:.0f} MiB, but {free_room(place)}; "
            f"make room there, {'or ' if latest else ''}lower --keep_last"
            f"{'' if latest else ', or give another -work_dir'}"
        )


def cache_to_use(where: str, latest: Latest | None) -> str:
    """--cache_embeddings, but that `auto` puts no cache under a run that began without."""
    if where == "auto" and latest is not None and latest.state["args"].get("train_cache", "unknown") is None:
        distributed.say(f"{latest.path}: began without a cache of features, and goes on so")
        return "off"
    return where


def require_same_cache(stored_in: str | None, latest: Latest | None) -> None:
    """
    Args:
        stored_in: the type of the cached features that are trained on, None without a cache. A run with the one is not
            the run with the other: features are rounded and reduced, and views drawn from fewer.

    Raises:
        UserError: the run began otherwise.
    """
    then = latest.state["args"].get("train_cache", stored_in) if latest else stored_in
    if stored_in == then:
        return
    assert latest is not None
    if then is None:
        raise UserError(f"{latest.path}: began without a cache; give --cache_embeddings off, or start a new run")
    if stored_in is None:
        raise UserError(
            f"{latest.path}: began with features from a cache; give --cache_embeddings as it began, "
            "and the disk room for it, or start a new run"
        )
    raise UserError(
        f"--cache_dtype is {stored_in}, but {latest.path} began with {then}; give it so, or start a new run"
    )


def require_same_data(data: Mapping[str, str | None], info: ModelInfo, latest: Latest | None) -> None:
    """Check that a resumed run has the model and the data that it began with, before the data are encoded.

    Losses, and the mIoU that the best model is chosen by, cannot be compared with those of other data. Runs of older
    versions have no record of their data.

    Args:
        data: the digest of the split behind each flag, None without one; the keys are "train_data" and "val_data".

    Raises:
        UserError: the run began with others.
    """
    if latest is None:
        return
    latest.state["info"].require_same(info, latest.path)
    for key, flag in {"train_data": "-i", "val_data": "--val_npy_path"}.items():
        then = latest.state["args"].get(key)
        if then is not None and data[key] not in (then, None):
            raise UserError(
                f"{latest.path}: began with other data than {flag} has now (other names, sizes or labels); "
                "give the data that it began with, or start a new run"
            )


def _is_run_state(state: Any) -> bool:
    """Whether all that is looked at, but for the states that the optimizer and the like check themselves, is there."""
    return (
        _has(state, {"history": list, "best_score": float | int, "rng": list, "progress": dict})
        and bool(state["rng"])
        and all(
            checkpoint.is_flat(record)
            and record.get("epoch") == i
            and isinstance(record.get("train_loss"), float)
            and isinstance(record.get("val_miou", 0.0), float)
            for i, record in enumerate(state["history"])
        )
        and _has(state["progress"], {"steps": int, "skipped_steps": int, "sums": Tensor | None, "seconds": float})
        and state["progress"]["steps"] >= 0
    )


def _has(state: Any, kinds: Mapping[str, Any]) -> bool:
    return isinstance(state, dict) and all(key in state and isinstance(state[key], kind) for key, kind in kinds.items())


class Run:
    """Checkpoints, logs, the history of epochs and how far this one has come; the `Watch` of its training.

    Only the main process writes; all of them read on resuming.
    """

    def __init__(
        self,
        *,
        work_dir: Path,
        task_name: str,
        latest: Latest | None,
        model: Segmenter,
        info: ModelInfo,
        stateful: Mapping[str, Any],
        config: Mapping[str, Any],
        choose_by_miou: bool,
        save_every_steps: int,
        keep_last: int,
        tensorboard: bool,
        wandb: bool,
    ) -> None:
        """
        Args:
            latest: what to go on from, in its folder; None makes a new one in `work_dir`.
            stateful: what has `state_dict` and `load_state_dict` and belongs into `latest`.
            config: the resolved configuration; it goes into `config.json` and the checkpoints.
            choose_by_miou: the best epoch has the highest "val_miou", not the lowest "train_loss".
            save_every_steps: optimizer steps of an epoch from one `latest` to the next; 0 for one at its end alone.
            keep_last: how many of the `latest`s before it stay.

        Raises:
            UserError: `latest` does not fit the model, or the folder cannot be made.
        """
        self.model, self.info, self.stateful, self.choose_by_miou = model, info, stateful, choose_by_miou
        # Checkpoints load with weights_only, which knows no Path.
        self.config: dict[str, Any] = {
            key: str(value) if isinstance(value, Path) else value for key, value in config.items()
        }
        self.save_every_steps, self.keep_last = save_every_steps, keep_last
        self.stop = StopSignals()
        self.history: list[dict[str, Any]] = []
        self.best_score = -math.inf
        self.progress = Progress(epoch=0)
        if latest:
            self._resume(latest)
            self.folder = latest.path.parent
            if distributed.is_main():
                remove_temporaries(self.folder)
        else:
            self.folder = distributed.on_main(lambda: _new_folder(work_dir, task_name))
        self.logger = (
            RunLogger(
                self.folder,
                history=self.history,
                config=self.config,
                resumed=latest is not None,
                tensorboard=tensorboard,
                wandb=wandb,
            )
            if distributed.is_main()
            else None
        )
        self._rngs = distributed.all_gather(self._rng())
        self._saved = self._position if latest else None  # what is in `latest`

    def _resume(self, latest: Latest) -> None:
        state, run_state = latest.state, latest.state["run_state"]
        state["info"].require_same(self.info, latest.path)
        checkpoint.load_decoder(self.model, state["model"], latest.path)
        try:
            for name, part in self.stateful.items():
                if run_state[name]:  # that of a scaler is empty without fp16, which -use_amp may since have turned on
                    part.load_state_dict(run_state[name])
            _check_shapes(self.stateful["optimizer"], run_state["progress"]["sums"], len(self.model.LOSSES) + 1)
            rngs = run_state["rng"]
            # With another number of processes there is nothing to equal: what is drawn matters to no result.
            self._set_rng(rngs[distributed.rank() if len(rngs) == distributed.world_size() else 0])
        except Exception:  # each part checks its own state, or stumbles over it, in a way of its own
            raise UserError(f"{latest.path}: its state is of another kind of run; start a new one") from None
        self.history = latest.history
        state = run_state["progress"]
        self.progress = Progress(
            len(self.history),
            state["steps"],
            state["skipped_steps"],
            state["sums"],
            begun=time.monotonic() - state["seconds"],
        )
        # The figure of a run that had no validation data is a loss, and no mIoU is to be measured against it.
        if not self.choose_by_miou or any("val_miou" in record for record in self.history):
            self.best_score = run_state["best_score"]

    def stop_requested(self) -> bool:
        return self.stop.requested

    def step_done(self, progress: Progress, stop: bool) -> None:
        """As of `Watch`.

        Raises:
            Interrupted: `stop` was asked for; the state is saved.
        """
        if stop or (self.save_every_steps and progress.steps % self.save_every_steps == 0):
            self._save_latest()
        if stop:
            message = self._how_to_go_on()
            if message and not self.stop.requested:
                message = f"another process was asked to stop, or its launcher has ended; {message}"
            raise self.stop.interrupt(message)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context of long work that changes no state: all is saved before it, and a signal ends it at once."""
        self._save_latest()
        with self.stop.at_once(self._how_to_go_on()):
            yield

    @contextmanager
    def saving_on_failure(self) -> Iterator[None]:
        """A context of training in which a failure costs no more than the step that it came in.

        All that raises a `UserError` there leaves weights, moments and progress as the last step left them. Another
        process that ends is no exception, as its part of the state, an RNG that no step draws from, is at hand.

        Raises:
            UserError: the failure, with the way to go on.
            Interrupted: another process ended, and the launcher, which knows about it, wants this one to end too.
        """
        try:
            with distributed.telling_lost_peers():
                yield
        except NotSavedError:
            raise
        except UserError as error:
            if self._position != (self._saved or (0, 0)):
                if self.logger:
                    self._write_latest()
                self._saved = self._position  # if not by this process, by the main one, which loses it now
            if isinstance(error, LostPeerError) and self.stop.signalled:
                raise self.stop.interrupt("") from None
            mend = "mend that, and"
            if isinstance(error, DivergedError):  # -lr must stay what it was
                mend = "mend the images" + (" or leave out -use_amp" if self.config.get("use_amp") else "") + ", and"
            raise type(error)(f"{str(error).rstrip()}{self._after_failing(mend)}") from error

    @property
    def _resume_flag(self) -> str:
        return f"--resume {shlex.quote(str(self.folder))}"

    def _how_to_go_on(self) -> str:
        if distributed.local_rank() != 0:  # one for each machine
            return ""
        where = f"epoch {self.progress.epoch}, after {self.progress.steps} optimizer steps"
        return f"run the same command with {self._resume_flag} to go on in {where}"

    def _save_latest(self) -> None:
        """Write `latest`; all processes take part, as each has an RNG."""
        self._rngs = distributed.all_gather(self._rng())
        distributed.on_main(self._write_latest)
        self._saved = self._position

    @property
    def _position(self) -> tuple[int, int]:
        return self.progress.epoch, self.progress.steps

    def _write_latest(self) -> None:
        progress = self.progress
        state = {name: part.state_dict() for name, part in self.stateful.items()}
        state |= {"rng": self._rngs, "history": self.history, "best_score": self.best_score}
        sums = None if progress.sums is None else progress.sums.cpu()
        counts = {"steps": progress.steps, "skipped_steps": progress.skipped_steps}
        state["progress"] = {**counts, "sums": sums, "seconds": progress.seconds}
        with self._telling_what_is_saved():
            checkpoint.save_latest(
                self.folder / LATEST,
                self.model,
                self.info,
                epoch=progress.epoch if progress.steps else progress.epoch - 1,
                metrics=self.history[-1] if self.history else {},
                args=self.config,
                run_state=state,
                keep=self.keep_last,
            )
        self._saved = self._position

    @contextmanager
    def _telling_what_is_saved(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise NotSavedError(f"{error}{self._after_failing()}") from error

    def _after_failing(self, mend: str = "mend that, and") -> str:
        if not self._saved:
            return "; nothing was saved yet"
        return f"; what was saved before it is whole: {mend} go on with {self._resume_flag}"

    def _rng(self) -> dict[str, Tensor]:
        device = next(self.model.mask_decoder.parameters()).device
        return {"cpu": torch.get_rng_state()} | (
            {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        )

    def _set_rng(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        device = next(self.model.mask_decoder.parameters()).device
        if device.type == "cuda" and "cuda" in state:  # a run may go on on another device
            torch.cuda.set_rng_state(state["cuda"], device)

    def finish_epoch(self, record: dict[str, Any]) -> None:
        """Log an epoch and write the checkpoints: `latest` always, `best` if this epoch is the best so far.

        Args:
            record: "epoch", "train_loss", "seconds", "images_per_second", and, where there are any, "val_miou" and
                "skipped_steps".
        """
        self.history.append(record)
        score = record.get("val_miou", -math.inf) if self.choose_by_miou else -record["train_loss"]
        is_best = score > self.best_score
        if is_best:
            self.best_score = score
        self.progress = Progress(record["epoch"] + 1)
        distributed.on_main(lambda: self._write_epoch(record, is_best))
        self._save_latest()  # last, as it says that the epoch is over: who is killed before it makes all of this again
        if self.logger is None:
            return
        miou = f", val mIoU {record['val_miou']:.4f}" if "val_miou" in record else ""
        skipped = f", {record['skipped_steps']} steps skipped (fp16 overflow)" if record.get("skipped_steps") else ""
        print(
            f"epoch {record['epoch']}: loss {record['train_loss']:.4f}{miou}, {record['seconds']:.0f} s, "
            f"{record['images_per_second']:.2f} images/s{skipped}{' (best)' if is_best else ''}",
            flush=True,
        )

    def _write_epoch(self, record: dict[str, Any], is_best: bool) -> None:
        """Write `best`, if this is it, and the logs."""
        assert self.logger is not None, "the main process has one"
        with self._telling_what_is_saved():
            if is_best:
                metadata = {"epoch": record["epoch"], "metrics": record, "args": self.config}
                checkpoint.save_best(self.folder / BEST, self.model, self.info, **metadata)
            self.logger.log_epoch(record)

    def finish(self) -> None:
        """Close the logs and say where everything is, how to train longer, and whether the run has stopped early."""
        if self.logger is None:
            return
        self.logger.close()
        epochs, patience = len(self.history), self.config.get("patience")
        stopped, full = plateau(self.history, patience), epochs >= self.config.get("num_epochs", epochs)
        if stopped and not full:
            print(f"\n{stopped}")
        print(f"\nBest model: {self.folder / BEST}")
        limits = {f"-num_epochs (now {epochs})": full, f"--patience (now {patience})": stopped}
        larger = " and ".join(flag for flag, reached in limits.items() if reached)
        print(f"To train longer: the same command with a larger {larger} and {self._resume_flag}")
        print(f"Log and curve: {self.folder / 'log.jsonl'}, {self.folder / 'loss_curve.png'}")


def _check_shapes(optimizer: torch.optim.Optimizer, sums: Tensor | None, num_sums: int) -> None:
    """Raise ValueError unless what was loaded fits: PyTorch looks at neither before the first step stumbles over it."""
    moments = [(p.shape, value) for p, state in optimizer.state.items() for value in state.values()]
    if any(isinstance(value, Tensor) and value.shape not in ((), shape) for shape, value in moments):
        raise ValueError("moments of other parameters")
    if sums is not None and sums.shape != (num_sums,):
        raise ValueError("sums of other losses")


def _new_folder(work_dir: Path, task_name: str) -> Path:
    """Make `<work_dir>/<task_name>-<YYYYMMDD-HHMM>`, numbered if another run took the name in the same minute."""
    base = work_dir / f"{task_name}-{datetime.now():%Y%m%d-%H%M}"
    for folder in (base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 100))):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); give another --work_dir") from None
    raise UserError(f"{base}: too many runs of this name in one minute; give another -task_name")
