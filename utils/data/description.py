"""A data set's description: its classes, what its masks hold, and where its files are (`datasets/*.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from utils.data.classes import ClassTable

Value = int | tuple[int, int, int]  # of a mask's pixel: an id of 0-255, or a colour


@dataclass(frozen=True)
class Labels:
    """What the values of a mask's pixels mean."""

    kind: Literal["ids", "colors"]  # one byte a pixel (greyscale, or the index of a palette); or an RGB picture
    class_ids: Mapping[Value, int]  # the class of each value; several values may have one class
    ignored: frozenset[Value]  # values that are not labelled
    unlisted: Literal["error", "ignore"]  # what any other value is


@dataclass(frozen=True)
class Layout:
    """Patterns of the images and their masks below the root.

    Placeholders: `{split}`, `{stem}`, `{folders}` (any number of folders, also none) and any other name (one folder, or
    a part of a name). An image and a mask belong together if all placeholders are equal. `.*` is any picture suffix.
    """

    images: str
    masks: str
    name: str = "{stem}"  # of the .npy file; several placeholders where stems are not unique
    labels: Labels | None = None  # of this layout's masks, None for those of the description
    splits: Mapping[str, tuple[str, ...]] | None = None  # for data without split folders: patterns of the stems


@dataclass(frozen=True)
class Description:
    """A data set."""

    name: str
    classes: ClassTable
    labels: Labels
    layouts: tuple[Layout, ...]  # the first that has images of a split is used

    def to_plain(self) -> dict[str, Any]:
        """Plain values for manifest.json; `read_plain_description` reads them."""
        raise NotImplementedError
