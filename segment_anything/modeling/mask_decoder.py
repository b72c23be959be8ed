"""SAM's mask decoder: image embeddings and prompt embeddings -> mask logits and their predicted IoU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segment_anything.modeling.common import MLP, PixelUpscaling, pixels_to_map


class MaskDecoder(nn.Module):
    """Decodes Q prompts for each of B images in one pass."""

    def __init__(
        self,
        *,
        transformer: nn.Module,
        transformer_dim: int,
        num_multimask_outputs: int = 3,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
    ) -> None:
        """
        Args:
            transformer: a `TwoWayTransformer` of width `transformer_dim`.
            num_multimask_outputs: masks for an ambiguous prompt, beside the one for a clear prompt.
        """
        super().__init__()
        self.transformer = transformer
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, transformer_dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, transformer_dim)
        self.output_upscaling = nn.Sequential(
            PixelUpscaling(transformer_dim, transformer_dim // 4),
            nn.LayerNorm(transformer_dim // 4, eps=1e-6),
            nn.GELU(),
            PixelUpscaling(transformer_dim // 4, transformer_dim // 8),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(transformer_dim, transformer_dim, transformer_dim // 8, 3) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(transformer_dim, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth)

    def forward(
        self,
        *,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            image_embeddings: B x C x H x W.
            image_pe: 1 x C x H x W, from `PromptEncoder.get_dense_pe`.
            sparse_prompt_embeddings: B x Q x N x C.
            dense_prompt_embeddings: B x Q x C x H x W; or B x 1 x C x H x W, where all prompts of an image share
                them, which spares work.
            multimask_output: three masks for each prompt, for an ambiguous one, or the single best.

        Returns:
            low_res_masks, B x Q x M x 4H x 4W logits, and iou_predictions, B x Q x M, with M = 3 or 1.
        """
        b, q = sparse_prompt_embeddings.shape[:2]
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1 + M) x C
        tokens = torch.cat([output_tokens.expand(b, q, -1, -1), sparse_prompt_embeddings], dim=2).flatten(0, 1)

        # The image tokens are updated for each prompt: they come out as BQ x HW x C.
        image_tokens = (image_embeddings.unsqueeze(1) + dense_prompt_embeddings).flatten(0, 1).flatten(2)
        tokens, image_tokens = self.transformer(
            image_tokens.transpose(1, 2).contiguous(), image_pe.flatten(2).transpose(1, 2), tokens
        )
        iou_token, mask_tokens = tokens[:, 0], tokens[:, 1 : 1 + self.num_mask_tokens]

        # Token 0 was trained for clear prompts, the others for ambiguous ones.
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        weights = torch.stack(
            [mlp(token) for mlp, token in zip(self.output_hypernetworks_mlps, mask_tokens.unbind(1))], dim=1
        )[:, chosen]  # BQ x M x C/8; all are made, though few are used: each parameter is to have a gradient
        upscaled = self.output_upscaling(image_tokens)  # BQ x HW x 4 x 4 x C/8
        masks = weights @ upscaled.flatten(1, 3).transpose(1, 2)  # BQ x M x 16HW
        masks = pixels_to_map(masks.unflatten(2, (-1, 4, 4)), image_embeddings.shape[-2:])
        iou_predictions = self.iou_prediction_head(iou_token)[:, chosen]
        return masks.unflatten(0, (b, q)), iou_predictions.unflatten(0, (b, q))
