"""Layers that several parts of SAM share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


class ArgumentError(ValueError, AssertionError):
    """An invalid argument: an AssertionError as in the public package, and a ValueError as usual in Python."""


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly one of `kinds`, and a call runs nothing but that class's forward.

    Only then may its weights be used without a call. An adapter (LoRA), a hook, a parametrization, a quantised layer or
    a patched forward needs the call.
    """
    return (
        type(module) in kinds
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not _has_any_global_hook()
    )


def is_exporting() -> bool:
    """Whether torch.export, or torch.onnx by it, is making a graph."""
    # Dynamo of PyTorch 2.11 tells that it is exporting while it compiles.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of a B x C x H x W map, at each pixel."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.of_rows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def of_rows(self, x: Tensor) -> Tensor:
        """Normalise pixels with channels last, ... x C."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def pixel_upscaling(
    in_channels: int, hidden_channels: int, out_channels: int, activation: type[nn.Module] = nn.GELU
) -> nn.Sequential:
    """B x C_in x H x W -> B x C_out x 4H x 4W, by two transposed convolutions that double the size."""
    return nn.Sequential(
        nn.ConvTranspose2d(in_channels, hidden_channels, kernel_size=2, stride=2),
        LayerNorm2d(hidden_channels),
        activation(),
        nn.ConvTranspose2d(hidden_channels, out_channels, kernel_size=2, stride=2),
        activation(),
    )


def upscaled_masks(weights: Tensor, upscalings: Sequence[tuple[nn.Module, Tensor]], size: tuple[int, int]) -> Tensor:
    """Masks as products of weights with image tokens that have been upscaled.

    Args:
        weights: B x M x C.
        upscalings: modules such as `pixel_upscaling`, each with its tokens, B x HW x C_i. The channels of their outputs
            together are the C of `weights`.
        size: (H, W).

    Returns:
        B x M x 4H x 4W.
    """
    if all(_is_pixelwise(module) for module, _ in upscalings):
        parts = [_upscale_rows(module, tokens) for module, tokens in upscalings]
        rows = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]  # B x HW x 4 x 4 x C
        masks = weights @ rows.flatten(1, 3).transpose(1, 2)  # B x M x 16HW
        return _pixels_to_map(masks.unflatten(2, (-1, 4, 4)), size)
    maps = torch.cat([module(tokens.transpose(1, 2).unflatten(2, size)) for module, tokens in upscalings], dim=1)
    return (weights @ maps.flatten(2)).unflatten(2, maps.shape[2:])


def upscaled_maps(upscaling: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two stages of `pixel_upscaling`, channels last: B x H x W x C_in -> B x 2H x 2W x C_1, B x 4H x 4W x C_2."""
    assert isinstance(upscaling, nn.Sequential)
    first, norm, activation, second, last = upscaling
    doubled = activation(norm.of_rows(doubled_map(first, x)))  # type: ignore[operator]
    return doubled, last(doubled_map(second, doubled))


def doubled_map(conv: nn.Module, x: Tensor) -> Tensor:
    """A transposed convolution of kernel and stride 2 with channels last, B x H x W x C -> B x 2H x 2W x C'."""
    b, h, w, _ = x.shape
    return _double_rows(conv, x).unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, -1)


def _is_pixelwise(module: nn.Module) -> bool:
    """Whether it is a plain `pixel_upscaling`: each output pixel depends on one input pixel."""
    if not (is_plain(module, nn.Sequential) and isinstance(module, nn.Sequential) and len(module) == 5):
        return False
    first, norm, activation, second, last = module
    return (
        all(is_plain(conv, nn.ConvTranspose2d) and _doubles_size(conv) for conv in (first, second))
        and is_plain(norm, LayerNorm2d)
        and all(is_plain(act, nn.GELU, nn.ReLU) for act in (activation, last))
    )


def _doubles_size(conv: nn.Module) -> bool:
    assert isinstance(conv, nn.ConvTranspose2d)
    return (
        conv.kernel_size == conv.stride == (2, 2)
        and conv.padding == conv.output_padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is not None
    )


def _upscale_rows(upscaling: nn.Module, x: Tensor) -> Tensor:
    """`pixel_upscaling` of pixels as rows, ... x C_in -> ... x 4 x 4 x C_out.

    `_pixels_to_map` arranges the pixels at the end, when few channels are left.
    """
    assert isinstance(upscaling, nn.Sequential)
    first, norm, activation, second, last = upscaling
    return last(_double_rows(second, activation(norm.of_rows(_double_rows(first, x)))))  # type: ignore[operator]


def _double_rows(conv: nn.Module, x: Tensor) -> Tensor:
    """A transposed convolution of kernel and stride 2 as a linear layer, ... x C_in -> ... x 4 x C_out.

    The four pixels are upper left, upper right, lower left and lower right.
    """
    assert isinstance(conv, nn.ConvTranspose2d) and conv.bias is not None
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (4 C_out) x C_in
    return F.linear(x, weight, conv.bias.repeat(4)).unflatten(-1, (4, -1))


def _pixels_to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """... x HW x 4 x 4 of pixels upscaled twice, HW being H x W = `size` -> ... x 4H x 4W."""
    h, w = size
    *leading, _, _, _ = x.shape
    n = len(leading)
    x = x.reshape(*leading, h, w, 2, 2, 2, 2)  # row and column, then within the first and the second upscaling
    x = x.permute(*range(n), n, n + 2, n + 4, n + 1, n + 3, n + 5)
    return x.reshape(*leading, 4 * h, 4 * w)


def interpolate_axis(x: Tensor, dim: int, offsets: list[float]) -> Tensor:
    """Linear interpolation of an axis at offsets, -0.5 to 0.5, from each of its points; n -> n len(offsets).

    Its backward kernels are deterministic on CUDA; that of `F.interpolate` is not.
    """
    n = x.shape[dim]
    before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, n - 1)], dim)
    after = torch.cat([x.narrow(dim, 1, n - 1), x.narrow(dim, n - 1, 1)], dim)
    points = [torch.lerp(before, x, 1 + o) if o < 0 else torch.lerp(x, after, o) for o in offsets]
    return torch.stack(points, dim + 1).flatten(dim, dim + 1)


class MLPBlock(nn.Module):
    """The two-layer perceptron of a transformer block, ... x C -> ... x C."""

    def __init__(self, embedding_dim: int, mlp_dim: int, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embedding_dim, mlp_dim)
        self.lin2 = nn.Linear(mlp_dim, embedding_dim)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.act(self.lin1(x)))


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU between them, ... x C_in -> ... x C_out, in 0..1 with `sigmoid_output`."""

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int, sigmoid_output: bool = False
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.sigmoid_output = sigmoid_output
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        x = last(x)
        return x.sigmoid() if self.sigmoid_output else x
