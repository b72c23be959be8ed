"""SAM's mask decoder with a token for each class instead of prompts: image features -> one map of all classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything.modeling.common import MLP, LayerNorm2d, MLPBlock, pixel_upscaling, upscaled_masks
from segment_anything.modeling.mask_decoder import MaskDecoder


class SemanticDecoder(nn.Module):
    """Takes over a trained `MaskDecoder`, and decodes all classes of B images in one pass without any prompt.

    SAM's decoder tells what lies in a box from what does not. To name things without a box, two things are added to it.
    A small convolutional stem joins the embeddings with the outputs of encoder blocks: the embeddings alone are made
    to tell things apart, not to name them, and the decoder's image tokens see each other only through the few tokens
    of prompts and masks. And the stem's output, upscaled by itself, gives further channels beside SAM's C/8, for what
    is thin (as early features do in HQ-SAM, Ke et al., 2023, arXiv 2306.01567).
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
    ) -> None:
        """
        Args:
            mask_decoder: its transformer and upscaling become part of this module; its IoU head is of no use here.
            no_mask_embedding: 1 x C, SAM's dense embedding of no prompt.
            feature_channels: channels of each feature map of the encoder that is joined in.
            stem_blocks: residual blocks of the stem.
            detail_channels: channels beside the C/8 of SAM's upscaling.
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
        # All classes start as SAM's token for clear prompts. Alike, they would learn alike: noise tells them apart.
        token = mask_decoder.mask_tokens.weight.detach()[:1]
        self.mask_tokens = nn.Parameter(token + torch.randn(num_classes, dim))
        single_mask_mlp = mask_decoder.output_hypernetworks_mlps[0]
        assert isinstance(single_mask_mlp, MLP)
        self.output_hypernetworks = ClassMLPs(single_mask_mlp, num_classes, detail_channels)
        no_mask = no_mask_embedding.detach().view(1, -1, 1, 1).clone()
        self.register_buffer("no_mask_embedding", no_mask, persistent=False)  # the SAM file has it

    def forward(self, image_embeddings: Tensor, features: Sequence[Tensor], image_pe: Tensor) -> Tensor:
        """
        Args:
            image_embeddings: B x C x H x W.
            features: maps of encoder blocks, B x C_i x H x W each.
            image_pe: 1 x C x H x W, from `PromptEncoder.get_dense_pe`.

        Returns:
            low_res_masks, B x num_classes x 4H x 4W logits.
        """
        normed = [norm(feature) for norm, feature in zip(self.feature_norms, features)]
        stem = self.stem(torch.cat([image_embeddings, *normed], dim=1))  # B x C x H x W
        x = image_embeddings + self.no_mask_embedding + stem
        tokens, image_tokens = self.transformer(x, image_pe, self.mask_tokens.expand(len(x), -1, -1))
        weights = self.output_hypernetworks(tokens)  # B x num_classes x (C/8 + detail_channels)
        details = stem.flatten(2).transpose(1, 2)
        upscalings = [(self.output_upscaling, image_tokens), (self.detail_upscaling, details)]
        return upscaled_masks(weights, upscalings, (x.shape[2], x.shape[3]))


class ConvBlock(nn.Module):
    """The residual block of ConvNeXt (Liu et al., 2022, arXiv 2201.03545), B x C x H x W -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MLPBlock(channels, 4 * channels, nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        # Channels last, as linear layers are faster than convolutions of one pixel.
        y = self.mlp(self.norm(self.spatial(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class ClassMLPs(nn.Module):
    """One MLP for each class, all run at once: B x classes x C_in -> B x classes x C_out."""

    def __init__(self, mlp: MLP, num_classes: int, further_outputs: int) -> None:
        """
        Args:
            mlp: what each starts as; outputs beyond its own start as any linear layer's do.
        """
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
