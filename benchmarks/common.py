"""What the benchmarks of speed share: the public encoder beside ours, interleaved timing, and the JSON line."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.public import public_sam
from segment_anything import sam_model_registry
from segment_anything.build_sam import CONFIGS, PATCH_SIZE
from segment_anything.modeling import Sam
from utils.data.frame import side_length
from utils.runtime import cli
from utils.runtime.malloc import M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory, mallopt


def get_args_parser(doc: str | None, size_parser: Callable[[str], Any] = side_length) -> cli.Parser:
    """The flags of every benchmark that runs a SAM of random weights.

    Args:
        size_parser: of `--image_size`; squares by default, as the public package's encoder takes no others.
    """
    parser = cli.Parser(doc)
    parser.add_flag("model_type", choices=list(CONFIGS), default="vit_b", help="which SAM, with random weights")
    parser.add_flag("image_size", type=size_parser, default=1024, help="of the images, in pixels")
    parser.add_flag("repeats", type=cli.positive_int, default=3, help="times that each is measured; medians count")
    return parser


def build_pair(model_type: str, image_size: int) -> tuple[Sam, nn.Module]:
    """Our SAM and the public package's image encoder, in eval mode on the same random weights."""
    torch.manual_seed(0)
    ours = sam_model_registry[model_type](image_size=image_size)
    config = CONFIGS[model_type]
    with torch.device("meta"):  # the weights are ours
        public = public_sam().modeling.ImageEncoderViT(
            img_size=image_size,
            patch_size=PATCH_SIZE,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
            out_chans=config.prompt_embed_dim,
        )
    public.load_state_dict(ours.image_encoder.state_dict(), assign=True)
    return ours, public.eval()


def bf16(enabled: bool = True) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


def with_default_memory(function: Callable[[], Any]) -> Any:
    """Call it with memory as glibc handles it by itself once large tensors have been freed: those above 32 MB are
    mapped, and more than 64 MB of free memory are given back."""
    mallopt({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26})
    try:
        return function()
    finally:
        keep_freed_memory()


def reference(name: str, function: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """For `measure`: the function with the C library's default memory under that name, and with "memory kept"."""
    return {
        name: lambda: with_default_memory(function),
        "taking memory": function,  # in no figure: the first call that keeps memory takes it anew
        f"{name}, memory kept": function,
    }


def measure(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of each, all of them run in turn `repeats` times, so that a busy machine is so for all."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory_mb() -> float:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)


def report(figure: str, *, ratio: float | None, **figures: Any) -> None:
    """Print one line of JSON."""
    line = {
        "figure": figure,
        "ratio": ratio,
        **figures,
        "peak_memory_mb": peak_memory_mb(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # what else the machine was doing
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()},
    }
    print(json.dumps(rounded(line)), flush=True)


def rounded(value: Any) -> Any:
    """Four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
