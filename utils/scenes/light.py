"""The light and weather of a scene, the colours that things have in it, and the photograph that is taken in it.

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
    rain: float  # 0: dry; up to 1, a downpour


def random_light(rng: Rng) -> Light:
    kind = rng.choice(["day", "dusk", "night"], p=[0.6, 0.2, 0.2])
    rain = rng.uniform(0.2, 1) if rng.random() < 0.2 else 0.0
    tint = {"day": (1.0, 1.0, 0.98), "dusk": (0.82, 0.62, 0.56), "night": (0.28, 0.30, 0.40)}[kind]
    haze = {"day": (205, 215, 225), "dusk": (205, 150, 120), "night": (26, 28, 42)}[kind]
    sun = np.array([rng.choice([-1, 1]) * rng.uniform(0.4, 1), rng.uniform(0.3, 1), rng.uniform(-1, 1)])
    exposure = rng.uniform(0.75, 1.15) * (1 - 0.25 * rain)
    clear = jitter(rng, haze, 14)
    return Light(
        np.array(tint) * exposure * rng.uniform(0.92, 1.08, 3),
        (clear + rain * 0.7 * (clear.mean() - clear)) * exposure,  # grey in rain
        float(np.exp(rng.uniform(np.log(70), np.log(900)))) * (1 - 0.6 * rain),
        sun / np.linalg.norm(sun),
        kind == "night",
        rain,
    )


def jitter(rng: Rng, color: Iterable[float], spread: float = 12) -> Array:
    return np.clip(np.array([*color]) + rng.uniform(-spread, spread) + rng.uniform(-spread, spread, 3) / 2, 0, 255)


def paint(rng: Rng, dullness: float = 0.5) -> Array:
    """Any colour (3,), a grey or nearly so with probability `dullness`: of cars, clothes, walls and signs alike."""
    grey = rng.uniform(25, 235)
    return np.clip(grey + rng.uniform(-1, 1, 3) * (10 if rng.random() < dullness else 100), 5, 250)


def photograph(rng: Rng, pixels: Array, light: Light, wet: Array, vanishing: tuple[float, float]) -> Array:
    """Take the photograph of a painted scene.

    Texture, uneven light, glare, rain, reflections in the windscreen, motion, blur, noise, JPEG artefacts.

    Args:
        pixels: H x W x 4 uint8.
        wet: H x W bool, the ground that mirrors what is above it when it rains.
        vanishing: (x, y) of the point that the camera drives towards.

    Returns:
        H x W x 3 uint8.
    """
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
    if light.rain:
        image = mirror_in_the_road(rng, image, wet, vanishing[1], light.rain)
    bright = cv2.resize(image, (width // 8, height // 8), interpolation=cv2.INTER_AREA)
    glare = cv2.GaussianBlur(np.maximum(bright - 190, 0), (0, 0), 2.5) * np.float32(1.5 if light.night else 0.3)
    image += cv2.resize(glare, (width, height))
    if light.rain:
        image += rain_streaks(rng, height, width, light.rain)[..., None] * np.float32(light.haze.mean() / 2 + 15)
    if rng.random() < 0.25:
        image += windscreen(rng, image)
    image += (noise(1, 3) - np.float32(127.5)) * np.float32(rng.uniform(0.01, 0.09))
    if rng.random() < 0.3:
        image = driving_blur(image, vanishing, rng.uniform(0.003, 0.012))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.1) * max(width / 1280, 0.5))
    options = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(55, 96))]
    _, jpeg = cv2.imencode(".jpg", np.clip(image, 0, 255).astype(np.uint8), options)
    return np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))


def mirror_in_the_road(rng: Rng, image: Array, wet: Array, horizon: float, rain: float) -> Array:
    """Darken wet ground, and mix in what stands above it: mirrored at the horizon, drawn out downwards, in puddles."""
    height, width = wet.shape
    rows = np.clip(np.rint(2 * horizon - np.arange(height)), 0, height - 1).astype(int)
    small = cv2.resize(image[rows], (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    mirrored = cv2.resize(cv2.blur(small, (5, max(height // 20, 1))), (width, height))
    puddles = cv2.resize(rng.random((24, 6), np.float32), (width, height))
    share = (wet * np.float32(0.25 + 0.4 * rain) * (0.4 + puddles))[..., None]
    return image * (1 - share) * (1 - wet[..., None] * np.float32(0.2)) + mirrored * share


def rain_streaks(rng: Rng, height: int, width: int, rain: float) -> Array:
    """H x W float32 in 0..1: short, thin, slanted lines of falling drops."""
    streaks = np.zeros((height, width), np.uint8)
    starts = rng.uniform((0, 0), (width, height), (int(700 * rain), 2))
    ends = starts + np.array((rng.uniform(-0.3, 0.3), 1)) * rng.uniform(0.015, 0.06, (len(starts), 1)) * height
    for pair, strength in zip(np.rint(np.stack([starts, ends], 1)).astype(int), rng.integers(60, 256, len(starts))):
        cv2.line(streaks, pair[0].tolist(), pair[1].tolist(), int(strength), 1, cv2.LINE_AA)
    return streaks / np.float32(255)


def windscreen(rng: Rng, image: Array) -> Array:
    """The light H x W x 3 that the windscreen adds: the dashboard's faint mirror image, with its edges and papers."""
    height, width = image.shape[:2]
    small = np.zeros((height // 8, width // 8), np.float32)
    rows, columns = small.shape
    for _ in range(rng.integers(2, 6)):
        (x, y), (w, h) = rng.uniform((-0.1, 0.3), (0.9, 0.95)), rng.uniform((0.1, 0.02), (0.8, 0.3))
        corners = np.array([(x, y), (x + w, y + rng.normal(0, 0.05)), (x + w * 0.9, y + h), (x + w * 0.1, y + h)])
        cv2.fillPoly(small, [np.rint(corners * (columns, rows)).astype(np.int32)], rng.uniform(0.3, 1), cv2.LINE_AA)
    strength = rng.uniform(0.06, 0.2) * image.mean()
    return cv2.resize(cv2.GaussianBlur(small, (0, 0), 1.2), (width, height))[..., None] * np.float32(strength)


def driving_blur(image: Array, vanishing: tuple[float, float], reach: float) -> Array:
    """The mean of the image zoomed by 1 to 1 + `reach` about the vanishing point, where the ego car drives to."""
    height, width = image.shape[:2]
    (x, y), total = vanishing, image.copy()
    scales = np.linspace(1, 1 + reach, 5)[1:]
    for scale in (*scales, *(2 - scales)):
        zoom = np.array([[scale, 0, x * (1 - scale)], [0, scale, y * (1 - scale)]])
        total += cv2.warpAffine(image, zoom, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return total / np.float32(2 * len(scales) + 1)
