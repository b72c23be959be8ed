"""Other classes than BDD100K's, end to end: described data, --classes, --match_classes and --init_decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer_bdd100k
import pre_bdd100k
import train_bdd100k
from segment_anything import build_sam_vit_tiny
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.inputs import IMAGE_SIZE
from tests.helpers.scripts import good_flags, log_of, read_results, run_script, training_flags
from utils.data.classes import BDD100K
from utils.data.datasets import NpyFolder
from utils.export import __main__ as export
from utils.model import checkpoint
from utils.model.segmenter import SemanticSegmenter

pytestmark = pytest.mark.slow

Train = Callable[..., Path]
NAMES = ("road", "小汽车", "sky")
SOURCES = ("road", "car", "sky")  # the same classes in BDD100K's table
DESCRIPTION = """
name: three
classes:
  - {id: 0, name: road, color: [10, 20, 30]}
  - {id: 1, name: 小汽车, color: [200, 0, 0], aliases: [car]}
  - {id: 2, name: sky, color: [0, 0, 200]}
labels: {kind: colors, unlisted: ignore}
layout: folders
"""


@pytest.fixture(scope="module")
def folders(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes with palette masks of three classes, in the layout `folders`, and their description."""
    root = tmp_path_factory.mktemp("folders")
    palette = np.zeros((256, 3), np.uint8)
    ids = [BDD100K.id_of(name) for name in SOURCES]
    palette[ids] = (10, 20, 30), (200, 0, 0), (0, 0, 200)
    for split in ("train", "val"):
        (root / "masks" / split).mkdir(parents=True)
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / split).symlink_to(scenes / "images" / "10k" / split)
        for path in (scenes / "labels" / "sem_seg" / "masks" / split).iterdir():
            labels = np.array(Image.open(path))
            mask = Image.fromarray(np.where(np.isin(labels, ids), labels, 255).astype(np.uint8), "L")
            mask.putpalette(palette.ravel().tolist())
            assert mask.mode == "P"
            mask.save(root / "masks" / split / path.name)
    (root / "three.yaml").write_text(DESCRIPTION)
    return root


@pytest.fixture(scope="module")
def three(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folders`, preprocessed."""
    output = tmp_path_factory.mktemp("three")
    flags = ["--dataset", folders / "three.yaml", "--root", folders, "--output_path", output]
    flags += ["--image_size", IMAGE_SIZE]
    assert not run_script(pre_bdd100k, *flags, "--image_dtype", "uint8", "--num_workers", 1)
    return output


# The labelId of each trainId of Cityscapes, and some labels that are not evaluated; 255 is -1 as a byte.
LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33], np.uint8)
VOID = [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255]


@pytest.fixture(scope="module")
def cityscapes(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The scenes as Cityscapes has them, a tenth of the pixels void: with `labelIds`, and with `labelTrainIds`."""
    rng = np.random.default_rng(0)
    roots = {kind: tmp_path_factory.mktemp(kind) for kind in ("labelIds", "labelTrainIds")}
    train_ids = np.full(256, 255, np.uint8)
    train_ids[LABEL_IDS] = np.arange(19)
    for split in ("train", "val"):
        for i, picture in enumerate(sorted((scenes / "images" / "10k" / split).iterdir())):
            labels = np.array(Image.open(scenes / "labels" / "sem_seg" / "masks" / split / f"{picture.stem}.png"))
            ids = np.append(LABEL_IDS, np.zeros(237, np.uint8))[labels]
            ids = np.where(rng.random(ids.shape) < 0.1, rng.choice(VOID, ids.shape), ids).astype(np.uint8)
            city = ("aachen", "bremen")[i % 2]
            for kind, mask in (("labelIds", ids), ("labelTrainIds", train_ids[ids])):
                image_dir, mask_dir = (roots[kind] / name / split / city for name in ("leftImg8bit", "gtFine"))
                image_dir.mkdir(parents=True, exist_ok=True)
                mask_dir.mkdir(parents=True, exist_ok=True)
                Image.open(picture).save(image_dir / f"{city}_{i:06}_000019_leftImg8bit.png")
                Image.fromarray(mask).save(mask_dir / f"{city}_{i:06}_000019_gtFine_{kind}.png")
    return roots


def test_cityscapes_by_both_kinds_of_ids(
    cityscapes: dict[str, Path], train: Train, sam_file: Path, tmp_path: Path
) -> None:
    """The same arrays, and the IoU that Cityscapes' own formula gives for the saved predictions."""
    for kind, root in cityscapes.items():
        flags = ["--dataset", "cityscapes", "--root", root, "--output_path", tmp_path / kind, "--num_workers", 1]
        assert not run_script(pre_bdd100k, *flags, "--image_size", IMAGE_SIZE)
    by_ids, by_train_ids = (
        {path.relative_to(tmp_path / kind): path.read_bytes() for path in (tmp_path / kind).rglob("*.npy")}
        for kind in cityscapes
    )
    assert by_ids == by_train_ids and len(by_ids) > 4
    for split in ("train", "val"):
        ours, theirs = (json.loads((tmp_path / kind / split / "manifest.json").read_text()) for kind in cityscapes)
        assert ours.pop("sources") != theirs.pop("sources")  # the files' paths
        assert ours == theirs

    run = train(tmp_path / "runs", "--prompt_mode", "semantic", "-num_epochs", 1, "-lr", "1e-3")
    flags = [*good_flags(sam_file, tmp_path / "labelIds", tmp_path), "--model_checkpoint", run, "--save_predictions"]
    run_script(infer_bdd100k, *flags, "--eval_size", "original", "--root", cityscapes["labelIds"])
    found = {c["name"]: c["iou"] for c in read_results(tmp_path / "out")["per_class"]}
    predicted, target = [], []
    for path in (tmp_path / "out" / "predictions").glob("*.png"):
        predicted.append(LABEL_IDS[np.array(Image.open(path))].ravel())
        (mask,) = (cityscapes["labelIds"] / "gtFine" / "val").rglob(f"{path.stem}_gtFine_labelIds.png")
        target.append(np.array(Image.open(mask)).ravel())
    p, t = np.concatenate(predicted), np.concatenate(target)
    assert len(np.unique(p)) > 1
    assert len(predicted) == 3 and 0 < np.isin(t, LABEL_IDS).sum() < t.size
    for label, name in zip(LABEL_IDS, BDD100K.names):
        hits = np.sum((p == label) & (t == label))
        false_positives = np.sum((p == label) & (t != label) & np.isin(t, LABEL_IDS))  # not where it is void
        misses = np.sum((p != label) & (t == label))
        if misses + hits:
            assert found[name] == pytest.approx(hits / (hits + misses + false_positives), abs=1e-12)
        else:
            assert found[name] is None


def train_three(three: Path, sam_file: Path, work_dir: Path, *flags: object) -> Path:
    run_script(train_bdd100k, *training_flags(three / "train", sam_file, work_dir), *flags)
    (folder,) = work_dir.iterdir()
    return folder


@pytest.mark.parametrize("prompt_mode", ["box", "semantic"])
def test_described_classes_and_selected_ones_train_alike(
    prompt_mode: str,
    three: Path,
    npy: Path,
    train: Train,
    sam_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same three classes, once by a description and once by --classes, give the same decoder and figures."""
    # Other tests may have left a cache beside `npy`, and float16 features would differ.
    flags: list[object] = ["--cache_embeddings", "off", "--prompt_mode", prompt_mode, "-num_epochs", 1, "-lr", "1e-3"]
    described = train_three(three, sam_file, tmp_path / "a", *flags, "--val_npy_path", three / "val")
    selected = train(tmp_path / "b", *flags, "--val_npy_path", npy / "val", "--classes", *SOURCES)
    ours, theirs = (checkpoint.load_checkpoint(run) for run in (described, selected))
    assert ours["classes"].names == NAMES and theirs["classes"].names == SOURCES
    for key, value in ours["model"].items():
        assert torch.equal(value, theirs["model"][key]), key
    assert log_of(described)[-1]["val_miou"] == log_of(selected)[-1]["val_miou"]

    capsys.readouterr()
    for run, data, name in ((described, three, "a"), (selected, npy, "b")):
        flags = [
            *good_flags(sam_file, data, tmp_path),
            "--model_checkpoint",
            run,
            "--output_dir",
            tmp_path / "out" / name,
            "--cache_embeddings",
            "off",
        ]
        assert not run_script(infer_bdd100k, *flags)
    printed = capsys.readouterr().out
    assert " 1. 小汽车" in printed and " 1. car " in printed and "19." not in printed
    results = [read_results(tmp_path / "out" / name) for name in "ab"]
    assert results[0]["miou"] == results[1]["miou"] == log_of(described)[-1]["val_miou"]
    assert [c["name"] for c in results[0]["per_class"]] == list(NAMES)
    page = (tmp_path / "out" / "a" / "report.html").read_text()
    assert "小汽车" in page and "sidewalk" not in page

    # Own pictures need the checkpoint alone (and, in box mode, boxes).
    if prompt_mode == "semantic":
        picture = next((three / "val" / "imgs").glob("*.npy"))
        Image.fromarray(np.load(picture)).save(tmp_path / "street.png")
        flags = ["--images", tmp_path / "street.png", "--save_predictions", "--classes", "小汽车"]
        more = ["--model_checkpoint", described, "--sam_checkpoint", sam_file, "--model_type", "vit_tiny"]
        assert not run_script(infer_bdd100k, *flags, *more, "--output_dir", tmp_path / "own", "--device", "cpu")
        assert np.unique(np.array(Image.open(tmp_path / "own" / "predictions" / "street.png"))).max() <= 2


def test_the_others_as_one_class(train: Train, npy: Path, sam_file: Path, tmp_path: Path) -> None:
    flags = ["--prompt_mode", "semantic", "-num_epochs", 1, "--classes", "road,car", "--other_classes", "other"]
    run = train(tmp_path / "runs", *flags, "--val_npy_path", npy / "val")
    run_script(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), "--model_checkpoint", run)
    results = read_results(tmp_path / "out")
    pixels = {c["name"]: c["gt_pixels"] for c in results["per_class"]}
    counts = NpyFolder(npy / "val").class_pixels()
    assert pixels == {"road": counts[0], "car": counts[13], "other": counts.sum() - counts[0] - counts[13]}
    assert results["miou"] == log_of(run)[-1]["val_miou"]

    # An exported file selects the same classes of the data.
    output = tmp_path / "model.safetensors"
    given = ["--model_checkpoint", run, "--sam_checkpoint", sam_file, "--format", "safetensors", "--output", output]
    assert not run_script(export, *given)
    run_script(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), "--model_checkpoint", output)
    assert read_results(tmp_path / "out")["confusion_matrix"] == results["confusion_matrix"]


def test_other_classes_without_classes_are_refused(
    npy: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    flags = training_flags(npy / "train", sam_file, tmp_path / "x")
    assert "give --classes" in error_of(train_bdd100k, *flags, "--other_classes", "other")
    assert not (tmp_path / "x").exists()


def test_other_data_is_refused_or_scored_on_the_classes_in_common(
    three: Path, npy: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    run = train_three(three, sam_file, tmp_path / "runs", "--prompt_mode", "semantic", "-num_epochs", 1)
    flags = [*good_flags(sam_file, npy, tmp_path), "--model_checkpoint", run, "--cache_embeddings", "off"]
    said = error_of(infer_bdd100k, *flags)
    assert "val: has 19 classes (road, sidewalk, " in said and "the model has 3 (road, 小汽车, sky);" in said
    assert "--match_classes" in said and not (tmp_path / "out").exists()
    assert not run_script(infer_bdd100k, *flags, "--match_classes")
    matched = read_results(tmp_path / "out")
    note = "classes in common: road, 小汽车 (car), sky; pixels of all others are ignored"
    assert matched["note"] == note and note in (tmp_path / "out" / "evaluation_results.txt").read_text()
    assert note in (tmp_path / "out" / "report.html").read_text()
    run_script(infer_bdd100k, *flags, "--val_npy_path", three / "val")
    assert matched["confusion_matrix"] == read_results(tmp_path / "out")["confusion_matrix"]


@pytest.mark.parametrize(
    ("prompt_mode", "eval_size"), [("box", "frame"), ("box", "original"), ("semantic", "original")]
)
def test_the_classes_in_common_are_scored_and_pixels_of_all_others_ignored(
    prompt_mode: str, eval_size: str, three: Path, folders: Path, sam_file: Path, tmp_path: Path
) -> None:
    best = write_checkpoint(tmp_path / "best.pth", sam_file, prompt_mode)
    flags = [*good_flags(sam_file, three, tmp_path), "--model_checkpoint", best, "--save_predictions"]
    flags += ["--eval_size", eval_size, "--root", folders] if eval_size == "original" else []
    assert not run_script(infer_bdd100k, *flags, "--match_classes", "--cache_embeddings", "off")
    found = {c["name"]: c for c in read_results(tmp_path / "out")["per_class"]}
    table = NpyFolder(three / "val")
    ids = [BDD100K.id_of(name) for name in SOURCES]
    if eval_size == "frame":
        alone = write_checkpoint(tmp_path / "best.pth", sam_file, "box", classes=table.classes)  # of the same weights
        assert not run_script(infer_bdd100k, *flags, "--model_checkpoint", alone, "--cache_embeddings", "off")
        expected = [c["iou"] for c in read_results(tmp_path / "out")["per_class"]]
    else:
        hits, misses, wrong = np.zeros((3, 3), np.int64)
        for item in table.items:
            (mask,) = (folders / "masks" / "val").glob(f"{item.name}.png")
            target = np.array(Image.open(mask))
            predicted = np.array(Image.open(tmp_path / "out" / "predictions" / f"{item.name}.png"))
            for i, label in enumerate(ids):
                is_class = target == label
                hits[i] += np.sum((predicted == label) & is_class)
                misses[i] += np.sum((predicted != label) & is_class)
                wrong[i] += np.sum((predicted == label) & ~is_class & (target != 255))
        expected = (hits / (hits + misses + wrong)).tolist()
    assert [found[name]["iou"] for name in SOURCES] == pytest.approx(expected, abs=1e-12)
    assert all(c["gt_pixels"] == 0 for name, c in found.items() if name not in SOURCES)


def test_a_run_goes_on_with_its_classes_alone(
    train: Train, npy: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    flags = ["--prompt_mode", "semantic", "--lr_scheduler", "constant", "--warmup_epochs", 0, "-num_epochs"]
    run = train(tmp_path, *flags, 1, "--classes", "road", "car")
    resume = ["--resume", run, "-num_epochs", 2]
    said = error_of(train_bdd100k, *resume, "--classes", "road", "sky")
    assert "was trained on the classes road, car, not on road, sky" in said
    said = error_of(train_bdd100k, *resume, "--init_decoder", run)
    assert f"--init_decoder is {run}, but the run has None" in said
    run_script(train_bdd100k, *resume)
    assert len(log_of(run)) == 2
    assert checkpoint.load_checkpoint(run / checkpoint.LATEST)["classes"].names == ("road", "car")
    assert "no class 'lorry'" in error_of(
        train_bdd100k, *training_flags(npy / "train", sam_file, tmp_path / "x"), "--classes", "lorry"
    )


def test_init_decoder_copies_classes_by_name(
    three: Path, train: Train, npy: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    start = checkpoint.load_checkpoint(
        train(tmp_path / "a", "--prompt_mode", "semantic", "-num_epochs", 1, "-lr", "1e-3")
    )
    source = next((tmp_path / "a").iterdir())
    tiny = ["--prompt_mode", "semantic", "-num_epochs", 1, "-lr", "1e-30", "-weight_decay", 0]
    run = train_three(three, sam_file, tmp_path / "b", *tiny, "--init_decoder", source)
    state = checkpoint.load_checkpoint(run)["model"]
    ids = [BDD100K.id_of(name) for name in SOURCES]
    for key, value in start["model"].items():
        expected = value[ids] if len(value) == 19 and len(state[key]) == 3 else value
        assert torch.allclose(state[key], expected, atol=1e-6), key
    output = tmp_path / "model.safetensors"
    given = ["--model_checkpoint", source, "--sam_checkpoint", sam_file, "--format", "safetensors", "--output", output]
    assert not run_script(export, *given)
    payload = torch.load(source / checkpoint.BEST, weights_only=True)
    del payload["classes"]  # as in files of earlier versions, which are of BDD100K's classes
    torch.save(payload, tmp_path / "plain.pth")
    starts = {"latest": source / checkpoint.LATEST, "exported": output, "plain": tmp_path / "plain.pth"}
    for name, start_file in starts.items():
        other = train_three(three, sam_file, tmp_path / name, *tiny, "--init_decoder", start_file)
        for key, value in checkpoint.load_checkpoint(other)["model"].items():
            assert torch.equal(value, state[key]), key

    flags = training_flags(three / "train", sam_file, tmp_path / "c")
    said = error_of(train_bdd100k, *flags, "--init_decoder", source)
    assert "was trained with prompt mode semantic, not box" in said
    earlier = SemanticSegmenter(build_sam_vit_tiny(sam_file, image_size=IMAGE_SIZE), pixel_channels=0).mask_decoder
    payload = torch.load(source / checkpoint.BEST, weights_only=True)
    payload["model"] = {f"mask_decoder.{key}": value for key, value in earlier.state_dict().items()}
    torch.save(payload, tmp_path / "older.pth")
    said = error_of(train_bdd100k, *flags, "--prompt_mode", "semantic", "--init_decoder", tmp_path / "older.pth")
    assert "older.pth: a decoder of an earlier version, without the detail path" in said
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module", params=[1, 150])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """One class or 150, named in Chinese, and pictures of them, preprocessed as the split "train"."""
    count, root = request.param, tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(count)
    colors = rng.choice(1 << 24, count, replace=False).tolist()
    rows = [
        f"  - {{id: {i}, name: 类别{i}, color: [{color >> 16}, {color >> 8 & 255}, {color & 255}]}}"
        for i, color in enumerate(colors)
    ]
    text = "\n".join(["name: many", "classes:", *rows, "labels: {kind: train_ids}", "layout: folders"])
    (root / "many.yaml").write_text(text, encoding="utf-8")
    for kind in ("images", "masks"):
        (root / kind / "train").mkdir(parents=True)
    for name in "ab":
        labels = rng.integers(count, size=(16, 24), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        labels[:4] = 255
        Image.fromarray(labels).save(root / "masks" / "train" / f"{name}.png")
        picture = rng.integers(256, size=(64, 96, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / "images" / "train" / f"{name}.png")
    flags = ["--dataset", root / "many.yaml", "--root", root, "--output_path", root / "npy", "--splits", "train"]
    assert not run_script(pre_bdd100k, *flags, "--image_size", IMAGE_SIZE, "--num_workers", 1)
    return count, root / "npy"


@pytest.mark.parametrize("prompt_mode", ["box", "semantic"])
def test_one_class_and_many(prompt_mode: str, many: tuple[int, Path], sam_file: Path, tmp_path: Path) -> None:
    count, data = many
    flags = ["--prompt_mode", prompt_mode, "-num_epochs", 1, "-batch_size", 2]
    run = train_three(data, sam_file, tmp_path / "runs", *flags)
    flags = [*good_flags(sam_file, data, tmp_path), "--val_npy_path", data / "train", "--model_checkpoint", run]
    run_script(infer_bdd100k, *flags)
    results = read_results(tmp_path / "out")
    assert [c["name"] for c in results["per_class"]] == [f"类别{i}" for i in range(count)]
    assert results["labelled_pixels"] == NpyFolder(data / "train").class_pixels().sum()
    assert sum(map(sum, results["confusion_matrix"])) + sum(results["unclaimed"]) == results["labelled_pixels"]
    if count == 1 and prompt_mode == "semantic":
        assert results["miou"] == 1
