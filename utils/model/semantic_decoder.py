"""SAM's mask decoder with a token for each class instead of prompts: image features -> one map of all classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything.modeling.common import (
    MLP,
    LayerNorm2d,
    MLPBlock,
    doubled_map,
    interpolate_axis,
    pixel_upscaling,
    upscaled_maps,
    upscaled_masks,
)
from segment_anything.modeling.mask_decoder import MaskDecoder


class SemanticDecoder(nn.Module):
    """Decodes all classes of B images in one pass without a prompt; starts from a trained `MaskDecoder`.

    SAM's decoder separates the inside of a box from the outside. To recognise classes without a box, two things are
    added. A convolutional stem joins the embeddings with outputs of encoder blocks: SAM's embeddings are trained to
    separate objects, not to recognise classes. The stem's output is upscaled, too, and adds channels for thin objects
    to SAM's C/8 (as early features do in HQ-SAM, Ke et al., 2023, arXiv 2306.01567).
    """

    no_mask_embedding: Tensor

    def __init__(
        self,
        *,
        mask_decoder: MaskDecoder,
        no_mask_embedding: Tensor,
        num_classes: int,
        feature_channels: Sequence[int],
        stem_blocks: int,
        detail_channels: int = 32,
        pixel_channels: int = 16,
    ) -> None:
        """Take over parts of a mask decoder and add the others.

        Args:
            mask_decoder: its transformer and upscaling become part of this module; its IoU head is not used.
            no_mask_embedding: 1 x C, SAM's dense embedding of no prompt.
            feature_channels: channels of each encoder block's output.
            stem_blocks: residual blocks of the stem.
            detail_channels: channels added to the C/8 of SAM's upscaling.
            pixel_channels: see `DetailPath`; 0 for no detail path, as in decoders of earlier versions.
        """
        super().__init__()
        dim = mask_decoder.mask_tokens.embedding_dim
        self.transformer = mask_decoder.transformer
        self.output_upscaling = mask_decoder.output_upscaling
        self.feature_norms = nn.ModuleList(LayerNorm2d(channels) for channels in feature_channels)
        self.stem = nn.Sequential(
            nn.Conv2d(dim + sum(feature_channels), dim, kernel_size=1),
            LayerNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, kernel_size=3, padding=1),
            LayerNorm2d(dim),
            nn.GELU(),
            *(ConvBlock(dim) for _ in range(stem_blocks)),
        )
        self.detail_upscaling = pixel_upscaling(dim, dim // 2, detail_channels)
        channels = (dim // 4 + dim // 2, dim // 8 + detail_channels)  # of both upscalings together, at strides 8 and 4
        self.detail_path = DetailPath(*channels, pixel_channels) if pixel_channels else None
        # All classes start as SAM's single-mask token. Equal tokens would stay equal, so noise is added.
        token = mask_decoder.mask_tokens.weight.detach()[:1]
        self.mask_tokens = nn.Parameter(token + torch.randn(num_classes, dim))
        single_mask_mlp = mask_decoder.output_hypernetworks_mlps[0]
        assert isinstance(single_mask_mlp, MLP)
        self.output_hypernetworks = ClassMLPs(single_mask_mlp, num_classes, detail_channels + pixel_channels)
        no_mask = no_mask_embedding.detach().view(1, -1, 1, 1).clone()
        self.register_buffer("no_mask_embedding", no_mask, persistent=False)  # it is in the SAM file

    def forward(
        self, image_embeddings: Tensor, features: Sequence[Tensor], image_pe: Tensor, pixels: Tensor | None = None
    ) -> Tensor:
        """Decode all classes.

        Args:
            image_embeddings: B x C x H x W.
            features: outputs of encoder blocks, B x C_i x H x W each.
            image_pe: 1 x C x H x W, from `PromptEncoder.get_dense_pe`.
            pixels: the normalised images, B x 3 x 16H x 16W, for the detail path.

        Returns:
            low_res_masks, B x num_classes x 8H x 8W logits; without a detail path, 4H x 4W.
        """
        normed = [norm(feature) for norm, feature in zip(self.feature_norms, features)]
        stem = self.stem(torch.cat([image_embeddings, *normed], dim=1))  # B x C x H x W
        x = image_embeddings + self.no_mask_embedding + stem
        tokens, image_tokens = self.transformer(x, image_pe, self.mask_tokens.expand(x.shape[0], -1, -1))
        weights = self.output_hypernetworks(tokens)  # B x num_classes x (C/8 + detail_channels + pixel_channels)
        size = (x.shape[2], x.shape[3])
        if self.detail_path is None:
            upscalings = [(self.output_upscaling, image_tokens), (self.detail_upscaling, _rows(stem).flatten(1, 2))]
            return upscaled_masks(weights, upscalings, size)
        assert pixels is not None, "the detail path needs pixels"
        upscaled = [
            upscaled_maps(self.output_upscaling, image_tokens.unflatten(1, size)),
            upscaled_maps(self.detail_upscaling, _rows(stem)),
        ]
        upscaled_8, upscaled_4 = (torch.cat(maps, dim=-1) for maps in zip(*upscaled))
        coarse, fine = self.detail_path(upscaled_8, upscaled_4, pixels)
        of_coarse, of_fine = weights.split([coarse.shape[-1], fine.shape[-1]], dim=2)
        return doubled(_masks(of_coarse, coarse)) + _masks(of_fine, fine)


def of_classes(name: str) -> bool:
    """Whether a parameter of `SemanticDecoder`, by its name, has a row for each class along its first axis."""
    return "mask_tokens" in name or "output_hypernetworks." in name


def _masks(weights: Tensor, maps: Tensor) -> Tensor:
    """B x M x C and B x H x W x C -> B x M x H x W."""
    return (weights @ maps.flatten(1, 2).transpose(1, 2)).unflatten(2, maps.shape[1:3])


class DetailPath(nn.Module):
    """A light convolutional path from the pixels, for objects that are narrower than an encoder token.

    It joins pixel features with the upscaled image tokens at strides 8, 4 and 2. Channels are last throughout, for
    norms and linear layers.
    """

    def __init__(self, channels_8: int, channels_4: int, pixel_channels: int, blocks_8: int = 2) -> None:
        """Set the widths of the path.

        Args:
            channels_8: channels of the image tokens upscaled to stride 8.
            channels_4: the same at stride 4.
            pixel_channels: channels of the pixels at stride 2; twice as many at stride 4, four times at stride 8.
            blocks_8: residual blocks at stride 8.
        """
        super().__init__()
        c2, c4, c8, joined_8 = pixel_channels, 2 * pixel_channels, 4 * pixel_channels, 6 * pixel_channels
        self.pixels_2 = nn.Conv2d(3, c2, kernel_size=3, stride=2, padding=1)
        self.pixels_4 = nn.Sequential(RowNorm(c2), nn.GELU(), nn.Conv2d(c2, c4, kernel_size=3, stride=2, padding=1))
        self.pixels_8 = nn.Sequential(RowNorm(c4), nn.GELU(), nn.Conv2d(c4, c8, kernel_size=3, stride=2, padding=1))
        self.join_8 = nn.Sequential(nn.LayerNorm(channels_8 + c8, eps=1e-6), nn.Linear(channels_8 + c8, joined_8))
        self.blocks_8 = nn.Sequential(*(ConvBlock(joined_8) for _ in range(blocks_8)))
        self.upscaling_8 = nn.ConvTranspose2d(joined_8, channels_4, kernel_size=2, stride=2)
        self.join_4 = nn.Sequential(nn.LayerNorm(channels_4 + c4, eps=1e-6), nn.Linear(channels_4 + c4, channels_4))
        self.block_4 = ConvBlock(channels_4, kernel_size=3, expansion=2)
        self.upscaling_4 = nn.ConvTranspose2d(channels_4, c2, kernel_size=2, stride=2)
        self.join_2 = nn.Sequential(RowNorm(2 * c2), nn.Conv2d(2 * c2, c2, kernel_size=3, padding=1), nn.GELU())

    def forward(self, upscaled_8: Tensor, upscaled_4: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Join pixels and upscaled image tokens.

        Args:
            upscaled_8: B x H/8 x W/8 x channels_8.
            upscaled_4: B x H/4 x W/4 x channels_4.
            pixels: B x 3 x H x W.

        Returns:
            B x H/4 x W/4 x channels_4, and B x H/2 x W/2 x pixel_channels.
        """
        pixels_2 = self.pixels_2(pixels.contiguous(memory_format=torch.channels_last))
        pixels_4 = self.pixels_4(pixels_2)
        pixels_8 = self.pixels_8(pixels_4)
        x = self.join_8(torch.cat([upscaled_8, _rows(pixels_8)], dim=-1))
        x = _rows(self.blocks_8(_maps(x)))
        coarse = upscaled_4 + doubled_map(self.upscaling_8, x)
        coarse = coarse + self.join_4(torch.cat([coarse, _rows(pixels_4)], dim=-1))
        coarse = _rows(self.block_4(_maps(coarse)))
        fine = torch.cat([doubled_map(self.upscaling_4, coarse), _rows(pixels_2)], dim=-1)
        return coarse, _rows(self.join_2(_maps(fine)))


class RowNorm(nn.LayerNorm):
    """Layer normalisation over the channels of B x C x H x W that is channels-last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return _maps(super().forward(_rows(x)))


def _rows(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1)


def _maps(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2)


def doubled(x: Tensor) -> Tensor:
    """Bilinear interpolation to twice the size, not aligned to corners: B x C x H x W -> B x C x 2H x 2W."""
    for dim in (2, 3):
        x = interpolate_axis(x, dim, [-0.25, 0.25])
    return x


class ConvBlock(nn.Module):
    """The residual block of ConvNeXt (Liu et al., 2022, arXiv 2201.03545) on B x C x H x W."""

    def __init__(self, channels: int, kernel_size: int = 7, expansion: int = 4) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MLPBlock(channels, expansion * channels, nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        # Channels last: linear layers are faster than 1 x 1 convolutions.
        return x + _maps(self.mlp(self.norm(_rows(self.spatial(x)))))


class ClassMLPs(nn.Module):
    """One MLP for each class, computed together: B x classes x C_in -> B x classes x C_out."""

    def __init__(self, mlp: MLP, num_classes: int, further_outputs: int) -> None:
        """Copy `mlp` for each class; its `further_outputs` are initialised as in any linear layer."""
        super().__init__()
        weights, biases = [], []
        for layer in mlp.layers:
            assert isinstance(layer, nn.Linear)
            weights.append(layer.weight.detach())
            biases.append(layer.bias.detach())
        further = nn.Linear(weights[-1].shape[1], further_outputs)
        weights[-1] = torch.cat([weights[-1], further.weight.detach()])
        biases[-1] = torch.cat([biases[-1], further.bias.detach()])
        self.weights = nn.ParameterList(w.T.expand(num_classes, -1, -1).clone() for w in weights)
        self.biases = nn.ParameterList(b.expand(num_classes, 1, -1).clone() for b in biases)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)  # classes x B x C: a batch of matrix products
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x if i == 0 else F.relu(x), weight)
        return x.transpose(0, 1)
