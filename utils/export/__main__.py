"""Write a fine-tuned model as files that run without this project.

    python -m utils.export --model_checkpoint work_dir/<run> \\
        --sam_checkpoint work_dir/SAM/sam_vit_b_01ec64.pth --format onnx --output bdd100k.onnx

onnx: a semantic model becomes one file, from picture to class map; a box model becomes an encoder and a decoder.
torch: a program of torch.export, from picture to class map, of a semantic model.
hf: a folder that transformers' SamModel loads, of a box model.
safetensors: the decoder alone, which --model_checkpoint takes like medsam_model_best.pth.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from utils.runtime import cli
from utils.runtime.choices import EXPORT_FORMATS, EXPORT_PRECISIONS, IMAGE_LAYOUTS, MODEL_TYPES


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.prog = "python -m utils.export"  # argparse would say __main__.py
    flag, switch = parser.add_flag, parser.add_switch
    sam = Path("work_dir/SAM/sam_vit_b_01ec64.pth")

    parser.begin_group("model")
    flag("model_checkpoint", type=Path, required=True, metavar="PATH", help="a run's folder or its best")
    flag("sam_checkpoint", type=Path, default=sam, metavar="FILE", help="SAM file the model was trained on")
    flag("model_type", choices=MODEL_TYPES, help="size of SAM (default: the checkpoint's)")
    switch("verify_checkpoint", help="compare the SAM file with the hash in its name")

    parser.begin_group("output")
    flag("format", choices=EXPORT_FORMATS, required=True, help="kind of file")
    flag("output", type=Path, required=True, metavar="PATH", help="file to write")
    flag("precision", choices=EXPORT_PRECISIONS, default="float32", help="float16 is for GPUs, int8 for CPUs")
    switch("overwrite", help="replace an existing output")

    parser.begin_group("input and output of a semantic model")
    flag("image_layout", choices=IMAGE_LAYOUTS, default="nchw", help="N x 3 x H x W or N x H x W x 3")
    flag("image_dtype", choices=("uint8", "float32"), default="uint8", help="of 0..255, or of [0, 1]")
    switch("logits", help="also return the logits of each class, N x classes x H x W float32")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags are answered before slow imports

from utils.export.formats import FORMATS, check_flags
from utils.export.trained import Options, load_trained
from utils.model import checkpoint
from utils.model.checkpoint import ModelInfo
from utils.runtime.errors import UserError, printable
from utils.runtime.files import exists, is_folder, require_writable, status


def main(args: argparse.Namespace) -> None:
    chosen = FORMATS[args.format]
    trained = load_trained(
        args.model_checkpoint,
        args.sam_checkpoint,
        model_type=args.model_type,
        check_hash=args.verify_checkpoint,
        before_sam=lambda info: check(args, info),
    )
    options = Options(
        image_layout=args.image_layout,
        image_dtype=args.image_dtype,
        logits=args.logits,
        precision=args.precision,
    )
    outputs = chosen.outputs(args.output, trained.info)
    notes = chosen.write(trained, outputs, options)
    for path in outputs:
        print(printable(f"Written: {path}"))
    for note in notes:
        print(printable(f"note: {note}"))


def check(args: argparse.Namespace, info: ModelInfo) -> None:
    """Raise a `UserError` if a flag does not fit, or an output exists or is an input."""
    outputs = FORMATS[args.format].outputs(args.output, info)
    check_flags(args.format, info, args.given)
    for output in outputs:
        for source in (checkpoint.in_folder(args.model_checkpoint, checkpoint.BEST), args.sam_checkpoint):
            ours, theirs = status(output), status(source)
            if ours and theirs and os.path.samestat(ours, theirs):
                raise UserError(f"{output}: is one of the two input files; give another --output")
        if is_folder(output):
            raise UserError(f"{output}: is a folder; add a file name, or give another --output")
        if exists(output) and not args.overwrite:
            raise UserError(f"{output}: already exists; add --overwrite to replace it, or give another --output")
        require_writable(output.parent, "--output")


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
