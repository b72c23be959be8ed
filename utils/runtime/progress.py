"""Progress bars: at most 80 columns on a terminal, and a line now and then where stderr is a file."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from tqdm import tqdm

MAX_COLUMNS = 80
SECONDS_A_LINE = 30  # between the lines in a file; tqdm's variable TQDM_MININTERVAL changes it
_TEXT = "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


def progress_bar(iterable: Any = None, desc: str = "", *, total: int | None = None, unit: str, **options: Any) -> tqdm:
    """A `tqdm` bar.

    It goes to stderr. On a terminal it is redrawn in place. Elsewhere it writes a line every `SECONDS_A_LINE`, so that
    a log stays readable, and nothing for work that is done before.

    Args:
        options: further ones of `tqdm`.
    """
    if total is None and iterable is not None and hasattr(iterable, "__len__"):
        total = len(iterable)
    options |= {"total": total, "unit": unit}
    if not sys.stderr.isatty():
        seconds = float(os.environ.get("TQDM_MININTERVAL", SECONDS_A_LINE))
        pace = {"mininterval": seconds, "maxinterval": seconds, "delay": seconds}
        return _Lines(iterable, desc, bar_format=_TEXT if total else None, **pace, **options)
    # A full line makes some terminals break it.
    columns = min(MAX_COLUMNS, shutil.get_terminal_size().columns - 1)
    return tqdm(iterable, desc, ncols=columns, bar_format=_BAR if total else None, **options)


def about(seconds: float) -> str:
    """A rough time in words: "less than a minute", "about 12 min", "about 2 h 10 min"."""
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    hours, minutes = divmod(minutes if minutes < 600 else round(minutes, -1), 60)
    return f"about {hours} h" + (f" {minutes} min" if minutes else "")


class _Lines(tqdm):
    """A bar whose states are lines."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        text = str(self) if msg is None else msg
        if text:
            self.fp.write(f"{text}\n")
        return False  # nothing to erase

    def close(self) -> None:
        self.leave = False  # what comes after the loop tells its end
        super().close()
