"""How processes share a cache: one run writes at a time, and the processes of a run keep together."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from utils.runtime import distributed
from utils.runtime.errors import Interrupted, UserError
from utils.runtime.files import exists

LOCK = ".lock"
# Encoding can take hours, and the process group's timeout is 10 minutes with NCCL, so processes meet more often.
SECONDS_PER_TRY = 2.0
SECONDS_PER_POLL = 0.5  # the lock may be on a network file system
SECONDS_PER_ROUND = 60.0

Result = TypeVar("Result")


@contextmanager
def exclusive(root: Path) -> Iterator[bool]:
    """A context in which this run has the cache's lock: a second run waits for the first.

    It gives True, or False where there can be no lock: in a read-only folder, or on a file system without locks. There,
    two runs may encode the same images. The system releases the lock of a killed run.
    """
    lock = FileLock(root / LOCK, fallback_to_soft=False)  # a soft lock would outlive a killed run

    def is_held() -> bool | None:
        """None if another run holds the lock, False if there can be none."""
        try:
            lock.acquire(timeout=SECONDS_PER_TRY, poll_interval=SECONDS_PER_POLL)
        except Timeout:
            return None
        except OSError:
            return False
        return True

    try:
        is_waiting = False
        while (has_lock := distributed.on_main(is_held)) is None:
            if not is_waiting:
                distributed.say(f"{root}: another run is writing this cache; waiting for it to finish")
            is_waiting = True
        yield has_lock
    finally:
        lock.release()


def in_rounds(work: Generator[Result, None, None]) -> list[Result]:
    """The results of this process's work, once all processes have finished theirs. Processes meet after each round: a
    fast one never waits past the process group's timeout, and an error stops all of them soon.

    Raises:
        UserError: the first error of any process, in all of them.
        Interrupted: the launcher has ended.
    """
    results: list[Result] = []
    while True:
        started, outcome = time.monotonic(), True
        try:
            for result in work:
                results.append(result)
                if distributed.launcher_has_ended():
                    raise Interrupted("the launcher has ended; start the run again", signal.SIGTERM)
                if time.monotonic() - started > SECONDS_PER_ROUND:
                    outcome = False
                    break
            outcomes = distributed.all_gather(outcome)
        except UserError as error:
            outcomes = distributed.all_gather(error)
        for failed in outcomes:
            if isinstance(failed, UserError):
                work.close()
                raise failed
        if all(outcomes):
            return results


def require_shared_disk(root: Path, read_only: str) -> None:
    """Check that all processes see a file that the main one makes or, in a read-only folder, the file `read_only`.

    Raises:
        UserError: they do not, or the folder cannot be written and has no such file.
    """

    def make_file() -> str:
        name = f".{secrets.token_hex(8)}.tmp"  # a new name, as network file systems cache which names are missing
        try:
            (root / name).touch()
        except OSError as error:
            if not exists(root / read_only):
                raise no_cache_there(root, error) from None
            return read_only
        return name

    if distributed.world_size() == 1:
        return
    name = distributed.on_main(make_file)
    seen = distributed.all_gather(os.path.exists(root / name))
    if name != read_only:
        with suppress(OSError):
            (root / name).unlink()
    if not all(seen):
        raise UserError(
            f"{root}: process {seen.index(False)} of {len(seen)} does not see what process 0 writes there; "
            "set --cache_embeddings to a folder on a disk that all machines share, or to off"
        )


def no_cache_there(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: cannot hold a cache ({error.strerror}); set --cache_embeddings to another folder, or to off"
    )
