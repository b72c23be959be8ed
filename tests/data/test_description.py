"""Descriptions of data sets: what is read, and the one line for each wrong one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from utils.data.classes import BDD100K
from utils.data.description import (
    MAX_BYTES,
    Description,
    Labels,
    Layout,
    built_in_names,
    load_description,
    read_plain_description,
)
from utils.runtime.errors import UserError

GOOD = """\
name: my-streets
classes:
  - {id: 1, name: car, color: [0, 0, 142], group: vehicle, aliases: [auto]}
  - {id: 0, name: road, color: [128, 64, 128]}
labels:
  kind: ids
  values: {road: [7], car: [26, 27]}
  ignore: [0, -1]
layout:
  images: images/{split}/{folders}/{stem}.*
  masks: masks/{split}/{folders}/{stem}.png
"""


def write(folder, text):
    path = folder / "streets.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_description(tmp_path):
    found = load_description(write(tmp_path, GOOD))
    assert found.name == "my-streets" and found.classes.names == ("road", "car")
    road, car = found.classes
    assert (road.color, road.group, road.aliases) == ((128, 64, 128), "", ())
    assert (car.color, car.group, car.aliases) == ((0, 0, 142), "vehicle", ("auto",))
    assert found.labels == Labels("ids", {7: 0, 26: 1, 27: 1}, frozenset({0, 255}), "error")
    assert found.layouts == (Layout("images/{split}/{folders}/{stem}.*", "masks/{split}/{folders}/{stem}.png"),)


@pytest.mark.parametrize("manual", ["docs/datasets.md", "docs/zh/datasets.md"])
def test_the_manuals_example(manual, tmp_path):
    text = (Path(__file__).parents[2] / manual).read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert load_description(write(tmp_path, example)).classes.names == ("road", "car")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == built_in_names()


def test_names_in_chinese_and_a_byte_order_mark(tmp_path):
    text = GOOD.replace("name: road", "name: 道路").replace("{road:", "{道路:")
    assert load_description(write(tmp_path, "\ufeff" + text)).classes.names == ("道路", "car")


def test_what_is_as_large_as_may_be(tmp_path):
    classes = "".join(f"  - {{id: {i}, name: {i:a>64}, color: [0, 1, {i}], group: {i:b>64}}}\n" for i in range(250))
    text = re.sub(r"classes:\n(  .*\n)+", f"classes:\n{classes}", GOOD)
    text = re.sub(r"labels:\n(  .*\n)+", "labels: {kind: train_ids}\n", text)
    assert len(load_description(write(tmp_path, text)).classes) == 250
    with pytest.raises(UserError, match="must be 1 to 64 printable characters"):
        load_description(write(tmp_path, text.replace("name: a", "name: aa", 1)))
    with pytest.raises(UserError, match="must be at most 64 printable characters"):
        load_description(write(tmp_path, text.replace("group: b", "group: bb", 1)))


def replaced(labels):
    return re.sub(r"labels:\n(  .*\n)+", f"labels: {labels}\n", GOOD)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("{kind: train_ids}", Labels("ids", {0: 0, 1: 1}, frozenset({255}), "error")),
        (
            "{kind: train_ids, ignore: [2], unlisted: ignore}",
            Labels("ids", {0: 0, 1: 1}, frozenset({2, 255}), "ignore"),
        ),
        ("{kind: ids, values: {car: [255, 0]}}", Labels("ids", {255: 1, 0: 1}, frozenset(), "error")),
        ("{kind: colors}", Labels("colors", {(128, 64, 128): 0, (0, 0, 142): 1}, frozenset(), "error")),
        (
            "{kind: colors, values: {road: [[1, 2, 3], [4, 5, 6]]}, ignore: [[0, 0, 0]]}",
            Labels("colors", {(1, 2, 3): 0, (4, 5, 6): 0}, frozenset({(0, 0, 0)}), "error"),
        ),
    ],
)
def test_labels(labels, expected, tmp_path):
    assert load_description(write(tmp_path, replaced(labels))).labels == expected


@pytest.mark.parametrize("name", built_in_names())
def test_a_built_in_data_set(name):
    found = load_description(name)
    assert found.name == name and isinstance(found, Description)
    assert all("{stem}" in layout.images for layout in found.layouts)
    assert read_plain_description(json.loads(json.dumps(found.to_plain()))) == found


def test_parts_of_a_built_in_data_set(tmp_path):
    text = "name: own\nclasses: bdd100k\nlabels: {kind: train_ids}\nlayout: folders\n"
    found = load_description(write(tmp_path, text))
    assert found.classes == BDD100K and found.layouts == load_description("folders").layouts


def test_plain_values_are_read_back(tmp_path):
    layout = "layout:\n  - images: a/{stem}.jpg\n    masks: b/{stem}_L.png\n    splits: {train: ['0*'], val: ['1*']}\n"
    layout += "    labels: {kind: colors, ignore: [[0, 0, 0]]}\n"
    text = re.sub(r"layout:\n(  .*\n)+", layout, GOOD).replace("name: road", "name: 'yes'").replace("{road:", "{'yes':")
    found = load_description(write(tmp_path, text))
    plain = json.loads(json.dumps(found.to_plain()))
    assert read_plain_description(plain) == found
    changes: list[dict[str, object]] = [{"name": "../x"}, {"more": 1}, {"classes": [{"id": 0}]}]
    wrongs: list[object] = [None, [], "a: &a", *(plain | change for change in changes)]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="not a description"):
            read_plain_description(wrong)


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"^cityscape: no such data set .*bdd100k, .*folders"):
        load_description("cityscape")
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        load_description(str(tmp_path / "nowhere.yaml"))


ROAD, CAR = "  - {id: 0, name: road, color: [128, 64, 128]}", "{id: 1, name: car, color: [0, 0, 142]"
IMAGES, MASKS = "images/{split}/{folders}/{stem}.*", "masks/{split}/{folders}/{stem}.png"
MANY = "".join(f"  - {{id: {i}, name: c{i}, color: [0, 1, {i}]}}\n" for i in range(251))
# What a good description is changed to, the line, and words of the message.
BAD = {
    "unknown field": (("ignore:", "ignored:"), 8, "unknown field 'ignored' in labels; did you mean 'ignore'"),
    "unknown top field": (("name: my", "size: 3\nname: my"), 1, "unknown field 'size' in the description; it has name"),
    "missing field": (("name: my-streets\n", ""), 1, "the description lacks name"),
    "missing class field": ((", color: [128, 64, 128]", ""), 4, "a class lacks color"),
    "name of a built-in": (("my-streets", "folders"), 1, "'folders' is a built-in data set's"),
    "name with a slash": (("my-streets", "my/streets"), 1, "must be letters, digits"),
    "name that is a number": (("my-streets", "2024"), 1, "name must be text, not a number (2024); put it in quotes"),
    "name that is a truth value": (("name: road", "name: no"), 4, "must be text, not yes or no (no)"),
    "name that is empty": (("name: my-streets", "name:"), 1, "name must be text, not nothing"),
    "class with a comma": (("name: road", "name: 'road, wet'"), 4, "without a comma or a quote"),
    "two classes of one id": (("id: 0", "id: 1"), 4, "id 1 is both 'car' and 'road'"),
    "a gap in the ids": (("id: 1", "id: 2"), 3, "the id of 'car' is 2; it must be 0 to 1, as ids count from 0"),
    "id 255": (("id: 1", "id: 255"), 3, "the id of 'car' is 255; it must be 0 to 1"),
    "id in octal": (("id: 1", "id: 01"), 3, "must be a whole number"),
    "a name twice": (("name: road", "name: CAR"), 4, "class 'CAR' is given twice"),
    "alias of a name": (("[auto]", "[Road]"), 3, "alias 'Road' of 'car' is used twice"),
    "a color twice": (("[128, 64, 128]", "[0, 0, 142]"), 4, "'car' and 'road' have one color"),
    "a color of two": (("[128, 64, 128]", "[128, 64]"), 4, "the color of 'road' must be three bytes"),
    "a color of 256": (("[128, 64, 128]", "[128, 64, 256]"), 4, "the color of 'road' must be three bytes"),
    "a color of text": (
        ("[128, 64, 128]", "red"),
        4,
        "'road' must be red, green and blue, such as [128, 64, 128], not",
    ),
    "a color in hex": (("[128, 64, 128]", "'#8040ff'"), 4, "such as [128, 64, 255], not text (#8040ff)"),
    "one color for a list": (
        ("kind: ids\n  values: {road: [7], car: [26, 27]}", "kind: colors\n  values: {road: [7, 8, 9]}"),
        7,
        "must be red, green and blue, such as [128, 64, 128], and one color in a list [[128, 64, 128]]",
    ),
    "251 classes": ((f"  - {CAR}, group: vehicle, aliases: [auto]}}\n{ROAD}\n", MANY), 3, "there are 251 classes"),
    "no classes": ((f"\n  - {CAR}, group: vehicle, aliases: [auto]}}\n{ROAD}\n", " []\n"), 2, "there are 0 classes"),
    "unknown classes": (
        (f"\n  - {CAR}, group: vehicle, aliases: [auto]}}\n{ROAD}\n", " kitti\n"),
        2,
        "'kitti' is unknown",
    ),
    "unknown kind": (("kind: ids", "kind: id"), 6, "kind 'id' is unknown; it is one of train_ids, ids, colors"),
    "unknown unlisted": (("kind: ids", "kind: ids\n  unlisted: skip"), 7, "unlisted 'skip' is unknown"),
    "values of train ids": (("kind: ids", "kind: train_ids"), 7, "kind train_ids takes no values"),
    "no values": (("  values: {road: [7], car: [26, 27]}\n", ""), 6, "kind ids needs values"),
    "no value of any class": (("{road: [7], car: [26, 27]}", "{road: []}"), 7, "values is empty"),
    "value of an unknown class": (("{road: [7]", "{raod: [7]"), 7, "unknown class 'raod'; did you mean 'road'"),
    "value of two classes": (("[26, 27]", "[26, 7]"), 7, "value 7 is listed for 'road' and 'car'"),
    "value of a class and ignored": (("[0, -1]", "[27]"), 8, "value 27 is listed for 'car' and in ignore"),
    "value above a byte": (("[26, 27]", "[26, 300]"), 7, "a value of 'car' is 300; it must be 0 to 255"),
    "value below a byte": (("[0, -1]", "[-2]"), 8, "a value of ignore is -2"),
    "value that is a color": (("[7]", "[[7, 7, 7]]"), 7, "a value of 'road' must be a whole number, not a list"),
    "value of 5,000 digits": (("[7]", f"[{'9' * 5000}]"), 7, "must be a whole number"),
    "values not in a list": (("[7]", "7"), 7, "the values of 'road' must be a list"),
    "class twice in values": (("{road: [7],", "{car: [7],"), 7, "'car' is given twice in values"),
    "pattern without stem": ((IMAGES, "images/{split}/a.*"), 10, "lacks {stem}"),
    "pattern without split": (
        (MASKS, "masks/{stem}.png"),
        11,
        "lacks {split}; add it, or divide the images with splits",
    ),
    "absolute pattern": ((IMAGES, "/data/{split}/{stem}.*"), 10, "leads out of the root"),
    "pattern above the root": ((MASKS, "../{split}/{stem}.png"), 11, "leads out of the root"),
    "open brace": ((IMAGES, "images/{split}/{stem.*"), 10, "has a brace that is not a placeholder"),
    "format in a brace": ((IMAGES, "images/{split}/{stem!r}.*"), 10, "has a brace that is not a placeholder"),
    "placeholder of masks alone": ((MASKS, "masks/{split}/{city}/{stem}.png"), 11, "has {city}, which images lack"),
    "star in a folder": ((IMAGES, "images/{split}/*/{stem}.*"), 10, "has a *"),
    "masks of JPEG": ((MASKS, "masks/{split}/{stem}.jpg"), 11, "JPEG and WebP change values"),
    "images of GIF": ((IMAGES, "images/{split}/{stem}.gif"), 10, "must end in .* or one of"),
    "name with a folder": (("png\n", "png\n  name: '{split}/{stem}'\n"), 12, "must be a file's name"),
    "name with any folders": (("png\n", "png\n  name: '{folders}_{stem}'\n"), 12, "which may be several folders"),
    "name without stem": (("png\n", "png\n  name: '{split}'\n"), 12, "lacks {stem}"),
    "split that leads out": (("png\n", "png\n  splits: {../x: [a]}\n"), 12, "must be a plain folder name"),
    "split without patterns": (("png\n", "png\n  splits: {train: []}\n"), 12, "split 'train' needs printable patterns"),
    "unknown layout": ((f"\n  images: {IMAGES}\n  masks: {MASKS}", " kitti"), 9, "layout 'kitti' is unknown"),
    "layout with labels of its own": (
        (f"\n  images: {IMAGES}\n  masks: {MASKS}", " cityscapes"),
        9,
        "the layout of cityscapes has labels of its own; write the patterns out",
    ),
    "empty layout": ((f"\n  images: {IMAGES}\n  masks: {MASKS}", " []"), 9, "layout is empty"),
    "a key twice": (("labels:", "name: b\nlabels:"), 5, "'name' is given twice in the description"),
    "a list at the top": ((GOOD, "- name: a\n- b\n"), 1, "must be `key: value` entries, not a list"),
    "two documents": (("labels:", "---\nlabels:"), 5, "a second document begins here"),
    "an anchor": (("color: [0", "color: &c [0"), 3, "anchors (&) and aliases (*) are not supported"),
    "a bomb": ((GOOD, 'a: &a ["x", "x"]\nb: &b [*a, *a]\nc: &c [*b, *b]\n'), 1, "anchors (&) and aliases"),
    "a merge": (("id: 0", "<<: {id: 0}"), 4, "unknown field '<<' in a class"),
    "a tag that runs code": (("my-streets", "!!python/object/apply:os.system [ls]"), 1, "tags such as"),
    "a tag of a type": (("my-streets", "!!str 1"), 1, "tags such as"),
    "deep nesting": (("my-streets", "[" * 5000), 1, "nested more than"),
    "not YAML": (("kind: ids", "kind: ids: ids"), 6, "mapping values are not allowed here"),
    "a tab": (("  kind: ids", "\tkind: ids"), 6, "cannot start any token; line 6 begins with a tab; use spaces"),
    "a full-width comma": (("id: 0, name", "id: 0，name"), 4, "line 4 has a full-width ，, which YAML does not read"),
    "a full-width colon": (("kind: ids", "kind：ids"), 7, "line 6 has a full-width ：, which"),
    "a pattern without quotes": (
        (IMAGES, "{split}/{stem}.*"),
        10,
        "in line 10, put the text that begins with { in quotes",
    ),
    "a key without a colon": (("labels:", "labels"), 5, "could not find expected ':'"),
    "an open list": (("[26, 27]", "[26, 27"), 7, ""),
    "a control character": (("my-streets", "my\x07streets"), 1, "holds a control character"),
    "empty": ((GOOD, "# nothing\n"), 1, "is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_description_is_one_line_with_its_line_number(case, tmp_path):
    (old, new), line, words = BAD[case]
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_description(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: ") and words in message
    assert "\n" not in message and len(message) < 600


def test_not_utf8_and_too_large(tmp_path):
    path = write(tmp_path, GOOD.replace("road", "stra\xdfe").encode("latin-1"))
    with pytest.raises(UserError, match=rf"^{re.escape(path)}:4: not UTF-8 text"):
        load_description(path)
    path = write(tmp_path, GOOD + "#" * MAX_BYTES)
    with pytest.raises(UserError, match=rf"^{re.escape(path)}: .*"):
        load_description(path)
