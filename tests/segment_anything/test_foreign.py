"""segment_anything.utils.foreign: files of other programs are read where they are a SAM, else named."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import infer_bdd100k
import train_bdd100k
from segment_anything import CheckpointError, build_sam_vit_tiny
from segment_anything.build_sam import CONFIGS, file_digest, read_state_dict
from tests.helpers.inputs import IMAGE_SIZE
from tests.helpers.oracles import Payload, torch_archive
from utils import ckpt_convert
from utils.model.checkpoint import ModelInfo, load_checkpoint, save_best, save_latest
from utils.model.segmenter import build_model
from utils.runtime.errors import UserError

DEPTH = CONFIGS["vit_tiny"].depth
# Names of Hugging Face's SamModel, as its 5.24 saves a vit_b, and SAM's; {i} is a block, {w} weight and bias.
HUGGING_FACE = {
    "shared_image_embedding.positional_embedding": "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "vision_encoder.pos_embed": "image_encoder.pos_embed",
    "vision_encoder.patch_embed.projection.{w}": "image_encoder.patch_embed.proj.{w}",
    "vision_encoder.layers.{i}.layer_norm1.{w}": "image_encoder.blocks.{i}.norm1.{w}",
    "vision_encoder.layers.{i}.layer_norm2.{w}": "image_encoder.blocks.{i}.norm2.{w}",
    "vision_encoder.layers.{i}.attn.rel_pos_h": "image_encoder.blocks.{i}.attn.rel_pos_h",
    "vision_encoder.layers.{i}.attn.rel_pos_w": "image_encoder.blocks.{i}.attn.rel_pos_w",
    "vision_encoder.layers.{i}.attn.qkv.{w}": "image_encoder.blocks.{i}.attn.qkv.{w}",
    "vision_encoder.layers.{i}.attn.proj.{w}": "image_encoder.blocks.{i}.attn.proj.{w}",
    "vision_encoder.layers.{i}.mlp.lin1.{w}": "image_encoder.blocks.{i}.mlp.lin1.{w}",
    "vision_encoder.layers.{i}.mlp.lin2.{w}": "image_encoder.blocks.{i}.mlp.lin2.{w}",
    "vision_encoder.neck.conv1.weight": "image_encoder.neck.0.weight",
    "vision_encoder.neck.layer_norm1.{w}": "image_encoder.neck.1.{w}",
    "vision_encoder.neck.conv2.weight": "image_encoder.neck.2.weight",
    "vision_encoder.neck.layer_norm2.{w}": "image_encoder.neck.3.{w}",
    "prompt_encoder.mask_embed.conv1.{w}": "prompt_encoder.mask_downscaling.0.{w}",
    "prompt_encoder.mask_embed.layer_norm1.{w}": "prompt_encoder.mask_downscaling.1.{w}",
    "prompt_encoder.mask_embed.conv2.{w}": "prompt_encoder.mask_downscaling.3.{w}",
    "prompt_encoder.mask_embed.layer_norm2.{w}": "prompt_encoder.mask_downscaling.4.{w}",
    "prompt_encoder.mask_embed.conv3.{w}": "prompt_encoder.mask_downscaling.6.{w}",
    **{f"prompt_encoder.point_embed.{k}.weight": f"prompt_encoder.point_embeddings.{k}.weight" for k in range(4)},
    "mask_decoder.transformer.layer_norm_final_attn.{w}": "mask_decoder.transformer.norm_final_attn.{w}",
    **{
        f"mask_decoder.transformer.layers.{b}.layer_norm{n}.{{w}}": f"mask_decoder.transformer.layers.{b}.norm{n}.{{w}}"
        for b in range(2)
        for n in range(1, 5)
    },
    "mask_decoder.upscale_conv1.{w}": "mask_decoder.output_upscaling.0.{w}",
    "mask_decoder.upscale_layer_norm.{w}": "mask_decoder.output_upscaling.1.{w}",
    "mask_decoder.upscale_conv2.{w}": "mask_decoder.output_upscaling.3.{w}",
    **{
        f"mask_decoder.{mlp}.{theirs}.{{w}}": f"mask_decoder.{mlp}.layers.{ours}.{{w}}"
        for mlp in ("iou_prediction_head", *(f"output_hypernetworks_mlps.{k}" for k in range(4)))
        for ours, theirs in enumerate(("proj_in", "layers.0", "proj_out"))
    },
}


@pytest.fixture(scope="module")
def sam() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = build_sam_vit_tiny(image_size=IMAGE_SIZE)
    return {key: torch.rand_like(value) for key, value in model.state_dict().items()}


def save(payload: Any, path: Path) -> Path:
    torch.save(payload, path)
    return path


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def hugging_face(sam: dict[str, Tensor]) -> dict[str, Tensor]:
    expanded = {
        theirs.format(i=i, w=w): ours.format(i=i, w=w)
        for theirs, ours in HUGGING_FACE.items()
        for i in range(DEPTH)
        for w in ("weight", "bias")
    }
    assert len(set(expanded.values())) == len(expanded)
    theirs = {ours: name for name, ours in expanded.items()}
    return {theirs.get(key, key): value for key, value in sam.items()}  # what is left has the same name in both


# --- Read


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", ""])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", None])
def test_what_trainers_put_around_a_sam_is_left_out(
    tmp_path: Path, sam: dict[str, Tensor], prefix: str, wrapper: str | None
) -> None:
    state = prefixed(sam, prefix)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    payload = {wrapper: state, "optimizer": optimizer, "epoch": 3} if wrapper else state  # MedSAM's has these
    assert same(read_state_dict(save(payload, tmp_path / "a.pth"), "vit_tiny"), sam)


@pytest.mark.parametrize("names", ["SAM", "Hugging Face"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_and_hugging_faces_names(tmp_path: Path, sam: dict[str, Tensor], names: str, suffix: str) -> None:
    state, path = sam if names == "SAM" else hugging_face(sam), tmp_path / f"model{suffix}"
    assert (state.keys() == sam.keys()) == (names == "SAM")
    if suffix == ".bin":  # where the one tensor has both its names
        tied = state.get("shared_image_embedding.positional_embedding")
        extra = {} if tied is None else {"prompt_encoder.shared_embedding.positional_embedding": tied}
        save({**state, **extra}, path)
    else:
        save_file(state, path, {"format": "pt"})
    assert same(read_state_dict(path, "vit_tiny"), sam)
    build_sam_vit_tiny(path, image_size=IMAGE_SIZE)
    if suffix == ".safetensors":
        with pytest.raises(CheckpointError, match=rf"{tmp_path}: a folder; give the file {path}"):
            read_state_dict(tmp_path, "vit_tiny")


def test_damaged_safetensors(tmp_path: Path, sam: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(sam, path)
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:300], whole[:8] + b"{" + bytes(len(whole) - 9), whole[:9]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated, or not a PyTorch checkpoint"):
            read_state_dict(path, "vit_tiny")


# --- Named

ONE = torch.zeros(1)
KINDS: dict[str, tuple[Any, str]] = {
    "SAM-HQ": ({"image_encoder.blocks.0.norm1.weight": ONE, "mask_decoder.hf_token.weight": ONE}, "of SAM-HQ, which"),
    "SAM-HQ by Hugging Face": (
        {"vision_encoder.layers.0.layer_norm1.weight": ONE, "mask_decoder.hq_token.weight": ONE},
        "of SAM-HQ, which",
    ),
    "MobileSAM": (
        {"image_encoder.patch_embed.seq.0.c.weight": ONE, "mask_decoder.iou_token.weight": ONE},
        "of MobileSAM, or of",
    ),
    "SAM 2": ({"model": {"image_encoder.trunk.pos_embed": ONE, "maskmem_tpos_enc": ONE}}, "of SAM 2, which is not"),
    "SAM 2 by Hugging Face": ({"vision_encoder.backbone.pos_embed": ONE}, "of SAM 2, which is not"),
    "SAM 3": ({"detector.backbone.vision_backbone.trunk.pos_embed": ONE}, "of SAM 3, which is not"),
    "Lightning": (
        {
            "state_dict": {
                "model.image_encoder.blocks.0.norm1.weight": ONE,
                "model.mask_decoder.iou_token.weight": ONE,
            },
            "pytorch-lightning_version": "2.4.0",
        },
        r"of PyTorch Lightning: save the SAM in it by itself, with torch\.save",
    ),
    "LoRA": ({"base_model.model.image_encoder.blocks.0.attn.qkv.lora_A.weight": ONE}, "a LoRA adapter of PEFT: merge"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loadable", [True, False])
def test_other_models_are_named(tmp_path: Path, kind: str, loadable: bool) -> None:
    payload, said = KINDS[kind]
    path = save(payload if loadable else {**payload, "callbacks": Payload(tmp_path / "made")}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a\.pth: .*{said}"):
        read_state_dict(path, "vit_b")
    with pytest.raises(UserError, match=rf"a\.pth: not a checkpoint of train_bdd100k\.py, but .*{said}"):
        load_checkpoint(path)
    assert not (tmp_path / "made").exists()


def test_a_yolo_is_named_though_it_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "FastSAM.pt").write_bytes(torch_archive(b"cultralytics.nn.tasks\nSegmentationModel\n)R"))
    with pytest.raises(CheckpointError, match=r"FastSAM\.pt: a checkpoint of Ultralytics \(FastSAM"):
        read_state_dict(tmp_path / "FastSAM.pt", "vit_b")


# --- Given to the wrong flag


@pytest.fixture(scope="module")
def ours(sam_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("run")
    info = ModelInfo("vit_tiny", IMAGE_SIZE, "stretch", file_digest(sam_file))
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE)
    save_best(folder / "best.pth", model, info, epoch=0, metrics={}, args={})
    save_latest(folder / "latest.pth", model, info, epoch=0, metrics={}, args={}, run_state={}, keep=0)
    return {name: folder / f"{name}.pth" for name in ("best", "latest")}


@pytest.mark.parametrize("which", ["best", "latest"])
def test_ours_as_a_sam_file(
    which: str, ours: dict[str, Path], npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    path = ours[which]
    said = f"{path}: not a SAM state dict, but a fine-tuned decoder of train_bdd100k.py; "
    model = ["--model_type", "vit_tiny", "--device", "cpu"]
    infer = ["--val_npy_path", npy / "val", *model, "--output_dir", tmp_path / "out"]
    infer_said = said + "give it as --model_checkpoint"
    assert infer_said + ", and the SAM file it was trained on as --sam_checkpoint" in error_of(
        infer_bdd100k, *infer, "--sam_checkpoint", path
    )
    train = ["-i", npy / "train", *model, "-work_dir", tmp_path / "work"]
    train_said = "-checkpoint takes the SAM file it was trained on. To resume its run, give the run's folder, "
    assert said + train_said + "which holds medsam_model_latest.pth, as --resume" in error_of(
        train_bdd100k, *train, "-checkpoint", path
    )
    assert infer_said in error_of(
        ckpt_convert, "--model_checkpoint", path, "--sam_checkpoint", path, "--output", tmp_path / "o.pth"
    )


@pytest.mark.parametrize("form", ["plain", "legacy", "safetensors", "MedSAM"])
def test_a_sam_file_as_ours(
    form: str, sam: dict[str, Tensor], sam_file: Path, npy: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    path = tmp_path / "sam.pth"
    if form == "safetensors":
        save_file(sam, path)
    else:
        payload = {"model": prefixed(sam, "module."), "epoch": 3} if form == "MedSAM" else sam
        torch.save(payload, path, _use_new_zipfile_serialization=form != "legacy")
    model = ["--model_type", "vit_tiny", "--device", "cpu"]
    train = ["-i", npy / "train", *model, "-work_dir", tmp_path / "work", "-checkpoint", sam_file]
    said = f"{path}: not a checkpoint of train_bdd100k.py (give a SAM checkpoint as "
    line = error_of(train_bdd100k, *train, "--resume", path)
    assert said + "-checkpoint and a fine-tuned one as --resume); it is a SAM checkpoint" in line
    assert "--sam_checkpoint" not in line and "--model_checkpoint" not in line  # which train does not have
    infer = ["--val_npy_path", npy / "val", *model, "--output_dir", tmp_path / "out", "--sam_checkpoint", sam_file]
    assert said + "--sam_checkpoint and a fine-tuned one as --model_checkpoint); it is" in error_of(
        infer_bdd100k, *infer, "--model_checkpoint", path
    )


# --- The system's errors


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ELOOP])
@pytest.mark.parametrize("call", ["os.stat", "builtins.open"])
def test_the_systems_errors_are_told_as_such(
    tmp_path: Path,
    sam: dict[str, Tensor],
    ours: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    call: str,
) -> None:
    sam_path = save(sam, tmp_path / "sam.pth")
    paths: dict[Callable[..., Any], Path] = {read_state_dict: sam_path, load_checkpoint: ours["best"]}

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "as the system says")

    for read, path in paths.items():
        arguments: list[Any] = [path, "vit_tiny"] if read is read_state_dict else [path]
        with monkeypatch.context() as patch, pytest.raises((CheckpointError, UserError)) as error:
            patch.setattr(call, refuse)
            read(*arguments)
        assert str(error.value) == f"{path}: cannot be read (as the system says)"


def test_an_error_inside_a_file_is_the_systems(
    tmp_path: Path, sam: dict[str, Tensor], ours: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unpickler meets it as a file that ends early."""
    sam_path = save(sam, tmp_path / "sam.pth")
    paths: dict[Callable[..., Any], Path] = {read_state_dict: sam_path, load_checkpoint: ours["best"]}

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamReader failed")

    def stale(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("torch.load", fail)
    monkeypatch.setattr("segment_anything.utils.plain_load.require_readable", stale)
    for read, path in paths.items():
        arguments: list[Any] = [path, "vit_tiny"] if read is read_state_dict else [path]
        with pytest.raises((CheckpointError, UserError), match=rf"{path}: cannot be read \(Input/output error\)"):
            read(*arguments)
