"""Views of an image: mirrored, cropped, brighter or darker, its labels along with it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LEAST_AREA = 0.35  # of the picture, in a random crop; a cached view is seen again and again, and must not be a bad one
MOST_STRETCH = 4 / 3  # of one side of a crop against the other
MOST_CHANGE = 0.25  # of brightness and of contrast


@dataclass(frozen=True)
class View:
    """What is done to an image and its labels together. The default shows the image as it is.

    `window`, the part of the picture that is seen and enlarged to fill its place, has its top, left, height and width
    as shares of the picture's. It never reaches outside, so that there is nothing to be filled in, neither pixels nor
    labels. The frame's padding, beside the picture, stays what and where it is.
    """

    mirrored: bool = False
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    brightness: float = 1.0
    contrast: float = 1.0

    def image(self, frame: np.ndarray, size: tuple[int, int]) -> Tensor:
        """The view of an image, of the same shape and type, contiguous.

        Args:
            frame: H x W x 3, in any type that images are stored in.
            size: height and width of the picture in the upper left of the frame (`utils.data.geometry.fitted_size`).
        """
        height, width = size
        return torch.from_numpy(_framed(self._placed(self._colored(frame[:height, :width])), frame))

    def labels(self, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The same for labels, H x W uint8; no new ones come about."""
        height, width = size
        return _framed(self._placed(frame[:height, :width]), frame)

    def _placed(self, picture: np.ndarray) -> np.ndarray:
        if self.window != View.window:
            from torchvision.transforms import v2  # here, as it takes seconds to import

            rows, columns = picture.shape[:2]
            top, left, height, width = (
                round(share * side) for share, side in zip(self.window, (rows, columns, rows, columns))
            )
            height, width = max(1, height), max(1, width)
            place = (min(top, rows - height), min(left, columns - width), height, width, [rows, columns])
            tensor = torch.from_numpy(picture)
            if tensor.ndim == 2:
                # As a picture, for which pixels' centres count (`utils.data.geometry`), and not as tv_tensors.Mask,
                # which takes the upper left of the candidates: up to half a pixel off from how the image is sampled.
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
    """The frame with another picture in its upper left, contiguous."""
    if picture.shape == frame.shape:
        return np.ascontiguousarray(picture)
    framed = frame.copy()
    framed[: len(picture), : picture.shape[1]] = picture
    return framed


def _planes(image: Tensor) -> Tensor:
    """H x W x 3 -> 3 x H x W, as torchvision takes it; float16, which CPUs do not interpolate, becomes float32."""
    planes = image.permute(2, 0, 1)
    return planes.float() if planes.dtype == torch.float16 else planes


def draw_view(rng: np.random.Generator) -> View:
    """A random view, of all that `--augment full` does."""
    side, stretch = math.sqrt(rng.uniform(LEAST_AREA, 1)), math.sqrt(MOST_STRETCH) ** rng.uniform(-1, 1)
    height, width = min(1.0, side * stretch), min(1.0, side / stretch)
    return View(
        mirrored=bool(rng.random() < 0.5),
        window=(rng.uniform(0, 1 - height), rng.uniform(0, 1 - width), height, width),
        brightness=rng.uniform(1 - MOST_CHANGE, 1 + MOST_CHANGE),
        contrast=rng.uniform(1 - MOST_CHANGE, 1 + MOST_CHANGE),
    )


def fixed_view(name: str, number: int) -> View:
    """The view of an image that a cache has under a number: 0 the image itself, 1 its mirror image, then random ones.

    A function of the image's name and the number alone, not of the run's seed: a cache serves every run.
    """
    if number < 2:
        return View(mirrored=number == 1)
    return draw_view(np.random.default_rng([number, *os.fsencode(name)]))
