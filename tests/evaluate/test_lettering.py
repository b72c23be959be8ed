"""utils.evaluate.lettering: names in scripts that matplotlib's font lacks are drawn, not boxed or left out."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from utils.evaluate.lettering import letter, letter_ticks, placeholder, save_figure, short_names, shown_names

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns of a missing letter


def drawn(path: Path, name: str, **options: object) -> np.ndarray:
    """Where the picture of a figure with this text has ink."""
    figure = Figure(figsize=(3, 2), dpi=100)
    letter(figure.text(0.5, 0.5, placeholder(name), **options), name)  # type: ignore[arg-type]
    save_figure(figure, path)
    pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert pixels is not None
    return pixels < 128


def test_chinese_is_drawn_where_the_text_stands(tmp_path: Path) -> None:
    ink = drawn(tmp_path / "a.png", "道路 12")
    rows, columns = np.nonzero(ink)
    assert ink.sum() > 150
    assert 148 <= columns.min() <= 156 and 190 <= columns.max() <= 225
    assert rows.min() >= 80 and rows.max() <= 106
    assert (ink != drawn(tmp_path / "b.png", "道客 12")).any()
    right = np.nonzero(drawn(tmp_path / "c.png", "道路 12", ha="right"))[1]
    assert 144 <= right.max() <= 151
    turned = drawn(tmp_path / "d.png", "道路 12", rotation=90)
    assert np.ptp(np.nonzero(turned)[0]) > 1.5 * np.ptp(np.nonzero(turned)[1])


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    assert drawn(tmp_path / "a.png", "$x^2$").sum() > drawn(tmp_path / "b.png", "x^2").sum() + 20
    assert drawn(tmp_path / "c.png", "$x_{").any()


def test_what_no_font_has_is_called_by_its_id() -> None:
    assert shown_names(["road", "道路", "ไทย", "a?", "🚗 car", "é"]) == [
        "road",
        "道路",
        "class 2",
        "a?",
        "class 4",
        "é",
    ]


def test_short_names_keep_both_ends_and_differ() -> None:
    long = "construction--barrier--concrete-block"
    assert short_names([long, "road"]) == ["constructi…crete-block", "road"]
    assert short_names([long, long.replace("barrier", "curb")]) == ["class 0", "class 1"]


def test_ticks_have_room_for_their_names(tmp_path: Path) -> None:
    lefts = []
    for name in ("路", "人行横道与非机动车混合车道"):
        figure = Figure(figsize=(5, 2), dpi=100, layout="constrained")
        axes = figure.subplots()
        letter_ticks(axes.yaxis, [0.5], [name])
        save_figure(figure, tmp_path / "a.png")
        pixels = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_GRAYSCALE)
        assert pixels is not None
        assert (pixels[:, :2] == 255).all()  # not cut off
        lefts.append(axes.get_position().x0)
    assert lefts[1] > lefts[0] + 0.25
