"""Data sets over the npy folders that `pre_bdd100k.py` writes, and the order in which training goes through them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, default_collate

from utils.data.augment import draw_view, fixed_view
from utils.data.bdd100k import match_key
from utils.data.boxes import class_boxes, jitter_boxes, to_frame
from utils.data.classes import IGNORE_LABEL, NUM_CLASSES
from utils.data.frame import ImageSize, frame_size
from utils.data.geometry import fitted_size
from utils.data.manifest import read_manifest
from utils.runtime.choices import AUGMENTATIONS
from utils.runtime.errors import UnreadableError, UserError
from utils.runtime.files import cannot_be_read, check_npy

FILLER = -1  # an index that stands for no image; see `TrainingSampler`


class NpyFolder:
    """A preprocessed, labelled split, every file of which was found to be whole."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: the folder was not written to its end by `pre_bdd100k.py`, has no labels, or a file of it is
                missing, damaged or of another shape.
        """
        manifest = read_manifest(folder)
        if not manifest.labelled:
            raise UserError(f"{folder}: this split has no labels (gts/); take one that has, such as train or val")
        if not manifest.items:
            raise UserError(f"{folder}: manifest.json lists no image; run pre_bdd100k.py again")
        self.folder = folder
        self.image_size = manifest.image_size
        self.resize_mode = manifest.resize_mode
        self.items = manifest.items
        self.frame_size = frame = frame_size(manifest.image_size)
        self._form = {"imgs": ((*frame, 3), manifest.image_dtype), "gts": (frame, "uint8")}
        for item in self.items:
            for kind, (shape, dtype) in self._form.items():
                check_npy(self._path(kind, item.name), shape, dtype)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`read_image` and `read_labels`."""
        return self.read_image(index), self.read_labels(index)

    def read_image(self, index: int) -> np.ndarray:
        """H x W x 3 of the stored dtype. Raises `UserError` if the file has gone or changed since it was checked."""
        return self._load("imgs", index)

    def read_labels(self, index: int) -> np.ndarray:
        """H x W uint8 of 0-18 and 255; raises as `read_image` does, and a `UserError` of any other value."""
        labels = self._load("gts", index)
        foreign = labels[(labels >= NUM_CLASSES) & (labels != IGNORE_LABEL)]
        if foreign.size:  # a class that is none would be an index out of bounds, in a loss or on a GPU
            path = self._path("gts", self.items[index].name)
            raise UserError(
                f"{path}: labels must be 0-{NUM_CLASSES - 1} or {IGNORE_LABEL}, got "
                f"{np.unique(foreign)[:8].tolist()}; run pre_bdd100k.py again with --overwrite"
            )
        return labels

    def _load(self, kind: str, index: int) -> np.ndarray:
        path = self._path(kind, self.items[index].name)
        try:
            check_npy(path, *self._form[kind])  # once more, as NumPy would make room for whatever a header claims
            return np.load(path, allow_pickle=False)
        except UnreadableError:
            raise
        except OSError as error:
            raise cannot_be_read(path, error) from None
        except (UserError, ValueError, EOFError) as error:
            raise UserError(f"{path}: became unreadable while it was in use ({error})") from None

    def image_path(self, index: int) -> Path:
        return self._path("imgs", self.items[index].name)

    def fitted_size(self, index: int) -> tuple[int, int]:
        """Height and width of the picture in its frame."""
        item = self.items[index]
        return fitted_size(item.height, item.width, self.image_size, self.resize_mode)

    def class_pixels(self) -> torch.Tensor:
        """Labelled pixels of each class in the whole split, (NUM_CLASSES,) int64."""
        return torch.tensor([item.pixels for item in self.items]).sum(dim=0)

    @property
    def digest(self) -> str:
        """What tells the split from another, or from itself with other masks; not where its files are."""
        what = [self.image_size, self.resize_mode, [asdict(item) for item in self.items]]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.npy"


class FeatureCache(Protocol):
    """The frozen encoder's features of each image of a split (`utils.cache.reader.EmbeddingCache`)."""

    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, ...]: ...


class CachedDataset(Dataset[dict[str, Any]]):
    """Has images in its samples, or features from a cache, or both."""

    cache: FeatureCache | None = None
    has_images = True

    def use(self, cache: FeatureCache | None, *, takes_pixels: bool) -> None:
        """Have features in the samples, and images only for a model that takes pixels; None for images alone."""
        self.cache, self.has_images = cache, cache is None or takes_pixels


class TrainingDataset(CachedDataset):
    """The labelled images of a split, for one epoch after another, each in some view (`utils.data.augment`).

    What is random about a sample is a function of seed, epoch and index alone, so any number of workers and
    processes draws the same.
    """

    def __init__(self, source: NpyFolder, *, seed: int, augment: str, num_views: int) -> None:
        """
        Args:
            augment: "none"; "flip", for the image or its mirror image; "full", for random views: of all that there
                are or, out of a cache, which has
            num_views: views of each image, of those. Of the other kinds there are no more than the cache has.
        """
        self.source = source
        self.seed = seed
        self.augment = augment
        self.num_views = num_views
        self.epoch = 0
        # An image without a single labelled pixel has nothing to teach.
        self.indices = [i for i, item in enumerate(source.items) if any(item.pixels)]
        if not self.indices:
            raise UserError(f"{source.folder}: no image has a labelled pixel; check the masks given to pre_bdd100k.py")
        if augment == "full":
            import torchvision.transforms.v2  # noqa: F401  now, that no worker process spends seconds on it

    def __len__(self) -> int:
        return len(self.indices)

    def num_prompts(self) -> list[int]:
        """How many prompts each image has, as it is stored; 1 where images have none."""
        return [1] * len(self)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to draw for; takes effect when the loader starts its next pass."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample: image, H x W x 3 as stored; features, as the cache has them; labels, H x W uint8; valid, bool,
        False of `FILLER`; name; and more."""
        source_index = self.indices[max(index, 0)]
        rng = np.random.default_rng((self.seed, self.epoch, max(index, 0)))
        name = self.source.items[source_index].name
        if self.augment == "full" and not self.cache:
            number, view = 0, draw_view(rng)
        else:  # without augmentation nothing is drawn
            number = int(rng.integers(self.num_views)) if self.num_views > 1 else 0
            view = fixed_view(name, number)
        size = self.source.fitted_size(source_index)
        labels = view.labels(self.source.read_labels(source_index), size)
        sample: dict[str, Any] = {"labels": torch.from_numpy(labels), **self._prompts(source_index, labels, rng)}
        if self.cache:
            sample["features"] = self.cache.read(source_index, number)
        if self.has_images:
            sample["image"] = view.image(self.source.read_image(source_index), size)
        return {**sample, "valid": sample["valid"] & (index != FILLER), "name": name}

    def _prompts(self, source_index: int, labels: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """What the model is to find in the view, by its labels; valid: whether each of it counts."""
        raise NotImplementedError


# 修改点 1: BDD100K 数据集类：每张图取出现的全部类别（或随机若干类），以其外接框（带抖动）作为提示
class BoxPromptDataset(TrainingDataset):
    """Images with the classes that occur in each as prompts, all or some of them: a class's tight box, jittered."""

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
        """
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

    def _prompts(self, source_index: int, labels: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """class_ids: K int64; boxes: K x 4 float32 xyxy; valid: K bool, True. K is 0 where nothing is labelled."""
        class_ids, boxes = class_boxes(labels)
        if self.classes_per_image is not None:
            count = min(self.classes_per_image, len(class_ids))
            chosen = rng.choice(len(class_ids), size=count, replace=False)
            class_ids, boxes = class_ids[chosen], boxes[chosen]
        boxes = jitter_boxes(boxes, self.source.image_size, self.bbox_shift, rng)
        return {
            "class_ids": torch.from_numpy(class_ids),
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "valid": torch.ones(len(class_ids), dtype=torch.bool),
        }


class SemanticDataset(TrainingDataset):
    """Images and their labels, mirrored half of the time unless asked otherwise. No prompts."""

    def __init__(self, source: NpyFolder, *, seed: int, augment: str = "flip", num_views: int = 2) -> None:
        super().__init__(source, seed=seed, augment=augment, num_views=num_views)

    def _prompts(self, source_index: int, labels: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {"valid": torch.tensor(bool((labels != IGNORE_LABEL).any()))}  # a crop may have nothing to teach


BoxesByName = Mapping[str, tuple[np.ndarray, np.ndarray]]  # class ids, (K,), and boxes, (K, 4), of an original image


class EvaluationDataset(CachedDataset):
    """Every image of a split, with the boxes to prompt for, if any.

    `boxes` is "oracle" for the tight box of every class in the image, from the ground truth; None for no boxes; or what
    a detector found, by image name. `tta` has `utils.model.prediction.predict` look at mirror images too.
    """

    num_views = 1

    def __init__(self, source: NpyFolder, boxes: BoxesByName | Literal["oracle"] | None, *, tta: bool = False) -> None:
        self.source = source
        self.boxes = boxes
        self.tta = tta

    def __len__(self) -> int:
        return len(self.source.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """image or features, as of `TrainingDataset`; labels: H x W uint8; name; with boxes, class_ids: K int64 and
        boxes: K x 4 float32 in the frame."""
        labels = self.source.read_labels(index)
        item = self.source.items[index]
        sample: dict[str, Any] = {"labels": torch.from_numpy(labels)}
        if self.cache:
            sample["features"] = self.cache.read(index)
        if self.has_images:
            sample["image"] = torch.from_numpy(self.source.read_image(index))
        if self.boxes == "oracle":
            sample |= box_prompts(*class_boxes(labels))
        elif self.boxes is not None:
            frame = (item.height, item.width, self.source.image_size, self.source.resize_mode)
            sample |= detected_prompts(self.boxes, item.name, *frame)
        if self.tta:
            sample["mirror_width"] = self.source.fitted_size(index)[1]
        return {**sample, "name": item.name}


def box_prompts(class_ids: np.ndarray, boxes: np.ndarray) -> dict[str, torch.Tensor]:
    return {"class_ids": torch.from_numpy(class_ids), "boxes": torch.from_numpy(boxes)}


def detected_prompts(
    detected: BoxesByName, name: str, height: int, width: int, image_size: ImageSize, resize_mode: str
) -> dict[str, torch.Tensor]:
    """The prompts of one image, by its name, in the frame; none where the detector found nothing."""
    class_ids, boxes = detected.get(match_key(name), (np.zeros(0, np.int64), np.zeros((0, 4))))
    return box_prompts(class_ids, to_frame(boxes, height, width, image_size, resize_mode))


def collate_training(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples, prompts padded to the most that one has, and to at least one: of class 255, box 0, not valid."""
    if "boxes" in samples[0]:
        count = max(1, *(len(sample["boxes"]) for sample in samples))
        padding = {"class_ids": IGNORE_LABEL, "boxes": 0, "valid": False}
        samples = [
            sample | {key: _padded(sample[key], count, value) for key, value in padding.items()} for sample in samples
        ]
    return default_collate(samples)


def _padded(x: torch.Tensor, count: int, value: int) -> torch.Tensor:
    """N x ... -> count x ..."""
    return torch.cat([x, x.new_full((count - len(x), *x.shape[1:]), value)])


def collate_evaluation(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack what is alike in all; what differs in number from image to image, such as boxes, stays a list."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    if "features" in batch:
        batch["features"] = [torch.stack(feature) for feature in zip(*batch["features"])]
    return {**batch, **{key: torch.stack(batch[key]) for key in ("image", "labels") if key in batch}}


# 修改点 11: 分布式采样器：每轮每张图恰好出现一次，不重复补齐
class TrainingSampler(Sampler[list[int]]):
    """The batches of one process: every image once an epoch, in an order that does not depend on the layout.

    The shuffled epoch is cut into batches, and the processes take them in turn. With any split of the same global
    batch into processes and accumulation steps, an optimizer step therefore sees the same images. Where the batches
    do not go round, a process without one is given `[FILLER]`, so that all take part in the same number of steps
    without any image counting twice (which is why this is not PyTorch's padding `DistributedSampler`).

    Within an optimizer step, images with as many prompts go into one batch, which is padded to the most that one has.
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
        """
        Args:
            num_prompts: of each sample.
            batch_size: samples of a process and step, `grad_acc_steps` of which make an optimizer step.
        """
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
        """Choose the epoch, and the step to begin with: those before it were taken before the run was resumed."""
        self.epoch = epoch
        self.first_step = first_step

    def __len__(self) -> int:
        """Steps that are left of the epoch."""
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
    """
    Args:
        num_views: as of `TrainingDataset`.

    Raises:
        UserError: the augmentation does not have so many views or so few, or no image has a labelled pixel.
    """
    most = AUGMENTATIONS[augment]
    if augment != "full" and num_views > most:
        raise UserError(
            f"--cache_views {num_views}: --augment {augment} has no more than {most}; lower it, or give --augment full"
        )
    if augment != "none" and num_views < 2:
        raise UserError(f"--cache_views {num_views}: the image itself alone is no augmentation; give --augment none")
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
    """
    Raises:
        UserError: the images are not like the training data, or without labels.
    """
    source = NpyFolder(folder)
    for what in ("image_size", "resize_mode"):
        theirs, ours = getattr(source, what), getattr(training, what)
        if theirs != ours:
            raise UserError(f"{folder}: has {what} {theirs}, but the training data {ours}; make them alike")
    if not any(any(item.pixels) for item in source.items):
        raise UserError(f"{folder}: no labelled pixel to measure mIoU on; give another --val_npy_path")
    return EvaluationDataset(source, "oracle" if prompt_mode == "box" else None)
