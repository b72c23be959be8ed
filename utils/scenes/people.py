"""People, on foot and on a saddle."""

from __future__ import annotations

import math

import numpy as np

from utils.scenes.light import jitter, paint
from utils.scenes.painter import Painter
from utils.scenes.shapes import Point, Points, Pose, disc, limb, rect


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
