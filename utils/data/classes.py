"""A data set's table of classes, and how one table's ids become another's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from utils.runtime.errors import UserError

IGNORE_LABEL = 255  # not labelled: ignored by losses and metrics, never a class
MAX_CLASSES = 250  # ids are bytes; a few above are colours of the report's label maps
OTHER_CLASS = "other"  # all classes that `ClassTable.select` leaves out, as one


@dataclass(frozen=True)
class SemanticClass:
    id: int
    name: str
    color: tuple[int, int, int]  # RGB
    group: str = ""  # a heading that users give, such as "vehicle"
    aliases: tuple[str, ...] = ()  # other names of the class, such as those of a detector


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set or a model. The id of a class is its place in the table.

    Iterating gives the classes by id; `len` is their number, at most `MAX_CLASSES`.
    """

    classes: tuple[SemanticClass, ...]
    selected_from: tuple[str, ...] = ()  # the names of the table that `select` was called on, () for none

    def __iter__(self) -> Iterator[SemanticClass]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.classes)

    @cached_property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8 RGB by id; every id that is no class, such as 255, is black."""
        palette = np.zeros((256, 3), dtype=np.uint8)
        for c in self.classes:
            palette[c.id] = c.color
        return palette

    @cached_property
    def ids_by_name(self) -> dict[str, int]:
        """Ids by name and alias, in lower case. A name wins over another class's alias."""
        by_alias = {alias.lower(): c.id for c in reversed(self.classes) for alias in c.aliases}
        return by_alias | {c.name.lower(): c.id for c in self.classes}

    def find(self, c: SemanticClass) -> int | None:
        """The id of the class that has the name of `c`, or shares an alias with it; None without one."""
        return next((self.ids_by_name[n] for n in map(str.lower, (c.name, *c.aliases)) if n in self.ids_by_name), None)

    def select(self, names: Sequence[str], *, other: bool) -> ClassTable:
        """The named classes alone, with ids in the order of the names.

        Args:
            names: of this table's classes, each once, in any case; `_` may stand for a space.
            other: add a last class, `OTHER_CLASS`, for the pixels of all other classes. Without it they are ignored.

        Raises:
            UserError: a name is unknown or given twice, or no class is left for "other", or one has that name.
        """
        ids = [self.id_of(name) for name in names]
        if len(set(ids)) < len(ids):
            twice = next(self.names[i] for i in ids if ids.count(i) > 1)
            raise UserError(f"class {twice!r} is given twice; give each class once")
        chosen = [self.classes[i] for i in ids]
        if other:
            if OTHER_CLASS in self.ids_by_name:
                raise UserError(f"the data have a class named {OTHER_CLASS!r}; use --other_classes ignore")
            if len(chosen) == len(self):
                raise UserError(f"no class is left for {OTHER_CLASS!r}; use --other_classes ignore")
            chosen.append(SemanticClass(len(chosen), OTHER_CLASS, _unused_grey(chosen)))
        return ClassTable(tuple(replace(c, id=i) for i, c in enumerate(chosen)), selected_from=self.names)

    def id_of(self, name: str) -> int:
        """The id of a class by its name in any case, in which `_` may stand for a space; or a `UserError`."""
        for text in (name, name.replace("_", " ")):
            if text.lower() in self.ids_by_name:
                return self.ids_by_name[text.lower()]
        raise UserError(f"no class {name!r}; the classes are {', '.join(self.names)}")

    def ids_of(self, data: ClassTable, *, match: bool = False) -> np.ndarray:
        """This table's ids of the labels of data that have the table `data`.

        Args:
            match: score the classes that both tables name; the labels of the others are ignored.

        Returns:
            (256,) uint8: this table's id by the id in `data`; `IGNORE_LABEL` for labels that are ignored.

        Raises:
            UserError: the tables differ, `data` is not the table this one was selected from, and `match` is off; or no
                class is in both.
        """
        table = np.full(256, IGNORE_LABEL, dtype=np.uint8)
        is_selection = data.names == self.selected_from
        if not (self.names == data.names or is_selection or match):
            raise UserError(
                f"has {len(data)} classes ({', '.join(data.names)}), but the model has {len(self)} "
                f"({', '.join(self.names)}); --match_classes scores those in both"
            )
        has_rest = is_selection and self.names[-1] == OTHER_CLASS and OTHER_CLASS not in data.ids_by_name
        rest = len(self) - 1 if has_rest else None
        for c in data:
            found = self.ids_by_name.get(c.name.lower()) if not match else self.find(c)
            if found is None:
                found = rest
            if found is not None:
                table[c.id] = found
        if (table == IGNORE_LABEL).all():
            raise UserError(f"no class is in both tables: {', '.join(self.names)}; {', '.join(data.names)}")
        return table

    def in_common(self, data: ClassTable) -> str:
        """The classes that `ids_of` matches, in words; names of `data` that differ stand in brackets. Raises as it."""
        ids, texts = self.ids_of(data, match=True), []
        for c in self:
            names = [theirs.name for theirs in data if ids[theirs.id] == c.id]
            if names:
                texts.append(c.name if names == [c.name] else f"{c.name} ({', '.join(names)})")
        return ", ".join(texts)

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON and checkpoints; `read_class_table` reads them."""
        classes: list[dict[str, Any]] = []
        for c in self.classes:
            entry: dict[str, Any] = {"name": c.name, "color": list(c.color)}
            classes.append(
                entry | ({"group": c.group} if c.group else {}) | ({"aliases": list(c.aliases)} if c.aliases else {})
            )
        return {"classes": classes, "selected_from": list(self.selected_from)}


def _unused_grey(classes: Iterable[SemanticClass]) -> tuple[int, int, int]:
    used = {c.color for c in classes}
    return next((g, g, g) for g in range(96, 256) if (g, g, g) not in used)


def is_class_name(name: Any) -> bool:
    """Whether it may name a class: 1 to 64 printable characters, without a space at either end, a comma or a quote."""
    return (isinstance(name, str) and 0 < len(name) <= 64 and name.isprintable() and name == name.strip()) and not set(
        name
    ) & set(',"')


def is_color(color: Any) -> bool:
    """Whether it is three bytes, red, green and blue."""
    return isinstance(color, list | tuple) and len(color) == 3 and all(type(v) is int and 0 <= v <= 255 for v in color)


def read_class_table(plain: Any) -> ClassTable:
    """Check and read the result of `ClassTable.to_plain`.

    Raises:
        ValueError: it is not a table of classes.
    """
    try:
        classes = tuple(
            SemanticClass(i, c["name"], tuple(c["color"]), c.get("group", ""), tuple(c.get("aliases", ())))
            for i, c in enumerate(plain["classes"])
        )
        table = ClassTable(classes, tuple(plain.get("selected_from", ())))
        names = [name for c in table for name in (c.name, *c.aliases)]
        is_valid = (
            0 < len(table) <= MAX_CLASSES
            and all(map(is_class_name, names))
            and all(is_color(c.color) and isinstance(c.group, str) for c in table)
            and len({name.lower() for name in names}) == len(names)
            and all(map(is_class_name, table.selected_from))
        )
    except (LookupError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise ValueError("not a table of classes")
    return table


BDD100K = ClassTable(
    (
        SemanticClass(0, "road", (128, 64, 128), "flat"),
        SemanticClass(1, "sidewalk", (244, 35, 232), "flat"),
        SemanticClass(2, "building", (70, 70, 70), "construction"),
        SemanticClass(3, "wall", (102, 102, 156), "construction"),
        SemanticClass(4, "fence", (190, 153, 153), "construction"),
        SemanticClass(5, "pole", (153, 153, 153), "object"),
        SemanticClass(6, "traffic light", (250, 170, 30), "object"),
        SemanticClass(7, "traffic sign", (220, 220, 0), "object"),
        SemanticClass(8, "vegetation", (107, 142, 35), "nature"),
        SemanticClass(9, "terrain", (152, 251, 152), "nature"),
        SemanticClass(10, "sky", (70, 130, 180), "sky"),
        SemanticClass(11, "person", (220, 20, 60), "human", ("pedestrian",)),
        SemanticClass(12, "rider", (255, 0, 0), "human"),
        SemanticClass(13, "car", (0, 0, 142), "vehicle"),
        SemanticClass(14, "truck", (0, 0, 70), "vehicle"),
        SemanticClass(15, "bus", (0, 60, 100), "vehicle"),
        SemanticClass(16, "train", (0, 80, 100), "vehicle"),
        SemanticClass(17, "motorcycle", (0, 0, 230), "vehicle", ("motor",)),
        SemanticClass(18, "bicycle", (119, 11, 32), "vehicle", ("bike",)),
    )
)
"""The 19 `trainId` classes of BDD100K, in the colours of Cityscapes. Aliases are the names of its detection task."""
