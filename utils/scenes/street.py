"""A street's layout: its cross-section, and all that stands or moves in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from utils.scenes.light import Rng, jitter, paint
from utils.scenes.painter import Painter
from utils.scenes.people import draw_person
from utils.scenes.roadside import (
    draw_bollard,
    draw_building,
    draw_clutter,
    draw_fence,
    draw_hedge,
    draw_pole,
    draw_sign,
    draw_traffic_light,
    draw_tree,
    draw_utility_pole,
    draw_wall,
)
from utils.scenes.shapes import Pose
from utils.scenes.vehicles import draw_bus, draw_car, draw_cycle, draw_train, draw_truck

Thing = tuple[float, float, Callable[[Painter], None]]  # its row's distance from X = 0, its own, how to draw it

LANE = 3.5  # metres
FAR = 160.0  # metres; beyond there is only ground and a skyline


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
    """Trees and utility poles on the verge; lamp posts, traffic lights, signs, bollards and clutter at the kerb."""
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
    if not side.town and rng.random() < 0.35:
        height, span, away = rng.uniform(7, 10), rng.uniform(22, 35), side.verge + 0.3
        for z in np.arange(rng.uniform(6, 20), 110, span):
            yield away, z, partial(draw_utility_pole, pose=Pose(side.sign * away, z), height=height, span=span)
    if side.walk and rng.random() < 0.3:
        height, color = rng.uniform(0.7, 1.1), jitter(rng, np.full(3, rng.uniform(40, 200)), 20)
        for z in np.arange(rng.uniform(4, 10), rng.uniform(20, 50), rng.uniform(1.5, 4)):
            if street.clear(z - 1, z + 1):
                yield kerb, z, partial(draw_bollard, pose=Pose(side.sign * kerb, z), height=height, color=color)
    for draw, chance in ((draw_traffic_light, 0.85 if street.crossing else 0.15), (draw_sign, 0.7), (draw_sign, 0.35)):
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
