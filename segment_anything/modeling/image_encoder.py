"""SAM's image encoder: a ViT with windowed attention, a few global blocks and a convolutional neck.

The design is ViTDet's (Li et al., 2022, arXiv 2203.16527), with the decomposed relative position of MViTv2
(Li et al., 2021, arXiv 2112.01526).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything.modeling.common import ArgumentError, LayerNorm2d, MLPBlock, is_exporting, is_plain

# Largest number of elements of the two largest tensors, the attention's bias and the MLP's hidden layer, which are
# computed in pieces. On a CPU, 16 MB in float32: above 32 MB the C library maps new pages for each tensor, which takes
# longer than the computation. On other devices, 0.5 GB in half precision.
MAX_ELEMENTS = {"cpu": 2**22}
MAX_ELEMENTS_ELSEWHERE = 2**28
MAX_ELEMENTS_EXPORTED = 2**22  # of a head's scores in an exported graph

WindowIndex = tuple[Tensor, Tensor]  # window_index and inverse_index: see `index_windows`


class ImageEncoderViT(nn.Module):
    """Normalised images, B x 3 x H x W -> image embeddings, B x out_chans x H/patch_size x W/patch_size."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        out_chans: int = 256,
        qkv_bias: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        global_attn_indexes: Collection[int] = (),
    ) -> None:
        """Set the sizes; the defaults are the public package's.

        Args:
            img_size: side of the square input in pixels, or its (H, W).
            mlp_ratio: width of a block's hidden layer, in units of `embed_dim`.
            norm_layer: creates a block's norm from its width; SAM's has eps=1e-6.
            use_rel_pos: whether attention has relative positions; SAM's models have them.
            rel_pos_zero_init: without effect, as in the public package: the tables start as zeros.
            window_size: side of the attention windows in patches; 0 for global attention.
            global_attn_indexes: blocks with global attention in spite of `window_size`.
        """
        super().__init__()
        self.frame_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = max(self.frame_size)  # clients of the public package expect the longest side
        self.embed_dim = embed_dim
        grid_size = (self.frame_size[0] // patch_size, self.frame_size[1] // patch_size)
        self.patch_embed = PatchEmbed(
            kernel_size=(patch_size, patch_size),
            stride=(patch_size, patch_size),
            in_chans=in_chans,
            embed_dim=embed_dim,
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid_size, embed_dim)) if use_abs_pos else None
        # Of each block; 0 for global attention.
        self.window_sizes = [0 if i in global_attn_indexes else window_size for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                norm_layer=norm_layer,
                act_layer=act_layer,
                use_rel_pos=use_rel_pos,
                rel_pos_zero_init=rel_pos_zero_init,
                window_size=size,
                input_size=grid_size,
            )
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
        """Encode images, and return the outputs of some blocks, too.

        Returns:
            B x out_chans x H x W, and B x C x H x W for each of `block_indexes`, in the order of the blocks.
        """
        x = self.patch_embed(x)  # B x H x W x C
        if self.pos_embed is not None:
            x = x + self.pos_embed
        features = []
        indexes: dict[int, WindowIndex] = {}  # by window size, shared by the blocks
        for i, block in enumerate(self.blocks):
            if is_plain(block, Block):
                assert isinstance(block, Block)
                x = block.forward_indexed(x, indexes)
            else:
                x = block(x)
            if i in block_indexes:
                features.append(x.permute(0, 3, 1, 2))
        return self.neck(x.permute(0, 3, 1, 2)), features


class PatchEmbed(nn.Module):
    """B x in_chans x H x W pixels -> one token for each patch, B x H x W x C."""

    def __init__(
        self,
        kernel_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] = (16, 16),
        padding: tuple[int, int] = (0, 0),
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=kernel_size, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class Block(nn.Module):
    """A pre-norm transformer block on B x H x W x C with windowed (`window_size` > 0) or global attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        """Set the sizes as for `ImageEncoderViT`; global relative positions need `input_size`, the map's (H, W)."""
        super().__init__()
        self.window_size = window_size
        self.norm1 = norm_layer(dim)
        self.attn = Attention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            use_rel_pos=use_rel_pos,
            rel_pos_zero_init=rel_pos_zero_init,
            input_size=(window_size, window_size) if window_size else input_size,
        )
        self.norm2 = norm_layer(dim)
        self.mlp = MLPBlock(dim, int(dim * mlp_ratio), act_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_indexed(x, {})

    def forward_indexed(self, x: Tensor, indexes: dict[int, WindowIndex]) -> Tensor:
        """As `forward`, with the `index_windows` of each window size; a missing one is added."""
        x = x + self._attend(self.norm1(x), indexes)
        if not self._is_tokenwise() or is_exporting():  # the number of pieces depends on the batch
            return x + self.mlp(self.norm2(x))
        tokens = x.flatten(0, 2)
        pieces = tokens.chunk(-(-len(tokens) * self.mlp.lin1.out_features // _max_elements(x)))
        return torch.cat([piece + self.mlp(self.norm2(piece)) for piece in pieces]).view_as(x)

    def _attend(self, x: Tensor, indexes: dict[int, WindowIndex]) -> Tensor:
        size, attn = self.window_size, self.attn
        plain = is_plain(attn, Attention) and all(is_plain(linear, nn.Linear) for linear in (attn.qkv, attn.proj))
        if plain and attn.use_rel_pos and _fuses(x):
            return attn.forward_fused(x, (size, size) if size else (x.shape[1], x.shape[2]))
        if not size:
            return attn(x)
        if plain:
            if size not in indexes:
                indexes[size] = index_windows((x.shape[1], x.shape[2]), size, x.device)
            return attn.forward_windows(x, size, indexes[size])
        windows, padded_size = window_partition(x, size)
        return window_unpartition(attn(windows), size, padded_size, (x.shape[1], x.shape[2]))

    def _is_tokenwise(self) -> bool:
        """Whether norm and MLP are plain, so that they can be applied to some tokens at a time instead of a map."""
        mlp = self.mlp
        return (
            is_plain(self.norm2, nn.LayerNorm)
            and is_plain(mlp, MLPBlock)
            and all(is_plain(linear, nn.Linear) for linear in (mlp.lin1, mlp.lin2))
            and is_plain(mlp.act, nn.GELU, nn.ReLU)
        )


class Attention(nn.Module):
    """Multi-head self-attention over a B x H x W x C map, with decomposed relative position."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        """Set the sizes; relative positions need `input_size`, the map's (H, W), and are resampled for other maps."""
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            if input_size is None:
                raise ArgumentError("use_rel_pos needs input_size, the (H, W) of the map")
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * length - 1, dim // num_heads)) for length in input_size
            )

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).contiguous()
        attended = self._attend(qkv.flatten(1, 2), (h, w)).unflatten(0, (b, -1))  # B x heads x HW x C/heads
        return self.proj(attended.transpose(1, 2).reshape(b, h, w, -1))

    def forward_windows(self, x: Tensor, window_size: int, index: WindowIndex) -> Tensor:
        """Attend within windows: `window_unpartition(self(window_partition(x)))` with fewer copies.

        Args:
            x: B x H x W x C.
            index: `index_windows` of the map.
        """
        b, _, _, c = x.shape
        window_index, inverse_index = index
        # SAM pads the last windows with zeros. One zero token after the others is enough.
        qkv = self.qkv(F.pad(x.flatten(1, 2), (0, 0, 0, 1))).unflatten(2, (3, self.num_heads, -1))
        qkv = qkv.permute(2, 0, 3, 1, 4).index_select(3, window_index)  # 3 x B x heads x positions x C/heads
        windows = qkv.view(3, -1, window_size**2, c // self.num_heads)
        attended = self._attend(windows, (window_size, window_size)).view(b, self.num_heads, -1, c // self.num_heads)
        return self.proj(attended.transpose(1, 2).index_select(1, inverse_index).view_as(x))

    def forward_fused(self, x: Tensor, window: tuple[int, int]) -> Tensor:
        """Attend within windows of (h, w), or to the whole map, by one kernel."""
        from segment_anything.modeling.fused_attention import attention  # needs Triton

        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, -1))
        pad = qkv.new_zeros(qkv.shape[3:]) if self.qkv.bias is None else self.qkv.bias.to(qkv.dtype).view(qkv.shape[3:])
        queries = qkv[..., 0, :, :].flatten(0, 2).transpose(0, 1)  # heads x BHW x C/heads
        affinity = queries @ distance_table(self.rel_pos_h, self.rel_pos_w, window).T.to(qkv.dtype)
        return self.proj(attention(qkv, pad, affinity, window, self.scale))

    def _attend(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        """3 x N x HW x C/heads, contiguous, of maps of `size` (H, W) -> N x HW x C/heads."""
        q, k, v = qkv
        if not self.use_rel_pos:
            return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=self.scale)[0]
        if is_exporting():
            return exported_attention(q, k, v, self.rel_pos_h, self.rel_pos_w, self.scale, size)
        bias_h, bias_w = relative_position_bias(q, distance_table(self.rel_pos_h, self.rel_pos_w, size), size)
        return attention_in_pieces(q, k, v, bias_h, bias_w, self.scale)


def attention_in_pieces(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor, scale: float) -> Tensor:
    """Attention with the additive bias `bias_h` of the key's row plus `bias_w` of its column.

    The sum of both biases has quadratic size, and no kernel computes it on the fly. It is computed for some windows and
    heads at a time and, if one is too large, for some rows of queries. At 1024 pixels, all of it would take 0.8 GB for
    each image and block, and on a CPU, mapping these pages takes as long as the attention.

    Args:
        q: N x HW x C.
        k: N x HW x C.
        v: N x HW x C.
        bias_h: N x H x W x H, of a query's position and a key's row.
        bias_w: N x H x W x W, of a query's position and a key's column.
        scale: of the products of q and k.

    Returns:
        N x HW x C.
    """
    n, h, w, _ = bias_h.shape
    limit, size = _max_elements(q), h * w
    heads, rows = max(1, min(n, limit // size**2)), max(1, min(h, limit // (size * w)))
    # One buffer for all pieces, unless autograd keeps them.
    memory = None if torch.is_grad_enabled() else q.new_empty(heads, rows, w, h, w)
    attended = []
    for some, keys, values, of_row, of_column in zip(*(x.split(heads) for x in (q, k, v, bias_h, bias_w))):
        for i in range(0, h, rows):
            by_row, by_column = of_row[:, i : i + rows, :, :, None], of_column[:, i : i + rows, :, None]
            out = None if memory is None else memory[: by_row.shape[0], : by_row.shape[1]]
            bias = torch.add(by_row, by_column, out=out).flatten(3).flatten(1, 2)  # heads x queries x HW
            attended.append(_attention(some[:, i * w : (i + rows) * w], keys, values, bias, scale).flatten(0, 1))
    return torch.cat(attended).view_as(q)


def exported_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, scale: float, size: tuple[int, int]
) -> Tensor:
    """Attention with relative positions for an exported graph, for any N: no strides, no pieces by N.

    Args:
        q, k, v, scale: as for `attention_in_pieces`.
        rel_pos_h, rel_pos_w, size: as for `relative_position_bias`.

    Returns:
        N x HW x C.
    """
    h, w = size
    # Tables by pairs of positions, as constants of the graph.
    by_row, by_column = get_rel_pos(h, h, rel_pos_h), get_rel_pos(w, w, rel_pos_w)
    queries = q.unflatten(1, size)
    bias_h = queries @ by_row.transpose(1, 2).unsqueeze(0)  # N x H x W x H
    bias_w = (queries.transpose(1, 2) @ by_column.transpose(1, 2).unsqueeze(0)).transpose(1, 2)  # N x H x W x W
    rows = max(1, min(h, MAX_ELEMENTS_EXPORTED // (h * w * w)))
    attended = []
    for i in range(0, h, rows):
        some, bias = (
            q[:, i * w : (i + rows) * w],
            bias_h[:, i : i + rows, :, :, None] + bias_w[:, i : i + rows, :, None],
        )
        if not torch.onnx.is_in_onnx_export():  # ONNX has no fused kernel
            attended.append(_attention(some, k, v, bias.flatten(3).flatten(1, 2), scale))
            continue
        scores = (scale * some) @ k.transpose(1, 2)
        scores = (scores.view(bias.shape) + bias).view(scores.shape)
        attended.append(scores.softmax(dim=-1) @ v)
    return torch.cat(attended, dim=1) if len(attended) > 1 else attended[0]


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention on N x L x C with the bias N x L x L', which may be overwritten."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # On a CPU PyTorch's fused kernel is no faster in bf16; single products are.
        out = None if torch.is_grad_enabled() else bias
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale, out=out)
        return scores.softmax(dim=-1) @ v
    # PyTorch's fused kernels need a batch dimension.
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias[None], scale=scale)[0]


def distance_table(rel_pos_h: Tensor, rel_pos_w: Tensor, size: tuple[int, int]) -> Tensor:
    """The relative positions of all distances in a map of (H, W): 2H - 1 of rows, then 2W - 1 of columns.

    Both are flipped: the tables count distances from a key to the query.
    """
    tables = (_resampled(rel_pos_h, 2 * size[0] - 1), _resampled(rel_pos_w, 2 * size[1] - 1))
    return torch.cat([table.flip(0) for table in tables])


def relative_position_bias(q: Tensor, distances: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The decomposed relative position of MViTv2: a query's affinity to its distance from each row and each column.

    Args:
        q: N x HW x C queries, unscaled.
        distances: D x C, the `distance_table` of the map.
        size: (H, W).

    Returns:
        N x H x W x H and N x H x W x W, as views.
    """
    h, w = size
    # The affinity of each query to every distance. A query needs a window of these, with one entry for each key; it
    # moves one to the left from position to position, so that all windows are one strided view ("skewing": Huang et
    # al., 2018, arXiv 1809.04281).
    affinity = F.linear(q, distances)  # N x HW x D
    n, _, d = affinity.shape
    bias_h = affinity.as_strided((n, h, w, h), (h * w * d, w * d - 1, d, 1), h - 1)
    bias_w = affinity.as_strided((n, h, w, w), (h * w * d, w * d, d - 1, 1), (2 * h - 1) + (w - 1))
    return bias_h, bias_w


def index_windows(size: tuple[int, int], window_size: int, device: torch.device) -> WindowIndex:
    """The indexes that arrange the tokens of an H x W map in windows, and back.

    Returns:
        window_index, (windows * window_size**2,) int64, windows by rows and positions in each by rows: the index of the
        token in the flattened map, or H * W outside the map. inverse_index, (H * W,) int64: the position of each token.
    """
    h, w = size
    tokens = torch.arange(h * w, device=device).view(h, w)
    tokens = F.pad(tokens, (0, -w % window_size, 0, -h % window_size), value=h * w)
    window_index = tokens.unflatten(1, (-1, window_size)).unflatten(0, (-1, window_size)).transpose(1, 2).flatten()
    # Not an argsort, which TensorRT has only for short lists.
    y, x = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)
    windows = y // window_size * (-(-w // window_size)) + x // window_size
    inverse_index = windows * window_size**2 + y % window_size * window_size + x % window_size
    return window_index, inverse_index.flatten()


def window_partition(x: Tensor, window_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut maps, B x H x W x C, into windows, padded with zeros at the lower and right edge.

    Returns:
        (B windows) x window_size x window_size x C, each map's by rows; and (H, W) with the padding.
    """
    x = F.pad(x, (0, 0, 0, -x.shape[2] % window_size, 0, -x.shape[1] % window_size))
    cells = x.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))
    return cells.transpose(2, 3).flatten(0, 2), (x.shape[1], x.shape[2])


def window_unpartition(windows: Tensor, window_size: int, pad_hw: tuple[int, int], hw: tuple[int, int]) -> Tensor:
    """Join the windows of `window_partition` to maps, B x H x W x C, without the padding.

    Args:
        windows: (B windows) x window_size x window_size x C.
        pad_hw: (H, W) with the padding.
        hw: (H, W).
    """
    rows, columns = (length // window_size for length in pad_hw)
    cells = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return cells.flatten(3, 4).flatten(1, 2)[:, : hw[0], : hw[1]].contiguous()


def get_rel_pos(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
    """The row of a relative position table for each pair of a query and a key on one axis.

    If the numbers of queries and keys differ, the smaller one's steps are longer.

    Args:
        rel_pos: L x C, one row for each distance; resampled if L does not match the sizes.

    Returns:
        q_size x k_size x C.
    """
    table = _resampled(rel_pos, 2 * max(q_size, k_size) - 1)
    q_step, k_step = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
    queries = q_step * torch.arange(q_size, device=table.device)
    keys = k_step * torch.arange(k_size, device=table.device)
    distances = queries[:, None] - keys + (k_size - 1) * k_step
    return table[distances.long()]


def add_decomposed_rel_pos(
    attn: Tensor, q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, q_size: tuple[int, int], k_size: tuple[int, int]
) -> Tensor:
    """Add decomposed relative positions to attention scores; the encoder itself uses `relative_position_bias`.

    Args:
        attn: N x (H_q W_q) x (H_k W_k) scores.
        q: N x (H_q W_q) x C queries, unscaled.
        rel_pos_h: L x C, one row for each distance.
        rel_pos_w: L x C.
        q_size: (H_q, W_q).
        k_size: (H_k, W_k).
    """
    queries = q.unflatten(1, q_size)
    by_row = torch.einsum("nyxc,ykc->nyxk", queries, get_rel_pos(q_size[0], k_size[0], rel_pos_h))
    by_column = torch.einsum("nyxc,xkc->nyxk", queries, get_rel_pos(q_size[1], k_size[1], rel_pos_w))
    bias = by_row[..., :, None] + by_column[..., None, :]  # N x H_q x W_q x H_k x W_k
    return attn + bias.flatten(3).flatten(1, 2)


def _resampled(table: Tensor, length: int) -> Tensor:
    """Resample a relative position table, L x C, to `length` rows."""
    if len(table) == length:
        return table
    return F.interpolate(table.T[None], length, mode="linear", align_corners=False)[0].T


def _fuses(x: Tensor) -> bool:
    """Whether attention on `x` can be one kernel: on a card with bf16, in half precision, without gradients."""
    is_traced = torch.compiler.is_compiling() or is_exporting() or torch.jit.is_tracing()
    if not x.is_cuda or torch.is_grad_enabled() or is_traced:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype in (torch.float16, torch.bfloat16) and _has_triton(x.device)


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether a kernel of Triton, which needs a C compiler at its first use, runs on a card."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from segment_anything.modeling.fused_attention import attention

        zeros = partial(torch.zeros, device=device, dtype=torch.float16)
        attention(zeros(1, 2, 2, 3, 1, 16), zeros(3, 1, 16), zeros(1, 4, 6), (2, 2), 1.0)
    except Exception:  # no Triton, no compiler, no folder for its cache: each has its own
        return False
    return True


def _max_elements(x: Tensor) -> int:
    return MAX_ELEMENTS.get(x.device.type, MAX_ELEMENTS_ELSEWHERE)
