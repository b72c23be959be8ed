"""Procedurally drawn driving scenes: the built-in data set, to run everything without a download.

A scene is a street laid out in metres, seen by a pinhole camera and painted from far to near. Every polygon goes into
the image and into the map of instances at once, and the mask is looked up from that map, so the edges of all three
agree to the pixel.

Each module builds on those before it: shapes, light, painter, roadside and people, vehicles, street, backdrop, scene,
dataset. `python -m utils.scenes --help` writes a data set.
"""

from utils.scenes.dataset import write_dataset
from utils.scenes.scene import Scene, draw_scene

__all__ = ["Scene", "draw_scene", "write_dataset"]
