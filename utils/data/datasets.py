"""Data sets over the npy folders that `pre_bdd100k.py` writes, and the order in which training goes through them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from utils.data.augment import View, draw_view, fixed_view
from utils.data.bdd100k import check_first_masks, match_key, read_mask, read_size
from utils.data.boxes import class_boxes, jitter_boxes, to_frame
from utils.data.classes import IGNORE_LABEL, ClassTable
from utils.data.description import Labels
from utils.data.finding import find_split
from utils.data.frame import ImageSize, frame_size
from utils.data.geometry import fitted_size, resize_image
from utils.data.manifest import ManifestItem, read_manifest
from utils.runtime import distributed
from utils.runtime.choices import AUGMENTATIONS
from utils.runtime.errors import UserError, printable, warn
from utils.runtime.files import check_npy, load_npy

PADDING = {"class_ids": IGNORE_LABEL, "boxes": 0, "valid": False}  # of the prompts of a batch
FILLER = -1  # an index that stands for no image; see `TrainingSampler`


class Sample(TypedDict, total=False):
    """One image of a data set. The entries depend on the data set and the mode."""

    image: Tensor  # H x W x 3 as stored
    features: tuple[Tensor, ...]  # as a cache stores them
    labels: Tensor  # H x W uint8
    name: str
    valid: Tensor  # bool, K in box mode, else a single one: what the loss counts
    class_ids: Tensor  # K int64
    boxes: Tensor  # K x 4 float32, xyxy in pixels of the frame
    mirror_width: int  # of the picture in its frame, to average with the mirror image


class ImageBatch(TypedDict, total=False):
    """Images, or features from a cache in their place, or both for a model that takes pixels."""

    image: Tensor  # B x H x W x 3
    features: Sequence[Tensor]  # B x ... each


class TrainingBatch(ImageBatch, total=False):
    """A batch whose entries are all stacked; prompts are padded to Q."""

    labels: Tensor  # B x H x W uint8
    name: list[str]
    valid: Tensor  # B x Q bool in box mode, else B
    class_ids: Tensor  # B x Q int64
    boxes: Tensor  # B x Q x 4 float32


class EvaluationBatch(ImageBatch, total=False):
    """A batch whose prompts stay lists, as images differ in their number."""

    labels: Tensor  # B x H x W uint8
    name: list[str]
    class_ids: list[Tensor]  # B times K int64
    boxes: list[Tensor]  # B times K x 4 float32
    mirror_width: list[int]


class NpyFolder:
    """A preprocessed, labelled split with all its files checked."""

    def __init__(self, folder: Path) -> None:
        """Check every file of the split, without reading the arrays.

        Raises:
            UserError: preprocessing did not finish, the split has no labels, or a file is missing, damaged or of
                another shape.
        """
        manifest = read_manifest(folder)
        if not (manifest.labelled and manifest.items):
            what = "manifest.json lists no image" if manifest.labelled else "this split has no labels (gts/)"
            raise UserError(
                f"{folder}: {what}; give one that has, such as train or val; for pictures without labels, use "
                "infer_bdd100k.py --images"
            )
        self.folder = folder
        self.image_size = manifest.image_size
        self.resize_mode = manifest.resize_mode
        self.items = self._items = manifest.items
        self.classes = self._file_classes = manifest.classes
        self._new_ids: np.ndarray | None = None  # of the files' labels; None if they stay
        self._sources = manifest.sources or {}
        self._manifest = manifest
        self._mask_labels: Labels | None = None  # of `original_masks`; None for BDD100K's
        self.frame_size = frame = frame_size(manifest.image_size)
        self._form = {"imgs": ((*frame, 3), manifest.image_dtype), "gts": (frame, "uint8")}
        for item in self.items:
            for kind, (shape, dtype) in self._form.items():
                check_npy(self._path(kind, item.name), shape, dtype)

    def use_classes(self, classes: ClassTable, *, match: bool = False) -> None:
        """Give labels and pixel counts in the ids of another table. The files and `digest` stay.

        Args:
            classes: of a model, or a selection of the files' classes.
            match: see `ClassTable.ids_of`.

        Raises:
            UserError: the tables do not belong together, or some ids change and no pixel is of the new classes.
        """
        try:
            new_ids = classes.ids_of(self._file_classes, match=match)
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from None
        self.classes, self.items, self._new_ids = classes, self._items, None
        num_file_classes = len(self._file_classes)
        if len(classes) == num_file_classes and (new_ids[:num_file_classes] == np.arange(num_file_classes)).all():
            return
        self.items = [_relabelled(item, new_ids, len(classes)) for item in self._items]
        self._new_ids = new_ids
        if not any(any(item.pixels) for item in self.items):
            raise UserError(f"{self.folder}: no labelled pixel of the classes {', '.join(classes.names)}")

    def pictures(self) -> dict[str, Path]:
        """The file of each image by name, as preprocessing found it.

        Raises:
            UserError: an earlier version wrote the split and did not record the files.
        """
        if missing := next((item.name for item in self.items if not self._sources.get(item.name)), None):
            raise UserError(
                f"{self.folder}: was written by an earlier version, which did not record the file of {missing}; run "
                "pre_bdd100k.py again with --overwrite"
            )
        return {item.name: Path(str(self._sources[item.name][0][0])) for item in self.items}

    def original_masks(self, root: Path) -> dict[str, Path]:
        """The original mask of each image by name, found in the unpacked data set `root`.

        Raises:
            UserError: one is missing, or has another size than preprocessing recorded.
        """
        split = find_split(root, self.folder.resolve().name, self._manifest.description)
        self._mask_labels = split.labels
        for note in split.notes:
            distributed.say(printable(note))
        if (doubt := check_first_masks(split)) and distributed.is_main():
            warn(doubt)
        found = {match_key(item.name): item.mask for item in split.items if item.mask}
        masks = {}
        for item in self.items:
            mask = found.get(match_key(item.name))
            if mask is None or read_size(mask) != (item.height, item.width):
                wrong = f"{mask}: is not {item.width}x{item.height}" if mask else f"{root}: lacks {item.name}.png"
                raise UserError(f"{wrong}; give the folder from which {self.folder} was written")
            masks[item.name] = mask
        return masks

    def read_original_mask(self, path: Path, height: int, width: int) -> np.ndarray:
        """Read a mask of `original_masks`, (height, width) uint8 ids of `classes`; raises as `read_mask`."""
        return self.relabel(read_mask(path, height, width, self._mask_labels))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The image and its labels, as `read_image` and `read_labels`."""
        return self.read_image(index), self.read_labels(index)

    def read_image(self, index: int) -> np.ndarray:
        """Read an image, H x W x 3 of the stored dtype. Raises `UserError` if the file is no longer as checked."""
        return self._load("imgs", index)

    def read_labels(self, index: int) -> np.ndarray:
        """Read labels, H x W uint8 ids of `classes` and 255.

        Raises:
            UserError: as `read_image`, or the file holds another value than ids of its classes and 255.
        """
        labels = self._load("gts", index)
        num_classes = len(self._file_classes)
        foreign = labels[(labels >= num_classes) & (labels != IGNORE_LABEL)]
        if foreign.size:  # it would be an index out of bounds, in a loss or on a GPU
            path = self._path("gts", self.items[index].name)
            raise UserError(
                f"{path}: labels must be 0-{num_classes - 1} or {IGNORE_LABEL}, got "
                f"{np.unique(foreign)[:8].tolist()}; run pre_bdd100k.py again with --overwrite"
            )
        return self.relabel(labels)

    def relabel(self, labels: np.ndarray) -> np.ndarray:
        """Ids of the files' classes -> ids of `classes`, both (H, W) uint8."""
        return labels if self._new_ids is None else cv2.LUT(labels, self._new_ids)

    def _load(self, kind: str, index: int) -> np.ndarray:
        return load_npy(self._path(kind, self.items[index].name), *self._form[kind])

    def image_path(self, index: int) -> Path:
        return self._path("imgs", self.items[index].name)

    def fitted_size(self, index: int) -> tuple[int, int]:
        """The (height, width) of the picture in its frame."""
        item = self.items[index]
        return fitted_size(item.height, item.width, self.image_size, self.resize_mode)

    def class_pixels(self) -> Tensor:
        """Labelled pixels of each class in the whole split, (len(classes),) int64."""
        return torch.tensor([item.pixels for item in self.items]).sum(dim=0)

    @property
    def digest(self) -> str:
        """A hash of the split's frame, names, sizes and label counts. It does not depend on where its files are."""
        what = [self.image_size, self.resize_mode, [asdict(item) for item in self._items]]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.npy"


def _relabelled(item: ManifestItem, new_ids: np.ndarray, num_classes: int) -> ManifestItem:
    """The item with its pixels counted by new ids."""
    pixels = np.zeros(256, dtype=np.int64)
    np.add.at(pixels, new_ids[: len(item.pixels)], item.pixels)
    ignored = item.ignored + int(pixels[IGNORE_LABEL])
    return replace(item, pixels=pixels[:num_classes].tolist(), ignored=ignored)


class FeatureCache(Protocol):
    """The frozen encoder's features of each image of a split (`utils.cache.reader.EmbeddingCache`)."""

    def read(self, index: int, view: int = 0) -> tuple[Tensor, ...]: ...


class CachedDataset(Dataset[Sample]):
    """A data set whose samples have images, features from a cache, or both."""

    cache: FeatureCache | None = None
    has_images = True

    def use(self, cache: FeatureCache | None, *, takes_pixels: bool) -> None:
        """Put features into the samples, and images only for a model that takes pixels; None for images alone."""
        self.cache, self.has_images = cache, cache is None or takes_pixels


Found = tuple[np.ndarray, ...]  # what a mode's prompts are drawn from; it depends on the labels of a view alone


class TrainingDataset(CachedDataset):
    """The labelled images of a split, each in a view (`utils.data.augment`) that changes from epoch to epoch.

    A sample's randomness depends on seed, epoch and index alone, so that any number of workers and processes draws the
    same.
    """

    def __init__(self, source: NpyFolder, *, seed: int, augment: str, num_views: int) -> None:
        """Select the images that have a labelled pixel.

        Args:
            augment: "none"; "flip" for the image or its mirror image; "full" for random views.
            num_views: fixed views of each image to choose from. With "full" and no cache, every view is new.

        Raises:
            UserError: no image has a labelled pixel.
        """
        self.source = source
        self.seed = seed
        self.augment = augment
        self.num_views = num_views
        self.epoch = 0
        self.indices = [i for i, item in enumerate(source.items) if any(item.pixels)]
        if not self.indices:
            raise UserError(f"{source.folder}: no image has a labelled pixel; check the masks given to pre_bdd100k.py")
        if augment == "full":
            import torchvision.transforms.v2  # noqa: F401  once here, not for seconds in each worker process

    def __len__(self) -> int:
        return len(self.indices)

    def num_prompts(self) -> list[int]:
        """The number of prompts of each image as stored; 1 for images without prompts."""
        return [1] * len(self)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch to draw for, before the loader starts its next pass."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Sample:
        """A sample with "labels", "valid" (False for `FILLER`), "name", "image" or "features", and its prompts."""
        source_index = self.indices[max(index, 0)]
        rng = self.rng(index)
        name = self.source.items[source_index].name
        if self.augment == "full" and not self.cache:
            number, view = 0, draw_view(rng)
        else:
            number = self.draw_number(rng)
            view = fixed_view(name, number)
        sample = self.read_view(source_index, number, view)
        prompts = self.draw_prompts(self.find(sample["labels"].numpy()), rng)
        valid = torch.from_numpy(prompts["valid"]) & (index != FILLER)
        drawn = {key: torch.from_numpy(value) for key, value in prompts.items()}
        return {**drawn, "valid": valid, **sample, "name": name}  # type: ignore[typeddict-item]

    def read_view(self, source_index: int, number: int, view: View) -> Sample:
        """Read a view of an image, without its prompts.

        Args:
            source_index: of the image in `source`.
            number: of the view in the cache.
        """
        size = self.source.fitted_size(source_index)
        sample: Sample = {"labels": torch.from_numpy(view.labels(self.source.read_labels(source_index), size))}
        if self.cache:
            sample["features"] = self.cache.read(source_index, number)
        if self.has_images:
            sample["image"] = view.image(self.source.read_image(source_index), size)
        return sample

    def rng(self, index: int) -> np.random.Generator:
        """The randomness of a sample in this epoch. Its first draw is the view, and then come the prompts."""
        return np.random.default_rng((self.seed, self.epoch, max(index, 0)))

    def draw_number(self, rng: np.random.Generator) -> int:
        """The number of a fixed view."""
        return int(rng.integers(self.num_views)) if self.num_views > 1 else 0

    def find(self, labels: np.ndarray) -> Found:
        """What the prompts of a view are drawn from."""
        raise NotImplementedError

    def draw_prompts(self, found: Found, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The prompts of a view, as in `Sample`, and "valid": which of them count."""
        raise NotImplementedError


# 修改点 1: BDD100K 数据集类，以图中各类别（全部或随机若干个）的外接框为提示，框带随机抖动
class BoxPromptDataset(TrainingDataset):
    """Images prompted with the tight, jittered boxes of the classes that occur, all or some of them."""

    def __init__(
        self,
        source: NpyFolder,
        *,
        classes_per_image: int | None,
        bbox_shift: int,
        seed: int,
        augment: str = "none",
        num_views: int = 1,
    ) -> None:
        """Set up the prompts; the other arguments are those of `TrainingDataset`.

        Args:
            classes_per_image: the most classes of an image, drawn at random; None for all that occur.
            bbox_shift: the most that a box's side may move, in pixels of the frame.
        """
        super().__init__(source, seed=seed, augment=augment, num_views=num_views)
        self.classes_per_image = classes_per_image
        self.bbox_shift = bbox_shift

    def num_prompts(self) -> list[int]:
        counts = [sum(pixels > 0 for pixels in self.source.items[i].pixels) for i in self.indices]
        return [min(count, self.classes_per_image or count) for count in counts]

    def find(self, labels: np.ndarray) -> Found:
        """The classes of a view, K int64, and their tight boxes, K x 4 int64."""
        return class_boxes(labels, len(self.source.classes))

    def draw_prompts(self, found: Found, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Choose classes and jitter their boxes."""
        class_ids, boxes = found
        if self.classes_per_image is not None:
            count = min(self.classes_per_image, len(class_ids))
            chosen = rng.choice(len(class_ids), size=count, replace=False)
            class_ids, boxes = class_ids[chosen], boxes[chosen]
        boxes = jitter_boxes(boxes, self.source.image_size, self.bbox_shift, rng).astype(np.float32)
        return {"class_ids": class_ids, "boxes": boxes, "valid": np.ones(len(class_ids), np.bool_)}


class SemanticDataset(TrainingDataset):
    """Images and their labels, without prompts; by default half of them are mirrored."""

    def __init__(self, source: NpyFolder, *, seed: int, augment: str = "flip", num_views: int = 2) -> None:
        super().__init__(source, seed=seed, augment=augment, num_views=num_views)

    def find(self, labels: np.ndarray) -> Found:
        """Whether a view has a labelled pixel, as a crop may have none."""
        return (np.asarray((labels != IGNORE_LABEL).any()),)

    def draw_prompts(self, found: Found, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """No prompts."""
        return {"valid": found[0]}


BoxesByName = Mapping[str, tuple[np.ndarray, np.ndarray]]  # class ids, (K,), and boxes, (K, 4), of the original image


class EvaluationDataset(CachedDataset):
    """Every image of a split, with its labels, its name, and its boxes if there are any.

    `boxes` is "oracle" for the ground truth's tight box of every class in the image, None for no boxes, or a detector's
    boxes by image name. With `tta`, `utils.model.prediction.predict` averages with mirror images.
    """

    num_views = 1

    def __init__(self, source: NpyFolder, boxes: BoxesByName | Literal["oracle"] | None, *, tta: bool = False) -> None:
        self.source = source
        self.boxes = boxes
        self.tta = tta

    def __len__(self) -> int:
        return len(self.source.items)

    def __getitem__(self, index: int) -> Sample:
        labels = self.source.read_labels(index)
        item = self.source.items[index]
        sample: Sample = {"labels": torch.from_numpy(labels), "name": item.name}
        if self.cache:
            sample["features"] = self.cache.read(index)
        if self.has_images:
            sample["image"] = torch.from_numpy(self.source.read_image(index))
        if self.boxes == "oracle":
            sample.update(box_prompts(*class_boxes(labels, len(self.source.classes))))
        elif self.boxes is not None:
            frame = (item.height, item.width, self.source.image_size, self.source.resize_mode)
            sample.update(detected_prompts(self.boxes, item.name, *frame))
        if self.tta:
            sample["mirror_width"] = self.source.fitted_size(index)[1]
        return sample


def box_prompts(class_ids: np.ndarray, boxes: np.ndarray) -> Sample:
    """The "class_ids" and "boxes" of a sample."""
    return {"class_ids": torch.from_numpy(class_ids), "boxes": torch.from_numpy(boxes)}


def detected_prompts(
    detected: BoxesByName, name: str, height: int, width: int, image_size: ImageSize, resize_mode: str
) -> Sample:
    """The detected prompts of an image, by its name, in the frame; K = 0 if the detector found nothing."""
    class_ids, boxes = detected.get(match_key(name), (np.zeros(0, np.int64), np.zeros((0, 4))))
    return box_prompts(class_ids, to_frame(boxes, height, width, image_size, resize_mode))


def collate_training(samples: list[Sample]) -> TrainingBatch:
    """Stack samples. Prompts are padded to the largest number, at least one, with class 255, box 0, not valid."""
    if "boxes" in samples[0]:
        count = max(1, *(len(sample["boxes"]) for sample in samples))
        samples = [
            {
                **sample,
                "class_ids": _padded(sample["class_ids"], count, PADDING["class_ids"]),
                "boxes": _padded(sample["boxes"], count, PADDING["boxes"]),
                "valid": _padded(sample["valid"], count, PADDING["valid"]),
            }
            for sample in samples
        ]
    return default_collate(samples)


def _padded(x: Tensor, count: int, value: int) -> Tensor:
    """N x ... -> count x ..."""
    return torch.cat([x, x.new_full((count - len(x), *x.shape[1:]), value)])


def collate_evaluation(samples: Sequence[Any]) -> EvaluationBatch:
    """Stack images, features and labels of `Sample`s; the other entries become lists."""
    batch: Any = {key: [sample[key] for sample in samples] for key in samples[0]}
    if "features" in batch:
        batch["features"] = [torch.stack(feature) for feature in zip(*batch["features"])]
    return batch | {key: torch.stack(batch[key]) for key in ("image", "labels") if key in batch}


def collate_pictures(
    pictures: Sequence[tuple[str, np.ndarray]],
    detected: BoxesByName | None,
    image_size: ImageSize,
    resize_mode: str,
    *,
    tta: bool = False,
) -> EvaluationBatch:
    """A batch of pictures of any sizes, in the frame.

    Args:
        pictures: names and (H, W, 3) RGB uint8.
        detected: boxes to prompt with; None without boxes.
        tta: whether mirror images are predicted, too.
    """
    frames = [resize_image(image, image_size, resize_mode) for _, image in pictures]
    batch: EvaluationBatch = {"image": torch.from_numpy(np.stack(frames))}
    if detected is not None:
        prompts = [
            detected_prompts(detected, name, image.shape[0], image.shape[1], image_size, resize_mode)
            for name, image in pictures
        ]
        batch["class_ids"] = [prompt["class_ids"] for prompt in prompts]
        batch["boxes"] = [prompt["boxes"] for prompt in prompts]
    if tta:
        sizes = [image.shape[:2] for _, image in pictures]
        batch["mirror_width"] = [fitted_size(h, w, image_size, resize_mode)[1] for h, w in sizes]
    return batch


# 修改点 11: 分布式采样器，每张图每轮恰好出现一次，不用重复样本补齐
class TrainingSampler(Sampler[list[int]]):
    """The batches of one process: every image once an epoch, in an order that does not depend on the layout.

    The shuffled epoch is cut into batches, and the processes take them in turn. An optimizer step therefore sees the
    same images for any split of the global batch into processes and accumulation steps. If the last batches do not
    suffice for all processes, the others get `[FILLER]`: all take the same number of steps, and no image counts twice
    as with PyTorch's `DistributedSampler`.

    Within an optimizer step, images are sorted by their number of prompts, so that batches need little padding.
    """

    def __init__(
        self,
        num_prompts: Sequence[int],
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        grad_acc_steps: int = 1,
    ) -> None:
        """Set the layout: `grad_acc_steps` batches of `batch_size` samples in each process make an optimizer step."""
        self.num_prompts = num_prompts
        self.num_samples = len(num_prompts)
        self.batch_size = batch_size
        self.images_per_step = batch_size * world_size * grad_acc_steps
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.first_step = 0

    def set_epoch(self, epoch: int, *, first_step: int = 0) -> None:
        """Set the epoch and its first step; a resumed run has already taken the steps before it."""
        self.epoch = epoch
        self.first_step = first_step

    def __len__(self) -> int:
        """The steps left in the epoch."""
        return max(0, -(-self.num_samples // (self.batch_size * self.world_size)) - self.first_step)

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples).tolist()
        order: list[int] = []
        for start in range(0, self.num_samples, self.images_per_step):
            order += sorted(shuffled[start : start + self.images_per_step], key=self.num_prompts.__getitem__)
        for step in range(self.first_step, self.first_step + len(self)):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield order[start : start + self.batch_size] or [FILLER]


def training_dataset(
    source: NpyFolder,
    prompt_mode: str,
    *,
    classes_per_image: int | None,
    bbox_shift: int,
    augment: str,
    num_views: int,
    seed: int,
) -> TrainingDataset:
    """The training data of a prompt mode; the arguments are those of `BoxPromptDataset`.

    Raises:
        UserError: the augmentation does not have this number of views, or no image has a labelled pixel.
    """
    most = AUGMENTATIONS[augment]
    wrong = None
    if augment != "full" and num_views > most:
        wrong = f"--augment {augment} has only {most}; lower it, or use --augment full"
    elif augment != "none" and num_views < 2:
        wrong = "the image alone is no augmentation; use --augment none"
    if wrong:
        raise UserError(f"--cache_views {num_views}: {wrong}")
    if prompt_mode == "semantic":
        return SemanticDataset(source, seed=seed, augment=augment, num_views=num_views)
    return BoxPromptDataset(
        source,
        classes_per_image=classes_per_image,
        bbox_shift=bbox_shift,
        seed=seed,
        augment=augment,
        num_views=num_views,
    )


def validation_dataset(folder: Path, training: NpyFolder, prompt_mode: str) -> EvaluationDataset:
    """The validation data for a training split, with oracle boxes in box mode.

    Raises:
        UserError: the classes or the frame differ from the training data's, or no pixel is labelled.
    """
    source = NpyFolder(folder)
    theirs, ours = source.classes.names, training.classes.selected_from or training.classes.names
    if theirs not in (ours, training.classes.names):
        raise UserError(
            f"{folder}: has {len(theirs)} classes ({', '.join(theirs)}), but the training data have {len(ours)} "
            f"({', '.join(ours)}); preprocess both alike"
        )
    source.use_classes(training.classes)
    for what in ("image_size", "resize_mode"):
        theirs, ours = getattr(source, what), getattr(training, what)
        if theirs != ours:
            raise UserError(f"{folder}: {what} is {theirs}, but the training data have {ours}; preprocess both alike")
    if not any(any(item.pixels) for item in source.items):
        raise UserError(f"{folder}: no labelled pixel to measure mIoU on; give another --val_npy_path")
    return EvaluationDataset(source, "oracle" if prompt_mode == "box" else None)
