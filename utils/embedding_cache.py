"""The frozen encoder's features on disk, so that no image is encoded twice.

A cache is a folder: `cache.json`, which says what all its entries depend on, and one file an image in the safetensors
format, which holds tensors and strings and can run nothing. An entry has the features of each view of its image (the
image itself and, where training wants it, its mirror image), in float16 unless the user asks for float32, and is read
memory-mapped: what training touches of it is in the page cache, not in the process.

Entries are written whole or not at all, so a run that is stopped goes on where it was. Before use each entry is
checked: its checksum against damage, and the picture it was made of by length and time of modification; only if these
differ is the picture itself read, and its SHA-256 compared. What fails is encoded again, and said.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import ModelInfo
from utils.dataset import NpyFolder
from utils.errors import UserError
from utils.files import atomic_write, read_json, remove_temporaries
from utils.model import Segmenter
from utils.precision import Precision

FORMAT_VERSION = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}
ViewsOf = Callable[[Tensor], Iterator[dict[str, Tensor]]]  # the tensors of each image's entry
ROOM_TO_LEAVE = 1 << 30  # a disk that is filled to the brim takes no checkpoint any more


@dataclass(frozen=True)
class Binding:
    """What features depend on besides the picture; a cache of another binding is never read."""

    sam_sha256: str
    prompt_mode: str  # decides which features there are
    image_size: int
    resize_mode: str
    pixel_mean: list[float]
    pixel_std: list[float]
    computed_in: str
    stored_in: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, segmenter: Segmenter, info: ModelInfo, precision: Precision, dtype: str) -> Binding:
        return cls(
            sam_sha256=info.sam_sha256,
            prompt_mode=info.prompt_mode,
            image_size=info.image_size,
            resize_mode=info.resize_mode,
            pixel_mean=segmenter.sam.pixel_mean.flatten().tolist(),
            pixel_std=segmenter.sam.pixel_std.flatten().tolist(),
            computed_in=str(precision.amp_dtype or torch.float32).removeprefix("torch."),
            stored_in=dtype,
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class EmbeddingCache:
    """Entries that were found whole when the cache was prepared."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.names = names

    def read(self, index: int, view: int = 0) -> tuple[Tensor, ...]:
        """The features of a view (0: the image, 1: its mirror image), each C x H x W, of the stored type.

        Raises:
            UserError: the entry has gone or changed since it was checked.
        """
        path = entry_path(self.folder, self.names[index])
        try:
            with safe_open(path, "pt") as entry:
                count = sum(key.startswith(f"{view}.") for key in entry.keys())  # noqa: SIM118 (it is no dict)
                return tuple(entry.get_tensor(f"{view}.{i}") for i in range(count))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: became unreadable while it was in use ({error}); start again, and it is made "
                            "anew") from None


def entry_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def prepare_cache(
    where: str,
    source: NpyFolder,
    segmenter: Segmenter,
    precision: Precision,
    binding: Binding,
    *,
    num_views: int,
    batch_size: int,
    num_workers: int,
) -> EmbeddingCache | None:
    """Make a split's cache whole: check what is there and encode what is missing, shared among all processes.

    Args:
        where: "off"; "auto", beside the split's images if the disk has room; or a folder, which must have it.
        num_views: 1 for the images, 2 for their mirror images too.
        batch_size: images encoded at once.

    Returns:
        None where there is to be no cache.

    Raises:
        UserError: the folder holds a cache of something else, or has no room, or cannot be written.
    """
    if where == "off":
        return None
    is_auto = where == "auto"
    folder = source.folder / "embeddings" / binding.digest[:16] if is_auto else Path(where) / source.folder.name
    _agree(lambda: _open_folder(folder, binding))
    share = range(distributed.rank(), len(source.items), distributed.world_size())
    pending = _find_pending(folder, source, binding, num_views, share)
    num_pending = sum(map(len, distributed.all_gather(pending)))
    if num_pending:
        views_of = partial(_views, segmenter, precision, DTYPES[binding.stored_in], num_views)
        refusal = distributed.broadcast(
            _announce(folder, views_of, binding, num_pending) if distributed.is_main() else None
        )
        if refusal and not is_auto:
            raise UserError(refusal)
        if refusal:
            if distributed.is_main():
                print(f"{refusal}; going on without a cache")
            return None
        loader = DataLoader(_PendingImages(source, pending), batch_size=batch_size, num_workers=num_workers)
        _write_entries(folder, loader, views_of, binding, total=len(pending))
    distributed.all_gather(None)  # nobody reads before all have written
    return EmbeddingCache(folder, [item.name for item in source.items])


def _agree(main_only: Callable[[], None]) -> None:
    """Run on the main process; its `UserError` is everyone's, so that nobody waits for a process that has stopped."""
    message = None
    if distributed.is_main():
        try:
            main_only()
        except UserError as error:
            message = str(error)
    message = distributed.broadcast(message)
    if message:
        raise UserError(message)


def _open_folder(folder: Path, binding: Binding) -> None:
    """Make the folder, or see that what it holds is of this binding."""
    path = folder / "cache.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = read_json(path) if path.exists() else None
    except OSError as error:
        raise UserError(f"{folder}: no cache can be kept there ({error.strerror}); give --cache_embeddings another "
                        "folder, or off") from None
    except ValueError:
        raise UserError(f"{path}: damaged; remove {folder}, and the cache is made anew") from None
    if held is None:
        if any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty and no cache; give --cache_embeddings another folder")
        with atomic_write(path) as file:
            file.write(json.dumps(asdict(binding), indent=1).encode())
    elif held != (here := asdict(binding)):
        differ = [key for key in here if not isinstance(held, dict) or held.get(key) != here[key]]
        raise UserError(f"{folder}: a cache of other features ({', '.join(differ)} differ); give --cache_embeddings "
                        "another folder, or remove this one")
    remove_temporaries(folder)


def _find_pending(folder: Path, source: NpyFolder, binding: Binding, num_views: int, share: range) -> list[int]:
    """The images of `share` that have no good entry."""
    pending = []
    reasons: dict[str, int] = {}
    for index in tqdm(share, desc="checking the cache", unit="image", leave=False, disable=not distributed.is_main()):
        reason = _fault(entry_path(folder, source.items[index].name), source, index, binding, num_views)
        if reason:
            pending.append(index)
            reasons[reason] = reasons.get(reason, 0) + 1
    reasons.pop("missing", None)
    for reason, count in reasons.items():
        print(f"{folder}: {count} entries are {reason}; these images are encoded again")
    return pending


def _fault(path: Path, source: NpyFolder, index: int, binding: Binding, num_views: int) -> str | None:
    """Why an entry cannot be used, or None."""
    if not path.exists():
        return "missing"
    if not path.is_file():
        return "no regular files"
    try:
        with safe_open(path, "pt") as entry:
            metadata = entry.metadata() or {}
            tensors = {key: entry.get_tensor(key) for key in entry.keys()}  # noqa: SIM118
        if metadata.get("sha256") != _checksum(tensors):
            return "damaged"
    except (OSError, SafetensorError, TypeError):  # the last: of a type that NumPy does not know
        return "damaged"
    if metadata.get("binding") != binding.digest:
        return "of another cache"
    if f"{num_views - 1}.0" not in tensors:
        return "without mirror images"
    if metadata.get("image_file") != _signature(source.image_path(index)) and (
        metadata.get("image_sha256") != _digest(source.read_image(index))
    ):
        return "of images that have changed since"
    return None


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].numpy().data)
    return digest.hexdigest()


def _signature(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _digest(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()


def _announce(folder: Path, views_of: ViewsOf, binding: Binding, num_images: int) -> str | None:
    """Say what is about to be made, by encoding one empty image; returns why it cannot be made, if so."""
    empty = torch.zeros(1, binding.image_size, binding.image_size, 3, dtype=torch.uint8)
    started = time.monotonic()
    (views,) = views_of(empty)
    seconds = num_images * (time.monotonic() - started) / distributed.world_size()
    size = num_images * sum(tensor.nbytes for tensor in views.values())
    free = shutil.disk_usage(folder).free
    if size + ROOM_TO_LEAVE > free:
        return f"{folder}: the cache needs {size / 2**30:.1f} GiB of disk, and {free / 2**30:.1f} are free"
    print(f"encoding {num_images} images once, into {folder}: {size / 2**30:.2f} GiB, {free / 2**30:.0f} are free; "
          f"roughly {max(seconds / 60, 1):.0f} minutes. It may be stopped, and goes on there", flush=True)
    return None


@torch.no_grad()
def _views(
    segmenter: Segmenter, precision: Precision, dtype: torch.dtype, num_views: int, images: Tensor
) -> Iterator[dict[str, Tensor]]:
    """For each image, the tensors of its entry. Images are B x S x S x 3, as stored."""
    segmenter.eval()
    images = precision.images({"image": images})
    views = []
    for view in range(num_views):
        with precision.autocast():
            features = segmenter.encode(images.flip(-1) if view else images)
        views.append([feature.to("cpu", dtype) for feature in features])
    for i in range(len(images)):
        # Clones, as what is saved must not be a view into the batch.
        yield {f"{v}.{k}": feature[i].clone(memory_format=torch.contiguous_format)
               for v, features in enumerate(views) for k, feature in enumerate(features)}  # fmt: skip


class _PendingImages(Dataset[dict[str, Any]]):
    def __init__(self, source: NpyFolder, indexes: list[int]) -> None:
        self.source = source
        self.indexes = indexes

    def __len__(self) -> int:
        return len(self.indexes)

    def __getitem__(self, i: int) -> dict[str, Any]:
        index = self.indexes[i]
        signature = _signature(self.source.image_path(index))  # before reading: a change meanwhile is a change after
        image = self.source.read_image(index)
        return {"image": torch.from_numpy(image), "name": self.source.items[index].name, "image_file": signature,
                "image_sha256": _digest(image)}


def _write_entries(folder: Path, loader: DataLoader, views_of: ViewsOf, binding: Binding, *, total: int) -> None:
    progress = tqdm(total=total, desc=f"encoding into {folder}", unit="image", disable=not distributed.is_main())
    with progress:
        for batch in loader:
            about = zip(batch["name"], batch["image_file"], batch["image_sha256"])
            for (name, image_file, image_sha256), tensors in zip(about, views_of(batch["image"])):
                if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                    raise UserError(f"{name}: its features do not fit into {binding.stored_in}; train with "
                                    "--cache_embeddings off")
                metadata = {
                    "binding": binding.digest,
                    "sha256": _checksum(tensors),
                    "image_file": image_file,
                    "image_sha256": image_sha256,
                }
                with atomic_write(entry_path(folder, name)) as file:
                    file.write(save(tensors, metadata))
                progress.update()
