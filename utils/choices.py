"""What the scripts' flags offer. Nothing here needs PyTorch, whose import takes seconds: `--help` answers before it."""

from __future__ import annotations

MODEL_TYPES = ("vit_h", "vit_l", "vit_b", "vit_tiny")  # of segment_anything.build_sam.CONFIGS
PROMPT_MODES = ("box", "semantic")  # of utils.model.SEGMENTERS
CACHE_DTYPES = ("float16", "float32")  # of utils.embedding_cache.DTYPES
SCHEDULES = ("constant", "cosine", "step")
AMP_DTYPES = ("auto", "fp16", "bf16")
AMP_HELP = "auto: bf16 where the hardware has it, else fp16 on a GPU and float32 on a CPU"
# --augment, and how many views of an image a cache holds unless the user says. "flip" has no more than two.
AUGMENTATIONS = {"none": 1, "flip": 2, "full": 4}
