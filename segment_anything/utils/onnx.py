"""`SamOnnxModel`: all of SAM behind the image encoder as one traceable module, to export to ONNX."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything.modeling import Sam
from segment_anything.utils.amg import calculate_stability_score


class SamOnnxModel(nn.Module):
    """Prompt encoder, mask decoder and resizing to the image's size, without control flow that depends on data.

    A prompt is always points and a mask. A box is two points with the labels 2 (top left) and 3 (bottom right). Without
    a box, add a last point with the label -1, as `PromptEncoder` does. Without a mask, `has_mask_input` is 0. A model
    of a non-square frame needs images that fit the frame; the graph cannot check that.
    """

    def __init__(
        self,
        model: Sam,
        return_single_mask: bool,
        use_stability_score: bool = False,
        return_extra_metrics: bool = False,
    ) -> None:
        """Set what is exported.

        Args:
            return_single_mask: return the best mask instead of all four; mask 0 is for an unambiguous prompt.
            use_stability_score: score masks by their stability instead of the predicted IoU.
            return_extra_metrics: also return stability scores and areas at the image's size.
        """
        super().__init__()
        self.model = model
        self.mask_decoder = model.mask_decoder
        self.img_size = model.image_encoder.img_size
        self.return_single_mask = return_single_mask
        self.use_stability_score = use_stability_score
        self.stability_score_offset = 1.0
        self.return_extra_metrics = return_extra_metrics

    @torch.no_grad()
    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, ...]:
        """Decode one prompt.

        Args:
            image_embeddings: 1 x C x h x w.
            point_coords: 1 x N x 2 (x, y) in pixels of the scaled image.
            point_labels: 1 x N float: 1 foreground, 0 background, 2 and 3 corners of a box, -1 no point.
            mask_input: 1 x 1 x 4h x 4w logits; ignored if `has_mask_input` is 0.
            has_mask_input: 1, of 0 or 1.
            orig_im_size: 2 float, (H, W) of the original image.

        Returns:
            masks, 1 x M x H x W logits; scores, 1 x M; with `return_extra_metrics` stability scores and areas, 1 x M
            each; and last the masks at 1 x M x 4h x 4w. M is 1 with `return_single_mask`, else 4.
        """
        low_res_masks, scores = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self._embed_points(point_coords, point_labels),
            dense_prompt_embeddings=self._embed_masks(mask_input, has_mask_input),
        )
        if self.use_stability_score:
            scores = self._stability(low_res_masks)
        if self.return_single_mask:
            low_res_masks, scores = self.select_masks(low_res_masks, scores, point_coords.shape[1])
        masks = self.mask_postprocessing(low_res_masks, orig_im_size)
        if not self.return_extra_metrics:
            return masks, scores, low_res_masks
        areas = (masks > self.model.mask_threshold).sum(dim=(-2, -1))
        return masks, scores, self._stability(masks), areas, low_res_masks

    def _embed_points(self, point_coords: Tensor, point_labels: Tensor) -> Tensor:
        encoder = self.model.prompt_encoder
        label = point_labels.unsqueeze(-1)
        # + 0.5: a coordinate names a pixel, and its position is the pixel's centre.
        positions = encoder.pe_layer.forward_with_coords(point_coords + 0.5, encoder.input_image_size)
        embedding = torch.where(label == -1, encoder.not_a_point_embed.weight, positions)
        for kind, learned in enumerate(encoder.point_embeddings):
            embedding = embedding + (label == kind) * learned.weight  # type: ignore[operator]
        return embedding

    def _embed_masks(self, input_mask: Tensor, has_mask_input: Tensor) -> Tensor:
        encoder = self.model.prompt_encoder
        without = encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        return has_mask_input * encoder.mask_downscaling(input_mask) + (1 - has_mask_input) * without

    @staticmethod
    def resize_longest_image_size(input_image_size: Tensor, longest_side: int) -> Tensor:
        """(H, W) of an image, 2, -> int64 (H, W) once its longest side is scaled to `longest_side`, rounded half up."""
        size = input_image_size.to(torch.float32)
        return torch.floor(longest_side / size.max() * size + 0.5).to(torch.int64)

    def mask_postprocessing(self, masks: Tensor, orig_im_size: Tensor) -> Tensor:
        """Resize logits of the decoder, 1 x M x 4h x 4w, to the original size, 1 x M x H x W."""
        masks = F.interpolate(masks, self.model.frame_size, mode="bilinear", align_corners=False)
        # Tensors, because numbers would fix the example's size in the exported graph.
        scaled = self.resize_longest_image_size(orig_im_size, self.img_size)
        masks = masks[..., : scaled[0], : scaled[1]]
        original = orig_im_size.to(torch.int64)
        size: Any = (original[0], original[1])
        return F.interpolate(masks, size, mode="bilinear", align_corners=False)

    def select_masks(self, masks: Tensor, iou_preds: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
        """The best mask of each prompt by `iou_preds`, B x 1 x H x W, and its score, B x 1.

        With three points or more, of any label, this is mask 0. Fewer may be ambiguous: then it is never mask 0.
        """
        is_first = torch.arange(iou_preds.shape[1], device=iou_preds.device) == 0
        best = (iou_preds + 1000 * (iou_preds.new_full((), num_points) - 2.5) * is_first).argmax(dim=1, keepdim=True)
        # gather, because PyTorch's newer exporter cannot translate this indexing.
        best_masks = masks.gather(1, best[..., None, None].expand(-1, -1, *masks.shape[2:]))
        return best_masks, iou_preds.gather(1, best)

    def _stability(self, masks: Tensor) -> Tensor:
        return calculate_stability_score(masks, self.model.mask_threshold, self.stability_score_offset)
