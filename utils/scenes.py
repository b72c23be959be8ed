"""Procedurally drawn driving scenes in BDD100K's layout: the built-in data set, to run everything without a download.

    python -m utils.scenes --output_dir data/scenes --train 48 --val 16 --seed 0

A scene is a street laid out in metres, seen by a pinhole camera and painted from far to near. Every polygon goes into
the image and into the map of instances at once, and the mask is looked up from that map, so the edges of all three
agree to the pixel. World coordinates: X to the right, Y up, Z ahead of the camera's foot, in metres.

Colours of cars, clothes, houses and signs come from one source and light varies, so that colour does not tell a class.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.bdd100k import CLASS_NAMES, IGNORE_LABEL
from utils.cli import Parser, non_negative_int, positive_int, run
from utils.errors import UserError
from utils.files import atomic_write
from utils.parallel import run_jobs

Rng = np.random.Generator
Array = np.ndarray
Point = tuple[float, float]
Points = Sequence[Point]
Corner = tuple[float, float, float]
Faces = dict[str, Array]  # name -> (4, 3) world corners: bottom left, bottom right, top right, top left from outside
Thing = tuple[float, float, Callable[["Painter"], None]]  # its row's distance from X = 0, its own, how to draw it

VOID = "void"  # what is drawn but not labelled
CLASS_ID = {VOID: IGNORE_LABEL} | {name: i for i, name in enumerate(CLASS_NAMES)}
MIN_SIDE = 64  # pixels; below, most things vanish
LANE = 3.5  # metres
FAR = 160.0  # metres; beyond there is only ground and a skyline
IMAGES, MASKS = "images/10k", "labels/sem_seg/masks"  # BDD100K's current layout

# A box's corners are numbered round its bottom, then its top: back left, back right, front right, front left.
FACE_NAMES = ("back", "right", "front", "left", "top")
FACE_CORNERS = np.array([(0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7), (4, 5, 6, 7)])
CAR_SHAPES = (  # half width; heights of sill, belt, roof; where from the tail the cabin begins and ends
    (0.88, 0.28, 0.90, 1.42, 0.55, 2.90),  # saloon
    (0.85, 0.28, 0.92, 1.50, 0.05, 2.75),  # hatchback
    (0.93, 0.40, 1.05, 1.75, 0.05, 3.10),  # off-roader
    (0.95, 0.35, 1.10, 2.05, 0.00, 3.70),  # van
)


@dataclass(frozen=True)
class Scene:
    """One drawn scene. Instance 0 does not occur; every thing (also the road, the sky) has its own id, of one class."""

    image: Array  # (H, W, 3) uint8, RGB
    mask: Array  # (H, W) uint8, ids 0-18 and 255
    instances: Array  # (H, W) uint16


def draw_scene(rng: Rng, height: int = 720, width: int = 1280) -> Scene:
    """Draw one scene; the same state of `rng` gives the same scene."""
    check_size(height, width)
    p = Painter(rng, height, width)
    street = Street(rng)
    draw_sky(p)
    draw_ground(p, street)
    # Sight lines run outwards, so of two things beside the road the one closer to it stands in front, and of two in
    # the same row the nearer one. This orders long things (walls, trains) rightly where their distance alone would not.
    for _, _, draw in sorted(furnish(rng, street), key=lambda thing: thing[:2], reverse=True):
        draw(p)
    if rng.random() < 0.4:
        draw_hood(p)
    mask = np.array(p.classes, np.uint8)[p.instances]
    return Scene(photograph(rng, p.pixels, p.light), mask, p.instances)


def check_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise UserError(f"a scene of {height} x {width} pixels is too small: give at least {MIN_SIDE} a side")


# ---------------------------------------------------------------------------------------------------- light and paint


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


# ------------------------------------------------------------------------------------------------------------ geometry


@dataclass(frozen=True)
class Pose:
    """Where a thing stands on the ground, and its heading: 0 drives away from the camera, pi towards it."""

    x: float
    z: float
    yaw: float = 0.0

    def world(self, local: Array, forward: float = 0) -> Array:
        """Local (..., 3) right, up, forward, or (..., 2) right, up in the plane at `forward` -> world (..., 3)."""
        local = np.asarray(local, dtype=float)
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        ahead = local[..., 2] if local.shape[-1] == 3 else forward
        world = np.empty((*local.shape[:-1], 3))
        world[..., 0] = self.x + local[..., 0] * cos + ahead * sin
        world[..., 1] = local[..., 1]
        world[..., 2] = self.z - local[..., 0] * sin + ahead * cos
        return world

    def along(self, profile: Array, right: float = 0) -> Array:
        """Points (..., 2) forward, up of the lengthwise plane at `right` -> world (..., 3)."""
        turned = Pose(self.x + right * math.cos(self.yaw), self.z - right * math.sin(self.yaw), self.yaw - math.pi / 2)
        return turned.world(profile)


def rect(u0: float, v0: float, u1: float, v1: float) -> Array:
    return np.array([(u0, v0), (u1, v0), (u1, v1), (u0, v1)], dtype=float)


def disc(u: float, v: float, radius: float, radius_v: float | None = None, corners: int = 14) -> Array:
    """A circle, an ellipse or, with few corners, a regular polygon: (corners, 2)."""
    angle = np.arange(corners) * (2 * np.pi / corners)
    return np.column_stack([u + radius * np.sin(angle), v + (radius_v or radius) * np.cos(angle)])


def limb(start: Point, end: Point, width: float) -> Array:
    """A bar between two points: (4, 2)."""
    (u0, v0), (u1, v1) = start, end
    share = width / 2 / max(math.hypot(u1 - u0, v1 - v0), 1e-6)
    du, dv = (v0 - v1) * share, (u1 - u0) * share
    return np.array([(u0 + du, v0 + dv), (u1 + du, v1 + dv), (u1 - du, v1 - dv), (u0 - du, v0 - dv)])


def panes(columns: int, rows: int, area: Array, share: float) -> Array:
    """A grid of rectangles taking up `share` of each cell of the rectangle `area`: (rows * columns, 4, 2)."""
    cell = (area[2] - area[0]) / (columns, rows)
    corner = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 1, 2) + (1 - share) / 2
    return area[0] + (corner + rect(0, 0, share, share)) * cell


def on_face(face: Array, uv: Array) -> Array:
    """Points (..., 2) in a face's unit square -> world (..., 3)."""
    u, v = uv[..., :1], uv[..., 1:]
    return (face[0] * (1 - u) + face[1] * u) * (1 - v) + (face[3] * (1 - u) + face[2] * u) * v


def on_ground(x0: float, z0: float, x1: float, z1: float) -> Array:
    return np.array([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], dtype=float)


class Painter:
    """The camera and its canvas: paints polygons given in metres into the image and the map of instances at once."""

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        self.rng = rng
        self.light = random_light(rng)
        self.pixels = np.zeros((height, width, 4), np.uint8)  # red, green, blue, strength of texture
        self.instances = np.zeros((height, width), np.uint16)
        self.classes = [IGNORE_LABEL]  # of each instance id
        self.focal = width * rng.uniform(0.7, 1.0)
        self.center = width * rng.uniform(0.4, 0.6)
        self.horizon = height * rng.uniform(0.4, 0.54)
        self.eye = rng.uniform(1.2, 2.0)
        self.bend = rng.uniform(-1, 1) ** 3 / 900  # the road's curve: metres sideways over metres ahead, squared

    def begin(self, class_name: str) -> None:
        """Start a new instance: what is painted from now on belongs to it."""
        self.classes.append(CLASS_ID[class_name])

    def project(self, points: Array) -> Array:
        """World (..., 3) -> pixels (..., 2)."""
        z = np.maximum(points[..., 2], 0.5)
        pixels = np.empty((*points.shape[:-1], 2))
        pixels[..., 0] = self.center + self.focal * (points[..., 0] / z + self.bend * z)
        pixels[..., 1] = self.horizon + self.focal * (self.eye - points[..., 1]) / z
        return pixels

    def fill(self, points: Array, color: Array, texture: float = 0, glow: bool = False) -> None:
        """Fill polygons (N, 3) or (M, N, 3) with a colour (3,) or each with its own (M, 3), lit unless it glows."""
        points = points.reshape(-1, *points.shape[-2:])
        clearness = np.exp(points[..., 2].mean(axis=1, keepdims=True) / -self.light.visibility)  # M x 1
        if not glow:
            color = color * self.light.tint * clearness + self.light.haze * (1 - clearness)
        self.fill_pixels(self.project(points), color, texture * clearness)

    def fill_pixels(self, corners: Array, color: Array, texture: Array | float = 0) -> None:
        """Fill polygons (M, N, 2) given in pixels with final colours (M, 3) or (3,)."""
        fixed = np.rint(np.minimum(np.maximum(corners, -2e4), 2e4) * 16).astype(np.int32)
        rgbt = np.empty((len(corners), 4))
        rgbt[:, :3] = np.minimum(np.maximum(color, 0), 255)
        rgbt[:, 3:] = texture
        # One call a polygon: in one joint call overlapping polygons would cut holes into each other.
        for polygon, value in zip(fixed, rgbt.tolist()):
            cv2.fillPoly(self.pixels, [polygon], value, shift=4)
            cv2.fillPoly(self.instances, [polygon], len(self.classes) - 1, shift=4)

    def shade(self, points: Array, factor: float) -> None:
        """Darken the image, not the labels, within a polygon (N, 3)."""
        height, width = self.instances.shape
        corners = np.clip(self.project(points), -2e4, 2e4)
        x0, y0 = np.maximum(corners.min(axis=0).astype(int) - 4, 0)
        x1, y1 = np.minimum(corners.max(axis=0).astype(int) + 5, (width, height))
        if x0 < x1 and y0 < y1:
            stencil = np.ones((y1 - y0, x1 - x0), np.float32)
            cv2.fillPoly(stencil, [np.rint(corners - (x0, y0)).astype(np.int32)], factor)
            window = self.pixels[y0:y1, x0:x1, :3]
            window[:] = window * cv2.blur(stencil, (5, 5))[..., None]

    def shadow(self, pose: Pose, half: float, half_length: float) -> None:
        """Darken the ground below a thing and, away from the sun, beside it."""
        lean = -self.light.sun[0] * (0.3 if self.light.night else 1.0)
        spread = rect(-half + min(lean, 0), -half_length - 0.2, half + max(lean, 0), half_length + 0.2)
        self.shade(pose.world(np.insert(spread, 1, 0, axis=1)), 0.45)

    def solid(
        self, pose: Pose, low: Corner, high: Corner, color: Array, inset: Corner = (0, 0, 0), texture: float = 0
    ) -> Faces:
        """Paint a box from local corner `low` to `high`, its top drawn in by `inset` (sides, back, front).

        Returns the faces that the camera sees; those of a convex body hide nothing of each other and need no order.
        """
        (x0, y0, z0), (x1, y1, z1), (side, back, front) = low, high, inset
        bottom = [(x0, y0, z0), (x1, y0, z0), (x1, y0, z1), (x0, y0, z1)]
        top = [(x, y1, z) for z, xs in ((z0 + back, (x0, x1)), (z1 - front, (x1, x0))) for x in xs]
        top = [(x + side if x == x0 else x - side, y, z) for x, y, z in top]
        faces = pose.world(np.array(bottom + top))[FACE_CORNERS]  # (5, 4, 3)
        diagonal, other = (self.project(faces[:, i + 2]) - self.project(faces[:, i]) for i in (0, 1))
        seen = diagonal[:, 0] * other[:, 1] - diagonal[:, 1] * other[:, 0] < 0  # corners run counterclockwise
        normal = np.cross(faces[:, 1] - faces[:, 0], faces[:, 3] - faces[:, 0])
        sunlit = normal @ self.light.sun / np.maximum(np.linalg.norm(normal, axis=1), 1e-6)
        shades = color * (0.78 + 0.3 * np.maximum(sunlit, -0.4))[:, None]
        self.fill(faces[seen], shades[seen], texture)
        return {name: face for name, face, visible in zip(FACE_NAMES, faces, seen) if visible}


# ---------------------------------------------------------------------------------------------------- sky and ground


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


# ------------------------------------------------------------------------------------------------- beside the road


def draw_building(p: Painter, pose: Pose, width: float, depth: float, height: float) -> None:
    """A block with a grid of windows, or a house with a pitched roof, `pose` at the middle of its near end."""
    rng, half = p.rng, width / 2
    p.begin("building")
    color = paint(rng, 0.75) * 0.5 + jitter(rng, (165, 145, 125), 30) * 0.5
    glass, lamplight = jitter(rng, (70, 80, 95), 30), jitter(rng, (225, 190, 120), 20)
    bay, share = rng.uniform(2, 5), rng.uniform(0.35, 0.8)
    faces = p.solid(pose, (-half, 0, 0), (half, height, depth), color, texture=70)
    for name, face in faces.items():
        if name != "top":
            columns = max(int((depth if name in ("left", "right") else width) / bay), 1)
            windows = on_face(face, panes(columns, max(int(height / 3.2), 1), rect(0.02, 0.04, 0.98, 0.97), share))
            lit = rng.random(len(windows)) < (0.3 if p.light.night else 0.06)
            p.fill(windows[~lit], glass, 40)
            p.fill(windows[lit], lamplight, glow=p.light.night)
    if height < 9:
        low, high = (-half - 0.4, height, -0.4), (half + 0.4, height + 3, depth + 0.4)
        roof = jitter(rng, (125, 75, 60) if rng.random() < 0.5 else (80, 80, 85), 25)
        p.solid(pose, low, high, roof, inset=(half * 0.9, 0.8, 0.8), texture=110)


def draw_wall(p: Painter, pose: Pose, length: float, height: float, color: Array) -> None:
    """A stretch of wall with a coping, courses and a joint."""
    p.begin("wall")
    faces = p.solid(pose, (-0.15, 0, 0), (0.15, height, length), color, texture=110)
    for face in (faces[name] for name in ("left", "right") if name in faces):
        courses = np.array([rect(0, v, 1, v + 0.02) for v in np.arange(0.2, 1, 0.2)])
        p.fill(on_face(face, courses), color * 0.75, 60)
        p.fill(on_face(face, np.array([rect(0, 0.93, 1, 1), rect(0.97, 0, 1, 1)])), color * 1.15, 60)


def draw_fence(p: Painter, pose: Pose, length: float, height: float, color: Array) -> None:
    """A stretch of fence: boards if high, else a railing of bars and rails that one sees through."""
    p.begin("fence")
    step, wide = (0.3, 0.24) if height > 1.4 else (0.4, 0.06)
    uprights = np.array([rect(z, 0, z + wide, height) for z in np.arange(0, length, step)])
    if height > 1.4:
        p.fill(pose.along(rect(0, 0.1, length, height - 0.1)), color * 0.6, 60)
    p.fill(pose.along(uprights), color * p.rng.uniform(0.85, 1.1, (len(uprights), 1)), 90)
    p.fill(pose.along(np.array([rect(0, height * v, length, height * v + 0.1) for v in (0.15, 0.85)])), color)


def draw_foliage(p: Painter, pose: Pose, centre: float, radius: float, radius_v: float, color: Array) -> None:
    """Irregular blobs of leaves, dark below and light above; part of the instance that was begun."""
    rng, count = p.rng, 12 if pose.z < 50 else 6
    angle, reach = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.35, 0.7, count)
    share = rng.uniform(0.3, 0.5, (count, 1, 1))
    reach[0], share[0] = 0, 0.75
    middle = np.column_stack([np.cos(angle) * radius, np.sin(angle) * radius_v]) * reach[:, None]
    blobs = disc(0, 0, radius, radius_v, corners=20) * share * rng.uniform(0.8, 1.15, (count, 20, 1))
    points = pose.world(blobs + middle[:, None] + (0, centre))
    p.fill(points, color * (0.8 + 0.3 * np.sin(angle) * reach)[:, None], 255)


def draw_tree(p: Painter, pose: Pose) -> None:
    """A trunk, which counts as vegetation, with a round crown or a conifer's tiers."""
    rng = p.rng
    p.begin("vegetation")
    height, color = rng.uniform(4, 10), jitter(rng, (85, 105, 50) if rng.random() < 0.8 else (150, 110, 55), 28)
    bole = height * rng.uniform(0.25, 0.45)
    p.shadow(pose, 1.2, 0.5)
    p.fill(pose.world(limb((0, -0.05), (0.1, bole + 0.5), height * 0.035)), jitter(rng, (85, 65, 50)), 130)
    if rng.random() < 0.75:
        radius = (height - bole) / 2
        draw_foliage(p, pose, bole + radius * 0.9, radius * rng.uniform(0.7, 1.1), radius, color)
        return
    for tier in np.linspace(0, 0.75, 5):
        base, half = bole * 0.5 + (height - bole * 0.5) * tier, height * 0.22 * (1.05 - tier)
        hem = [(u, base + rng.uniform(-0.25, 0.25)) for u in np.linspace(-half, half, 9)]
        p.fill(pose.world(np.array([*hem, (0, base + height * 0.3)])), color * (0.65 + 0.35 * tier), 220)


def draw_hedge(p: Painter, pose: Pose, length: float, height: float, color: Array) -> None:
    """A stretch of hedge; of `color` it keeps only how light it is."""
    p.begin("vegetation")
    green = np.array((75, 95, 50)) + color.mean() / 6
    for z in np.arange(length, 0, -1.5):
        draw_foliage(p, Pose(pose.x, pose.z + z), height * 0.45, 1.1, height * 0.6, green)


def draw_pole(p: Painter, pose: Pose, height: float, reach: float = 0, lamp: bool = False) -> None:
    """A post, with an arm of length `reach` (to the left if negative) that may carry a street lamp."""
    p.begin("pole")
    color = jitter(p.rng, np.full(3, p.rng.uniform(50, 150)), 20)
    p.shadow(pose, 0.25, 0.1)
    p.fill(pose.world(rect(-0.09, -0.02, 0.09, height)), color, 30)
    p.fill(pose.world(rect(0.03, 0, 0.09, height)), color * 0.7, 30)
    if reach:
        p.fill(pose.world(limb((0, height - 0.1), (reach, height + 0.2 * lamp), 0.13)), color)
    if lamp:
        light = np.array((255, 225, 170)) if p.light.night else color * 1.2
        p.fill(pose.world(rect(reach - 0.4, height + 0.05, reach + 0.4, height + 0.3)), light, glow=p.light.night)


def draw_traffic_light(p: Painter, pose: Pose, reach: float) -> None:
    """A post with a head of three lamps, and with an arm a second head above the road."""
    on = int(p.rng.integers(3))
    casing = jitter(p.rng, (35, 35, 32) if p.rng.random() < 0.6 else (180, 150, 40))
    draw_pole(p, pose, 5.5 if reach else 3.8, reach)
    for u, v in ((0.0, 2.6), (reach, 5.0))[: 2 if reach else 1]:
        p.begin("traffic light")
        p.fill(pose.world(rect(u - 0.26, v, u + 0.26, v + 1.25)), casing, 15)
        for i, lamp in enumerate(((70, 235, 160), (255, 190, 40), (255, 50, 40))):
            color = np.array(lamp) * (1 if i == on else 0.22)
            p.fill(pose.world(disc(u, v + 0.25 + 0.38 * i, 0.15, corners=10)), color, glow=i == on)


def draw_sign(p: Painter, pose: Pose, reach: float) -> None:
    """A post with one or two signs, triangle to circle, square or diamond, or a direction board on an arm."""
    rng, height = p.rng, 5.5 if reach else p.rng.uniform(2.2, 3.2)
    draw_pole(p, pose, height + 0.3, reach)
    for level in range(1 if reach else rng.integers(1, 3)):
        p.begin("traffic sign")
        v, size = height - 0.95 * level, rng.uniform(0.36, 0.5)
        outline = disc(0, v, size, corners=int(rng.choice([3, 4, 8, 20])))
        if reach or rng.random() < 0.3:
            outline = rect(reach - 1.5, v - 0.7, reach + 1.5, v + 0.9) if reach else rect(-size, v - 0.4, size, v + 0.3)
        middle, spread = outline.mean(axis=0), np.ptp(outline, axis=0)
        ink = paint(rng)
        p.fill(pose.world(outline), ink, glow=p.light.night and rng.random() < 0.5)  # in the headlamps
        p.fill(pose.world(middle + (outline - middle) * 0.8), paint(rng, 0.2), 15)
        for centre in middle + rng.uniform(-0.18, 0.18, (3, 2)) * spread:  # something like lettering
            p.fill(pose.world(centre + rect(-0.12, -0.03, 0.12, 0.03) * spread), ink)


def draw_clutter(p: Painter, pose: Pose) -> None:
    """Bins, boxes, cones: what BDD100K leaves unlabelled."""
    p.begin(VOID)
    p.shadow(pose, 0.5, 0.4)
    wide, cone = p.rng.uniform(0.2, 0.5), p.rng.random() < 0.4
    low, high = (-wide, 0, -wide), (wide, p.rng.uniform(0.5, 1.3), wide)
    p.solid(pose, low, high, paint(p.rng, 0.4), inset=(wide * 0.85 * cone,) * 3, texture=50)


# ------------------------------------------------------------------------------------------------- people and vehicles


def draw_figure(
    p: Painter, pose: Pose, hip: Point, neck: Point, broad: float, knees: Points, feet: Points, hands: Points
) -> None:
    """A person given by joints (right, up) in the plane facing the camera; the last three hold left, then right."""
    rng = p.rng
    coat, trousers, shoes = paint(rng), paint(rng, 0.8) * 0.7, paint(rng, 0.8) * 0.4
    skin, hair = jitter(rng, (205, 165, 140)) * rng.uniform(0.4, 1.05), paint(rng, 0.6) * 0.5
    for sign, knee, foot, hand in zip((-1, 1), knees, feet, hands):
        p.fill(pose.world(limb((hip[0] + sign * 0.06, hip[1]), knee, 0.18)), trousers * (1 - 0.1 * sign), 40)
        p.fill(pose.world(limb(knee, foot, 0.14)), trousers * (1 - 0.1 * sign), 40)
        p.fill(pose.world(disc(foot[0] + 0.03, foot[1], 0.12, 0.05, 8)), shoes)
        p.fill(pose.world(limb((neck[0] + sign * broad, neck[1] - 0.06), hand, 0.11)), coat * 0.85, 40)
    lower, upper = rect(hip[0] - 0.16, hip[1] - 0.06, hip[0] + 0.16, 0)[:2], [(neck[0] + broad, neck[1] - 0.05)]
    collar = [(neck[0] + 0.1, neck[1]), (neck[0] - 0.1, neck[1]), (neck[0] - broad, neck[1] - 0.05)]
    p.fill(pose.world(np.array([*lower, *upper, *collar])), coat, 60)
    p.fill(pose.world(limb((neck[0], neck[1] - 0.05), (neck[0], neck[1] + 0.1), 0.1)), skin * 0.9)
    p.fill(pose.world(disc(neck[0], neck[1] + 0.15, 0.1, 0.13)), skin)
    p.fill(pose.world(disc(neck[0], neck[1] + 0.21, 0.12, 0.09)), hair, 40)  # or hat, or helmet


def draw_person(p: Painter, pose: Pose) -> None:
    """A pedestrian somewhere in a stride."""
    p.begin("person")
    p.shadow(pose, 0.35, 0.2)
    tall, stride, lean = p.rng.uniform(1.4, 1.9), p.rng.uniform(0.05, 0.32), p.rng.normal(0, 0.03)
    feet, knees = [(-stride, 0.04), (stride, 0.04)], [(-stride * 0.4, 0.26 * tall), (stride * 0.7, 0.26 * tall)]
    hands = [(-0.27 - stride / 3, 0.46 * tall), (0.3 - stride / 3, 0.47 * tall)]
    draw_figure(p, pose, (0, 0.5 * tall), (lean, 0.83 * tall), 0.22, knees, feet, hands)


def draw_rider(p: Painter, pose: Pose, saddle: Point, bars: Point) -> None:
    """A person on a saddle; both are (forward, up), and the more the cycle turns the more of them shows sideways."""
    p.begin("rider")
    turn, face_on = math.sin(pose.yaw), abs(math.cos(pose.yaw))
    hip, neck = (saddle[0] * turn, saddle[1]), ((saddle[0] + 0.25) * turn, saddle[1] + 0.56)
    knees = [(0.25 * turn + s * 0.16 * face_on, saddle[1] - 0.22 + 0.1 * s * abs(turn)) for s in (-1, 1)]
    feet = [(0.1 * turn + s * 0.15, 0.28 + 0.08 * s) for s in (-1, 1)]
    hands = [(bars[0] * turn + s * 0.25 * face_on, bars[1]) for s in (-1, 1)]
    draw_figure(p, Pose(pose.x, pose.z), hip, neck, 0.14 + 0.09 * face_on, knees, feet, hands)


def draw_cycle(p: Painter, pose: Pose, motor: bool, ridden: bool) -> None:
    """A bicycle or motorcycle in its lengthwise plane, with what has width drawn across it, and maybe its rider."""
    p.begin("motorcycle" if motor else "bicycle")
    p.shadow(pose, 0.3, 0.9)
    color, dark = paint(p.rng, 0.3), jitter(p.rng, (35, 35, 38), 8)
    wheel, tyre, base, tube = (0.31, 0.2, 0.7, 0.12) if motor else (0.34, 0.09, 0.53, 0.06)
    for axle in (-base, base):
        p.fill(pose.world(rect(-tyre / 2, 0, tyre / 2, 2 * wheel), axle), dark)
        rim = disc(axle, wheel, wheel)
        p.fill(pose.along(np.array([limb(a, b, tube) for a, b in zip(rim, np.roll(rim, 1, axis=0))])), dark)
        p.fill(pose.along(disc(axle, wheel, wheel * (0.55 if motor else 0.1))), color * 0.6)
    rear, front, crank = (-base, wheel), (base, wheel), (0.0, wheel)
    saddle, bars = (-0.25, 0.82 if motor else 0.92), (base - 0.2, 1.02)
    tubes = ((rear, saddle), (saddle, crank), (crank, bars), (saddle, bars), (front, bars), (rear, crank))
    p.fill(pose.along(np.array([limb(*ends, tube) for ends in tubes])), color)
    if motor:
        tank = [(-0.75, 0.72), (-0.3, 0.42), (0.35, 0.4), (0.5, 0.85), (0.2, 1.0), (-0.1, 0.82), (-0.7, 0.86)]
        p.fill(pose.along(np.array(tank)), color, 20)
        p.fill(pose.world(rect(-0.17, 0.45, 0.17, 0.98), 0.3), color * 0.8)
        p.fill(pose.world(disc(0, 0.85, 0.1), 0.5), np.array((250, 240, 200)), glow=p.light.night)
    p.fill(pose.world(limb((-0.3, bars[1]), (0.3, bars[1]), 0.06), bars[0]), dark)
    if ridden:
        draw_rider(p, pose, saddle, bars)


def draw_chassis(p: Painter, pose: Pose, half: float, rear: float, front: float, radius: float) -> None:
    """What is below a vehicle's body: its shadow, a dark floor, the treads of its tyres."""
    p.shadow(pose, half, (front - rear) / 2)
    dark = np.full(3, 28.0)
    p.solid(pose, (-half * 0.9, radius * 0.5, rear + 0.2), (half * 0.9, radius * 1.4, front - 0.2), dark)
    for x in (-half + 0.02, half - 0.24):
        for z in (rear + 0.5, front - 0.5 - radius):
            p.solid(pose, (x, 0, z), (x + 0.22, radius * 1.3, z + radius), dark)


def draw_wheels(p: Painter, pose: Pose, faces: Faces, half: float, axles: Iterable[float], radius: float) -> None:
    """Tyres, rims and hubs on the long sides that are seen, `half` a width from the middle."""
    for side, right in (("left", -half), ("right", half)):
        for axle in axles if side in faces else ():
            rings = np.array([disc(axle, radius, radius * share) for share in (1, 0.55, 0.2)])
            p.fill(pose.along(rings, right), np.array([[30.0], [120.0], [60.0]]) * np.ones(3))


def draw_lamps(p: Painter, faces: Faces, v: float) -> None:
    """Head or tail lamps at the height `v` of the end that is seen, and a number plate."""
    for name, color in (("front", (255, 245, 215)), ("back", (220, 30, 25))):
        if name in faces:
            on = p.light.night or p.rng.random() < 0.3
            lamps = np.array([rect(u, v, u + 0.16, v + 0.2) for u in (0.04, 0.8)])
            p.fill(on_face(faces[name], lamps), np.array(color) * (1 if on else 0.75), glow=on)
            p.fill(on_face(faces[name], rect(0.41, v - 0.25, 0.59, v - 0.1)), np.array((210, 210, 200)), 30)


def draw_car(p: Painter, pose: Pose) -> None:
    """A saloon, hatchback, off-roader or van: a body, a glazed cabin upon it, wheels, lamps."""
    rng = p.rng
    p.begin("car")
    color, glass = paint(rng, 0.65), jitter(rng, (50, 58, 68), 15)
    half, sill, belt, roof, back, front = CAR_SHAPES[rng.choice(len(CAR_SHAPES), p=[0.4, 0.25, 0.25, 0.1])]
    rear, length = -2.2, rng.uniform(4.1, 4.8)
    draw_chassis(p, pose, half, rear, rear + length, 0.33)
    body = p.solid(pose, (-half, sill, rear), (half, belt, rear + length), color, inset=(0.06, 0.05, 0.12), texture=8)
    low, high = (-half + 0.07, belt, rear + back), (half - 0.07, roof, rear + front + 0.4)
    cabin = p.solid(pose, low, high, color, inset=(0.14, 0.12 + back * 0.6, 0.75), texture=8)
    for name, face in cabin.items():
        if name != "top":
            windows = panes(2 if name in ("left", "right") else 1, 1, rect(0.05, 0, 0.95, 1), 0.84)
            p.fill(on_face(face, windows), glass)
            p.fill(on_face(face, windows[:, [0, 3, 2]]), glass * 1.35)  # the sky mirrored
    draw_lamps(p, body, 0.5)
    draw_wheels(p, pose, body, half, (rear + 0.8, rear + length - 0.85), 0.34)


def draw_truck(p: Painter, pose: Pose) -> None:
    """A cab and a ribbed box; the one that is farther off comes first."""
    rng, half = p.rng, 1.22
    p.begin("truck")
    end, height, cargo, cab = rng.uniform(3.3, 5), rng.uniform(2.7, 3.7), paint(rng, 0.6), paint(rng, 0.3)
    draw_chassis(p, pose, half, -end, end, 0.5)
    faces: Faces = {}
    for part in ("box", "cab") if math.cos(pose.yaw) < 0 else ("cab", "box"):
        if part == "box":
            faces = p.solid(pose, (-half, 0.75, -end), (half, height, end - 2.2), cargo, texture=25)
            for name, face in faces.items():
                ribs = panes(8 if name in ("left", "right") else 2, 1, rect(0, 0.03, 1, 0.97), 0.93)
                p.fill(on_face(face, ribs), cargo * 0.9, 25)
            draw_lamps(p, {name: face for name, face in faces.items() if name == "back"}, 0.15)
        else:
            front = p.solid(pose, (-half, 0.45, end - 2.1), (half, 2.6, end), cab, inset=(0.05, 0, 0.25), texture=8)
            for face in (face for name, face in front.items() if name in ("left", "right", "front")):
                p.fill(on_face(face, rect(0.1, 0.5, 0.9, 0.88)), np.array((48, 55, 64)))
            draw_lamps(p, {name: face for name, face in front.items() if name == "front"}, 0.2)
    draw_wheels(p, pose, faces, half, (1.0 - end, 2.2 - end, end - 1.1), 0.5)


def draw_coach(p: Painter, pose: Pose, length: float, height: float, color: Array, sloped: float = 0) -> Faces:
    """A bus or one wagon of a train: a long box with windows, doors, a windscreen; returns its visible faces."""
    half, glass = 1.28, jitter(p.rng, (45, 52, 62))
    draw_chassis(p, pose, half, -length / 2, length / 2, 0.5)
    low, high = (-half, 0.4, -length / 2), (half, height, length / 2)
    faces = p.solid(pose, low, high, color, inset=(0.08, sloped, sloped), texture=12)
    lit = p.light.night and p.rng.random() < 0.7
    for name, face in faces.items():
        if name in ("left", "right"):
            p.fill(on_face(face, rect(0, 0.05, 1, 0.18)), color * 0.55)
            p.fill(on_face(face, rect(0.02, 0.44, 0.98, 0.84)), glass * 0.7)
            windows = panes(int(length / 1.5), 1, rect(0.02, 0.42, 0.98, 0.86), 0.84)
            p.fill(on_face(face, windows), np.array((225, 205, 150)) if lit else glass, glow=lit)
            doors = np.array([rect(u, 0.04, u + 1.3 / length, 0.84) for u in (0.12, 0.55, 0.86)])
            p.fill(on_face(face, doors), glass * 1.2)
        elif name != "top":
            p.fill(on_face(face, rect(0.06, 0.4, 0.94, 0.82)), glass)
            p.fill(on_face(face, rect(0.25, 0.86, 0.75, 0.95)), np.array((250, 170, 40)), glow=p.light.night)
    draw_lamps(p, faces, 0.16)
    return faces


def draw_bus(p: Painter, pose: Pose) -> None:
    p.begin("bus")
    length = p.rng.uniform(9, 12.5)
    faces = draw_coach(p, pose, length, p.rng.uniform(2.9, 3.4), paint(p.rng, 0.3))
    draw_wheels(p, pose, faces, 1.28, (-length / 2 + 2.2, length / 2 - 2.4), 0.5)


def draw_train(p: Painter, pose: Pose, wagons: int) -> None:
    """Coupled wagons, `pose` at the middle of the nearest one."""
    p.begin("train")
    color = paint(p.rng, 0.4)
    for i in reversed(range(wagons)):
        draw_coach(p, Pose(pose.x, pose.z + 14.4 * i, pose.yaw), 14, 3.6, color, sloped=0.5)


# ----------------------------------------------------------------------------------------------------------- the street


class Side:
    """One side of the street, outwards from the kerb: pavement, track, verge, and where barriers and houses begin."""

    def __init__(self, rng: Rng, sign: int, edge: float) -> None:
        self.sign, self.edge = sign, edge
        self.setting = str(rng.choice(["town", "suburb", "open"], p=[0.4, 0.35, 0.25]))
        self.town = self.setting == "town"
        out = edge
        self.walk: tuple[float, float] | None = None
        if self.setting != "open" or rng.random() < 0.3:
            self.walk = (out, out + rng.uniform(2, 5 if self.town else 3))
            out = self.walk[1]
        self.track = 0.0  # X of its middle; 0: none
        if rng.random() < 0.2:
            self.track = sign * (out + 2.1)
            out += 4.2
        self.verge = out + 0.4
        self.front = out + 0.8 + (0 if self.town else rng.uniform(1, 5))


class Street:
    """The street's cross-section: the ego lane around X = 0, oncoming lanes to the left, and both sides."""

    def __init__(self, rng: Rng) -> None:
        self.median = -LANE / 2 - LANE * int(rng.integers(0, 2))
        left, right = self.median - LANE * int(rng.integers(1, 3)), LANE / 2 + LANE * int(rng.integers(0, 3))
        self.lines = [left + LANE * i for i in range(round((right - left) / LANE) + 1)]
        room = rng.choice([0.0, 2.3], 2)  # for parked cars
        self.edges = (left - room[0], right + room[1])
        self.parking = [x for x, wide in ((left - 1.2, room[0]), (right + 1.2, room[1])) if wide]
        z = rng.uniform(14, 40)
        self.crossing = (z, z + rng.uniform(8, 14)) if rng.random() < 0.4 else None
        self.sides = [Side(rng, -1, -self.edges[0]), Side(rng, 1, self.edges[1])]

    def clear(self, z0: float, z1: float) -> bool:
        """Whether nothing crosses the street between two distances."""
        return self.crossing is None or z1 < self.crossing[0] or z0 > self.crossing[1]


def furnish(rng: Rng, street: Street) -> list[Thing]:
    """Everything that stands or moves in a street."""
    things = [*traffic(rng, street)]
    for side in street.sides:
        things += [*buildings(rng, street, side), *barriers(rng, street, side), *kerbside(rng, street, side)]
        if side.walk:
            things += people(rng, side)
        if side.track and rng.random() < 0.5:
            pose = Pose(side.track, rng.uniform(16, 40), rng.choice([0, np.pi]))
            things.append((abs(side.track), pose.z, partial(draw_train, pose=pose, wagons=int(rng.integers(1, 4)))))
    return things


def buildings(rng: Rng, street: Street, side: Side) -> Iterator[Thing]:
    """Blocks side by side in town, houses with gardens elsewhere, and trees where nothing is built."""
    built = {"town": 0.95, "suburb": 0.7, "open": 0.12}[side.setting]
    setback, z = 0.3 + (0 if side.town else rng.uniform(2, 10)), 2.0
    while z < FAR:
        width, depth = rng.uniform(8, 14), rng.uniform(8, 22)
        middle = side.front + setback + width / 2
        if street.clear(z, z + depth) and rng.random() < built:
            height = rng.uniform(8, 28) if side.town else rng.uniform(3.5, 8)
            pose = Pose(side.sign * middle, z)
            yield middle, z, partial(draw_building, pose=pose, width=width, depth=depth, height=height)
        else:
            for away, ahead in rng.uniform((-3, 0), (8, depth), (rng.integers(1, 4), 2)):
                if street.clear(z + ahead - 2, z + ahead + 2):
                    yield middle, z + ahead, partial(draw_tree, pose=Pose(side.sign * (middle + away), z + ahead))
        z += depth + (0 if side.town else rng.uniform(2, 9))


def barriers(rng: Rng, street: Street, side: Side) -> Iterator[Thing]:
    """A wall, fence, hedge or nothing before the buildings, stretch by stretch."""
    kinds = (draw_wall, draw_fence, draw_hedge, None)
    draw = kinds[rng.choice(4, p=[0.2, 0.25, 0.1, 0.45] if side.town else [0.27, 0.33, 0.25, 0.15])]
    height, color, length = rng.uniform(0.8, 2.6), paint(rng, 0.7), 6.0
    for z in np.arange(2, 50 if draw is draw_hedge else 90, length):
        if draw and street.clear(z, z + length) and rng.random() < 0.92:
            pose = Pose(side.sign * side.front, z)
            yield side.front, z, partial(draw, pose=pose, length=length, height=height, color=color)


def kerbside(rng: Rng, street: Street, side: Side) -> Iterator[Thing]:
    """Trees on the verge; lamp posts, traffic lights, signs and clutter at the kerb."""
    kerb = side.edge + 0.5
    if rng.random() < 0.7:
        for z in np.arange(rng.uniform(5, 15), 100, rng.uniform(8, 20)):
            if street.clear(z - 1, z + 1):
                yield side.verge, z, partial(draw_tree, pose=Pose(side.sign * side.verge, z))
    for z in rng.uniform(5, 30, rng.integers(0, 3)):
        yield kerb, z, partial(draw_clutter, pose=Pose(side.sign * kerb, z))
    if rng.random() < 0.75:
        height, reach = rng.uniform(5, 9), -side.sign * rng.uniform(1.5, 2.5)
        for z in np.arange(rng.uniform(6, 25), 110, rng.uniform(18, 30)):
            yield kerb, z, partial(draw_pole, pose=Pose(side.sign * kerb, z), height=height, reach=reach, lamp=True)
    for draw, chance in ((draw_traffic_light, 0.85 if street.crossing else 0.15), (draw_sign, 0.7)):
        if rng.random() < chance:
            at_crossing = street.crossing and draw is draw_traffic_light
            z = street.crossing[0] - 1 if street.crossing and at_crossing else rng.uniform(8, 40)
            reach = -side.sign * (side.edge - rng.uniform(1, 4)) if rng.random() < 0.35 else 0.0
            yield kerb, z, partial(draw, pose=Pose(side.sign * kerb, z), reach=reach)


def people(rng: Rng, side: Side) -> Iterator[Thing]:
    """Pedestrians and parked cycles on the pavement."""
    assert side.walk is not None
    for z in rng.uniform(6, 45, rng.integers(0, 7 if side.town else 3)):
        away = rng.uniform(side.walk[0] + 0.9, side.walk[1] - 0.3)
        yield away, z, partial(draw_person, pose=Pose(side.sign * away, z))
    for motor, chance in ((True, 0.12), (False, 0.25)):
        if rng.random() < chance:
            away, z = side.walk[0] + 1, rng.uniform(6, 20)
            pose = Pose(side.sign * away, z, rng.uniform(0.4, 2.7))
            yield away, z, partial(draw_cycle, pose=pose, motor=motor, ridden=False)


def traffic(rng: Rng, street: Street) -> Iterator[Thing]:
    """Cars in lanes, parked and crossing, now and then a rarer vehicle in a car's place, and people on the road."""
    slots: list[tuple[float, Pose]] = []  # row, pose
    for x in (line + LANE / 2 for line in street.lines[:-1]):
        z = rng.uniform(9, 40)
        while z < 110:
            yaw = (np.pi if x < street.median else 0) + rng.normal(0, 0.03)
            slots.append((abs(x), Pose(x + rng.normal(0, 0.2), z, yaw)))
            z += rng.uniform(10, 60)
    for x in street.parking:
        for z in np.arange(rng.uniform(5, 9), 70, 6.2):
            if rng.random() < 0.6 and street.clear(z - 3, z + 3):
                slots.append((abs(x), Pose(x, z, rng.choice([0, np.pi]))))
    if street.crossing and rng.random() < 0.6:
        x, z = rng.uniform(-8, 8), sum(street.crossing) / 2
        slots.append((abs(x), Pose(x, z, rng.choice([-1, 1]) * np.pi / 2)))

    draws: list[Callable[..., None]] = [draw_car] * len(slots)
    near = [i for i, (_, pose) in enumerate(slots) if pose.z < 32]
    for draw, chance in RARE:
        if near and rng.random() < chance:
            draws[near.pop(int(rng.integers(len(near))))] = draw
    for (row, pose), draw in zip(slots, draws):
        yield row, pose.z, partial(draw, pose=pose)
    if rng.random() < (0.5 if street.crossing else 0.15):
        for x in rng.uniform(*street.edges, rng.integers(1, 5)):
            z = street.crossing[0] - rng.uniform(1, 4) if street.crossing else rng.uniform(10, 25)
            yield abs(x), z, partial(draw_person, pose=Pose(x, z))


# The share of scenes with each of the rarer vehicles.
RARE: tuple[tuple[Callable[..., None], float], ...] = (
    (draw_truck, 0.27),
    (draw_bus, 0.24),
    (partial(draw_cycle, motor=True, ridden=True), 0.22),
    (partial(draw_cycle, motor=False, ridden=True), 0.22),
)


# ----------------------------------------------------------------------------------------------- photograph and files


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


def write_dataset(
    root: Path, counts: Mapping[str, int], seed: int, num_workers: int = 0, height: int = 720, width: int = 1280
) -> None:
    """Write `counts[split]` scenes of each split in BDD100K's current layout, each a function of (seed, split, index).

    Raises:
        UserError: the size is too small, `root` cannot be written to, or holds files of another data set.
    """
    check_size(height, width)
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    ours = {f"{scene_name(*job)}{suffix}" for job in jobs for suffix in (".jpg", ".png")}
    write = partial(_write_scene, root, seed, height, width)
    try:
        for folder in (root / kind / split for split in counts for kind in (IMAGES, MASKS)):
            folder.mkdir(parents=True, exist_ok=True)
            strays = sorted(path.name for path in folder.glob("[!.]*") if path.name not in ours)
            if strays:
                raise UserError(f"{folder}: holds {strays[0]}, not of this data set (give an empty --output_dir)")
        with tqdm(total=len(jobs), desc="scenes", unit="scene") as bar:
            run_jobs(write, jobs, num_workers, bar.update)
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot write: {error.strerror}") from error


def scene_name(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


def _write_scene(root: Path, seed: int, height: int, width: int, job: tuple[str, int]) -> None:
    split, index = job
    scene = draw_scene(np.random.default_rng([seed, zlib.crc32(split.encode()), index]), height, width)
    name = scene_name(split, index)
    for path, array in (
        (root / IMAGES / split / f"{name}.jpg", scene.image[..., ::-1]),  # OpenCV's order: blue, green, red
        (root / MASKS / split / f"{name}.png", scene.mask),
    ):
        with atomic_write(path) as file:
            file.write(cv2.imencode(path.suffix, np.ascontiguousarray(array))[1].tobytes())


def main() -> None:
    parser = Parser(__doc__)
    parser.add_flag("output_dir", type=Path, required=True, help="folder to write the data set to")
    parser.add_flag("train", type=non_negative_int, default=48, help="scenes for training")
    parser.add_flag("val", type=non_negative_int, default=16, help="scenes for validation")
    parser.add_flag("seed", type=non_negative_int, default=0, help="the same seed gives the same files")
    parser.add_flag("height", type=positive_int, default=720, help="pixels")
    parser.add_flag("width", type=positive_int, default=1280, help="pixels")
    parser.add_flag("num_workers", type=non_negative_int, default=0, help="processes; 0 and 1 draw in this one")
    args = parser.parse_args()
    counts = {split: count for split, count in (("train", args.train), ("val", args.val)) if count}
    if not counts:
        raise UserError("nothing to draw: --train and --val are both 0")
    write_dataset(args.output_dir, counts, args.seed, args.num_workers, args.height, args.width)


if __name__ == "__main__":
    run(main)
