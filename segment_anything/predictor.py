"""`SamPredictor`: set an image once, then ask for the masks of any number of prompts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from segment_anything.modeling import Sam
from segment_anything.modeling.common import ArgumentError
from segment_anything.utils.transforms import ResizeLongestSide


class SamPredictor:
    """Keeps the embedding of one image, so that each further prompt runs only the mask decoder.

    predictor.set_image(image)  # H x W x 3 uint8
    masks, iou_predictions, low_res_masks = predictor.predict(box=np.array([x0, y0, x1, y1]))
    """

    def __init__(self, sam_model: Sam) -> None:
        self.model = sam_model
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)
        self.reset_image()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def reset_image(self) -> None:
        """Forget the image."""
        self.is_image_set = False
        self.features: Tensor | None = None
        # (H, W) of the image given, and of the scaled one.
        self.original_size: tuple[int, ...] | None = None
        self.input_size: tuple[int, ...] | None = None
        self.orig_h: int | None = None
        self.orig_w: int | None = None
        self.input_h: int | None = None
        self.input_w: int | None = None

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Encode an image, H x W x 3 uint8 in `image_format` (RGB or BGR)."""
        if image_format not in ("RGB", "BGR"):
            raise ArgumentError(f"image_format must be RGB or BGR, got {image_format!r}")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ArgumentError(f"image must be H x W x 3 of uint8, got {image.shape} of {image.dtype}")
        if image_format != self.model.image_format:
            image = image[..., ::-1]
        scaled = torch.from_numpy(self.transform.apply_image(image)).to(self.device)
        self.set_torch_image(scaled.permute(2, 0, 1)[None], image.shape[:2])

    @torch.no_grad()
    def set_torch_image(self, transformed_image: Tensor, original_image_size: tuple[int, ...]) -> None:
        """Encode a scaled image: 1 x 3 x H x W of 0..255, its longest side the encoder's input size."""
        side, shape = self.model.image_encoder.img_size, tuple(transformed_image.shape)
        if len(shape) != 4 or shape[1] != 3 or max(shape[2:]) != side:
            raise ArgumentError(f"expected 1 x 3 x H x W with longest side {side}, got {shape}")
        height, width = self.model.frame_size
        if shape[2] > height or shape[3] > width:
            raise ArgumentError(
                f"an image of {shape[2]} x {shape[3]} does not fit the model's {height} x {width}; "
                "use a model of a square frame, which takes every shape"
            )
        self.reset_image()
        self.original_size, self.input_size = tuple(original_image_size), shape[2:]
        (self.orig_h, self.orig_w), (self.input_h, self.input_w) = self.original_size, self.input_size
        self.features = self.model.image_encoder(self.model.preprocess(transformed_image))
        self.is_image_set = True

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict the masks of one prompt of points, a box and an earlier mask; each is optional.

        Args:
            point_coords: N x 2 (x, y) in pixels of the image given to `set_image`.
            point_labels: N, 1 foreground and 0 background.
            box: 4 or 1 x 4, xyxy in the same pixels.
            mask_input: 1 x h x w logits, such as `low_res_masks` of an earlier call.
            multimask_output: return three masks, for an ambiguous prompt, or one.
            return_logits: return logits instead of booleans.

        Returns:
            masks, M x H x W; iou_predictions, M; low_res_masks, M x h x w logits.
        """
        _, size, _ = self._image()
        coords = labels = boxes = masks = None
        if point_coords is not None:
            if point_labels is None:
                raise ArgumentError("point_coords need point_labels, one for each point")
            scaled = self.transform.apply_coords(point_coords, size)
            coords = torch.as_tensor(scaled, dtype=torch.float, device=self.device)[None]
            labels = torch.as_tensor(point_labels, dtype=torch.int, device=self.device)[None]
        if box is not None:
            scaled = self.transform.apply_boxes(box, size)
            if len(scaled) != 1:
                raise ArgumentError(f"predict takes one box, got {len(scaled)}; predict_torch takes many")
            boxes = torch.as_tensor(scaled, dtype=torch.float, device=self.device)
        if mask_input is not None:
            masks = torch.as_tensor(mask_input, dtype=torch.float, device=self.device)[None]
        outputs = self.predict_torch(coords, labels, boxes, masks, multimask_output, return_logits=return_logits)
        arrays = (o[0].cpu().to(torch.float32 if o.dtype == torch.bfloat16 else o.dtype).numpy() for o in outputs)
        final, iou_predictions, low_res_masks = arrays  # NumPy has no bfloat16
        return final, iou_predictions, low_res_masks

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the masks of Q prompts in one pass, with coordinates in the scaled image.

        Args:
            point_coords: Q x N x 2.
            point_labels: Q x N.
            boxes: Q x 4.
            mask_input: Q x 1 x h x w logits.

        Returns:
            masks, Q x M x H x W; iou_predictions, Q x M; low_res_masks, Q x M x h x w.
        """
        features, original_size, input_size = self._image()
        points = None if point_coords is None or point_labels is None else (point_coords, point_labels)
        sparse, dense = self.model.prompt_encoder(points=points, boxes=boxes, masks=mask_input)
        low_res_masks, iou_predictions = self.model.mask_decoder(
            image_embeddings=features,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
        )
        masks = self.model.postprocess_masks(low_res_masks, input_size, original_size)
        if not return_logits:
            masks = masks > self.model.mask_threshold
        return masks, iou_predictions, low_res_masks

    def get_image_embedding(self) -> Tensor:
        """The embedding of the image, 1 x C x h x w."""
        return self._image()[0]

    def _image(self) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
        """The image's embedding, `original_size` and `input_size`; clients may set these themselves."""
        if not self.is_image_set or self.features is None or self.original_size is None or self.input_size is None:
            raise RuntimeError("no image is set; call set_image first")
        return self.features, self.original_size, self.input_size
