"""pre_bdd100k.py as its user meets it: what is written, what is said, and what a stopped or a bad run leaves behind."""

import csv
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from PIL import Image

import pre_bdd100k
from utils.data.bdd100k import find_split
from utils.data.manifest import read_manifest
from utils.runtime import cli
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, cannot_be_read

SCRIPT = Path(pre_bdd100k.__file__)


def draw(root, split, names, *, labelled=True, size=(24, 48)):
    """Items of flat colour, each with the mask [1 | 13] above 255: a quarter, a quarter and a half of the pixels."""
    images, masks = root / "images/10k" / split, root / "labels/sem_seg/masks" / split
    images.mkdir(parents=True, exist_ok=True)
    height, width = size
    mask = np.full(size, 255, np.uint8)
    mask[: height // 2] = np.where(np.arange(width) < width // 2, 1, 13)
    for index, name in enumerate(names):
        Image.new("RGB", (width, height), (255, 51, index)).save(images / f"{name}.jpg", quality=100, subsampling=0)
        if labelled:
            masks.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(masks / f"{name}.png")


@pytest.fixture
def data(tmp_path):
    """`train` of three items, `val` of one, `test` of two without masks."""
    root = tmp_path / "bdd"
    draw(root, "train", ["a", "b", "c"])
    draw(root, "val", ["v"])
    draw(root, "test", ["s", "t"], labelled=False)
    return root


@pytest.fixture
def run(data, tmp_path, capsys):
    """Run the script in this process on `data`; gives exit status, stdout, and the lines of stderr that are errors."""

    def run(*argv, root=data, out="out"):
        flags = ["--bdd100k_root", root, "--output_path", tmp_path / out, "--image_size", 32, "--num_workers", 1, *argv]
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: pre_bdd100k.main(pre_bdd100k.get_args_parser().parse_args([str(f) for f in flags])))
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert not temporaries(tmp_path)
        return end.value.code, said.out, [line for line in said.err.splitlines() if line.startswith("error:")]

    return run


def temporaries(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def load(*parts):
    return np.load(Path(*parts), allow_pickle=False)


# ---------------------------------------------------------------- what is written


def test_the_flags_of_the_specification():
    args = pre_bdd100k.get_args_parser().parse_args(["--bdd100k_root", "data/bdd100k"])
    assert vars(args) == {
        "bdd100k_root": Path("data/bdd100k"),
        "dataset": "bdd100k",
        "output_path": Path("data/bdd100k_npy"),
        "image_size": 1024,
        "splits": ["train", "val"],
        "num_workers": len(os.sched_getaffinity(0)),
        "image_dtype": "float32",
        "resize_mode": "stretch",
        "overwrite": False,
    }


def test_output_of_the_specification(run, tmp_path):
    status, _, errors = run()
    assert (status, errors) == (0, [])
    out = tmp_path / "out"
    kinds = {
        split: [f"{split}/{kind}/{name}.npy" for kind in ("imgs", "gts") for name in names]
        for split, names in (("train", "abc"), ("val", "v"))
    }
    others = ("manifest.json", "label_distribution.csv", "label_distribution.png")
    expected = {f"{split}/{name}" for split in kinds for name in others}
    assert set(contents(out)) == {*kinds["train"], *kinds["val"], *expected}

    image = load(out, "train/imgs/c.npy")
    assert image.shape == (32, 32, 3) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1
    assert np.abs(image - (1.0, 0.2, 2 / 255)).max() < 0.012  # RGB, as drawn, but for JPEG's rounding

    gt = load(out, "train/gts/c.npy")
    assert gt.shape == (32, 32) and gt.dtype == np.uint8
    assert (gt[:16, :16] == 1).all() and (gt[:16, 16:] == 13).all() and (gt[16:] == 255).all()


def test_manifest(run, tmp_path):
    run()
    manifest = read_manifest(tmp_path / "out/train")
    assert (manifest.image_size, manifest.image_dtype, manifest.resize_mode) == (32, "float32", "stretch")
    assert manifest.labelled and [item.name for item in manifest.items] == ["a", "b", "c"]
    for item in manifest.items:
        assert (item.height, item.width, item.ignored) == (24, 48, 512)
        assert item.pixels == [256 if label in (1, 13) else 0 for label in range(19)]


@pytest.mark.parametrize(("dtype", "scale"), [("uint8", 255), ("float16", 1)])
def test_smaller_dtypes_hold_the_same_image(run, tmp_path, dtype, scale):
    run()
    run("--image_dtype", dtype, out="small")
    image = load(tmp_path, "small/train/imgs/a.npy")
    assert image.dtype == dtype
    assert np.abs(image.astype(np.float32) / scale - load(tmp_path, "out/train/imgs/a.npy")).max() < 0.0005
    assert read_manifest(tmp_path / "small/train").image_dtype == dtype


def test_pad_keeps_the_aspect_ratio(run, tmp_path):
    assert run("--resize_mode", "pad", "--image_dtype", "uint8")[0] == 0
    image, gt = load(tmp_path, "out/train/imgs/a.npy"), load(tmp_path, "out/train/gts/a.npy")
    assert (image[:16, :, 0] > 250).all() and (image[16:] == (124, 116, 104)).all()
    assert (gt[:8, :16] == 1).all() and (gt[:8, 16:] == 13).all() and (gt[8:] == 255).all()
    (item, *_), mode = read_manifest(tmp_path / "out/train").items, read_manifest(tmp_path / "out/train").resize_mode
    assert (item.pixels[1], item.pixels[13], item.ignored, mode) == (128, 128, 768, "pad")


def test_the_older_layout_gives_the_same(run, data, tmp_path):
    run("--splits", "train")
    old = tmp_path / "old"
    shutil.copytree(data / "images/10k/train", old / "seg/images/train")
    (old / "seg/labels/train").mkdir(parents=True)
    for mask in (data / "labels/sem_seg/masks/train").iterdir():
        shutil.copy(mask, old / "seg/labels/train" / f"{mask.stem}_train_id.png")
    assert run("--splits", "train", root=old, out="from_old")[0] == 0
    made, old_made = (contents(tmp_path / name) for name in ("out", "from_old"))
    assert read_manifest(tmp_path / "from_old/train").items == read_manifest(tmp_path / "out/train").items
    for both in (made, old_made):
        del both["train/manifest.json"]  # which names the files that all was made of
    assert made == old_made


def test_several_processes_give_and_say_the_same(run, data, tmp_path):
    other_size(data / "labels/sem_seg/masks/train", None)
    _, _, errors = run("--splits", "train")
    assert run("--splits", "train", "--num_workers", 2, out="two") == (1, ANY, errors) and len(errors) == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "out")


def test_an_image_is_written_while_the_next_is_decoded(data, tmp_path, monkeypatch):
    """And the third waits until the first is written, so that memory does not fill where the disk is slow."""
    prepare, write = pre_bdd100k.prepare, pre_bdd100k.write
    begun, second = [], threading.Event()

    def tell(job):
        begun.append(job.item.name)
        if len(begun) == 2:
            second.set()
        return prepare(job)

    def wait_for_the_second(arrays):
        if [path.stem for path in arrays] == ["a", "a"]:
            assert second.wait(60)
            time.sleep(0.1)  # in which one that did not wait would begin the third
            assert begun == ["a", "b"]
        write(arrays)

    monkeypatch.setattr(pre_bdd100k, "prepare", tell)
    monkeypatch.setattr(pre_bdd100k, "write", wait_for_the_second)
    for kind in ("imgs", "gts"):
        (tmp_path / "out" / kind).mkdir(parents=True)
    settings = pre_bdd100k.Settings(32, "uint8", "stretch")
    jobs = pre_bdd100k.make_jobs(find_split(data, "train"), tmp_path / "out", settings, None)
    assert [getattr(entry, "name", entry) for entry in pre_bdd100k.process(jobs)] == ["a", "b", "c"]
    assert all(pre_bdd100k.is_complete(job) for job in jobs)


def places(said):
    return [line for line in said.splitlines() if "the images are in" in line]


def test_data_below_the_root_are_told_in_one_line(data, tmp_path, capsys):
    below = data / "bdd100k" / "bdd100k"
    below.mkdir(parents=True)
    for name in ("images", "labels"):
        (data / name).rename(below / name)
    flags = ["--bdd100k_root", data, "--output_path", tmp_path / "out", "--image_size", 32]
    assert pre_bdd100k.main(pre_bdd100k.get_args_parser().parse_args([str(flag) for flag in flags])) == 0
    said = capsys.readouterr()
    (line,) = places(said.out)
    images = below / "images/10k"
    assert line == f"train: the images are in {images}/train; val: the images are in {images}/val"
    assert "warning: " not in said.err


def test_splits_of_different_folders_are_told(data, tmp_path, capsys):
    shutil.rmtree(data / "images/10k/val")
    shutil.rmtree(data / "labels/sem_seg/masks/val")
    draw(data / "old", "val", ["v"])
    flags = ["--bdd100k_root", data, "--output_path", tmp_path / "out", "--image_size", 32]
    assert pre_bdd100k.main(pre_bdd100k.get_args_parser().parse_args([str(flag) for flag in flags])) == 0
    said = capsys.readouterr()
    assert places(said.out) == [f"val: the images are in {data}/old/images/10k/val"]
    (line,) = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    assert line.startswith(f"warning: the splits are in different folders (train in {data}, val in {data}/old)")
    assert "Next:" in said.out


def test_a_split_without_masks(run, data, tmp_path):
    status, said, errors = run("--splits", "test")
    assert (status, errors) == (0, [])
    assert set(contents(tmp_path / "out")) == {"test/imgs/s.npy", "test/imgs/t.npy", "test/manifest.json"}
    assert not (tmp_path / "out/test/gts").exists()
    manifest = read_manifest(tmp_path / "out/test")
    assert not manifest.labelled and [(item.name, item.pixels) for item in manifest.items] == [("s", []), ("t", [])]
    assert f"test: 2 images, no masks in {data}/labels/sem_seg/masks/test, so no gts/" in said
    assert "train_bdd100k.py" not in said  # nothing to train on


def test_forgotten_masks_are_warned_of(data, tmp_path, capsys):
    shutil.rmtree(data / "labels/sem_seg/masks/val")
    flags = ["--bdd100k_root", data, "--output_path", tmp_path / "out", "--splits", "train", "val", "test"]
    assert pre_bdd100k.main(pre_bdd100k.get_args_parser().parse_args([str(flag) for flag in flags])) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "without masks, val is of no use for training or evaluation" in warnings[0]


def test_report(run, tmp_path):
    said = run("--splits", "train", "val", "train")[1]  # twice named, once done
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert lines.count(f"{tmp_path}/out/train: 3 of 3 images written") == 1
    assert "1 sidewalk 768 25.000 3" in lines and "13 car 768 25.000 3" in lines and "0 road 0 0.000 0" in lines
    assert "255 not labelled 1,536 50.000 3" in lines
    with open(tmp_path / "out/train/label_distribution.csv", newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert rows["car"] == {"id": "13", "class": "car", "pixels": "768", "percent": "25.000000", "images": "3"}
    assert len(rows) == 20 and rows["not labelled"]["pixels"] == "1536"
    command = said[said.index("python train_bdd100k.py") :].replace("\\\n", " ").split()
    assert command[2:4] == ["-i", f"{tmp_path}/out/train"] and command[-2:] == ["--val_npy_path", f"{tmp_path}/out/val"]


@pytest.mark.parametrize(
    ("size", "model", "sam"),
    [(32, "vit_tiny", "assets/sam_vit_tiny_scenes.pth"), (272, "vit_b", "work_dir/SAM/sam_vit_b_01ec64.pth")],
)
def test_the_next_command_can_be_pasted(run, size, model, sam):
    said = run("--splits", "train", "--image_size", size)[1]
    command = said[said.index("python train_bdd100k.py") :].replace("\\\n", " ").split()
    assert f"-model_type {model} -checkpoint {sam}" in " ".join(command) and "--device" not in command


# ---------------------------------------------------------------- bad input: one line, non-zero, the rest done


def refused(result, *said):
    status, _, errors = result
    assert status == 1 and len(errors) == 1, result
    for text in said:
        assert text in errors[0]


def test_bad_folders(run, tmp_path):
    refused(run(root=tmp_path / "nowhere"), f"{tmp_path}/nowhere: no such folder", "--bdd100k_root")
    # Everything is looked at before anything is written.
    refused(run("--splits", "train", "vall"), "no images of split 'vall'")
    refused(run("--splits", "train", "../train"), "'../train': not a plain folder name")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    refused(run(out="file"), f"{tmp_path}/file", "--output_path")
    assert (tmp_path / "file").read_bytes() == b""


def test_no_images(run, data, tmp_path):
    for path in (data / "images/10k/train").iterdir():
        path.unlink()
    refused(run(), "images/10k/train: no .jpg or .png image")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["100", "0", "-16", "x"])
def test_bad_image_size(run, size, capsys):
    with pytest.raises(SystemExit) as end:
        pre_bdd100k.get_args_parser().parse_args(["--bdd100k_root", "x", "--image_size", size])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def other_size(masks, images):
    Image.new("L", (24, 48)).save(masks / "b.png")


def label_42(masks, images):
    Image.new("L", (48, 24), 42).save(masks / "b.png")


def rgb_mask(masks, images):
    Image.new("RGB", (48, 24), (128, 64, 128)).save(masks / "b.png")


def palette_mask(masks, images):
    Image.new("P", (48, 24)).save(masks / "b.png")


def truncated_jpeg(masks, images):
    (images / "b.jpg").write_bytes((images / "b.jpg").read_bytes()[:-20])


def corrupt_mask(masks, images):
    data = (masks / "b.png").read_bytes()
    (masks / "b.png").write_bytes(data[: len(data) // 2])


def no_jpeg(masks, images):
    (images / "b.jpg").write_text("not an image")


def no_mask(masks, images):
    (masks / "b.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_size, ("masks/train/b.png: mask is 24x48, its image 48x24",)),
        (label_42, ("masks/train/b.png: holds labels 42, allowed are 0-18 and 255", "labels/sem_seg/masks/")),
        (rgb_mask, ("masks/train/b.png: a colour-coded (RGB) picture", "labels/sem_seg/masks/")),
        (palette_mask, ("masks/train/b.png: a colour-coded (palette) picture", "labels/sem_seg/masks/")),
        (truncated_jpeg, ("10k/train/b.jpg: truncated",)),
        (corrupt_mask, ("masks/train/b.png: cannot be decoded",)),
        (no_jpeg, ("10k/train/b.jpg: not a JPEG, PNG, WebP, BMP or TIFF",)),
        (no_mask, ("10k/train/b.jpg: image without a mask",)),
    ],
)
def test_a_bad_item_is_named_and_the_rest_is_done(run, data, tmp_path, spoil, said):
    others = [f"z{index:02}" for index in range(29)]  # so that b is none of the masks that are checked first
    draw(data, "train", others)
    spoil(data / "labels/sem_seg/masks/train", data / "images/10k/train")
    result = run()
    refused(result, *said)
    assert [item.name for item in read_manifest(tmp_path / "out/train").items] == ["a", "c", *others]
    for kind in ("imgs", "gts"):
        written = [path.stem for path in sorted((tmp_path / "out/train" / kind).iterdir())]
        assert written == ["a", "c", *others]
    assert [item.name for item in read_manifest(tmp_path / "out/val").items] == ["v"]
    # Where one mask has wrong labels, others may have them too.
    assert ("train_bdd100k.py" in result[1]) == (spoil not in (label_42, rgb_mask, palette_mask))


@pytest.mark.parametrize("spoil", [label_42, rgb_mask, palette_mask])
def test_wrong_labels_stop_before_the_first_write(run, data, tmp_path, spoil):
    spoil(data / "labels/sem_seg/masks/train", None)
    refused(run(), "masks/train/b.png: ", "labels/sem_seg/masks/", "wrong labels in 1 of the 3 masks checked")
    assert not (tmp_path / "out").exists()


def test_labels_whose_shares_are_odd_are_warned_of(data, tmp_path, capsys):
    """They may be label ids, or good train ids of a street full of signs."""
    for mask in (data / "labels/sem_seg/masks/train").iterdir():
        Image.new("L", (48, 24), 7).save(mask)
    flags = ["--bdd100k_root", data, "--output_path", tmp_path / "out", "--image_size", 32]
    assert pre_bdd100k.main(pre_bdd100k.get_args_parser().parse_args([str(flag) for flag in flags])) == 0
    said = capsys.readouterr()
    (warning,) = [line for line in said.err.splitlines() if "warning: " in line]
    assert f"warning: {data}/labels/sem_seg/masks/train: label 7" in warning and "id2label" in warning
    assert [item.pixels[7] for item in read_manifest(tmp_path / "out/train").items] == [1024] * 3
    assert "Next:" not in said.out


def test_a_width_given_as_the_height_is_warned_of(data, tmp_path, capsys):
    flags = ["--bdd100k_root", data, "--output_path", tmp_path / "out", "--splits", "train", "--image_size"]
    warnings = []
    for size in ("48x32", "32x48", "32"):  # the pictures are 24 x 48
        assert (
            pre_bdd100k.main(pre_bdd100k.get_args_parser().parse_args([str(f) for f in (*flags, size, "--overwrite")]))
            == 0
        )
        warnings.append([line for line in capsys.readouterr().err.splitlines() if "warning: " in line])
    ((warning,), *others) = warnings
    assert "--image_size 48x32 is 48 high and 32 wide" in warning and "was 32x48 meant?" in warning
    assert others == [[], []]


def test_many_failures_are_grouped(run, data, tmp_path, capsys):
    draw(data, "train", [f"x{index:02}" for index in range(30)])
    images, masks = data / "images/10k/train", data / "labels/sem_seg/masks/train"
    for index in range(25):
        Image.new("L", (4 + index, 4)).save(masks / f"x{index:02}.png")
    truncated_jpeg(masks, images)
    status, _, errors = run("--splits", "train")
    assert status == 1 and len(errors) == 12
    assert "b.jpg: truncated" in errors[0] and all("mask is" in error for error in errors[1:11])
    assert errors[11] == f"error: {tmp_path}/out/train: ... and 15 more like the last one"


def test_a_split_that_is_unlabelled_throughout_is_said_to_be_so(data, tmp_path, capsys):
    for mask in (data / "labels/sem_seg/masks/train").iterdir():
        Image.new("L", (48, 24), 255).save(mask)
    flags = ["--bdd100k_root", data, "--output_path", tmp_path / "out", "--image_size", 32]
    assert pre_bdd100k.main(pre_bdd100k.get_args_parser().parse_args([str(flag) for flag in flags])) == 0
    said = capsys.readouterr()
    assert f"warning: {tmp_path}/out/train: all pixels of all masks are 255 (not labelled)" in said.err
    assert f"-i {tmp_path}/out/train" not in said.out


def test_a_photograph_is_turned_as_its_mask_was_drawn(run, data, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    images = data / "images/10k/train"
    Image.open(images / "b.jpg").transpose(Image.Transpose.ROTATE_90).save(images / "b.jpg", exif=exif, quality=100)
    for _ in range(2):  # written, and taken over
        assert run("--splits", "train")[0] == 0
        items = {item.name: item for item in read_manifest(tmp_path / "out/train").items}
        assert (items["b"].height, items["b"].width, items["b"].pixels) == (24, 48, items["a"].pixels)
    assert np.abs(load(tmp_path, "out/train/imgs/b.npy") - load(tmp_path, "out/train/imgs/a.npy")).max() < 0.02


def test_an_item_that_went_bad_leaves_nothing_behind(run, data, tmp_path):
    run()
    other_size(data / "labels/sem_seg/masks/train", None)
    os.utime(data / "labels/sem_seg/masks/train/b.png", (time.time() + 10,) * 2)
    refused(run(), "mask is 24x48")
    assert not [path for path in contents(tmp_path / "out/train") if "b.npy" in path]


def test_what_the_system_does_not_let_us_read_costs_no_output(run, data, tmp_path, monkeypatch):
    run()
    before = contents(tmp_path / "out/train")

    def stale(path):
        raise cannot_be_read(path, OSError(errno.ESTALE, os.strerror(errno.ESTALE)))

    monkeypatch.setattr("pre_bdd100k.read_size", stale)
    status, _, errors = run("--splits", "train")
    assert status == 1 and len(errors) == 3
    assert f"{data}/labels/sem_seg/masks/train/a.png: cannot be read (Stale file handle)" in errors[0]
    assert contents(tmp_path / "out/train") == before


def replace_by_loop(path):
    """A link to itself: the system's answer is an error, and not that nothing is there."""
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("kind", ["images/10k", "labels/sem_seg/masks"])
def test_a_source_that_the_system_refuses_stops_before_the_first_write(run, data, tmp_path, kind, flags):
    run()
    before = contents(tmp_path / "out")
    source = next((data / kind / "train").glob("b.*"))
    replace_by_loop(source)
    refused(run(*flags), f"{source}: cannot be read (Too many levels of symbolic links)")
    assert contents(tmp_path / "out") == before


def test_a_source_that_is_missing_does_not_stop_the_others(run, data, tmp_path):
    source = data / "images/10k/train/b.jpg"
    source.unlink()
    source.symlink_to("nothing")
    refused(run("--splits", "train"), f"{source}: ")
    assert [item.name for item in read_manifest(tmp_path / "out/train").items] == ["a", "c"]


def refuse_to_open(monkeypatch, *paths):
    """As where the system tells of a file, but does not let us open it; root may open all."""
    real = open

    def refusing(file, *args, **kwargs):
        if file in paths:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)


@pytest.mark.parametrize("kind", ["images/10k", "labels/sem_seg/masks"])
def test_a_new_source_that_cannot_be_opened_costs_no_output(run, data, tmp_path, kind, monkeypatch):
    run()
    before = contents(tmp_path / "out")
    source = next((data / kind / "train").glob("b.*"))
    os.utime(source, (time.time() + 10,) * 2)
    refuse_to_open(monkeypatch, source)
    refused(run(), f"{source}: cannot be read (Permission denied)")
    assert contents(tmp_path / "out") == before


def test_what_was_made_of_a_source_that_cannot_be_opened_stays(run, data, tmp_path, monkeypatch):
    run("--splits", "train")
    before = contents(tmp_path / "out")
    source = data / "labels/sem_seg/masks/train/b.png"
    with monkeypatch.context() as patch:
        refuse_to_open(patch, source)
        for _ in range(2):  # the second relies on what the first has left
            refused(run("--splits", "train"), f"{source}: cannot be read (Permission denied)")
            assert contents(tmp_path / "out") == before
    assert run("--splits", "train")[0] == 0 and contents(tmp_path / "out") == before


def test_a_source_that_cannot_be_opened_after_a_stopped_run_costs_no_output(run, data, tmp_path, monkeypatch):
    run("--splits", "train")
    before = contents(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out/train")
    replace(manifest, complete=False, items=[]).write(tmp_path / "out/train")
    source = data / "labels/sem_seg/masks/train/b.png"
    with monkeypatch.context() as patch:
        refuse_to_open(patch, source)
        refused(run("--splits", "train"), f"{source}: cannot be read (Permission denied)")
    assert [item.name for item in read_manifest(tmp_path / "out/train").items] == ["a", "c"]
    status, said, _ = run("--splits", "train")
    assert status == 0 and "3 of them by an earlier run" in said and contents(tmp_path / "out") == before


def test_pictures_of_other_formats(run, data, tmp_path, capsys):
    folder = data / "images/10k/test"
    for name in ("u.webp", "v.bmp", "w.tif"):
        Image.new("RGB", (48, 24)).save(folder / name)
    (folder / "x.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    flags = ["--bdd100k_root", data, "--output_path", tmp_path / "out", "--image_size", 32, "--splits", "test"]
    assert pre_bdd100k.main(pre_bdd100k.get_args_parser().parse_args([str(flag) for flag in flags])) == 0
    assert "1 pictures are left out, such as" in (err := capsys.readouterr().err)
    assert f"{folder / 'x.HEIC'}: their format is not supported; convert them to JPEG" in err
    assert [item.name for item in read_manifest(tmp_path / "out/test").items] == ["s", "t", "u", "v", "w"]


def test_orphans_of_both_kinds(run, data, tmp_path):
    images = data / "images/10k/train"
    for index in range(12):
        shutil.copy(images / "a.jpg", images / f"lone{index:02}.jpg")
    (images / "c.jpg").unlink()
    status, said, errors = run()
    assert status == 1 and len(errors) == 12
    assert all(f"10k/train/lone{index:02}.jpg: image without a mask" in errors[index] for index in range(10))
    assert "12 in total, the first 10 are listed" in errors[10]
    assert "masks/train/c.png: mask without an image" in errors[11]
    assert f"{tmp_path}/out/train: 2 of 14 images written" in said


# ---------------------------------------------------------------- disk


def test_too_little_disk(run, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    need = 4 * (32 * 32 * 3 * 4 + 32 * 32)  # four items of float32 image and mask
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need - 1))
    refused(
        run(out="deep/out"),
        f"{tmp_path}/deep/out: needs 5.32e-05 GB, but 5.32e-05 GB are free on {tmp_path}",
        "--image_dtype uint8 needs 1.64e-05 GB, masks included",
    )
    assert not (tmp_path / "deep").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need))
    assert run(out="deep/out")[0] == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    assert run(out="deep/out")[0] == 0  # all is there, nothing more is needed
    assert run("--overwrite", out="deep/out")[0] == 0  # what is deleted first makes room
    refused(run("--overwrite", "--image_size", 64, out="deep/out"), "GB")
    refused(run(out="other"), "(use a smaller --image_size, or a larger disk)")  # uint8 has no room either


def test_a_disk_that_fills_up(run, tmp_path, monkeypatch):

    def write_to_full_disk(path):
        """Linux's file that is always full, under the name of the temporary one."""
        path.with_name(f".{path.name}.{os.getpid()}.tmp").symlink_to("/dev/full")
        return atomic_write(path)

    monkeypatch.setattr(pre_bdd100k, "atomic_write", write_to_full_disk)
    refused(run(), f"{tmp_path}/out/train/imgs/a.npy: cannot be written (No space left on device: the disk at ")
    assert set(contents(tmp_path / "out")) == {"train/manifest.json", "val/manifest.json"}
    assert not json.loads((tmp_path / "out/train/manifest.json").read_text())["complete"]


def test_a_file_that_is_cut_off_says_why(run, tmp_path):
    """As by a disk that fills up in the middle of it; NumPy's own writing would tell only how much was written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        refused(run("--image_size", 256), f"{tmp_path}/out/train/imgs/a.npy: cannot be written (File too large)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(contents(tmp_path / "out")) == {"train/manifest.json", "val/manifest.json"}


def test_files_are_what_numpy_writes(run, tmp_path):
    run("--image_dtype", "float16")
    for path in (tmp_path / "out/train").rglob("*.npy"):
        np.save(tmp_path / "numpy", load(path))
        assert (tmp_path / "numpy.npy").read_bytes() == path.read_bytes()


# ---------------------------------------------------------------- going on, and starting again


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}


def test_what_is_done_is_not_redone(run, tmp_path):
    run()
    first, before = contents(tmp_path / "out"), times(tmp_path / "out")
    status, said, _ = run()
    assert status == 0 and times(tmp_path / "out") == before and contents(tmp_path / "out") == first
    assert "3 of 3 images written, 3 of them by an earlier run" in said


def shorten(path, image):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path, image):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path, image):
    path.write_bytes(b"")


def delete(path, image):
    path.unlink()


def of_other_dtype(path, image):
    np.save(path, load(path).astype(np.float64))


def of_other_shape(path, image):
    np.save(path, load(path)[:16])


def pickled(path, image):
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


def damaged_header(path, image):
    data = bytearray(path.read_bytes())
    data[10] = 0  # the brace: NumPy's own parser escapes with errors of the tokenizer
    path.write_bytes(data)


def newer_source(path, image):
    os.utime(image, (time.time() + 10,) * 2)


@pytest.mark.parametrize("kind", ["imgs", "gts"])
@pytest.mark.parametrize(
    "spoil", [shorten, lengthen, empty, delete, of_other_dtype, of_other_shape, pickled, damaged_header, newer_source]
)
def test_what_is_not_whole_or_is_out_of_date_is_redone(run, data, tmp_path, spoil, kind):
    run("--splits", "train")
    first = contents(tmp_path / "out")
    folder = tmp_path / "out/train" / kind
    for path in folder.iterdir():
        os.utime(path, ns=(10**18, 4 * 10**18))  # far in the future: newer than every source
    spoil(folder / "b.npy", data / "images/10k/train/b.jpg")
    status, said, _ = run("--splits", "train")
    if spoil is newer_source:
        now = {**contents(tmp_path / "out"), "train/manifest.json": first["train/manifest.json"]}
        assert status == 0 and now == first and "1 of 3 images are redone" in said
    else:
        assert status == 0 and contents(tmp_path / "out") == first
    redone = {name for name, when in times(folder).items() if when != 4 * 10**18}
    assert redone == {"b.npy"} and "2 of them by an earlier run" in said


def replace_by(mask, label, when=None):
    """Put another mask in the place of one, with an older date than any output."""
    Image.new("L", (48, 24), label).save(mask.with_suffix(".new"), "PNG")
    os.utime(mask.with_suffix(".new"), (1.6e9, 1.6e9) if when is None else when)
    os.replace(mask.with_suffix(".new"), mask)


def test_an_older_mask_is_another_mask(run, data, tmp_path):
    run("--splits", "train")
    replace_by(data / "labels/sem_seg/masks/train/b.png", 5)
    before = times(tmp_path / "out/train/gts")
    status, said, _ = run("--splits", "train")
    assert status == 0 and (load(tmp_path, "out/train/gts/b.npy") == 5).all()
    assert f"{tmp_path}/out/train: 1 of 3 images are redone: " in said and "2 of them by an earlier run" in said
    assert {name for name, when in times(tmp_path / "out/train/gts").items() if when != before[name]} == {"b.npy"}
    assert "redone" not in run("--splits", "train")[1]


@pytest.mark.parametrize("linked", ["root", "folder", "file"])
def test_a_link_to_other_files_is_other_files(run, data, tmp_path, linked):
    """Files of the same names, bytes and dates in all."""
    one, two = tmp_path / "one", tmp_path / "two"
    data.rename(one)
    shutil.copytree(one, two)
    for mask in (two / "labels/sem_seg/masks/train").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(mask)) == 13, np.uint8(14), 255)).save(mask)
        time_of = (one / mask.relative_to(two)).stat()
        os.utime(mask, ns=(time_of.st_atime_ns, time_of.st_mtime_ns))
    below = {"root": ".", "folder": "labels/sem_seg/masks/train", "file": "labels/sem_seg/masks/train/b.png"}[linked]
    link = tmp_path / "link"
    if linked != "root":
        shutil.copytree(one, link)
        shutil.rmtree(link / below) if linked == "folder" else (link / below).unlink()
    for target, car, changed in ((one, 13, 0), (two, 14, 1 if linked == "file" else 3)):
        (link / below).unlink(missing_ok=True) if linked != "root" else link.unlink(missing_ok=True)
        (link if linked == "root" else link / below).symlink_to(target / below)
        status, said, _ = run("--splits", "train", root=link)
        assert status == 0 and car in load(tmp_path, "out/train/gts/b.npy")
        assert ("redone" in said) == bool(changed) and f"{changed} of 3" in (said if changed else "0 of 3")


def test_another_root_with_the_same_names_is_done_again(run, data, tmp_path):
    run("--splits", "train")
    shutil.copytree(data, tmp_path / "copy")  # dates too
    status, said, _ = run("--splits", "train", root=tmp_path / "copy")
    assert status == 0 and "3 of 3 images are redone" in said and "by an earlier run" not in said


def test_what_is_stopped_before_it_is_done_again_is_not_taken_over(run, data, tmp_path, monkeypatch):
    """The record of the sources is written before the arrays: old ones must not pass for new."""
    run("--splits", "train")
    replace_by(data / "labels/sem_seg/masks/train/b.png", 5)

    def stop(*args):
        raise UserError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(pre_bdd100k, "run_jobs", stop)
        refused(run("--splits", "train"), "stopped")
    assert run("--splits", "train")[0] == 0
    assert (load(tmp_path, "out/train/gts/b.npy") == 5).all()


def test_a_mask_that_changes_while_it_is_read_is_done_again(run, data, tmp_path, monkeypatch):
    read, mask = pre_bdd100k.read_item, data / "labels/sem_seg/masks/train/b.png"

    def read_and_replace(item, labels):
        result = read(item, labels)
        if item.name == "b":
            replace_by(mask, 5)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(pre_bdd100k, "read_item", read_and_replace)
        run("--splits", "train")
    assert run("--splits", "train")[0] == 0
    assert (load(tmp_path, "out/train/gts/b.npy") == 5).all()


def test_a_folder_of_an_older_version_is_done_again_and_said_to_be(run, data, tmp_path):
    run("--splits", "train")
    path = tmp_path / "out/train/manifest.json"
    fields = json.loads(path.read_text())
    del fields["sources"]
    path.write_text(json.dumps(fields))
    replace_by(data / "labels/sem_seg/masks/train/b.png", 5)
    status, said, _ = run("--splits", "train")
    assert status == 0 and "3 of 3 images are redone: an older version did not record" in said
    assert (load(tmp_path, "out/train/gts/b.npy") == 5).all()
    assert "3 of them by an earlier run" in run("--splits", "train")[1]


def test_leftovers_of_killed_processes_go(run, tmp_path, monkeypatch):
    leftovers = [tmp_path / "out/train/imgs/.b.npy.123.tmp", tmp_path / "out/train/.manifest.json.123.tmp"]
    run()
    for path in leftovers:
        path.write_bytes(b"half")

    def worker_is_killed(*args):
        assert not temporaries(tmp_path)  # those of earlier runs went before the work began
        leftovers[0].write_bytes(b"half")
        raise UserError("a worker process was killed")

    monkeypatch.setattr(pre_bdd100k, "run_jobs", worker_is_killed)
    refused(run(), "a worker process was killed")  # and `run` sees to it that none is left


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--image_size", "64"], "written with --image_size 32 "),
        (["--image_size", "32x64"], "--resize_mode stretch, not with --image_size 32x64 --image_dtype"),
        (["--image_dtype", "uint8"], "written with --image_size 32 --image_dtype float32"),
        (["--resize_mode", "pad"], "--resize_mode stretch, not with"),
    ],
)
def test_other_settings_want_overwrite(run, tmp_path, flags, said):
    run("--splits", "val")
    first = contents(tmp_path / "out")
    refused(run(*flags), f"{tmp_path}/out/val: was", said, "--overwrite")
    assert contents(tmp_path / "out") == first  # train, which was free to go, was not begun
    assert run(*flags, "--overwrite")[0] == 0
    run(*flags, out="fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_overwrite_leaves_nothing_of_before(run, data, tmp_path):
    run()
    for path in (data / "images/10k/train/c.jpg", data / "labels/sem_seg/masks/train/c.png"):
        path.unlink()
    shutil.rmtree(data / "labels/sem_seg/masks/val")
    refused(run(), "out/val: was written with masks, and there are none now; add --overwrite")
    assert run("--overwrite")[0] == 0
    run(out="fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert not (tmp_path / "out/val/gts").exists()


@pytest.mark.parametrize("manifest", [None, "{}"])
def test_files_of_unknown_origin_are_not_taken_over(run, tmp_path, manifest):
    run()
    (tmp_path / "out/train/manifest.json").unlink()
    if manifest:
        (tmp_path / "out/train/manifest.json").write_text(manifest)
    refused(run(), "manifest.json", "--overwrite")
    assert run("--overwrite")[0] == 0


# ---------------------------------------------------------------- runs that are stopped, as processes of their own


SMALL = ["--splits", "train", "--image_size", "256"]
GO_ON = "run the same command again to resume"
NUM_MANY = 160


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A data set that takes long enough to be caught in the middle of, and what an undisturbed run makes of it."""
    root, out = (tmp_path_factory.mktemp("many") / name for name in ("bdd", "undisturbed"))
    draw(root, "train", [f"{index:02}" for index in range(NUM_MANY)], size=(540, 960))
    assert go_on(root, out) == 0
    return root, contents(out)


def go_on(root, out):
    flags = [*SMALL, "--bdd100k_root", str(root), "--output_path", str(out), "--num_workers", "1"]
    return pre_bdd100k.main(pre_bdd100k.get_args_parser().parse_args(flags))


def start(root, out, *flags):
    command = [sys.executable, SCRIPT, *SMALL, "--bdd100k_root", root, "--output_path", out, "--num_workers", "2"]
    return subprocess.Popen(
        [*command, *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs in the background of a shell ignores Ctrl-C, and so do its children unless they are told not to.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_some(process, out):
    deadline = time.monotonic() + 300
    while len(list(out.glob("train/gts/*.npy"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def workers_of(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def stopped_half_way(out):
    done = len(list(out.glob("train/gts/*.npy")))
    assert 3 <= done < NUM_MANY, "the run was over before it could be stopped; give it more to do"
    return not json.loads((out / "train/manifest.json").read_text())["complete"]


@pytest.mark.slow
def test_kill_and_go_on(many, tmp_path, capsys):
    (root, undisturbed), out = many, tmp_path / "out"
    process = start(root, out)
    wait_for_some(process, out)
    process.kill()
    process.communicate(timeout=300)  # the workers hold its stderr: this ends only when they too have ended
    assert stopped_half_way(out)
    assert go_on(root, out) == 0
    assert contents(out) == undisturbed and "of them by an earlier run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "again"),
    [([], GO_ON), (["--overwrite"], "run the same command without --overwrite to resume")],
)
@pytest.mark.slow
def test_interrupt(many, tmp_path, flags, again):
    (root, undisturbed), out = many, tmp_path / "out"
    process = start(root, out, *flags)
    wait_for_some(process, out)
    for pid in workers_of(process.pid):  # else they would die of it one by one, each with a traceback
        ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        assert ignored and int(ignored[1], 16) >> (signal.SIGINT - 1) & 1
    os.killpg(process.pid, signal.SIGINT)  # to all of them, as the terminal's Ctrl-C
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1] == f"interrupted: {again}"
    assert stopped_half_way(out) and not temporaries(out)
    assert go_on(root, out) == 0 and contents(out) == undisturbed


@pytest.mark.parametrize("later", [0.02, 0.1, 0.2])
@pytest.mark.slow
def test_a_second_interrupt_is_no_hang(many, tmp_path, later):
    """Python's executor, interrupted as it shuts down, leaves processes that are waited for ever."""
    (root, undisturbed), out = many, tmp_path / "out"
    process = start(root, out)
    wait_for_some(process, out)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(later)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "Traceback" not in said
    assert "\nstopping after the images in progress\n" in said and said.endswith(f"\ninterrupted: {GO_ON}\n")
    assert stopped_half_way(out) and not temporaries(out)
    assert go_on(root, out) == 0 and contents(out) == undisturbed


def test_a_killed_worker_is_no_hang(many, tmp_path):
    (root, _), out = many, tmp_path / "out"
    process = start(root, out)
    wait_for_some(process, out)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: a worker process was killed") and "--num_workers" in said
    assert stopped_half_way(out) and not temporaries(out)


def test_importing_does_nothing_and_needs_no_torch():
    """Each worker process imports the script again: PyTorch would cost each of them seconds and memory."""
    code = "import sys, pre_bdd100k; sys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# ---------------------------------------------------------------- another data set


STREETS = """\
name: streets
classes:
  - {id: 0, name: 道路, color: [128, 64, 128]}
  - {id: 1, name: a vehicle with wheels, color: [0, 0, 142]}
labels: {kind: ids, values: {道路: [7], a vehicle with wheels: [26, 27]}, ignore: [0]}
layout: folders
"""


@pytest.fixture
def streets(tmp_path):
    """Two training images, one for validation, and the description of their data set; palette masks, two columns each
    of road, car, truck and void."""
    mask = Image.fromarray(np.repeat(np.array([[7, 26, 27, 0]], np.uint8), 8, 0).repeat(2, 1), "P")
    mask.putpalette([i % 251 for i in range(768)])
    for split, names in {"train": ["a", "b"], "val": ["c"]}.items():
        for kind, suffix, picture in (("images", "jpg", Image.new("RGB", (8, 8))), ("masks", "png", mask)):
            (tmp_path / "streets" / kind / split).mkdir(parents=True)
            for name in names:
                picture.save(tmp_path / "streets" / kind / split / f"{name}.{suffix}")
    description = tmp_path / "streets.yaml"
    description.write_text(STREETS)
    return description


def test_another_data_set(run, streets, tmp_path):
    status, said, errors = run("--dataset", streets, root=tmp_path / "streets")
    assert (status, errors) == (0, [])
    expected = np.array([[0, 1, 1, 255]], np.uint8).repeat(32, 0).repeat(8, 1)
    assert np.array_equal(load(tmp_path, "out/train/gts/a.npy"), expected)
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest.classes.names == ("道路", "a vehicle with wheels") and manifest.description.name == "streets"
    assert manifest.items[0].pixels == [256, 512] and manifest.items[0].ignored == 256
    rows = list(csv.reader((tmp_path / "out/train/label_distribution.csv").read_text().splitlines()))
    assert [row[:3] for row in rows[1:]] == [
        ["0", "道路", "512"],
        ["1", "a vehicle with wheels", "1024"],
        ["255", "not labelled", "512"],
    ]
    assert Image.open(tmp_path / "out/train/label_distribution.png").size[0] > 500
    assert "  1  a vehicle with wheels " in said and "traffic light" not in said
    assert "-task_name streets-SAM-MaskDecoder" in said


def test_another_data_set_has_a_folder_of_its_own(streets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--root", "streets", "-dataset", str(streets), "-image_size", "32", "-num_workers", "1"]
    assert pre_bdd100k.main(pre_bdd100k.get_args_parser().parse_args(flags)) == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["streets_npy"]


def test_a_folder_of_another_data_set_is_refused(run, streets, tmp_path):
    run()
    before = contents(tmp_path / "out")
    again = "; add --overwrite to delete its files and start anew"
    status, _, errors = run("--dataset", streets, root=tmp_path / "streets")
    assert (status, errors) == (1, [f"error: {tmp_path}/out/train: was written from bdd100k, not from streets{again}"])
    assert contents(tmp_path / "out") == before
    assert run("--dataset", streets, "--overwrite", root=tmp_path / "streets")[0] == 0
    assert read_manifest(tmp_path / "out/train").description.name == "streets"
    assert run("--dataset", streets, root=tmp_path / "streets")[0] == 0  # the same again
    before = contents(tmp_path / "out")
    streets.write_text(STREETS.replace("[26, 27]", "[26]").replace("ignore: [0]", "ignore: [0, 27]"))
    status, _, errors = run("--dataset", streets, root=tmp_path / "streets")
    assert (status, errors) == (1, [f"error: {tmp_path}/out/train: had another description of streets{again}"])
    assert contents(tmp_path / "out") == before
    status, _, errors = run()
    assert (status, errors) == (1, [f"error: {tmp_path}/out/train: was written from streets, not from bdd100k{again}"])


def test_a_bad_description_or_mask_writes_nothing(run, streets, tmp_path):
    status, _, errors = run("--dataset", "streets", root=tmp_path / "streets")
    assert status == 1 and len(errors) == 1 and "no such data set" in errors[0]
    streets.write_text(STREETS.replace("[7]", "[26]"))
    status, _, errors = run("--dataset", streets, root=tmp_path / "streets")
    assert status == 1 and len(errors) == 1 and f"{streets}:5: value 26" in errors[0]
    streets.write_text(STREETS.replace(", 27]", "]"))
    status, _, errors = run("--dataset", streets, root=tmp_path / "streets")
    assert status == 1 and len(errors) == 1 and "holds values 27, which the description does not list" in errors[0]
    assert not (tmp_path / "out").exists()


def test_the_manifest_of_bdd100k_has_no_new_field(run, tmp_path):
    assert run("--dataset", "bdd100k")[0] == 0
    fields = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert list(fields) == [
        "image_size",
        "image_dtype",
        "resize_mode",
        "labelled",
        "complete",
        "items",
        "format_version",
        "class_names",
        "sources",
    ]
