"""The manuals' commands that need no download run as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]


def recipe(manual: str) -> str:
    """The manual's commands on drawn scenes."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / manual).read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "utils.scenes" in block)
    return block


def test_the_recipe_on_drawn_scenes_runs(tmp_path: Path) -> None:
    assert recipe("README.md") == recipe("README_BDD100K.md")
    for name in ("assets", "segment_anything", "utils", *(path.name for path in REPOSITORY.glob("*.py"))):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    script = 'python() { "$PYTHON" "$@"; }\n' + recipe("README.md").replace("--train 16 --val 4", "--train 4 --val 1")
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "整体 mIoU" in done.stdout
    assert list(tmp_path.glob("inference_results/visualizations/*.png"))
