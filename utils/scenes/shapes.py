"""Shapes in metres, and where they stand in the world: plain arrays of points, which know nothing of cameras.

World coordinates: X to the right, Y up, Z ahead of the camera's foot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Point = tuple[float, float]
Points = Sequence[Point]
Corner = tuple[float, float, float]
Faces = dict[str, Array]  # name -> (4, 3) world corners: bottom left, bottom right, top right, top left from outside


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
