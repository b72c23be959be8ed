"""Tables of classes: lookup, selection, and the ids of one table in another."""

from __future__ import annotations

import numpy as np
import pytest

from utils.data.classes import BDD100K, ClassTable, SemanticClass, read_class_table
from utils.runtime.errors import UserError


def table(*names: str, aliases: tuple[str, ...] = ()) -> ClassTable:
    """A table of these names; the last class has the aliases."""
    last = len(names) - 1
    return ClassTable(
        tuple(
            SemanticClass(i, name, (i, 2 * i, 7), aliases=aliases if i == last else ()) for i, name in enumerate(names)
        )
    )


def test_palette_and_lookup() -> None:
    assert BDD100K.palette[13].tolist() == [0, 0, 142] and not BDD100K.palette[19:].any()
    assert BDD100K.ids_by_name["pedestrian"] == BDD100K.ids_by_name["person"] == 11
    for name in ("traffic light", "Traffic_Light", "TRAFFIC LIGHT"):
        assert BDD100K.id_of(name) == 6
    with pytest.raises(UserError, match=r"no class 'lorry'; the classes are road, sidewalk"):
        BDD100K.id_of("lorry")
    assert table("a", "b", aliases=("A",)).ids_by_name == {"a": 0, "b": 1}  # a name wins over an alias


@pytest.mark.parametrize("other", [False, True])
def test_a_selection_maps_the_ids_of_its_origin(other: bool) -> None:
    chosen = BDD100K.select(["car", "road"], other=other)
    assert chosen.names == (("car", "road", "other") if other else ("car", "road"))
    assert [c.id for c in chosen] == list(range(len(chosen)))
    assert len({c.color for c in chosen}) == len(chosen)
    ids = chosen.ids_of(BDD100K)
    assert ids[13] == 0 and ids[0] == 1 and ids[255] == 255
    assert set(np.delete(ids[:19], [0, 13])) == {2 if other else 255}
    assert read_class_table(chosen.to_plain()) == chosen


@pytest.mark.parametrize(
    ("origin", "name"),
    [(table("a", "other"), "other"), (table("a", "Other"), "Other"), (table("a", "void", aliases=("other",)), "void")],
)
def test_a_class_of_the_data_like_other_does_not_take_the_rest(origin: ClassTable, name: str) -> None:
    assert origin.select([name], other=False).ids_of(origin)[:2].tolist() == [255, 0]


def test_selections_that_are_wrong() -> None:
    with pytest.raises(UserError, match="class 'car' is given twice"):
        BDD100K.select(["car", "Car"], other=False)
    with pytest.raises(UserError, match="a class named 'other'; use --other_classes ignore"):
        table("a", "other").select(["a"], other=True)
    with pytest.raises(UserError, match="no class is left for 'other'; use --other_classes ignore"):
        table("a", "b").select(["b", "a"], other=True)


def test_tables_of_other_names_are_refused_or_matched() -> None:
    model, data = table("road", "person", "car"), table("sky", "Car", "walker", aliases=("person",))
    with pytest.raises(UserError, match=r"has 3 classes \(sky, Car, walker\), but the model has 3 \(road,"):
        model.ids_of(data)
    assert model.ids_of(data, match=True)[:4].tolist() == [255, 2, 1, 255]
    with pytest.raises(UserError, match="no class is in both tables: road, person, car; sky, sea"):
        model.ids_of(table("sky", "sea"), match=True)
    # The same names in another order are other ids.
    with pytest.raises(UserError, match="match_classes"):
        model.ids_of(table("car", "road", "person"))
    with pytest.raises(UserError, match="match_classes"):
        model.select(["car"], other=False).ids_of(table("car", "road", "person"))


def test_the_same_table_keeps_its_ids() -> None:
    assert BDD100K.ids_of(BDD100K)[:20].tolist() == [*range(19), 255]


def test_a_class_is_found_by_its_name_before_its_aliases() -> None:
    assert table("a", "b").find(SemanticClass(0, "b", (1, 2, 3), aliases=("a",))) == 1


def test_other_has_a_colour_and_a_name_of_its_own() -> None:
    grey = ClassTable((SemanticClass(0, "a", (96, 96, 96)), SemanticClass(1, "b", (0, 0, 0))))
    assert len({c.color for c in grey.select(["a"], other=True)}) == 2
    for origin in (table("a", "Other"), table("a", "void", aliases=("other",))):
        with pytest.raises(UserError, match="--other_classes ignore"):
            origin.select(["a"], other=True)


A, B = {"name": "a", "color": [1, 2, 3]}, {"name": "b", "color": [4, 5, 6], "group": "g", "aliases": ["c"]}


def test_plain_values_are_read_back() -> None:
    plain = {"classes": [A, B], "selected_from": ["b", "x", "a"]}
    assert read_class_table(plain).to_plain() == plain


@pytest.mark.parametrize(
    "plain",
    [
        {"classes": []},
        {"classes": [A] * 251},
        {"classes": [A, {**B, "name": "A"}]},
        {"classes": [A, {**B, "aliases": ["A"]}]},
        {"classes": [{**A, "aliases": ["C"]}, B]},
        {"classes": [{**A, "name": "a,b"}]},
        {"classes": [{**A, "aliases": [1]}]},
        {"classes": [{**A, "aliases": ["x,y"]}]},
        {"classes": [{**A, "color": [1, 2, 256]}]},
        {"classes": [{**A, "color": [1, 2, -1]}]},
        {"classes": [{**A, "group": 1}]},
        {"classes": [A, B], "selected_from": [1]},
        {"classes": [A, B], "selected_from": ["x,y"]},
    ],
)
def test_what_is_no_table_of_classes(plain: object) -> None:
    with pytest.raises(ValueError, match="not a table of classes"):
        read_class_table(plain)
