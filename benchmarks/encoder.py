"""The image encoder against the public package's, and against what its matrix products alone take.

    python -m benchmarks.encoder
    python -m benchmarks.encoder --model_type vit_tiny --image_size 256 --repeats 1    # a few seconds

Prints a line for float32 and one for bf16 autocast, both relative to the public encoder in float32. That is measured
with memory as the C library handles it by itself, and again (`ratio_memory_kept`) as this project's scripts have it;
`public_relative_error` is of the public encoder in the same precision. `limit_s` is how
long the encoder's matrix products take by themselves, through torch.bmm at the encoder's own shapes in the same run;
`split_s` is where the time of one encoding goes, by operation, as PyTorch's profiler has it.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from segment_anything.build_sam import CONFIGS, PATCH_SIZE
from utils.runtime import cli

Product = tuple[int, int, int, int]  # N products of L x K with K x M


def get_args_parser() -> cli.Parser:
    return common.get_args_parser(__doc__)


def matrix_products(model_type: str, image_size: int) -> Counter[Product]:
    """The products of an image's encoding, but for the relative positions, which are 1 % more."""
    config = CONFIGS[model_type]
    c, heads, window = config.embed_dim, config.num_heads, config.window_size
    grid = image_size // PATCH_SIZE
    windows = (-(-grid // window)) ** 2
    products: Counter[Product] = Counter()
    for i in range(config.depth):
        n, length = (1, grid**2) if i in config.global_attn_indexes else (windows, window**2)
        products[1, grid**2, c, 3 * c] += 1
        products[1, grid**2, c, c] += 1
        if n == 1:  # a head at a time: multiplied together they would take more memory than in the encoder
            products[1, length, c // heads, length] += heads
            products[1, length, length, c // heads] += heads
        else:
            products[n * heads, length, c // heads, length] += 1
            products[n * heads, length, length, c // heads] += 1
        products[1, grid**2, c, 4 * c] += 1
        products[1, grid**2, 4 * c, c] += 1
    out = config.prompt_embed_dim
    products[1, grid**2, 3 * PATCH_SIZE**2, c] += 1  # patches, and the neck's two convolutions
    products[1, grid**2, c, out] += 1
    products[1, grid**2, 9 * out, out] += 1
    return products


def gflop(products: Counter[Product]) -> float:
    return sum(2e-9 * n * rows * inner * columns * count for (n, rows, inner, columns), count in products.items())


def multiply(products: Counter[Product], dtype: torch.dtype) -> float:
    """Seconds that all the products take; each shape is run twice and its second run counts."""
    total = 0.0
    for (n, rows, inner, columns), count in products.items():
        a, b = torch.randn(n, rows, inner).to(dtype), torch.randn(n, inner, columns).to(dtype)
        out = torch.empty(n, rows, columns, dtype=dtype)

        def product(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
            torch.bmm(a, b, out=out)

        product()
        total += count * common.measure({"": product}, 1)[""]
    return total


@torch.no_grad()
def encode(encoder: nn.Module, images: Tensor, bf16: bool = False) -> Tensor:
    with common.bf16(bf16):
        return encoder(images)


def split_by_operation(encoder: nn.Module, images: Tensor, bf16: bool) -> dict[str, float]:
    """Seconds in each of the costliest operations of one encoding."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        encode(encoder, images, bf16)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    seconds = {event.key.removeprefix("aten::"): event.self_cpu_time_total / 1e6 for event in events}
    named = dict(list(seconds.items())[:8])
    return {**named, "others": sum(seconds.values()) - sum(named.values())}


def main(args: argparse.Namespace) -> None:
    ours, public = common.build_pair(args.model_type, args.image_size)
    encoder = ours.image_encoder
    images = torch.randn(1, 3, args.image_size, args.image_size)
    products = matrix_products(args.model_type, args.image_size)
    limits: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}

    def measure_limits() -> None:
        for dtype, measured in limits.items():
            measured.append(multiply(products, dtype))

    seconds = common.measure(
        {
            **common.reference("public", lambda: encode(public, images)),
            "float32": lambda: encode(encoder, images),
            "bf16": lambda: encode(encoder, images, bf16=True),
            "limits": measure_limits,
        },
        args.repeats,
    )
    expected = encode(public, images)
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        limit = statistics.median(limits[dtype])
        errors = [
            (encode(module, images, name == "bf16") - expected).norm().item() / expected.norm().item()
            for module in (encoder, public)
        ]
        figures: dict[str, Any] = {"ours_s": seconds[name], "public_float32_s": seconds["public"], "limit_s": limit}
        common.report(
            f"encoder in {name}, {args.model_type} at {args.image_size}",
            ratio=seconds["public"] / seconds[name],
            ratio_memory_kept=seconds["public, memory kept"] / seconds[name],
            **figures,
            of_limit=limit / seconds[name],
            gflop=gflop(products),
            gflop_per_s_of_limit=gflop(products) / limit,
            relative_error=errors[0],
            public_relative_error=errors[1],
            split_s=split_by_operation(encoder, images, name == "bf16"),
        )


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
