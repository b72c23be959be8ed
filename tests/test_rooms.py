"""Imports between the rooms of CONTRIBUTING.md go downward, without a cycle, and no test module imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import the rooms above it in this list. Rooms on one line do not know each other.
ORDER = (
    ("segment_anything", "utils.runtime"),
    ("utils.data",),
    ("utils.model", "utils.scenes"),
    ("utils.cache", "utils.evaluate"),
    ("utils.train",),
    ("utils.export",),
    ("pre_bdd100k", "train_bdd100k", "infer_bdd100k", "utils.api", "utils.ckpt_convert", "utils.compare"),
    ("benchmarks", "tools"),
    ("tests",),
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def modules_of(root: Path) -> dict[str, Path]:
    """The repository's modules: dotted name to path."""
    folders = ("segment_anything", "utils", "benchmarks", "tools", "tests")
    paths = [*root.glob("*_bdd100k.py"), *(path for folder in folders for path in root.glob(f"{folder}/**/*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(name: str, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of this repository that a module imports, also inside functions."""
    package = name.split(".") if modules[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(modules[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:  # modules of a package, or names in one module
                yield from [each for each in (f"{source}.{alias.name}", source) if each in modules][:1]


def room_of(name: str) -> str:
    """The room that a module is in, or "" if there is none."""
    return next((room for room in LEVELS if f"{name}.".startswith(f"{room}.")), "")


def violations(root: Path) -> list[str]:
    """The imports that break the rules, one line each."""
    modules = modules_of(root)
    graph = {name: {*imports_of(name, modules)} - {name} for name in modules}
    found = []
    for name, targets in graph.items():
        for target in targets:
            ours, theirs = room_of(name), room_of(target)
            is_upward = ours != theirs and LEVELS.get(theirs, -1) >= LEVELS.get(ours, -1)
            if is_upward or (ours == "tests" and "test_" in target) or target == "tests.conftest":
                found.append(f"{name} imports {target}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"cycle: {' '.join(error.args[1])}")
    return found


def test_imports_go_downward() -> None:
    homeless = {name for name in modules_of(ROOT) if not room_of(name)}
    assert homeless == {"utils"}  # an empty package
    assert {room_of(name) for name in modules_of(ROOT)} == {*LEVELS, ""}
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("utils/runtime/a.py", "from utils.data import b", "utils.runtime.a imports utils.data.b"),
        ("utils/data/a.py", "def f():\n    import utils.train.b", "utils.data.a imports utils.train.b"),
        ("utils/cache/a.py", "from utils.evaluate.b import x", "utils.cache.a imports utils.evaluate.b"),
        ("utils/train/a.py", "import train_bdd100k", "utils.train.a imports train_bdd100k"),
        ("segment_anything/a.py", "from utils.runtime import b", "segment_anything.a imports utils.runtime.b"),
        ("benchmarks/a.py", "from tests.helpers.b import x", "benchmarks.a imports tests.helpers.b"),
        ("tests/data/test_a.py", "from tests.test_b import x", "tests.data.test_a imports tests.test_b"),
        ("tests/test_a.py", "from .conftest import x", "tests.test_a imports tests.conftest"),
        ("utils/data/a.py", "from . import b", "cycle: utils.data.a utils.data.b utils.data.a"),
    ],
)
def test_a_planted_import_is_found(name: str, line: str, expected: str, tmp_path: Path) -> None:
    names = ["utils/runtime/b", "utils/data/__init__", "utils/train/b", "utils/evaluate/b", "train_bdd100k"]
    names += ["tests/helpers/b", "tests/test_b", "tests/conftest"]
    files = {f"{each}.py": "" for each in names} | {"utils/data/b.py": "from utils.data import a", name: line}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1 and set(expected.split()) <= set(found[0].split())
