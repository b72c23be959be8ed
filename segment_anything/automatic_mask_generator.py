"""`SamAutomaticMaskGenerator`: the masks of everything in an image, from a grid of points instead of prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from segment_anything.modeling import Sam
from segment_anything.modeling.common import ArgumentError
from segment_anything.predictor import SamPredictor
from segment_anything.utils.amg import (
    MaskData,
    Rle,
    area_from_rle,
    batch_iterator,
    batched_mask_to_box,
    box_xyxy_to_xywh,
    build_all_layer_point_grids,
    calculate_stability_score,
    coco_encode_rle,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    remove_small_regions,
    rle_to_mask,
    uncrop_boxes_xyxy,
    uncrop_masks,
    uncrop_points,
)

OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")


class SamAutomaticMaskGenerator:
    """Prompts SAM with each point of a grid, three masks a point, and keeps the good masks, each once.

    masks = SamAutomaticMaskGenerator(sam).generate(image)  # H x W x 3 uint8, RGB
    """

    def __init__(
        self,
        model: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
    ) -> None:
        """Set the grid of points, and which masks are kept.

        Args:
            points_per_side: points on each side of the grid; None if `point_grids` is given.
            points_per_batch: points decoded together; fewer take less memory.
            pred_iou_thresh: masks with a predicted IoU up to this are dropped; 0 keeps all.
            stability_score_thresh: masks with a stability score below this are dropped; 0 keeps all.
            stability_score_offset: how far the stability score moves the threshold, in logits.
            box_nms_thresh: among masks whose boxes have a larger IoU, the one with the best predicted IoU is kept.
            crop_n_layers: layers of crops in addition to the whole image; layer i has 4^i crops.
            crop_nms_thresh: as `box_nms_thresh`, between crops; the mask of the smallest crop is kept.
            crop_overlap_ratio: overlap of crops in the first layer over the image's shorter side.
            crop_n_points_downscale_factor: divides `points_per_side` from layer to layer.
            point_grids: instead of `points_per_side`: N x 2 points (x, y) in [0, 1] for each layer from 0.
            min_mask_region_area: holes and parts of a mask with fewer pixels are filled and removed; 0 keeps them.
            output_mode: the form of masks: binary_mask (H x W bool), uncompressed_rle, or coco_rle.

        Raises:
            ArgumentError: both or neither of `points_per_side` and `point_grids` are given, there are too few grids,
                the
                output mode is unknown, or the model's frame is not square and there are crops, which have any shape.
            ImportError: `output_mode` is coco_rle and pycocotools is not installed.
        """
        if points_per_side is not None and point_grids is None:
            grids = build_all_layer_point_grids(points_per_side, crop_n_layers, crop_n_points_downscale_factor)
        elif point_grids is not None and points_per_side is None:
            grids = point_grids
        else:
            raise ArgumentError("give exactly one of points_per_side and point_grids")
        if len(grids) <= crop_n_layers:
            needed = crop_n_layers + 1
            raise ArgumentError(f"crop_n_layers={crop_n_layers} needs {needed} point_grids, got {len(grids)}")
        height, width = model.frame_size
        if crop_n_layers and height != width:
            raise ArgumentError(
                f"crop_n_layers={crop_n_layers}: crops do not all fit the model's {height} x {width}; "
                "give crop_n_layers=0, or use a model of a square frame"
            )
        if output_mode not in OUTPUT_MODES:
            raise ArgumentError(f"output_mode must be one of {', '.join(OUTPUT_MODES)}, got {output_mode!r}")
        if output_mode == "coco_rle":
            _require_pycocotools()
        self.predictor = SamPredictor(model)
        self.point_grids = grids
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode

    @torch.no_grad()
    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Find the masks of an image, H x W x 3 uint8.

        Returns:
            A dict for each mask, in the order of non-maximum suppression: segmentation (as `output_mode` says), area
            (pixels), bbox (xywh), predicted_iou, stability_score, point_coords ([[x, y]], the point that prompted
            it), crop_box (xywh, the part of the image that was encoded).
        """
        data = self._generate_masks(image)
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            data = self.postprocess_small_regions(data, self.min_mask_region_area, threshold)
        return [
            {
                "segmentation": self._encode(rle),
                "area": area_from_rle(rle),
                "bbox": box_xyxy_to_xywh(data["boxes"][i]).tolist(),
                "predicted_iou": data["iou_preds"][i].item(),
                "point_coords": [data["points"][i].tolist()],
                "stability_score": data["stability_score"][i].item(),
                "crop_box": box_xyxy_to_xywh(data["crop_boxes"][i]).tolist(),
            }
            for i, rle in enumerate(data["rles"])
        ]

    def _encode(self, rle: Rle) -> Any:
        if self.output_mode == "binary_mask":
            return rle_to_mask(rle)
        return coco_encode_rle(rle) if self.output_mode == "coco_rle" else rle

    def _generate_masks(self, image: np.ndarray) -> MaskData:
        """The masks of the image and its crops: rles, boxes, iou_preds, stability_score, points, crop_boxes; arrays."""
        size = image.shape[:2]
        data = MaskData()
        crop_boxes, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        for crop_box, layer in zip(crop_boxes, layers):
            data.cat(self._process_crop(image, crop_box, layer, size))
        if len(crop_boxes) > 1:
            x0, y0, x1, y1 = data["crop_boxes"].unbind(1)
            data.filter(_suppress(data["boxes"], 1 / ((x1 - x0) * (y1 - y0)), self.crop_nms_thresh))
        data.to_numpy()
        return data

    def _process_crop(
        self, image: np.ndarray, crop_box: list[int], crop_layer_idx: int, orig_size: tuple[int, ...]
    ) -> MaskData:
        """The masks of one crop, their boxes and points in the image."""
        x0, y0, x1, y1 = crop_box
        crop = image[y0:y1, x0:x1]
        height, width = crop.shape[:2]
        self.predictor.set_image(crop)
        data = MaskData()
        for (points,) in batch_iterator(self.points_per_batch, self.point_grids[crop_layer_idx] * [[width, height]]):
            data.cat(self._process_batch(points, (height, width), crop_box, orig_size))
        self.predictor.reset_image()

        data.filter(_suppress(data["boxes"], data["iou_preds"], self.box_nms_thresh))
        data["boxes"] = uncrop_boxes_xyxy(data["boxes"], crop_box)
        data["points"] = uncrop_points(data["points"], crop_box)
        data["crop_boxes"] = torch.tensor(crop_box).repeat(len(data["rles"]), 1)
        return data

    def _process_batch(
        self, points: np.ndarray, im_size: tuple[int, ...], crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        """The masks for points of a crop, without bad ones and those cut off by the crop.

        Args:
            points: N x 2 (x, y) in pixels of the crop.
            im_size: (H, W) of the crop.
            orig_size: (H, W) of the image.

        Returns:
            rles, of masks of the image; boxes, in the crop; iou_preds, stability_score and points.
        """
        model, device = self.predictor.model, self.predictor.device
        height, width = orig_size
        scaled = self.predictor.transform.apply_coords(points, (im_size[0], im_size[1]))
        coords = torch.as_tensor(scaled, dtype=torch.float32, device=device)  # MPS knows no float64
        labels = torch.ones(len(coords), 1, dtype=torch.int, device=device)
        logits, iou_preds, _ = self.predictor.predict_torch(
            coords[:, None], labels, multimask_output=True, return_logits=True
        )
        data = MaskData(
            masks=logits.flatten(0, 1),
            iou_preds=iou_preds.flatten().float(),
            points=torch.as_tensor(points).repeat_interleave(logits.shape[1], dim=0),
        )
        del logits  # so that a filter frees what it drops
        if self.pred_iou_thresh > 0:
            data.filter(data["iou_preds"] > self.pred_iou_thresh)
        data["stability_score"] = calculate_stability_score(
            data["masks"], model.mask_threshold, self.stability_score_offset
        )
        if self.stability_score_thresh > 0:
            data.filter(data["stability_score"] >= self.stability_score_thresh)
        data["masks"] = data["masks"] > model.mask_threshold
        data["boxes"] = batched_mask_to_box(data["masks"])
        data.filter(~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, width, height]))
        # A mask takes a byte a pixel, its RLE far less: all the image's masks are kept at once.
        data["rles"] = mask_to_rle_pytorch(uncrop_masks(data["masks"], crop_box, height, width))
        del data["masks"]
        return data

    @staticmethod
    def postprocess_small_regions(mask_data: MaskData, min_area: int, nms_thresh: float) -> MaskData:
        """Fill holes and remove parts smaller than `min_area` pixels, then drop masks that have become duplicates.

        Args:
            mask_data: with rles and boxes in the image. It is changed in place.
            nms_thresh: among masks whose boxes have a larger IoU, one is kept, preferably one without small regions.
        """
        if not mask_data["rles"]:
            return mask_data
        masks, untouched = [], []
        for rle in mask_data["rles"]:
            mask, filled = remove_small_regions(rle_to_mask(rle), min_area, mode="holes")
            mask, removed = remove_small_regions(mask, min_area, mode="islands")
            masks.append(torch.from_numpy(np.ascontiguousarray(mask)))
            untouched.append(not (filled or removed))
        boxes = torch.stack([batched_mask_to_box(mask) for mask in masks])
        keep = _suppress(boxes, torch.tensor(untouched), nms_thresh)
        for i in keep.tolist():
            if not untouched[i]:
                mask_data["rles"][i] = mask_to_rle_pytorch(masks[i][None])[0]
                mask_data["boxes"][i] = boxes[i]
        mask_data.filter(keep)
        return mask_data


def _suppress(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes to keep, best first: a box goes if its IoU with a better one exceeds `iou_threshold`."""
    from torchvision.ops.boxes import batched_nms  # slow to import

    one_category = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    return batched_nms(boxes.float(), scores.float().to(boxes.device), one_category, iou_threshold)


def _require_pycocotools() -> None:
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise ImportError("output_mode='coco_rle' needs pycocotools; pip install pycocotools") from error
