"""The camera and its canvas: polygons given in metres become pixels, and labels, of one picture."""

from __future__ import annotations

import math

import cv2
import numpy as np

from utils.data.classes import BDD100K, IGNORE_LABEL
from utils.scenes.light import Rng, random_light
from utils.scenes.shapes import Array, Corner, Faces, Pose, rect

VOID = "void"  # what is drawn but not labelled
CLASS_ID = {VOID: IGNORE_LABEL} | {name: i for i, name in enumerate(BDD100K.names)}

# A box's corners are numbered round its bottom, then its top: back left, back right, front right, front left.
FACE_NAMES = ("back", "right", "front", "left", "top")
FACE_CORNERS = np.array([(0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7), (4, 5, 6, 7)])


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

    def draw_line(self, points: Array, color: Array) -> None:
        """Draw a thin line (N, 3) into the image, not the labels, as what is too thin to be labelled."""
        clearness = math.exp(-points[..., 2].mean() / self.light.visibility)
        lit = np.clip(color * self.light.tint * clearness + self.light.haze * (1 - clearness), 0, 255)
        corners = np.rint(np.clip(self.project(points), -2e4, 2e4) * 16).astype(np.int32)
        width = max(1, self.instances.shape[1] // 900)
        cv2.polylines(self.pixels, [corners], False, [*lit.tolist(), 0], width, cv2.LINE_AA, shift=4)

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
