"""Join a fine-tuned mask decoder with the SAM file it was trained on into one plain SAM checkpoint.

    python -m utils.ckpt_convert --model_checkpoint work_dir/<run>/medsam_model_best.pth \\
        --sam_checkpoint work_dir/SAM/sam_vit_b_01ec64.pth --output sam_vit_b_bdd100k.pth

The result is an ordinary SAM state dict, which the public `segment-anything` package loads strictly.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from utils.runtime import cli

# What the public package's registry builds, and the one input size that it builds them for.
PUBLIC_MODELS = ("vit_b", "vit_l", "vit_h")
PUBLIC_SIZE = 1024


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    flag = parser.add_flag
    flag("model_checkpoint", type=Path, required=True, help="medsam_model_best.pth of a run")
    flag("sam_checkpoint", type=Path, default=Path("work_dir/SAM/sam_vit_b_01ec64.pth"), help="SAM it was trained on")
    flag("output", type=Path, required=True, help="the SAM checkpoint to write")
    parser.add_switch("overwrite", help="replace the output if it exists")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and a mistyped flag are answered before imports that take seconds

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
    """The SAM file's tensors as they are, in its order, but the fine-tuned decoder's in place of its own.

    Nothing is built or resampled: position tables keep the SAM file's size, whatever size the decoder was trained at.

    Raises:
        UserError: a file is missing, damaged or of another kind, or the two do not belong together.
    """
    # The small file first: what does not fit should not wait for the large one.
    trained = checkpoint.load_checkpoint(model_checkpoint)
    info: ModelInfo = trained["info"]
    if info.model_type not in CONFIGS:
        raise UserError(
            f"{model_checkpoint}: a decoder of {info.model_type}, which is none of {', '.join(CONFIGS)}; "
            "give one that train_bdd100k.py wrote"
        )
    if info.prompt_mode != "box":
        raise UserError(
            f"{model_checkpoint}: was trained in prompt mode {info.prompt_mode}, and class tokens do not "
            "exist in plain SAM; give a checkpoint of prompt mode box"
        )
    try:
        sam = read_state_dict(sam_checkpoint, info.model_type)
    except CheckpointError as error:
        raise INFER_FLAGS.about(error) from None
    info.require_same(replace(info, sam_sha256=file_digest(sam_checkpoint)), model_checkpoint)
    if getattr(sam.get("image_encoder.pos_embed"), "ndim", None) != 4:  # which says what size the file is of
        raise UserError(f"{sam_checkpoint}: not a {info.model_type} SAM checkpoint: it has no table of positions")
    decoder: dict[str, Tensor] = trained["model"]
    untrained = {key: value for key, value in sam.items() if key.startswith(DECODER_PREFIX)}
    checkpoint.require_same_decoder(decoder, untrained, model_checkpoint)
    return {key: decoder.get(key, value) for key, value in sam.items()}, info


def how_to_load(output: Path, state: Mapping[str, Tensor], info: ModelInfo) -> str:
    """What to know before using the file, and the two lines of Python that load it."""
    name, size = info.model_type, info.image_size
    rows, columns = state["image_encoder.pos_embed"].shape[1:3]
    table_size = image_size_of((rows * PATCH_SIZE, columns * PATCH_SIZE))
    argument = f"image_size={size if isinstance(size, int) else frame_size(size)}"
    at_its_size = size == CONFIGS[name].image_size
    notes = [
        "box training trains the single-mask token, which is mask 0: call with multimask_output=False; export to ONNX "
        "without return_single_mask and take mask 0. SamAutomaticMaskGenerator takes the other three masks, which were "
        "not trained"
    ]
    if info.resize_mode == "stretch":
        shape = "a square" if isinstance(size, int) else size
        notes.append(f"it was trained on images stretched to {shape}; SamPredictor pads instead: stretch them first")
    if not at_its_size:
        notes.append(
            f"it was trained at image size {size} and works best there "
            f"({argument} in this project's registry; the public package has {PUBLIC_SIZE} only)"
        )

    arguments = f"checkpoint={json.dumps(str(output), ensure_ascii=False)}"
    if name in PUBLIC_MODELS and table_size == PUBLIC_SIZE:
        loader = "loads it, and so does this project's registry:"
    else:
        missing = f"positions of {table_size}" if name in PUBLIC_MODELS else name  # ours resamples positions
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
            raise UserError(f"{output}: is one of the two files to join; give another --output")
    if is_folder(output):
        raise UserError(f"{output}: is a folder; give --output the name of a file")
    if exists(output) and not args.overwrite:
        raise UserError(f"{output}: exists already; give another --output, or --overwrite to replace it")
    state, info = join(args.model_checkpoint, args.sam_checkpoint)
    checkpoint.save_whole(output, state)
    print(f"SAM checkpoint: {output}")
    print(how_to_load(output, state, info))


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
