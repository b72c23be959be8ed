"""What several tests share: the public `segment-anything` package to compare with, the figure the comparison is made
in, and a pickle that tells whether it was run."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import io
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from utils.errors import UserError

_NAME = "segment_anything"


@functools.cache
def public_sam() -> ModuleType:
    """The public package, whose import name is that of ours, imported beside it.

    It is looked up where pip put it, imported while ours is out of `sys.modules`, and taken out again, so that
    `import segment_anything` means our package before and after. Its parts are reached as attributes:
    `public_sam().modeling.image_encoder.Block`.

    Raises:
        UserError: it is not installed, or ours is in its place.
    """
    try:
        folder = importlib.metadata.distribution("segment-anything").locate_file("")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("segment-anything==1.0, to compare with, is not installed; pip install -e '.[test]'") from None
    ours, path = _take_out(), sys.path.copy()
    sys.path.insert(0, str(folder))
    try:
        public = importlib.import_module(_NAME)
    finally:
        _take_out()
        sys.modules.update(ours)
        sys.path[:] = path
    # `pip install .` without -e puts our package over the public one, and we would compare with ourselves.
    if not hasattr(public, "SamAutomaticMaskGenerator"):
        raise UserError(f"{public.__file__} is not the public segment-anything==1.0; install it anew, and ours with -e")
    return public


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]
    return {name: sys.modules.pop(name) for name in names}


def relative_error(actual: Any, expected: Any) -> float:
    """Norm of the difference over the norm of `expected`, in float64; arrays or tensors of one shape."""
    actual, expected = (torch.as_tensor(np.asarray(value), dtype=torch.float64) for value in (actual, expected))
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


class Payload:
    """Unpickling it makes the file `path`, as a hostile file would run something worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


# Opcodes of protocol 2 that make a tensor of four zeros out of the storage "0" of a `torch_archive`.
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    b"K\0K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)


def torch_archive(opcodes: bytes, storage: bytes = bytes(16)) -> bytes:
    """A file of `torch.save`'s form whose pickle is {"a": what the opcodes leave}."""
    buffer = io.BytesIO()
    members = {"data.pkl": b"\x80\x02}X\x01\0\0\0a" + opcodes + b"s.", "byteorder": b"little", "data/0": storage,
               "version": b"3\n"}  # fmt: skip
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()
