"""Reads features from a cache, and checks what is in it.

An entry holds the features of the views of one image. It is read memory-mapped, so it takes page cache instead of the
process's memory. Before a run uses a split, each entry is checked: its checksum, its views and its image. An image is
unchanged if size, modification time and path of its file are; only if they differ is it read and its SHA-256 compared.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from utils.cache.keys import CacheKey, Request, image_digest
from utils.cache.lock import LOCK, no_cache_there
from utils.model.feature_pca import KEPT, FeaturePCA
from utils.model.segmenter import Segmenter
from utils.model.tensor_files import read_tensors
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import exists, read_json, require_readable, status

KEY_FILE = "cache.json"
PCA_FILE = "projection.safetensors"
MISSING = "missing"


@dataclass(frozen=True)
class EmbeddingCache:
    """The entries of a split, which were all valid when the run began."""

    folder: Path
    entries: list[tuple[str, str]]  # name and SHA-256 of each image
    identity: str  # of the cache, recorded in each entry
    feature_pca: FeaturePCA | None  # that reduced the entries

    def read(self, index: int, view: int = 0) -> tuple[Tensor, ...]:
        """The stored features of a view, without the batch dimension, for `Segmenter.restore`.

        Raises:
            UserError: the entry is missing, or has changed since it was checked.
        """
        name, image_sha256 = self.entries[index]
        path = entry_path(self.folder, name)
        try:
            with safe_open(path, "pt") as entry:
                count = sum(key.startswith(f"{view}.") for key in entry.keys())  # noqa: SIM118 (not a dict)
                features = tuple(entry.get_tensor(f"{view}.{i}") for i in range(count))
                metadata = entry.metadata() or {}
                # The image too: another data set may have images of the same names.
                if count and (metadata.get("binding"), metadata.get("image_sha256")) == (self.identity, image_sha256):
                    return features
            problem = "was replaced while it was in use"
        except (OSError, SafetensorError) as error:
            if exists(path):
                require_readable(path)
            problem = f"became unreadable while it was in use ({error})"
        raise UserError(f"{path}: {problem}; start the run again to encode its image again")


def entry_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def is_cache(root: Path, key: CacheKey) -> bool:
    """Whether a folder holds a cache with this key; False if it is empty.

    Raises:
        UserError: it holds something else.
    """
    path = root / KEY_FILE
    try:
        # A lock, and temporary files of a killed run, do not count.
        found = [name.name for name in root.iterdir() if name.name != LOCK and not name.match(".*.tmp")]
        stored = read_json(path, f"delete {root} to encode its images again") if path.name in found else None
    except OSError as error:
        raise no_cache_there(root, error) from None
    if not found:
        return False
    if path.name not in found:
        raise UserError(f"{root}: not empty and not a cache; set --cache_embeddings to another folder")
    if stored != (expected := asdict(key)):
        differ = [name for name in expected if not isinstance(stored, dict) or stored.get(name) != expected[name]]
        raise UserError(
            f"{root}: a cache with a different {', '.join(differ)}; set --cache_embeddings to another folder, or "
            "delete this one"
        )
    return True


def read_feature_pca(root: Path, key: CacheKey, segmenter: Segmenter) -> tuple[FeaturePCA | None, str]:
    """The `FeaturePCA` of a cache, None if there is none yet, and the identity that its entries record."""
    path = root / PCA_FILE
    if not exists(path):
        return None, key.digest
    num_blocks = len(segmenter.feature_blocks)
    channels = num_blocks * segmenter.sam.image_encoder.embed_dim
    shapes = {"mean": (channels,), "basis": (math.floor(channels * KEPT), channels)}
    tensors, metadata = read_tensors(path) or ({}, {})
    is_same = metadata.get("binding") == key.digest
    if is_same and {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes:
        pca = FeaturePCA(tensors["mean"].float().clone(), tensors["basis"].float().clone(), num_blocks)
        return pca, hashlib.sha256(f"{key.digest} {metadata['sha256']}".encode()).hexdigest()
    distributed.say(f"{path}: damaged or of another cache; it is fitted again, and all images are encoded again")
    return None, key.digest


class Checked(NamedTuple):
    """What is known of an image's entry."""

    image: int  # its index in the split
    problem: str  # empty if the entry is valid
    image_sha256: str  # empty if it is not


def check_entries(
    folder: Path, request: Request, identity: str, indexes: Iterable[int]
) -> Generator[Checked, None, None]:
    """Check the entries of some images of a split."""
    for index in tqdm(indexes, desc="checking the cache", unit="image", leave=False, disable=not distributed.is_main()):
        yield Checked(index, *_check(entry_path(folder, request.source.items[index].name), request, index, identity))


def _check(path: Path, request: Request, index: int, identity: str) -> tuple[str, str]:
    """Why an entry cannot be used, and the SHA-256 of its image; one of them is empty."""
    found = status(path)
    if not found:
        return MISSING, ""
    if not S_ISREG(found.st_mode):
        return "not regular files", ""
    _, metadata = read_tensors(path) or ({}, {})
    try:
        views, expected = json.loads(metadata.get("views_are", "")), json.loads(request.views(index))
    except (ValueError, RecursionError):
        return "damaged", ""
    if metadata.get("binding") != identity:
        return "of another cache", ""
    if not isinstance(views, list) or views[: len(expected)] != expected:
        return "without the requested views", ""
    signature, image_sha256 = request.signature(index, path.parent), metadata.get("image_sha256", "")
    without_path = signature.rpartition(" ")[0]  # as older versions recorded it
    is_same_file = metadata.get("image_file") in (signature, without_path)
    if not image_sha256 or not (is_same_file or image_sha256 == image_digest(request.source.read_image(index))):
        return "of images that have changed since", ""
    return "", image_sha256
