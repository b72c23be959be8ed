"""Run a script in this process or in its own, and read what it wrote."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# Flags of a benchmark that takes seconds.
TINY = ("--model_type", "vit_tiny", "--image_size", 64, "--repeats", 1)


def run_script(script: ModuleType, *flags: object) -> int | None:
    """Run a script's `main` in this process, without the seconds of another PyTorch import."""
    return script.main(script.get_args_parser().parse_args([str(flag) for flag in flags]))


ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for a script in its own process


def with_shared_memory_of(size: str, command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with its own /dev/shm, as in a container. Skip the test where mounting is not allowed."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 99; exec "$@"'
    words = ["unshare", "--mount", "bash", "-c", mount, "-", *map(str, command)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, **options)
    except FileNotFoundError:
        pytest.skip("needs unshare(1)")
    if done.returncode == 99 or done.stderr.startswith("unshare:"):
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    return done


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Read `log.jsonl` as strict JSON: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"log.jsonl holds {constant}")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()]


def training_flags(data: Path, sam_file: Path, work_dir: Path) -> list[object]:
    """Train the tiny model on a split, on the CPU, without loader processes."""
    model = ["-model_type", "vit_tiny", "-checkpoint", sam_file, "-work_dir", work_dir]
    # Starting workers would take longer than they save.
    return ["-i", data, *model, "--device", "cpu", "-num_workers", 0]


def good_flags(sam_file: Path, npy: Path, tmp_path: Path) -> list[object]:
    """Valid flags of infer_bdd100k.py, which write into `tmp_path / "out"`."""
    model = ["--sam_checkpoint", sam_file, "--model_type", "vit_tiny", "--device", "cpu", "--num_workers", 0]
    return ["--val_npy_path", npy / "val", *model, "--output_dir", tmp_path / "out"]


def read_results(folder: Path) -> dict[str, Any]:
    """Read `evaluation_results.json` as strict JSON: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "evaluation_results.json").read_text(), parse_constant=refuse)


def lines_of(capsys: pytest.CaptureFixture[str], script: ModuleType, *flags: object) -> list[dict[str, Any]]:
    """Run a benchmark and return its lines of JSON."""
    run_script(script, *flags)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    for line in lines:
        assert line["ratio"] > 0 and line["peak_memory_mb"] > 0 and line["versions"]["torch"] == torch.__version__
    return lines
