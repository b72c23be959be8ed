"""Compresses the outputs of encoder blocks: one PCA for all blocks together, 8 bits per component.

The semantic decoder first normalises each position of each block (`SemanticDecoder.feature_norms`). So the normalised
values are compressed, and what is restored serves the decoder like the block's own output. Blocks are compressed
together because their outputs are correlated: at equal size, the error of vit_tiny on CamVid is a quarter of that of
one PCA per block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT = 5 / 32  # share of the blocks' channels. vit_b at 1024: 480 of 3,072, or 1.9 MiB per image
FIT_IMAGES = 32  # images that the PCA is fitted to
FIT_POSITIONS = 1024  # positions of each of them


class FeaturePCA(nn.Module):
    """Turns the features of `SemanticSegmenter.encode` into what a cache stores, and back."""

    mean: Tensor  # D, the number of channels of all blocks
    basis: Tensor  # K x D, orthonormal rows

    def __init__(self, mean: Tensor, basis: Tensor, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    @classmethod
    def blank(cls, features: Sequence[Tensor]) -> FeaturePCA:
        """A PCA of zeros, with the sizes of one that is fitted to such features."""
        _, *blocks = features
        channels = sum(block.shape[1] for block in blocks)
        mean = blocks[0].new_zeros(channels, dtype=torch.float32)
        return cls(mean, mean.new_zeros(math.floor(channels * KEPT), channels), len(blocks))

    @classmethod
    def fit(cls, samples: Iterable[Sequence[Tensor]]) -> FeaturePCA:
        """Fit to the features of one or more batches. The same samples give the same result."""
        count, total, products = 0, torch.zeros(()), torch.zeros(())
        for features in samples:
            x = _joined(features[1:])
            x = x[..., :: max(1, x.shape[-1] // FIT_POSITIONS)].transpose(0, 1).flatten(1)  # D x N
            total = total + x.sum(dim=1).double().cpu()
            products = products + (x @ x.T).double().cpu()
            count += x.shape[1]
        mean = total / count
        directions = torch.linalg.eigh(products / count - mean.outer(mean)).eigenvectors  # ascending
        basis = directions.T.flip(0)[: math.floor(len(mean) * KEPT)]
        signs = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()  # eigh does not define them
        return cls(mean.float(), (basis * signs).float(), len(features) - 1)

    def reduce(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Compress the blocks, and pass the embeddings through.

        Args:
            features: embeddings, B x E x h x w, and blocks, B x C x h x w each.

        Returns:
            The embeddings; codes, B x K x h x w uint8; ranges, B x 2 x K float32: the value of code 0 and the step
            between codes, per image and component.
        """
        embeddings, *blocks = features
        x = self.basis @ (_joined(blocks) - self.mean[:, None])  # B x K x HW
        low = x.amin(dim=2, keepdim=True)
        step = ((x.amax(dim=2, keepdim=True) - low) / 255).clamp(min=1e-12)
        codes = ((x - low) / step).round().to(torch.uint8).unflatten(2, blocks[0].shape[2:])
        return embeddings, codes, torch.cat([low, step], dim=2).transpose(1, 2)

    def expand(self, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Restore the features that `reduce` was given, as float32, with blocks normalised at each position."""
        embeddings, codes, ranges = stored
        low, step = ranges[..., None].unbind(dim=1)  # B x K x 1 each
        x = self.basis.T @ torch.addcmul(low, codes.flatten(2).float(), step) + self.mean[:, None]  # B x D x HW
        blocks = x.unflatten(2, codes.shape[2:]).chunk(self.num_blocks, dim=1)
        return embeddings.float(), *(block.float() for block in blocks)


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    """B x C x h x w each -> B x D x HW float32, each block normalised over its channels."""
    positions = [block.float().flatten(2).transpose(1, 2) for block in blocks]  # B x HW x C
    return torch.cat([F.layer_norm(x, x.shape[2:]) for x in positions], dim=2).transpose(1, 2)
