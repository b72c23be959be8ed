"""The encoder blocks' outputs in few bytes: one projection for all blocks together (PCA), 8 bits a component.

The semantic decoder normalises each position of each block before anything else (`SemanticDecoder.feature_norms`), so
that it is the normalised values that are reduced, and what is restored serves it as the block's own output does. The
blocks are reduced together, as each adds to what the one before it says: for the same bytes, vit_tiny's error on CamVid
is a quarter of that of reducing each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT = 5 / 32  # of the blocks' channels. Of vit_b at 1024, 480 of 3,072: 1.9 MiB an image, beside 2 MiB of embeddings
FIT_IMAGES = 32  # that the projection is fitted on, and
FIT_POSITIONS = 1024  # of each image


class Reduction(nn.Module):
    """Features as `SemanticSegmenter.encode` gives them, into what a cache stores of them, and back."""

    mean: Tensor  # D, the channels of all blocks together
    basis: Tensor  # K x D, orthonormal rows

    def __init__(self, mean: Tensor, basis: Tensor, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    @classmethod
    def blank(cls, features: Sequence[Tensor]) -> Reduction:
        """One that keeps nothing, in the sizes that one fitted on such features has."""
        _, *blocks = features
        channels = sum(block.shape[1] for block in blocks)
        mean = blocks[0].new_zeros(channels, dtype=torch.float32)
        return cls(mean, mean.new_zeros(math.floor(channels * KEPT), channels), len(blocks))

    @classmethod
    def fit(cls, samples: Iterable[Sequence[Tensor]]) -> Reduction:
        """Fit to the features of at least one batch of images; the same samples give the same result."""
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
        signs = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()  # which eigh leaves open
        return cls(mean.float(), (basis * signs).float(), len(features) - 1)

    def reduce(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            features: embeddings, B x E x h x w, and blocks, B x C x h x w each.

        Returns:
            The embeddings as they are; codes, B x K x h x w uint8; ranges, B x 2 x K float32: the value of code 0 and
            the step from one code to the next, of each image and component.
        """
        embeddings, *blocks = features
        x = self.basis @ (_joined(blocks) - self.mean[:, None])  # B x K x HW
        low = x.amin(dim=2, keepdim=True)
        step = ((x.amax(dim=2, keepdim=True) - low) / 255).clamp(min=1e-12)
        codes = ((x - low) / step).round().to(torch.uint8).unflatten(2, blocks[0].shape[2:])
        return embeddings, codes, torch.cat([low, step], dim=2).transpose(1, 2)

    def expand(self, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What was given to `reduce`, as float32, the blocks normalised at each position."""
        embeddings, codes, ranges = stored
        low, step = ranges[..., None].unbind(dim=1)  # B x K x 1 each
        x = self.basis.T @ torch.addcmul(low, codes.flatten(2).float(), step) + self.mean[:, None]  # B x D x HW
        blocks = x.unflatten(2, codes.shape[2:]).chunk(self.num_blocks, dim=1)
        return embeddings.float(), *(block.float() for block in blocks)


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    """B x C x h x w each -> B x D x HW float32, each block normalised over its channels."""
    positions = [block.float().flatten(2).transpose(1, 2) for block in blocks]  # B x HW x C
    return torch.cat([F.layer_norm(x, x.shape[2:]) for x in positions], dim=2).transpose(1, 2)
