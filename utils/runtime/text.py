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


def class_column(names: Sequence[str], ids: Sequence[int] | None = None) -> list[str]:
    """Id and name of each class, in 24 places, or more if a name or an id needs them. Ids count from 0 by default."""
    ids = range(len(names)) if ids is None else ids
    digits = max(2, *(len(str(i)) for i in ids))
    width = max(20, *map(display_width, names))
    return [f"{i:{digits}d}. {pad(name, width)}" for i, name in zip(ids, names)]
