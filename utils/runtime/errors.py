"""The exceptions that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one line that names the file or flag and the fix.

    Scripts turn it into `error: <message>` on stderr and exit status 1 (see `utils.runtime.cli.run`); anything else
    that escapes is a bug and keeps its traceback.
    """


class UnreadableError(UserError):
    """The system does not let us read a path, which says nothing of what is there."""


class LostPeerError(UserError):
    """Another process of the job has ended, which cut off a collective; that process knows the reason."""


class LostWorkerError(UserError):
    """A loader's worker process has ended, or cannot hand over a batch."""


class DivergedError(UserError):
    """A loss or a gradient is not finite."""


class NotSavedError(UserError):
    """A file of the run cannot be written."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop and has saved its work; the exit status is 128 + `signal_number`."""

    def __init__(self, message: str, signal_number: int) -> None:
        """Take the message to print.

        Args:
            message: how to resume; "" if another process prints it.
        """
        super().__init__(message)
        self.signal_number = signal_number


def printable(text: str) -> str:
    """The text on one line, as a message may quote a hostile file: what would move a terminal's cursor, break the line
    or cannot be encoded is escaped, and the middle of what is absurdly long is left out."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-900:]}"
