"""The data sets that the scripts train and score on: which samples, in which order, from pixels or from a cache."""

from __future__ import annotations

from pathlib import Path

from utils import distributed
from utils.checkpoint import ModelInfo
from utils.choices import AUGMENTATIONS
from utils.dataset import (
    BoxPromptDataset,
    EvaluationDataset,
    NpyFolder,
    SemanticDataset,
    TrainingDataset,
    TrainingSampler,
    collate_evaluation,
    collate_training,
)
from utils.embedding_cache import Binding, Request, prepare_caches
from utils.errors import UserError
from utils.loader import Loader, require_shared_memory, sample_bytes
from utils.model import Segmenter
from utils.precision import Precision


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
        raise UserError(f"--cache_views {num_views}: --augment {augment} has no more than {most}; lower it, or give "
                        "--augment full")
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


def training_loader(
    dataset: TrainingDataset,
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    grad_acc_steps: int,
    precision: Precision,
) -> Loader:
    """This process's batches of each epoch; its `batch_sampler` is a `TrainingSampler`."""
    sampler = TrainingSampler(
        dataset.num_prompts(),
        grad_acc_steps=grad_acc_steps,
        batch_size=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=seed,
    )
    _require_shared_memory(dataset, batch_size, len(sampler), num_workers)
    return Loader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_training,
        pin_memory=precision.device.type == "cuda",
    )


def evaluation_loader(
    dataset: EvaluationDataset, *, batch_size: int, num_workers: int, precision: Precision
) -> Loader:
    """The batches of this process's share; every image belongs to exactly one process.

    Whole batches are dealt out: one of other images would round differently, and a process's figures with it.
    """
    every = range(len(dataset))
    batches = [list(every[i : i + batch_size]) for i in range(0, len(every), batch_size)]
    most = -(-len(batches) // distributed.world_size())  # the same in all processes, so that all fail or none
    _require_shared_memory(dataset, batch_size, most, num_workers)
    return Loader(
        dataset,
        batch_sampler=batches[distributed.rank() :: distributed.world_size()],
        num_workers=num_workers,
        collate_fn=collate_evaluation,
        pin_memory=precision.device.type == "cuda",
    )


def _require_shared_memory(
    dataset: TrainingDataset | EvaluationDataset, batch_size: int, num_batches: int, num_workers: int
) -> None:
    if num_workers:
        require_shared_memory(min(batch_size, len(dataset)) * sample_bytes(dataset[0]), num_workers, num_batches)


def use_caches(
    passes: dict[TrainingDataset | EvaluationDataset, int],
    segmenter: Segmenter,
    info: ModelInfo,
    precision: Precision,
    *,
    where: str,
    dtype: str,
    batch_size: int,
    num_workers: int,
) -> str | None:
    """Have the images of data sets encoded once, if that is wanted and worth it, and the data sets read the features.

    Args:
        passes: the data sets, the first of which decides where "auto" is, and how often each image would be encoded.
        where, dtype: --cache_embeddings and --cache_dtype.
        batch_size, num_workers: of the encoding.

    Returns:
        What the features of the first data set are stored in; None if it reads images.

    Raises:
        UserError: as of `prepare_caches`.
    """
    caches = prepare_caches(
        where,
        [Request(dataset.source, dataset.num_views, count) for dataset, count in passes.items()],
        segmenter,
        precision,
        Binding.of(segmenter, info, precision, dtype),
        batch_size=batch_size,
        num_workers=num_workers,
    )
    for dataset, cache in zip(passes, caches):
        dataset.use(cache, takes_pixels=segmenter.takes_pixels)
        if cache:
            segmenter.reduction = cache.reduction
            distributed.say(f"{dataset.source.folder}: features are read from {cache.folder}")
    segmenter.to(precision.device)  # the reduction
    if all(caches):
        segmenter.sam.image_encoder.cpu()  # which has done its work; a card has better use for the room
    return dtype if caches[0] else None
