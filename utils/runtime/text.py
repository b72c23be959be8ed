"""Columns of text in a terminal, where a Chinese character takes two places."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def display_width(text: str) -> int:
    """The places that a text takes in a terminal: two for a wide character, none for an accent that joins another."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def pad(text: str, width: int) -> str:
    """Add spaces at the end of a text until it takes so many places; a wider one stays as it is."""
    return text + " " * (width - display_width(text))


def class_column(names: Sequence[str]) -> list[str]:
    """Id and name of each class, in 24 places, or more if a name or the number of classes needs them."""
    digits = max(2, len(str(len(names) - 1)))
    width = max(20, *map(display_width, names))
    return [f"{i:{digits}d}. {pad(name, width)}" for i, name in enumerate(names)]
