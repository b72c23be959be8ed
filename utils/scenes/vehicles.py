"""Everything on wheels, from bicycles to trains."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from utils.scenes.light import jitter, paint
from utils.scenes.painter import Painter
from utils.scenes.people import draw_rider
from utils.scenes.shapes import Array, Faces, Pose, disc, limb, on_face, panes, rect

CAR_SHAPES = (  # half width; heights of sill, belt, roof; where from the tail the cabin begins and ends
    (0.88, 0.28, 0.90, 1.42, 0.55, 2.90),  # saloon
    (0.85, 0.28, 0.92, 1.50, 0.05, 2.75),  # hatchback
    (0.93, 0.40, 1.05, 1.75, 0.05, 3.10),  # off-roader
    (0.95, 0.35, 1.10, 2.05, 0.00, 3.70),  # van
)


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
