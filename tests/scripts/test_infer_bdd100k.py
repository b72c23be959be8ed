"""infer_bdd100k.py end to end: the printed block to the letter, the figures against a slow computation, the files."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import get_worker_info

import infer_bdd100k
from segment_anything import build_sam_vit_tiny
from segment_anything.build_sam import file_digest
from tests.helpers.inputs import IMAGE_SIZE, write_split
from tests.helpers.scripts import good_flags, read_results, run_script
from utils.data.classes import BDD100K, ClassTable
from utils.data.datasets import NpyFolder
from utils.evaluate import evaluate, examples
from utils.model import checkpoint
from utils.model.segmenter import BoxSegmenter, build_model
from utils.runtime.errors import UserError

# The specification's form; the values are the run's.
BLOCK = """\
评估结果
============================================================
整体 mIoU: {miou}

每个类别的 IoU:
------------------------------------------------------------
 0. road                : {road}
 1. sidewalk            : {sidewalk}
 2. building            : {building}
 3. wall                : {wall}
 4. fence               : {fence}
 5. pole                : {pole}
 6. traffic light       : {traffic light}
 7. traffic sign        : {traffic sign}
 8. vegetation          : {vegetation}
 9. terrain             : {terrain}
10. sky                 : {sky}
11. person              : {person}
12. rider               : {rider}
13. car                 : {car}
14. truck               : {truck}
15. bus                 : {bus}
16. train               : {train}
17. motorcycle          : {motorcycle}
18. bicycle             : {bicycle}
============================================================
"""


def make_decoder(path: Path, sam_file: Path, **changes: Any) -> Path:
    """Write a checkpoint as training would: a decoder of other random weights, whose masks cover something."""
    torch.manual_seed(2)
    fields: dict[str, Any] = {"model_type": "vit_tiny", "image_size": IMAGE_SIZE, "resize_mode": "stretch"}
    model = BoxSegmenter(build_sam_vit_tiny(image_size=IMAGE_SIZE))
    info = checkpoint.ModelInfo(**{**fields, "sam_sha256": file_digest(sam_file), **changes})
    checkpoint.save_best(path, model, info, epoch=0, metrics={}, args={})
    return path


@pytest.fixture(scope="module")
def decoder(sam_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("decoder") / checkpoint.BEST, sam_file)


@pytest.fixture
def infer(sam_file: Path, npy: Path, decoder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that runs the script into `tmp_path / "out"` and returns `evaluation_results.json`."""

    def infer(*flags: object) -> dict[str, Any]:
        run_script(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), "--model_checkpoint", decoder, *flags)
        return read_results(tmp_path / "out")

    return infer


def test_prints_the_specified_block_and_writes_the_same(
    infer: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = infer()
    printed = capsys.readouterr().out
    values = {c["name"]: c["iou"] for c in results["per_class"]} | {"miou": results["miou"]}
    assert None in values.values()  # a class that the scenes lack, and
    assert sum(bool(value) for value in values.values()) > 8  # many that are there and hit
    block = BLOCK.format(**{key: "nan" if value is None else f"{value:.4f}" for key, value in values.items()})
    assert block in printed
    written = (tmp_path / "out" / "evaluation_results.txt").read_text()
    assert written.startswith(block)
    assert written in printed
    assert "oracle boxes" in written
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "confusion_matrix.png",
        "evaluation_results.json",
        "evaluation_results.txt",
        "image_scores.csv",
        "label_maps.zip",
        "report.html",
    ]


def slow_confusion(npy: Path, sam_file: Path, decoder: Path, rule: str) -> np.ndarray:
    """The confusion matrix, 19 x 20, by one decoder call for each class, merged and counted pixel by pixel."""
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE)
    checkpoint.load_decoder(model, checkpoint.load_checkpoint(decoder)["model"], decoder)
    model.eval()
    matrix = np.zeros((len(BDD100K), len(BDD100K) + 1), dtype=int)
    for path in sorted((npy / "val" / "imgs").glob("*.npy")):
        labels = np.load(npy / "val" / "gts" / path.name)
        embedding = model.encode(torch.from_numpy(np.load(path)).permute(2, 0, 1)[None])
        best = np.full(labels.shape, -np.inf if rule == "argmax" else 0)  # what a class has to beat
        winner = np.full(labels.shape, len(BDD100K))
        for class_id in sorted(set(labels.ravel().tolist()) - {255}):
            rows, columns = np.nonzero(labels == class_id)
            box = torch.tensor([[[columns.min(), rows.min(), columns.max(), rows.max()]]], dtype=torch.float32)
            with torch.no_grad():
                low_res, _ = model(embedding, box)
            logits = F.interpolate(low_res, labels.shape, mode="bilinear", align_corners=False)[0, 0].numpy()
            if rule != "threshold":
                outside = np.ones(labels.shape, dtype=bool)
                outside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
                logits[outside] = -np.inf
            winner[logits > best] = class_id
            best = np.maximum(best, logits)
        for truth, prediction in zip(labels.ravel().tolist(), winner.ravel().tolist()):
            if truth != 255:
                matrix[truth, prediction] += 1
    return matrix


@pytest.mark.parametrize("rule", ["argmax", "box_threshold", "threshold"])
@pytest.mark.slow
def test_figures_equal_a_slow_computation(
    rule: str, infer: Callable[..., dict[str, Any]], npy: Path, sam_file: Path, decoder: Path
) -> None:
    results = infer(*([] if rule == "argmax" else ["--map_rule", rule]))
    assert results["map_rule"] == rule
    matrix = np.array(results["confusion_matrix"])
    slow = slow_confusion(npy, sam_file, decoder, rule)
    assert (slow[:, -1].sum() == 0) == (rule == "argmax")
    # A batch of classes rounds differently than each alone: a pixel in a thousand may be a tie.
    difference = np.abs(matrix - slow[:, : len(BDD100K)]).sum() + np.abs(results["unclaimed"] - slow[:, -1]).sum()
    assert difference <= 2e-3 * slow.sum()

    ious = []
    for k, entry in enumerate(results["per_class"]):
        assert (entry["id"], entry["name"]) == (k, BDD100K.names[k])
        hits, truth, predicted = matrix[k, k], slow[k].sum(), matrix[:, k].sum()
        assert entry["gt_pixels"] == truth and entry["predicted_pixels"] == predicted
        assert entry["recall"] == (pytest.approx(hits / truth) if truth else None)
        assert entry["precision"] == (pytest.approx(hits / predicted) if predicted else None)
        assert entry["iou"] == (pytest.approx(hits / (truth + predicted - hits)) if truth else None)
        ious += [entry["iou"]] if truth else []
    assert results["miou"] == pytest.approx(np.mean(ious))


def test_results_say_what_was_measured(infer: Callable[..., dict[str, Any]], npy: Path, decoder: Path) -> None:
    results = infer()
    assert results["boxes"] == "oracle"
    assert results["model"] == str(decoder) and results["data"] == str(npy / "val")
    labels = np.stack([np.load(path) for path in (npy / "val" / "gts").glob("*.npy")])
    assert results["labelled_pixels"] == (labels != 255).sum()


def test_each_image_has_its_figures(infer: Callable[..., dict[str, Any]], npy: Path, tmp_path: Path) -> None:
    """The image's figures are those of an evaluation of the image alone."""
    results = infer()
    names = sorted(path.stem for path in (npy / "val" / "imgs").iterdir())
    assert [image["name"] for image in results["images"]] == names
    with open(tmp_path / "out" / "image_scores.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for name, image, line in zip(names, results["images"], lines, strict=True):
        pair = [np.load(npy / "val" / kind / f"{name}.npy") for kind in ("imgs", "gts")]
        alone = infer("--val_npy_path", write_split(tmp_path / name, {name: (pair[0], pair[1])}))
        assert (image["miou"], image["pixel_accuracy"]) == (alone["miou"], alone["pixel_accuracy"])
        ious = {c["name"]: c["iou"] for c in alone["per_class"]}
        assert image["iou"] == {name: iou for name, iou in ious.items() if iou is not None}
        assert line["name"] == name and float(line["miou"]) == pytest.approx(image["miou"], abs=1e-6)
        assert [line[name] for name in BDD100K.names] == [
            "" if iou is None else f"{iou:.6f}" for iou in (ious[name] for name in BDD100K.names)
        ]


def test_the_report_shows_the_chosen_number_of_images(infer: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    results = infer()
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<title>mIoU {results['miou']:.4f}: " in page and "upper bound" in page
    assert page.count('<figure class="card"') == 3 and page.count("data:image/png;base64,") == 9
    infer("--report_images", 2)
    assert (tmp_path / "out" / "report.html").read_text().count('<figure class="card"') == 2
    infer("--report_images", 0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"mIoU {results['miou']:.4f}" in page and "<img" not in page and "--report_images 0" in page
    assert not (tmp_path / "out" / "label_maps.zip").exists()


def test_a_report_that_cannot_be_drawn_costs_no_figures(
    infer: Callable[..., dict[str, Any]],
    sam_file: Path,
    npy: Path,
    tmp_path: Path,
    error_of: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = infer()

    def fail(*_: Any) -> None:
        raise UserError("x.npy: cannot be read")

    monkeypatch.setattr(infer_bdd100k, "report_cards", fail)
    line = error_of(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), "--model_checkpoint", before["model"])
    assert "x.npy: cannot be read" in line
    assert read_results(tmp_path / "out") == before
    assert not (tmp_path / "out" / "report.html").exists()


def output_of(*flags: object) -> Path:
    return infer_bdd100k.choose_output_dir(infer_bdd100k.get_args_parser().parse_args(list(map(str, flags))))


def test_results_go_into_the_run_whose_checkpoint_is_evaluated(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        (folder / checkpoint.BEST).touch()
    (run / "config.json").touch()
    data = ["--val_npy_path", tmp_path / "npy" / "val"]
    for path in (run, run / checkpoint.BEST):
        assert output_of(*data, "--model_checkpoint", path) == run / "eval-val"
    # Evaluations that differ do not replace each other.
    flags = ["--model_checkpoint", run / checkpoint.LATEST, "--boxes", "det.json", "--map_rule", "threshold"]
    assert output_of(*data, *flags, "--eval_size", "original") == run / "eval-val-latest-det-threshold-original"
    assert output_of(*data, "--model_checkpoint", run, "--tta") == run / "eval-val-tta"
    # The specification's default, where there is no run, and any folder that is given.
    assert output_of(*data) == output_of(*data, "--model_checkpoint", other) == Path("inference_results")
    default = ["--output_dir", "./inference_results"]
    assert output_of(*data, "--model_checkpoint", run, *default) == Path("inference_results")


def test_batches_of_three_give_the_same(infer: Callable[..., dict[str, Any]]) -> None:
    one, three = (np.array(infer("--batch_size", size)["confusion_matrix"]) for size in (1, 3))
    assert np.abs(one - three).sum() <= 2e-3 * one.sum()


def test_visualize_draws_each_image_up_to_twenty(
    infer: Callable[..., dict[str, Any]], npy: Path, tmp_path: Path
) -> None:
    infer("--visualize")
    drawn = tmp_path / "out" / "visualizations"
    names = sorted(path.stem for path in (npy / "val" / "imgs").glob("*.npy"))
    assert sorted(path.name for path in drawn.iterdir()) == [f"{name}.png" for name in names]
    picture = cv2.imread(str(drawn / f"{names[0]}.png"))
    assert picture is not None
    item = NpyFolder(npy / "val").items[0]
    scale = round(480 / item.width)  # four pictures of 16:9, though stored as squares, each as wide as text needs
    assert 2 * scale * item.width < picture.shape[1] < 2 * scale * item.width + 50
    assert 2 * scale * item.height < picture.shape[0] < 2 * scale * item.height + 250


@pytest.mark.slow
def test_a_second_evaluation_leaves_nothing_of_the_first(
    infer: Callable[..., dict[str, Any]], npy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    infer("--val_npy_path", npy / "train", "--visualize", "--save_predictions")
    (out / "visualizations" / "mine.png").touch()
    capsys.readouterr()
    infer("--visualize")
    said = capsys.readouterr().out
    names = {path.stem for path in (npy / "val" / "imgs").iterdir()}
    assert {path.stem for path in (out / "visualizations").iterdir()} == {*names, "mine"}
    assert not list((out / "predictions").iterdir())
    assert f"{out}: removed 20 files of an earlier evaluation" in said  # 6 results and 2 x 7 pictures
    assert f"{out / 'visualizations'}: 1 other files stay, such as mine.png" in said
    infer()
    assert [path.name for path in (out / "visualizations").iterdir()] == ["mine.png"]


def test_a_failure_while_drawing_costs_no_figures_and_leaves_none_of_an_earlier_evaluation(
    infer: Callable[..., dict[str, Any]],
    sam_file: Path,
    npy: Path,
    tmp_path: Path,
    error_of: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = sorted(path.stem for path in (npy / "val" / "imgs").iterdir())
    infer("--visualize")
    drawn = examples.save_comparison
    paths: list[Path] = []

    def fail(path: Path, *arrays: Any, **texts: str) -> None:
        if paths:
            raise UserError(f"{path}: cannot be written")
        paths.append(path)
        drawn(path, *arrays, **texts)  # type: ignore[arg-type]

    monkeypatch.setattr(examples, "save_comparison", fail)
    flags = [*good_flags(sam_file, npy, tmp_path), "--map_rule", "threshold", "--visualize"]
    assert "cannot be written" in error_of(infer_bdd100k, *flags)
    assert read_results(tmp_path / "out")["map_rule"] == "threshold"
    assert "threshold" in (tmp_path / "out" / "report.html").read_text()
    assert list((tmp_path / "out" / "visualizations").iterdir()) == paths
    with zipfile.ZipFile(tmp_path / "out" / "label_maps.zip") as archive:
        assert len(archive.namelist()) == len(names)


def test_what_is_refused_costs_no_earlier_result(
    infer: Callable[..., dict[str, Any]], sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    infer("--visualize")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert error_of(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), "--eval_size", "original")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_visualize_draws_images_spread_over_the_split_and_the_worst(
    infer: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, tuple[np.ndarray, np.ndarray, str]] = {}

    def save(
        path: Path,
        image: np.ndarray,
        target: np.ndarray,
        prediction: np.ndarray,
        classes: ClassTable,
        title: str,
        figures: str,
    ) -> None:
        assert title == path.stem
        drawn[title] = target, prediction, figures

    monkeypatch.setattr(examples, "save_comparison", save)
    rng = np.random.default_rng(3)
    samples = {}
    for i in range(22):
        labels = rng.integers(0, 19, (IMAGE_SIZE // 8, IMAGE_SIZE // 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        samples[f"{i:02d}"] = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8), labels
    data = write_split(tmp_path / "many", samples)
    flags = ["--val_npy_path", data, "--batch_size", 8]
    infer(*flags, "--visualize", 22)
    assert sorted(drawn) == sorted(samples)
    mious = {}
    for name, (target, prediction, figures) in drawn.items():
        assert (target == samples[name][1]).all()
        classes = np.unique(target)
        hits = [((target == c) & (prediction == c)).sum() for c in classes]
        unions = [((target == c) | (prediction == c)).sum() for c in classes]
        mious[name] = float(np.mean(np.divide(hits, unions)))
        assert figures.startswith(f"mIoU {mious[name]:.3f}, rank ")
    ranks = {name: int(figures.split()[3]) for name, (_, _, figures) in drawn.items()}
    assert sorted(ranks.values()) == list(range(1, 23))
    assert sorted(ranks, key=ranks.__getitem__) == sorted(mious, key=lambda name: (mious[name], name))

    drawn.clear()
    infer(*flags, "--visualize")
    assert len(drawn) == 20
    drawn.clear()
    infer(*flags, "--visualize", 6)
    spread = ["00", "10", "21"]
    worst = [name for name in sorted(mious, key=lambda name: (mious[name], name)) if name not in spread][:3]
    assert sorted(drawn) == sorted([*spread, *worst])


@pytest.mark.parametrize(
    ("flags", "value"),
    [("", False), ("--visualize", True), ("--visualize True", True), ("--visualize False", False), ("-visualize 1", 1)],
)
def test_visualize_is_a_switch_or_a_number(flags: str, value: bool | int) -> None:
    parsed = infer_bdd100k.get_args_parser().parse_args(flags.split()).visualize
    assert (type(parsed), parsed) == (type(value), value)


def test_sam_alone_is_evaluated_without_a_model_checkpoint(sam_file: Path, npy: Path, tmp_path: Path) -> None:
    run_script(infer_bdd100k, *good_flags(sam_file, npy, tmp_path))
    assert read_results(tmp_path / "out")["model"] == f"{sam_file}, not fine-tuned"


@pytest.mark.slow
def test_reads_what_training_wrote(
    infer: Callable[..., dict[str, Any]], train: Callable[..., Path], npy: Path, tmp_path: Path
) -> None:
    # Training's own validation must find what inference finds.
    folder = train(tmp_path / "work", "-num_epochs", 1, "-batch_size", 1, "--val_npy_path", npy / "val", "-lr", "1e-9")
    (record,) = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    results = infer("--model_checkpoint", folder / checkpoint.BEST)
    assert results["miou"] == record["val_miou"] > 0
    assert infer("--model_checkpoint", folder / checkpoint.LATEST)["miou"] == record["val_miou"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_sam(path: Path) -> Path:
    torch.manual_seed(3)
    torch.save(build_sam_vit_tiny(image_size=IMAGE_SIZE).state_dict(), path)
    return path


# Flags that are given after good ones, as a function of an empty folder, the decoder and the SAM file; and what the one
# line must say.
BAD_FLAGS: dict[str, tuple[Callable[[Path, Path, Path], list[object]], str]] = {
    "no such data": (lambda f, d, s: ["--val_npy_path", f / "none"], r"none: no such folder"),
    "no such SAM file": (lambda f, d, s: ["--sam_checkpoint", f / "none.pth"], r"none.pth: no such checkpoint"),
    "no such decoder": (lambda f, d, s: ["--model_checkpoint", f / "none.pth"], r"none.pth: no such checkpoint"),
    "SAM file as decoder": (lambda f, d, s: ["--model_checkpoint", s], r"give a SAM checkpoint as --sam_checkpoint"),
    "decoder as SAM file": (lambda f, d, s: ["--sam_checkpoint", d], r"best.pth: .*SAM"),
    "another SAM file": (
        lambda f, d, s: ["--sam_checkpoint", other_sam(f / "other.pth")],
        r"was trained with sam sha256 .*give the SAM file",
    ),
    "another model type": (lambda f, d, s: ["--model_type", "vit_b"], r"a decoder for vit_tiny, not vit_b; give"),
    "another image size": (
        lambda f, d, s: ["--model_checkpoint", make_decoder(f / "big.pth", s, image_size=256)],
        r"was trained with image size 256, not 64; preprocess the data at that --image_size",
    ),
    "another resize mode": (
        lambda f, d, s: ["--model_checkpoint", make_decoder(f / "pad.pth", s, resize_mode="pad")],
        r"was trained with resize mode pad, not stretch",
    ),
    "batch size 0": (lambda f, d, s: ["--batch_size", 0], r"at least 1, got 0"),
    "CUDA where there is none": (lambda f, d, s: ["--device", "cuda:0"], r"PyTorch finds no CUDA device"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_told_in_one_line(
    case: str,
    sam_file: Path,
    npy: Path,
    decoder: Path,
    tmp_path: Path,
    error_of: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_flags, complaint = BAD_FLAGS[case]
    flags = [*good_flags(sam_file, npy, tmp_path), "--model_checkpoint", decoder]
    assert re.search(complaint, error_of(infer_bdd100k, *flags, *make_flags(tmp_path, decoder, sam_file)))
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_truncated_decoder(
    sam_file: Path, npy: Path, decoder: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    half = tmp_path / "half.pth"
    shutil.copy(decoder, half)
    truncate(half)
    line = error_of(infer_bdd100k, *good_flags(sam_file, npy, tmp_path), "--model_checkpoint", half)
    assert f"{half}: truncated" in line


def test_a_split_without_labels(sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    folder = Path(shutil.copytree(npy / "val", tmp_path / "npy" / "val"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for item in manifest["items"]:
        item["pixels"] = []
    (folder / "manifest.json").write_text(json.dumps({**manifest, "labelled": False}))
    assert "has no labels" in error_of(infer_bdd100k, *good_flags(sam_file, tmp_path / "npy", tmp_path))


def test_data_that_goes_away_midway_leaves_no_result(
    sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(npy / "val", tmp_path / "npy" / "val")
    last = sorted((tmp_path / "npy" / "val" / "imgs").glob("*.npy"))[-1]
    checked = NpyFolder(tmp_path / "npy" / "val")
    monkeypatch.setattr(infer_bdd100k, "NpyFolder", lambda folder: checked)
    truncate(last)
    line = error_of(infer_bdd100k, *good_flags(sam_file, tmp_path / "npy", tmp_path))
    assert f"{last}: truncated" in line
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["off", "new"])
def test_a_loader_process_that_is_killed(
    cache: str, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = NpyFolder._load

    def read_or_die(self: NpyFolder, kind: str, index: int) -> np.ndarray:
        if get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, kind, index)

    monkeypatch.setattr(NpyFolder, "_load", read_or_die)
    flags = [*good_flags(sam_file, npy, tmp_path), "--num_workers", 1]
    line = error_of(infer_bdd100k, *flags, "--cache_embeddings", cache if cache == "off" else tmp_path / cache)
    assert line.startswith("error: a loader process has ended (") and "lower -num_workers" in line


@pytest.mark.parametrize("cache", ["off", "new"])
def test_shared_memory_that_is_too_small(
    cache: str, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str], little_shared_memory: None
) -> None:
    flags = [*good_flags(sam_file, npy, tmp_path), "--num_workers", 2, "--batch_size", 2]
    line = error_of(infer_bdd100k, *flags, "--cache_embeddings", cache if cache == "off" else tmp_path / cache)
    assert line.startswith("error: /dev/shm has 64 KiB free") and "--shm-size" in line and "--num_workers 0" in line


@pytest.mark.slow
def test_a_runs_folder_stands_for_its_best(infer: Callable[..., dict[str, Any]], decoder: Path) -> None:
    assert infer("--model_checkpoint", decoder.parent)["confusion_matrix"] == infer()["confusion_matrix"]


def test_a_full_gpu_is_told_in_one_line(
    sam_file: Path, npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    def run_out(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(evaluate, "predict", run_out)
    line = error_of(infer_bdd100k, *good_flags(sam_file, npy, tmp_path))
    assert "GPU's memory is full; lower --batch_size" in line
