"""The training data in memory: a split's cached features, labels and pixels, on the card or on the host.

They are read once. After that no file is read and no process loads: a batch is gathered by index where it is trained.
The batches are those of `utils.data.loaders.training_loader`, value for value.
"""

from __future__ import annotations

import mmap
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.cache.lock import in_rounds
from utils.cache.reader import threads
from utils.data.augment import View, fixed_view
from utils.data.datasets import (
    FILLER,
    PADDING,
    Found,
    Sample,
    TrainingBatch,
    TrainingDataset,
    TrainingSampler,
)
from utils.data.loaders import training_sampler
from utils.runtime import distributed
from utils.runtime.device import Precision
from utils.runtime.errors import UserError
from utils.runtime.memory import available_memory
from utils.runtime.progress import progress_bar

WORD = 8  # bytes; sides of frames are multiples of 16, so every row is a whole number of words
STAGED_BYTES = 2**28  # read at a time, before they are copied to the card
# What a training step takes of the card, for each pixel of a batch: 1.1 GiB an image at 1024 x 1024, with all 19
# classes (counted, see PRESETS in train_bdd100k.py). The rest is for validation, and for what PyTorch holds unused.
STEP_BYTES_PER_PIXEL = 1130
SPARE_BYTES = 3 * 2**30
HOST_SHARE = 0.75  # of the available memory that may be taken
_OFF = "set --cache_device to off"


@dataclass(frozen=True)
class Table:
    """One tensor for every view of every image. Rows are words of 8 bytes, which are faster to gather than bytes."""

    words: Tensor  # rows x words int64
    dtype: torch.dtype
    shape: tuple[int, ...]  # of a row

    @classmethod
    def like(cls, example: Tensor, rows: int, place: torch.device) -> Table:
        """A table without values, whose rows are like `example`."""
        if place.type == "cpu":
            # Shared, so that a process that is forked to load validation data copies neither it nor its page tables.
            try:
                memory = mmap.mmap(-1, rows * example.nbytes)
            except OSError as error:
                raise UserError(f"no memory for the training data ({error.strerror}); {_OFF}") from None
            words = torch.frombuffer(memory, dtype=torch.int64).unflatten(0, (rows, -1))
        else:
            words = torch.empty(rows, example.nbytes // WORD, dtype=torch.int64, device=place)
        return cls(words, example.dtype, tuple(example.shape))

    def staging(self, rows: int) -> Table:
        """A table of such rows in pinned memory."""
        words = torch.empty(rows, self.words.shape[1], dtype=torch.int64, pin_memory=True)
        return Table(words, self.dtype, self.shape)

    def view(self, rows: slice = slice(None)) -> Tensor:
        """Rows in their own type and shape."""
        return self._typed(self.words[rows])

    def gather(self, rows: list[int], on_device: Tensor) -> Tensor:
        """The rows of these numbers, which `on_device` holds too, on the device of that."""
        if self.words.device == on_device.device:
            words = self.words.index_select(0, on_device)
        else:  # from pinned memory, without waiting
            words = self.words.new_empty(len(rows), self.words.shape[1], device=on_device.device)
            for target, row in zip(words, rows):
                target.copy_(self.words[row], non_blocking=True)
        return self._typed(words)

    def _typed(self, words: Tensor) -> Tensor:
        return words.view(self.dtype).unflatten(1, self.shape)


class ResidentLoader:
    """This process's batches of each epoch, on its device.

    It stands in for the loader of `training_loader`: `len` and iteration follow `batch_sampler`, and the randomness
    follows the data set's epoch.
    """

    def __init__(
        self,
        dataset: TrainingDataset,
        sampler: TrainingSampler,
        device: torch.device,
        places: Mapping[str, torch.device],
    ) -> None:
        """Allocate the tables; `load` fills them.

        Args:
            device: where the batches are.
            places: for "features", "labels" and "image" where their tables are: `device`, or the CPU.
        """
        self.dataset = dataset
        self.batch_sampler = sampler
        self.device = device
        rows = len(dataset) * dataset.num_views
        self._tables = {
            key: [Table.like(example, rows, places[key]) for example in examples]
            for key, examples in view_tensors(dataset.read_view(dataset.indices[0], 0, View())).items()
        }
        self._found: list[Found] = []  # of each row

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[TrainingBatch]:
        return map(self._batch, self.batch_sampler)

    def load(self) -> Generator[int, None, None]:
        """Read the split with several threads, and yield the number of images after each part.

        Raises:
            UserError: a file is missing, or has changed since it was checked.
        """
        views, count = self.dataset.num_views, len(self.dataset)
        self._found = []
        tables = [table for tables in self._tables.values() for table in tables]
        at_once = min(count, max(1, STAGED_BYTES // (views * sum(table.words[0].nbytes for table in tables))))
        # A card is written to in large parts, which are collected in pinned memory.
        staged = [table.staging(at_once * views) if table.words.is_cuda else None for table in tables]

        def read(position: int, targets: list[Tensor]) -> list[Found]:
            """Read all views of an image into the rows of `targets`."""
            source_index = self.dataset.indices[position]
            name, found = self.dataset.source.items[source_index].name, []
            for number in range(views):
                sample = self.dataset.read_view(source_index, number, fixed_view(name, number))
                tensors = [tensor for tensors in view_tensors(sample).values() for tensor in tensors]
                for target, tensor in zip(targets, tensors, strict=True):
                    target[number].copy_(tensor)
                found.append(self.dataset.find(sample["labels"].numpy()))
            return found

        is_quiet = not distributed.is_main()
        progress = progress_bar(desc="loading", total=count, unit="image", leave=False, disable=is_quiet)
        with threads() as pool, progress:
            for start in range(0, count, at_once):
                part = range(start, min(start + at_once, count))
                rows = slice(start * views, part.stop * views)
                parts = [table.view(rows) if stage is None else stage.view() for table, stage in zip(tables, staged)]
                of_images = zip(*(rows_of.split(views) for rows_of in parts))
                for found in pool.map(read, part, of_images):
                    self._found += found
                for table, stage in zip(tables, staged):
                    if stage:
                        table.words[rows] = stage.words[: len(part) * views]
                progress.update(len(part))
                yield len(part)
        for table in tables:
            if self.device.type == "cuda" and not table.words.is_cuda:
                _pin(table.words)

    def draw(self, indexes: list[int]) -> tuple[list[int], dict[str, np.ndarray]]:
        """Draw the views of images, as rows of the tables, and their prompts, padded and stacked."""
        drawn, rows = [], []
        for index in indexes:
            rng = self.dataset.rng(index)
            rows.append(max(index, 0) * self.dataset.num_views + self.dataset.draw_number(rng))
            prompts = self.dataset.draw_prompts(self._found[rows[-1]], rng)
            drawn.append({**prompts, "valid": prompts["valid"] & (index != FILLER)})
        return rows, {key: _stacked([prompts[key] for prompts in drawn], PADDING[key]) for key in drawn[0]}

    def _batch(self, indexes: list[int]) -> TrainingBatch:
        rows, prompts = self.draw(indexes)
        on_device, *values = _to_device([np.array(rows), *prompts.values()], self.device)
        gathered = {key: [table.gather(rows, on_device) for table in tables] for key, tables in self._tables.items()}
        items = [self.dataset.source.items[self.dataset.indices[max(index, 0)]] for index in indexes]
        batch = {**dict(zip(prompts, values)), "labels": gathered["labels"][0], "features": gathered["features"]}
        if "image" in gathered:
            batch["image"] = gathered["image"][0]
        return {**batch, "name": [item.name for item in items]}  # type: ignore[typeddict-item]


def view_tensors(sample: Sample) -> dict[str, list[Tensor]]:
    """The tensors of a view: its features, its image if there is one, and its labels."""
    image = {"image": [sample["image"]]} if "image" in sample else {}
    return {"features": list(sample["features"]), **image, "labels": [sample["labels"]]}


def _stacked(arrays: list[np.ndarray], padding: int) -> np.ndarray:
    """Stack arrays, padded to the length of the longest, at least 1; arrays without a length are just stacked."""
    if not arrays[0].ndim:
        return np.stack(arrays)
    count = max(1, *map(len, arrays))
    stacked = np.full((len(arrays), count, *arrays[0].shape[1:]), padding, arrays[0].dtype)
    for target, array in zip(stacked, arrays):
        target[: len(array)] = array
    return stacked


def _to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy small arrays to a device, to a card in one transfer that nothing waits for. Larger dtypes come first."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu":
        return tensors
    host = torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8, pin_memory=True)
    sizes = [tensor.nbytes for tensor in tensors]
    for target, tensor in zip(host.split(sizes), tensors):
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    parts = host.to(device, non_blocking=True).split(sizes)
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors)]


def _pin(tensor: Tensor) -> None:
    """Lock a tensor's memory, so that copies to the card need not wait. Where the system refuses, copies wait."""
    if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # CUDA keeps the failure for the next kernel, which here is harmless


def require_possible(where: str, cache_embeddings: str, device: torch.device) -> None:
    """Check --cache_device against other flags, before images are encoded; raises a `UserError`."""
    if where == "cuda" and device.type == "cpu":
        raise UserError("--cache_device cuda: the run trains on the CPU; set --cache_device to cpu, auto or off")
    if where in ("cuda", "cpu") and cache_embeddings == "off":
        raise UserError(
            f"--cache_device {where}: there is no cache with --cache_embeddings off; leave out one of the two"
        )


def resident_loader(
    where: str, dataset: TrainingDataset, *, batch_size: int, seed: int, grad_acc_steps: int, precision: Precision
) -> ResidentLoader | None:
    """Load the training data into memory if that is wanted and there is room.

    Args:
        where: --cache_device. "auto": the card, or else the host, or else nowhere; nowhere without a card, where a step
            takes longer than loading its batch.

    Returns:
        None if batches are to come from files.

    Raises:
        UserError: there is no room where it is wanted, or no cache; or as `ResidentLoader.load`.
    """
    device = precision.device
    if where == "off" or (where == "auto" and (not dataset.cache or device.type == "cpu")):
        return None
    if not dataset.cache:
        raise UserError(
            f"--cache_device {where}: the run has no cached features; set --cache_embeddings to a folder, or "
            "--cache_device to off"
        )
    views = len(dataset) * dataset.num_views
    example = dataset.read_view(dataset.indices[0], 0, View())
    sizes = {key: views * sum(tensor.nbytes for tensor in tensors) for key, tensors in view_tensors(example).items()}
    places = _places(where, sizes, batch_size * example["labels"].numel(), device)
    if places is None:
        return None
    kept = [
        f"{', '.join(f'{_amount(sizes[key])} of {_NAMES[key]}' for key in keys)} on {_NAMES[place]}"
        for place in ("cuda", "cpu")
        if (keys := [key for key in sizes if places[key].type == place])
    ]
    each = " (in each process)" if distributed.world_size() > 1 else ""
    distributed.say(f"{dataset.source.folder}: kept in memory{each}: {'; '.join(kept)}")
    sampler = training_sampler(dataset, batch_size=batch_size, seed=seed, grad_acc_steps=grad_acc_steps)
    loader = ResidentLoader(dataset, sampler, device, places)
    in_rounds(loader.load())
    return loader


_NAMES = {"cuda": "the card", "cpu": "the host", "features": "features", "labels": "labels", "image": "pixels"}


def _places(
    where: str, sizes: dict[str, int], batch_pixels: int, device: torch.device
) -> dict[str, torch.device] | None:
    """Where there is room in all processes for each part of the data, of `sizes` bytes; the card comes first.

    None if there is too little room and `where` is "auto".
    """
    room = {}
    if where in ("cuda", "auto"):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        room[device] = free - batch_pixels * STEP_BYTES_PER_PIXEL - SPARE_BYTES
    if where in ("cpu", "auto"):
        room[torch.device("cpu")] = int(available_memory() * HOST_SHARE) // distributed.local_world_size()
    room = {place: max(0, min(distributed.all_gather(left))) for place, left in room.items()}
    told = " and ".join(f"{_NAMES[place.type]} has {_amount(left)}" for place, left in room.items())
    places = {}
    for key, size in sizes.items():
        place = next((place for place in room if size <= room[place]), None)
        if place is None:
            break
        places[key] = place
        room[place] -= size
    else:
        return places
    each = " for each process" if distributed.local_world_size() > 1 else ""
    told = f"the training data take {_amount(sum(sizes.values()))} of memory, but {told} to spare{each}"
    if where != "auto":
        raise UserError(f"--cache_device {where}: {told}; set --cache_device to auto or off")
    distributed.say(f"{told}; they are read from the disk")
    return None


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
