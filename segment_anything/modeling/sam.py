"""The complete SAM: its three parts, the normalisation of images, and the resizing of masks to the images' size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything.modeling.common import ArgumentError
from segment_anything.modeling.image_encoder import ImageEncoderViT
from segment_anything.modeling.mask_decoder import MaskDecoder
from segment_anything.modeling.prompt_encoder import PromptEncoder

# Of ImageNet's RGB pixels in 0..255; the frozen encoder was trained on images normalised with them.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class Sam(nn.Module):
    """Images and prompts in, masks out. `SamPredictor` keeps an image's embedding from one call to the next."""

    mask_threshold: float = 0.0  # a pixel belongs to a mask where its logit is above this
    image_format: str = "RGB"

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        image_encoder: ImageEncoderViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        pixel_mean: Sequence[float] = PIXEL_MEAN,
        pixel_std: Sequence[float] = PIXEL_STD,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @property
    def frame_size(self) -> tuple[int, int]:
        """(H, W) in pixels of the encoder's input."""
        side = self.image_encoder.img_size  # encoders of other projects may only have this
        return getattr(self.image_encoder, "frame_size", (side, side))

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @torch.no_grad()
    def forward(self, batched_input: Sequence[dict[str, Any]], multimask_output: bool) -> list[dict[str, Tensor]]:
        """Predict the masks of images with their own prompts.

        Args:
            batched_input: for each image, with only the first two required:
                image: 3 x H x W of 0..255, its longest side scaled to S (see `ResizeLongestSide`).
                original_size: (H, W) before that.
                point_coords, point_labels: P x N x 2 in pixels of the scaled image, and P x N.
                boxes: P x 4, xyxy in the same pixels.
                mask_inputs: P x 1 x h x w logits.
            multimask_output: three masks for each prompt, for an ambiguous one, or the single best.

        Returns:
            For each image:
                masks: P x M x H x W bool, at `original_size`.
                iou_predictions: P x M.
                low_res_logits: P x M x h x w, possible `mask_inputs` of a later call.
        """
        embeddings = self.image_encoder(torch.stack([self.preprocess(record["image"]) for record in batched_input]))
        image_pe = self.prompt_encoder.get_dense_pe()
        outputs = []
        for record, embedding in zip(batched_input, embeddings):
            points = (record["point_coords"], record["point_labels"]) if "point_coords" in record else None
            sparse, dense = self.prompt_encoder(
                points=points, boxes=record.get("boxes"), masks=record.get("mask_inputs")
            )
            low_res_masks, iou_predictions = self.mask_decoder(
                image_embeddings=embedding.unsqueeze(0),
                image_pe=image_pe,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask_output,
            )
            masks = self.postprocess_masks(low_res_masks, record["image"].shape[-2:], record["original_size"])
            outputs.append(
                {
                    "masks": masks > self.mask_threshold,
                    "iou_predictions": iou_predictions,
                    "low_res_logits": low_res_masks,
                }
            )
        return outputs

    def preprocess(self, x: Tensor) -> Tensor:
        """Normalise RGB images of 0..255, ... x 3 x H x W, and zero-pad them at the bottom and right to the frame.

        Raises:
            ArgumentError: an image is larger than the frame.
        """
        x = ((x - self.pixel_mean) / self.pixel_std).to(self.pixel_mean.dtype)
        height, width = self.frame_size
        if x.shape[-2] > height or x.shape[-1] > width:
            size = f"{x.shape[-2]} x {x.shape[-1]}"
            raise ArgumentError(f"an image of {size} does not fit the model's {height} x {width}; resize it first")
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))

    def postprocess_masks(self, masks: Tensor, input_size: Sequence[int], original_size: Sequence[int]) -> Tensor:
        """Resize mask logits to the original image: upsample to the frame, crop the padding, resize.

        Args:
            masks: B x M x h x w logits of the decoder.
            input_size: (H, W) of the image within the frame, before padding.
            original_size: (H, W) of the original image.

        Returns:
            B x M x H x W logits at `original_size`.
        """
        masks = F.interpolate(masks, self.frame_size, mode="bilinear", align_corners=False)
        masks = masks[..., : input_size[0], : input_size[1]]
        return F.interpolate(masks, tuple(original_size), mode="bilinear", align_corners=False)
