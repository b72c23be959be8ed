"""SAM with frozen encoders and a trainable mask decoder, split where the training loop splits it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from segment_anything import CheckpointError, build_sam
from segment_anything.modeling import MaskDecoder, Sam
from utils.errors import UserError


class BoxSegmenter(nn.Module):
    """Boxes in, one mask each out. `forward` is the trained part; `encode` is the frozen one and runs under no grad."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam
        # 修改点 2: 冻结 Image Encoder 和 Prompt Encoder，只训练 Mask Decoder
        for frozen in (sam.image_encoder, sam.prompt_encoder):
            frozen.requires_grad_(False)
        self.register_buffer("image_pe", sam.prompt_encoder.get_dense_pe(), persistent=False)

    @property
    def mask_decoder(self) -> MaskDecoder:
        return self.sam.mask_decoder

    def train(self, mode: bool = True) -> BoxSegmenter:
        """Switch the mask decoder alone; what is frozen stays in eval mode."""
        super().train(False)
        self.training = mode
        self.sam.mask_decoder.train(mode)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """B x 3 x S x S RGB, uint8 or floating in [0, 1] -> image_embeddings, B x C x S/16 x S/16.

        SAM's normalisation happens here, so that no caller can forget it.
        """
        scaled = images.float() * (1.0 if images.dtype == torch.uint8 else 255.0)
        return self.sam.image_encoder(self.sam.preprocess(scaled))

    def forward(self, image_embeddings: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            image_embeddings: B x C x h x w.
            boxes: B x Q x 4, xyxy in pixels of the S x S frame.

        Returns:
            low_res_masks, B x Q x 4h x 4w logits, and iou_predictions, B x Q.
        """
        with torch.no_grad():
            sparse, dense = self.sam.prompt_encoder(boxes=boxes.flatten(0, 1))
        low_res_masks, iou_predictions = self.sam.mask_decoder(
            image_embeddings=image_embeddings,
            image_pe=self.image_pe,
            sparse_prompt_embeddings=sparse.unflatten(0, boxes.shape[:2]),
            dense_prompt_embeddings=dense.unflatten(0, boxes.shape[:2]),
            multimask_output=False,
        )
        return low_res_masks[:, :, 0], iou_predictions[:, :, 0]


def build_model(model_type: str, sam_checkpoint: Path, *, image_size: int, check_hash: bool = False) -> BoxSegmenter:
    """Build the segmenter on a SAM file.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    try:
        return BoxSegmenter(build_sam(model_type, sam_checkpoint, image_size=image_size, check_hash=check_hash))
    except CheckpointError as error:
        raise UserError(str(error)) from None
