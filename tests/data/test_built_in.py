"""The built-in data sets, each on a small tree like the real one: found, paired, and read to the right classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from utils.data.bdd100k import Split, read_item
from utils.data.classes import BDD100K
from utils.data.description import load_description, read_plain_description
from utils.data.finding import find_split
from utils.runtime.errors import UserError

# What AutoNUE's helpers/anue_labels.py says of each IDD class: its level3Id, and its csTrainId.
IDD = {
    "road": (0, 0),
    "parking": (1, 255),
    "drivable fallback": (1, 255),
    "sidewalk": (2, 1),
    "non-drivable fallback": (3, 9),
    "person": (4, 11),
    "rider": (5, 12),
    "motorcycle": (6, 17),
    "bicycle": (7, 18),
    "autorickshaw": (8, 255),
    "car": (9, 13),
    "truck": (10, 14),
    "bus": (11, 15),
    "vehicle fallback": (12, 255),
    "curb": (13, 255),
    "wall": (14, 3),
    "fence": (15, 4),
    "guard rail": (16, 255),
    "billboard": (17, 255),
    "traffic sign": (18, 7),
    "traffic light": (19, 6),
    "pole": (20, 5),
    "obs-str-bar-fallback": (21, 255),
    "building": (22, 2),
    "bridge": (23, 255),
    "vegetation": (24, 8),
    "sky": (25, 10),
    "void": (255, 255),
}
# CamVid's label_colors.txt, and the class of the 11 that each belongs to.
CAMVID = {
    "Animal": ((64, 128, 64), "person"),
    "Archway": ((192, 0, 128), "building"),
    "Bicyclist": ((0, 128, 192), "rider"),
    "Bridge": ((0, 128, 64), "building"),
    "Building": ((128, 0, 0), "building"),
    "Car": ((64, 0, 128), "car"),
    "CartLuggagePram": ((64, 0, 192), "person"),
    "Child": ((192, 128, 64), "person"),
    "Column_Pole": ((192, 192, 128), "pole"),
    "Fence": ((64, 64, 128), "fence"),
    "LaneMkgsDriv": ((128, 0, 192), "road"),
    "LaneMkgsNonDriv": ((192, 0, 64), "road"),
    "Misc_Text": ((128, 128, 64), "traffic sign"),
    "MotorcycleScooter": ((192, 0, 192), "rider"),
    "OtherMoving": ((128, 64, 64), "car"),
    "ParkingBlock": ((64, 192, 128), "sidewalk"),
    "Pedestrian": ((64, 64, 0), "person"),
    "Road": ((128, 64, 128), "road"),
    "RoadShoulder": ((128, 128, 192), "sidewalk"),
    "Sidewalk": ((0, 0, 192), "sidewalk"),
    "SignSymbol": ((192, 128, 128), "traffic sign"),
    "Sky": ((128, 128, 128), "sky"),
    "SUVPickupTruck": ((64, 128, 192), "car"),
    "TrafficCone": ((0, 0, 64), "pole"),
    "TrafficLight": ((0, 64, 64), "traffic sign"),
    "Train": ((192, 64, 128), "car"),
    "Tree": ((128, 128, 0), "vegetation"),
    "Truck_Bus": ((192, 128, 192), "car"),
    "Tunnel": ((64, 0, 64), "building"),
    "VegetationMisc": ((192, 192, 0), "vegetation"),
    "Void": ((0, 0, 0), None),
    "Wall": ((64, 192, 0), "building"),
}


def save(path: Path, values: Any, *, palette: bool = False) -> None:
    """Write a picture of one row of values, bytes or colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray([values], np.uint8))
    if palette:
        image = image.convert("P")
        image.putdata(values)
        image.putpalette([i % 256 for i in range(768)])
    image.save(path)


def photo(path: Path, width: int) -> None:
    save(path, np.zeros((width, 3)))


def labels_of(split: Split, name: str) -> list[int]:
    item = next(item for item in split.items if item.name == name)
    mask = read_item(item, split.labels)[1]
    assert mask is not None
    return mask[0].tolist()


# The trainId of each label of cityscapesscripts 2.3.0 (helpers/labels.py) that is evaluated.
TRAIN_IDS = dict(zip([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33], range(19)))


@pytest.mark.parametrize(
    ("name", "image", "mask"),
    [
        (
            "cityscapes",
            "leftImg8bit/{}/{}/{}_000001_000019_leftImg8bit.png",
            "gtFine/{}/{}/{}_000001_000019_gtFine_{}.png",
        ),
        (
            "acdc",
            "rgb_anon/fog/{}/{}/{}_frame_000041_rgb_anon.png",
            "gt/fog/{}/{}/{}_frame_000041_gt_{}.png",
        ),
    ],
)
def test_cityscapes_label_ids_are_as_its_train_ids(name: str, image: str, mask: str, tmp_path: Path) -> None:
    """The ids 0 to 33, and -1 as the byte 255."""
    ids = [*range(34), 255]
    train_ids = [TRAIN_IDS.get(label, 255) for label in ids]
    assert len(ids) == 35 and set(train_ids) == {*range(19), 255}
    for split, place in (("train", "aachen"), ("train", "bremen"), ("val", "frankfurt")):
        photo(tmp_path / image.format(split, place, place), len(ids))
        save(tmp_path / mask.format(split, place, place, "labelIds"), ids)
        save(tmp_path / mask.format(split, place, place, "instanceIds"), ids)  # not a mask of ours
    photo(tmp_path / image.format("test", "berlin", "berlin"), 3)
    description = load_description(name)
    stem = Path(image.format("", "", "aachen")).stem.removesuffix("_leftImg8bit").removesuffix("_rgb_anon")

    by_ids = find_split(tmp_path, "train", description)
    assert len(by_ids.items) == 2 and by_ids.items[0].name == stem and not by_ids.masks_without_image
    assert labels_of(by_ids, stem) == train_ids
    for place in ("aachen", "bremen"):
        save(tmp_path / mask.format("train", place, place, "labelTrainIds"), train_ids)
    by_train_ids = find_split(tmp_path, "train", description)
    assert [item.mask and item.mask.stem.endswith("labelTrainIds") for item in by_train_ids.items] == [True, True]
    assert labels_of(by_train_ids, stem) == train_ids
    assert [item.mask for item in find_split(tmp_path, "test", description).items] == [None]

    save(tmp_path / mask.format("train", "aachen", "aachen", "labelTrainIds"), [*train_ids[:-1], 19])
    with pytest.raises(UserError, match="holds values 19, which the description does not list"):
        labels_of(by_train_ids, stem)
    assert description.classes == BDD100K


def test_camvids_colors(tmp_path: Path) -> None:
    colors = [color for color, _ in CAMVID.values()]
    photo(tmp_path / "train/0001TP_006690.png", 32)
    save(tmp_path / "train_labels/0001TP_006690_L.png", colors)
    description = load_description("camvid")
    names = description.classes.names
    found = labels_of(find_split(tmp_path, "train", description), "0001TP_006690")
    assert [None if i == 255 else names[i] for i in found] == [name for _, name in CAMVID.values()]
    assert all(
        CAMVID[original][0] == description.classes.classes[names.index(ours)].color
        for original, ours in [
            ("Sky", "sky"),
            ("Tree", "vegetation"),
            ("Pedestrian", "person"),
            ("Bicyclist", "rider"),
        ]
    )


def test_camvids_11_class_edition(tmp_path: Path) -> None:
    """The ids are those of the SegNet tutorial; its test images may be in the folder alone."""
    photo(tmp_path / "val/0016E5_07959.png", 12)
    save(tmp_path / "valannot/0016E5_07959.png", range(12))
    description = load_description("camvid")
    assert labels_of(find_split(tmp_path, "val", description), "0016E5_07959") == [*range(11), 255]
    with pytest.raises(UserError, match=r"its splits are val$"):  # not valannot
        find_split(tmp_path, "train", description)
    expected = [
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "signsymbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ]
    assert [description.classes.ids_by_name[name] for name in expected] == list(range(11))
    in_bdd100k = [BDD100K.find(c) for c in description.classes]
    assert None not in in_bdd100k and len(set(in_bdd100k)) == 11


def test_camvids_archives_in_the_splits_of_the_segnet_tutorial(tmp_path: Path) -> None:
    """The first and the last frame of each of the tutorial's lists, in each sequence and beside each border."""
    splits = {
        "train": "0001TP_006690 0001TP_008520 0006R0_f00930 0006R0_f03930 0016E5_00390 0016E5_00901 0016E5_02400 "
        "0016E5_04350 0016E5_07920 0016E5_08190 0016E5_08640",
        "val": "0016E5_07959 0016E5_07999 0016E5_08001 0016E5_08159",
        "test": "0001TP_008550 0001TP_008580 0001TP_008610 0001TP_009000 0001TP_010380 Seq05VD_f00000 Seq05VD_f05100",
    }
    for stems in splits.values():
        for stem in stems.split():
            photo(tmp_path / f"701_StillsRaw_full/{stem}.png", 2)
            save(tmp_path / f"LabeledApproved_full/{stem}_L.png", [(128, 128, 128), (0, 0, 0)])
    for split, stems in splits.items():
        found = find_split(tmp_path, split, load_description("camvid"))
        assert [item.name for item in found.items] == stems.split() and not found.masks_without_image
        assert labels_of(found, stems.split()[0]) == [0, 255]


@pytest.mark.parametrize("folder", ["labels", "v1.2/labels"])
def test_mapillary(folder: str, tmp_path: Path) -> None:
    for split in ("training", "validation"):
        photo(tmp_path / f"{split}/images/-0bT.x.jpg", 66)
        save(tmp_path / f"{split}/{folder}/-0bT.x.png", range(66), palette=True)
    photo(tmp_path / "testing/images/a.jpg", 3)
    all_classes, of_19 = load_description("mapillary"), load_description("mapillary19")
    found = find_split(tmp_path, "training", all_classes)
    assert labels_of(found, "-0bT.x") == [*range(65), 255] and len(all_classes.classes) == 65
    names = dict(enumerate(all_classes.classes.names))
    mapped = dict(zip(names.values(), labels_of(find_split(tmp_path, "validation", of_19), "-0bT.x")))
    # A class of both tables keeps its name.
    for c in all_classes.classes:
        ours = BDD100K.find(c)
        assert ours is None or mapped[c.name] == ours
    other = {"Bicyclist": "rider", "Curb": "sidewalk", "Utility Pole": "pole", "Lane Marking - General": "road"}
    assert {name: BDD100K.names[mapped[name]] for name in other} == other
    assert {mapped[name] for name in ("Bird", "Water", "Ego Vehicle", "Caravan", "Mountain")} == {255}
    assert {*mapped.values()} == {*range(19), 255}
    with pytest.raises(UserError, match="its splits are testing, training, validation"):
        find_split(tmp_path, "train", all_classes)


def test_idd(tmp_path: Path) -> None:
    level3, train_ids = zip(*IDD.values())
    for folder, suffix in (("0", "png"), ("119", "jpg")):  # names recur in its folders
        photo(tmp_path / f"leftImg8bit/train/{folder}/005506_leftImg8bit.{suffix}", len(level3))
        save(tmp_path / f"gtFine/train/{folder}/005506_gtFine_labellevel3Ids.png", level3)
    description = load_description("idd")
    split = find_split(tmp_path, "train", description)
    assert [item.name for item in split.items] == ["0_005506", "119_005506"]
    assert labels_of(split, "119_005506") == list(train_ids)
    for folder in ("0", "119"):
        save(tmp_path / f"gtFine/train/{folder}/005506_gtFine_labelcsTrainIds.png", train_ids)
    split = find_split(tmp_path, "train", description)
    assert split.items[0].mask and split.items[0].mask.stem.endswith("csTrainIds")
    assert labels_of(split, "0_005506") == list(train_ids)


@pytest.mark.parametrize("pattern", ["{kind}/train/a.{suffix}", "train/{kind}/a.{suffix}"])
def test_folders(pattern: str, tmp_path: Path) -> None:
    photo(tmp_path / pattern.format(kind="images", suffix="jpg"), 3)
    save(tmp_path / pattern.format(kind="masks", suffix="png"), [0, 18, 255])
    assert labels_of(find_split(tmp_path, "train", load_description("folders")), "a") == [0, 18, 255]


def test_bdd100ks_description_says_what_its_own_search_finds(tmp_path: Path) -> None:
    """Under another name, the patterns find the same pairs."""
    for root, mask in (("new", "labels/sem_seg/masks/train/a.png"), ("old", "seg/labels/train/a_train_id.png")):
        photo(tmp_path / root / ("images/10k/train/a.jpg" if root == "new" else "seg/images/train/a.jpg"), 2)
        save(tmp_path / root / mask, [1, 255])
        plain = json.loads(json.dumps(load_description("bdd100k").to_plain()))
        by_patterns = find_split(tmp_path / root, "train", read_plain_description({**plain, "name": "other"}))
        by_search = find_split(tmp_path / root, "train", load_description("bdd100k"))
        assert by_patterns.items == by_search.items and by_patterns.image_dir == by_search.image_dir
        assert labels_of(by_patterns, "a") == labels_of(by_search, "a") == [1, 255]
