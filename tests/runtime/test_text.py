"""utils.runtime.text: columns stay straight with characters that are two places wide, or none."""

import pytest

from utils.runtime.text import class_column, display_width, pad


@pytest.mark.parametrize(
    ("text", "width"), [("", 0), ("road", 4), ("道路", 4), ("ｒ", 2), ("é", 1), ("e\u0301", 1), ("道 a", 4)]
)
def test_width_is_that_of_a_terminal(text: str, width: int) -> None:
    assert display_width(text) == width
    assert pad(text, 6) == text + (6 - width) * " "
    assert pad(text, width - 1) == text


def test_class_column_is_as_wide_as_its_widest_name_and_id() -> None:
    assert class_column(["road", "道路"]) == [" 0. road" + 16 * " ", " 1. 道路" + 16 * " "]
    assert class_column(["a", "道" * 12]) == [" 0. a" + 23 * " ", " 1. " + "道" * 12]
    assert class_column(["a"] * 101)[7] == "  7. a" + 19 * " "
