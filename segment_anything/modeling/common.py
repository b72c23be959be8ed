"""Layers that several parts of SAM share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of a B x C x H x W map, at each pixel by itself."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class PixelUpscaling(nn.ConvTranspose2d):
    """A transposed convolution of kernel and stride 2 on pixels that are rows: ... x C_in -> ... x 4 x C_out.

    No two of its outputs share an input, so it is a linear layer that makes four pixels (upper left, upper right, lower
    left, lower right) of each. Channels stay last, as the layers around it want them; `pixels_to_map` puts the pixels
    in their places at the end, when there are few channels left.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (4 C_out) x C_in
        assert self.bias is not None
        return F.linear(x, weight, self.bias.repeat(4)).unflatten(-1, (4, -1))


def pixels_to_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """... x HW x 4 x 4 of pixels upscaled twice, HW being H x W = `size` -> ... x 4H x 4W."""
    h, w = size
    *leading, _, _, _ = x.shape
    n = len(leading)
    x = x.reshape(*leading, h, w, 2, 2, 2, 2)  # row and column, those within the first upscaling, and the second
    x = x.permute(*range(n), n, n + 2, n + 4, n + 1, n + 3, n + 5)
    return x.reshape(*leading, 4 * h, 4 * w)


class MLPBlock(nn.Module):
    """The two-layer perceptron of a transformer block, ... x C -> ... x C."""

    def __init__(self, channels: int, hidden_channels: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.lin1 = nn.Linear(channels, hidden_channels)
        self.lin2 = nn.Linear(hidden_channels, channels)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.act(self.lin1(x)))


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU between them, ... x C_in -> ... x C_out."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_channels, *[hidden_channels] * (num_layers - 1), out_channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)
