"""What the scripts' flags offer. Nothing here needs PyTorch, whose import takes seconds: `--help` answers before it."""

from __future__ import annotations

from typing import Literal

MODEL_TYPES = ("vit_h", "vit_l", "vit_b", "vit_tiny")  # of segment_anything.build_sam.CONFIGS
PROMPT_MODES = ("box", "semantic")  # of utils.model.segmenter.SEGMENTERS
CACHE_DTYPES = ("float16", "float32")  # of utils.cache.keys.DTYPES
SCHEDULES = ("constant", "cosine", "step")
AMP_DTYPES = ("auto", "fp16", "bf16")
AMP_HELP = "auto: bf16 where the hardware has it, else fp16 on a GPU and float32 on a CPU"
# --augment, and how many views of an image a cache holds unless the user says. "flip" has no more than two.
AUGMENTATIONS = {"none": 1, "flip": 2, "full": 4}

# --map_rule: how masks become one map, where several claim a pixel or none does.
MapRule = Literal["argmax", "box_threshold", "threshold"]
MAP_RULES: dict[MapRule, str] = {
    "argmax": "a pixel goes to the highest logit among the classes whose box holds it",
    "box_threshold": "a pixel goes to the highest logit above 0 among the classes whose box holds it",
    "threshold": "a pixel goes to the highest logit above 0, inside or outside its box",
}
