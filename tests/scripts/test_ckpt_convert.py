"""A decoder joined with its SAM file: what the public package loads and computes, and one line for what does not fit.

`pytest tests/scripts/test_ckpt_convert.py -s` prints the relative errors.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.public import public_sam
from segment_anything import SamPredictor, build_sam_vit_b, build_sam_vit_tiny
from segment_anything.build_sam import file_digest
from tests.helpers.inputs import IMAGE_SIZE
from tests.helpers.oracles import relative_error
from tests.helpers.scripts import run_script
from utils import ckpt_convert
from utils.data.frame import ImageSize, frame_size
from utils.model.checkpoint import BEST, LATEST, ModelInfo, load_checkpoint, load_decoder, save_best
from utils.model.segmenter import BoxSegmenter, build_model

TOLERANCE = 1e-4
METADATA: dict[str, Any] = {"epoch": 0, "metrics": {}, "args": {}}


@torch.no_grad()
def disturb(module: nn.Module, seed: int) -> None:
    """Move every parameter, those that start as zeros or ones too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def check_tensors(output: Path, sam: Path, decoder: dict[str, Tensor]) -> None:
    """The output has the SAM file's keys in its order; the decoder is the trained one, the rest bit for bit SAM's."""
    joined, original = (torch.load(path, weights_only=True, mmap=True) for path in (output, sam))
    assert list(joined) == list(original)
    assert decoder.keys() == {key for key in joined if key.startswith("mask_decoder.")}
    for key, value in joined.items():
        expected = decoder.get(key, original[key])
        assert value.dtype == expected.dtype and torch.equal(value, expected), key


# --- vit_b in the public package


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for files of 375 MB, which pytest would keep for three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_the_public_package_loads_vit_b_strictly_and_gives_the_same_masks(
    folder: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """One random image embedding goes into both decoders: encoding at 1024 would take most of a minute, and the
    encoders' tensors are the same bits."""
    torch.manual_seed(0)
    model = BoxSegmenter(build_sam_vit_b())
    sam_file, best, output = folder / "sam.pth", folder / BEST, folder / "joined.pth"
    torch.save(model.sam.state_dict(), sam_file)
    embedding = torch.randn(1, 256, 64, 64)
    boxes = torch.tensor([[[100.0, 200, 500, 640], [3, 700, 1020, 1023]]])
    with torch.no_grad():
        untrained, _ = model((embedding,), boxes)
        disturb(model.mask_decoder, seed=1)
        expected, expected_ious = model((embedding,), boxes)
    save_best(best, model, ModelInfo("vit_b", 1024, "pad", file_digest(sam_file)), **METADATA)

    run_script(ckpt_convert, "--model_checkpoint", best, "--sam_checkpoint", sam_file, "--output", output)
    said = capsys.readouterr().out
    assert f"SAM checkpoint: {output}\n" in said
    assert "The public segment-anything package loads it, and so does this project's registry:\n" in said
    load = f'    sam = sam_model_registry["vit_b"](checkpoint="{output}")\n'
    assert said.endswith(f"    from segment_anything import sam_model_registry\n{load}")
    assert "image size" not in said and "stretch" not in said
    check_tensors(output, sam_file, load_checkpoint(best)["model"])

    theirs = public_sam().sam_model_registry["vit_b"](checkpoint=str(output))  # its load_state_dict is strict
    with torch.no_grad():
        sparse, dense = theirs.prompt_encoder(points=None, boxes=boxes[0], masks=None)
        masks, ious = theirs.mask_decoder(
            image_embeddings=embedding,
            image_pe=theirs.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    errors = {"masks": relative_error(masks[:, 0], expected[0]), "ious": relative_error(ious[:, 0], expected_ious[0])}
    for what, error in errors.items():
        record_property(what, error)
        print(f"vit_b {what}: relative error {error:.1e}")
        assert error < TOLERANCE
    assert relative_error(masks[:, 0], untrained[0]) > 0.1  # the comparison would see the wrong decoder


# --- vit_tiny from training to a predictor


@pytest.fixture(scope="module")
def run(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training run on `sam_file`."""
    flags = ("-num_epochs", 1, "-batch_size", 4, "--grad_acc_steps", 1, "-lr", 1e-2)
    return train(tmp_path_factory.mktemp("convert") / "work_dir", *flags)


@pytest.mark.parametrize("name", [BEST, LATEST])
@pytest.mark.slow
def test_vit_tiny_round_trip(
    run: Path, sam_file: Path, npy: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "joined.pth"
    run_script(ckpt_convert, "--model_checkpoint", run / name, "--sam_checkpoint", sam_file, "--output", output)
    said = capsys.readouterr().out
    assert "The public segment-anything package has no builder for vit_tiny; this project's registry loads it:" in said
    assert said.endswith(f'sam_model_registry["vit_tiny"](checkpoint="{output}", image_size={IMAGE_SIZE})\n')

    reference = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE)
    state = load_checkpoint(run / name)["model"]
    image = np.load(sorted(npy.glob("val/imgs/*.npy"))[0])
    box = np.array([5.0, 20, 50, 60])
    tensors = torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(box).float().view(1, 1, 4)
    with torch.no_grad():
        untrained, _ = reference(reference.encode(tensors[0]), tensors[1])
        load_decoder(reference, state, run / name)
        expected, _ = reference(reference.encode(tensors[0]), tensors[1])

    check_tensors(output, sam_file, state)
    predictor = SamPredictor(build_sam_vit_tiny(output, image_size=IMAGE_SIZE))
    predictor.set_image(image)
    _, _, masks = predictor.predict(box=box, multimask_output=False)
    assert relative_error(masks[0], expected[0, 0]) < TOLERANCE
    assert relative_error(masks[0], untrained[0, 0]) > 0.01


def test_the_tensors_of_sam_keep_their_type(run: Path, sam_file: Path, tmp_path: Path) -> None:
    half, best, output = tmp_path / "half.pth", tmp_path / BEST, tmp_path / "joined.pth"
    state = torch.load(sam_file, weights_only=True)
    torch.save({k: v if k.startswith("mask_decoder.") else v.half() for k, v in state.items()}, half)
    rewrite_info(run / BEST, best, sam_sha256=file_digest(half))
    run_script(ckpt_convert, "--model_checkpoint", best, "--sam_checkpoint", half, "--output", output)
    check_tensors(output, half, load_checkpoint(best)["model"])


# --- What is said about it

INFO = ModelInfo("vit_b", 1024, "pad", sam_sha256="ab" * 32)


def advice(info: ModelInfo, table_size: ImageSize) -> str:
    table = torch.empty(1, *(side // 16 for side in frame_size(table_size)), 768, device="meta")
    return ckpt_convert.how_to_load(Path('a "b".pth'), {"image_encoder.pos_embed": table}, info)


def test_the_path_is_a_python_string_and_the_mask_that_was_trained_is_named() -> None:
    said = advice(INFO, 1024)
    paths: list[str] = []
    exec(said.splitlines()[-1].strip(), {"sam_model_registry": {"vit_b": lambda checkpoint: paths.append(checkpoint)}})
    assert paths == ['a "b".pth']
    assert said.count("note:") == 1
    assert (
        "only mask 0, the single-mask token, was trained. Use multimask_output=False. For ONNX, export without" in said
    )


def test_a_decoder_of_another_image_size_is_noted() -> None:
    said = advice(replace(INFO, image_size=512), 1024)
    assert "note: it was trained at image size 512 and works best at it (image_size=512 in this project's" in said
    assert "The public segment-anything package loads it" in said


def test_stretched_images_are_noted() -> None:
    assert "note: it was trained on images stretched to a square" in advice(replace(INFO, resize_mode="stretch"), 1024)


def test_a_sam_file_of_another_size_is_not_promised_to_the_public_package() -> None:
    said = advice(replace(INFO, image_size=512), 512)
    assert "package has no builder for positions of 512; this project's registry loads it:" in said
    assert said.endswith(", image_size=512)")


def test_a_frame_that_is_no_square_is_given_as_python_takes_it() -> None:
    wide = replace(INFO, image_size="576x1024")
    said = advice(wide, 1024)
    assert "trained at image size 576x1024 and works best at it (image_size=(576, 1024) in this project's" in said
    assert "the public package has only 1024" in said and "The public segment-anything package loads it" in said
    assert "stretched to 576x1024, but SamPredictor pads" in advice(replace(wide, resize_mode="stretch"), 1024)
    tiny = replace(INFO, model_type="vit_tiny", image_size="352x480")
    assert advice(tiny, "352x480").endswith(", image_size=(352, 480))")
    assert "package has no builder for positions of 576x1024;" in advice(wide, "576x1024")


# --- What does not fit


def rewrite_info(source: Path, target: Path, **changes: Any) -> Path:
    payload = torch.load(source, weights_only=True)
    torch.save({**payload, "info": {**payload["info"], **changes}}, target)
    return target


@pytest.fixture
def refuse(run: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]) -> Callable[..., str]:
    """A function that converts with some of the arguments replaced, which must fail and leave every file alone."""

    def refuse(*flags: object, **paths: Path) -> str:
        paths = {"model_checkpoint": run / BEST, "sam_checkpoint": sam_file, "output": tmp_path / "out.pth"} | paths
        watched = {path for folder in (tmp_path, run, sam_file.parent) for path in folder.rglob("*")}
        before = {path: path.read_bytes() for path in watched if path.is_file()}
        line = error_of(ckpt_convert, *(part for name in paths for part in (f"--{name}", paths[name])), *flags)
        assert {path for folder in (tmp_path, run, sam_file.parent) for path in folder.rglob("*")} == watched
        assert all(path.read_bytes() == content for path, content in before.items())
        return line

    return refuse


def test_another_sam_file(refuse: Callable[..., str], run: Path, sam_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    sam = build_sam_vit_tiny(sam_file, image_size=IMAGE_SIZE)
    disturb(sam, seed=3)
    torch.save(sam.state_dict(), other)
    said = f"{run / BEST}: was trained with sam sha256 {file_digest(sam_file)}, not {file_digest(other)}; give the SAM"
    assert said in refuse(sam_checkpoint=other)


def test_semantic_mode(refuse: Callable[..., str], run: Path, tmp_path: Path) -> None:
    semantic = rewrite_info(run / BEST, tmp_path / "semantic.pth", prompt_mode="semantic")
    said = f"{semantic}: prompt mode semantic has class tokens, and plain SAM has none"
    assert said in refuse(model_checkpoint=semantic)


def test_an_unknown_model_type(refuse: Callable[..., str], run: Path, tmp_path: Path) -> None:
    unknown = rewrite_info(run / BEST, tmp_path / "unknown.pth", model_type="vit_x")
    assert f"{unknown}: model type vit_x is unknown; give" in refuse(model_checkpoint=unknown)


def test_missing_files(refuse: Callable[..., str], tmp_path: Path) -> None:
    missing = tmp_path / "missing.pth"
    assert f"{missing}: no such checkpoint (train_bdd100k.py writes" in refuse(model_checkpoint=missing)
    assert f"{missing}: no such checkpoint" in refuse(sam_checkpoint=missing)
    nowhere = tmp_path / "no folder" / "out.pth"
    assert f"{nowhere}: cannot be written (No such file or directory)" in refuse(output=nowhere)


def test_foreign_files(refuse: Callable[..., str], run: Path, sam_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.pth"
    text.write_text("not a checkpoint")
    assert f"{text}: truncated, or not a checkpoint of train_bdd100k.py" in refuse(model_checkpoint=text)
    assert f"{text}: truncated, or not a PyTorch checkpoint" in refuse(sam_checkpoint=text)
    assert f"{sam_file}: not a checkpoint of train_bdd100k.py" in refuse(model_checkpoint=sam_file)
    assert f"{run / BEST}: not a SAM state dict, but" in refuse(sam_checkpoint=run / BEST)


def test_a_decoder_of_other_keys_or_shapes(refuse: Callable[..., str], run: Path, tmp_path: Path) -> None:
    path, token = tmp_path / "odd.pth", "mask_decoder.iou_token.weight"
    payload = torch.load(run / BEST, weights_only=True)
    without = {key: value for key, value in payload["model"].items() if key != token}
    for model, named in (
        (without, token),
        ({**payload["model"], token: torch.ones(1, 64)}, token),
        ({**payload["model"], "image_encoder.pos_embed": torch.ones(1)}, "image_encoder.pos_embed"),
    ):
        torch.save({**payload, "model": model}, path)
        said = refuse(model_checkpoint=path)
        assert f"{path}: its mask decoder does not fit: 1 keys differ ({named})" in said


def test_an_existing_output_is_replaced_only_if_told_to(
    refuse: Callable[..., str], run: Path, sam_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.pth"
    output.write_text("of value")
    assert f"{output}: already exists; add --overwrite to replace it, or give another --output" in refuse()
    assert f"{tmp_path}: is a folder" in refuse("--overwrite", output=tmp_path)
    files = ("--model_checkpoint", run / BEST, "--sam_checkpoint", sam_file, "--output", output)
    run_script(ckpt_convert, *files, "--overwrite")
    check_tensors(output, sam_file, load_checkpoint(run / BEST)["model"])
    assert list(tmp_path.iterdir()) == [output]


def test_the_files_to_join_are_never_replaced(
    refuse: Callable[..., str], run: Path, sam_file: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link.pth"
    link.symlink_to(sam_file)
    for path in (run / BEST, sam_file, link):
        assert f"{path}: is one of the two input files; give another" in refuse("--overwrite", output=path)


def test_the_best_of_a_run_is_not_replaced_where_its_folder_is_given(
    run: Path, sam_file: Path, error_of: Callable[..., str]
) -> None:
    before = (run / BEST).read_bytes()
    sources = ["--model_checkpoint", run, "--sam_checkpoint", sam_file]
    assert "is one of the two input files" in error_of(ckpt_convert, *sources, "--output", run / BEST, "--overwrite")
    assert (run / BEST).read_bytes() == before


def test_what_must_be_given(error_of: Callable[..., str]) -> None:
    assert "--model_checkpoint" in error_of(ckpt_convert, "--output", "x")
    assert "--output" in error_of(ckpt_convert, "--model_checkpoint", "x")
