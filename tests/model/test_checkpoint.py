"""Checkpoints: small, whole, read back as they were, and one clear line for every file that is something else."""

from __future__ import annotations

import io
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from segment_anything import build_sam_vit_b, build_sam_vit_tiny
from tests.helpers.inputs import IMAGE_SIZE
from tests.helpers.oracles import Payload
from utils.data.classes import BDD100K
from utils.model import checkpoint
from utils.model.checkpoint import ModelInfo, init_decoder, load_checkpoint, load_decoder, save_best, save_latest
from utils.model.segmenter import BoxSegmenter, SemanticSegmenter
from utils.runtime.errors import UserError

INFO = ModelInfo("vit_tiny", IMAGE_SIZE, "stretch", sam_sha256="ab" * 32)
METADATA: dict[str, Any] = {"epoch": 7, "metrics": {"train_loss": 0.25}, "args": {"lr": 1e-4, "resume": None}}


def tiny(seed: int = 0) -> BoxSegmenter:
    torch.manual_seed(seed)
    return BoxSegmenter(build_sam_vit_tiny(image_size=IMAGE_SIZE))


@pytest.fixture
def best(tmp_path: Path) -> Path:
    save_best(tmp_path / "best.pth", tiny(), INFO, **METADATA)
    return tmp_path / "best.pth"


def rewrite(path: Path, **changes: Any) -> Path:
    """Replace parts of a checkpoint; a part changed to None is left out."""
    payload = {**torch.load(path, weights_only=True), **changes}
    torch.save({key: value for key, value in payload.items() if value is not None}, path)
    return path


def test_best_holds_the_decoder_and_what_rebuilds_the_model(best: Path) -> None:
    payload = torch.load(best, weights_only=True)
    decoder = tiny().mask_decoder.state_dict()
    assert payload["model"].keys() == {f"mask_decoder.{key}" for key in decoder}
    assert payload["info"] == asdict(INFO)
    assert payload["format_version"] == 1
    assert payload["class_names"] == list(BDD100K.names)
    assert {key: payload[key] for key in METADATA} == METADATA
    assert "run_state" not in payload


def test_round_trip(best: Path) -> None:
    written, other = tiny(), tiny(seed=1)
    encoder = {key: value.clone() for key, value in other.sam.image_encoder.state_dict().items()}
    state = load_checkpoint(best)
    assert state["info"] == INFO
    load_decoder(other, state["model"], best)
    expected = written.mask_decoder.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other.mask_decoder.state_dict().items())
    assert all(torch.equal(value, encoder[key]) for key, value in other.sam.image_encoder.state_dict().items())


def test_latest_holds_the_state_of_the_run_as_well(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "latest.pth"
    optimizer = torch.optim.AdamW(model.mask_decoder.parameters(), lr=0.1)
    for parameter in model.mask_decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    history = [{"epoch": 0}]
    run_state: dict[str, Any] = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "history": history}
    save_latest(path, model, INFO, **METADATA, run_state=run_state, keep=0)
    state = load_checkpoint(path)
    assert state["run_state"]["history"] == history
    assert torch.equal(state["run_state"]["rng"], run_state["rng"])
    moments, loaded = (part["optimizer"]["state"] for part in (run_state, state["run_state"]))
    assert moments.keys() == loaded.keys()
    assert all(torch.equal(loaded[i]["exp_avg"], moments[i]["exp_avg"]) for i in moments)


@pytest.mark.parametrize(("build", "megabytes"), [(build_sam_vit_tiny, 4.3), (build_sam_vit_b, 16.3)])
def test_the_file_holds_the_decoders_parameters_and_little_else(tmp_path: Path, build: Any, megabytes: float) -> None:
    """4 bytes a parameter and under 100 kB beside them: not the 400 MB of a whole SAM."""
    with torch.device("meta"):
        sam = build()
    model = BoxSegmenter(sam.to_empty(device="cpu"))
    save_best(tmp_path / "best.pth", model, INFO, **METADATA)
    size = (tmp_path / "best.pth").stat().st_size
    parameters = 4 * sum(parameter.numel() for parameter in model.mask_decoder.parameters())
    assert parameters <= size < parameters + 100_000
    assert size / 1e6 == pytest.approx(megabytes, abs=0.1)


def test_an_interrupted_write_leaves_the_old_file(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = best.read_bytes()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    for function in ("fsync", "replace"):  # before it is on the disk, and just before it takes the old one's place
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"os.{function}", die)
            save_best(best, tiny(seed=1), INFO, **METADATA)
        assert best.read_bytes() == before
        assert list(best.parent.iterdir()) == [best]


def test_what_cannot_be_serialised_leaves_the_old_file(best: Path) -> None:
    before = best.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_best(best, tiny(), INFO, epoch=0, metrics={}, args={"callback": lambda: None})
    assert best.read_bytes() == before
    assert list(best.parent.iterdir()) == [best]


# --- Files that are something else


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.pth"
    with pytest.raises(UserError, match=rf"{path}: no such checkpoint \(train_bdd100k\.py writes medsam_model_best"):
        load_checkpoint(path)


def test_a_truncated_file_wherever_it_ends(tmp_path: Path) -> None:
    path, buffer = tmp_path / "cut.pth", io.BytesIO()
    payload = {"format_version": 1, "info": asdict(INFO), "class_names": list(BDD100K.names), "model": {}}
    torch.save({**payload, "model": {"a": torch.ones(4)}}, buffer)
    path.write_bytes(buffer.getvalue())
    load_checkpoint(path)
    for length in range(0, len(buffer.getvalue()), 23):
        path.write_bytes(buffer.getvalue()[:length])
        with pytest.raises(UserError, match=rf"{path}: truncated, or not a checkpoint of train_bdd100k\.py"):
            load_checkpoint(path)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"PK\x03\x04", b"\x93NUMPY", pickle.dumps([1], protocol=2)])
def test_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: truncated, or not a checkpoint of train_bdd100k\.py"):
        load_checkpoint(path)


def test_what_a_pickle_wants_to_run_is_not_run(best: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"format_version": 1, "info": Payload(made), "model": {}}, best)
    with pytest.raises(UserError, match=rf"{best}: truncated, or not a checkpoint of train_bdd100k\.py"):
        load_checkpoint(best)
    assert not made.exists()
    torch.load(best, weights_only=False)  # the payload is live: an unguarded reader would have run it
    assert made.exists()


def test_a_sam_file_given_instead(sam_file: Path) -> None:
    said = r"not a checkpoint of train_bdd100k\.py \(give a SAM checkpoint as --sam_checkpoint and a fine-tuned one as"
    with pytest.raises(UserError, match=rf"{sam_file}: {said}"):
        load_checkpoint(sam_file)


@pytest.mark.parametrize(
    "changes",
    [
        *[{key: None} for key in ("format_version", "class_names", "info", "model")],
        {"format_version": "one"},
        {"class_names": 19},
        {"info": ["vit_tiny"]},
        {"info": {"image_size": torch.ones(2)}},
        {"model": [torch.ones(1)]},
        {"model": {"mask_decoder.iou_token.weight": "a"}},
        {"model": {3: torch.ones(1)}},
    ],
)
def test_parts_that_are_missing_or_of_another_type(best: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{best}: not a checkpoint of train_bdd100k\.py"):
        load_checkpoint(rewrite(best, **changes))


@pytest.mark.parametrize(
    "info",
    [
        {},
        {key: value for key, value in asdict(INFO).items() if key != "sam_sha256"},
        {**asdict(INFO), "colour": "blue"},
    ],
)
def test_metadata_that_does_not_describe_a_model(best: Path, info: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{best}: does not say which model it belongs to; give a file that train_bdd"):
        load_checkpoint(rewrite(best, info=info))


def test_another_format_version(best: Path) -> None:
    with pytest.raises(UserError, match=rf"{best}: format 2, this version reads 1"):
        load_checkpoint(rewrite(best, format_version=2))


def test_a_frame_that_is_no_square(best: Path) -> None:
    payload = load_checkpoint(rewrite(best, info={**asdict(INFO), "image_size": "64x96"}))
    assert payload["info"].image_size == "64x96"
    with pytest.raises(UserError, match="with image size 64x96, not 64; preprocess the data at that --image_size"):
        payload["info"].require_same(INFO, best)


@pytest.mark.parametrize("names", [["road", "car"], list(reversed(BDD100K.names)), []])
def test_other_classes(best: Path, names: list[str]) -> None:
    said = rf"{best}: trained on {len(names)} classes, which are not BDD100K's 19"
    payload = torch.load(best, weights_only=True)
    del payload["classes"]  # as in files of earlier versions
    torch.save(payload, best)
    with pytest.raises(UserError, match=said):
        load_checkpoint(rewrite(best, class_names=names))


def test_a_table_of_classes_that_is_damaged(best: Path) -> None:
    whole = torch.load(best, weights_only=True)["classes"]
    two = {"classes": whole["classes"][:2]}
    twice = {"classes": [whole["classes"][0]] * 19}
    grey = {"classes": [{**c, "color": [1, 2]} for c in whole["classes"]]}
    tables: list[object] = [two, twice, grey, {}, [], {"classes": "road"}, {**whole, "selected_from": [1]}]
    tables += [torch.ones(()), {"classes": [torch.ones(())]}]
    for table in tables:
        with pytest.raises(UserError, match=r"not a checkpoint of train_bdd100k\.py: its table of classes is damaged"):
            load_checkpoint(rewrite(best, classes=table))


def test_a_decoder_that_does_not_fit_is_told_by_its_keys(best: Path) -> None:
    token = "mask_decoder.iou_token.weight"
    model, state = tiny(seed=1), load_checkpoint(best)["model"]
    before = {key: value.clone() for key, value in model.mask_decoder.state_dict().items()}
    without = {key: value for key, value in state.items() if key != token}
    for wrong, count, named in (
        (without, 1, token),
        ({**state, "mask_decoder.extra": torch.ones(1)}, 1, "mask_decoder.extra"),
        ({**state, token: torch.ones(1, 64)}, 1, token),
        ({f"module.{key}": value for key, value in state.items()}, 2 * len(state), r"mask_decoder\..*, \.\.\."),
    ):
        with pytest.raises(UserError, match=rf"{best}: its mask decoder does not fit: {count} keys differ \({named}\)"):
            load_decoder(model, wrong, best)
    assert all(torch.equal(value, before[key]) for key, value in model.mask_decoder.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "vit_b"}, "model type vit_tiny, not vit_b; give that model type"),
        ({"image_size": 1024}, f"image size {IMAGE_SIZE}, not 1024; preprocess the data at that --image_size"),
        ({"resize_mode": "pad"}, "resize mode stretch, not pad; preprocess the data with that --resize_mode"),
        ({"sam_sha256": "cd" * 32}, f"sam sha256 {'ab' * 32}, not {'cd' * 32}; give the SAM file it was trained on"),
        ({"prompt_mode": "point"}, "prompt mode box, not point; give that --prompt_mode"),
    ],
)
def test_a_model_it_does_not_belong_to(best: Path, change: dict[str, Any], said: str) -> None:
    info = load_checkpoint(best)["info"]
    info.require_same(INFO, best)
    with pytest.raises(UserError, match=f"{best}: was trained with {said}"):
        info.require_same(replace(INFO, **change), best)


def test_the_names_of_the_files_are_the_specifications() -> None:
    assert (checkpoint.BEST, checkpoint.LATEST) == ("medsam_model_best.pth", "medsam_model_latest.pth")


def test_a_runs_folder_stands_for_its_best(best: Path) -> None:
    with pytest.raises(UserError, match=rf"{checkpoint.BEST}: no such checkpoint"):
        load_checkpoint(best.parent)
    best.rename(best.parent / checkpoint.BEST)
    assert load_checkpoint(best.parent)["epoch"] == 7


def semantic(*names: str) -> SemanticSegmenter:
    classes = BDD100K.select(names, other=False)
    return SemanticSegmenter(build_sam_vit_tiny(image_size=IMAGE_SIZE), classes=classes)


def test_a_start_from_a_decoder_takes_classes_by_name(tmp_path: Path) -> None:
    earlier, model = semantic("car", "road", "sky"), semantic("sky", "person", "car")
    info = replace(INFO, prompt_mode="semantic")
    save_best(tmp_path / "best.pth", earlier, replace(info, image_size=128), **METADATA)
    fresh = {key: value.clone() for key, value in model.mask_decoder.state_dict().items()}
    assert init_decoder(model, info, tmp_path / "best.pth") == ["person"]
    for key, value in model.mask_decoder.state_dict().items():
        old = earlier.mask_decoder.state_dict()[key]
        if key.startswith(("mask_tokens", "output_hypernetworks")):
            old = torch.stack([old[2], fresh[key][1], old[0]])
        assert torch.equal(value, old), key


def test_a_start_from_a_decoder_of_another_form(tmp_path: Path) -> None:
    info = replace(INFO, prompt_mode="semantic")
    save_best(tmp_path / "best.pth", semantic("car"), info, **METADATA)
    payload = torch.load(tmp_path / "best.pth", weights_only=True)
    payload["model"]["mask_decoder.output_hypernetworks.weights.9"] = torch.zeros(1, 2, 2)
    torch.save(payload, tmp_path / "best.pth")
    with pytest.raises(UserError, match=r"does not fit: 1 keys differ \(mask_decoder.output_hypernetworks.weights.9\)"):
        init_decoder(semantic("car", "sky"), info, tmp_path / "best.pth")
    torch.save(build_sam_vit_tiny(image_size=IMAGE_SIZE).state_dict(), tmp_path / "sam.pth")
    with pytest.raises(UserError, match=r"-checkpoint and a fine-tuned one as --init_decoder\); it is"):
        init_decoder(semantic("car", "sky"), info, tmp_path / "sam.pth")
