"""The frozen encoder's features on disk, so that no image is encoded twice.

A cache is a folder: `cache.json`, which says what all its entries depend on, and for each split a folder with one file
an image in the safetensors format, which holds tensors and strings and can run nothing. An entry has the features of
the views of its image (`utils.data.augment`), in float16 unless the user asks for float32, and is read memory-mapped:
what training touches of it is in the page cache, not in the process. In float16, the outputs of encoder blocks are
reduced (`utils.model.feature_pca`), by a projection that is fitted once and kept in the folder for all its splits.

Entries are written whole or not at all, so a run that is stopped goes on where it was. Before use each entry is
checked: its checksum against damage, and the picture it was made of by length, time of modification and path; only if
these differ is the picture itself read, and its SHA-256 compared. What fails is encoded again, and said.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import shlex
import shutil
import signal
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from utils.data.augment import fixed_view
from utils.data.datasets import EvaluationDataset, NpyFolder, TrainingDataset
from utils.data.frame import ImageSize
from utils.data.loaders import Loader, require_shared_memory, sample_bytes
from utils.model.checkpoint import ModelInfo
from utils.model.feature_pca import FIT_IMAGES, KEPT, Reduction
from utils.model.segmenter import Features, Segmenter
from utils.runtime import distributed
from utils.runtime.device import Precision
from utils.runtime.errors import Interrupted, LostWorkerError, UserError
from utils.runtime.files import (
    atomic_write,
    cannot_be_read,
    exists,
    read_json,
    remove_temporaries,
    require_readable,
    status,
)

FORMAT_VERSION = 2
DTYPES = {"float16": torch.float16, "float32": torch.float32}
ROOM_TO_LEAVE = 1 << 30  # a disk that is filled to the brim takes no checkpoint any more
SECONDS_OF_A_ROUND = 60.0  # that processes work between two looks at each other
LOCK = ".lock"
SECONDS_TO_LOOK_AGAIN = 2.0  # for whether another run has finished


@dataclass(frozen=True)
class Binding:
    """What features depend on besides the picture; a cache of another binding is never read."""

    sam_sha256: str
    prompt_mode: str  # decides which features there are
    image_size: ImageSize
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


@dataclass(frozen=True)
class Request:
    """A split that is wanted in a cache."""

    source: NpyFolder
    num_views: int  # of each image: 1 for the image itself; see `utils.data.augment.fixed_view`
    passes: int  # how often each image would be encoded without a cache

    @property
    def is_cheap(self) -> bool:
        """Whether a cache would spare no encoding."""
        return self.passes <= self.num_views


class EmbeddingCache:
    """A split's entries, which were found whole when the cache was prepared."""

    def __init__(
        self, folder: Path, entries: list[tuple[str, str]], identity: str, reduction: Reduction | None
    ) -> None:
        """
        Args:
            entries: name and SHA-256 of each image.
        """
        self.folder = folder
        self.entries = entries
        self.identity = identity
        self.reduction = reduction  # that the entries went through

    def read(self, index: int, view: int = 0) -> tuple[Tensor, ...]:
        """What is stored of a view's features, for `Segmenter.restore`, without the batch.

        Raises:
            UserError: the entry has gone or changed since it was checked.
        """
        name, picture = self.entries[index]
        path = entry_path(self.folder, name)
        try:
            with safe_open(path, "pt") as entry:
                count = sum(key.startswith(f"{view}.") for key in entry.keys())  # noqa: SIM118 (it is no dict)
                features = tuple(entry.get_tensor(f"{view}.{i}") for i in range(count))
                metadata = entry.metadata() or {}
                # Of the picture too: another data set may have images of the same names.
                if count and (metadata.get("binding"), metadata.get("image_sha256")) == (self.identity, picture):
                    return features
            raise UserError(f"{path}: was replaced while it was in use; start again, and it is made anew")
        except (OSError, SafetensorError) as error:
            if exists(path):
                require_readable(path)
            raise UserError(
                f"{path}: became unreadable while it was in use ({error}); start again, and it is made anew"
            ) from None


def entry_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def prepare_caches(
    where: str,
    requests: list[Request],
    segmenter: Segmenter,
    precision: Precision,
    binding: Binding,
    *,
    batch_size: int,
    num_workers: int,
) -> list[EmbeddingCache | None]:
    """Make the splits' caches whole: check what is there and encode what is missing, shared among all processes.

    Args:
        where: "off"; "auto", beside the first split, where a cache that is whole is read, and one written or completed
            if there are more passes than views and the disk has room; or a folder, which must have room.
        requests: of these, the first is what a projection is fitted to. Without a cache of it there is none at all.
        batch_size: images encoded at once.

    Returns:
        For each request its cache, or None where there is to be none.

    Raises:
        UserError: the folder holds a cache of something else, or has no room, or cannot be written.
    """
    nothing: list[EmbeddingCache | None] = [None] * len(requests)
    is_auto = where == "auto"
    if where == "off":
        return nothing
    first = requests[0].source.folder.resolve()
    root = first.parent / "embeddings" / binding.digest[:16] if is_auto else Path(where)
    # All processes must come to the same end, so that the main one looks. Nor should another machine ask for what is
    # not yet there: over NFS, it would for some time be answered out of its own memory.
    if is_auto and requests[0].is_cheap and distributed.on_main(lambda: not exists(root)):
        if requests[0].passes > 1:
            distributed.say(
                f"no cache of features: its {requests[0].num_views} views of an image take as many "
                f"encodings as {requests[0].passes} epochs, or more"
            )
        return nothing
    try:
        distributed.on_main(lambda: _open_folder(root, binding, requests))
        _require_one_disk(root)
        with _alone(root) as is_alone:
            distributed.on_main(lambda: _claim(root, binding))
            writer = _Writer(
                root, requests[0].source, segmenter, precision, binding, batch_size, num_workers, is_auto, is_alone
            )
            caches = [writer.prepare(requests[0])]
            # Without the first, all images are encoded on and on: the others' would spare little.
            return caches + [writer.prepare(request) if caches[0] else None for request in requests[1:]]
    except UserError as error:
        # Memory that fails the loader now would do so in training too, and what is encoded by then need not be again.
        if not is_auto or isinstance(error, LostWorkerError):
            raise
        distributed.say(f"{error}; going on without a cache")
        return nothing


def _require_one_disk(root: Path) -> None:
    """
    Raises:
        UserError: not every process sees what the main one writes, as they are on machines without a common disk.
    """
    token = f".{secrets.token_hex(8)}.tmp"  # never seen before, so that no machine remembers that it is not there

    def leave() -> str:
        try:
            (root / token).touch()
        except OSError as error:  # a cache that may only be read can be whole on each machine
            if not exists(root / "cache.json"):
                raise _no_place(root, error) from None
            return "cache.json"
        return token

    if distributed.world_size() == 1:
        return
    name = distributed.on_main(leave)
    seen = distributed.all_gather(os.path.exists(root / name))
    if name == token:
        with suppress(OSError):
            (root / token).unlink()
    if not all(seen):
        raise UserError(
            f"{root}: process {seen.index(False)} of {len(seen)} does not see what process 0 writes there; "
            "give --cache_embeddings a folder on a disk that all machines share, or off"
        )


def _open_folder(root: Path, binding: Binding, requests: list[Request]) -> None:
    """Make the folder, or see that what it holds is of this binding."""
    splits: dict[str, Path] = {}
    for request in requests:
        folder = request.source.folder.resolve()
        if splits.setdefault(folder.name, folder) != folder:
            raise UserError(
                f"{folder}: has the name of {splits[folder.name]}, and one cache cannot hold both; rename "
                "one, or give --cache_embeddings off"
            )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_place(root, error) from None
    _is_claimed(root, binding)


def _no_place(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: no cache can be kept there ({error.strerror}); give --cache_embeddings another folder, or off"
    )


def _is_claimed(root: Path, binding: Binding) -> bool:
    """Whether the folder is a cache of this binding, and not empty.

    Raises:
        UserError: it is something else.
    """
    path = root / "cache.json"
    try:
        # What a run that was killed left, and another's lock, are nothing that anybody put there.
        found = [name.name for name in root.iterdir() if name.name != LOCK and not name.match(".*.tmp")]
        held = read_json(path, f"remove {root} to create the cache anew") if path.name in found else None
    except OSError as error:
        raise _no_place(root, error) from None
    if path.name not in found:
        if found:
            raise UserError(f"{root}: is not empty and no cache; give --cache_embeddings another folder")
        return False
    if held != (here := asdict(binding)):
        differ = [key for key in here if not isinstance(held, dict) or held.get(key) != here[key]]
        raise UserError(
            f"{root}: a cache of other features ({', '.join(differ)} differ); give --cache_embeddings "
            "another folder, or remove this one"
        )
    return True


def _claim(root: Path, binding: Binding) -> None:
    """Say in the folder what it is a cache of; only who is alone there may."""
    if not _is_claimed(root, binding):
        with atomic_write(root / "cache.json") as file:
            file.write(json.dumps(asdict(binding), indent=1).encode())


@contextmanager
def _alone(root: Path) -> Iterator[bool]:
    """A context in which no other run writes into the cache: who comes second waits, and finds it whole.

    Its value is whether that is certain, in the main process: not where files cannot be written or locked.
    """
    handle = None
    if distributed.is_main():
        with suppress(OSError):  # a cache that may only be read is written by nobody
            # A file, opened for writing: over NFS, there is no exclusive lock of anything else.
            handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        waiting = False
        # Asked again and again, as no process may wait for another longer than the process group's timeout.
        while (has_lock := distributed.broadcast(_lock(handle))) is None:
            if not waiting:
                distributed.say(f"{root}: another run is writing this cache; waiting for it")
            waiting = True
            time.sleep(SECONDS_TO_LOOK_AGAIN)
        yield has_lock
    finally:
        if handle is not None:
            os.close(handle)  # and with it goes the lock, as it does with the process


def _lock(handle: int | None) -> bool | None:
    """Whether the lock is held now; None if another process holds it, False if there can be none."""
    if handle is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False  # a file system without locks: nothing is lost but the second run's time
    return True


class _Writer:
    """Makes one split's cache after the other whole, in the same folder and with the same projection."""

    def __init__(
        self,
        root: Path,
        fitted_to: NpyFolder,
        segmenter: Segmenter,
        precision: Precision,
        binding: Binding,
        batch_size: int,
        num_workers: int,
        is_auto: bool,
        is_alone: bool,
    ) -> None:
        self.root, self.segmenter, self.precision, self.binding = root, segmenter, precision, binding
        self.batch_size, self.num_workers = batch_size, num_workers
        self.is_auto, self.is_alone = is_auto, is_alone
        self.reduces = bool(segmenter.feature_blocks) and binding.stored_in != "float32"
        self.fitted_to = fitted_to
        # Entries are bound to the identity.
        self.reduction, self.identity = distributed.on_main(self._read_reduction)

    def _read_reduction(self) -> tuple[Reduction | None, str]:
        """The projection, if there is to be one and the cache has it, and the identity of a cache that has it."""
        path = self.root / "projection.safetensors"
        if not self.reduces or not exists(path):
            return None, self.binding.digest
        num_blocks = len(self.segmenter.feature_blocks)
        channels = num_blocks * self.segmenter.sam.image_encoder.embed_dim
        shapes = {"mean": (channels,), "basis": (math.floor(channels * KEPT), channels)}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            known = {"binding": self.binding.digest, "sha256": _checksum(tensors)}
            if metadata == known and {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes:
                reduction = Reduction(tensors["mean"].float(), tensors["basis"].float(), num_blocks)
                return reduction, hashlib.sha256("{binding} {sha256}".format(**known).encode()).hexdigest()
        except (OSError, SafetensorError, TypeError):
            require_readable(path)
        distributed.say(
            f"{path}: damaged, or of another cache; it is made anew, and so are the entries that went through it"
        )
        return None, self.binding.digest

    def prepare(self, request: Request) -> EmbeddingCache | None:
        source = request.source
        folder = self.root / source.folder.resolve().name
        share = range(distributed.rank(), len(source.items), distributed.world_size())
        pending: list[int] = []
        pictures: dict[int, str] = {}
        _in_rounds(_find_pending(folder, request, self.identity, share, pending, pictures))
        num_pending = sum(distributed.all_gather(len(pending)))
        if num_pending and self.is_auto and request.is_cheap:
            if exists(folder):
                distributed.say(
                    f"{folder}: not read, as {num_pending} of {len(source.items)} images have no good "
                    f"entry; to have it completed, give --cache_embeddings {shlex.quote(str(self.root))}"
                )
            return None
        try:
            if num_pending:
                distributed.on_main(lambda: self._announce(folder, request, num_pending))
                if self.reduces and self.reduction is None:
                    distributed.on_main(self._fit)
                    self.reduction, self.identity = distributed.on_main(self._read_reduction)
                _in_rounds(self._write(folder, request, pending, pictures))  # nobody reads before all have written
        except UserError as error:
            if not self.is_auto or isinstance(error, LostWorkerError):
                raise
            distributed.say(f"{error}; going on without a cache")
            return None
        everywhere = {index: sha for share in distributed.all_gather(pictures) for index, sha in share.items()}
        entries = [(item.name, everywhere[index]) for index, item in enumerate(source.items)]
        return EmbeddingCache(folder, entries, self.identity, self.reduction)

    def _announce(self, folder: Path, request: Request, num_images: int) -> None:
        """Say what is about to be made, by encoding one empty image.

        Raises:
            UserError: there is no room for it, on disk or in shared memory, or no folder can be made.
        """
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise _no_place(folder, error) from None
        if self.is_alone:
            remove_temporaries(self.root)
        started = time.monotonic()
        features = self._encode(torch.zeros(1, *request.source.frame_size, 3, dtype=torch.uint8))
        seconds = time.monotonic() - started
        seconds *= num_images * request.num_views / distributed.world_size() + FIT_IMAGES * (
            self.reduces and self.reduction is None
        )
        stored = self._stored(features, self.reduction or (Reduction.blank(features) if self.reduces else None))
        # Training hands over features of as many images, in place of views of pixels or beside them.
        pixels = sample_bytes(torch.from_numpy(request.source.read_image(0)))
        of_training = sample_bytes(stored) + (pixels if self.segmenter.takes_pixels else 0)
        of_batch = max(self.batch_size * of_training, max(self.batch_size, request.num_views) * pixels)
        require_shared_memory(of_batch, self.num_workers)
        needed = num_images * request.num_views * sum(tensor.nbytes for tensor in stored)
        free = shutil.disk_usage(folder).free
        if needed + ROOM_TO_LEAVE > free:
            raise UserError(
                f"{folder}: the cache needs {needed / 2**30:.1f} GiB of disk, and {free / 2**30:.1f} are free"
            )
        views = f", {request.num_views} views each" if request.num_views > 1 else ""
        distributed.say(
            f"encoding {num_images} images once{views}, into {folder}: {needed / 2**20:,.0f} MiB of "
            f"{free / 2**30:,.0f} GiB that are free; roughly {max(seconds / 60, 1):.0f} min. It may be "
            "stopped, and goes on there"
        )

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Features:
        """B x H x W x 3, as stored -> features, on the device."""
        self.segmenter.eval()
        with self.precision.autocast():
            return self.segmenter.encode(self.precision.images(images))

    def _stored(self, features: Features, reduction: Reduction | None) -> list[Tensor]:
        """What an entry has of features, still in batches."""
        dtype = DTYPES[self.binding.stored_in]
        if reduction is None:
            return [feature.to("cpu", dtype) for feature in features]
        embeddings, *reduced = reduction.to(features[0].device).reduce(features)
        return [embeddings.to("cpu", dtype), *(part.cpu() for part in reduced)]

    def _fit(self) -> None:
        """Fit the projection to some images of the first split, evenly spaced, and keep it. One process alone does so,
        image by image, so that all have the same; who is stopped after it finds it there."""
        source = self.fitted_to
        indexes = np.unique(np.linspace(0, len(source.items) - 1, FIT_IMAGES).round().astype(int)).tolist()

        def features_of(index: int) -> Features:
            features = self._encode(torch.from_numpy(source.read_image(index))[None])
            self._require_finite(source.items[index].name, features)
            return features

        with tqdm(indexes, desc="fitting the projection of encoder blocks", unit="image") as progress:
            reduction = Reduction.fit(map(features_of, progress))
        tensors = {"mean": reduction.mean, "basis": reduction.basis.contiguous()}
        metadata = {"binding": self.binding.digest, "sha256": _checksum(tensors)}
        with atomic_write(self.root / "projection.safetensors") as file:
            file.write(save(tensors, metadata))

    def _write(
        self, folder: Path, request: Request, pending: list[int], pictures: dict[int, str]
    ) -> Generator[None, None, None]:
        """Write entries, batch after batch, and the SHA-256 of their images into `pictures`."""
        try:
            folder.mkdir(exist_ok=True)  # it is there, which other machines may not know yet
        except OSError as error:
            raise _no_place(folder, error) from None
        loader = Loader(
            _PendingImages(request, pending, folder),
            batch_size=max(1, self.batch_size // request.num_views),  # images of which all views are held
            num_workers=self.num_workers,
        )
        progress = tqdm(
            total=len(pending), desc=f"encoding into {folder}", unit="image", disable=not distributed.is_main()
        )
        with progress:
            for batch in loader:
                views = [
                    self._stored(self._encode(batch["views"][:, v]), self.reduction) for v in range(request.num_views)
                ]
                for i, name in enumerate(batch["name"]):
                    # Clones, as what is saved must not be a view into the batch.
                    tensors = {
                        f"{v}.{k}": tensor[i].clone(memory_format=torch.contiguous_format)
                        for v, stored in enumerate(views)
                        for k, tensor in enumerate(stored)
                    }
                    about = {key: batch[key][i] for key in ("image_file", "image_sha256", "views_are")}
                    self._write_entry(folder, name, tensors, about)
                    pictures[int(batch["index"][i])] = about["image_sha256"]
                    progress.update()
                yield

    def _write_entry(self, folder: Path, name: str, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        self._require_finite(name, tensors.values())
        metadata = {"binding": self.identity, "sha256": _checksum(tensors), **about}
        with atomic_write(entry_path(folder, name)) as file:
            file.write(save(tensors, metadata))

    def _require_finite(self, name: str, tensors: Iterable[Tensor]) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise UserError(
                f"{name}: its features are not finite in {self.binding.stored_in}; check the image, or "
                "give --cache_dtype float32, or --cache_embeddings off"
            )


def _in_rounds(work: Generator[None, None, None]) -> None:
    """Do a process's work, of many pieces, while the others do theirs: who has done all of it waits for the slowest,
    but never longer than for a round, which is far below the process group's timeout.

    Raises:
        UserError: what the work of one process raised, in all of them.
    """
    while True:
        outcomes = distributed.all_gather(_round(work))
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                work.close()
                raise outcome
        if all(outcomes):
            return


def _round(work: Generator[None, None, None]) -> bool | UserError:
    """Go on for a while; whether all is done, or why it cannot be.

    Raises:
        Interrupted: the launcher has ended.
    """
    started = time.monotonic()
    try:
        for _ in work:
            if distributed.launcher_has_ended():
                raise Interrupted("the launcher has ended; start again, and the cache is gone on with", signal.SIGTERM)
            if time.monotonic() - started > SECONDS_OF_A_ROUND:
                return False
    except UserError as error:
        return error
    return True


def _find_pending(
    folder: Path, request: Request, identity: str, share: range, pending: list[int], pictures: dict[int, str]
) -> Generator[None, None, None]:
    """Put the images of `share` without a good entry into `pending`, the SHA-256 of the others into `pictures`."""
    reasons: dict[str, int] = {}
    for index in tqdm(share, desc="checking the cache", unit="image", leave=False, disable=not distributed.is_main()):
        reason, picture = _check(entry_path(folder, request.source.items[index].name), request, index, identity)
        if picture:
            pictures[index] = picture
        else:
            pending.append(index)
            reasons[reason] = reasons.get(reason, 0) + 1
        yield
    reasons.pop("missing", None)
    for reason, count in reasons.items():
        print(f"{folder}: {count} of {len(share)} entries are {reason}")


def _check(path: Path, request: Request, index: int, identity: str) -> tuple[str, str]:
    """Why an entry cannot be used, or the SHA-256 of its image; the other is empty."""
    found = status(path)
    if not found:
        return "missing", ""
    if not S_ISREG(found.st_mode):
        return "no regular files", ""
    source = request.source
    try:
        with safe_open(path, "pt") as entry:
            metadata = entry.metadata() or {}
            tensors = {key: entry.get_tensor(key) for key in entry.keys()}  # noqa: SIM118
        if metadata.get("sha256") != _checksum(tensors):
            return "damaged", ""
        views = json.loads(metadata.get("views_are", ""))
    except (OSError, SafetensorError, TypeError, ValueError):  # the last two: of a type unknown to NumPy, or no JSON
        require_readable(path)
        return "damaged", ""
    if metadata.get("binding") != identity:
        return "of another cache", ""
    expected = json.loads(_views(request, index))
    if not isinstance(views, list) or views[: len(expected)] != expected:
        return "without the views that are asked for", ""
    picture = metadata.get("image_sha256", "")
    signature = _signature(source.image_path(index), path.parent)
    of_older_versions = signature.rsplit(" ", 1)[0]  # which recorded no path
    is_same_file = metadata.get("image_file") in (signature, of_older_versions)
    if not picture or not (is_same_file or picture == _digest(source.read_image(index))):
        return "of images that have changed since", ""
    return "", picture


def _views(request: Request, index: int) -> str:
    """What an entry says of its views, so that none is taken for another one after the way of drawing has changed."""
    name, size = request.source.items[index].name, request.source.fitted_size(index)
    views = [asdict(fixed_view(name, number)) for number in range(request.num_views)]
    if size != request.source.frame_size:
        views = [{**view, "size": list(size)} for view in views]
    return json.dumps(views)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].numpy().data)
    return digest.hexdigest()


def _signature(path: Path, folder: Path) -> str:
    """Bytes, time of modification and path of a picture; seen from the cache's folder, as both may move together."""
    try:
        stat = path.stat()
    except OSError as error:
        raise cannot_be_read(path, error) from None
    way = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return f"{stat.st_size} {stat.st_mtime_ns} {os.fsencode(way).hex()}"  # plain text, whatever is in a path


def _digest(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()


class _PendingImages(Dataset[dict[str, Any]]):
    """views: K x H x W x 3, as stored; and what an entry says of its image."""

    def __init__(self, request: Request, indexes: list[int], folder: Path) -> None:
        self.request = request
        self.indexes = indexes
        self.folder = folder

    def __len__(self) -> int:
        return len(self.indexes)

    def __getitem__(self, i: int) -> dict[str, Any]:
        index, source, num_views = self.indexes[i], self.request.source, self.request.num_views
        # Before reading: a change meanwhile is a change after.
        signature = _signature(source.image_path(index), self.folder)
        image, name, size = source.read_image(index), source.items[index].name, source.fitted_size(index)
        return {
            "views": torch.stack([fixed_view(name, number).image(image, size) for number in range(num_views)]),
            "index": index,
            "name": name,
            "image_file": signature,
            "image_sha256": _digest(image),
            "views_are": _views(self.request, index),
        }


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
