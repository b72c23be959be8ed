"""SAM's prompt encoder: points, boxes and masks -> sparse and dense embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from segment_anything.modeling.common import LayerNorm2d


class PromptEncoder(nn.Module):
    """Embeds P prompts, each of which may have points, a box and a mask.

    State-dict keys are Meta's: `point_embeddings` holds the learned types background point, foreground point, box
    top-left and box bottom-right, in this order.
    """

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        """Set the sizes.

        Args:
            image_embedding_size: (H, W) of the image embedding.
            input_image_size: (H, W) of the frame in pixels; positions are relative to it.
            mask_in_chans: hidden channels of the mask downscaling.
        """
        super().__init__()
        self.embed_dim = embed_dim
        self.image_embedding_size = image_embedding_size
        self.input_image_size = input_image_size
        # (H, W) of the grid of positions; the image embedding is its top-left part. `build_sam` sets it for a
        # non-square frame, because the public package has no argument for it.
        self.position_grid_size = image_embedding_size
        self.mask_input_size = (4 * image_embedding_size[0], 4 * image_embedding_size[1])
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        self.num_point_embeddings = 4
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(self.num_point_embeddings))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            activation(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans),
            activation(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def get_dense_pe(self) -> Tensor:
        """Position encodings of the image embedding's grid, 1 x C x H x W."""
        height, width = self.image_embedding_size
        return self.pe_layer(self.position_grid_size)[None, :, :height, :width]

    def forward(
        self, points: tuple[Tensor, Tensor] | None = None, boxes: Tensor | None = None, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed P prompts.

        Args:
            points: coordinates, P x N x 2 (x, y) in pixels of the input frame, and labels, P x N:
                1 foreground, 0 background, -1 no point.
            boxes: P x 4, xyxy in pixels of the input frame.
            masks: P x 1 x H x W logits of an earlier mask, at `mask_input_size`.

        Returns:
            sparse_embeddings, P x N' x C, and dense_embeddings, P x C x H x W (P = 1 where no prompt is given).
        """
        sparse = []
        if points is not None:
            sparse.append(self._embed_points(*points, pad=boxes is None))
        if boxes is not None:
            sparse.append(self._embed_boxes(boxes))
        num_prompts = self._get_batch_size(points, boxes, masks)

        no_mask = self.no_mask_embed.weight  # 1 x C
        sparse_embeddings = torch.cat(sparse, dim=1) if sparse else no_mask.new_empty(num_prompts, 0, self.embed_dim)
        if masks is not None:
            return sparse_embeddings, self._embed_masks(masks)
        dense = no_mask.view(1, -1, 1, 1).expand(num_prompts, -1, *self.image_embedding_size)
        return sparse_embeddings, dense

    def _get_batch_size(self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None) -> int:
        given = [prompt for prompt in (points[0] if points else None, boxes, masks) if prompt is not None]
        return len(given[0]) if given else 1

    def _get_device(self) -> torch.device:
        return self.no_mask_embed.weight.device

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        if pad:  # without a box, SAM adds a point with the label "no point"
            points = torch.cat([points, points.new_zeros(points.shape[0], 1, 2)], dim=1)
            labels = torch.cat([labels, labels.new_full((labels.shape[0], 1), -1)], dim=1)
        embeddings = self._encode_pixels(points)
        label = labels.unsqueeze(-1)  # P x N x 1
        background, foreground = self._point_types()[:2]
        embeddings = torch.where(label == -1, self.not_a_point_embed.weight, embeddings)
        embeddings = embeddings + torch.where(label == 0, background, 0.0)
        return embeddings + torch.where(label == 1, foreground, 0.0)

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        return self._encode_pixels(boxes.reshape(-1, 2, 2)) + self._point_types()[2:]  # P x 2 x C

    def _embed_masks(self, masks: Tensor) -> Tensor:
        return self.mask_downscaling(masks.to(self.no_mask_embed.weight.dtype))

    def _point_types(self) -> Tensor:
        return torch.cat([embedding.weight for embedding in self.point_embeddings])  # type: ignore[misc]  # 4 x C

    def _encode_pixels(self, coords: Tensor) -> Tensor:
        # + 0.5: a coordinate names a pixel, and its position is the pixel's centre.
        return self.pe_layer.forward_with_coords(coords.to(self.pe_layer.precise) + 0.5, self.input_image_size)


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of positions (Tancik et al., 2020, arXiv 2006.10739)."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, num_pos_feats: int = 64, scale: float | None = None) -> None:
        """Draw the frequencies with the standard deviation `scale`; 1 if it is None or not positive."""
        super().__init__()
        matrix = torch.randn(2, num_pos_feats) * (scale if scale and scale > 0 else 1.0)
        self.register_buffer("positional_encoding_gaussian_matrix", matrix)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Encodings of the centres of an H x W grid, C x H x W."""
        device = self.positional_encoding_gaussian_matrix.device
        y, x = ((torch.arange(n, device=device) + 0.5) / n for n in size)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # H x W x 2
        return self._pe_encoding(grid).permute(2, 0, 1)

    def forward_with_coords(self, coords_input: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Encodings of positions in pixels, ... x 2 (x, y), of a frame of `image_size` (H, W) -> ... x C."""
        height, width = image_size
        x, y = coords_input.to(self.precise).unbind(-1)
        return self._pe_encoding(torch.stack([x / width, y / height], dim=-1))

    def _pe_encoding(self, coords: Tensor) -> Tensor:
        """... x 2 positions (x, y) in [0, 1] -> ... x (2 * num_pos_feats)."""
        matrix = self.positional_encoding_gaussian_matrix
        x, y = (2 * coords.to(self.precise) - 1).unsqueeze(-2).unbind(-1)  # each ... x 1
        frequencies_x, frequencies_y = matrix.to(self.precise)
        # Not a matrix product: autocast would compute it in half precision, too coarse for pixels.
        phase = 2 * math.pi * (x * frequencies_x + y * frequencies_y)
        return torch.cat([phase.sin(), phase.cos()], dim=-1).to(matrix.dtype)

    @property
    def precise(self) -> torch.dtype:
        """The type for positions: that of the weights, but float32 in a model of half precision."""
        return torch.promote_types(self.positional_encoding_gaussian_matrix.dtype, torch.float32)
