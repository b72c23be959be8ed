"""What each part of the two prompt modes is worth: the rows of docs/RESULTS.md, one row a run.

    python -m benchmarks.semantic --data data/camvid_npy --sam_checkpoint work_dir/SAM/sam_vit_tiny_camvid.pth \\
        --row default probe --seed 0 1 2

A row is the product's own decoder, loss, augmentation and optimizer with one thing changed. As the encoder is frozen,
each view of an image is encoded once, and all rows and seeds train on these features in memory; `everything` alone runs
the encoder in each step. The last epoch is scored on the split `val`, in the frame; in semantic mode also with `--tta`.
Each row and seed gives one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything import build_sam_vit_tiny
from segment_anything.modeling import Sam
from segment_anything.modeling.common import upscaled_masks
from utils.data.augment import fixed_view
from utils.data.boxes import class_boxes, jitter_boxes
from utils.data.classes import BDD100K
from utils.data.datasets import NpyFolder, Sample, TrainingBatch, box_prompts, collate_training
from utils.data.frame import image_size_of
from utils.evaluate.metrics import ConfusionMatrix, iou_per_class, mean_iou
from utils.model.feature_pca import FIT_IMAGES, FeaturePCA
from utils.model.losses import COMPETING_WEIGHT, semantic_losses
from utils.model.prediction import Prediction, average_mirrored
from utils.model.segmenter import BoxSegmenter, Features, Segmenter, SemanticSegmenter
from utils.runtime import cli
from utils.runtime.choices import AUGMENTATIONS
from utils.runtime.errors import UserError
from utils.runtime.progress import progress_bar
from utils.train.optim import build_scheduler

BBOX_SHIFT = 20  # of a frame of 1024 pixels

# --- The rows: how each differs from `SemanticSegmenter` as it is.


class LinearProbe(SemanticSegmenter):
    """One 1 x 1 convolution on the frozen embedding: what of the classes can be read off it."""

    def __init__(self, sam: Sam) -> None:
        dim = sam.prompt_encoder.embed_dim
        super().__init__(sam, feature_blocks=[], pixel_channels=0)
        sam.mask_decoder = nn.Conv2d(dim, len(BDD100K), kernel_size=1)  # type: ignore[assignment]

    def forward(self, features: Features) -> tuple[Tensor]:
        probe: Any = self.mask_decoder
        return (probe(features[0]),)


class PlainProbe(LinearProbe):
    """The probe as probes are trained elsewhere: by cross-entropy alone."""

    def losses(self, outputs: tuple[Tensor, ...], batch: TrainingBatch) -> dict[str, Tensor]:
        return {"ce": super().losses(outputs, batch)["ce"]}


class PlainTokens(SemanticSegmenter):
    """SAM's decoder with a token and a hypernetwork for each class, and nothing else added."""

    def __init__(self, sam: Sam) -> None:
        super().__init__(sam, feature_blocks=[], pixel_channels=0)
        decoder: Any = self.mask_decoder
        for name in ("stem", "detail_upscaling", "feature_norms"):
            delattr(decoder, name)
        _keep_outputs(decoder.output_hypernetworks, decoder.output_upscaling[-2].out_channels)

    def forward(self, features: Features) -> tuple[Tensor]:
        decoder: Any = self.mask_decoder
        x = features[0] + decoder.no_mask_embedding
        tokens, image_tokens = decoder.transformer(x, self.image_pe, decoder.mask_tokens.expand(len(x), -1, -1))
        upscalings = [(decoder.output_upscaling, image_tokens)]
        return (upscaled_masks(decoder.output_hypernetworks(tokens), upscalings, (x.shape[2], x.shape[3])),)


def _keep_outputs(mlps: Any, count: int) -> None:
    """Keep the first outputs of the hypernetworks alone."""
    for parameters in (mlps.weights, mlps.biases):
        parameters[-1] = nn.Parameter(parameters[-1].detach()[..., :count].clone())


class _NoChannels(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps[:, :0]


class StrideOfFour(SemanticSegmenter):
    """Logits of stride 4, brought to stride 2 by interpolation alone."""

    def __init__(self, sam: Sam) -> None:
        super().__init__(sam)
        decoder: Any = self.mask_decoder
        _keep_outputs(decoder.output_hypernetworks, decoder.detail_path.upscaling_4.in_channels)
        decoder.detail_path.join_2 = _NoChannels()


class PixelsAlone(SemanticSegmenter):
    """The encoder's features are set to zero: what the path from the pixels makes of the classes by itself."""

    def forward(self, features: Features) -> tuple[Tensor]:
        *encoded, pixels = features
        return super().forward((*(torch.zeros_like(feature) for feature in encoded), pixels))


class CoarseLoss(SemanticSegmenter):
    """The loss at every fourth pixel, on logits of that resolution."""

    def losses(self, outputs: tuple[Tensor, ...], batch: TrainingBatch) -> dict[str, Tensor]:
        return semantic_losses(F.avg_pool2d(outputs[0].float(), 2), batch["labels"], self.class_weights, stride=4)


class FineLoss(SemanticSegmenter):
    """The loss at every pixel."""

    def losses(self, outputs: tuple[Tensor, ...], batch: TrainingBatch) -> dict[str, Tensor]:
        return semantic_losses(outputs[0], batch["labels"], self.class_weights, stride=1)


def competing(weight: float) -> Callable[[Sam], BoxSegmenter]:
    """The boxed mode with another weight of the cross-entropy in which the classes of an image compete."""

    class Weighted(BoxSegmenter):
        def losses(self, outputs: tuple[Tensor, ...], batch: TrainingBatch) -> dict[str, Tensor]:
            parts = super().losses(outputs, batch)
            return {**parts, "ce": parts["ce"] * (weight / COMPETING_WEIGHT)}

    return Weighted


def with_blocks(indexes: list[int] | None) -> Callable[[Sam], SemanticSegmenter]:
    """Other encoder blocks joined in; None for all of them."""
    return lambda sam: SemanticSegmenter(
        sam, feature_blocks=list(range(len(sam.image_encoder.blocks))) if indexes is None else indexes
    )


def with_pixels(channels: int) -> Callable[[Sam], SemanticSegmenter]:
    """Another number of channels of the path from the pixels; 0 for none."""
    return lambda sam: SemanticSegmenter(sam, pixel_channels=channels)


def alike(sam: Sam) -> SemanticSegmenter:
    """Every class starts as SAM's token, without noise."""
    token = sam.mask_decoder.mask_tokens.weight.detach()[:1].clone()
    segmenter = SemanticSegmenter(sam)
    decoder: Any = segmenter.mask_decoder
    decoder.mask_tokens.data.copy_(token.expand(len(BDD100K), -1))
    return segmenter


def from_nothing(sam: Sam) -> SemanticSegmenter:
    """Tokens and hypernetworks start random, as if SAM had none."""
    segmenter = SemanticSegmenter(sam)
    decoder: Any = segmenter.mask_decoder
    nn.init.normal_(decoder.mask_tokens)
    mlps = decoder.output_hypernetworks
    for weight, bias in zip(mlps.weights, mlps.biases):
        bound = weight.shape[1] ** -0.5  # as nn.Linear starts
        nn.init.uniform_(weight, -bound, bound)
        nn.init.uniform_(bias, -bound, bound)
    return segmenter


@dataclass(frozen=True)
class Row:
    change: str
    build: Callable[[Sam], Segmenter] = SemanticSegmenter
    lr: float = 2e-3
    num_views: int = AUGMENTATIONS["full"]  # of each image; see `utils.data.augment.fixed_view`
    balanced: bool = True
    encoder_lr: float = 0  # above 0, the encoder is trained too
    reduced: bool = False  # features to train on as a cache has them
    classes: int | None = None  # random classes of an image in the boxed mode, None for all that occur


box_row = partial(Row, build=BoxSegmenter, num_views=1, lr=1e-3)

ROWS = {
    "default": Row("as train_bdd100k.py --prompt_mode semantic trains it"),
    "probe": Row("baseline: a linear probe on the frozen embedding", LinearProbe, lr=1e-2),
    "plain-probe": Row("baseline: the probe by unweighted cross-entropy alone", PlainProbe, lr=1e-2, balanced=False),
    "box": box_row("as train_bdd100k.py trains with boxes; scored with oracle boxes"),
    "box-1-class": box_row("one random class of an image", classes=1),
    "box-2-classes": box_row("two random classes of an image, which compete", classes=2),
    "box-4-classes": box_row("four random classes of an image, which compete", classes=4),
    "box-alone": box_row("all classes of an image, none of which compete", build=competing(0)),
    "box-weight-1": box_row("the competing cross-entropy with weight 1", build=competing(1)),
    "box-weight-8": box_row("the competing cross-entropy with weight 8", build=competing(8)),
    "box-unbalanced": box_row("no class weights in the competing cross-entropy", balanced=False),
    "box-flip": box_row("images and mirror images", num_views=2),
    "no-pixels": Row("no path from the pixels, as earlier decoders", with_pixels(0), lr=1e-3),
    "pixels-alone": Row("control: the path from the pixels without the encoder's features", PixelsAlone),
    "stride-4": Row("logits of stride 4, not 2", StrideOfFour),
    "8-pixel-channels": Row("half as many channels of pixels", with_pixels(8)),
    "32-pixel-channels": Row("twice as many channels of pixels", with_pixels(32)),
    "everything": Row("ceiling: the encoder is trained too, end to end", encoder_lr=3e-4),
    "everything-no-pixels": Row("the same without the path from the pixels", with_pixels(0), lr=1e-3, encoder_lr=3e-4),
    "cached": Row("trained on features as a cache has them: reduced to 4 MiB an image of vit_b", reduced=True),
    "plain-tokens": Row("no stem, no encoder blocks, no detail channels, no pixels", PlainTokens, lr=1e-3),
    "no-blocks": Row("the stem sees the embedding alone", with_blocks([])),
    "last-block": Row("one block joined in: the last", with_blocks([7])),
    "first-two-blocks": Row("two blocks joined in: the first two with global attention", with_blocks([1, 3])),
    "all-blocks": Row("all eight blocks joined in", with_blocks(None)),
    "shallow-stem": Row("a stem without residual blocks", lambda sam: SemanticSegmenter(sam, stem_blocks=0)),
    "deep-stem": Row("a stem of six residual blocks", lambda sam: SemanticSegmenter(sam, stem_blocks=6)),
    "alike": Row("tokens start as SAM's, without noise", alike),
    "from-nothing": Row("tokens and hypernetworks start random", from_nothing),
    "unbalanced": Row("no class weights", balanced=False),
    "flip": Row("images and mirror images alone", num_views=2),
    "no-augment": Row("images alone", num_views=1),
    "more-views": Row("twice as many views", num_views=2 * AUGMENTATIONS["full"]),
    "lr-1e-3": Row("learning rate 1e-3", lr=1e-3),
    "lr-4e-3": Row("learning rate 4e-3", lr=4e-3),
    "no-pixels-lr-2e-3": Row("no path from the pixels, learning rate 2e-3", with_pixels(0)),
    "coarse-loss": Row("the loss at every fourth pixel", CoarseLoss),
    "fine-loss": Row("the loss at every pixel", FineLoss),
}


# --- Training on features in memory.


@dataclass(frozen=True)
class Split:
    """N images in V views each, as [view * N + image]; features in float16."""

    images: Tensor  # VN x 3 x H x W uint8
    labels: Tensor  # VN x H x W uint8
    features: list[Tensor]  # VN x C x H x W each: image_embeddings, and the outputs of
    blocks: list[int]
    num_images: int

    def batch(self, indexes: Tensor, segmenter: Segmenter) -> Features:
        """What `segmenter` takes of some images."""
        maps = [0, *(1 + self.blocks.index(block) for block in segmenter.feature_blocks)]
        features = tuple(self.features[i][indexes].float() for i in maps)
        return segmenter.inputs(self.images[indexes], features)


def autocast(use_amp: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=use_amp)


def load_split(source: NpyFolder, sam: Sam, blocks: list[int], num_views: int, use_amp: bool) -> Split:
    images, labels = [], []
    for view in range(num_views):
        for i, item in enumerate(source.items):
            image, label = source.read(i)
            if image.dtype != np.uint8:
                raise UserError(f"{source.folder}: preprocess with --image_dtype uint8 for this benchmark")
            seen, size = fixed_view(item.name, view), source.fitted_size(i)
            images.append(seen.image(image, size).permute(2, 0, 1))
            labels.append(torch.from_numpy(seen.labels(label, size)))
    stacked = torch.stack(images)
    features = encode(stacked, sam, blocks, use_amp, desc=f"encoding {source.folder.name}")
    return Split(stacked, torch.stack(labels), features, blocks, len(source.items))


@torch.no_grad()
def encode(images: Tensor, sam: Sam, blocks: list[int], use_amp: bool, desc: str) -> list[Tensor]:
    pieces = []
    for some in progress_bar(images.split(8), desc, unit="batch", leave=False):
        with autocast(use_amp):
            embeddings, features = sam.image_encoder.forward_features(sam.preprocess(some.float()), blocks)
        pieces.append([feature.half() for feature in (embeddings, *features)])
    return [torch.cat(feature) for feature in zip(*pieces)]


@torch.no_grad()
def reduced(split: Split) -> Split:
    """The split with its features as they come out of a cache."""

    def features_of(images: slice) -> list[Tensor]:
        return [feature[images].float() for feature in split.features]

    apart = max(1, split.num_images // FIT_IMAGES)
    reduction = FeaturePCA.fit([features_of(slice(0, split.num_images, apart))])
    pieces = []
    for start in range(0, len(split.labels), 8):
        stored = reduction.reduce(features_of(slice(start, start + 8)))
        pieces.append([feature.half() for feature in reduction.expand(stored)])
    return replace(split, features=[torch.cat(feature) for feature in zip(*pieces)])


def random_boxes(labels: Tensor, classes: int | None, rng: np.random.Generator) -> TrainingBatch:
    """Jittered boxes of the classes of each image, as `BoxPromptDataset` and `collate_training` make them."""
    samples: list[Sample] = []
    for label in labels.numpy():
        class_ids, boxes = class_boxes(label, len(BDD100K))
        chosen = rng.permutation(len(class_ids))[:classes]
        shift = BBOX_SHIFT * max(label.shape) // 1024
        boxes = jitter_boxes(boxes[chosen], image_size_of(label.shape), shift, rng).astype(np.float32)
        valid = torch.ones(len(chosen), dtype=torch.bool)
        samples.append({**box_prompts(class_ids[chosen], boxes), "valid": valid})
    return collate_training(samples)


def train(
    segmenter: Segmenter, data: Split, row: Row, *, epochs: int, batch_size: int, seed: int, use_amp: bool
) -> float:
    """Train; returns the mean loss of the last epoch."""
    rng = np.random.default_rng(seed)
    steps_per_epoch = -(-data.num_images // batch_size)
    groups: list[dict[str, Any]] = [{"params": list(segmenter.mask_decoder.parameters()), "lr": row.lr}]
    if row.encoder_lr:
        segmenter.sam.image_encoder.requires_grad_(True)
        groups.append({"params": list(segmenter.sam.image_encoder.parameters()), "lr": row.encoder_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    total = steps_per_epoch * epochs
    scheduler = build_scheduler(optimizer, "cosine", total_steps=total, warmup_steps=steps_per_epoch)
    parameters = [p for group in groups for p in group["params"]]
    segmenter.train()
    mean = 0.0
    progress = progress_bar(range(epochs), row.change, unit="epoch")
    for _ in progress:
        losses = []
        for chosen in torch.from_numpy(rng.permutation(data.num_images)).split(batch_size):
            view = torch.from_numpy(rng.integers(row.num_views, size=len(chosen)))
            indexes = view * data.num_images + chosen
            batch: TrainingBatch = {
                "labels": data.labels[indexes],
                "valid": torch.ones(len(chosen), dtype=torch.bool),
            }
            if isinstance(segmenter, BoxSegmenter):
                batch |= random_boxes(batch["labels"], row.classes, rng)
            if row.encoder_lr:
                images = data.images[indexes]
                with autocast(use_amp):
                    encoded = segmenter._encode(segmenter.sam.preprocess(images.float()))
                features = segmenter.inputs(images, encoded)
            else:
                features = data.batch(indexes, segmenter)
            with autocast(use_amp):
                outputs = segmenter(features, *(batch[key] for key in segmenter.PROMPTS))
            parts = segmenter.losses(outputs, batch)
            loss = (torch.stack(list(parts.values())).sum(dim=0) * batch["valid"]).sum() / batch["valid"].sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        mean = float(np.mean(losses))
        progress.set_postfix(loss=f"{mean:.4f}")
    return mean


@torch.no_grad()
def score(segmenter: Segmenter, data: Split, use_amp: bool) -> tuple[Tensor, Tensor]:
    """The confusion matrix over a split of two views, the images and their mirror images; and a second one.

    In box mode both are with oracle boxes, and the second is by the rule "threshold". In semantic mode the second is
    with `--tta`.
    """
    segmenter.eval()
    confusion, second = ConfusionMatrix(len(BDD100K)), ConfusionMatrix(len(BDD100K))

    def masks_of(index: int, *prompts: Tensor) -> Tensor:
        features = data.batch(torch.tensor([index]), segmenter)
        with autocast(use_amp):
            return segmenter(features, *prompts)[0][0].float()

    for i, label in enumerate(data.labels[: data.num_images]):
        height, width = label.shape
        if segmenter.PROMPTS:
            class_ids, boxes = (torch.from_numpy(array) for array in class_boxes(label.numpy(), len(BDD100K)))
            masks = masks_of(i, boxes.float()[None])
            predictions = [
                Prediction(masks, class_ids, boxes),
                Prediction(masks, class_ids, threshold=Sam.mask_threshold),
            ]
        else:
            masks, of_mirrored = masks_of(i), masks_of(data.num_images + i)
            both = (masks, average_mirrored(masks, of_mirrored, width, (height, width)))
            predictions = [Prediction(each, torch.arange(len(BDD100K))) for each in both]
        for matrix, prediction in zip((confusion, second), predictions):
            matrix.update(prediction.label_map(label.shape), label)
    return confusion.matrix, second.matrix


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    flag = parser.add_flag
    flag("data", type=Path, required=True, help="output of pre_bdd100k.py with train and val, as uint8")
    flag("sam_checkpoint", type=Path, required=True, help="a vit_tiny SAM")
    rows = "; ".join(f"{name}: {row.change}" for name, row in ROWS.items())
    flag("row", choices=list(ROWS), nargs="+", default=["default"], help=rows)
    flag("epochs", type=cli.non_negative_int, default=30, help="passes over the data")
    flag("batch_size", type=cli.positive_int, default=8, help="images a step")
    parser.add_switch("use_amp", help="compute in bf16, two to three times as fast on some CPUs")
    flag("seed", type=cli.non_negative_int, nargs="+", default=[0], help="of weights and order")
    return parser


def main(args: argparse.Namespace) -> None:
    sources = {name: NpyFolder(args.data / name) for name in ("train", "val")}
    for source in sources.values():  # the rows have BDD100K's classes, whatever the data's are
        source.use_classes(BDD100K, match=True)

    def build_sam() -> Sam:
        try:
            return build_sam_vit_tiny(args.sam_checkpoint, image_size=sources["train"].frame_size)
        except ValueError as error:  # a CheckpointError, or a frame that no model takes
            raise UserError(str(error)) from None

    blocks = sorted({block for name in args.row for block in ROWS[name].build(build_sam()).feature_blocks})
    views = {"train": max(ROWS[name].num_views for name in args.row), "val": 2}
    splits = {
        name: load_split(source, build_sam(), blocks, views[name], args.use_amp) for name, source in sources.items()
    }
    pixels = sources["train"].class_pixels()
    for seed, name in product(args.seed, args.row):
        torch.manual_seed(seed)
        segmenter = ROWS[name].build(build_sam())
        result = measure(segmenter, ROWS[name], splits, pixels, args.epochs, args.batch_size, seed, args.use_amp)
        about = {"data": args.data.name, "threads": torch.get_num_threads(), "use_amp": args.use_amp}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        print(json.dumps({"row": name, **result, **about, "versions": versions}), flush=True)


def measure(
    segmenter: Segmenter,
    row: Row,
    splits: dict[str, Split],
    pixels: Tensor,
    epochs: int,
    batch_size: int,
    seed: int,
    use_amp: bool,
) -> dict[str, Any]:
    """Train and score one row with one seed."""
    if row.balanced:
        segmenter.balance_classes(pixels)
    started = time.monotonic()
    data = reduced(splits["train"]) if row.reduced else splits["train"]
    loss = train(segmenter, data, row, epochs=epochs, batch_size=batch_size, seed=seed, use_amp=use_amp)
    seconds = time.monotonic() - started
    val = splits["val"]
    if row.encoder_lr:
        val = replace(val, features=encode(val.images, segmenter.sam, val.blocks, use_amp, desc="encoding anew"))
    matrix, second = score(segmenter, val, use_amp)
    return {
        "change": row.change,
        "seed": seed,
        "epochs": epochs,
        "miou": round(mean_iou(matrix), 4),
        "miou_by_threshold" if segmenter.PROMPTS else "miou_with_tta": round(mean_iou(second), 4),
        "train_loss": round(loss, 4),
        "trained_parameters": sum(p.numel() for p in segmenter.parameters() if p.requires_grad),
        "seconds": round(seconds),
        "iou": [None if iou != iou else round(iou, 4) for iou in iou_per_class(matrix).tolist()],
    }


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
