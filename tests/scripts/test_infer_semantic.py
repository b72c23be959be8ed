"""infer_bdd100k.py without ground-truth boxes: semantic checkpoints, one's own pictures, detections, original sizes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import infer_bdd100k
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.inputs import IMAGE_SIZE, pictures, write_detections, write_video
from tests.helpers.scripts import good_flags, read_results, run_script
from utils.data.bdd100k import read_image
from utils.data.classes import BDD100K
from utils.evaluate.media import has_h264
from utils.model import checkpoint

pytestmark = pytest.mark.slow

SPLIT_NAMES = ["val-0000", "val-0001", "val-0002"]


@pytest.fixture(scope="module")
def semantic(sam_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("semantic") / checkpoint.BEST, sam_file, "semantic")


@pytest.fixture(scope="module")
def boxed(sam_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("boxed") / checkpoint.BEST, sam_file, "box")


@pytest.fixture
def infer(sam_file: Path, npy: Path, tmp_path: Path) -> Callable[..., int | None]:
    """A function that runs the script into `tmp_path / "out"`."""

    def infer(*flags: object) -> int | None:
        return run_script(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), *flags)

    return infer


def test_the_mode_is_read_from_the_checkpoint_and_the_report_says_no_boxes(
    infer: Callable[..., int | None], semantic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not infer("--model_checkpoint", semantic)
    results = read_results(tmp_path / "out")
    assert results["boxes"] == "none"
    assert results["unclaimed_share"] == 0  # every pixel is some class
    assert "no boxes" in capsys.readouterr().out
    text = (tmp_path / "out" / "evaluation_results.txt").read_text()
    assert "no boxes" in text and "oracle" not in text


def test_folder_of_jpegs_of_mixed_sizes(infer: Callable[..., int | None], semantic: Path, tmp_path: Path) -> None:
    sizes = pictures(tmp_path / "in")
    flags = ["--model_checkpoint", semantic, "--images", tmp_path / "in"]
    assert not infer(*flags, "--save_predictions", "--batch_size", 3)
    for name, size in sizes.items():
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg") as overlay:
            assert overlay.width == size[1]
            assert (overlay.height > size[0]) == (name == "large")  # the others have no room for a legend
        labels = np.asarray(Image.open(tmp_path / "out" / "predictions" / f"{name}.png"))
        assert labels.shape == size and labels.dtype == np.uint8 and labels.max() < 19
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == len(sizes)
    # A file and a pattern are as good as a folder, and a batch changes nothing.
    whole = np.asarray(Image.open(tmp_path / "out" / "predictions" / "large.png"))
    for one in (tmp_path / "in" / "large.jpg", tmp_path / "in" / "l*.jpg"):
        assert not infer(*flags[:2], "--images", one, "--save_predictions", "--output_dir", tmp_path / "one")
        again = np.asarray(Image.open(tmp_path / "one" / "predictions" / "large.png"))
        assert (whole != again).mean() < 1e-3


def test_a_damaged_picture_is_told_and_the_others_are_segmented(
    infer: Callable[..., int | None], semantic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = pictures(tmp_path / "in")
    half = tmp_path / "in" / "half.jpg"
    half.write_bytes((tmp_path / "in" / "large.jpg").read_bytes()[:3000])
    assert infer("--model_checkpoint", semantic, "--images", tmp_path / "in") == 1
    assert f"not segmented: {half}" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == len(sizes)


def test_a_picture_that_went_bad_keeps_no_overlay_of_before(
    infer: Callable[..., int | None], semantic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "in")
    flags = ["--model_checkpoint", semantic, "--images", tmp_path / "in", "--save_predictions"]
    assert not infer(*flags)
    for folder in ("overlays", "predictions"):
        (tmp_path / "out" / folder / "other.txt").touch()
    (tmp_path / "in" / "tall.jpg").write_bytes(b"damaged")
    (tmp_path / "in" / "wide.jpg").unlink()
    capsys.readouterr()
    assert infer(*flags) == 1
    said = capsys.readouterr().out
    for folder in ("overlays", "predictions"):
        names = {path.stem for path in (tmp_path / "out" / folder).iterdir()}
        assert names == {"large", "tiny", "wide", "other"}  # who gives other pictures keeps those of before
        assert f"{tmp_path / 'out' / folder}: replacing 3 pictures of an earlier run" in said
        assert f"{tmp_path / 'out' / folder}: 2 other files stay," in said


def test_frames_of_a_longer_video_do_not_stay(infer: Callable[..., int | None], semantic: Path, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    saved = tmp_path / "out" / "predictions"
    saved.mkdir(parents=True)
    for name in ("clip_000007", "clip_x", "otherclip_000007"):
        (saved / f"{name}.png").touch()
    assert not infer("--model_checkpoint", semantic, "--images", clip, "--save_predictions")
    frames = {f"clip_{index:06}" for index in range(5)}
    assert {path.stem for path in saved.iterdir()} == {*frames, "clip_x", "otherclip_000007"}


def test_a_video_among_pictures_is_told(
    infer: Callable[..., int | None], semantic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    pictures(folder)
    write_video(folder / "drive.mp4")
    for images in (folder, folder / "*"):
        assert not infer("--model_checkpoint", semantic, "--images", images)
        assert f"{folder / 'drive.mp4'}: a video; give it alone as --images" in capsys.readouterr().out


def test_pictures_of_other_formats_are_segmented_or_told(
    infer: Callable[..., int | None], semantic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.webp", "b.bmp", "c.tif", "d.TIFF"):
        Image.new("RGB", (48, 32)).save(folder / name)
    (folder / "e.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    for images in (folder, folder / "*"):
        assert not infer("--model_checkpoint", semantic, "--images", images)
        said = capsys.readouterr().out
        assert f"not segmented: {folder / 'e.HEIC'}: its format is not supported; convert it to JPEG" in said
    assert sorted(path.name for path in (tmp_path / "out/overlays").iterdir()) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def test_saved_predictions_never_replace_the_pictures(
    semantic: Path, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    (tmp_path / "mine").mkdir()
    pictures(tmp_path / "mine" / "predictions")
    flags = ["--images", tmp_path / "mine" / "predictions", "--output_dir", tmp_path / "mine", "--save_predictions"]
    line = error_of(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), "--model_checkpoint", semantic, *flags)
    assert "the input is there and would be replaced" in line


def exported(archive: Path) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
    """The file names and sizes in COCO's archive, and all of it."""
    with zipfile.ZipFile(archive) as opened:
        content = json.loads(opened.read("annotations/instances_default.json"))
    return {image["file_name"]: (image["height"], image["width"]) for image in content["images"]}, content


def test_pictures_for_annotators(
    infer: Callable[..., int | None], semantic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = pictures(tmp_path / "in")
    (tmp_path / "in" / "bad.jpg").write_bytes(b"damaged")
    flags = ["--model_checkpoint", semantic, "--images", tmp_path / "in", "--save_predictions"]
    assert infer(*flags, "--predictions_format", "coco", "--batch_size", 3) == 1
    archive = tmp_path / "out" / "predictions_coco.zip"
    assert f"For COCO's tools: {archive}" in capsys.readouterr().out
    found, content = exported(archive)
    assert found == {f"{name}.jpg": sizes[name] for name in sorted(sizes)}  # without the damaged one
    pixels = sum(annotation["area"] for annotation in content["annotations"])
    assert pixels == sum(height * width for height, width in sizes.values())  # every pixel has one class
    assert content["info"]["description"] == f"predicted by {semantic}"
    assert infer(*flags) == 1
    assert not archive.exists()  # it would be of an earlier run


def test_a_split_for_annotators(
    infer: Callable[..., int | None], semantic: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not infer("--model_checkpoint", semantic, "--save_predictions", "--predictions_format", "labelstudio")
    folder = scenes / "images" / "10k" / "val"
    assert f"    add {folder} as local storage before importing\n" in capsys.readouterr().out
    tasks = json.loads((tmp_path / "out" / "predictions_labelstudio.json").read_text())
    assert [task["data"]["image"] for task in tasks] == [f"/data/local-files/?d=val/val_{i:06}.jpg" for i in range(3)]
    assert not infer("--model_checkpoint", semantic)
    assert not list((tmp_path / "out").glob("predictions_*"))


def test_annotators_flags_that_do_not_fit(
    semantic: Path, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    flags = [*good_flags(sam_file, npy, tmp_path), "--model_checkpoint", semantic, "--predictions_format", "cvat"]
    assert "--predictions_format cvat: needs --save_predictions" in error_of(infer_bdd100k, *flags)
    clip = write_video(tmp_path / "clip.mp4")
    line = error_of(infer_bdd100k, *flags, "--save_predictions", "--images", clip)
    assert f"{clip}: --predictions_format cvat needs pictures; extract the frames (ffmpeg -i {clip} 'FOLDER" in line
    pictures(tmp_path / "in")
    (tmp_path / "in" / "tall.jpg").rename(tmp_path / "in" / "ta\tll.jpg")
    line = error_of(infer_bdd100k, *flags, "--save_predictions", "--images", tmp_path / "in")
    assert "annotation tools take no control characters in a path" in line
    shutil.copytree(npy / "val", tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    del manifest["sources"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    line = error_of(infer_bdd100k, *flags, "--save_predictions", "--val_npy_path", tmp_path / "old")
    assert "did not record the file of val_000000; run pre_bdd100k.py again with --overwrite" in line
    assert not (tmp_path / "out").exists()
    assert not run_script(infer_bdd100k, *flags[:-2], "--save_predictions", "--val_npy_path", tmp_path / "old")


def test_an_unknown_prompt_mode(
    semantic: Path, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    payload = torch.load(semantic, weights_only=True)
    payload["info"]["prompt_mode"] = "points"
    torch.save(payload, tmp_path / "points.pth")
    flags = [*good_flags(sam_file, npy, tmp_path), "--model_checkpoint", tmp_path / "points.pth"]
    assert "prompt mode points is unknown to this version" in error_of(infer_bdd100k, *flags)


def test_a_video_gives_a_video(infer: Callable[..., int | None], semantic: Path, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    assert not infer("--model_checkpoint", semantic, "--images", clip, "--batch_size", 2)
    video = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    frames = 0
    while (frame := video.read())[0]:
        assert frame[1].shape == (48, 64, 3)
        frames += 1
    assert frames == 5 and video.get(cv2.CAP_PROP_FPS) == 10


def test_overlays_of_chosen_classes_and_opacity(
    infer: Callable[..., int | None], semantic: Path, tmp_path: Path
) -> None:
    pictures(tmp_path / "in")
    flags = ["--model_checkpoint", semantic, "--images", tmp_path / "in" / "large.jpg", "--save_predictions"]
    assert not infer(*flags)
    labels = np.asarray(Image.open(tmp_path / "out" / "predictions" / "large.png"))
    class_id = int(np.bincount(labels.ravel()).argmax())
    name = BDD100K.classes[class_id].name
    assert not infer(*flags, "--opacity", 1, "--classes", name.upper().replace(" ", "_"))
    assert (np.asarray(Image.open(tmp_path / "out" / "predictions" / "large.png")) == labels).all()
    picture = read_image(tmp_path / "in" / "large.jpg").astype(int)
    drawn = read_image(tmp_path / "out" / "overlays" / "large.jpg")[:300].astype(int)
    inside, outside = (
        cv2.erode(m.astype(np.uint8), np.ones((9, 9))) > 0 for m in (labels == class_id, labels != class_id)
    )
    assert inside.any() and outside.any()
    assert (np.abs(drawn[inside] - BDD100K.classes[class_id].color) < 25).all()
    assert np.abs(drawn[outside] - picture[outside]).mean() < 25  # noise, as JPEG keeps it


def test_a_video_without_pyav_is_mpeg4_and_says_so(
    infer: Callable[..., int | None],
    semantic: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    advice = "for H.264, pip install av"
    if has_h264():
        assert not infer("--model_checkpoint", semantic, "--images", clip)
        assert advice not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "av", None)
    assert not infer("--model_checkpoint", semantic, "--images", clip)
    assert advice in capsys.readouterr().out
    video = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little") == b"FMP4"


def test_original_size_equals_bdd100ks_toolkit_on_the_saved_pngs(
    infer: Callable[..., int | None], scenes: Path, boxed: Path, semantic: Path, tmp_path: Path
) -> None:
    from bdd100k.eval.seg import evaluate_sem_seg

    masks = scenes / "labels" / "sem_seg" / "masks" / "val"
    for model in (boxed, semantic):  # with and without pixels that no class claims
        infer("--model_checkpoint", model, "--eval_size", "original", "--bdd100k_root", scenes, "--save_predictions")
        saved = tmp_path / "out" / "predictions"
        paths = sorted(masks.glob("*.png"))
        assert sorted(path.name for path in saved.iterdir()) == [path.name for path in paths]
        theirs = evaluate_sem_seg(list(map(str, paths)), [str(saved / path.name) for path in paths], nproc=1)
        results = read_results(tmp_path / "out")
        assert results["labelled_pixels"] > 3 * 144 * 256 * 0.9
        assert results["miou"] == pytest.approx(theirs.summary()["mIoU"] / 100, abs=1e-9)
        assert "at the original size" in (tmp_path / "out" / "evaluation_results.txt").read_text()


def test_original_masks_are_found_and_checked_as_preprocessing_does(
    infer: Callable[..., int | None],
    scenes: Path,
    semantic: Path,
    sam_file: Path,
    npy: Path,
    tmp_path: Path,
    error_of: Callable[..., str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model_checkpoint", semantic, "--eval_size", "original", "--bdd100k_root", tmp_path / "data"]
    shutil.copytree(scenes, tmp_path / "data" / "bdd100k")
    masks = tmp_path / "data" / "bdd100k" / "labels" / "sem_seg" / "masks" / "val"
    for path in masks.iterdir():
        path.rename(path.with_suffix(".PNG"))
    assert not infer(*flags)
    assert f"val: the images are in {tmp_path / 'data' / 'bdd100k'}/images/10k/val\n" in capfd.readouterr().out
    path = sorted(masks.iterdir())[-1]
    with Image.open(path) as mask:
        Image.new("L", mask.size, 26).save(path)
    before = read_results(tmp_path / "out")
    assert "holds labels 26" in error_of(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), *flags)
    assert read_results(tmp_path / "out") == before  # told before anything was replaced


def test_original_masks_of_odd_shares_are_warned_of(
    infer: Callable[..., int | None],
    scenes: Path,
    semantic: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(scenes, tmp_path / "data")
    masks = tmp_path / "data" / "labels" / "sem_seg" / "masks" / "val"
    for path in masks.iterdir():
        with Image.open(path) as mask:
            Image.new("L", mask.size, 7).save(path)
    assert not infer("--model_checkpoint", semantic, "--eval_size", "original", "--bdd100k_root", tmp_path / "data")
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert f"{masks}: label 7" in line and "id2label" in line


def test_boxes_of_a_detector_take_the_place_of_the_ground_truths(
    infer: Callable[..., int | None], npy: Path, boxed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(path.stem for path in (npy / "val" / "imgs").iterdir())
    detections = write_detections(tmp_path / "det.json", names[:2])
    assert not infer("--model_checkpoint", boxed, "--boxes", detections)
    printed = capsys.readouterr().out
    assert "has 2 of 3 images" in printed and f"boxes: {detections}" in printed and "oracle" not in printed
    predicted = {c["name"]: c["predicted_pixels"] for c in read_results(tmp_path / "out")["per_class"]}
    assert predicted["car"] > 0 and sum(predicted.values()) == predicted["car"]


def test_boxes_for_ones_own_pictures(infer: Callable[..., int | None], boxed: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "in")
    detections = write_detections(tmp_path / "det.json", ["large", "wide"], category="pedestrian")
    flags = ["--images", tmp_path / "in", "--boxes", detections, "--save_predictions"]
    assert not infer("--model_checkpoint", boxed, *flags)
    values = {
        name: set(np.unique(np.asarray(Image.open(tmp_path / "out" / "predictions" / f"{name}.png"))).tolist())
        for name in ("large", "tall")
    }
    assert values["large"] <= {11, 255} and 11 in values["large"]
    assert values["tall"] == {255}  # not in the file: nothing was detected


def test_boxes_that_fit_no_frame_of_a_video(
    boxed: Path, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    flags = [*good_flags(sam_file, npy, tmp_path), "--model_checkpoint", boxed, "--images", clip, "--boxes"]
    detections = write_detections(tmp_path / "det.json", ["other_000000"])
    assert "has no box for" in error_of(infer_bdd100k, *flags, detections)
    assert not list((tmp_path / "out").glob("*.mp4"))  # nothing half done is left
    detections = write_detections(tmp_path / "det.json", ["clip_000001"])
    assert not run_script(infer_bdd100k, *flags, detections)
    assert (tmp_path / "out" / "clip.mp4").exists()


def test_two_processes_equal_one_exactly(
    infer: Callable[..., int | None], sam_file: Path, npy: Path, semantic: Path, tmp_path: Path
) -> None:
    # Three images in batches of two: the second process has one image fewer.
    more = ["--visualize", "--save_predictions", "--predictions_format", "coco", "--batch_size", 2, "--tta"]
    infer("--model_checkpoint", semantic, *more)
    single = tmp_path / "out"
    flags = [*good_flags(sam_file, npy, tmp_path), "--model_checkpoint", semantic, "--output_dir", tmp_path / "two"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    script = infer_bdd100k.__file__
    words = [*launcher, script, *flags, *more]
    # Threads decide how sums are rounded, and a launcher gives each process one unless it is told.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([str(word) for word in words], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("评估结果") == 1  # only the first process speaks
    assert read_results(tmp_path / "two") == read_results(single)
    for name in ("report.html", "image_scores.csv", "label_maps.zip"):
        assert (single / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert exported(tmp_path / "two" / "predictions_coco.zip") == exported(single / "predictions_coco.zip")
    for folder in ("predictions", "visualizations"):
        files = {path.name: path.read_bytes() for path in (single / folder).iterdir()}
        assert len(files) == 3
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "two" / folder).iterdir()}


def test_mirror_images_count_and_the_report_says_so(
    infer: Callable[..., int | None], scenes: Path, semantic: Path, tmp_path: Path
) -> None:
    flags = ["--model_checkpoint", semantic, "--eval_size", "original", "--bdd100k_root", scenes]
    infer(*flags)
    plain = read_results(tmp_path / "out")
    infer(*flags, "--tta", "--batch_size", 2, "--save_predictions")
    results = read_results(tmp_path / "out")
    assert results["tta"] and not plain["tta"]
    assert results["labelled_pixels"] == plain["labelled_pixels"] and results["miou"] != plain["miou"]
    text = (tmp_path / "out" / "evaluation_results.txt").read_text()
    assert "test-time augmentation: the class probabilities of each image and of its mirror image are averaged" in text
    assert "each pixel goes to its highest average probability" in text


@pytest.mark.parametrize("resize_mode", ["stretch", "pad"])
def test_mirrored_pictures_get_mirrored_maps(
    resize_mode: str, sam_file: Path, infer: Callable[..., int | None], tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model.pth", sam_file, "semantic", resize_mode=resize_mode)
    rng = np.random.default_rng(0)
    for folder in ("in", "mirrored"):
        (tmp_path / folder).mkdir()
    # Pictures that fill a side of the frame need no resizing, which rounds.
    widths = {"a": IMAGE_SIZE, "b": 45 if resize_mode == "pad" else IMAGE_SIZE}
    for name, width in widths.items():
        picture = rng.integers(0, 256, (IMAGE_SIZE, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "in" / f"{name}.png")
        Image.fromarray(picture[:, ::-1].copy()).save(tmp_path / "mirrored" / f"{name}.png")
    for folder in ("in", "mirrored"):
        flags = ["--images", tmp_path / folder, "--output_dir", tmp_path / f"of {folder}", "--save_predictions"]
        assert not infer("--model_checkpoint", model, *flags, "--tta", "--batch_size", 2)
    for name, width in widths.items():
        files = [tmp_path / f"of {folder}" / "predictions" / f"{name}.png" for folder in ("in", "mirrored")]
        maps = [np.asarray(Image.open(file)) for file in files]
        assert maps[0].shape == (IMAGE_SIZE, width) and len(np.unique(maps[0])) > 1
        assert np.array_equal(maps[0], maps[1][:, ::-1])


def test_mirror_images_of_a_videos_frames(infer: Callable[..., int | None], semantic: Path, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    assert not infer("--model_checkpoint", semantic, "--images", clip, "--save_predictions", "--tta", "--batch_size", 2)
    for index in range(5):  # of one colour each, and so their own mirror images
        labels = np.asarray(Image.open(tmp_path / "out" / "predictions" / f"clip_{index:06}.png"))
        assert labels.shape == (48, 64) and (labels != labels[:, ::-1]).mean() < 1e-3


def a_picture(folder: Path) -> Path:
    """A folder with one picture."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / "a.png")
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


# Flags after those of a good run with the checkpoint of the mode, as a function of an empty folder; the line they give.
BAD_FLAGS: dict[str, tuple[str, Callable[[Path], list[object]], str]] = {
    "boxes for a semantic checkpoint": (
        "semantic",
        lambda f: ["--boxes", write_detections(f / "det.json", SPLIT_NAMES)],
        "takes no boxes; leave out",
    ),
    "a threshold for a semantic checkpoint": (
        "semantic",
        lambda f: ["--map_rule", "threshold"],
        "supports only argmax",
    ),
    "mirror images for a boxed checkpoint": (
        "box",
        lambda f: ["--tta"],
        "takes boxes, but --tta needs a semantic checkpoint",
    ),
    "a cache for mirror images": (
        "semantic",
        lambda f: ["--tta", "--cache_embeddings", f / "c"],
        "reads no cache; leave out --cache_embeddings",
    ),
    "no boxes for pictures of one's own": (
        "box",
        lambda f: [*pictures(f / "in"), "--images", f / "in"][-2:],
        "give --boxes FILE, or the checkpoint of",
    ),
    "scoring one's own pictures": (
        "semantic",
        lambda f: ["--images", f, "--eval_size", "original"],
        "--images draws overlays without a score",
    ),
    "a report of one's own pictures": (
        "semantic",
        lambda f: ["--images", f, "--report_images", 60],
        "leave out --visualize, --report_images, --eval_size",
    ),
    "how overlays look, for a split": (
        "semantic",
        lambda f: ["--opacity", "0.3"],
        "--opacity and --classes are for --images",
    ),
    "an unknown class": (
        "semantic",
        lambda f: ["--images", a_picture(f / "one"), "--classes", "road", "roads"],
        "no class 'roads'; the classes are road, sidewalk,",
    ),
    "a cache for one's own pictures": (
        "semantic",
        lambda f: ["--images", f, "--cache_embeddings", f / "c"],
        "--images reads no cache; leave out --cache_embeddings",
    ),
    "unreadable video": (
        "semantic",
        lambda f: ["--images", written(f / "x.mp4", "no video" * 99)],
        "x.mp4: not a video that OpenCV",
    ),
    "empty folder": ("semantic", lambda f: ["--images", empty(f / "none")], "none: an empty folder"),
    "nothing there": ("semantic", lambda f: ["--images", f / "nowhere"], "nowhere: no such file or folder"),
    "a pattern that the shell has expanded": (
        "semantic",
        lambda f: ["--images", f / "a b.jpg", f / "c.jpg"],
        "takes one path, got 2; quote a pattern: --images '",
    ),
    "pictures of other formats alone": (
        "semantic",
        lambda f: ["--images", written(f / "q" / "x.heic", "-").parent],
        "directly in this folder, but 1 in other formats, such as x.heic; convert them to JPEG",
    ),
    "unknown categories alone": (
        "box",
        lambda f: ["--boxes", write_detections(f / "d.json", SPLIT_NAMES, "ufo")],
        "only 'ufo'; rename",
    ),
    "detections of other images": (
        "box",
        lambda f: ["--boxes", write_detections(f / "d.json", ["elsewhere"])],
        "has none of the images",
    ),
    "original size without masks": (
        "box",
        lambda f: ["--eval_size", "original"],
        "give the unpacked data set as --root",
    ),
    "masks of another data set": (
        "box",
        lambda f: ["--eval_size", "original", "--bdd100k_root", f],
        "no images of split 'val'",
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_input_is_told_in_one_line(
    case: str, sam_file: Path, npy: Path, boxed: Path, semantic: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    mode, make_flags, complaint = BAD_FLAGS[case]
    flags = [*good_flags(sam_file, npy, tmp_path), "--model_checkpoint", boxed if mode == "box" else semantic]
    assert re.search(re.escape(complaint), error_of(infer_bdd100k, *flags, *make_flags(tmp_path)))
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_another_number_of_classes(
    sam_file: Path, npy: Path, semantic: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    payload = torch.load(semantic, weights_only=True)
    payload["class_names"] = payload["class_names"][:11]
    del payload["classes"]  # as in files of earlier versions
    torch.save(payload, tmp_path / "eleven.pth")
    flags = [*good_flags(sam_file, npy, tmp_path), "--model_checkpoint", tmp_path / "eleven.pth"]
    assert "trained on 11 classes, which are not BDD100K's 19" in error_of(infer_bdd100k, *flags)
