"""The two-way transformer of SAM's mask decoder: prompt tokens and image tokens attend to each other.

There are thousands of image tokens and a few prompt tokens, so operations on image tokens dominate the cost. The score
of a query q and a key that is projected from an image token x is q (W x + b) = (q W) x + q b. The second form projects
the few queries instead of the many image tokens: the same result in less than half the arithmetic, without a projected
copy of the image tokens. Layers whose weights must not be used without a call (see `is_plain`) are called as usual by
`Attention.forward`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything.modeling.common import ArgumentError, MLPBlock, is_exporting, is_plain


class TwoWayTransformer(nn.Module):
    """`depth` two-way blocks, then a last attention from the tokens to the image."""

    def __init__(
        self,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
    ) -> None:
        """Set the sizes; `attention_downsample_rate` divides the width within attention between tokens and image."""
        super().__init__()
        self.depth = depth
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(
                embedding_dim=embedding_dim,
                num_heads=num_heads,
                mlp_dim=mlp_dim,
                activation=activation,
                attention_downsample_rate=attention_downsample_rate,
                skip_first_layer_pe=i == 0,
            )
            for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(embedding_dim, num_heads, downsample_rate=attention_downsample_rate)
        self.norm_final_attn = nn.LayerNorm(embedding_dim)

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Let tokens and image attend to each other.

        Args:
            image_embedding: P x C x H x W.
            image_pe: position encodings, P x C x H x W or 1 x C x H x W.
            point_embedding: tokens, PG x N x C: G successive prompts share an image (G = 1 in the public package). They
                are also the position encoding of the queries in every attention.

        Returns:
            The tokens, PG x N x C, and the image tokens, PG x HW x C, after attending to each other.
        """
        if not all(is_plain(layer, TwoWayAttentionBlock) for layer in self.layers):  # others do not support sharing
            image_embedding = repeated(image_embedding, point_embedding.shape[0])
        keys = image_embedding.flatten(2).transpose(1, 2).contiguous()  # P x HW x C
        image_pe = image_pe.flatten(2).transpose(1, 2)
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries=queries, keys=keys, query_pe=point_embedding, key_pe=image_pe)
        attended = tokens_to_image(
            self.final_attn_token_to_image, q=queries + point_embedding, k=keys + image_pe, v=keys
        )
        return self.norm_final_attn(queries + attended), keys


class TwoWayAttentionBlock(nn.Module):
    """Tokens attend to themselves, then to the image, pass an MLP, and the image attends to them."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int = 2048,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
        skip_first_layer_pe: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.cross_attn_token_to_image = Attention(embedding_dim, num_heads, downsample_rate=attention_downsample_rate)
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.mlp = MLPBlock(embedding_dim, mlp_dim, activation)
        self.norm3 = nn.LayerNorm(embedding_dim)
        self.norm4 = nn.LayerNorm(embedding_dim)
        self.cross_attn_image_to_token = Attention(embedding_dim, num_heads, downsample_rate=attention_downsample_rate)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """`queries` PG x N x C and `keys` P x HW x C -> both updated, PG x N x C and PG x HW x C."""
        if self.skip_first_layer_pe:  # the first block's queries are their own position encoding
            queries = self.self_attn(q=queries, k=queries, v=queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q=q, k=q, v=queries)
        queries = self.norm1(queries)

        k = keys + key_pe
        attended = tokens_to_image(self.cross_attn_token_to_image, q=queries + query_pe, k=k, v=keys)
        queries = self.norm2(queries + attended)
        queries = self.norm3(queries + self.mlp(queries))
        attended = image_to_tokens(self.cross_attn_image_to_token, q=k, k=queries + query_pe, v=queries)
        keys = self.norm4((keys.unsqueeze(1) + attended.unflatten(0, (keys.shape[0], -1))).flatten(0, 1))  # PG x HW x C
        return queries, keys


class Attention(nn.Module):
    """Multi-head attention whose inner width is the embedding's divided by `downsample_rate`."""

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.internal_dim = embedding_dim // downsample_rate
        self.num_heads = num_heads
        if self.internal_dim % num_heads:
            raise ArgumentError(f"num_heads must divide the attention's width {self.internal_dim}, got {num_heads}")
        self.q_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.k_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.v_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.out_proj = nn.Linear(self.internal_dim, embedding_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """P x N_q x C queries on P x N_k x C keys and values -> P x N_q x C."""
        projected = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        q, k, v = (self._separate_heads(x, self.num_heads) for x in projected)
        return self.out_proj(self._recombine_heads(F.scaled_dot_product_attention(q, k, v)))

    def _separate_heads(self, x: Tensor, num_heads: int) -> Tensor:
        """P x N x (heads c) -> P x heads x N x c."""
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def _recombine_heads(self, x: Tensor) -> Tensor:
        """P x heads x N x c -> P x N x (heads c)."""
        return x.transpose(1, 2).flatten(2)

    def spares_work(self, few: Tensor, *folded: nn.Module) -> bool:
        """Whether it is cheaper to apply the `folded` layers to the `few` tokens, P x N x C, than to the image tokens.

        It is not for many tokens, as of a prompt with many points. On a CPU, both cost the same at about
        `internal_dim / num_heads` tokens. An exported graph uses the general formula for any N.
        """
        return (
            is_plain(self, Attention)
            and all(is_plain(layer, nn.Linear) and layer.bias is not None for layer in folded)
            and not is_exporting()
            and not torch.jit.is_tracing()
            and few.shape[1] * self.num_heads <= 1.25 * self.internal_dim
        )


def tokens_to_image(attention: nn.Module, *, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of few queries, PG x N x C, on many keys and values, P x HW x C -> PG x N x C.

    There are P images with G prompts each. The result is that of `attention(q=q, k=k, v=v)`, with less work.
    """
    if not isinstance(attention, Attention) or not attention.spares_work(q, attention.k_proj, attention.v_proj):
        count = q.shape[0]  # not len(q), which would be a constant in an exported graph
        return attention(q=q, k=repeated(k, count), v=repeated(v, count))
    heads = attention.num_heads
    scores = _scores(attention._separate_heads(attention.q_proj(q), heads), attention.k_proj, k)  # PG x heads x N x HW
    attended = scores.softmax(dim=3).view(len(k), -1, k.shape[1]) @ v  # P x (G heads N) x C
    value_weight = attention.v_proj.weight.unflatten(0, (heads, -1))  # heads x c x C
    attended = torch.einsum("phnc,hdc->pnhd", attended.view(*scores.shape[:3], -1), value_weight)
    # The weights of each query sum to 1, so the bias is added once.
    return attention.out_proj(attended.flatten(2) + attention.v_proj.bias)


def image_to_tokens(attention: nn.Module, *, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of many queries, P x HW x C, on few keys and values, PG x N x C -> PG x HW x C (see above)."""
    if not isinstance(attention, Attention) or not attention.spares_work(k, attention.q_proj, attention.out_proj):
        return attention(q=repeated(q, k.shape[0]), k=k, v=v)
    heads = attention.num_heads
    scores = _scores(attention._separate_heads(attention.k_proj(k), heads), attention.q_proj, q)  # PG x heads x N x HW
    out_weight = attention.out_proj.weight.unflatten(1, (heads, -1))  # C x heads x c
    values = attention._separate_heads(attention.v_proj(v), heads)
    values = torch.einsum("phnd,chd->phnc", values, out_weight)  # PG x heads x N x C
    weights = scores.softmax(dim=2).flatten(1, 2).transpose(1, 2)  # PG x HW x (heads N)
    return torch.baddbmm(attention.out_proj.bias, weights, values.flatten(1, 2))


def _scores(few: Tensor, projection: nn.Linear, many: Tensor) -> Tensor:
    """Scaled products of projected tokens, PG x heads x N x c, with the projection of `many`, P x HW x C.

    Returns:
        PG x heads x N x HW.
    """
    few = few * few.shape[-1] ** -0.5
    heads = few.shape[1]
    weight = projection.weight.unflatten(0, (heads, -1))  # heads x c x C
    bias = projection.bias.unflatten(0, (heads, -1))  # heads x c
    rows = torch.einsum("phnd,hdc->phnc", few, weight)  # PG x heads x N x C
    offsets = torch.einsum("phnd,hd->phn", few, bias)
    p = len(many)
    scores = torch.baddbmm(offsets.reshape(p, -1, 1), rows.reshape(p, -1, rows.shape[-1]), many.transpose(1, 2))
    return scores.view(*few.shape[:3], -1)


def repeated(x: Tensor, count: int) -> Tensor:
    """P x ... -> PG x ... = `count` x ..., each entry G times in a row."""
    return x if x.shape[0] == count else x.repeat_interleave(count // x.shape[0], dim=0)
