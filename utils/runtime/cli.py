"""What the scripts' command lines share: flags with one dash or two, checked values, one-line errors."""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.runtime.errors import Interrupted, LostPeerError, UserError, printable
from utils.runtime.malloc import keep_freed_memory

# Errors of the system about a path; they are no bugs.
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


class Flags(argparse.Namespace):
    """Parsed flags. `given` names those of the command line; the others have their defaults."""

    __slots__ = ("given",)  # beside `__dict__`, so that `vars` has the flags alone
    given: set[str]


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose long flags take one dash or two, as the specification mixes both."""

    def __init__(self, description: str | None, usage: str | None = None) -> None:
        # No abbreviations: `-i` and `-init_method` would compete.
        super().__init__(_module_command(), usage, description, allow_abbrev=False, formatter_class=_HelpFormatter)
        self._group: Any = self

    def begin_group(self, title: str, description: str | None = None) -> None:
        """Put the flags that follow into a group of `--help`."""
        self._group = self.add_argument_group(title, description)

    def add_flag(self, *names: str, **kwargs: Any) -> None:
        """Add an option by its bare name(s): `add_flag("batch_size", ...)` accepts `-batch_size` and `--batch_size`."""
        spellings = [f"{dashes}{name}" for name in names for dashes in (("-",) if len(name) == 1 else ("--", "-"))]
        if "choices" not in kwargs:
            kwargs.setdefault("metavar", _METAVARS.get(kwargs.get("type")))
        self._group.add_argument(*spellings, **kwargs)

    def add_switch(self, name: str, help: str, default: bool | None = False) -> None:
        """Add a switch: bare turns it on, and `True` or `False` may follow it.

        `default` is None if it depends on other flags.
        """
        self.add_flag(name, nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help)

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> Flags:  # type: ignore[override]
        """Parse, and note which flags were given."""
        default = object()
        names = [action.dest for action in self._actions if action.dest != argparse.SUPPRESS and action.dest != "help"]
        flags = super().parse_args(args, Flags(**dict.fromkeys(names, default)))
        flags.given = {name for name in names if getattr(flags, name) is not default}
        for name in set(names) - flags.given:
            setattr(flags, name, self.get_default(name))
        return flags

    def read_back(self, recorded: Mapping[str, Any], source: Path) -> dict[str, Any]:
        """Turn flags that were recorded as plain values into what `parse_args` gives, checked in the same way.

        Args:
            recorded: values by name; None and names of no flag are left out.
            source: where they were recorded.

        Raises:
            UserError: a value is not one that its flag takes.
        """
        values = {}
        for action in self._actions:
            recorded_value = recorded.get(action.dest)
            if recorded_value is None:
                continue
            try:
                value = (action.type or str)(str(recorded_value))  # type: ignore[operator]
                if action.choices is not None and value not in action.choices:
                    raise ValueError
            except (ValueError, argparse.ArgumentTypeError):
                flag = action.option_strings[0]
                raise UserError(
                    f"{source}: its {flag} is {recorded_value!r}; give {flag}, or start a new run"
                ) from None
            values[action.dest] = value
        return values

    def error(self, message: str) -> NoReturn:
        # One line, without the usage block.
        _wait_for_turn(None)
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # If the default is None or off, the help says what that means.
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Show one spelling of a flag; all take one dash or two."""
        names = [name for name in action.option_strings if name.startswith("--") or len(name) == 2]
        if not names:
            return super()._format_action_invocation(action)
        values = "" if action.nargs == 0 else self._format_args(action, action.dest.upper())
        return f"{', '.join(names)} {values}".rstrip()

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """An action that takes several values only to explain what is wrong with them `shows_one`."""
        return str(action.metavar) if hasattr(action, "shows_one") else super()._format_args(action, default_metavar)


def _module_command() -> str | None:
    """What runs this program if that is `python -m`, which argparse names by the file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else ""
    return f"python -m {name}" if name.startswith(("utils.", "tools.", "benchmarks.")) else None


def boolean(text: str) -> bool:
    """Parse `True`/`False` in any case, `1`/`0`, `yes`/`no`."""
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return value


class JoinedNames(argparse.Action):
    """Takes names, and keeps them as one text with commas: a value that a run can record."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        names = [name.strip() for value in values for name in value.split(",")]
        if not all(names):
            raise argparse.ArgumentError(self, "an empty name; give names of classes")
        setattr(namespace, self.dest, ",".join(names))


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


# What fits the 32 and 64 bits of PyTorch and NumPy.
positive_int = number(int, 1, maximum=2**31 - 1)
non_negative_int = number(int, 0, maximum=2**31 - 1)
seed = number(int, 0, maximum=2**63 - 1)
positive_float = number(float, 0, exclusive=True)
non_negative_float = number(float, 0)
_METAVARS: dict[Any, str] = {
    Path: "PATH",
    positive_int: "N",
    non_negative_int: "N",
    seed: "N",
    positive_float: "X",
    non_negative_float: "X",
}


def cache_place(text: str) -> str:
    """Parse --cache_embeddings: "auto", "off", or a folder."""
    if text.lower() in ("auto", "off"):
        return text.lower()
    if text.lower() in ("", "on", "true", "false", "yes", "no", "none", "0", "1"):
        raise argparse.ArgumentTypeError(f"expected auto, off or a folder, got {text!r} (./{text} is a folder)")
    return text


def switch_or_count(text: str) -> bool | int:
    """Parse `True`/`False`, or an `int` from 0."""
    return text.lower() == "true" if text.lower() in ("true", "false") else non_negative_int(text)


def positive_int_or_all(text: str) -> int | str:
    """Parse "all", or an `int` from 1."""
    return text if text == "all" else positive_int(text)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with its status. What a user can meet is one line, without a traceback.

    This covers `UserError`, an `OSError` of the system about a path, and Ctrl-C or `Interrupted`, whose text says what
    to do next.
    """
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file's name may not be text
    try:
        status = main() or 0
    except UserError as error:
        _wait_for_turn(error)
        print(f"error: {printable(str(error))}", file=sys.stderr)
        status = 1
    except BrokenPipeError:  # `| head` closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("stopped: the program that read the output has ended", file=sys.stderr)
        status = 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None or error.errno not in _REFUSALS:
            raise
        _wait_for_turn(None)
        print(f"error: {printable(f'{error.filename}: cannot be used ({error.strerror})')}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would print a traceback
        if isinstance(interrupt, Interrupted):
            message, status = str(interrupt), 128 + interrupt.signal_number
        else:
            message, status = str(interrupt) or "run the same command again", 130
        if message:
            print(f"interrupted: {message}", file=sys.stderr)
    sys.exit(status)


def _wait_for_turn(error: UserError | None) -> None:
    """Under a launcher, let one process print its error first. The launcher ends the others when that one exits.

    The first process of a machine prints if all met the same error; otherwise the one that knows the cause. torch's
    `@record` does not replace the wait: it prints every process's traceback, and only in the launcher's report.
    """
    if os.environ.get("RANK") and os.environ.get("LOCAL_RANK") not in (None, "", "0"):
        time.sleep(10)
        print(file=sys.stderr)  # the first one's progress bar may stand there
    if isinstance(error, LostPeerError):
        time.sleep(5)
