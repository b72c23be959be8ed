"""Finding and pairing files by a description's patterns, and reading masks by its labels."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data import bdd100k
from utils.data.bdd100k import Item, LabelError, Split, check_first_masks, read_item, read_mask
from utils.data.classes import ClassTable, SemanticClass
from utils.data.description import Description, Labels, Layout, load_description
from utils.data.finding import find_split
from utils.runtime.errors import UserError

CLASSES = ClassTable((SemanticClass(0, "road", (128, 64, 128)), SemanticClass(1, "car", (0, 0, 142))))
LABELS = Labels("ids", {7: 0, 26: 1, 27: 1}, frozenset({0, 255}), "error")
COLORS = Labels("colors", {(128, 64, 128): 0, (0, 0, 142): 1}, frozenset({(0, 0, 0)}), "error")


def described(*layouts):
    return Description("streets", CLASSES, LABELS, tuple(Layout(*fields) for fields in layouts))


CITIES = ("img/{split}/{city}/{stem}_left.*", "gt/{split}/{city}/{stem}_ids.png")


def lay_out(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(split):
    return [(item.name, item.image.name, item.mask and item.mask.name) for item in split.items]


def test_pairs_by_all_placeholders(tmp_path):
    lay_out(
        tmp_path, "img/train/b/x_1_left.jpg", "img/train/a/y_left.PNG", "img/train/a/readme.txt", "img/val/a/z_left.jpg"
    )
    lay_out(tmp_path, "gt/train/a/y_ids.png", "gt/train/b/x_1_ids.PNG", "gt/train/b/x_1_color.png")
    split = find_split(tmp_path, "train", described(CITIES))
    assert found(split) == [("x_1", "x_1_left.jpg", "x_1_ids.PNG"), ("y", "y_left.PNG", "y_ids.png")]
    assert split.labelled and split.labels == LABELS and split.notes == []
    assert (split.image_dir, split.mask_dir, split.base) == (tmp_path / "img/train", tmp_path / "gt/train", tmp_path)
    assert split.images_without_mask == split.masks_without_image == []


def test_missing_partners_are_listed_and_hidden_files_left_out(tmp_path):
    lay_out(
        tmp_path,
        "img/train/a/x_left.jpg",
        "img/train/a/y_left.jpg",
        "img/train/a/._x_left.jpg",
        "img/train/.a/h_left.jpg",
    )
    lay_out(tmp_path, "gt/train/a/x_ids.png", "gt/train/b/y_ids.png")
    split = find_split(tmp_path, "train", described(CITIES))
    assert found(split) == [("x", "x_left.jpg", "x_ids.png")]
    assert split.images_without_mask == [tmp_path / "img/train/a/y_left.jpg"]
    assert split.masks_without_image == [tmp_path / "gt/train/b/y_ids.png"]


def test_a_split_without_masks_is_unlabelled(tmp_path):
    lay_out(tmp_path, "img/test/a/x_left.jpg", "img/test/a/y_left.jpg")
    split = find_split(tmp_path, "test", described(CITIES))
    assert not split.labelled and [(item.name, item.mask) for item in split.items] == [("x", None), ("y", None)]
    assert split.images_without_mask == []


@pytest.mark.parametrize("name", ["a.jpg", "a_mask.png"])
def test_pictures_in_the_folder_of_masks_that_are_none(name, tmp_path):
    layouts = (("{split}/{stem}.jpg", "{split}annot/{stem}.png"), ("{split}/{stem}.jpg", "{split}_m/{stem}_L.png"))
    lay_out(tmp_path, "train/a.jpg", "train/._a.png", f"train_m/{name}", "train_m/list.txt", "trainannot/._a.png")
    said = rf"train_m: holds 1 pictures, such as {name}, but no mask, such as train_m/{{stem}}_L.png; rename them"
    with pytest.raises(UserError, match=said):
        find_split(tmp_path, "train", described(*layouts))
    (tmp_path / "train_m" / name).unlink()
    assert not find_split(tmp_path, "train", described(*layouts)).labelled
    lay_out(tmp_path, "masks/val_x.png")  # of another split
    assert not find_split(tmp_path, "train", described((layouts[0][0], "masks/{split}_{stem}.png"))).labelled


def test_the_first_layout_with_masks_is_used(tmp_path):
    other = ("img/{split}/{city}/{stem}_left.*", "gt/{split}/{city}/{stem}_train.png", "{stem}", COLORS)
    description = described(other, CITIES)
    lay_out(tmp_path, "img/train/a/x_left.jpg")
    assert find_split(tmp_path, "train", description).labels == COLORS
    lay_out(tmp_path, "gt/train/a/x_ids.png")
    assert found(find_split(tmp_path, "train", description)) == [("x", "x_left.jpg", "x_ids.png")]
    assert find_split(tmp_path, "train", description).labels == LABELS
    lay_out(tmp_path, "gt/train/a/x_train.png")
    assert found(find_split(tmp_path, "train", description)) == [("x", "x_left.jpg", "x_train.png")]


def test_folders_of_any_depth(tmp_path):
    layout = ("images/{split}/{folders}/{stem}.*", "masks/{split}/{folders}/{stem}.png")
    lay_out(tmp_path, "images/train/x.jpg", "images/train/a/b/y.jpg", "images/train/.a/z.jpg")
    lay_out(tmp_path, "masks/train/x.png", "masks/train/a/b/y.png", "masks/train/a/x.png")
    split = find_split(tmp_path, "train", described(layout))
    assert found(split) == [("x", "x.jpg", "x.png"), ("y", "y.jpg", "y.png")]
    assert split.masks_without_image == [tmp_path / "masks/train/a/x.png"] and split.images_without_mask == []
    lay_out(tmp_path, "images/train/a/x.jpg")
    with pytest.raises(UserError, match=r"a second image named 'x' beside .*; write {city} or the like for {folders}"):
        find_split(tmp_path, "train", described(layout))


def test_links_to_folders_are_followed_and_may_lead_in_circles(tmp_path):
    layout = ("images/{split}/{folders}/{stem}.*", "masks/{split}/{folders}/{stem}.png")
    lay_out(tmp_path, "disk/x.jpg", "images/train/b/y.jpg", "masks/train/a/x.png", "masks/train/b/y.png")
    (tmp_path / "images/train/a").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/up").symlink_to(tmp_path / "images")
    split = find_split(tmp_path, "train", described(layout))
    assert found(split) == [("x", "x.jpg", "x.png"), ("y", "y.jpg", "y.png")]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    lay_out(tmp_path, "images/train/a/x.jpg", "images/train/b/y.jpg", "masks/train/a/x.png")
    listdir, scandir = os.listdir, os.scandir

    def denied(folder, look):
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", folder)
        return look(folder)

    monkeypatch.setattr(os, "listdir", lambda folder: denied(folder, listdir))
    monkeypatch.setattr(os, "scandir", lambda folder: denied(folder, scandir))
    layout = ("images/{split}/{folders}/{stem}.*", "masks/{split}/{folders}/{stem}.png")
    with pytest.raises(UserError, match=r"train/b: cannot be read \(Permission denied\)"):
        find_split(tmp_path, "train", described(layout))


def test_names_from_folders(tmp_path):
    lay_out(
        tmp_path, "img/train/a/0_left.jpg", "img/train/b/0_left.jpg", "gt/train/a/0_ids.png", "gt/train/b/0_ids.png"
    )
    with pytest.raises(UserError, match=r"a second image named '0' beside .*; set name: \"\{city\}_\{stem\}\""):
        find_split(tmp_path, "train", described(CITIES))
    split = find_split(tmp_path, "train", described((*CITIES, "{city}_{stem}")))
    assert [(item.name, item.mask) for item in split.items] == [
        ("a_0", tmp_path / "gt/train/a/0_ids.png"),
        ("b_0", tmp_path / "gt/train/b/0_ids.png"),
    ]


def test_two_files_of_one_name(tmp_path):
    lay_out(tmp_path, "img/train/a/x_left.jpg", "img/train/a/x_left.png", "gt/train/a/x_ids.png")
    with pytest.raises(UserError, match=r"x_left\.png: a second image named 'x' beside .*x_left\.jpg; keep one"):
        find_split(tmp_path, "train", described(CITIES))
    (tmp_path / "img/train/a/x_left.png").unlink()
    lay_out(tmp_path, "gt/train/a/x_ids.PNG")
    with pytest.raises(UserError, match=r"a second mask of the same name beside .*; keep one"):
        find_split(tmp_path, "train", described(CITIES))


def test_images_and_masks_in_one_folder(tmp_path):
    lay_out(tmp_path, "train/x.png", "train/x_L.png", "train/y.png")
    split = find_split(tmp_path, "train", described(("{split}/{stem}.*", "{split}/{stem}_L.png")))
    assert found(split) == [("x", "x.png", "x_L.png")] and split.images_without_mask == [tmp_path / "train/y.png"]


def test_a_placeholder_twice_and_one_of_images_alone(tmp_path):
    lay_out(tmp_path, "train/a/a_x.jpg", "train/a/b_y.jpg", "masks/train/x.png")
    split = find_split(tmp_path, "train", described(("{split}/{city}/{city}_{stem}.*", "masks/{split}/{stem}.png")))
    assert found(split) == [("x", "a_x.jpg", "x.png")] and split.images_without_mask == []


def test_splits_by_patterns_of_stems(tmp_path):
    splits = {"train": ("A_*", "B_1"), "val": ("C_*",)}
    layout = ("images/{stem}.*", "masks/{stem}_L.png", "{stem}", None, splits)
    lay_out(tmp_path, *(f"images/{name}.png" for name in ("A_1", "B_1", "B_2", "C_1")))
    lay_out(tmp_path, *(f"masks/{name}_L.png" for name in ("A_1", "B_1", "B_2", "C_1")))
    split = find_split(tmp_path, "train", described(layout))
    assert [item.name for item in split.items] == ["A_1", "B_1"] and split.masks_without_image == []
    assert [item.name for item in find_split(tmp_path, "val", described(layout)).items] == ["C_1"]
    splits["train"] = ("D_*",)
    with pytest.raises(
        UserError, match=r"images/\{stem\}\.\* with D_\*\); there are \d others, such as A_.*; correct splits"
    ):
        find_split(tmp_path, "train", described(layout))
    with pytest.raises(UserError, match=r"split 'test': streets has no such split; its splits are train, val"):
        find_split(tmp_path, "test", described(layout))


def test_forms_of_unicode(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "straße_é") for form in ("NFC", "NFD"))
    lay_out(tmp_path, f"img/train/{nfd}/{nfd}_left.jpg", f"gt/train/{nfc}/{nfc}_ids.png")
    assert [item.name for item in find_split(tmp_path, "train", described(CITIES)).items] == [nfc]
    layout = described((*CITIES, "{stem}", None, {"train": (f"{nfd}*",)}))
    assert [item.name for item in find_split(tmp_path, "train", layout).items] == [nfc]


def test_names_with_signs_of_patterns(tmp_path):
    lay_out(tmp_path, "img/train/a[1]+/x.(2)_left.jpg", "gt/train/a[1]+/x.(2)_ids.png")
    assert [item.name for item in find_split(tmp_path, "train", described(CITIES)).items] == ["x.(2)"]


def test_nothing_to_find(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder; .*--root"):
        find_split(tmp_path / "nowhere", "train", described(CITIES))
    with pytest.raises(
        UserError, match=r"no images of split 'train' of streets \(searched img/train/\{city\}/\{stem\}"
    ):
        find_split(tmp_path, "train", described(CITIES))
    with pytest.raises(UserError, match="not a plain folder name"):
        find_split(tmp_path, "../x", described(CITIES))
    lay_out(tmp_path, "img/train/a/x_left.jpg", "gt/train/a/y_ids.png")
    with pytest.raises(UserError, match=r"no images of split 'val' of streets .*; its splits are train$"):
        find_split(tmp_path, "val", described(CITIES))
    with pytest.raises(UserError, match=r"gt/train: holds 1 masks, such as y_ids\.png, but none belongs to any image"):
        find_split(tmp_path, "train", described(CITIES))


def test_bdd100k_keeps_its_own_search(tmp_path):
    lay_out(tmp_path, "deeper/images/10k/train/a.jpg", "deeper/labels/sem_seg/masks/train/a.png")
    expected = bdd100k.find_split(tmp_path, "train")
    assert find_split(tmp_path, "train", load_description("bdd100k")) == expected
    assert expected.notes and expected.labels is None


def save(path, array, mode=None, palette=None):
    image = Image.fromarray(np.asarray(array, np.uint8), mode)
    if palette:
        image.putpalette(palette)
    image.save(path)
    return path


def test_masks_of_ids(tmp_path):
    ids = [[7, 26, 27], [0, 255, 7]]
    expected = [[0, 1, 1], [255, 255, 0]]
    grey = save(tmp_path / "grey.png", ids)
    palette = save(tmp_path / "palette.png", ids, "P", [i % 7 for i in range(768)])
    for path in (grey, palette):
        mask = read_mask(path, 2, 3, LABELS)
        assert mask.dtype == np.uint8 and mask.tolist() == expected
    with pytest.raises(UserError, match=r"mask is 3x2, its image 3x3"):
        read_mask(grey, 3, 3, LABELS)


def test_masks_of_colors(tmp_path):
    colors = np.array([[[128, 64, 128], [0, 0, 142]], [[0, 0, 0], [0, 0, 142]]], np.uint8)
    opaque = np.dstack([colors, np.full((2, 2), 255, np.uint8)])
    palette = [128, 64, 128, 0, 0, 142, 0, 0, 0]
    for path in (
        save(tmp_path / "rgb.png", colors),
        save(tmp_path / "rgba.png", opaque),
        save(tmp_path / "palette.png", [[0, 1], [2, 1]], "P", palette),
    ):
        assert read_mask(path, 2, 2, COLORS).tolist() == [[0, 1], [255, 1]]
    opaque[0, 0, 3] = 9
    with pytest.raises(LabelError, match="transparent"):
        read_mask(save(tmp_path / "clear.png", opaque), 2, 2, COLORS)


def test_values_that_are_not_listed(tmp_path):
    ids = save(tmp_path / "ids.png", [[7, 3, 9, 3]])
    with pytest.raises(
        LabelError, match=r"ids\.png: holds values 3, 9, which the description does not list; .*unlisted"
    ):
        read_mask(ids, 1, 4, LABELS)
    assert read_mask(ids, 1, 4, replace(LABELS, unlisted="ignore")).tolist() == [[0, 255, 255, 255]]
    colors = save(tmp_path / "colors.png", [[[0, 0, 142], [1, 2, 3]]])
    with pytest.raises(LabelError, match=r"holds colors \[1, 2, 3\], which"):
        read_mask(colors, 1, 2, COLORS)
    assert read_mask(colors, 1, 2, replace(COLORS, unlisted="ignore")).tolist() == [[1, 255]]
    many = save(tmp_path / "many.png", [range(40, 80)])
    with pytest.raises(LabelError, match=r"48, 49 and 30 more, which"):
        read_mask(many, 1, 40, LABELS)


@pytest.mark.parametrize(
    ("array", "labels", "words"),
    [
        (np.zeros((2, 2, 3)), LABELS, "of kind ids is one byte a pixel .* but this is RGB"),
        (np.zeros((2, 2)), COLORS, "of kind colors is an RGB or a palette picture, but this is 8-bit greyscale"),
    ],
)
def test_masks_of_another_kind(array, labels, words, tmp_path):
    with pytest.raises(LabelError, match=words):
        read_mask(save(tmp_path / "a.png", array), 2, 2, labels)


@pytest.mark.parametrize("labels", [LABELS, None])
def test_a_jpeg_with_the_name_of_a_png(labels, tmp_path):
    Image.new("L", (8, 8), 7).save(tmp_path / "a.png", "JPEG")
    with pytest.raises(LabelError, match=r"a\.png: is a JPEG picture, which changes values; save the mask as PNG"):
        read_mask(tmp_path / "a.png", 8, 8, labels)


def test_an_item_and_the_first_masks(tmp_path):
    image = save(tmp_path / "a.jpg", np.zeros((2, 4, 3)))
    mask = save(tmp_path / "a.png", np.full((2, 4), 7))
    read = read_item(Item("a", image, mask), LABELS)
    assert read[0].shape == (2, 4, 3) and read[1] is not None and not read[1].any()
    split = Split([Item("a", image, mask)], True, tmp_path, tmp_path, tmp_path, [], [], [], LABELS)
    assert check_first_masks(split) is None  # 7 is not BDD100K's traffic sign here
    save(mask, np.full((2, 4), 8))
    with pytest.raises(LabelError, match=r"holds values 8, .*; wrong labels in 1 of the 1 masks checked"):
        check_first_masks(split)
