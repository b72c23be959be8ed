"""The class table; finding, pairing and reading BDD100K's files."""

import io
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from utils.data.bdd100k import (
    Item,
    LabelError,
    check_first_masks,
    count_labels,
    find_split,
    read_image,
    read_item,
    read_mask,
)
from utils.data.classes import BDD100K, IGNORE_LABEL
from utils.runtime.errors import UserError

NEW = ("images/10k/{}", "labels/sem_seg/masks/{}", ".png")
OLD = ("seg/images/{}", "seg/labels/{}", "_train_id.png")


def lay_out(root, layout, split, images, masks):
    """Empty files: finding does not open them."""
    image_dir, mask_dir = (root / folder.format(split) for folder in layout[:2])
    for folder, names in ((image_dir, images), (mask_dir, masks)):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
    return image_dir, mask_dir


def test_the_table_of_the_specification():
    assert BDD100K.names == (
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    )
    assert [c.id for c in BDD100K.classes] == list(range(len(BDD100K))) == list(range(19)) and IGNORE_LABEL == 255
    assert len({c.color for c in BDD100K.classes}) == 19
    assert BDD100K.palette.shape == (256, 3) and BDD100K.palette.dtype == np.uint8
    assert BDD100K.palette[0].tolist() == [128, 64, 128] and BDD100K.palette[18].tolist() == [119, 11, 32]
    assert not BDD100K.palette[19:].any()


@pytest.mark.parametrize("layout", [NEW, OLD])
def test_pairs_in_either_layout(tmp_path, layout):
    suffix = layout[2]
    images, masks = lay_out(
        tmp_path, layout, "val", ["b.jpg", "a.jpg", "c.PNG", "readme.txt"], [f"{name}{suffix}" for name in "bca"]
    )
    split = find_split(tmp_path, "val")
    assert split.labelled and split.mask_dir == masks
    assert [(item.name, item.image, item.mask) for item in split.items] == [
        ("a", images / "a.jpg", masks / f"a{suffix}"),
        ("b", images / "b.jpg", masks / f"b{suffix}"),
        ("c", images / "c.PNG", masks / f"c{suffix}"),
    ]
    assert split.images_without_mask == split.masks_without_image == []


def test_sorted_by_name_and_hidden_files_left_out(tmp_path):
    lay_out(tmp_path, NEW, "train", ["a.jpg", "a-b.jpg", "._a.jpg", ".DS_Store"], ["a.png", "a-b.png", "._a.png"])
    split = find_split(tmp_path, "train")
    assert [item.name for item in split.items] == ["a", "a-b"]
    assert split.masks_without_image == []


def test_orphans_are_listed_not_paired(tmp_path):
    images, masks = lay_out(tmp_path, NEW, "train", ["a.jpg", "b.jpg", "d.jpg"], ["b.png", "c.png", "e.png"])
    split = find_split(tmp_path, "train")
    assert [item.name for item in split.items] == ["b"]
    assert split.images_without_mask == [images / "a.jpg", images / "d.jpg"]
    assert split.masks_without_image == [masks / "c.png", masks / "e.png"]


def test_other_files_beside_train_id_masks_are_not_masks(tmp_path):
    _, masks = lay_out(tmp_path, OLD, "train", ["a.jpg"], ["a_train_id.png", "a_train_color.png", "a.png"])
    assert [item.mask for item in find_split(tmp_path, "train").items] == [masks / "a_train_id.png"]


@pytest.mark.parametrize("mask_folder", [True, False])
def test_a_split_without_masks_is_unlabelled(tmp_path, mask_folder):
    _, masks = lay_out(tmp_path, NEW, "test", ["a.jpg", "b.jpg"], [])
    if not mask_folder:
        masks.rmdir()
    split = find_split(tmp_path, "test")
    assert not split.labelled and [(item.name, item.mask) for item in split.items] == [("a", None), ("b", None)]
    assert split.images_without_mask == []


def test_nothing_to_find(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder; .*--bdd100k_root"):
        find_split(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"no images of split 'train' \(searched .*images/10k/train or .*seg/images"):
        find_split(tmp_path, "train")
    lay_out(tmp_path, NEW, "train", ["notes.txt"], ["a.png"])
    with pytest.raises(UserError, match=r"images/10k/train: no \.jpg or \.png image"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize("deeper", ["bdd100k", "bdd100k/bdd100k"])
@pytest.mark.parametrize("layout", [NEW, OLD])
def test_root_above_the_data(tmp_path, deeper, layout):
    images, masks = lay_out(tmp_path / deeper, layout, "train", ["a.jpg"], [f"a{layout[2]}"])
    split = find_split(tmp_path, "train")
    assert split.items == [Item("a", images / "a.jpg", masks / f"a{layout[2]}")]
    assert split.notes == [f"train: the images are in {images}"]


@pytest.mark.parametrize("inside", ["images", "images/10k", "images/10k/train", "labels", "labels/sem_seg/masks/val"])
def test_root_inside_the_data(tmp_path, inside, monkeypatch):
    images, masks = lay_out(tmp_path, NEW, "train", ["a.jpg"], ["a.png"])
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)
    for root in (tmp_path / inside, (tmp_path / inside).relative_to(tmp_path)):
        monkeypatch.chdir(tmp_path)
        split = find_split(root, "train")
        assert split.items == [Item("a", images / "a.jpg", masks / "a.png")]
        assert split.notes == [f"train: the images are in {images}"]


def test_a_folder_beside_the_data_is_not_the_data(tmp_path):
    lay_out(tmp_path, NEW, "train", ["a.jpg"], ["a.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images of split 'train'"):
        find_split(tmp_path / "empty", "train")


def test_archives_in_folders_of_their_own(tmp_path):
    images, _ = lay_out(tmp_path / "images_10k/bdd100k", NEW, "train", ["a.jpg"], [])
    _, masks = lay_out(tmp_path / "sem_seg/bdd100k", NEW, "train", [], ["a.png"])
    split = find_split(tmp_path, "train")
    assert split.items == [Item("a", images / "a.jpg", masks / "a.png")]
    assert split.notes[1:] == [f"train: the masks are in {masks}"]


def test_two_data_sets_below_the_root(tmp_path):
    for name in ("one", "two"):
        lay_out(tmp_path / name, NEW, "train", ["a.jpg"], ["a.png"])
    with pytest.raises(UserError, match=rf"train' more than once.*--bdd100k_root {tmp_path / 'one'}\)"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize("images", [NEW, OLD])
@pytest.mark.parametrize("masks", [NEW, OLD])
@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.Png", "a_train_id.png", "a_train_id.PNG", "a_TRAIN_ID.png"])
def test_masks_of_either_layout_in_any_case(tmp_path, images, masks, name):
    (image_dir, _), (_, mask_dir) = (
        lay_out(tmp_path, (images[0], "nothing/{}"), "train", ["a.jpg"], []),
        lay_out(tmp_path, ("nothing/else/{}", masks[1]), "train", [], [name]),
    )
    split = find_split(tmp_path, "train")
    assert split.items == [Item("a", image_dir / "a.jpg", mask_dir / name)] and not split.notes


def test_masks_of_the_same_layout_come_first(tmp_path):
    for layout in (NEW, OLD):
        _, masks = lay_out(tmp_path / layout[2], layout, "train", ["a.jpg"], ["a.png"])
        other = OLD if layout is NEW else NEW
        lay_out(tmp_path / layout[2], ("nothing/{}", other[1]), "train", [], ["a.png"])
        assert find_split(tmp_path / layout[2], "train").items[0].mask == masks / "a.png"


def test_a_mask_that_belongs_to_nothing_beside_marked_and_plain_ones(tmp_path):
    _, masks = lay_out(tmp_path, NEW, "train", ["a.jpg", "b.jpg"], ["a_train_id.png", "b.png", "c_train_id.png"])
    split = find_split(tmp_path, "train")
    assert [item.mask for item in split.items] == [masks / "a_train_id.png", masks / "b.png"]
    assert split.masks_without_image == [masks / "c_train_id.png"]


@pytest.mark.parametrize(
    "names", [["b.png"], ["a.jpg", "b.jpg"], ["a.tif"], ["a_train_color.png"], ["a_labelIds.png"], ["a.json"]]
)
@pytest.mark.parametrize("layout", [NEW, OLD])
def test_files_but_no_mask(tmp_path, names, layout):
    lay_out(tmp_path, NEW, "train", ["a.jpg"], [])
    folder = tmp_path / layout[1].format("train")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    said = rf"{folder}: holds {len(names)} files, such as {names[0]}, .*a\.jpg needs a\.png or a_train_id\.png"
    with pytest.raises(UserError, match=said):
        find_split(tmp_path, "train")


def test_masks_above_the_splits(tmp_path):
    _, masks = lay_out(tmp_path, NEW, "train", ["a.jpg"], [])
    (masks.parent / "a.png").touch()
    with pytest.raises(UserError, match=rf"masks: holds the masks of split 'train'; move them into {masks}"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize("colours", ["labels/sem_seg/colormaps/train", "seg/color_labels/train"])
def test_colour_pictures_alone(tmp_path, colours):
    lay_out(tmp_path, (NEW[0], colours), "train", ["a.jpg"], ["a.png"])
    with pytest.raises(
        UserError, match=rf"{colours}: holds colour pictures, such as a\.png, but .* has no masks of train ids"
    ):
        find_split(tmp_path, "train")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    images, _ = lay_out(tmp_path, NEW, "train", ["a.jpg"], ["a.png"])

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(UserError, match=rf"{images}: cannot be read \(Permission denied\)"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize(("image", "mask"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_pair_in_either_unicode_form(tmp_path, image, mask):
    image, mask = (unicodedata.normalize(form, "straße_é") for form in (image, mask))
    images, masks = lay_out(tmp_path, NEW, "train", [f"{image}.jpg"], [f"{mask}.png"])
    split = find_split(tmp_path, "train")
    assert split.items == [Item(image, images / f"{image}.jpg", masks / f"{mask}.png")]
    assert split.images_without_mask == split.masks_without_image == []


def test_one_name_in_both_unicode_forms(tmp_path):
    names = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    lay_out(tmp_path, NEW, "train", [f"{name}.jpg" for name in names], ["a.png"])
    with pytest.raises(UserError) as error:
        find_split(tmp_path, "train")
    assert r"'\xe9.jpg'" in str(error.value) and r"'e\u0301.jpg'" in str(error.value)


def test_two_images_of_one_name(tmp_path):
    lay_out(tmp_path, NEW, "train", ["a.jpg", "a.png"], ["a.png"])
    with pytest.raises(UserError, match=r"a second image named 'a' beside a\.jpg"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize("split", ["../train", "train/", "a/b", "/etc", "..", ".", ""])
def test_split_names_stay_in_their_folder(tmp_path, split):
    lay_out(tmp_path, NEW, "train", ["a.jpg"], ["a.png"])
    with pytest.raises(UserError, match="not a plain folder name"):
        find_split(tmp_path, split)


# ---------------------------------------------------------------- reading


def jpeg(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.fixture
def scene():
    """(48, 64, 3) uint8: red left, blue right, enough texture that a JPEG of it has some length."""
    image = np.random.default_rng(0).integers(0, 60, (48, 64, 3), dtype=np.uint8)
    image[:, :32, 0] += 180
    image[:, 32:, 2] += 180
    return image


def test_reads_rgb(tmp_path, scene):
    Image.fromarray(scene).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), scene)
    (tmp_path / "a.jpg").write_bytes(jpeg(scene))
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    assert image[:, :24, 0].mean() > 200 > 60 > image[:, :24, 2].mean()


def test_greyscale_becomes_rgb(tmp_path, scene):
    (tmp_path / "a.jpg").write_bytes(jpeg(scene[..., 0]))
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (48, 64, 3) and (image[..., :1] == image).all()


def test_exif_orientation_does_not_turn_the_image(tmp_path, scene):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to view"
    (tmp_path / "a.jpg").write_bytes(jpeg(scene, exif=exif))
    (tmp_path / "b.jpg").write_bytes(jpeg(scene))
    assert np.array_equal(read_image(tmp_path / "a.jpg"), read_image(tmp_path / "b.jpg"))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.7, 0.95, 0.9995])
@pytest.mark.parametrize("filled", [False, True])
def test_a_truncated_jpeg_is_noticed(tmp_path, scene, progressive, share, filled):
    whole = jpeg(scene, progressive=progressive)
    keep = int(len(whole) * share)
    (tmp_path / "a.jpg").write_bytes(whole[:keep] + bytes(len(whole) - keep if filled else 0))
    with pytest.raises(UserError, match=r"a\.jpg: .*the file is damaged"):
        read_image(tmp_path / "a.jpg")


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_image(tmp_path, scene):
    """A JPEG inside the EXIF of a truncated JPEG is whole."""
    whole = jpeg(scene)
    thumbnail = jpeg(scene[:16, :16])
    app1 = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    data = whole[:2] + app1 + whole[2:]
    (tmp_path / "a.jpg").write_bytes(data)
    assert read_image(tmp_path / "a.jpg").shape == (48, 64, 3)
    (tmp_path / "a.jpg").write_bytes(data[:-200] + bytes(200))
    with pytest.raises(UserError, match="truncated, the JPEG has no end"):
        read_image(tmp_path / "a.jpg")


def test_every_flipped_bit_of_a_png_is_noticed(tmp_path):
    mask = np.repeat(np.arange(16, dtype=np.uint8), 64).reshape(32, 32)
    Image.fromarray(mask).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for position in range(8, len(whole)):
        (tmp_path / "a.png").write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            assert np.array_equal(read_mask(tmp_path / "a.png", 32, 32), mask)  # say, in the name of a spare chunk
        except UserError as error:
            assert "a.png" in str(error) and "\n" not in str(error)


def test_an_absurd_header_costs_no_memory(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (2_000_000_000, 12_000):  # at the second Pillow by itself only warns
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
        with pytest.raises(UserError, match=r"a\.png: its header claims an absurd size"):
            read_image(tmp_path / "a.png")


def test_what_is_no_image(tmp_path):
    with pytest.raises(UserError, match=r"a\.jpg: no such file"):
        read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    with pytest.raises(UserError, match="not a JPEG, PNG, WebP, BMP or TIFF picture"):
        read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(UserError, match=r"a\.jpg: not a regular file"):
        read_image(tmp_path / "a.jpg")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="not an 8-bit image"):
        read_image(tmp_path / "b.png")


def draw_turned(folder, orientation, *, drawn_upright, size=(48, 32)):
    """A picture with a bright corner and the mask of that corner, class 3, drawn on the one or the other view."""
    mask = np.zeros(size, np.uint8)
    mask[:16, :8] = 3
    picture = Image.fromarray(np.repeat(mask[..., None] * 80, 3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(folder / "a.jpg", quality=100, subsampling=0, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(folder / "a.jpg")) if drawn_upright else picture
    Image.fromarray((np.asarray(upright)[..., 0] > 120).astype(np.uint8) * 3).save(folder / "a.png")
    return Item("a", folder / "a.jpg", folder / "a.png")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("drawn_upright", [True, False])
def test_a_mask_lies_on_a_picture_that_exif_turns(tmp_path, orientation, drawn_upright):
    image, mask = read_item(draw_turned(tmp_path, orientation, drawn_upright=drawn_upright))
    assert mask is not None and mask.shape == ((32, 48) if drawn_upright else (48, 32))
    assert np.count_nonzero(mask) == 128
    assert ((image[..., 0] > 120) == (mask == 3)).all()


@pytest.mark.parametrize(("orientation", "size"), [(2, (48, 32)), (3, (48, 32)), (4, (48, 32)), (6, (32, 32))])
@pytest.mark.parametrize("drawn_upright", [True, False])
def test_a_mask_that_may_belong_to_either_view_is_rejected(tmp_path, orientation, size, drawn_upright):
    item = draw_turned(tmp_path, orientation, drawn_upright=drawn_upright, size=size)
    with pytest.raises(UserError, match=rf"a\.jpg: EXIF orientation {orientation}.*a\.png.*-auto-orient.*exiftool"):
        read_item(item)


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_an_orientation_that_turns_nothing(tmp_path, orientation):
    image, mask = read_item(draw_turned(tmp_path, orientation, drawn_upright=True))
    assert image.shape == (48, 32, 3) and mask is not None and mask.shape == (48, 32)


def test_a_mask_of_neither_view(tmp_path):
    item = draw_turned(tmp_path, 6, drawn_upright=True)
    Image.new("L", (9, 9)).save(item.mask)
    with pytest.raises(UserError, match=r"a\.png: mask is 9x9, its image 32x48"):
        read_item(item)


def draw_masks(root, masks):
    """A split of one-pixel images, a mask for each."""
    images, folder = lay_out(root, NEW, "train", [], [])
    for index, mask in enumerate(masks):
        Image.new("RGB", (1, 1)).save(images / f"{index:04}.png")
        Image.fromarray(np.asarray(mask, np.uint8)).save(folder / f"{index:04}.png")
    return find_split(root, "train")


def test_good_masks_pass(tmp_path):
    masks = [[[0, 7, 255]], [[7, 7, 0]], [[255, 255, 255]], [[18, 17, 16]]]
    assert check_first_masks(draw_masks(tmp_path, masks)) is None


def test_masks_that_cannot_be_read_are_left_for_later(tmp_path):
    split = draw_masks(tmp_path, [[[0]]] * 2)
    split.items[0].mask.write_bytes(b"")
    check_first_masks(split)


@pytest.mark.parametrize(
    ("mask", "said"),
    [([[0, 42]], "holds labels 42"), ([[[1, 2, 3], [0, 0, 0]]], r"a colour-coded \(RGB\) picture")],
)
@pytest.mark.parametrize("bad", [range(40), [0], [39]])
def test_wrong_labels_are_seen_in_the_first_masks(tmp_path, mask, said, bad):
    split = draw_masks(tmp_path, [mask if index in bad else [[0, 1]] for index in range(40)])
    count = 16 if len(bad) == 40 else 1
    with pytest.raises(LabelError, match=rf"{said}.*wrong labels in {count} of the 16 masks checked"):
        check_first_masks(split)


@pytest.mark.parametrize("masks", [[[[7, 8, 11, 26, 23]]], [[[7, 8, 11]]] * 5 + [[[7, 11, 33]]]])
def test_label_ids_are_named(tmp_path, masks):
    with pytest.raises(LabelError, match=r"Cityscapes' label ids.*id2label.*labels/sem_seg/masks"):
        check_first_masks(draw_masks(tmp_path, masks))


def test_label_ids_below_nineteen_are_seen_by_their_shares(tmp_path):
    label_ids = [[[4, 5, 0, 11, 11, 11, 17, 7, 7, 8]]] * 3  # static, dynamic, none, building, pole, road, sidewalk
    doubt = check_first_masks(draw_masks(tmp_path, label_ids))
    assert doubt and f"{tmp_path}/labels/sem_seg/masks/train: label 7 (traffic sign) is 20 % of the 3 masks" in doubt
    assert "label ids" in doubt and "id2label" in doubt and "\n" not in doubt


def test_mask_values_come_as_they_are(tmp_path):
    mask = np.array([[0, 18, 255], [7, 255, 0]], np.uint8)
    Image.fromarray(mask).save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png", 2, 3), mask)


@pytest.mark.parametrize(
    ("labels", "said"),
    [([42], "labels 42,"), ([19, 254, 3], "labels 19, 254,"), (range(30, 50), "34, 35, 36, 37, 38, 39 and 10 more,")],
)
def test_labels_that_are_none(tmp_path, labels, said):
    Image.fromarray(np.array([[0, 255, *labels]], np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"a\.png: .*{said}.* allowed are 0-18 and 255"):
        read_mask(tmp_path / "a.png", 1, len(labels) + 2)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("RGB", r"a colour-coded \(RGB\)"),
        ("RGBA", r"a colour-coded \(RGBA\)"),
        ("P", r"a colour-coded \(palette\)"),
        ("1", "not an 8-bit greyscale"),
        ("LA", "not an 8-bit greyscale"),
        ("I;16", "not an 8-bit greyscale"),
    ],
)
def test_pictures_that_are_no_masks(tmp_path, mode, said):
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"a\.png: {said}.*labels/sem_seg/masks/<split>/<name>\.png.*_train_id\.png"):
        read_mask(tmp_path / "a.png", 4, 4)


def test_mask_of_another_size(tmp_path):
    Image.new("L", (4, 5)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: mask is 4x5, its image 5x4"):
        read_mask(tmp_path / "a.png", 4, 5)


def test_labels_are_counted():
    mask = np.array([[0, 18, 255], [18, 18, 254]], dtype=np.uint8)
    counts = count_labels(mask)
    assert counts.dtype == np.int64 and counts.shape == (256,)
    assert (counts[0], counts[18], counts[254], counts[255], counts.sum()) == (1, 3, 1, 1, 6)
    assert count_labels(mask.T[:, ::-1]).tolist() == counts.tolist()  # whatever its layout in memory
    assert count_labels(np.zeros((4096, 4096), dtype=np.uint8))[0] == 4096**2  # the largest frame


@pytest.mark.parametrize(("read", "mode"), [(read_image, "RGB"), (lambda path: read_mask(path, 4, 6), "L")])
def test_no_error_of_decoding_is_swallowed(tmp_path, monkeypatch, read, mode):
    Image.new(mode, (6, 4)).save(tmp_path / "a.png")

    def load(image):
        raise AttributeError("of damaged bytes")  # NumPy asks for an attribute, and takes this to say that it has none

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(UserError, match=r"a\.png: cannot be decoded: of damaged bytes"):
        read(tmp_path / "a.png")
