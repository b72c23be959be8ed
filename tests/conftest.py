"""What several test modules share: a random SAM file, small preprocessed splits, and running a script in here."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pre_bdd100k
import train_bdd100k
from segment_anything import build_sam_vit_tiny
from utils.data.classes import IGNORE_LABEL, NUM_CLASSES
from utils.data.frame import image_size_of
from utils.data.manifest import Manifest, ManifestItem
from utils.runtime import cli
from utils.scenes import write_dataset

IMAGE_SIZE = 64


@pytest.fixture(scope="session")
def sam_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `vit_tiny` checkpoint of random weights at IMAGE_SIZE."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sam") / "sam_vit_tiny.pth"
    torch.save(build_sam_vit_tiny(image_size=IMAGE_SIZE).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes in BDD100K's layout: 7 to train on, 3 to validate."""
    root = tmp_path_factory.mktemp("scenes")
    write_dataset(root, {"train": 7, "val": 3}, seed=0, height=144, width=256)
    return root


@pytest.fixture(scope="session")
def npy(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scenes`, preprocessed at IMAGE_SIZE to uint8: npy / "train" and npy / "val"."""
    output = tmp_path_factory.mktemp("npy")
    arguments = ["--bdd100k_root", scenes, "--output_path", output, "--image_size", IMAGE_SIZE]
    parser = pre_bdd100k.get_args_parser()
    options = [*arguments, "--image_dtype", "uint8", "--num_workers", 1]
    assert not pre_bdd100k.main(parser.parse_args([str(option) for option in options]))
    return output


def run_script(script: ModuleType, *flags: object) -> int | None:
    """Run a script's `main` in this process, which saves the seconds that importing PyTorch takes."""
    return script.main(script.get_args_parser().parse_args([str(flag) for flag in flags]))


def quick_start() -> dict[str, str]:
    """What a process of a script's own is to find in its environment: one thread, and tests/quick_start on its path."""
    folders = [str(Path(__file__).parent / "quick_start"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}


def with_shared_memory_of(size: str, command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with a /dev/shm of its own, as a container has it; skip the test where that is not allowed."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 99; exec "$@"'
    words = ["unshare", "--mount", "bash", "-c", mount, "-", *map(str, command)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, **options)
    except FileNotFoundError:
        pytest.skip("needs unshare(1)")
    if done.returncode == 99 or done.stderr.startswith("unshare:"):
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    return done


@pytest.fixture
def little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A /dev/shm that has 64 KiB, as the system tells it, and two usable cores."""
    real = os.statvfs
    little = SimpleNamespace(f_blocks=16, f_bavail=16, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: little if Path(path) == Path("/dev/shm") else real(path))
    monkeypatch.setattr("utils.data.loaders.usable_cores", lambda: 2)


@pytest.fixture
def error_of(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a script which must fail, and gives what it says: one line on stderr, exit status 1 or 2.

    Stderr is that of the file descriptor, so that the words of worker processes count too.
    """

    def error_of(script: ModuleType, *flags: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: run_script(script, *flags))
        assert end.value.code in (1, 2)
        # Progress bars rewrite their line; what is left of them is no message.
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "%|" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return error_of


@pytest.fixture(scope="session")
def train(sam_file: Path, npy: Path) -> Callable[..., Path]:
    """A function that trains on the fixtures in `work_dir`, which holds no other run, and returns the run's folder."""

    def train(work_dir: Path, *flags: object) -> Path:
        data = ["-i", npy / "train", "-model_type", "vit_tiny", "-checkpoint", sam_file, "-work_dir", work_dir]
        # Workers would cost more to start than they save.
        run_script(train_bdd100k, *data, "--device", "cpu", "-num_workers", 0, *flags)
        (folder,) = work_dir.iterdir()
        return folder

    return train


def write_split(folder: Path, items: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Write (image, labels) by name as pre_bdd100k.py would have, the images in the dtype that they have."""
    for kind in ("imgs", "gts"):
        (folder / kind).mkdir(parents=True)
    entries = []
    for name, (image, labels) in items.items():
        np.save(folder / "imgs" / f"{name}.npy", image)
        np.save(folder / "gts" / f"{name}.npy", labels)
        height, width = labels.shape
        counts = np.bincount(labels.ravel(), minlength=256).tolist()
        entries.append(ManifestItem(name, height, width, counts[:NUM_CLASSES], counts[IGNORE_LABEL]))
    size = image_size_of((height, width))
    Manifest(size, str(image.dtype), "stretch", labelled=True, complete=True, items=entries).write(folder)
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    """`log.jsonl`, read as strict JSON: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"log.jsonl holds {constant}")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()]
