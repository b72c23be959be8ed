"""Augmentation: views of an image and its labels, mirrored, cropped, brighter or darker."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_CROP_AREA = 0.35  # share of the picture in a random crop; a cached view is used again and again
MAX_CROP_STRETCH = 4 / 3  # of one side of a crop against the other
MAX_COLOR_CHANGE = 0.25  # of brightness and of contrast


@dataclass(frozen=True)
class View:
    """A transformation of an image and its labels; the default changes nothing.

    `window` is the part of the picture that is cropped and enlarged to the picture's size: top, left, height and width
    as shares of the picture. It lies inside the picture, so that nothing is filled in. The frame's padding is
    unchanged.
    """

    mirrored: bool = False
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    brightness: float = 1.0
    contrast: float = 1.0

    def image(self, frame: np.ndarray, size: tuple[int, int]) -> Tensor:
        """The view of an image, of the same shape and type, contiguous.

        Args:
            frame: H x W x 3, in any type in which images are stored.
            size: (height, width) of the picture in the upper left of the frame (`utils.data.geometry.fitted_size`).
        """
        height, width = size
        return torch.from_numpy(_framed(self._placed(self._colored(frame[:height, :width])), frame))

    def labels(self, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The view of labels, H x W uint8, without interpolation."""
        height, width = size
        return _framed(self._placed(frame[:height, :width]), frame)

    def _placed(self, picture: np.ndarray) -> np.ndarray:
        if self.window != View.window:
            from torchvision.transforms import v2  # it takes seconds to import

            rows, columns = picture.shape[:2]
            top, left, height, width = (
                round(share * side) for share, side in zip(self.window, (rows, columns, rows, columns))
            )
            height, width = max(1, height), max(1, width)
            place = (min(top, rows - height), min(left, columns - width), height, width, [rows, columns])
            tensor = torch.from_numpy(picture)
            if tensor.ndim == 2:
                # Not as tv_tensors.Mask, which samples up to half a pixel off from the image (`utils.data.geometry`).
                nearest = v2.InterpolationMode.NEAREST_EXACT
                picture = v2.functional.resized_crop(tensor[None], *place, interpolation=nearest)[0].numpy()
            else:
                resized = v2.functional.resized_crop(_planes(tensor), *place, antialias=True)
                picture = resized.to(tensor.dtype).permute(1, 2, 0).numpy()
        return picture[:, ::-1] if self.mirrored else picture

    def _colored(self, picture: np.ndarray) -> np.ndarray:
        if (self.brightness, self.contrast) == (1, 1):
            return picture
        from torchvision.transforms import v2

        tensor = torch.from_numpy(picture)
        planes = v2.functional.adjust_brightness(_planes(tensor), self.brightness)
        planes = v2.functional.adjust_contrast(planes, self.contrast)
        return planes.to(tensor.dtype).permute(1, 2, 0).numpy()


def _framed(picture: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The frame with a new picture in its upper left, contiguous."""
    if picture.shape == frame.shape:
        return np.ascontiguousarray(picture)
    framed = frame.copy()
    framed[: len(picture), : picture.shape[1]] = picture
    return framed


def _planes(image: Tensor) -> Tensor:
    """H x W x 3 -> 3 x H x W for torchvision; float16, which CPUs do not interpolate, becomes float32."""
    planes = image.permute(2, 0, 1)
    return planes.float() if planes.dtype == torch.float16 else planes


def draw_view(rng: np.random.Generator) -> View:
    """A random view of `--augment full`."""
    side, stretch = math.sqrt(rng.uniform(MIN_CROP_AREA, 1)), math.sqrt(MAX_CROP_STRETCH) ** rng.uniform(-1, 1)
    height, width = min(1.0, side * stretch), min(1.0, side / stretch)
    return View(
        mirrored=bool(rng.random() < 0.5),
        window=(rng.uniform(0, 1 - height), rng.uniform(0, 1 - width), height, width),
        brightness=rng.uniform(1 - MAX_COLOR_CHANGE, 1 + MAX_COLOR_CHANGE),
        contrast=rng.uniform(1 - MAX_COLOR_CHANGE, 1 + MAX_COLOR_CHANGE),
    )


def fixed_view(name: str, number: int) -> View:
    """View `number` of an image in a cache: 0 is the image, 1 its mirror image, the others are random.

    It depends on name and number alone, not on the run's seed, so that a cache serves every run.
    """
    if number < 2:
        return View(mirrored=number == 1)
    return draw_view(np.random.default_rng([number, *os.fsencode(name)]))
