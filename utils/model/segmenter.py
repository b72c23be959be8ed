"""SAM with frozen encoders and a trainable mask decoder, split where the training loop splits it.

Two ways of prompting share everything but the decoder's last step: `BoxSegmenter` takes a box for each mask,
`SemanticSegmenter` takes nothing and gives one mask for each class. What differs is behind the same few methods, so
that the loops know of neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from segment_anything import CheckpointError, sam_model_registry
from segment_anything.build_sam import PATCH_SIZE, FineTunedError
from segment_anything.modeling import Sam
from utils.data.classes import NUM_CLASSES
from utils.data.frame import ImageSize, frame_size
from utils.model.feature_pca import FeaturePCA
from utils.model.losses import class_weights, prompt_losses, semantic_losses
from utils.model.semantic_decoder import SemanticDecoder
from utils.runtime.errors import UserError

Features = tuple[Tensor, ...]  # what the frozen encoder gives: image_embeddings, B x C x h x w, and perhaps more


class Segmenter(nn.Module):
    """`encode` is the frozen part and runs under no grad; `forward` is the trained one."""

    PROMPTS: ClassVar[tuple[str, ...]]  # the batch's entries that `forward` takes after the features
    LOSSES: ClassVar[tuple[str, ...]]  # the parts that the loss is the sum of
    CLASS_WEIGHT_POWER: ClassVar[float]  # see `utils.model.losses.class_weights`

    takes_pixels = False  # whether `forward` takes the picture itself as the last of the features
    feature_blocks: Sequence[int] = ()  # encoder blocks whose outputs are features, beside the embeddings
    image_pe: Tensor
    class_weights: Tensor

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam
        # 修改点 2: 冻结 Image Encoder 和 Prompt Encoder，只训练 Mask Decoder
        for frozen in (sam.image_encoder, sam.prompt_encoder):
            frozen.requires_grad_(False)
        self.register_buffer("image_pe", sam.prompt_encoder.get_dense_pe(), persistent=False)
        self.register_buffer("class_weights", torch.ones(NUM_CLASSES), persistent=False)
        self.feature_pca: FeaturePCA | None = None  # that cached features are reduced with

    @property
    def mask_decoder(self) -> nn.Module:
        return self.sam.mask_decoder

    def train(self, mode: bool = True) -> Segmenter:
        """Switch the mask decoder alone; what is frozen stays in eval mode."""
        super().train(False)
        self.training = mode
        self.mask_decoder.train(mode)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Features:
        """B x 3 x H x W RGB, uint8 or floating in [0, 1] -> what the frozen encoder makes of them.

        SAM's normalisation happens here, so that no caller can forget it.
        """
        return self._encode(self._normalised(images))

    @torch.no_grad()
    def inputs(self, images: Tensor, features: Features | None = None) -> Features:
        """What `forward` takes of images: their features and, if it takes pixels, the normalised images.

        Args:
            images: as of `encode`.
            features: as `encode` gives them; None to have the images encoded.
        """
        x = self._normalised(images)
        features = self._encode(x) if features is None else features
        return (*features, x) if self.takes_pixels else features

    def _normalised(self, images: Tensor) -> Tensor:
        scaled = images.float() * (1.0 if images.dtype == torch.uint8 else 255.0)
        return self.sam.preprocess(scaled)

    def _encode(self, x: Tensor) -> Features:
        return (self.sam.image_encoder(x),)

    def restore(self, stored: Features) -> Features:
        """What a cache stores of features -> what `encode` gives, so that the decoder knows of no cache."""
        return self.feature_pca.expand(stored) if self.feature_pca else tuple(feature.float() for feature in stored)

    def balance_classes(self, pixels: Tensor) -> None:
        """Weigh the classes in the cross-entropy by their pixels in the training data, NUM_CLASSES counts."""
        self.class_weights = class_weights(pixels, self.CLASS_WEIGHT_POWER).to(self.class_weights.device)

    def losses(self, outputs: tuple[Tensor, ...], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`LOSSES` by name, each of the shape of the batch's "valid", float32.

        Args:
            outputs: what `forward` gave; the first are the masks, B x K x h x w logits.
            batch: on the same device, as the data set of this mode makes it.
        """
        raise NotImplementedError


class BoxSegmenter(Segmenter):
    """Boxes in, one mask each out."""

    PROMPTS = ("boxes",)
    LOSSES = ("dice", "bce", "iou", "ce")
    CLASS_WEIGHT_POWER = 0.75

    def forward(self, features: Features, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            boxes: B x Q x 4, xyxy in pixels of the frame.

        Returns:
            low_res_masks, B x Q x 4h x 4w logits, and iou_predictions, B x Q.
        """
        (image_embeddings,) = features
        with torch.no_grad():
            sparse, dense = self.sam.prompt_encoder(boxes=boxes.flatten(0, 1))
        low_res_masks, iou_predictions = self.sam.mask_decoder(
            image_embeddings=image_embeddings,
            image_pe=self.image_pe,
            sparse_prompt_embeddings=sparse.unflatten(0, boxes.shape[:2]),
            dense_prompt_embeddings=dense.unflatten(0, boxes.shape[:2])[:, :1],  # no mask, for all boxes alike
            multimask_output=False,
        )
        return low_res_masks[:, :, 0], iou_predictions[:, :, 0]

    def losses(self, outputs: tuple[Tensor, ...], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return prompt_losses(
            outputs[0], outputs[1], batch["labels"], batch["class_ids"], batch["boxes"], self.class_weights
        )


class SemanticSegmenter(Segmenter):
    """An image in, one mask for each of the 19 classes out. No prompt."""

    PROMPTS = ()
    LOSSES = ("ce", "dice")
    CLASS_WEIGHT_POWER = 0.5

    def __init__(
        self,
        sam: Sam,
        *,
        feature_blocks: Sequence[int] | None = None,
        stem_blocks: int = 3,
        pixel_channels: int = 16,
    ) -> None:
        """
        Args:
            feature_blocks: encoder blocks whose outputs are joined in; None for those that attend over the whole image,
                each of which ends a stage of the encoder.
            stem_blocks, pixel_channels: see `SemanticDecoder`.
        """
        super().__init__(sam)
        encoder = sam.image_encoder
        if feature_blocks is None:
            feature_blocks = [i for i, size in enumerate(encoder.window_sizes) if not size]
        self.feature_blocks = feature_blocks
        self.takes_pixels = pixel_channels > 0
        sam.mask_decoder = SemanticDecoder(  # type: ignore[assignment]
            mask_decoder=sam.mask_decoder,
            no_mask_embedding=sam.prompt_encoder.no_mask_embed.weight,
            num_classes=NUM_CLASSES,
            feature_channels=[encoder.embed_dim] * len(self.feature_blocks),
            stem_blocks=stem_blocks,
            pixel_channels=pixel_channels,
        )

    def _encode(self, x: Tensor) -> Features:
        image_embeddings, features = self.sam.image_encoder.forward_features(x, self.feature_blocks)
        return (image_embeddings, *features)

    def forward(self, features: Features) -> tuple[Tensor]:
        """Returns one tensor: low_res_masks, B x 19 x H/2 x W/2 logits; H/4 x W/4 of a decoder that takes no pixels."""
        image_embeddings, *others = features
        pixels = others.pop() if self.takes_pixels else None
        return (self.mask_decoder(image_embeddings, others, self.image_pe, pixels),)

    def losses(self, outputs: tuple[Tensor, ...], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return semantic_losses(outputs[0], batch["labels"], self.class_weights)


SEGMENTERS: dict[str, type[Segmenter]] = {"box": BoxSegmenter, "semantic": SemanticSegmenter}


@dataclass(frozen=True)
class CheckpointFlags:
    """The flags of a script that take checkpoints, for what it says of a file that was given to the wrong one."""

    sam: str = "--sam_checkpoint"
    ours: str = "--model_checkpoint"
    resumes: bool = False  # `ours` goes on with a run, which a best model has no state for

    def about(self, error: CheckpointError) -> UserError:
        """What `read_state_dict` raised, as the user of the script is told it."""
        if isinstance(error, FineTunedError) and self.resumes:
            return UserError(
                f"{error}; {self.sam} takes the SAM file it was trained on; to go on with its run, give "
                f"the run's folder, which has a medsam_model_latest.pth, as {self.ours}"
            )
        if isinstance(error, FineTunedError):
            return UserError(f"{error}; give it as {self.ours}, and the SAM file it was trained on as {self.sam}")
        return UserError(str(error))


INFER_FLAGS = CheckpointFlags()  # and of utils.ckpt_convert
TRAIN_FLAGS = CheckpointFlags(sam="-checkpoint", ours="--resume", resumes=True)


def build_model(
    model_type: str,
    sam_checkpoint: Path,
    *,
    image_size: ImageSize,
    prompt_mode: str = "box",
    check_hash: bool = False,
    flags: CheckpointFlags = INFER_FLAGS,
    decoder: Mapping[str, Tensor] | None = None,
) -> Segmenter:
    """Build the segmenter of a prompt mode on a SAM file.

    Args:
        decoder: the state dict that is to be loaded into it, if any.

    Raises:
        UserError: the file is missing, damaged, or of another model; or no model takes images of that size.
    """
    if any(side % PATCH_SIZE for side in frame_size(image_size)):
        raise UserError(f"image size {image_size}: no model takes it; preprocess at multiples of {PATCH_SIZE}")
    try:
        sam = sam_model_registry[model_type](sam_checkpoint, image_size=frame_size(image_size), check_hash=check_hash)
    except CheckpointError as error:
        raise flags.about(error) from None
    if prompt_mode == "semantic" and decoder and not any("detail_path." in key for key in decoder):
        return SemanticSegmenter(sam, pixel_channels=0)  # an earlier decoder
    return SEGMENTERS[prompt_mode](sam)
