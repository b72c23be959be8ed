"""Our packages beside the public segment-anything, which has a package of the same name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def compare(*path: Path, cwd: Path) -> str:
    """The error of `python -m utils.compare` for a missing folder, with these folders on Python's path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-m", "utils.compare", "missing"]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    return done.stderr


def test_a_namesake_that_python_finds_first_is_told_in_one_line(tmp_path: Path) -> None:
    namesake = tmp_path / "site" / "segment_anything"
    namesake.mkdir(parents=True)
    (namesake / "__init__.py").touch()
    said = compare(namesake.parent, ROOT, cwd=tmp_path)
    assert f"two packages are named segment_anything: {ROOT / 'segment_anything'}, which" in said
    assert f"and {namesake}, which Python finds first; set PYTHONPATH={ROOT}, or" in said and said.count("\n") == 1
    assert compare(ROOT, namesake.parent, cwd=tmp_path).startswith("error: missing/")  # as advised


def test_installing_overwrites_nothing_of_a_namesake(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="needs setuptools to build with")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("segment_anything", "utils"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True, timeout=120)
    assert not (target / "segment_anything").exists() and not (target / "utils").exists()
    (link,) = target.glob("*.pth")  # in site-packages, Python adds its folder to the path
    folder = target / link.read_text().strip()
    assert compare(folder, cwd=tmp_path).startswith("error: missing/evaluation_results.json")
    assert all((folder / name / "py.typed").exists() for name in ("segment_anything", "utils"))
    templates = Path("utils", "evaluate", "templates")
    ours = {path.name for path in (ROOT / templates).iterdir()}
    assert ours and {path.name for path in (folder / templates).iterdir()} == ours
