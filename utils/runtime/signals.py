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
    """Whether this process was asked to stop: by a signal, or by the death of the launcher that started it.

    Workers that outlive their launcher would keep writing to a folder that the restarted job also uses.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._at_once = False

    @property
    def requested(self) -> bool:
        return self._received is not None or distributed.launcher_has_ended()

    @property
    def signalled(self) -> bool:
        """Whether it was by a signal."""
        return self._received is not None

    def interrupt(self, message: str) -> Interrupted:
        """The exception to end with; its signal is SIGTERM if another process was asked."""
        return Interrupted(message, self._received or signal.SIGTERM)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A context in which a signal is only noted."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """A context inside `deferred` in which a signal raises `Interrupted` at once: everything is saved.

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
    """Thrown by the signal handler; no `except Exception` on the way may keep it."""
