"""What stands beside the road: buildings, walls and fences, plants, poles with what they carry, clutter."""

from __future__ import annotations

import numpy as np

from utils.scenes.light import jitter, paint
from utils.scenes.painter import VOID, Painter
from utils.scenes.shapes import Array, Pose, disc, limb, on_face, panes, rect


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


def draw_bollard(p: Painter, pose: Pose, height: float, color: Array) -> None:
    """A short post at the kerb, with a reflector: labelled as a pole."""
    p.begin("pole")
    p.shadow(pose, 0.2, 0.1)
    p.fill(pose.world(rect(-0.07, -0.02, 0.07, height)), color, 20)
    p.fill(pose.world(rect(-0.07, height * 0.75, 0.07, height * 0.87)), jitter(p.rng, (215, 205, 195), 25))


def draw_utility_pole(p: Painter, pose: Pose, height: float, span: float) -> None:
    """A wooden pole with cross-arms and, to the next pole `span` metres on, wires: seen, not labelled."""
    wire = np.full(3, 45.0)
    for u, v in ((-0.9, height - 0.5), (0.9, height - 0.5), (-0.6, height - 1.3), (0.6, height - 1.3)):
        ends = np.linspace(0, 1, 9)
        sag = v - 1.2 * 4 * ends * (1 - ends)
        p.draw_line(np.column_stack([np.full(9, pose.x + u), sag, pose.z + span * ends]), wire)
    p.begin("pole")
    color = jitter(p.rng, (95, 75, 58), 22)
    p.shadow(pose, 0.25, 0.1)
    p.fill(pose.world(rect(-0.13, -0.02, 0.13, height)), color, 90)
    for wide, v in ((1.1, height - 0.6), (0.8, height - 1.4)):
        p.fill(pose.world(rect(-wide, v, wide, v + 0.13)), color * 0.8, 60)


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
