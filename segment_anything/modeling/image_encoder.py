"""SAM's image encoder: a ViT with windowed attention, a few global blocks and a convolutional neck.

The design is ViTDet's (Li et al., 2022, arXiv 2203.16527), with the decomposed relative position of MViTv2
(Li et al., 2021, arXiv 2112.01526).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything.modeling.common import LayerNorm2d, MLPBlock

# Elements made at a time of what is larger than all else: the attention's bias and the MLP's hidden layer. On a CPU,
# 16 MB in float32: above 32 MB the C library takes a tensor's memory from the system anew, page by page, which costs
# more than to compute it. On a GPU, 0.5 GB in half precision.
MAX_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}

Order = tuple[Tensor, Tensor]  # of the tokens of a map in windows, and back: see `window_order`


class ImageEncoderViT(nn.Module):
    """Normalised images, B x 3 x S x S -> image embeddings, B x out_chans x S/patch_size x S/patch_size."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        window_size: int,
        global_attn_indexes: Collection[int],
        out_chans: int,
    ) -> None:
        """
        Args:
            window_size: side, in patches, of the windows that attention is confined to, except in
            global_attn_indexes: the blocks that attend over the whole image.
        """
        super().__init__()
        self.image_size = image_size
        self.embed_dim = embed_dim
        grid_size = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size=patch_size, embed_dim=embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid_size, grid_size, embed_dim))
        # Of each block; 0 where it attends over the whole image.
        self.window_sizes = [0 if i in global_attn_indexes else window_size for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(dim=embed_dim, num_heads=num_heads, window_size=size, grid_size=grid_size)
            for size in self.window_sizes
        )
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dim, out_chans, kernel_size=1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x, ())[0]

    def forward_features(self, x: Tensor, block_indexes: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """The image embeddings, and the outputs of some blocks on the way to them.

        Returns:
            B x out_chans x H x W, and B x C x H x W for each of `block_indexes`, in the order of the blocks.
        """
        x = self.patch_embed(x) + self.pos_embed  # B x H x W x C
        features = []
        orders = {size: window_order((x.shape[1], x.shape[2]), size, x.device) for size in set(self.window_sizes)}
        for i, (block, size) in enumerate(zip(self.blocks, self.window_sizes)):
            x = block(x, orders[size])
            if i in block_indexes:
                features.append(x.permute(0, 3, 1, 2))
        return self.neck(x.permute(0, 3, 1, 2)), features


class PatchEmbed(nn.Module):
    """B x 3 x S x S -> one token for each patch, B x H x W x C."""

    def __init__(self, *, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class Block(nn.Module):
    """A pre-norm transformer block on B x H x W x C, attending within windows (`window_size` > 0) or globally."""

    def __init__(self, *, dim: int, num_heads: int, window_size: int, grid_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim=dim, num_heads=num_heads, window_size=window_size, grid_size=grid_size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLPBlock(dim, 4 * dim, nn.GELU)

    def forward(self, x: Tensor, order: Order) -> Tensor:
        tokens = (x + self.attn(self.norm1(x), order)).flatten(0, 2)
        pieces = tokens.chunk(-(-len(tokens) * self.mlp.lin1.out_features // MAX_ELEMENTS[x.device.type]))
        return torch.cat([piece + self.mlp(self.norm2(piece)) for piece in pieces]).view_as(x)


class Attention(nn.Module):
    """Multi-head self-attention with decomposed relative position on a B x H x W x C map.

    Within windows of `window_size`, or over the whole map if that is 0.
    """

    def __init__(self, *, dim: int, num_heads: int, window_size: int, grid_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        distances = 2 * (window_size or grid_size) - 1
        self.rel_pos_h = nn.Parameter(torch.zeros(distances, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(distances, dim // num_heads))

    def forward(self, x: Tensor, order: Order) -> Tensor:
        """
        Args:
            order: `window_order` of the map and `window_size`, which all blocks of an encoding share.
        """
        b, h, w, c = x.shape
        window = (self.window_size, self.window_size) if self.window_size else (h, w)
        sources, places = order
        # SAM pads the last windows with zeros. All project alike, so one is enough: it is put behind the tokens.
        qkv = self.qkv(F.pad(x.flatten(1, 2), (0, 0, 0, 1))).unflatten(2, (3, self.num_heads, -1))
        qkv = qkv.permute(2, 0, 3, 1, 4).index_select(3, sources)  # 3 x B x heads x places x C/heads
        q, k, v = qkv.view(3, -1, window[0] * window[1], c // self.num_heads)  # each N x HW x C/heads of a window
        bias_h, bias_w = relative_position_bias(q, self.rel_pos_h, self.rel_pos_w, window)
        attended = attention_in_pieces(q, k, v, bias_h, bias_w).view(b, self.num_heads, -1, c // self.num_heads)
        return self.proj(attended.transpose(1, 2).index_select(1, places).view_as(x))


def attention_in_pieces(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor) -> Tensor:
    """Attention whose additive bias is `bias_h` of the key's row plus `bias_w` of its column.

    That sum is the one tensor of quadratic size, and no kernel adds it up by itself. It is made for some windows and
    heads, and where one of them is too large, for some rows of queries, at a time: at 1024 pixels, the whole of it
    would be 0.8 GB for each image and block, and on a CPU to have such pages mapped takes as long as the attention
    itself.

    Args:
        q, k, v: N x HW x C.
        bias_h: N x H x W x H, of a query's place and a key's row.
        bias_w: N x H x W x W, of a query's place and a key's column.

    Returns:
        N x HW x C.
    """
    n, h, w, _ = bias_h.shape
    limit, size = MAX_ELEMENTS[q.device.type], h * w
    heads, rows = max(1, min(n, limit // size**2)), max(1, min(h, limit // (size * w)))
    # One memory for all pieces, unless autograd keeps them.
    memory = None if torch.is_grad_enabled() else q.new_empty(heads, rows, w, h, w)
    attended = []
    for some, keys, values, of_row, of_column in zip(*(x.split(heads) for x in (q, k, v, bias_h, bias_w))):
        for i in range(0, h, rows):
            by_row, by_column = of_row[:, i : i + rows, :, :, None], of_column[:, i : i + rows, :, None]
            out = None if memory is None else memory[: by_row.shape[0], : by_row.shape[1]]
            bias = torch.add(by_row, by_column, out=out).flatten(3).flatten(1, 2)  # heads x queries x HW
            attended.append(_attention(some[:, i * w : (i + rows) * w], keys, values, bias).flatten(0, 1))
    return torch.cat(attended).view_as(q)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention on N x L x C with the bias N x L x L', which is not needed any more afterwards."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # On a CPU PyTorch's fused kernel gains nothing from bf16; the products by themselves do.
        out = None if torch.is_grad_enabled() else bias
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5, out=out)
        return scores.softmax(dim=-1) @ v
    # With the dimension of batches in front, PyTorch's fused kernels take it.
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias[None])[0]


def relative_position_bias(
    q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The decomposed relative position of MViTv2: a query's affinity to its distance from each row and each column.

    Args:
        q: N x HW x C queries, unscaled.
        rel_pos_h, rel_pos_w: (2H - 1) x C and (2W - 1) x C, one row for each distance.

    Returns:
        N x H x W x H and N x H x W x W, as views.
    """
    h, w = size
    # The affinity to every distance, of which each query needs a window of as many as there are keys. It begins one
    # further to the left for each place further on, so that all windows together are one strided view ("skewing":
    # Huang et al., 2018, arXiv 1809.04281). Flipped, as the tables count distances from a key to the query.
    distances = torch.cat([rel_pos_h.flip(0), rel_pos_w.flip(0)])
    affinity = F.linear(q, distances)  # N x HW x D
    n, _, d = affinity.shape
    bias_h = affinity.as_strided((n, h, w, h), (h * w * d, w * d - 1, d, 1), h - 1)
    bias_w = affinity.as_strided((n, h, w, w), (h * w * d, w * d, d - 1, 1), (2 * h - 1) + (w - 1))
    return bias_h, bias_w


def window_order(size: tuple[int, int], window_size: int, device: torch.device) -> Order:
    """Which token of an H x W map is at each place of the windows that cover it, and where each token is.

    Args:
        window_size: 0 for one window that is the map.

    Returns:
        (windows * window H * window W,) int64, windows by rows and the places in each by rows: the index of the token
        in the flattened map, or H * W where the window exceeds the map; and (H * W,) int64, the place of each token.
    """
    h, w = size
    window_h, window_w = (window_size, window_size) if window_size else size
    tokens = torch.arange(h * w, device=device).view(h, w)
    tokens = F.pad(tokens, (0, -w % window_w, 0, -h % window_h), value=h * w)
    sources = tokens.unflatten(1, (-1, window_w)).unflatten(0, (-1, window_h)).transpose(1, 2).flatten()
    return sources, sources.argsort()[: h * w]
