"""Tables of classes that are not BDD100K's."""

from __future__ import annotations

from utils.data.classes import ClassTable, SemanticClass


def table_of(*names: str) -> ClassTable:
    """Classes of these names, each in a colour of its own."""
    colors = [(37 * i % 251, 11 * i % 241, (211 - 7 * i) % 239) for i in range(len(names))]
    return ClassTable(tuple(SemanticClass(i, name, color) for i, (name, color) in enumerate(zip(names, colors))))


ONE = table_of("车")
THREE = table_of("道路", "机动车", "行人")
MANY = table_of(*(f"{('道路', 'car', 'traffic sign', '人行横道', 'barrier')[i % 5]} {i}" for i in range(150)))
