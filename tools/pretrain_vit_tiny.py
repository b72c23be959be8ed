"""Train a `vit_tiny` SAM on SAM's own task: a box in, the mask of one object out.

The weights in assets/ start from random ones and learn from drawn scenes with seeds that nothing else here uses:

    python -m tools.pretrain_vit_tiny --output assets/sam_vit_tiny_scenes.pth

They were trained when the loss sampled every second pixel; it now samples every fourth.

Starting from those weights, on photographs, for `docs/RESULTS.md`:

    python -m tools.pretrain_vit_tiny --data data/camvid_npy/train --init assets/sam_vit_tiny_scenes.pth \\
        --output work_dir/SAM/sam_vit_tiny_camvid.pth

The script does not use classes: each prompt is the box of one object, so later training on classes still has something
to learn. Class masks of photographs have no instances, so an object there is a connected region of one class.
Everything in SAM is trained except the embeddings of points and masks. Weights are saved as float16.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from segment_anything import build_sam_vit_tiny
from segment_anything.build_sam import CONFIGS, load_state_dict, read_state_dict
from segment_anything.modeling import Sam
from utils.data.boxes import jitter_boxes, mask_box
from utils.data.classes import IGNORE_LABEL
from utils.data.datasets import NpyFolder
from utils.data.frame import ImageSize, frame_size, image_size, image_size_of
from utils.data.geometry import resize_image, resize_mask
from utils.model.losses import prompt_losses
from utils.runtime import cli
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, make_folder
from utils.runtime.process_pool import run_jobs, usable_cores
from utils.runtime.progress import progress_bar
from utils.scenes import draw_scene
from utils.train.optim import build_optimizer, build_scheduler

OTHER = 254  # label of an object without a prompt
MIN_PIXELS = 24  # smaller objects are skipped
SEED = 1_000_003  # far from the seeds of the demo and the tests


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_flag("output", type=Path, default=Path("assets/sam_vit_tiny_scenes.pth"), help="file for the weights")
    parser.add_flag("data", type=Path, help="train on this split of pre_bdd100k.py instead of drawn scenes")
    parser.add_flag("init", type=Path, help="initial weights (default: random)")
    parser.add_flag(
        "image_size",
        type=image_size,
        help=f"frame of drawn scenes (default: {CONFIGS['vit_tiny'].image_size}); a --data split has its own",
    )
    parser.add_flag("num_scenes", type=cli.positive_int, default=1200, help="number of drawn scenes")
    parser.add_flag("num_steps", type=cli.positive_int, default=1500, help="optimizer steps")
    parser.add_flag("batch_size", type=cli.positive_int, default=8, help="images per step")
    parser.add_flag("num_prompts", type=cli.positive_int, default=4, help="objects per image and step")
    parser.add_flag("lr", type=cli.positive_float, default=8e-4, help="peak learning rate")
    parser.add_switch("use_amp", help="compute in bf16, two to three times faster on some CPUs")
    return parser


def draw_all(indices: list[int], image_size: ImageSize) -> list[tuple[np.ndarray, np.ndarray]]:
    """The scenes of `draw` for several indices."""
    return [draw(index, image_size) for index in indices]


def draw(index: int, image_size: ImageSize) -> tuple[np.ndarray, np.ndarray]:
    """Draw scene `index` at `image_size`. Returns its image, H x W x 3 uint8, and instances, H x W uint16."""
    scene = draw_scene(np.random.default_rng((SEED, index)), 360, 640)
    # resize_mask takes uint8, so resize the two bytes of an id apart. Nearest keeps them together.
    low, high = (resize_mask(np.uint8(scene.instances >> shift & 255), image_size, "stretch") for shift in (0, 8))
    return resize_image(scene.image, image_size, "stretch"), low.astype(np.uint16) | high.astype(np.uint16) << 8


def read(source: NpyFolder, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Read photograph `index`, H x W x 3 uint8, and its objects, H x W uint16 with 0 for unlabelled pixels."""
    image, labels = source.read(index)
    things = np.zeros(labels.shape, dtype=np.uint16)
    for class_id in np.setdiff1d(labels, [IGNORE_LABEL]):
        _, pieces = cv2.connectedComponents((labels == class_id).astype(np.uint8))
        things = np.where(pieces > 0, pieces + int(things.max()), things).astype(np.uint16)
    return (image if image.dtype == np.uint8 else np.rint(image * 255.0).astype(np.uint8)), things


def make_sample(
    image: np.ndarray, instances: np.ndarray, num_prompts: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Choose up to Q objects of an image and mirror the image half of the time.

    Unlabelled pixels (instance 0) become IGNORE_LABEL.

    Returns:
        image: H x W x 3 uint8.
        labels: H x W uint8, 0..Q-1 for the chosen objects and `OTHER` for the rest.
        boxes: Q x 4 jittered boxes.
        valid: Q bool, False for prompts without an object.
    """
    if rng.random() < 0.5:
        image, instances = image[:, ::-1], instances[:, ::-1]
    ids, counts = np.unique(instances, return_counts=True)
    chosen = rng.permutation(ids[(counts >= MIN_PIXELS) & (ids > 0)])[:num_prompts]
    labels = np.where(instances > 0, OTHER, IGNORE_LABEL).astype(np.uint8)
    boxes = np.zeros((num_prompts, 4), dtype=np.int64)
    for i, instance in enumerate(chosen):
        mask = instances == instance
        labels[mask] = i
        boxes[i] = jitter_boxes(mask_box(mask)[None], image_size_of(mask.shape), 20, rng)[0]
    return image, labels, boxes, np.arange(num_prompts) < len(chosen)


def train_step(sam: Sam, images: Tensor, labels: Tensor, boxes: Tensor, use_amp: bool = False) -> dict[str, Tensor]:
    """The losses of one batch, B x Q each. Images are B x 3 x H x W uint8, labels B x H x W, boxes B x Q x 4."""
    b, q = boxes.shape[:2]
    with torch.autocast("cpu", torch.bfloat16, enabled=use_amp):
        sparse, dense = sam.prompt_encoder(boxes=boxes.flatten(0, 1))
        low_res_masks, iou_predictions = sam.mask_decoder(
            image_embeddings=sam.image_encoder(sam.preprocess(images.float())),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse.unflatten(0, (b, q)),
            dense_prompt_embeddings=dense.unflatten(0, (b, q)),
            multimask_output=False,
        )
    class_ids = torch.arange(q).expand(b, q)
    # Masks have a quarter of the image's size, so every fourth pixel is enough.
    return prompt_losses(low_res_masks[:, :, 0], iou_predictions[:, :, 0], labels, class_ids, stride=4)


def mean_loss(losses: dict[str, Tensor], valid: Tensor) -> Tensor:
    """The mean loss over the valid prompts, B x Q bool; 0 if there are none."""
    total = losses["dice"] + losses["bce"] + losses["iou"]
    return (total * valid).sum() / valid.sum().clamp(min=1)


def load_sam(init: Path | None, image_size: ImageSize) -> Sam:
    """A `vit_tiny` in training mode, with random weights or those of the file `init`."""
    try:
        sam = build_sam_vit_tiny(image_size=frame_size(image_size))
        if init:  # the builder would scale positions by this file's square, which what is saved does not name
            load_state_dict(sam, read_state_dict(init, "vit_tiny"), model_type="vit_tiny", source=init)
        return sam.train()
    except ValueError as error:  # a CheckpointError, or a frame that no model takes
        raise UserError(str(error)) from None


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    source = NpyFolder(args.data) if args.data else None
    image_size = source.image_size if source else args.image_size or CONFIGS["vit_tiny"].image_size
    if args.image_size not in (None, image_size):
        raise UserError(
            f"{args.data}: has image size {image_size}; leave out --image_size {args.image_size}, or pass "
            "it to pre_bdd100k.py"
        )
    sam = load_sam(args.init, image_size)
    make_folder(args.output.parent, "--output")
    if args.output.is_dir():
        raise UserError(f"{args.output}: is a folder; set --output to a file")
    if source:
        scenes = [read(source, index) for index in progress_bar(range(len(source.items)), "reading", unit="image")]
    else:
        with progress_bar(total=args.num_scenes, desc="drawing", unit="scene") as bar:
            draw_some = partial(draw_all, image_size=image_size)
            scenes = run_jobs(draw_some, list(range(args.num_scenes)), usable_cores(), bar.update)

    optimizer = build_optimizer(sam, lr=args.lr, weight_decay=0.05)
    scheduler = build_scheduler(optimizer, "cosine", total_steps=args.num_steps, warmup_steps=args.num_steps // 20)
    started, recent = time.monotonic(), 0.0
    progress = progress_bar(range(args.num_steps), "training", unit="step")
    for step in progress:
        chosen = rng.integers(len(scenes), size=args.batch_size)
        samples = [make_sample(scenes[i][0], scenes[i][1], args.num_prompts, rng) for i in chosen]
        images, labels, boxes, valid = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples))
        loss = mean_loss(train_step(sam, images.permute(0, 3, 1, 2), labels, boxes, args.use_amp), valid)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        recent += 0.02 * (loss.item() - recent) if step else loss.item()
        progress.set_postfix(loss=f"{recent:.4f}")

    with atomic_write(args.output) as file:
        torch.save({key: value.half() for key, value in sam.state_dict().items()}, file)
    minutes = (time.monotonic() - started) / 60
    print(f"{args.output}: {args.num_steps} steps in {minutes:.0f} minutes, loss {recent:.4f}")


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
