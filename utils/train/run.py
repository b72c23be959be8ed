"""A training run's folder: its checkpoints, its history, and how far it has come."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.model import checkpoint
from utils.model.checkpoint import BEST, LATEST, ModelInfo
from utils.model.segmenter import Segmenter
from utils.runtime import distributed
from utils.runtime.errors import DivergedError, LostPeerError, NotSavedError, UserError
from utils.runtime.files import exists, free_room, remove_temporaries, require_writable
from utils.runtime.progress import about
from utils.runtime.signals import StopSignals
from utils.train.logger import Config, Record, RunLogger
from utils.train.loop import Progress, mean_losses
from utils.train.optim import TrainState
from utils.train.resume import ResumeState, RunState, plateau
from utils.train.samples import ValidationSample


@dataclass(frozen=True)
class RunSettings:
    """Where a run is kept, when it ends, and what it saves and logs."""

    work_dir: Path
    task_name: str
    num_epochs: int
    patience: int | None = None  # validations without improvement before it stops early; None or 0 for no limit
    choose_by_miou: bool = False  # the best epoch has the highest "val_miou", not the lowest "train_loss"
    save_every_steps: int = 0  # optimizer steps from one `latest` to the next; 0 for one an epoch
    keep_last: int = 1  # earlier `latest` checkpoints that are kept
    val_every: int = 1  # epochs from one validation to the next
    use_tensorboard: bool = False
    use_wandb: bool = False


STEPS_A_POINT = 10  # optimizer steps in a point of the curves within an epoch


def require_room(settings: RunSettings, resume: ResumeState | None, model: Segmenter) -> None:
    """Check before long work that the run's folder is writable and has room for the checkpoints.

    Raises:
        UserError: it is not, or has not.
    """
    folder = resume.folder if resume else settings.work_dir
    require_writable(folder, "folder: copy the run to a writable one" if resume else "-work_dir")
    of_weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # `best` holds the weights; each `latest` (this one, those that are kept, the one being written) two moments too.
    needed = of_weights * (1 + 3 * (settings.keep_last + 2))
    taken = sum(path.stat().st_size for path in folder.glob("*.pth")) if resume else 0
    place = next(path for path in (folder, *folder.absolute().parents) if exists(path))
    if needed > taken + shutil.disk_usage(place).free:
        raise UserError(
            f"{folder}: the checkpoints need {(needed - taken) / 2**20:.0f} MiB, but {free_room(place)}; "
            f"make room there, {'or ' if resume else ''}lower --keep_last"
            f"{'' if resume else ', or give another -work_dir'}"
        )


class Run:
    """Checkpoints, logs, history and progress of a run; the `Watch` of its training.

    Only the main process writes. All processes restore its state on resuming.
    """

    def __init__(
        self,
        settings: RunSettings,
        model: Segmenter,
        info: ModelInfo,
        state: TrainState,
        config: Config,
        resume: ResumeState | None = None,
    ) -> None:
        """Make the run's folder, or restore the run that is resumed.

        Args:
            state: is loaded on resuming, and saved in `latest`.
            config: the resolved configuration; it goes into `config.json` and the checkpoints.

        Raises:
            UserError: `resume` does not fit the model, or the folder cannot be made.
        """
        self.settings, self.model, self.info, self.state, self.config = settings, model, info, state, config
        self.stop = StopSignals()
        self.history: list[Record] = []
        self.best_score = -math.inf
        self.best_epoch: int | None = None
        self.progress = Progress(epoch=0)
        self._logged_sums: Tensor | None = None  # `Progress.sums` at the last point of the curves within the epoch
        self.stopped_early: str | None = None
        if resume:
            self._restore(resume)
            self.folder = resume.folder
            if distributed.is_main():
                remove_temporaries(self.folder)
        else:
            self.folder = distributed.on_main(lambda: _new_folder(settings.work_dir, settings.task_name))
        self.progress.title = self._title(self.progress.epoch)
        self.logger = (
            RunLogger(
                self.folder,
                history=self.history,
                config=config,
                resumed=resume is not None,
                tensorboard=settings.use_tensorboard,
                wandb=settings.use_wandb,
                parts=model.LOSSES,
                steps=self._steps_of_epochs() + self.progress.steps,
            )
            if distributed.is_main()
            else None
        )
        self._rngs = distributed.all_gather(self._rng())
        self._saved = self._position if resume else None  # the position of `latest`

    def _restore(self, resume: ResumeState) -> None:
        saved = resume.run_state
        resume.info.require_same(self.info, resume.path)
        checkpoint.load_decoder(self.model, resume.decoder, resume.path)
        try:
            self.state.load_state_dict(saved)
            num_sums = len(self.model.LOSSES) + 1
            self.progress = Progress.restored(len(resume.history), saved["progress"], num_sums)
            self._logged_sums = saved.get("logged_sums")
            if self._logged_sums is not None and self._logged_sums.shape != (num_sums,):
                raise ValueError("sums of other losses")
            # With another number of processes no RNG fits; no result depends on what is drawn.
            rngs = saved["rng"]
            self._set_rng(rngs[distributed.rank() if len(rngs) == distributed.world_size() else 0])
        except Exception:  # each part rejects a foreign state in its own way
            raise UserError(f"{resume.path}: its state does not fit this model; start a new run") from None
        self.history = resume.history
        # Without validation the best score is a loss, which no mIoU may be compared with.
        if not self.settings.choose_by_miou or any("val_miou" in record for record in self.history):
            self.best_score = saved["best_score"]
            is_best = (record["epoch"] for record in self.history if self._score(record) == self.best_score > -math.inf)
            self.best_epoch = next((int(epoch) for epoch in is_best), None)

    def _score(self, record: Record) -> float:
        """What the best model has the most of."""
        return record.get("val_miou", -math.inf) if self.settings.choose_by_miou else -record["train_loss"]

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, from the one under way, until the run stops early."""
        while len(self.history) < self.settings.num_epochs and not self.stopped_early:
            yield len(self.history)

    def validates(self, epoch: int) -> bool:
        """Whether a validation follows the epoch."""
        last = epoch + 1 == self.settings.num_epochs
        return self.settings.choose_by_miou and (last or (epoch + 1) % self.settings.val_every == 0)

    def stop_requested(self) -> bool:
        return self.stop.requested

    def save_due(self, steps: int) -> bool:
        every = self.settings.save_every_steps
        return bool(every) and steps % every == 0

    def step_done(self, progress: Progress, stop: bool) -> None:
        """Log, and save the state where it is due. See `Watch`.

        Raises:
            Interrupted: `stop` was requested; the state is saved.
        """
        if self.logger:
            assert progress.sums is not None, "a step was taken"
            loss = mean_losses(self.model.LOSSES, progress.sums)["loss"]
            progress.note = f"loss {loss:.4f}, run {tqdm.format_interval(self._seconds_left())} left"
            self._log_steps(progress, progress.sums)
        if stop or self.save_due(progress.steps):
            self._save_latest()
        if stop:
            message = self._how_to_resume()
            if message and not self.stop.requested:
                message = f"another process was asked to stop, or its launcher has ended; {message}"
            raise self.stop.interrupt(message)

    def _log_steps(self, progress: Progress, sums: Tensor) -> None:
        """Log the mean losses of the last `STEPS_A_POINT` steps. The sums are on the host: no GPU is waited for."""
        assert self.logger is not None, "the main process has one"
        if not self.logger.takes_steps or (progress.steps % STEPS_A_POINT and progress.steps != progress.num_steps):
            return
        new = sums if self._logged_sums is None else sums - self._logged_sums
        figures = mean_losses(self.model.LOSSES, new)
        lr = float(self.state.scheduler.get_last_lr()[0])
        self.logger.log_step(self._steps_of_epochs() + progress.steps, {**figures, "lr": lr})
        self._logged_sums = sums

    def _steps_of_epochs(self) -> int:
        """Optimizer steps in the finished epochs."""
        return sum(int(record.get(key, 0)) for record in self.history for key in ("optimizer_steps", "skipped_steps"))

    def _seconds_left(self) -> float:
        """An estimate of the time to the end of the last epoch: at the pace of this one, and the last validation's."""
        progress, last = self.progress, self.settings.num_epochs
        if progress.steps and progress.num_steps:
            share = progress.steps / progress.num_steps
            an_epoch = progress.seconds / share
        else:
            share, an_epoch = 0.0, self.history[-1]["seconds"] if self.history else 0.0
        validation = next((record["val_seconds"] for record in reversed(self.history) if "val_seconds" in record), 0.0)
        return (last - progress.epoch - share) * an_epoch + validation * sum(
            map(self.validates, range(progress.epoch, last))
        )

    def _title(self, epoch: int) -> str:
        """An epoch's name on the screen, where epochs count from 1."""
        return f"epoch {epoch + 1}/{self.settings.num_epochs}"

    @contextmanager
    def training(self) -> Iterator[None]:
        """A context in which signals are deferred to the next step, and a failure costs no more than its step.

        A `UserError` leaves weights, moments and progress as the last step left them. So does the end of another
        process: it has the same state as this one, except for its RNG, which no step uses.

        Raises:
            UserError: the failure, with the command to resume.
            Interrupted: another process ended, and the launcher asked this one to end too.
        """
        with self.stop.deferred():
            try:
                with distributed.telling_lost_peers():
                    yield
            except NotSavedError:
                raise
            except UserError as error:
                if self._position != (self._saved or (0, 0)):
                    if self.logger:
                        self._write_latest()
                    self._saved = self._position  # the main process, if not this one, saves it now
                if isinstance(error, LostPeerError) and self.stop.signalled:
                    raise self.stop.interrupt("") from None
                fix = "Fix the problem"
                if isinstance(error, DivergedError):  # -lr cannot change within a run
                    fix = "Fix the images" + (" or add -use_amp False" if self.config.get("use_amp") else "")
                raise type(error)(f"{str(error).rstrip()}{self._after_failing(fix)}") from error

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context of long work that changes no state: everything is saved first, and a signal ends it at once."""
        self._save_latest()
        with self.stop.at_once(self._how_to_resume()):
            yield

    @property
    def _resume_command(self) -> str:
        return f"{distributed.launch_command()} --resume {shlex.quote(str(self.folder))}"

    def _how_to_resume(self) -> str:
        if distributed.local_rank() != 0:  # one for each machine
            return ""
        steps = f"{self.progress.steps} optimizer step{'s' * (self.progress.steps != 1)}"
        return f"stopped in {self._title(self.progress.epoch)}, after {steps}; resume with: {self._resume_command}"

    def _save_latest(self) -> None:
        """Write `latest`. All processes take part, as each has an RNG."""
        self._rngs = distributed.all_gather(self._rng())
        distributed.on_main(self._write_latest)
        self._saved = self._position

    @property
    def _position(self) -> tuple[int, int]:
        return self.progress.epoch, self.progress.steps

    def _write_latest(self) -> None:
        progress = self.progress
        if self.logger:
            self.logger.flush()
        run_state: RunState = {
            **self.state.state_dict(),  # type: ignore[typeddict-item]
            "rng": self._rngs,
            "history": self.history,
            "best_score": self.best_score,
            "progress": progress.saved(),
            "logged_sums": self._logged_sums,
        }
        with self._telling_what_is_saved():
            checkpoint.save_latest(
                self.folder / LATEST,
                self.model,
                self.info,
                epoch=progress.epoch if progress.steps else progress.epoch - 1,
                metrics=self.history[-1] if self.history else {},
                args=self.config,
                run_state=dict(run_state),
                keep=self.settings.keep_last,
            )
        self._saved = self._position

    @contextmanager
    def _telling_what_is_saved(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise NotSavedError(f"{error}{self._after_failing()}") from error

    def _after_failing(self, fix: str = "Fix the problem") -> str:
        if not self._saved:
            return "; nothing was saved yet"
        return f". The last checkpoint is intact. {fix} and resume with: {self._resume_command}"

    def _rng(self) -> dict[str, Tensor]:
        device = next(self.model.mask_decoder.parameters()).device
        return {"cpu": torch.get_rng_state()} | (
            {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        )

    def _set_rng(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        device = next(self.model.mask_decoder.parameters()).device
        if device.type == "cuda" and "cuda" in state:  # a run may resume on another device
            torch.cuda.set_rng_state(state["cuda"], device)

    def finish_epoch(self, record: Record, samples: Sequence[ValidationSample] = ()) -> None:
        """Log an epoch and write the checkpoints: `latest` always, `best` if this epoch is the best so far.

        Args:
            record: "epoch", "train_loss", "seconds", "images_per_second", and, where there are any, "val_miou",
                "val_seconds", the IoU of each class, and "skipped_steps".
            samples: of the validation, in the main process.
        """
        self.history.append(record)
        epoch, score = int(record["epoch"]), self._score(record)
        is_best = score > self.best_score
        if is_best:
            self.best_score, self.best_epoch = score, epoch
        self.progress = Progress(epoch + 1, title=self._title(epoch + 1))
        self._logged_sums = None
        # The main process decides for all: machines may round mIoU differently.
        self.stopped_early = distributed.on_main(lambda: self._write_epoch(record, is_best, samples))
        self._save_latest()  # last, as it ends the epoch: a kill before it repeats all of this
        if self.logger is None:
            return
        miou = f", val mIoU {record['val_miou']:.4f}" if "val_miou" in record else ""
        skipped = f", {record['skipped_steps']} steps skipped (fp16 overflow)" if record.get("skipped_steps") else ""
        is_last = self.stopped_early or epoch + 1 >= self.settings.num_epochs
        left = "" if is_last else f"; {about(self._seconds_left())} left"
        print(
            f"{self._title(epoch)}: loss {record['train_loss']:.4f}{miou}, {record['seconds']:.0f} s, "
            f"{record['images_per_second']:.2f} images/s{skipped}{' (best)' if is_best else ''}{left}",
            flush=True,
        )

    def _write_epoch(self, record: Record, is_best: bool, samples: Sequence[ValidationSample]) -> str | None:
        """Write `best`, if this is it, and the logs; why the run stops early, if it does."""
        assert self.logger is not None, "the main process has one"
        with self._telling_what_is_saved():
            if is_best:
                metadata = {"epoch": record["epoch"], "metrics": record, "args": self.config}
                checkpoint.save_best(self.folder / BEST, self.model, self.info, **metadata)  # type: ignore[arg-type]
            self.logger.log_epoch(record, steps=self._steps_of_epochs(), best=self.best_epoch, samples=samples)
        return plateau(self.history, self.settings.patience)

    def finish(self) -> None:
        """Close the logs; print where the results are, how to train longer, and whether the run stopped early."""
        if self.logger is None:
            return
        self.logger.close()
        epochs, patience = len(self.history), self.settings.patience
        full = epochs >= self.settings.num_epochs
        if self.stopped_early and not full:
            print(f"\n{self.stopped_early}")
        print(f"\nBest model: {self.folder / BEST}")
        limits = {f"-num_epochs (now {epochs})": full, f"--patience (now {patience})": self.stopped_early}
        larger = " and ".join(flag for flag, reached in limits.items() if reached)
        print(f"To train longer, add a larger {larger} to: {self._resume_command}")
        print(f"Log and curve: {self.folder / 'log.jsonl'}, {self.folder / 'loss_curve.png'}")


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
