"""Segment Anything (Kirillov et al., 2023, arXiv 2304.02643), compatible with Meta's checkpoints.

from segment_anything import SamPredictor, sam_model_registry
predictor = SamPredictor(sam_model_registry["vit_b"](checkpoint="work_dir/SAM/sam_vit_b_01ec64.pth"))
"""

from segment_anything.automatic_mask_generator import SamAutomaticMaskGenerator
from segment_anything.build_sam import (
    CheckpointError,
    build_sam,
    build_sam_vit_b,
    build_sam_vit_h,
    build_sam_vit_l,
    build_sam_vit_tiny,
    sam_model_registry,
)
from segment_anything.predictor import SamPredictor

__all__ = [
    "CheckpointError",
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "build_sam",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "build_sam_vit_tiny",
    "sam_model_registry",
]
