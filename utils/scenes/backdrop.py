"""What fills the picture before anything stands in it, sky and ground, and the ego car's bonnet before it all."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np

from utils.scenes.light import jitter, paint
from utils.scenes.painter import VOID, Painter
from utils.scenes.shapes import Array, on_ground, rect
from utils.scenes.street import FAR, Street


def draw_sky(p: Painter) -> None:
    """Sky with clouds over the whole canvas, then a far skyline and a far line of trees along the horizon."""
    rng, (height, width) = p.rng, p.instances.shape
    p.begin("sky")
    p.instances[:] = 1
    zenith = jitter(rng, (120, 160, 215) if rng.random() < 0.6 else (190, 195, 200), 25) * p.light.tint
    rows, columns = height // 4, width // 4
    clouds = sum(cv2.resize(rng.random((2**i, 2**i)), (columns, rows)) / 2**i for i in (2, 3, 4, 5))
    cover = np.clip((clouds * 2.1 - rng.uniform(0.2, 0.9)) * 1.6, 0, 1)[..., None] * rng.uniform(0, 1)
    depth = np.clip(np.arange(rows) * 4 / p.horizon, 0, 1)[:, None, None]
    clear = zenith * (1 - depth) + p.light.haze * depth
    sky = np.clip(clear * (1 - cover) + jitter(rng, (225, 225, 228)) * p.light.tint * cover, 0, 255)
    p.pixels[..., :3] = cv2.resize(sky.astype(np.uint8), (width, height))

    for class_name, tallest, color in (("building", 30, paint(rng, 0.9)), ("vegetation", 9, jitter(rng, (75, 95, 60)))):
        if rng.random() < 0.7:
            p.begin(class_name)
            x = np.linspace(-400, 400, 40 if class_name == "building" else 160)
            top = tallest * rng.uniform(0.2, 1, len(x))
            if class_name == "building":  # flat roofs
                x, top = np.repeat(x, 2)[1:], np.repeat(top, 2)[:-1]
            outline = np.column_stack([[*x, 400, -400], [*top, -2, -2], np.full(len(x) + 2, FAR * 1.5)])
            p.fill(outline, color, texture=60)


def strip(p: Painter, x0: float, x1: float, color: Array, texture: float = 0, z1: float = 900) -> None:
    """A strip of ground along the street, in slices so that the bend and the haze can follow it."""
    slices = [on_ground(x0, near, x1, far) for near, far in pairwise(np.geomspace(1, z1, 24))]
    p.fill(np.array(slices), color, texture)


def draw_ground(p: Painter, street: Street) -> None:
    """Terrain up to the horizon, then pavements and track beds along the street, then the road."""
    rng, (height, width) = p.rng, p.instances.shape
    p.begin("terrain")
    grass = jitter(rng, (95, 115, 60) if rng.random() < 0.65 else (150, 130, 95), 20)
    p.fill_pixels(rect(0, p.horizon, width, height)[None], grass * p.light.tint * 0.5 + p.light.haze * 0.5)
    strip(p, -400, 400, grass, 150)
    for side in street.sides:
        if side.walk:
            p.begin("sidewalk")
            inner, outer = (side.sign * x for x in side.walk)
            grey = jitter(rng, (150, 147, 140), 25)
            strip(p, inner, outer, grey, 70)
            strip(p, inner, inner + side.sign * 0.2, grey * 1.15)  # the kerb
            joints = [on_ground(inner, z, outer, z + 0.05) for z in np.arange(3, 40, rng.uniform(1, 2.5))]
            p.fill(np.array(joints), grey * 0.85, 40)
        if side.track:
            p.begin(VOID)  # BDD100K does not label track beds
            strip(p, side.track - 2.1, side.track + 2.1, jitter(rng, (100, 92, 85), 25), 110)
            for rail in (side.track - 0.72, side.track + 0.72):
                strip(p, rail - 0.06, rail + 0.06, np.full(3, 150.0))
    draw_road(p, street)


def draw_road(p: Painter, street: Street) -> None:
    """Asphalt with patches, lane markings and, where a street crosses, a stop line or zebra; all class road."""
    rng, (left, right) = p.rng, street.edges
    p.begin("road")
    asphalt = jitter(rng, np.full(3, rng.uniform(75, 135)), 8)
    strip(p, left, right, asphalt, 60)
    if street.crossing:
        p.fill(on_ground(-300, street.crossing[0], 300, street.crossing[1]), asphalt, 60)
    for _ in range(rng.integers(2, 10)):  # repairs, tyre marks, stains
        x, z = rng.uniform(left, right - 0.5), rng.uniform(4, 40)
        wide = min(rng.uniform(0.3, 3), right - x)
        p.shade(on_ground(x, z, x + wide, z + rng.uniform(1, 12)), rng.uniform(0.8, 1.12))
    white, yellow = jitter(rng, (215, 215, 210), 25), jitter(rng, (205, 165, 60))
    for x in street.lines:
        if x in (street.median, *street.edges):
            strip(p, x - 0.07, x + 0.07, yellow if x == street.median and p.light.sun[0] > 0 else white, 60, FAR)
        else:
            dashes = [on_ground(x - 0.07, z, x + 0.07, z + 2.5) for z in np.arange(rng.uniform(2, 6), 90, 6)]
            p.fill(np.array(dashes), white, 60)
    if street.crossing:
        z = street.crossing[0] - 4
        p.fill(on_ground(street.median, z - 1.5, right, z - 1.1), white, 60)
        bars = [on_ground(x, z, x + 0.55, z + 3) for x in np.arange(left + 0.4, right - 0.5, 1.1)]
        p.fill(np.array(bars), white, 60)


def draw_hood(p: Painter) -> None:
    """The ego car's bonnet at the bottom of the picture: seen, not labelled."""
    p.begin(VOID)
    height, width = p.instances.shape
    x = np.linspace(0, 1, 24)
    rise = p.rng.uniform(0.03, 0.11) * (1 - np.abs(2 * x - 1) ** p.rng.uniform(2, 5) * 0.9)
    color = paint(p.rng, 0.9) * p.light.tint * 0.5
    for share in (1, 0.85, 0.4):  # lighter bands: the sky mirrored
        edge = np.column_stack([x * width, height * (1 - rise * share)])
        p.fill_pixels(np.array([[*edge, (width, height), (0, height)]]), color * (1.6 - 0.6 * share))
