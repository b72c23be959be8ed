"""The light of a scene: its kind, the colours that things have in it, and the photograph that is taken in it.

Colours of cars, clothes, houses and signs come from one source and light varies, so that colour does not tell a class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

from utils.scenes.shapes import Array

Rng = np.random.Generator


@dataclass(frozen=True)
class Light:
    tint: Array  # (3,) multiplies every colour that does not glow
    haze: Array  # (3,) the colour of distance, already tinted
    visibility: float  # metres after which 1/e of a colour is left
    sun: Array  # (3,) unit vector towards the sun
    night: bool


def random_light(rng: Rng) -> Light:
    kind = rng.choice(["day", "dusk", "night"], p=[0.6, 0.2, 0.2])
    tint = {"day": (1.0, 1.0, 0.98), "dusk": (0.82, 0.62, 0.56), "night": (0.28, 0.30, 0.40)}[kind]
    haze = {"day": (205, 215, 225), "dusk": (205, 150, 120), "night": (26, 28, 42)}[kind]
    sun = np.array([rng.choice([-1, 1]) * rng.uniform(0.4, 1), rng.uniform(0.3, 1), rng.uniform(-1, 1)])
    exposure = rng.uniform(0.75, 1.15)
    return Light(
        np.array(tint) * exposure * rng.uniform(0.92, 1.08, 3),
        jitter(rng, haze, 14) * exposure,
        float(np.exp(rng.uniform(np.log(70), np.log(900)))),
        sun / np.linalg.norm(sun),
        kind == "night",
    )


def jitter(rng: Rng, color: Iterable[float], spread: float = 12) -> Array:
    return np.clip(np.array([*color]) + rng.uniform(-spread, spread) + rng.uniform(-spread, spread, 3) / 2, 0, 255)


def paint(rng: Rng, dullness: float = 0.5) -> Array:
    """Any colour (3,), a grey or nearly so with probability `dullness`: of cars, clothes, walls and signs alike."""
    grey = rng.uniform(25, 235)
    return np.clip(grey + rng.uniform(-1, 1, 3) * (10 if rng.random() < dullness else 100), 5, 250)


def photograph(rng: Rng, pixels: Array, light: Light) -> Array:
    """Painted (H, W, 4) uint8 -> image (H, W, 3) uint8: texture, uneven light, glare, blur, noise, JPEG artefacts."""
    height, width = pixels.shape[:2]

    def noise(cell: int, *channels: int) -> Array:
        small = rng.integers(0, 256, (-(-height // cell), -(-width // cell), *channels), np.uint8)
        return small if cell == 1 else cv2.resize(small, (width, height))

    grain = noise(1) * np.float32(0.35) + noise(3) * np.float32(0.5) + noise(9) * np.float32(0.4) - np.float32(159)
    gain = 1 + grain * pixels[..., 3] * np.float32(1 / 255 / 160)
    gain *= 1 + (noise(max(height, width) // 4) - np.float32(128)) * np.float32(rng.uniform(0, 0.0022))
    if light.night:  # headlamps on the road ahead
        y, x = np.ogrid[0:height, 0:width]
        cone = np.exp(-(((x / width - 0.5) / 0.3) ** 2)) * np.exp(-(((y / height - 0.8) / 0.2) ** 2))
        gain *= 1 + np.float32(rng.uniform(0.3, 1.2)) * cone.astype(np.float32)
    image = pixels[..., :3] * gain[..., None]
    bright = cv2.resize(image, (width // 8, height // 8), interpolation=cv2.INTER_AREA)
    glare = cv2.GaussianBlur(np.maximum(bright - 190, 0), (0, 0), 2.5) * np.float32(1.5 if light.night else 0.3)
    image += cv2.resize(glare, (width, height))
    image += (noise(1, 3) - np.float32(127.5)) * np.float32(rng.uniform(0.01, 0.09))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.1) * max(width / 1280, 0.5))
    options = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(55, 96))]
    _, jpeg = cv2.imencode(".jpg", np.clip(image, 0, 255).astype(np.uint8), options)
    return np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))
