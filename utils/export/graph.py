"""The modules that are exported: whole models behind plain inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything.modeling import Sam
from segment_anything.utils.onnx import SamOnnxModel
from utils.data.frame import Size, frame_size
from utils.export.trained import Options, Trained
from utils.model.segmenter import Segmenter


class PictureToClasses(nn.Module):
    """Normalisation, encoder, decoder, resizing of the logits and argmax.

    `forward` takes a batch of RGB frames in the layout and type of the options. It returns the class maps, N x H x W
    uint8 train ids, and on request the logits, N x classes x H x W float32. `Prediction.label_map` gives the same maps.
    """

    def __init__(self, model: Segmenter, size: Size, options: Options) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.options = options

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.options.image_layout == "nhwc":
            images = images.permute(0, 3, 1, 2)
        masks = self.model(self.model.inputs(images))[0]
        logits = F.interpolate(masks.float(), self.size, mode="bilinear", align_corners=False)
        # By float32: TensorRT converts no other type to uint8.
        class_maps = logits.argmax(dim=1).float().to(torch.uint8)
        return (class_maps, logits) if self.options.logits else (class_maps,)

    @property
    def output_names(self) -> list[str]:
        return ["class_map", "logits"] if self.options.logits else ["class_map"]


def semantic_graph(trained: Trained, options: Options) -> tuple[PictureToClasses, Tensor]:
    """The module of a semantic model, and a batch of two black frames to trace it with."""
    size = frame_size(trained.info.image_size)
    shape = (2, 3, *size) if options.image_layout == "nchw" else (2, *size, 3)
    return PictureToClasses(trained.model, size, options).eval(), torch.zeros(
        shape, dtype=getattr(torch, options.image_dtype)
    )


class PictureToEmbedding(nn.Module):
    """The image encoder of a box model, for one picture: H x W x 3 float32 of 0..255 -> 1 x C x h x w.

    A picture that is smaller than the frame is padded below and to the right, as by `SamPredictor`. The embedding is
    float32, also of an encoder in half precision.
    """

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, input_image: Tensor) -> Tensor:
        x = self.sam.preprocess(input_image.permute(2, 0, 1)[None])
        return self.sam.image_encoder(x.to(next(self.sam.image_encoder.parameters()).dtype)).float()


class BoxesToMasks(SamOnnxModel):
    """The decoder of a box model: `SamOnnxModel` for B prompts, with the trained mask alone.

    `point_coords`, B x N x 2, and `point_labels`, B x N, give B prompts; the masks are B x 1 x H x W. They are resized
    from the frame as the training pictures were resized to it.
    """

    def __init__(self, sam: Sam, resize_mode: str) -> None:
        super().__init__(sam, return_single_mask=True)
        self.resize_mode = resize_mode

    def select_masks(self, masks: Tensor, iou_preds: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
        return masks[:, :1], iou_preds[:, :1]  # the others are for ambiguous prompts and were not trained

    def mask_postprocessing(self, masks: Tensor, orig_im_size: Tensor) -> Tensor:
        height, width = self.model.frame_size
        masks = F.interpolate(masks, (height, width), mode="bilinear", align_corners=False)
        if self.resize_mode == "pad":  # as in `fitted_size`
            scale = (orig_im_size.new_tensor([height, width]) / orig_im_size).min()
            fitted = torch.floor(scale * orig_im_size + 0.5).to(torch.int64)
            masks = masks[..., : fitted[0], : fitted[1]]
        original = orig_im_size.to(torch.int64)
        size: Any = (original[0], original[1])
        return F.interpolate(masks, size, mode="bilinear", align_corners=False)


def decoder_example(sam: Sam) -> dict[str, Tensor]:
    """Inputs of `BoxesToMasks`, by the names of the public package: two boxes."""
    encoder = sam.prompt_encoder
    return {
        "image_embeddings": torch.zeros(1, encoder.embed_dim, *encoder.image_embedding_size),
        "point_coords": torch.tensor([[[1.0, 2.0], [8.0, 9.0]], [[3.0, 4.0], [12.0, 13.0]]]),
        "point_labels": torch.tensor([[2.0, 3.0], [2.0, 3.0]]),
        "mask_input": torch.zeros(1, 1, *encoder.mask_input_size),
        "has_mask_input": torch.zeros(1),
        "orig_im_size": torch.tensor([90.0, 70.0]),
    }
