"""Safetensors files with a checksum: of cache entries, and of exported decoders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.runtime.files import atomic_write, require_readable

_OF_METADATA = "metadata_sha256"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors, metadata and the checksums that `read_tensors` compares, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    metadata = {**metadata, "sha256": _checksum(tensors)}
    content = save(dict(tensors), {**metadata, _OF_METADATA: _metadata_checksum(metadata)})
    with atomic_write(path) as file:
        file.write(content)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors and metadata of a file, None if it is damaged. Raises `UserError` if the system cannot read it."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if _is_whole(metadata) and metadata.get("sha256") == _checksum(tensors):
            metadata.pop(_OF_METADATA, None)
            return tensors, metadata
    except (OSError, SafetensorError, TypeError):  # the last of a dtype that NumPy lacks
        require_readable(path)
    return None


def _is_whole(metadata: Mapping[str, str]) -> bool:
    """Whether metadata are those of their checksum; files of version 0.2.0 have none."""
    if _OF_METADATA in metadata:
        return metadata[_OF_METADATA] == _metadata_checksum(_without(metadata, _OF_METADATA))
    # The checksum under another name: its name is damaged.
    return all(value != _metadata_checksum(_without(metadata, name)) for name, value in metadata.items())


def _without(metadata: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != name}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].numpy().data)
    return digest.hexdigest()


def _metadata_checksum(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
