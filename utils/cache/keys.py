"""What a cache and its entries depend on; all of it is part of the file format.

A cache is a folder: `cache.json` with its `CacheKey`, and for each split a folder with one safetensors file per image.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from utils.data.augment import fixed_view
from utils.data.datasets import NpyFolder
from utils.data.frame import ImageSize
from utils.model.checkpoint import ModelInfo
from utils.model.segmenter import Segmenter
from utils.runtime.device import Precision
from utils.runtime.files import cannot_be_read

DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CacheKey:
    """What features depend on besides the image. A cache with another key is never read."""

    sam_sha256: str
    prompt_mode: str  # decides which features there are
    image_size: ImageSize
    resize_mode: str
    pixel_mean: list[float]
    pixel_std: list[float]
    computed_in: str
    stored_in: str
    format_version: int = 2

    @classmethod
    def of(cls, segmenter: Segmenter, info: ModelInfo, precision: Precision, dtype: str) -> CacheKey:
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
    """A split to be cached."""

    source: NpyFolder
    num_views: int  # of each image; 1 is the image itself (`utils.data.augment.fixed_view`)
    passes: int  # how often the run would encode each image without a cache

    @property
    def saves_encoding(self) -> bool:
        return self.passes > self.num_views

    def views(self, index: int) -> str:
        """The views of an image as JSON, so that an entry is rejected once views are drawn in another way."""
        name, size = self.source.items[index].name, self.source.fitted_size(index)
        views = [asdict(fixed_view(name, number)) for number in range(self.num_views)]
        if size != self.source.frame_size:
            views = [{**view, "size": list(size)} for view in views]
        return json.dumps(views)

    def signature(self, index: int, folder: Path) -> str:
        """Size, modification time and path of an image file. The path is relative to `folder`, where the entry is, as
        images and cache may move together."""
        path = self.source.image_path(index)
        try:
            stat = path.stat()
        except OSError as error:
            raise cannot_be_read(path, error) from None
        relative = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
        return f"{stat.st_size} {stat.st_mtime_ns} {os.fsencode(relative).hex()}"  # hex, as a path may be no valid text


def image_digest(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()
