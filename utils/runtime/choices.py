"""The choices of the scripts' flags, without PyTorch, so that `--help` is fast."""

from __future__ import annotations

from typing import Literal

MODEL_TYPES = ("vit_h", "vit_l", "vit_b", "vit_tiny")  # as in segment_anything.build_sam.CONFIGS
PROMPT_MODES = ("box", "semantic")  # as in utils.model.segmenter.SEGMENTERS
CACHE_DTYPES = ("float16", "float32")  # as in utils.cache.keys.DTYPES
SCHEDULES = ("constant", "cosine", "step")
EXPORT_FORMATS = ("onnx", "torch", "safetensors", "hf")  # as in utils.export.formats.FORMATS
EXPORT_PRECISIONS = ("float32", "float16", "int8")
IMAGE_LAYOUTS = ("nchw", "nhwc")
AMP_DTYPES = ("auto", "fp16", "bf16")
AMP_HELP = "type of mixed precision; auto is bf16 if the hardware has it, otherwise fp16 on a GPU and float32 on a CPU"
# --augment, and the default number of views of an image in a cache. "flip" has only two.
AUGMENTATIONS = {"none": 1, "flip": 2, "full": 4}

# --map_rule: how masks become one map, where several cover a pixel or none does.
MapRule = Literal["argmax", "box_threshold", "threshold"]
MAP_RULES: dict[MapRule, str] = {
    "argmax": "the highest logit among the classes whose box holds the pixel",
    "box_threshold": "the highest logit above 0 among the classes whose box holds the pixel",
    "threshold": "the highest logit above 0, inside or outside the box",
}

# --predictions_format: beside the PNGs of --save_predictions, files for an annotation tool.
PREDICTION_FORMATS = ("png", "cvat", "labelstudio", "coco")  # as in utils.evaluate.annotators.WRITERS
