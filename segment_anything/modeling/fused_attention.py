"""The encoder's attention as one Triton kernel: windows, relative positions and softmax without a copy of the map.

The bias of decomposed relative positions has a value for each pair of a query and a key, but only one per query for
each row of keys, plus one per query for each column. The kernel goes through the keys in tiles of whole rows: it reads
the column values of its queries once, and a row value per tile. Nothing of quadratic size is written to memory
(Dao et al., 2022, arXiv 2205.14135). Queries, keys and values are read where the projection has left them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)  # scores are powers of 2, which the card has an instruction for


def attention(qkv: Tensor, pad: Tensor, affinity: Tensor, window: tuple[int, int], scale: float) -> Tensor:
    """Multi-head attention within the windows of a map.

    Args:
        qkv: B x H x W x 3 x heads x C, contiguous, on a CUDA device in half precision.
        pad: 3 x heads x C, the values of positions outside the map in windows that reach over its edge.
        affinity: heads x BHW x D, of each query to the h distances of rows, last row first, then to those of columns;
            D = (2h - 1) + (2w - 1) for windows of h x w.
        window: (h, w). The map itself for global attention.
        scale: of the products of queries and keys.

    Returns:
        B x H x W x (heads C).
    """
    b, height, width, _, heads, channels = qkv.shape
    h, w = window
    across = triton.cdiv(width, w)
    out = qkv.new_empty(b, height, width, heads * channels)
    columns = max(triton.next_power_of_2(w), 16)
    keys = max(columns, 64)
    queries = 64
    grid = (triton.cdiv(h * w, queries), across * triton.cdiv(height, h) * heads, b)
    with torch.cuda.device_of(qkv):
        _attention[grid](
            qkv,
            pad,
            affinity,
            out,
            scale,
            height,
            width,
            across,
            affinity.stride(0),
            affinity.stride(1),
            HEADS=heads,
            CHANNELS=channels,
            C=max(triton.next_power_of_2(channels), 16),
            H=h,
            W=w,
            QUERIES=queries,
            KEYS=keys,
            COLUMNS=columns,
            PADDED=bool(height % h or width % w),
            num_warps=4,
            num_stages=3,
        )
    return out


@triton.jit
def _attention(  # type: ignore[no-untyped-def]  # Triton reads the annotations
    qkv,
    pad,
    affinity,
    out,
    scale,
    height,
    width,
    across,
    affinity_head,
    affinity_token,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    image = tl.program_id(2)
    window, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    top, left = window // across * H, window % across * W
    image_size = height * width
    token_size = 3 * HEADS * CHANNELS
    qkv += image.to(tl.int64) * image_size * token_size + head * CHANNELS
    c = tl.arange(0, C)
    real = c < CHANNELS

    place = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    y, x = place // W, place % W
    inside = (place < H * W) & (top + y < height) & (left + x < width)
    token = (top + y) * width + left + x
    q = tl.load(qkv + token[:, None] * token_size + c, mask=inside[:, None] & real, other=0.0)
    affinity += head * affinity_head.to(tl.int64) + (image * image_size + token).to(tl.int64)[:, None] * affinity_token
    key = tl.arange(0, KEYS)
    row, column = key // COLUMNS, key % COLUMNS
    of_column = tl.load(
        affinity + (2 * H - 1 + W - 1) - x[:, None] + column, mask=inside[:, None] & (column < W), other=0.0
    ).to(tl.float32)
    if PADDED:
        pad_k = tl.load(pad + (HEADS + head) * CHANNELS + c, mask=real, other=0.0)
        pad_v = tl.load(pad + (2 * HEADS + head) * CHANNELS + c, mask=real, other=0.0)

    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    attended = tl.zeros([QUERIES, C], tl.float32)
    for first in range(0, H, KEYS // COLUMNS):
        ky = first + row
        counts = (ky < H) & (column < W)
        ktoken = (top + ky) * width + left + column
        known = counts & (top + ky < height) & (left + column < width)
        at = qkv + ktoken[:, None] * token_size + c
        k = tl.load(at + HEADS * CHANNELS, mask=known[:, None] & real, other=0.0)
        v = tl.load(at + 2 * HEADS * CHANNELS, mask=known[:, None] & real, other=0.0)
        if PADDED:
            k = tl.where(known[:, None], k, pad_k)
            v = tl.where(known[:, None], v, pad_v)
        if KEYS == COLUMNS:
            of_row = tl.load(affinity + (H - 1) - y[:, None] + first, mask=inside[:, None], other=0.0)
        else:
            of_row = tl.load(affinity + (H - 1) - y[:, None] + ky, mask=inside[:, None] & (ky < H), other=0.0)
        bias = of_column + of_row.to(tl.float32)
        scores = (tl.dot(q, tl.trans(k)) * scale + bias) * LOG2_E
        scores = tl.where(counts, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - now[:, None])
        correction = tl.exp2(largest - now)
        total = total * correction + tl.sum(weights, 1)
        attended = attended * correction[:, None] + tl.dot(weights.to(qkv.dtype.element_ty), v)
        largest = now
    place_of = out + (image * image_size + token).to(tl.int64)[:, None] * (HEADS * CHANNELS) + head * CHANNELS + c
    tl.store(place_of, (attended / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None] & real)
