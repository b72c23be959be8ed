"""The public `segment-anything` package, to compare with."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

from utils.runtime.errors import UserError

OWN_FOLDER = Path(sys.prefix) / "oracle"  # the Makefile installs the public package here, away from ours
_HOW_TO_INSTALL = f"pip install --upgrade --no-deps --target {OWN_FOLDER} segment-anything==1.0"
_NAME = "segment_anything"


@functools.cache
def public_sam() -> ModuleType:
    """Import the public package beside ours, which has the same import name.

    `import segment_anything` still means our package afterwards. Parts of the public one are attributes:
    `public_sam().modeling.image_encoder.Block`.

    Raises:
        UserError: the package is missing, or ours was installed over it.
    """
    folder = _public_folder()
    ours, path = _take_out(), sys.path.copy()
    sys.path.insert(0, str(folder))
    try:
        public = importlib.import_module(_NAME)
        importlib.import_module(f"{_NAME}.utils.onnx")  # the package does not import this part
    finally:
        _take_out()
        sys.modules.update(ours)
        sys.path[:] = path
    # Otherwise we could compare our package with itself.
    where = Path(str(public.__file__)).resolve()
    if where.parents[1] != folder.resolve() or hasattr(public, "build_sam_vit_tiny"):
        raise UserError(f"{where} is not the public segment-anything==1.0; {_HOW_TO_INSTALL}")
    return public


def _public_folder() -> Path:
    """The folder of the public package: OWN_FOLDER, or pip's usual folder."""
    if (OWN_FOLDER / _NAME).is_dir():
        return OWN_FOLDER
    try:
        return Path(str(importlib.metadata.distribution("segment-anything").locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"segment-anything==1.0, to compare with, is not installed; {_HOW_TO_INSTALL}") from None


def _take_out() -> dict[str, ModuleType]:
    """Remove all modules named `segment_anything` from `sys.modules` and return them."""
    names = [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]
    return {name: sys.modules.pop(name) for name in names}
