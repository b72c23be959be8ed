"""Evaluate a fine-tuned mask decoder: per-class IoU and mIoU on a validation split, and pictures.

    python infer_bdd100k.py --val_npy_path data/bdd100k_npy/val \\
        --model_checkpoint work_dir/<task>-<YYYYMMDD-HHMM>/medsam_model_best.pth \\
        --sam_checkpoint work_dir/SAM/sam_vit_b_01ec64.pth --model_type vit_b \\
        --output_dir ./inference_results --visualize

Without --model_checkpoint the SAM file is evaluated as it is: the figure to compare a fine-tuned one with.

Each class of each image is prompted with its box, taken from the ground truth: the figures are those of *oracle* boxes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from segment_anything.build_sam import CONFIGS, file_digest
from utils import checkpoint, cli
from utils.dataset import EvaluationDataset, NpyFolder, collate_evaluation
from utils.engine import Prediction, predict
from utils.errors import UserError
from utils.files import atomic_write
from utils.geometry import fitted_size
from utils.manifest import ManifestItem
from utils.metrics import ConfusionMatrix, format_details, format_report, results_dict
from utils.model import BoxSegmenter, build_model
from utils.precision import AMP_DTYPES, AMP_HELP, Precision, resolve_precision
from utils.visualize import save_comparison, save_confusion_matrix

NUM_PICTURES = 20


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    flag = parser.add_flag
    flag("val_npy_path", type=Path, default=Path("data/bdd100k_npy/val"), help="split written by pre_bdd100k.py")
    flag("model_checkpoint", type=Path, help="medsam_model_best.pth of a run (default: none, SAM as it is)")
    flag("sam_checkpoint", type=Path, default=Path("work_dir/SAM/sam_vit_b_01ec64.pth"), help="SAM, for its encoders")
    parser.add_switch("verify_checkpoint", help="compare the SAM file with the hash in its name")
    flag("model_type", choices=list(CONFIGS), default="vit_b", help="which SAM")
    flag("output_dir", type=Path, default=Path("inference_results"), help="where the results go")
    flag("batch_size", type=cli.positive_int, default=1, help="images encoded at once")
    flag("num_workers", type=cli.non_negative_int, default=2, help="loader processes")
    flag("device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_switch("use_amp", help="mixed precision")
    flag("amp_dtype", choices=AMP_DTYPES, default="auto", help=AMP_HELP)
    flag("visualize", action="store_true", help=f"draw the first {NUM_PICTURES} images")
    return parser


def main(args: argparse.Namespace) -> None:
    precision = resolve_precision(
        args.device, local_rank=0, local_world_size=1, use_amp=args.use_amp, amp_dtype=args.amp_dtype
    )
    source = NpyFolder(args.val_npy_path)
    model = load_model(args, source, precision)
    pictures = args.output_dir / "visualizations"
    try:
        (pictures if args.visualize else args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output_dir}: cannot be made ({error.strerror}); give another --output_dir") from None

    loader = DataLoader(
        EvaluationDataset(source),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        collate_fn=collate_evaluation,
        pin_memory=precision.device.type == "cuda",
    )
    confusion = ConfusionMatrix()
    outcomes = predict(model, loader, precision)
    for i, outcome in enumerate(tqdm(outcomes, total=len(source.items), desc="evaluating", unit="image")):
        confusion.update(outcome.prediction, outcome.target)
        if args.visualize and i < NUM_PICTURES:
            draw(pictures / f"{outcome.name}.png", outcome, source.items[i], source.resize_mode)
    report(confusion, args)


def load_model(args: argparse.Namespace, source: NpyFolder, precision: Precision) -> BoxSegmenter:
    """SAM with the fine-tuned decoder, if one is given, which must belong to this SAM file and this data."""
    # The small file first: what does not fit should not wait for the large one.
    state = checkpoint.load_checkpoint(args.model_checkpoint) if args.model_checkpoint else None
    if state and state["info"].model_type != args.model_type:
        actual = state["info"].model_type
        raise UserError(f"{args.model_checkpoint}: a decoder of {actual}, not of {args.model_type}; "
                        f"give --model_type {actual} and the SAM file it was trained on")
    model = build_model(
        args.model_type, args.sam_checkpoint, image_size=source.image_size, check_hash=args.verify_checkpoint
    )
    if state:
        here = checkpoint.ModelInfo(
            args.model_type, source.image_size, source.resize_mode, sam_sha256=file_digest(args.sam_checkpoint)
        )
        state["info"].require_same(here, args.model_checkpoint)
        checkpoint.load_decoder(model, state["model"], args.model_checkpoint)
    return model.to(precision.device)


def draw(path: Path, outcome: Prediction, item: ManifestItem, resize_mode: str) -> None:
    """Write image, ground truth and prediction side by side, in the shape of the original photograph."""
    image = outcome.image.numpy()
    if image.dtype != np.uint8:
        image = (image.astype(np.float32) * 255).round().astype(np.uint8)
    height, width = fitted_size(item.height, item.width, image.shape[0], resize_mode)

    def unframed(pixels: np.ndarray, interpolation: int) -> np.ndarray:
        return cv2.resize(pixels[:height, :width], (item.width, item.height), interpolation=interpolation)

    save_comparison(
        path,
        unframed(image, cv2.INTER_LINEAR),
        unframed(outcome.target.numpy(), cv2.INTER_NEAREST_EXACT),
        unframed(outcome.prediction.numpy(), cv2.INTER_NEAREST_EXACT),
    )


def report(confusion: ConfusionMatrix, args: argparse.Namespace) -> None:
    """Print the result and write it as text, JSON and a picture of the confusion matrix."""
    text = f"{format_report(confusion.matrix)}\n\n{format_details(confusion.matrix, box_source='oracle')}\n"
    model = str(args.model_checkpoint or f"{args.sam_checkpoint}, not fine-tuned")
    results = {"model": model, "data": str(args.val_npy_path), "boxes": "oracle", **results_dict(confusion.matrix)}
    print(f"\n{text}")
    outputs = {
        "evaluation_results.txt": text,
        "evaluation_results.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n",
    }
    for name, content in outputs.items():
        with atomic_write(args.output_dir / name) as file:
            file.write(content.encode())
    save_confusion_matrix(args.output_dir / "confusion_matrix.png", confusion.matrix.numpy())
    print(f"Results: {', '.join(str(args.output_dir / name) for name in [*outputs, 'confusion_matrix.png'])}")
    if args.visualize:
        print(f"Pictures: {args.output_dir / 'visualizations'}")


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
