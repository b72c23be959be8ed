"""Join a fine-tuned mask decoder and its SAM file into one plain SAM checkpoint.

    python -m utils.ckpt_convert --model_checkpoint work_dir/<run>/medsam_model_best.pth \\
        --sam_checkpoint work_dir/SAM/sam_vit_b_01ec64.pth --output sam_vit_b_bdd100k.pth

The result is a SAM state dict that the public `segment-anything` package loads strictly.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from utils.runtime import cli

# The models of the public package's registry, and their only input size.
PUBLIC_MODELS = ("vit_b", "vit_l", "vit_h")
PUBLIC_SIZE = 1024


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    flag = parser.add_flag
    flag("model_checkpoint", type=Path, required=True, metavar="FILE", help="medsam_model_best.pth of a run")
    sam = Path("work_dir/SAM/sam_vit_b_01ec64.pth")
    flag("sam_checkpoint", type=Path, default=sam, metavar="FILE", help="SAM file it was trained on")
    flag("output", type=Path, required=True, metavar="FILE", help="SAM checkpoint to write")
    parser.add_switch("overwrite", help="replace an existing output")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags are answered before slow imports

from torch import Tensor

from segment_anything import CheckpointError
from segment_anything.build_sam import CONFIGS, PATCH_SIZE, file_digest, read_state_dict
from utils.data.frame import frame_size, image_size_of
from utils.model import checkpoint
from utils.model.checkpoint import DECODER_PREFIX, ModelInfo
from utils.model.segmenter import INFER_FLAGS
from utils.runtime.errors import UserError
from utils.runtime.files import exists, is_folder, status


def join(model_checkpoint: Path, sam_checkpoint: Path) -> tuple[dict[str, Tensor], ModelInfo]:
    """The SAM file's tensors in its order, with the decoder's tensors replaced by the fine-tuned ones.

    Position tables keep the SAM file's size, whatever size the decoder was trained at.

    Raises:
        UserError: a file is missing, damaged or of another kind, or the two do not belong together.
    """
    # The small file first, so that errors do not wait for the large one.
    trained = checkpoint.load_checkpoint(model_checkpoint)
    info = trained["info"]
    wrong = None
    if info.model_type not in CONFIGS:
        wrong = f"model type {info.model_type} is unknown; give a checkpoint of {', '.join(CONFIGS)}"
    elif info.prompt_mode != "box":
        wrong = f"prompt mode {info.prompt_mode} has class tokens, and plain SAM has none; give a box checkpoint"
    if wrong:
        raise UserError(f"{model_checkpoint}: {wrong}")
    try:
        sam = read_state_dict(sam_checkpoint, info.model_type)
    except CheckpointError as error:
        raise INFER_FLAGS.about(error) from None
    info.require_same(replace(info, sam_sha256=file_digest(sam_checkpoint)), model_checkpoint)
    if getattr(sam.get("image_encoder.pos_embed"), "ndim", None) != 4:
        raise UserError(f"{sam_checkpoint}: not a {info.model_type} SAM checkpoint: it has no table of positions")
    decoder = trained["model"]
    untrained = {key: value for key, value in sam.items() if key.startswith(DECODER_PREFIX)}
    checkpoint.require_same_decoder(decoder, untrained, model_checkpoint)
    return {key: decoder.get(key, value) for key, value in sam.items()}, info


def how_to_load(output: Path, state: Mapping[str, Tensor], info: ModelInfo) -> str:
    """Notes on using the file, and the two lines of Python that load it."""
    name, size = info.model_type, info.image_size
    rows, columns = state["image_encoder.pos_embed"].shape[1:3]
    table_size = image_size_of((rows * PATCH_SIZE, columns * PATCH_SIZE))
    argument = f"image_size={size if isinstance(size, int) else frame_size(size)}"
    at_its_size = size == CONFIGS[name].image_size
    notes = [
        "only mask 0, the single-mask token, was trained. Use multimask_output=False. For ONNX, export without "
        "return_single_mask and use mask 0. SamAutomaticMaskGenerator uses the other three masks: they are not trained"
    ]
    if info.resize_mode == "stretch":
        shape = "a square" if isinstance(size, int) else size
        notes.append(f"it was trained on images stretched to {shape}, but SamPredictor pads: stretch images first")
    if not at_its_size:
        notes.append(
            f"it was trained at image size {size} and works best at it "
            f"({argument} in this project's registry; the public package has only {PUBLIC_SIZE})"
        )

    arguments = f"checkpoint={json.dumps(str(output), ensure_ascii=False)}"
    if name in PUBLIC_MODELS and table_size == PUBLIC_SIZE:
        loader = "loads it, and so does this project's registry:"
    else:
        missing = f"positions of {table_size}" if name in PUBLIC_MODELS else name  # our registry resamples positions
        loader = f"has no builder for {missing}; this project's registry loads it:"
        arguments += "" if at_its_size else f", {argument}"
    return "\n".join(
        [
            *(f"note: {note}" for note in notes),
            f"The public segment-anything package {loader}",
            "    from segment_anything import sam_model_registry",
            f'    sam = sam_model_registry["{name}"]({arguments})',
        ]
    )


def main(args: argparse.Namespace) -> None:
    output: Path = args.output
    for source in (checkpoint.in_folder(args.model_checkpoint, checkpoint.BEST), args.sam_checkpoint):
        ours, theirs = status(output), status(source)
        if ours and theirs and os.path.samestat(ours, theirs):
            raise UserError(f"{output}: is one of the two input files; give another --output")
    if is_folder(output) or (exists(output) and not args.overwrite):
        fix = "is a folder; add a file name" if is_folder(output) else "already exists; add --overwrite to replace it"
        raise UserError(f"{output}: {fix}, or give another --output")
    state, info = join(args.model_checkpoint, args.sam_checkpoint)
    checkpoint.save_whole(output, state)
    print(f"SAM checkpoint: {output}")
    print(how_to_load(output, state, info))


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
