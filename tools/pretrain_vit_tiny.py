"""Train a `vit_tiny` SAM on SAM's own task: a box in, the mask of what it frames out.

The weights in assets/ start from random ones and learn from drawn scenes with seeds that nothing else here uses. They
were trained on one H200:

    python -m tools.pretrain_vit_tiny --output assets/sam_vit_tiny_scenes.pth --device cuda --use_amp \\
        --num_scenes 8000 --num_steps 2405 --batch_size 64 --num_prompts 8 --lr 1e-3

Starting from such weights, on photographs:

    python -m tools.pretrain_vit_tiny --data data/camvid_npy/train --init assets/sam_vit_tiny_scenes.pth \\
        --output work_dir/SAM/sam_vit_tiny_camvid.pth

The names of classes are not used: a prompt is the box of one object or, for half of the images, of all objects of a
kind. Later training on classes still has something to learn. Class masks of photographs have no instances, so an object
there is a connected region of one class. Everything in SAM is trained except the embeddings of points and masks.

The frames of --image_size take turns. All of them read one square table of positions, so the weights fit other frames,
too. The state is saved to `<output>.state` now and then, and the same command resumes from it. Weights are float16.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from segment_anything import build_sam_vit_tiny
from segment_anything.build_sam import CONFIGS, fit_positions
from segment_anything.modeling import Sam
from segment_anything.utils.plain_load import load_plain
from utils.data.boxes import jitter_boxes, mask_box
from utils.data.classes import IGNORE_LABEL
from utils.data.datasets import NpyFolder
from utils.data.frame import ImageSize, Size, frame_size, image_size, image_size_of
from utils.data.geometry import resize_image, resize_mask
from utils.model.losses import prompt_losses
from utils.runtime import cli
from utils.runtime.device import resolve_precision, telling_out_of_memory
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, exists, make_folder
from utils.runtime.process_pool import run_jobs, usable_cores
from utils.runtime.progress import progress_bar
from utils.scenes import draw_scene
from utils.train.optim import TrainState, build_optimizer, build_scheduler

OTHER = 254  # label of an object without a prompt
MIN_PIXELS = 24  # smaller objects are skipped
SEED = 1_000_003  # far from the seeds of the demo and the tests
FRAMES: list[ImageSize] = ["288x512", 256]  # the demo's, and the model's default
SAVE_EVERY = 500  # steps


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_flag("output", type=Path, default=Path("assets/sam_vit_tiny_scenes.pth"), help="file for the weights")
    parser.add_flag("data", type=Path, help="train on this split of pre_bdd100k.py instead of drawn scenes")
    parser.add_flag("init", type=Path, help="initial weights (default: random)")
    parser.add_flag(
        "image_size",
        type=image_size,
        nargs="+",
        help=f"frames of drawn scenes (default: {' '.join(map(str, FRAMES))}); a --data split has its own",
    )
    parser.add_flag("num_scenes", type=cli.positive_int, default=1200, help="number of drawn scenes")
    parser.add_flag("num_steps", type=cli.positive_int, default=1500, help="optimizer steps")
    parser.add_flag("batch_size", type=cli.positive_int, default=8, help="images per step")
    parser.add_flag("num_prompts", type=cli.positive_int, default=4, help="objects per image and step")
    parser.add_flag("lr", type=cli.positive_float, default=8e-4, help="peak learning rate")
    parser.add_flag("device", help="cpu, cuda or cuda:N (default: cuda if available)")
    parser.add_switch("use_amp", help="compute in bf16, or in fp16 on a card without it")
    return parser


@dataclass(frozen=True)
class Picture:
    """What one image has to learn from. `things` has one map of objects and one of kinds; 0 is unlabelled."""

    image: np.ndarray  # H x W x 3 uint8
    things: np.ndarray  # 2 x H x W int16
    boxes: list[dict[int, np.ndarray]]  # of each map: the id of each thing of MIN_PIXELS, and its box, (4,) int64


def make_picture(image: np.ndarray, objects: np.ndarray, labels: np.ndarray) -> Picture:
    """Find the boxes. `objects` are H x W ids with 0 for unlabelled pixels, `labels` H x W class ids."""
    things = np.stack([objects, np.where(labels == IGNORE_LABEL, 0, labels.astype(np.int16) + 1)]).astype(np.int16)
    boxes = []
    for ids in things:
        sizes = np.bincount(ids.ravel())
        boxes.append({int(i): mask_box(ids == i) for i in np.flatnonzero(sizes >= MIN_PIXELS) if i > 0})
    return Picture(image, things, boxes)


def draw_pictures(indices: list[int], size: ImageSize) -> list[Picture]:
    """Draw the scenes of these indices, at the size of BDD100K's images, and resize them."""
    pictures = []
    for index in indices:
        scene = draw_scene(np.random.default_rng((SEED, index)))
        # resize_mask takes uint8, so resize the two bytes of an id apart. Nearest keeps them together.
        low, high = (resize_mask(np.uint8(scene.instances >> shift & 255), size, "stretch") for shift in (0, 8))
        objects, labels = low.astype(np.int16) | high.astype(np.int16) << 8, resize_mask(scene.mask, size, "stretch")
        pictures.append(make_picture(resize_image(scene.image, size, "stretch"), objects, labels))
    return pictures


def read_picture(source: NpyFolder, index: int) -> Picture:
    """Read photograph `index`; its objects are the connected regions of each class."""
    image, labels = source.read(index)
    objects = np.zeros(labels.shape, dtype=np.int16)
    for class_id in np.setdiff1d(labels, [IGNORE_LABEL]):
        _, pieces = cv2.connectedComponents((labels == class_id).astype(np.uint8))
        objects = np.where(pieces > 0, pieces + int(objects.max()), objects).astype(np.int16)
    return make_picture(image if image.dtype == np.uint8 else np.rint(image * 255.0).astype(np.uint8), objects, labels)


class Samples:
    """Batches of pictures. Pixels stay on the device, where batches are gathered; boxes are chosen on the host."""

    def __init__(self, pictures: list[Picture], num_prompts: int, device: torch.device) -> None:
        self.images = torch.from_numpy(np.stack([picture.image for picture in pictures])).to(device)
        self.things = torch.from_numpy(np.stack([picture.things for picture in pictures])).to(device)
        self.boxes = [picture.boxes for picture in pictures]
        self.num_prompts, self.device = num_prompts, device

    def batch(self, batch_size: int, frame: Size, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A random batch; half of the images are mirrored.

        Returns:
            images: B x 3 x H x W float32, of 0..255.
            labels: B x H x W uint8, 0..Q-1 for the chosen things, `OTHER` for the rest, IGNORE_LABEL for unlabelled.
            boxes: B x Q x 4 float32, jittered.
            valid: B x Q bool, False for prompts without a thing.
        """
        size = (self.images.shape[1], self.images.shape[2])
        chosen, of_kinds = rng.integers(len(self.boxes), size=batch_size), rng.random(batch_size) < 0.5
        ids = np.full((batch_size, self.num_prompts), -1, dtype=np.int16)
        boxes = np.zeros((batch_size, self.num_prompts, 4), dtype=np.int64)
        for i, (index, kinds) in enumerate(zip(chosen, of_kinds.astype(int))):
            known = self.boxes[index][kinds]
            picked = rng.permutation(np.array([*known], dtype=np.int16))[: self.num_prompts]
            if len(picked):
                ids[i, : len(picked)] = picked
                boxes[i, : len(picked)] = jitter_boxes(
                    np.stack([known[int(j)] for j in picked]), image_size_of(size), 20, rng
                )
        mirrored = rng.random(batch_size) < 0.5
        boxes[mirrored] = (size[1] - 1, 0, size[1] - 1, 0) + boxes[mirrored][..., [2, 1, 0, 3]] * (-1, 1, -1, 1)

        on_device = (torch.from_numpy(a).to(self.device) for a in (chosen, of_kinds, ids, boxes, mirrored))
        chosen_, of_kinds_, ids_, boxes_, mirrored_ = on_device
        images = self.images[chosen_].permute(0, 3, 1, 2).float()
        things = self.things[chosen_, of_kinds_.long()].float()
        images = torch.where(mirrored_[:, None, None, None], images.flip(3), images)
        things = torch.where(mirrored_[:, None, None], things.flip(2), things)
        if frame != size:
            images = F.interpolate(images, frame, mode="bilinear", antialias=True)
            things = F.interpolate(things[:, None], frame, mode="nearest-exact")[:, 0]
        matches = things[:, None] == ids_[:, :, None, None]  # B x Q x H x W
        labels = torch.where(matches.any(1), matches.byte().argmax(1), torch.where(things > 0, OTHER, IGNORE_LABEL))
        scale = boxes_.new_tensor([frame[1], frame[0]] * 2) / boxes_.new_tensor([size[1], size[0]] * 2)
        return images, labels.byte(), (boxes_ + 0.5) * scale - 0.5, ids_ >= 0


class BoxLosses(nn.Module):
    """A SAM with its losses, so that one call has both."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, images: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """The losses of one batch of `Samples`, B x Q each."""
        sam, (b, q) = self.sam, boxes.shape[:2]
        sparse, dense = sam.prompt_encoder(boxes=boxes.flatten(0, 1))
        low_res_masks, iou_predictions = sam.mask_decoder(
            image_embeddings=sam.image_encoder(sam.preprocess(images)),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse.unflatten(0, (b, q)),
            dense_prompt_embeddings=dense.unflatten(0, (b, q)),
            multimask_output=False,
        )
        class_ids = torch.arange(q, device=boxes.device).expand(b, q)
        # Masks have a quarter of the image's size, so every fourth pixel is enough.
        return prompt_losses(low_res_masks[:, :, 0], iou_predictions[:, :, 0], labels, class_ids, stride=4)


def mean_loss(losses: dict[str, Tensor], valid: Tensor) -> Tensor:
    """The mean loss over the valid prompts, B x Q bool; 0 if there are none."""
    total = losses["dice"] + losses["bce"] + losses["iou"]
    return (total * valid).sum() / valid.sum().clamp(min=1)


def square_side(frames: list[Size]) -> int:
    """The side of the square whose table of positions all `frames` read, as `build_sam_vit_tiny` would choose it."""
    return max(h if h == w else max(h, w, CONFIGS["vit_tiny"].image_size) for h, w in frames)


def load_sam(init: Path | None, side: int) -> Sam:
    """A `vit_tiny` in training mode, with random weights or those of the file `init`."""
    try:
        return build_sam_vit_tiny(init, image_size=side).train()
    except ValueError as error:  # a CheckpointError, or a frame that no model takes
        raise UserError(str(error)) from None


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    precision = resolve_precision(args.device, local_rank=0, local_world_size=1, use_amp=args.use_amp, amp_dtype="auto")
    source = NpyFolder(args.data) if args.data else None
    image_sizes = [source.image_size] if source else args.image_size or FRAMES
    if args.image_size not in (None, image_sizes):
        raise UserError(f"{args.data}: has image size {image_sizes[0]}; leave out --image_size")
    frames = [frame_size(size) for size in image_sizes]
    sam = load_sam(args.init, square_side(frames)).to(precision.device)
    make_folder(args.output.parent, "--output")
    if args.output.is_dir():
        raise UserError(f"{args.output}: is a folder; set --output to a file")

    optimizer = build_optimizer(sam, lr=args.lr, weight_decay=0.05)
    scheduler = build_scheduler(optimizer, "cosine", total_steps=args.num_steps, warmup_steps=args.num_steps // 20)
    training = TrainState(optimizer, scheduler, precision.grad_scaler())
    state_file = args.output.with_name(f"{args.output.name}.state")
    flags = {name: str(value) for name, value in vars(args).items() if name not in ("device", "output")}
    first, recent = resume(state_file, flags, sam, training) if exists(state_file) else (0, None)

    if source:
        indices = progress_bar(range(len(source.items)), "reading", unit="image")
        pictures = [read_picture(source, index) for index in indices]
    else:
        with progress_bar(desc="drawing", total=args.num_scenes, unit="scene") as bar:
            draw = partial(draw_pictures, size=image_sizes[0])
            pictures = run_jobs(draw, list(range(args.num_scenes)), usable_cores(), bar.update)

    started = time.monotonic()
    with telling_out_of_memory("lower --num_scenes or --batch_size"):
        samples = Samples(pictures, args.num_prompts, precision.device)
        # Of each frame, the structure alone: they compute with the weights of `sam`.
        models = [BoxLosses(build_sam_vit_tiny(image_size=frame)).to(precision.device).train() for frame in frames]
        progress = progress_bar(
            range(first, args.num_steps), desc="training", unit="step", initial=first, total=args.num_steps
        )
        for step in progress:
            model, frame = models[step % len(frames)], frames[step % len(frames)]
            batch = samples.batch(args.batch_size, frame, np.random.default_rng((SEED, step)))
            weights = fit_positions(model.sam, dict(sam.named_parameters()) | dict(sam.named_buffers()))
            with precision.autocast():
                losses = functional_call(model, {f"sam.{key}": value for key, value in weights.items()}, batch[:3])
            loss = mean_loss(losses, batch[3])
            optimizer.zero_grad()
            training.scaler.scale(loss).backward()
            training.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
            training.scaler.step(optimizer)
            training.scaler.update()
            scheduler.step()
            recent = loss.detach() if recent is None else recent.lerp(loss.detach(), 0.02)
            if (step + 1) % 20 == 0:  # reading it waits for the device
                progress.set_postfix(loss=f"{recent.item():.4f}")
            if (step + 1) % SAVE_EVERY == 0:
                save_state(state_file, flags, sam, training, step + 1, recent)

    with atomic_write(args.output) as file:
        torch.save({key: value.half().cpu() for key, value in sam.state_dict().items()}, file)
    state_file.unlink(missing_ok=True)
    minutes = (time.monotonic() - started) / 60
    print(f"{args.output}: {args.num_steps} steps in {minutes:.0f} minutes, loss {recent:.4f}")


def save_state(
    path: Path, flags: dict[str, str], sam: Sam, training: TrainState, next_step: int, recent: Tensor
) -> None:
    state = {"flags": flags, "next_step": next_step, "recent": recent, "sam": sam.state_dict()}
    with atomic_write(path) as file:
        torch.save({**state, "training": training.state_dict()}, file)


def resume(path: Path, flags: dict[str, str], sam: Sam, training: TrainState) -> tuple[int, Tensor]:
    """Load the state of a stopped run. Returns the next step and the running mean of the loss."""
    advice = "resume with the flags of the stopped run, or delete the file to start anew"
    try:
        state: Any = load_plain(path)
        for name, value in flags.items():
            if (saved := state["flags"].get(name)) != value:
                raise UserError(f"{path}: was saved with --{name} {saved}; {advice}")
        sam.load_state_dict(state["sam"])
        training.load_state_dict(state["training"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not the state of a stopped run of this version; {advice}") from None
    return state["next_step"], state["recent"].to(sam.device)


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
