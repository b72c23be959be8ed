"""One scene: a street, painted from far to near and photographed, with the labels of every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.runtime.errors import UserError
from utils.scenes.backdrop import draw_ground, draw_hood, draw_sky
from utils.scenes.light import Rng, photograph
from utils.scenes.painter import CLASS_ID, Painter
from utils.scenes.shapes import Array
from utils.scenes.street import Street, furnish

MIN_SIDE = 64  # pixels; below, most things vanish


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
    wet = np.isin(mask, [CLASS_ID["road"], CLASS_ID["sidewalk"]])
    return Scene(photograph(rng, p.pixels, p.light, wet, (p.center, p.horizon)), mask, p.instances)


def check_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"a scene of {height} x {width} pixels is too small; --height and --width must be at least {MIN_SIDE}"
        )
