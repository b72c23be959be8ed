"""What the three scripts' command lines have in common: flags with one dash or two, checked values, one-line errors."""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from utils.runtime.errors import Interrupted, LostPeerError, UserError, printable
from utils.runtime.malloc import keep_freed_memory

# What the system says of a path that is none of our mistakes.
_REFUSALS = {
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENODEV,
    errno.ETIMEDOUT,
    errno.EMFILE,
    errno.ENFILE,
}


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose long flags may be written with one dash or two, as the specification mixes both."""

    def __init__(self, description: str | None) -> None:
        # No abbreviations: with one-dash flags, `-i` and `-init_method` would otherwise compete.
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
        self._group: Any = self

    def begin_group(self, title: str, description: str | None = None) -> None:
        """Put the flags that follow into a group of `--help`."""
        self._group = self.add_argument_group(title, description)

    def add_flag(self, *names: str, **kwargs: Any) -> None:
        """Add an option by its bare name(s): `add_flag("batch_size", ...)` accepts `-batch_size` and `--batch_size`."""
        spellings = [f"{dashes}{name}" for name in names for dashes in (("-",) if len(name) == 1 else ("--", "-"))]
        self._group.add_argument(*spellings, **kwargs)

    def add_switch(self, name: str, help: str, default: bool | None = False) -> None:
        """Add a switch that is off by default: bare turns it on, and `True` or `False` may follow it.

        `default` may be None, for a switch whose default is known only once the other flags are.
        """
        self.add_flag(name, nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help)

    def error(self, message: str) -> NoReturn:
        # One line, without the usage block that would push it off the screen.
        _wait_for_turn(None)
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Where the default is None, the help says itself what happens then.
        return action.help if action.default is None else super()._get_help_string(action)


def boolean(text: str) -> bool:
    """Parse `True`/`False` in any case, `1`/`0`, `yes`/`no`."""
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return value


def number(kind: type, minimum: float, *, maximum: float = math.inf, exclusive: bool = False) -> Callable[[str], Any]:
    """A parser of finite `int` or `float` values from `minimum` (above it if `exclusive`) to `maximum`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (minimum < value < math.inf if exclusive else minimum <= value < math.inf):
            raise argparse.ArgumentTypeError(f"must be {'above' if exclusive else 'at least'} {minimum}, got {text}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {text}")
        return value

    return parse


# What fits the 32 and 64 bits that PyTorch and NumPy have for them.
positive_int = number(int, 1, maximum=2**31 - 1)
non_negative_int = number(int, 0, maximum=2**31 - 1)
seed = number(int, 0, maximum=2**63 - 1)
positive_float = number(float, 0, exclusive=True)
non_negative_float = number(float, 0)


def positive_int_or_all(text: str) -> int | str:
    """Parse "all", or an `int` from 1."""
    return text if text == "all" else positive_int(text)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with its status; a `UserError` is printed in one line, without a traceback.

    So is an `OSError` by which the system refuses a path. So is Ctrl-C, with what to do next if `main` raises
    `KeyboardInterrupt` with a text, and `Interrupted`.
    """
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file's name need not be text
    try:
        status = main() or 0
    except UserError as error:
        _wait_for_turn(error)
        print(f"error: {printable(str(error))}", file=sys.stderr)
        status = 1
    except BrokenPipeError:  # `| head` closed our output: nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        if error.filename is None or error.errno not in _REFUSALS:
            raise
        _wait_for_turn(None)
        print(f"error: {printable(f'{error.filename}: cannot be used ({error.strerror})')}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all that is left is to end: a second one would be a traceback
        if isinstance(interrupt, Interrupted):
            message, status = str(interrupt), 128 + interrupt.signal_number
        else:
            message, status = str(interrupt) or "run the same command again", 130
        if message:
            print(f"interrupted: {message}", file=sys.stderr)
    sys.exit(status)


def _wait_for_turn(error: UserError | None) -> None:
    """Under a launcher, let the process speak alone that knows most: once it ends, the launcher ends the others.

    That is the first of a machine where all of them met the same, and whoever met the cause where others only lost it.
    What it needs to notice is a tenth of a second, and a process some to end; on a machine with much other work, more.
    """
    if os.environ.get("RANK") and os.environ.get("LOCAL_RANK") not in (None, "", "0"):
        time.sleep(10)
        print(file=sys.stderr)  # the first one's progress bar may stand there
    if isinstance(error, LostPeerError):
        time.sleep(5)
