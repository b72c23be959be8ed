"""The semantic model as one module from stored pictures to class maps, to be exported."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.data.frame import Size, frame_size
from utils.export.trained import Options, Trained
from utils.model.segmenter import Segmenter


class PictureToClasses(nn.Module):
    """Normalisation, encoder, decoder, resizing of the logits and argmax.

    `forward` takes a batch of RGB frames in the layout and type of the options. It returns the class maps, N x H x W
    uint8 train ids, and on request the logits, N x 19 x H x W float32. `Prediction.label_map` gives the same maps.
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


def graph_and_example(trained: Trained, options: Options) -> tuple[PictureToClasses, Tensor]:
    """The module of a semantic model, and a batch of two black frames to trace it with."""
    size = frame_size(trained.info.image_size)
    shape = (2, 3, *size) if options.image_layout == "nchw" else (2, *size, 3)
    return PictureToClasses(trained.model, size, options).eval(), torch.zeros(
        shape, dtype=getattr(torch, options.image_dtype)
    )
