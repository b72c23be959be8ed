"""All scripts on non-square frames: one that pictures fill, and one with padding below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import infer_bdd100k
import pre_bdd100k
from segment_anything import SamPredictor, build_sam_vit_tiny
from tests.helpers.inputs import pictures, write_detections, write_video
from tests.helpers.oracles import relative_error
from tests.helpers.scripts import good_flags, log_of, read_results, run_script
from utils import ckpt_convert
from utils.data.boxes import to_frame
from utils.data.datasets import NpyFolder
from utils.data.frame import frame_size
from utils.data.geometry import PAD_COLOR
from utils.data.manifest import read_manifest
from utils.model import checkpoint
from utils.model.segmenter import build_model

pytestmark = pytest.mark.slow

Train = Callable[..., Path]


@dataclass(frozen=True)
class Case:
    """Preprocessed data of a frame, and a run of two epochs on it."""

    prompt_mode: str
    image_size: str
    resize_mode: str
    npy: Path
    run: Path

    @property
    def flags(self) -> list[object]:
        train = ["--prompt_mode", self.prompt_mode, "--val_npy_path", self.npy / "val", "-i", self.npy / "train"]
        views = ["--augment", "full", "--cache_views", 3, "--cache_embeddings", self.npy / "cache", "-lr", "1e-3"]
        return [*train, *views, "--lr_scheduler", "constant", "--warmup_epochs", 0, "-batch_size", 2]


# Smaller than the square of the SAM file, 64 x 64, and larger. The pictures are 144 x 256: 54 x 96 of the second.
CASES = [("box", "48x64", "stretch"), ("semantic", "64x96", "pad")]


@pytest.fixture(scope="module", params=CASES, ids=[case[0] for case in CASES])
def case(request: pytest.FixtureRequest, train: Train, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    prompt_mode, image_size, resize_mode = request.param
    root = tmp_path_factory.mktemp(prompt_mode)
    flags = ["--bdd100k_root", scenes, "--output_path", root / "npy", "--image_dtype", "uint8", "--num_workers", 1]
    assert not run_script(pre_bdd100k, *flags, "--image_size", image_size, "--resize_mode", resize_mode)
    case = Case(prompt_mode, image_size, resize_mode, root / "npy", Path())
    run = train(root / "work", *case.flags, "-num_epochs", 2)
    return Case(prompt_mode, image_size, resize_mode, root / "npy", run)


def test_what_is_written_says_the_frame(case: Case) -> None:
    assert read_manifest(case.npy / "train").image_size == case.image_size
    rows, columns = frame_size(case.image_size)
    source = NpyFolder(case.npy / "val")
    image, labels = source.read(0)
    assert image.shape == (rows, columns, 3) and labels.shape == (rows, columns)
    height, width = source.fitted_size(0)
    assert (height, width) == ((54, 96) if case.resize_mode == "pad" else (rows, columns))
    assert (image[height:] == PAD_COLOR).all() and (labels[height:] == 255).all() and (labels[:height] != 255).any()
    info = checkpoint.load_checkpoint(case.run)["info"]
    assert (info.image_size, info.resize_mode) == (case.image_size, case.resize_mode)
    entries = list((case.npy / "cache" / "train").glob("*.safetensors"))
    assert len(entries) == 7
    for entry in entries:
        views = load_file(entry).values()
        maps = [tensor for tensor in views if tensor.shape[-2:] == (rows // 16, columns // 16)]
        assert len(maps) == (3 if case.prompt_mode == "box" else 6)  # of three views, with what is left of the blocks


def test_resumed_equals_straight_bit_for_bit(case: Case, train: Train, tmp_path: Path) -> None:
    folder = train(tmp_path, *case.flags, "-num_epochs", 1)
    train(tmp_path, *case.flags, "-num_epochs", 2, "--resume", folder)
    resumed, straight = (checkpoint.load_checkpoint(run / checkpoint.LATEST)["model"] for run in (folder, case.run))
    for key, value in straight.items():
        assert torch.equal(resumed[key], value), key


def test_evaluation_in_the_frame_and_at_the_original_size(
    case: Case, sam_file: Path, scenes: Path, tmp_path: Path
) -> None:
    from bdd100k.eval.seg import evaluate_sem_seg

    flags = [*good_flags(sam_file, case.npy, tmp_path), "--model_checkpoint", case.run / checkpoint.LATEST]
    run_script(infer_bdd100k, *flags, "--visualize")
    # Not to the bit: what validation read from the cache was in float16.
    assert read_results(tmp_path / "out")["miou"] == pytest.approx(log_of(case.run)[-1]["val_miou"], abs=5e-3)
    for path in (tmp_path / "out" / "visualizations").iterdir():
        with Image.open(path) as drawn:
            assert drawn.size[0] > drawn.size[1]

    run_script(infer_bdd100k, *flags, "--eval_size", "original", "--bdd100k_root", scenes, "--save_predictions")
    masks = sorted((scenes / "labels" / "sem_seg" / "masks" / "val").iterdir())
    saved = [tmp_path / "out" / "predictions" / path.name for path in masks]
    theirs = evaluate_sem_seg(list(map(str, masks)), list(map(str, saved)), nproc=1)
    assert read_results(tmp_path / "out")["miou"] == pytest.approx(theirs.summary()["mIoU"] / 100, abs=1e-9)


def test_pictures_and_a_video(case: Case, sam_file: Path, tmp_path: Path) -> None:
    sizes = pictures(tmp_path / "in")
    clip = write_video(tmp_path / "clip.mp4")
    flags = [*good_flags(sam_file, case.npy, tmp_path), "--model_checkpoint", case.run, "--save_predictions"]
    if case.prompt_mode == "box":
        names = [*sizes, *(f"clip_{i:06d}" for i in range(5))]
        flags += ["--boxes", write_detections(tmp_path / "det.json", names)]
    assert not run_script(infer_bdd100k, *flags, "--images", tmp_path / "in", "--batch_size", 3)
    for name, (height, width) in sizes.items():
        with Image.open(tmp_path / "out" / "predictions" / f"{name}.png") as image:
            assert image.size == (width, height)
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg") as image:
            assert image.width == width and image.height >= height  # a legend may be below
    if case.prompt_mode == "semantic":  # at the original size no padding is left
        assert 255 not in np.asarray(Image.open(tmp_path / "out" / "predictions" / "tall.png"))
    assert not run_script(infer_bdd100k, *flags, "--images", clip)
    video = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert video.read()[1].shape == (48, 64, 3)


def test_data_of_another_frame_is_refused(
    case: Case, sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    flags = [*good_flags(sam_file, npy, tmp_path), "--model_checkpoint", case.run]
    line = error_of(infer_bdd100k, *flags)
    assert f"was trained with image size {case.image_size}, not 64; preprocess the data at that --image_size" in line


def test_a_joined_checkpoint_predicts_the_same(
    case: Case, sam_file: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case.prompt_mode != "box":
        pytest.skip("class tokens do not exist in plain SAM")
    output = tmp_path / "joined.pth"
    files = ["--model_checkpoint", case.run, "--sam_checkpoint", sam_file, "--output", output]
    run_script(ckpt_convert, *files)
    said = capsys.readouterr().out
    assert "note: it was trained on images stretched to 48x64, but SamPredictor pads" in said
    line = said.splitlines()[-1].strip()
    assert line.endswith(", image_size=(48, 64))")
    state = torch.load(output, weights_only=True)
    assert state["image_encoder.pos_embed"].shape == (1, 4, 4, 192)  # the SAM file's

    source = NpyFolder(case.npy / "val")
    image = source.read_image(0)
    box = to_frame(np.array([[30.0, 20, 200, 120]]), 144, 256, case.image_size, case.resize_mode)
    model = build_model("vit_tiny", sam_file, image_size=case.image_size)
    checkpoint.load_decoder(model, checkpoint.load_checkpoint(case.run)["model"], case.run)
    with torch.no_grad():
        features = model.encode(torch.from_numpy(image).permute(2, 0, 1)[None])
        expected, _ = model(features, torch.from_numpy(box)[None])
    predictor = SamPredictor(build_sam_vit_tiny(output, image_size=(48, 64)))  # as printed
    predictor.set_image(image)
    _, _, masks = predictor.predict(box=box[0], multimask_output=False)
    assert relative_error(masks[0], expected[0, 0]) < 1e-4
