"""The encoder's Triton kernel against the attention that it replaces. Triton's interpreter runs it without a card.

A process decides at its first import of Triton whether kernels are interpreted, so another one does it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segment_anything.modeling.image_encoder import Attention, window_partition, window_unpartition
from tests.helpers.oracles import relative_error

# Height and width of the map, the side of windows (0 for none), heads, channels of a head.
CASES = {
    "global": (9, 16, 0, 2, 16),
    "global, a width just above a power of two": (3, 65, 0, 1, 16),
    "global, higher than wide": (40, 3, 0, 1, 16),
    "windows that divide the map": (8, 12, 4, 2, 16),
    "windows over both edges": (20, 30, 14, 2, 16),
    "a window larger than the map": (10, 7, 14, 1, 16),
    "channels that are no power of two": (20, 20, 7, 2, 80),
}


def error_of(height: int, width: int, side: int, heads: int, channels: int) -> float:
    """The relative error of the kernel in half precision."""
    torch.manual_seed(0)
    window = (side or height, side or width)
    attention = Attention(heads * channels, heads, use_rel_pos=True, input_size=window).requires_grad_(False)
    for parameter in attention.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, height, width, heads * channels)
    if side:
        windows, padded = window_partition(x, side)
        expected = window_unpartition(attention(windows), side, padded, (height, width))
    else:
        expected = attention(x)
    return relative_error(attention.half().forward_fused(x.half(), window).float(), expected)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    pytest.importorskip("triton", reason="PyTorch brings Triton on Linux only")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, "-m", __name__]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_attention_on_windows(case: str, errors: dict[str, float]) -> None:
    assert errors[case] < 3e-3


if __name__ == "__main__":
    print(json.dumps({name: error_of(*case) for name, case in CASES.items()}))
