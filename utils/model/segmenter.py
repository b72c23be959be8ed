"""SAM with frozen encoders and a trainable mask decoder, behind one interface for both prompt modes.

`BoxSegmenter` takes a box for each mask. `SemanticSegmenter` takes no prompt and gives a mask for each class. The loops
know neither of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from segment_anything import CheckpointError, sam_model_registry
from segment_anything.build_sam import PATCH_SIZE, FineTunedError
from segment_anything.modeling import Sam
from utils.data.classes import BDD100K, ClassTable
from utils.data.datasets import TrainingBatch
from utils.data.frame import ImageSize, frame_size
from utils.model.feature_pca import FeaturePCA
from utils.model.losses import class_weights, prompt_losses, semantic_losses
from utils.model.semantic_decoder import SemanticDecoder
from utils.runtime.errors import UserError

Features = tuple[Tensor, ...]  # of the frozen encoder: image_embeddings, B x C x h x w, then maps of its blocks


class Segmenter(nn.Module):
    """Frozen encoders and a trained decoder: `encode` runs without gradients, `forward` is trained."""

    PROMPTS: ClassVar[tuple[Literal["boxes"], ...]]  # the batch's entries that `forward` takes after the features
    LOSSES: ClassVar[tuple[str, ...]]  # the parts of the loss, which are summed
    CLASS_WEIGHT_POWER: ClassVar[float]  # see `utils.model.losses.class_weights`

    takes_pixels = False  # whether `forward` takes the normalised images as the last of the features
    feature_blocks: Sequence[int] = ()  # encoder blocks whose outputs are features beside the embeddings
    image_pe: Tensor
    class_weights: Tensor

    def __init__(self, sam: Sam, classes: ClassTable = BDD100K) -> None:
        super().__init__()
        self.sam = sam
        self.classes = classes
        # 修改点 2: 冻结 Image Encoder 和 Prompt Encoder，只训练 Mask Decoder
        for frozen in (sam.image_encoder, sam.prompt_encoder):
            frozen.requires_grad_(False)
        self.register_buffer("image_pe", sam.prompt_encoder.get_dense_pe(), persistent=False)
        self.register_buffer("class_weights", torch.ones(len(classes)), persistent=False)
        self.feature_pca: FeaturePCA | None = None  # applied to features before they are cached

    @property
    def mask_decoder(self) -> nn.Module:
        return self.sam.mask_decoder

    def train(self, mode: bool = True) -> Segmenter:
        """Set the mode of the mask decoder; the frozen parts stay in eval mode."""
        super().train(False)
        self.training = mode
        self.mask_decoder.train(mode)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Features:
        """Encode images, B x 3 x H x W RGB, uint8 or floating point in [0, 1]. They are normalised here."""
        return self._encode(self._normalised(images))

    @torch.no_grad()
    def inputs(self, images: Tensor, features: Features | None = None) -> Features:
        """The features that `forward` takes, with the normalised images at the end if it takes pixels.

        Args:
            images: as for `encode`.
            features: the result of `encode`; None to encode the images here.
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
        """Turn cached features into the form that `encode` gives."""
        return self.feature_pca.expand(stored) if self.feature_pca else tuple(feature.float() for feature in stored)

    def balance_classes(self, pixels: Tensor) -> None:
        """Set the class weights of the cross-entropy from the pixels of each class in the training data."""
        self.class_weights = class_weights(pixels, self.CLASS_WEIGHT_POWER).to(self.class_weights.device)

    def losses(self, outputs: tuple[Tensor, ...], batch: TrainingBatch) -> dict[str, Tensor]:
        """The parts of the loss by the names in `LOSSES`, float32 of the shape of the batch's "valid".

        Args:
            outputs: the result of `forward`; the first are the masks, B x K x h x w logits.
            batch: on the same device.
        """
        raise NotImplementedError


class BoxSegmenter(Segmenter):
    """Box mode: one mask for each box."""

    PROMPTS = ("boxes",)
    LOSSES = ("dice", "bce", "iou", "ce")
    CLASS_WEIGHT_POWER = 0.75

    def forward(self, features: Features, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Decode Q boxes of each image.

        Args:
            features: image_embeddings alone, B x C x h x w.
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
            dense_prompt_embeddings=dense.unflatten(0, boxes.shape[:2])[:, :1],  # no mask: the same for all boxes
            multimask_output=False,
        )
        return low_res_masks[:, :, 0], iou_predictions[:, :, 0]

    def losses(self, outputs: tuple[Tensor, ...], batch: TrainingBatch) -> dict[str, Tensor]:
        return prompt_losses(
            outputs[0], outputs[1], batch["labels"], batch["class_ids"], batch["boxes"], self.class_weights
        )


class SemanticSegmenter(Segmenter):
    """Semantic mode: one mask for each class, without a prompt."""

    PROMPTS = ()
    LOSSES = ("ce", "dice")
    CLASS_WEIGHT_POWER = 0.5

    def __init__(
        self,
        sam: Sam,
        classes: ClassTable = BDD100K,
        *,
        feature_blocks: Sequence[int] | None = None,
        stem_blocks: int = 3,
        pixel_channels: int = 16,
    ) -> None:
        """Replace the mask decoder of `sam` by a `SemanticDecoder`.

        Args:
            feature_blocks: encoder blocks whose outputs the decoder takes; None for those with global attention.
        """
        super().__init__(sam, classes)
        encoder = sam.image_encoder
        if feature_blocks is None:
            feature_blocks = [i for i, size in enumerate(encoder.window_sizes) if not size]
        self.feature_blocks = feature_blocks
        self.takes_pixels = pixel_channels > 0
        sam.mask_decoder = SemanticDecoder(  # type: ignore[assignment]
            mask_decoder=sam.mask_decoder,
            no_mask_embedding=sam.prompt_encoder.no_mask_embed.weight,
            num_classes=len(classes),
            feature_channels=[encoder.embed_dim] * len(self.feature_blocks),
            stem_blocks=stem_blocks,
            pixel_channels=pixel_channels,
        )

    def _encode(self, x: Tensor) -> Features:
        image_embeddings, features = self.sam.image_encoder.forward_features(x, self.feature_blocks)
        return (image_embeddings, *features)

    def forward(self, features: Features) -> tuple[Tensor]:
        """Decode all classes.

        Returns:
            A tuple of low_res_masks alone: B x classes x H/2 x W/2 logits of an H x W frame, or H/4 x W/4 if the
            decoder takes no pixels.
        """
        image_embeddings, *others = features
        maps, pixels = (others[:-1], others[-1]) if self.takes_pixels else (others, None)
        return (self.mask_decoder(image_embeddings, maps, self.image_pe, pixels),)

    def losses(self, outputs: tuple[Tensor, ...], batch: TrainingBatch) -> dict[str, Tensor]:
        return semantic_losses(outputs[0], batch["labels"], self.class_weights)


SEGMENTERS: dict[str, type[Segmenter]] = {"box": BoxSegmenter, "semantic": SemanticSegmenter}


@dataclass(frozen=True)
class CheckpointFlags:
    """A script's flags that take checkpoints, for messages about a file that was given to the wrong flag."""

    sam: str = "--sam_checkpoint"
    ours: str = "--model_checkpoint"
    resumes: bool = False  # `ours` resumes a run, for which a best model has no state

    def about(self, error: CheckpointError) -> UserError:
        """The error of `read_state_dict`, with the flag that takes the file."""
        fix = ""
        if isinstance(error, FineTunedError) and self.resumes:
            fix = (
                f"; {self.sam} takes the SAM file it was trained on. To resume its run, give the run's folder, which "
                f"holds medsam_model_latest.pth, as {self.ours}"
            )
        elif isinstance(error, FineTunedError):
            fix = f"; give it as {self.ours}, and the SAM file it was trained on as {self.sam}"
        return UserError(f"{error}{fix}")


INFER_FLAGS = CheckpointFlags()  # also of utils.ckpt_convert
TRAIN_FLAGS = CheckpointFlags(sam="-checkpoint", ours="--resume", resumes=True)


def build_model(
    model_type: str,
    sam_checkpoint: Path,
    *,
    image_size: ImageSize,
    prompt_mode: str = "box",
    check_hash: bool = False,
    flags: CheckpointFlags = INFER_FLAGS,
    classes: ClassTable = BDD100K,
    decoder: Mapping[str, Tensor] | None = None,
) -> Segmenter:
    """Build the segmenter of a prompt mode on a SAM file.

    Args:
        flags: of the script, for error messages.
        classes: that the data have; semantic mode has a token for each.
        decoder: the trained state dict that will be loaded; its form decides the decoder's.

    Raises:
        UserError: the file is missing, damaged, or of another model; or no model takes images of that size.
    """
    if any(side % PATCH_SIZE for side in frame_size(image_size)):
        raise UserError(f"image size {image_size}: not supported; preprocess at multiples of {PATCH_SIZE}")
    try:
        sam = sam_model_registry[model_type](sam_checkpoint, image_size=frame_size(image_size), check_hash=check_hash)
    except CheckpointError as error:
        raise flags.about(error) from None
    if prompt_mode == "semantic" and decoder and not any("detail_path." in key for key in decoder):
        return SemanticSegmenter(sam, classes, pixel_channels=0)  # a decoder of an earlier version
    return SEGMENTERS[prompt_mode](sam, classes)
