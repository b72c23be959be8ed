"""SIGINT and SIGTERM as a request: the current step is finished and saved before the process ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.runtime import distributed
from utils.runtime.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Whether this process shall stop: after a signal, or after the death of its launcher.

    A process that outlives its launcher would write to the same folder as the restarted job.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._at_once = False

    @property
    def requested(self) -> bool:
        return self._received is not None or distributed.launcher_has_ended()

    @property
    def signalled(self) -> bool:
        """Whether a signal was received."""
        return self._received is not None

    def interrupt(self, message: str) -> Interrupted:
        """The exception to end with; SIGTERM if another process received the signal."""
        return Interrupted(message, self._received or signal.SIGTERM)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals within the context."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Raise `Interrupted` at once for signals within the context, inside `deferred`: all state is saved.

        Raises:
            Interrupted: with `message`.
        """
        self._at_once = True
        try:
            if self._received:
                raise self.interrupt(message)
            try:
                yield
            except _Now:
                raise self.interrupt(message) from None
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        if self._at_once:
            raise _Now


class _Now(BaseException):
    """Raised by the signal handler; a BaseException, so that no `except Exception` catches it."""
