"""Text in pictures, and names of classes in any script.

OpenCV's font also has Chinese, that of matplotlib has not. A name that matplotlib's font lacks is drawn by OpenCV, so
that a picture is the same on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text
from PIL import Image

from utils.runtime.errors import printable
from utils.runtime.files import atomic_write

INK = (20, 20, 20)
_FONT = "uni"  # of OpenCV: also Chinese, on any machine
_SCALE = 0.92  # of OpenCV's font to that of matplotlib
_DIGIT = 0.636  # the width of a digit in matplotlib's font, in ems
_LONGEST = 22  # characters of a name in a chart


def text_width(text: str, size: int) -> int:
    """The width in pixels of a line of text by `write_text`."""
    return cv2.getTextSize((0, 0), printable(text), (0, 0), cv2.FontFace(_FONT), size)[2]


def write_text(canvas: np.ndarray, text: str, x: int, y: int, size: int, color: tuple[int, int, int] = INK) -> None:
    """Write a line of text whose letters stand on row y. OpenCV crashes on text that is not `printable`."""
    cv2.putText(canvas, printable(text), (x, y), color, cv2.FontFace(_FONT), size)


def shown_names(names: Sequence[str]) -> list[str]:
    """What pictures call the classes: by their names, or "class 7" if OpenCV's font lacks a character of it."""
    return [name if all(map(_is_drawn, name)) else f"class {i}" for i, name in enumerate(names)]


def short_names(names: Sequence[str]) -> list[str]:
    """What charts call the classes: as `shown_names`, but long names lose their middle, or all if then alike."""
    half = _LONGEST // 2
    short = [name if len(name) <= _LONGEST else f"{name[: half - 1]}…{name[-half:]}" for name in shown_names(names)]
    return [name if short.count(name) == 1 else f"class {i}" for i, name in enumerate(short)]


@cache
def _is_drawn(character: str) -> bool:
    """Whether OpenCV's font has a character; in place of others it draws a question mark."""
    if character.isascii():
        return True
    one, other = np.zeros((2, 48, 48, 3), dtype=np.uint8)
    write_text(one, character, 4, 36, 24, (255, 255, 255))
    write_text(other, "?", 4, 36, 24, (255, 255, 255))
    return not np.array_equal(one, other)


@cache
def _is_in_matplotlib(character: str) -> bool:
    return ord(character) in get_font(findfont(FontProperties())).get_charmap()


def placeholder(text: str) -> str:
    """The text; if matplotlib's font lacks a character, digits of its width that `save_figure` replaces."""
    if all(map(_is_in_matplotlib, text)):
        return text
    return "0" * math.ceil(text_width(text, 100) / 100 * _SCALE / _DIGIT)


def letter(artist: Text, text: str) -> None:
    """Show in an artist, whose text is `placeholder(text)`, the text itself, which is not read as a formula."""
    artist.set_parse_math(False)
    if placeholder(text) != text:
        artist.set_alpha(0)
        artist.set_gid(text)  # for `save_figure`


def letter_ticks(axis: Axis, positions: Sequence[float], names: Sequence[str], **options: Any) -> list[Text]:
    """Name ticks; returns the artists of the names. The options are those of matplotlib's texts."""
    axis.set_ticks(positions, [placeholder(name) for name in names], **options)
    artists = axis.get_ticklabels()
    for artist, name in zip(artists, names):
        letter(artist, name)
    return artists


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG with OpenCV's letters where matplotlib has none."""
    if artists := [artist for artist in figure.findobj(Text) if artist.get_gid()]:
        figure.draw_without_rendering()
        for artist in artists:
            _draw(figure, artist)
    with atomic_write(path) as file:
        # Level 1 takes half the time, and files are only 4 % larger.
        figure.savefig(file, format="png", dpi=figure.dpi, pil_kwargs={"compress_level": 1})


def _draw(figure: Figure, artist: Text) -> None:
    """Draw the letters of `letter` over the digits that keep their room."""
    text, angle = artist.get_gid() or "", artist.get_rotation()
    size = round(_SCALE * float(artist.get_fontsize()) * figure.dpi / 72)
    mask = np.zeros((round(1.4 * size), text_width(text, size) + 2, 3), dtype=np.uint8)
    write_text(mask, text, 1, size, size, (255, 255, 255))
    alpha = np.asarray(Image.fromarray(mask[..., 0]).rotate(angle, Image.Resampling.BICUBIC, expand=True))
    pixels = np.dstack([np.full(alpha.shape, round(255 * part), np.uint8) for part in to_rgb(artist.get_color())])
    height, width = alpha.shape
    box = artist.get_window_extent()
    x = box.x1 - width if artist.get_horizontalalignment() == "right" else box.x0
    y = box.y1 - height if angle else (box.y0 + box.y1 - height) / 2
    figure.figimage(np.dstack([pixels, alpha]), round(x), round(y), zorder=10)
