"""Encodes what a cache lacks, so that no image is encoded twice.

Features are stored in float16 unless the user asks for float32. In float16, the outputs of encoder blocks are reduced
by one `FeaturePCA`, which is fitted once for all splits of the cache. An entry is written completely or not at all, so
the run after one that was stopped resumes.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.cache import reader
from utils.cache.keys import DTYPES, CacheKey, Request, image_digest
from utils.cache.lock import exclusive, in_rounds, no_cache_there, require_shared_disk
from utils.cache.reader import Checked, EmbeddingCache
from utils.data.augment import fixed_view
from utils.data.datasets import EvaluationDataset, NpyFolder, TrainingDataset
from utils.data.loaders import Loader, require_shared_memory, sample_bytes
from utils.model.checkpoint import ModelInfo
from utils.model.feature_pca import FIT_IMAGES, FeaturePCA
from utils.model.segmenter import Features, Segmenter
from utils.model.tensor_files import write_tensors
from utils.runtime import distributed
from utils.runtime.device import Precision
from utils.runtime.errors import LostWorkerError, UserError
from utils.runtime.files import atomic_write, exists, remove_temporaries
from utils.runtime.progress import about, progress_bar

FREE_GIB = 1  # left on the disk for checkpoints


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
    """Encode the images of data sets once, if that is wanted and saves time, and let the data sets read the features.

    Args:
        passes: how often the run would encode each image of a data set. The first one decides where "auto" is.
        where, dtype: --cache_embeddings and --cache_dtype.
        batch_size, num_workers: for encoding.

    Returns:
        The dtype of the first data set's stored features, None if it reads images.

    Raises:
        UserError: as `prepare_caches`.
    """
    requests = [Request(dataset.source, dataset.num_views, count) for dataset, count in passes.items()]
    key = CacheKey.of(segmenter, info, precision, dtype)
    caches = prepare_caches(where, requests, segmenter, precision, key, batch_size=batch_size, num_workers=num_workers)
    for dataset, cache in zip(passes, caches):
        dataset.use(cache, takes_pixels=segmenter.takes_pixels)
        if cache:
            segmenter.feature_pca = cache.feature_pca
            distributed.say(f"{dataset.source.folder}: features are read from {cache.folder}")
    segmenter.to(precision.device)  # for feature_pca
    if all(caches):
        segmenter.sam.image_encoder.cpu()  # no longer used: frees GPU memory
    return dtype if caches[0] else None


def prepare_caches(
    where: str,
    requests: list[Request],
    segmenter: Segmenter,
    precision: Precision,
    key: CacheKey,
    *,
    batch_size: int,
    num_workers: int,
) -> list[EmbeddingCache | None]:
    """Complete the caches of splits: check their entries and encode what is missing, shared among all processes.

    Args:
        where: "off"; a folder; or "auto", a folder beside the first split. "auto" reads a complete cache. It writes to
            a cache only if that saves encoding and the disk has room.
        requests: without a cache of the first one, whose images `FeaturePCA` is fitted to, there is none of the others.
        batch_size: images encoded at once.

    Returns:
        The cache of each request, or None.

    Raises:
        UserError: the folder holds something else, cannot be written or has no room. "auto" only prints that.
    """
    caches: list[EmbeddingCache | None] = [None] * len(requests)
    if where == "off":
        return caches
    first, is_auto = requests[0], where == "auto"
    folders = {request.source.folder.resolve() for request in requests}
    root = first.source.folder.resolve().parent / "embeddings" / key.digest[:16] if is_auto else Path(where)
    # Only the main process looks: NFS clients remember for a while that a folder is missing.
    if is_auto and not first.saves_encoding and distributed.on_main(lambda: not exists(root)):
        if first.passes > 1:
            distributed.say(
                f"no cache of features: to encode {first.num_views} views of each image costs no less than to encode "
                f"the images of {first.passes} epochs"
            )
        return caches
    try:
        if len({folder.name for folder in folders}) < len(folders):
            raise UserError(
                f"{' and '.join(map(str, sorted(folders)))} have the same name, so one cache cannot hold both; "
                "rename one, or set --cache_embeddings to off"
            )
        distributed.on_main(lambda: _make_folder(root))
        distributed.on_main(lambda: reader.is_cache(root, key))
        require_shared_disk(root, reader.KEY_FILE)
        with exclusive(root) as has_lock:
            distributed.on_main(lambda: _begin(root, key, has_lock))
            writer = CacheWriter(root, segmenter, precision, key, batch_size, num_workers)
            for i, request in enumerate(requests):
                caches[i] = writer.prepare(request, may_write=not is_auto or request.saves_encoding)
                if not caches[0]:
                    break
    except UserError as error:
        # A lost worker would be lost in training too. What is encoded already is kept.
        if not is_auto or isinstance(error, LostWorkerError):
            raise
        distributed.say(f"{error}; continuing without a cache")
    return caches


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise no_cache_there(folder, error) from None


def _begin(root: Path, key: CacheKey, has_lock: bool) -> None:
    """Write the key of a new cache, and remove temporary files of killed runs."""
    if not reader.is_cache(root, key):
        with atomic_write(root / reader.KEY_FILE) as file:
            file.write(json.dumps(asdict(key), indent=1).encode())
    if has_lock:
        remove_temporaries(root)


@dataclass
class CacheWriter:
    """Completes the splits of a cache, one after the other."""

    root: Path
    segmenter: Segmenter
    precision: Precision
    key: CacheKey
    batch_size: int
    num_workers: int

    def __post_init__(self) -> None:
        self.needs_pca = bool(self.segmenter.feature_blocks) and self.key.stored_in != "float32"
        self._read_feature_pca()

    def _read_feature_pca(self) -> None:
        self.feature_pca, self.identity = None, self.key.digest
        if self.needs_pca:
            read = distributed.on_main(lambda: reader.read_feature_pca(self.root, self.key, self.segmenter))
            self.feature_pca, self.identity = read

    def prepare(self, request: Request, *, may_write: bool) -> EmbeddingCache | None:
        """The complete cache of a split; None if entries are missing and may not be written."""
        items, folder = request.source.items, self.root / request.source.folder.resolve().name
        share = range(distributed.rank(), len(items), distributed.world_size())
        checked = in_rounds(reader.check_entries(folder, request, self.identity, share))
        pending = [entry.image for entry in checked if entry.problem]
        everywhere = [entry for part in distributed.all_gather(checked) for entry in part]
        problems = Counter(entry.problem for entry in everywhere if entry.problem)
        for problem, count in problems.items():
            if problem != reader.MISSING:
                distributed.say(f"{folder}: {count} of {len(items)} entries are {problem}")
        if problems and not may_write:
            if distributed.on_main(lambda: exists(folder)):
                distributed.say(
                    f"{folder}: not read, as {problems.total()} of {len(items)} images have no valid entry; "
                    f"to complete it, set --cache_embeddings {shlex.quote(str(self.root))}"
                )
            return None
        if problems:
            distributed.on_main(lambda: self._announce(folder, request, problems.total()))
            if self.needs_pca and not self.feature_pca:
                distributed.on_main(lambda: self._fit(request.source))
                self._read_feature_pca()
            written = in_rounds(self._write(folder, request, pending))
            everywhere += [entry for part in distributed.all_gather(written) for entry in part]
        digests = {entry.image: entry.image_sha256 for entry in everywhere}
        entries = [(item.name, digests[index]) for index, item in enumerate(items)]
        return EmbeddingCache(folder, entries, self.identity, self.feature_pca)

    def _announce(self, folder: Path, request: Request, num_images: int) -> None:
        """Encode an empty image, to see whether there is room for all of them and how long it takes.

        Raises:
            UserError: the disk or shared memory has no room, or the folder cannot be made.
        """
        _make_folder(folder)
        blank = torch.zeros(1, *request.source.frame_size, 3, dtype=torch.uint8)
        features, pca = self._encode(blank), self.feature_pca
        needs_fit = self.needs_pca and not pca
        if needs_fit:
            pca = FeaturePCA.blank(features)
        started = time.monotonic()  # only now: a device's first pass takes seconds
        stored = self._stored(self._encode(blank), pca)
        seconds_a_view = time.monotonic() - started
        pixels = sample_bytes(torch.from_numpy(request.source.read_image(0)))
        # Training loads features of as many images, with or without their pixels.
        for_training = sample_bytes(stored) + (pixels if self.segmenter.takes_pixels else 0)
        of_batch = max(self.batch_size * for_training, max(self.batch_size, request.num_views) * pixels)
        require_shared_memory(of_batch, self.num_workers)
        needed = num_images * request.num_views * sum(tensor.nbytes for tensor in stored) / 2**30
        free = shutil.disk_usage(folder).free / 2**30
        if needed + FREE_GIB > free:
            raise UserError(
                f"{folder}: the cache needs {needed:.1f} GiB of disk space and {FREE_GIB} GiB to spare, but "
                f"{free:.1f} GiB are free; make room, or set --cache_embeddings to another folder, or to off"
            )
        an_image = self._seconds_an_image(folder, request, stored, seconds_a_view)
        seconds = an_image * num_images / distributed.world_size() + (FIT_IMAGES * seconds_a_view if needs_fit else 0)
        views = f", {request.num_views} views each" if request.num_views > 1 else ""
        distributed.say(
            f"encoding {num_images} images once{views}, into {folder}: {needed * 1024:,.0f} MiB of {free:,.0f} GiB "
            f"free, {about(seconds)}. If stopped, the next run resumes it"
        )

    def _seconds_an_image(self, folder: Path, request: Request, stored: list[Tensor], seconds_a_view: float) -> float:
        """What an image costs one process: it is read, which loader processes do meanwhile, encoded, and written."""
        started = time.monotonic()
        _Pending(request, [0], folder)[0]
        to_read = time.monotonic() - started
        started = time.monotonic()
        sample = folder / f".estimate.{os.getpid()}.tmp"
        parts = enumerate(stored * request.num_views)
        write_tensors(sample, {str(k): part.clone(memory_format=torch.contiguous_format) for k, part in parts}, {})
        sample.unlink()
        to_make = request.num_views * seconds_a_view + time.monotonic() - started
        return max(to_make, to_read / self.num_workers) if self.num_workers else to_make + to_read

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Features:
        """B x H x W x 3, as stored -> features on the device."""
        self.segmenter.eval()
        with self.precision.autocast():
            return self.segmenter.encode(self.precision.images(images))

    def _stored(self, features: Features, pca: FeaturePCA | None) -> list[Tensor]:
        """What entries hold of a batch of features, on the CPU."""
        dtype = DTYPES[self.key.stored_in]
        if pca is None:
            return [feature.to("cpu", dtype) for feature in features]
        embeddings, *reduced = pca.to(features[0].device).reduce(features)
        return [embeddings.to("cpu", dtype), *(part.cpu() for part in reduced)]

    def _fit(self, source: NpyFolder) -> None:
        """Fit `FeaturePCA` to evenly spaced images and write it. One process does that, image by image, so that all
        processes, and a run that resumes, have the same."""
        indexes = np.unique(np.linspace(0, len(source.items) - 1, FIT_IMAGES).round().astype(int)).tolist()

        def features_of(index: int) -> Features:
            features = self._encode(torch.from_numpy(source.read_image(index))[None])
            self._require_finite(source.items[index].name, features)
            return features

        with progress_bar(indexes, "fitting the PCA of encoder blocks", unit="image") as progress:
            pca = FeaturePCA.fit(map(features_of, progress))
        tensors = {"mean": pca.mean, "basis": pca.basis.contiguous()}
        write_tensors(self.root / reader.PCA_FILE, tensors, {"binding": self.key.digest})

    def _write(self, folder: Path, request: Request, pending: list[int]) -> Generator[Checked, None, None]:
        """Encode images and write their entries."""
        _make_folder(folder)  # the main process has done so, which other machines may not know yet
        num_images = max(1, self.batch_size // request.num_views)  # all views of an image are in one batch
        loader = Loader(_Pending(request, pending, folder), batch_size=num_images, num_workers=self.num_workers)
        is_quiet = not distributed.is_main()
        progress = progress_bar(desc=f"encoding {folder.name}", total=len(pending), unit="image", disable=is_quiet)
        with progress:
            for images, indexes, metadata in loader:
                views = images.shape[1]
                parts = images.flatten(0, 1).split(self.batch_size)
                stored = [
                    torch.cat(p) for p in zip(*(self._stored(self._encode(part), self.feature_pca) for part in parts))
                ]
                for i, index in enumerate(indexes.tolist()):
                    tensors = {
                        # safetensors saves no views of tensors
                        f"{v}.{k}": tensor[i * views + v].clone(memory_format=torch.contiguous_format)
                        for v in range(views)
                        for k, tensor in enumerate(stored)
                    }
                    name = request.source.items[index].name
                    self._require_finite(name, tensors.values())
                    of_image = {key: values[i] for key, values in metadata.items()}
                    write_tensors(reader.entry_path(folder, name), tensors, {"binding": self.identity, **of_image})
                    progress.update()
                    yield Checked(index, "", of_image["image_sha256"])

    def _require_finite(self, name: str, tensors: Iterable[Tensor]) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise UserError(
                f"{name}: its features are not finite in {self.key.stored_in}; check the image, or set --cache_dtype "
                "to float32, or --cache_embeddings to off"
            )


@dataclass(frozen=True)
class _Pending(Dataset[tuple[Tensor, int, dict[str, str]]]):
    """The images to encode: their views, K x H x W x 3 as stored, index, and what their entries record."""

    request: Request
    indexes: list[int]
    folder: Path

    def __len__(self) -> int:
        return len(self.indexes)

    def __getitem__(self, i: int) -> tuple[Tensor, int, dict[str, str]]:
        index, source = self.indexes[i], self.request.source
        signature = self.request.signature(index, self.folder)  # before the image is read, to notice a later change
        image, name, size = source.read_image(index), source.items[index].name, source.fitted_size(index)
        views = torch.stack([fixed_view(name, number).image(image, size) for number in range(self.request.num_views)])
        views_are = self.request.views(index)
        return views, index, {"image_file": signature, "image_sha256": image_digest(image), "views_are": views_are}
