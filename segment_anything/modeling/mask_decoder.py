"""SAM's mask decoder: image embeddings and prompt embeddings -> mask logits and their predicted IoU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segment_anything.modeling.common import MLP, ArgumentError, LayerNorm2d, is_plain, pixel_upscaling, upscaled_masks
from segment_anything.modeling.transformer import TwoWayTransformer, repeated

__all__ = ["MLP", "LayerNorm2d", "MaskDecoder"]  # the first two are found here in the public package too


class MaskDecoder(nn.Module):
    """Decodes P prompts of an image, or Q prompts for each of B images, in one pass."""

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: nn.Module,
        num_multimask_outputs: int = 3,
        activation: type[nn.Module] = nn.GELU,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
    ) -> None:
        """Set the sizes.

        Args:
            transformer: a `TwoWayTransformer` of that width.
            num_multimask_outputs: masks for an ambiguous prompt, in addition to the one for a clear prompt.
            activation: of the upscaling.
        """
        super().__init__()
        self.transformer_dim = transformer_dim
        self.transformer = transformer
        self.num_multimask_outputs = num_multimask_outputs
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, transformer_dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, transformer_dim)
        self.output_upscaling = pixel_upscaling(transformer_dim, transformer_dim // 4, transformer_dim // 8, activation)
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(transformer_dim, transformer_dim, transformer_dim // 8, 3) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(transformer_dim, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decode P prompts of one image, or one prompt for each of P images.

        Args:
            image_embeddings: 1 x C x H x W, or P x C x H x W.
            image_pe: 1 x C x H x W, from `PromptEncoder.get_dense_pe`.
            sparse_prompt_embeddings: P x N x C.
            dense_prompt_embeddings: P x C x H x W, or 1 x C x H x W for all.
            multimask_output: three masks for each prompt, for an ambiguous one, or the single best.

        Returns:
            low_res_masks, P x M x 4H x 4W logits, and iou_predictions, P x M, with M = 3 or 1.

        To decode Q prompts for each of B images, give `image_embeddings` B x C x H x W, `sparse_prompt_embeddings`
        B x Q x N x C, and `dense_prompt_embeddings` B x Q x C x H x W, or B x 1 x C x H x W if an image's prompts share
        them, which is faster. The results are B x Q x M x 4H x 4W and B x Q x M.
        """
        # Token 0 was trained for clear prompts, the others for ambiguous ones.
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        embeddings = (image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings)
        if type(self).predict_masks is MaskDecoder.predict_masks and "predict_masks" not in vars(self):
            return self._predict(*embeddings, chosen)
        masks, iou_predictions = self.predict_masks(*embeddings)  # a client's own
        return masks[..., chosen, :, :], iou_predictions[..., chosen]

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Decode as `forward`, but return all masks: the single one first, then those for an ambiguous prompt."""
        embeddings = (image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings)
        return self._predict(*embeddings, slice(None))

    def _predict(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor, chosen: slice
    ) -> tuple[Tensor, Tensor]:
        if sparse.ndim == 4:
            return self._predict_each(image_embeddings, image_pe, sparse, dense, chosen)
        if len(image_embeddings) == 1:  # one image; without a mask, `dense` is one prompt's, expanded
            dense = dense[:1] if dense.stride(0) == 0 else dense
            sparse, dense = sparse.unsqueeze(0), dense.unsqueeze(0)
        elif len(image_embeddings) == len(sparse):
            sparse, dense = sparse.unsqueeze(1), dense.unsqueeze(1)
        else:
            raise ArgumentError(
                f"{len(sparse)} prompts for {len(image_embeddings)} images: give one for each, or "
                "sparse_prompt_embeddings of B x Q x N x C and dense ones of B x Q x C x H x W"
            )
        masks, iou_predictions = self._predict_each(image_embeddings, image_pe, sparse, dense, chosen)
        return masks.flatten(0, 1), iou_predictions.flatten(0, 1)

    def _predict_each(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor, chosen: slice
    ) -> tuple[Tensor, Tensor]:
        """Decode Q prompts for each of B images, and return the masks in `chosen`."""
        b, q = sparse.shape[:2]
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1 + M) x C
        tokens = torch.cat([output_tokens.expand(b, q, -1, -1), sparse], dim=2).flatten(0, 1)

        # The image tokens are updated for each prompt: the transformer returns BQ x HW x C.
        image = (image_embeddings.unsqueeze(1) + dense).flatten(0, 1)
        if not is_plain(self.transformer, TwoWayTransformer):  # others do not support prompts that share an image
            image, image_pe = repeated(image, b * q), repeated(image_pe, b * q)
        tokens, image_tokens = self.transformer(image, image_pe, tokens)
        iou_token, mask_tokens = tokens[:, 0], tokens[:, 1 : 1 + self.num_mask_tokens]

        weights = torch.stack(
            [mlp(token) for mlp, token in zip(self.output_hypernetworks_mlps, mask_tokens.unbind(1))], dim=1
        )[:, chosen]  # BQ x M x C/8; all MLPs run, so that each parameter has a gradient
        size = (image_embeddings.shape[2], image_embeddings.shape[3])
        masks = upscaled_masks(weights, [(self.output_upscaling, image_tokens)], size)
        iou_predictions = self.iou_prediction_head(iou_token)[:, chosen]
        return masks.unflatten(0, (b, q)), iou_predictions.unflatten(0, (b, q))
