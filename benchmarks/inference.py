"""Evaluating an image of 11 classes: encoded once and all boxes decoded in one call, against an encoding per class.

    python -m benchmarks.inference
    python -m benchmarks.inference --model_type vit_tiny --image_size 256 --repeats 1    # a few seconds

The reference, for each class, runs the public package's encoder in float32 and this project's decoder on one box. Its
rounds are all alike, so one is measured and multiplied by the number of classes: with memory as the C library handles
it by itself, and again (`ratio_memory_kept`) as this project's scripts have it. Ours is
`utils.model.prediction.predict` and the label map of the result.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from benchmarks import common
from utils.data.datasets import EvaluationBatch
from utils.model.prediction import Prediction, predict
from utils.model.segmenter import BoxSegmenter
from utils.runtime import cli
from utils.runtime.device import Precision

CPU = torch.device("cpu")


def get_args_parser() -> cli.Parser:
    parser = common.get_args_parser(__doc__)
    parser.add_flag("classes", type=cli.positive_int, default=11, help="classes in the image, each with its box")
    return parser


def random_boxes(count: int, image_size: int) -> Tensor:
    """count x 4, xyxy inside the frame."""
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(0)) * (image_size - 1)
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


@torch.no_grad()
def evaluate_one_class(segmenter: BoxSegmenter, public: nn.Module, image: Tensor, box: Tensor) -> Tensor:
    embeddings = public(segmenter.sam.preprocess(image.permute(0, 3, 1, 2).float()))
    masks, _ = segmenter((embeddings,), box[None, None])
    return Prediction(masks[0], torch.zeros(1, dtype=torch.long), threshold=0).label_map(image.shape[1])


def main(args: argparse.Namespace) -> None:
    sam, public = common.build_pair(args.model_type, args.image_size)
    segmenter = BoxSegmenter(sam)
    image = torch.randint(256, (1, args.image_size, args.image_size, 3), dtype=torch.uint8)
    boxes = random_boxes(args.classes, args.image_size)
    batch: EvaluationBatch = {"image": image, "boxes": [boxes], "class_ids": [torch.arange(args.classes)]}
    features = segmenter.encode(image.permute(0, 3, 1, 2))

    def decode() -> Tensor:
        with torch.no_grad():
            masks, _ = segmenter(features, boxes[None])
            return Prediction(masks[0], batch["class_ids"][0], boxes).label_map(args.image_size)

    def one_class() -> Tensor:
        return evaluate_one_class(segmenter, public, image, boxes[0])

    def evaluate(dtype: torch.dtype | None) -> Tensor:
        return next(predict(segmenter, batch, Precision(CPU, dtype))).label_map(args.image_size)

    seconds = common.measure(
        {
            **common.reference("one class", one_class),
            "float32": lambda: evaluate(None),
            "bf16": lambda: evaluate(torch.bfloat16),
            "decoder": decode,
        },
        args.repeats,
    )
    reference = args.classes * seconds["one class"]
    for name in ("float32", "bf16"):
        common.report(
            f"evaluation of {args.classes} classes in {name}, {args.model_type} at {args.image_size}",
            ratio=reference / seconds[name],
            ratio_memory_kept=args.classes * seconds["one class, memory kept"] / seconds[name],
            ours_s=seconds[name],
            per_class_float32_s=reference,
            split_s={"encoder": seconds[name] - seconds["decoder"], "decoder and label map": seconds["decoder"]},
        )


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
