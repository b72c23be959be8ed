"""The exceptions with messages for the user."""

from __future__ import annotations

import sys


class UserError(Exception):
    """Bad input, in one line that names the file or flag and the fix.

    Scripts print it as `error: <message>` on stderr and exit with status 1 (see `utils.runtime.cli.run`). Any other
    exception is a bug and keeps its traceback.
    """


class UnreadableError(UserError):
    """The system does not let us read a path. The file itself may be intact."""


class LostPeerError(UserError):
    """Another process of the job ended during a collective; that process reports the reason."""


class LostWorkerError(UserError):
    """A loader's worker process has ended, or cannot send a batch."""


class DivergedError(UserError):
    """A loss or a gradient is not finite."""


class NotSavedError(UserError):
    """A file of the run cannot be written."""


class Interrupted(KeyboardInterrupt):
    """The process received a signal and has saved its work; the exit status is 128 + `signal_number`."""

    def __init__(self, message: str, signal_number: int) -> None:
        """Take the message to print.

        Args:
            message: how to resume; "" if another process prints it.
        """
        super().__init__(message)
        self.signal_number = signal_number


def warn(message: str) -> None:
    """Print `warning: <message>` on stderr in one line."""
    print(printable(f"warning: {message}"), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text on one line, as a message may quote a hostile file: control characters are escaped, and the middle of a
    very long text is left out."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-900:]}"
