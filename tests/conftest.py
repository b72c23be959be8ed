"""Fixtures of several test modules. Plain functions are in `tests/helpers/`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import train_bdd100k
from segment_anything import build_sam_vit_tiny
from tests.helpers.inputs import IMAGE_SIZE, draw_scenes, preprocess
from tests.helpers.scripts import run_script, training_flags
from utils.runtime import cli


@pytest.fixture(scope="session")
def sam_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `vit_tiny` checkpoint with random weights for IMAGE_SIZE."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sam") / "sam_vit_tiny.pth"
    torch.save(build_sam_vit_tiny(image_size=IMAGE_SIZE).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes in BDD100K's layout: 7 for training, 3 for validation."""
    return draw_scenes(tmp_path_factory.mktemp("scenes"), seed=0)


@pytest.fixture(scope="session")
def npy(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scenes` preprocessed to uint8 at IMAGE_SIZE, in the folders "train" and "val"."""
    return preprocess(scenes, tmp_path_factory.mktemp("npy"))


@pytest.fixture
def little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports a /dev/shm of 64 KiB and two usable cores."""
    real = os.statvfs
    little = SimpleNamespace(f_blocks=16, f_bavail=16, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: little if Path(path) == Path("/dev/shm") else real(path))
    monkeypatch.setattr("utils.data.loaders.usable_cores", lambda: 2)


@pytest.fixture
def error_of(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a failing script and returns its one line on stderr. The exit status must be 1 or 2.

    Stderr is read from the file descriptor, so messages of worker processes count too.
    """

    def error_of(script: ModuleType, *flags: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: run_script(script, *flags))
        assert end.value.code in (1, 2)
        # Ignore what is left of progress bars.
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "%|" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return error_of


@pytest.fixture(scope="session")
def train(sam_file: Path, npy: Path) -> Callable[..., Path]:
    """A function that trains on the fixtures in an empty `work_dir` and returns the run's folder."""

    def train(work_dir: Path, *flags: object) -> Path:
        run_script(train_bdd100k, *training_flags(npy / "train", sam_file, work_dir), *flags)
        (folder,) = work_dir.iterdir()
        return folder

    return train
