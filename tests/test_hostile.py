"""Files that were made to harm: nothing of them runs or is written elsewhere, and no claim of theirs fills the memory.

What the readers make of thousands of damaged files is in `tests/helpers/fuzz.py`.
"""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import infer_bdd100k
import pre_bdd100k
import train_bdd100k
from segment_anything import CheckpointError, build_sam_vit_tiny
from segment_anything.build_sam import load_state_dict, read_state_dict
from segment_anything.utils.plain_load import load_plain
from tests.helpers.inputs import IMAGE_SIZE
from tests.helpers.oracles import TENSOR, Payload, torch_archive
from tests.helpers.scripts import run_script
from utils import ckpt_convert
from utils.data.bdd100k import read_image, read_size
from utils.data.classes import BDD100K
from utils.data.datasets import NpyFolder
from utils.data.detections import read_detections
from utils.data.frame import MAX_IMAGE_SIZE
from utils.data.image_files import MAX_JPEG_SCANS
from utils.data.manifest import read_manifest
from utils.evaluate import media
from utils.model.checkpoint import ModelInfo, load_checkpoint, save_best
from utils.model.segmenter import BoxSegmenter, build_model
from utils.runtime.errors import UserError, printable

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


# --- Pickles


def _legacy(path: Path, payload: Payload) -> None:
    torch.save({"a": payload}, path, _use_new_zipfile_serialization=False)


def _tar(path: Path, payload: Payload) -> None:
    """As PyTorch wrote them before 0.1.10."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(payload, 2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _torchscript(path: Path, payload: Payload) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"archive/{name}", pickle.dumps(payload, 2) if name.endswith("pkl") else "3\n")


FORMS: dict[str, Callable[[Path, Payload], object]] = {
    "zip": lambda path, payload: torch.save({"a": payload}, path),
    "legacy": _legacy,
    "pickle": lambda path, payload: path.write_bytes(pickle.dumps(payload, 2)),
    "tar": _tar,
    "torchscript": _torchscript,
}


@pytest.mark.parametrize("form", FORMS)
def test_no_script_runs_what_a_pth_holds(
    form: str, npy: Path, sam_file: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    path, made = tmp_path / "hostile.pth", tmp_path / "made"
    FORMS[form](path, Payload(made))
    data, tiny = ["-i", npy / "train", "-work_dir", tmp_path / "work"], ["--model_type", "vit_tiny", "--device", "cpu"]
    output = ["--output_dir", tmp_path / "out"]
    for said in (
        error_of(train_bdd100k, *data, *tiny, "-checkpoint", path),
        error_of(train_bdd100k, *data, *tiny, "-checkpoint", sam_file, "--resume", path),
        error_of(infer_bdd100k, "--val_npy_path", npy / "val", *tiny, *output, "--sam_checkpoint", path),
        error_of(
            infer_bdd100k,
            "--val_npy_path",
            npy / "val",
            *tiny,
            *output,
            "--sam_checkpoint",
            sam_file,
            "--model_checkpoint",
            path,
        ),
        error_of(ckpt_convert, "--model_checkpoint", path, "--sam_checkpoint", sam_file, "--output", tmp_path / "o"),
    ):
        assert said.startswith(f"error: {path}: truncated, or not a")
    assert list(tmp_path.iterdir()) == [path]
    if form in ("zip", "legacy"):
        torch.load(path, weights_only=False)  # the payload is live
    else:
        content = path.read_bytes()
        pickle.loads(content[content.index(b"\x80\x02") :])
    assert made.exists()


@pytest.mark.parametrize("kind", ["imgs", "gts"])
def test_no_script_runs_what_an_npy_holds(
    kind: str, npy: Path, sam_file: Path, scenes: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    made = tmp_path / "made"
    split = tmp_path / "npy" / "val"
    for path in (npy / "val").rglob("*.npy"):
        (split / path.relative_to(npy / "val")).parent.mkdir(parents=True, exist_ok=True)
        os.link(path, split / path.relative_to(npy / "val"))
    (split / "manifest.json").write_bytes((npy / "val" / "manifest.json").read_bytes())
    victim = sorted((split / kind).iterdir())[0]
    victim.unlink()
    np.save(victim, np.array([[Payload(made)]], dtype=object), allow_pickle=True)
    model = ["--model_type", "vit_tiny", "--device", "cpu"]
    for said in (
        error_of(train_bdd100k, "-i", split, *model, "-checkpoint", sam_file, "-work_dir", tmp_path / "work"),
        error_of(
            infer_bdd100k,
            "--val_npy_path",
            split,
            *model,
            "--sam_checkpoint",
            sam_file,
            "--output_dir",
            tmp_path / "out",
        ),
    ):
        assert said.startswith(f"error: {victim}: holds pickled objects, which are never loaded")
    # To preprocessing it is a file that is not done yet.
    options = ["--image_size", IMAGE_SIZE, "--image_dtype", "uint8", "--num_workers", 1, "--splits", "val"]
    assert not run_script(pre_bdd100k, "--bdd100k_root", scenes, "--output_path", tmp_path / "npy", *options)
    assert victim.read_bytes() == (npy / "val" / kind / victim.name).read_bytes()
    assert not made.exists()


@pytest.mark.parametrize("script", ["train", "infer", "pre"])
def test_the_scripts_themselves_end_in_one_line(
    script: str, npy: Path, sam_file: Path, tmp_path: Path, scenes: Path
) -> None:
    path, made = tmp_path / "hostile.pth", tmp_path / "made"
    torch.save({"a": Payload(made)}, path)
    (tmp_path / "images/10k/test").mkdir(parents=True)
    (tmp_path / "images/10k/test/bomb.png").write_bytes(png(60_000, 60_000))
    flags: list[object] = {
        "train": ["-i", npy / "train", "-model_type", "vit_tiny", "-checkpoint", path, "-work_dir", tmp_path / "work"],
        "infer": [
            "--val_npy_path",
            npy / "val",
            "--model_type",
            "vit_tiny",
            "--sam_checkpoint",
            sam_file,
            "--model_checkpoint",
            path,
            "--output_dir",
            tmp_path / "out",
        ],
        "pre": ["--bdd100k_root", tmp_path, "--splits", "test", "--output_path", tmp_path / "npy", "--image_size", 64],
    }[script]
    command = [sys.executable, f"{script}_bdd100k.py", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip() and "image/s" not in line and "%|" not in line]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert not made.exists()


# --- Sizes that PyTorch believes


class Calls:
    """Is unpickled by calling `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "value",
    [Calls(bytearray, 1 << 20), torch.zeros(1).expand(1 << 20), 1 << 80, {1.5: 0}],
    ids=["bytearray", "repeated", "number", "key"],
)
def test_what_would_be_larger_inside_than_outside(value: Any, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": value}, path, _use_new_zipfile_serialization=not legacy)
    torch.load(path, weights_only=True)  # to PyTorch it is harmless
    with pytest.raises(ValueError, match=rf"{path}: damaged, or not a file of plain tensors"):
        load_plain(path)
    with pytest.raises(CheckpointError, match=rf"{path}: truncated, or not a PyTorch checkpoint of plain tensors"):
        read_state_dict(path, "vit_tiny")


ODICT = b"ccollections\nOrderedDict\n)R"
# What an opcode is applied to, of which PyTorch looks at the names alone; and what is said of it.
MISUSES = {
    "item of a list": (b"]K\0K\x01s", "applies an operation of a dict to a list"),
    "items of a list": (b"](K\0K\x01u", "applies an operation of a dict to a list"),
    "items of a tensor": (TENSOR + b"(K\0K\x01u", "applies an operation of a dict to a tensor"),
    "items of a string": (b"X\x01\0\0\0b(K\0K\x01u", "applies an operation of a dict to a str"),
    "items of a class": (b"ctorch\nFloatStorage\n(K\0K\x01u", "applies an operation of a dict to a global"),
    "items of what is remembered": (b"]q\x05}q\x060h\x05(K\0K\x01u", "has an opcode POP"),
    "an odd number of items": (b"}(K\0K\x01K\x02u", "a key without a value"),
    "append to a dict": (b"}K\0a", "applies an operation of a list to a dict"),
    "append to a tensor": (TENSOR + b"(K\0e", "applies an operation of a list to a tensor"),
    "state of a tensor": (TENSOR + TENSOR[TENSOR.index(b"(X") : TENSOR.index(b"Q") + 1] + b"K\0\x86b", "by a tuple"),
    "state of a tensor, a dict": (TENSOR + b"}b", "applies an operation of a ordered dict to a tensor"),
    "state of a dict": (b"}}b", "applies an operation of a ordered dict to a dict"),
    "state that is a list": (ODICT + b"]b", "sets the state of a value by a list"),
    "call of a storage's type": (b"ctorch\nFloatStorage\nK\x7f\x85R", "calls torch FloatStorage"),
    "tensor of no storage": (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\0)K\x01tR", "calls torch._utils _rebuild"),
    "parameter of no tensor": (b"ctorch._utils\n_rebuild_parameter\n(]\x89}tR", "calls torch._utils _rebuild_param"),
    "below the mark": (b"](K\x01\x86", "takes more values than the stack has"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_opcodes_are_held_against_what_they_are_applied_to(misuse: str, tmp_path: Path) -> None:
    opcodes, said = MISUSES[misuse]
    path = tmp_path / "a.pth"
    path.write_bytes(torch_archive(opcodes))
    with pytest.raises(ValueError, match=rf"{path}: damaged") as error:
        load_plain(path)
    assert re.search(said, str(error.value.__cause__)), error.value.__cause__


@pytest.mark.parametrize("length", [0, 15, 17, 400])
def test_a_storage_has_the_bytes_that_the_pickle_says(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(torch_archive(TENSOR))
    assert torch.equal(load_plain(path)["a"], torch.zeros(4))
    path.write_bytes(torch_archive(ODICT + b"}b"))
    assert load_plain(path) == {"a": {}}
    path.write_bytes(torch_archive(TENSOR, bytes(length)))
    with pytest.raises(ValueError, match=rf"{path}: damaged") as error:
        load_plain(path)
    assert "storage 0 does not have the size that the pickle claims" in str(error.value.__cause__)


def test_a_storage_of_the_older_format_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(100)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert load_plain(path)["a"].shape == (100,)
    path.write_bytes(data.replace(b"Kd", b"M\xff\xff"))  # elements, in the storage and in the shape
    with pytest.raises(ValueError, match=rf"{path}: damaged") as error:
        load_plain(path)
    assert "claims more bytes than there are" in str(error.value.__cause__)


def _rezip(path: Path, compression: int, repeats: int = 1) -> None:
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for _ in range(repeats):
            for name, data in content.items():
                archive.writestr(name, data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("compression", "repeats"), [(zipfile.ZIP_DEFLATED, 1), (zipfile.ZIP_STORED, 2)])
def test_an_archive_that_unpacks_to_more_than_itself_or_is_ambiguous(
    compression: int, repeats: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(100_000)}, path)
    _rezip(path, zipfile.ZIP_STORED)
    assert load_plain(path)["a"].shape == (100_000,)
    _rezip(path, compression, repeats)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="damaged, or not a file of plain tensors"):
        load_plain(path)


def test_members_that_lie_upon_each_other(tmp_path: Path) -> None:
    """A directory of many entries for the same bytes: each is as small as it says, and all of them are not."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        first = next(member for member in archive.infolist() if member.filename.endswith("data/0"))
        for number in range(1, 50):
            twin = zipfile.ZipInfo(f"a/data/{number}")
            twin.header_offset, twin.file_size, twin.compress_size = first.header_offset, 400_000, 400_000
            twin.CRC = first.CRC
            archive.filelist.append(twin)
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="damaged, or not a file of plain tensors"):
        load_plain(path)


def test_containers_come_as_pythons_own(tmp_path: Path) -> None:
    """An `OrderedDict` may bring a `keys` that is no method, and containers may hold themselves."""
    shadowed: Any = collections.OrderedDict(a=torch.ones(2))
    shadowed.keys = 3
    torch.save(shadowed, tmp_path / "a.pth")
    with pytest.raises(TypeError):
        torch.load(tmp_path / "a.pth", weights_only=True).keys()
    assert list(read_state_dict(tmp_path / "a.pth", "vit_tiny")) == ["a"]
    ring: list[Any] = []
    ring.append(ring)
    many: Any = [0]
    for _ in range(24):  # 2^24 numbers, if each were followed
        many = [many, many]
    torch.save([ring], tmp_path / "ring.pth")
    with pytest.raises(ValueError, match="damaged"):
        load_plain(tmp_path / "ring.pth")
    torch.save(many, tmp_path / "many.pth")
    first, second = load_plain(tmp_path / "many.pth")
    assert first is second


@pytest.mark.parametrize("shape", [(1, 0, 5, 192), (1000, 1, 1, 192), (1, 4, 4, 7), (4,)])
def test_tables_of_positions_that_are_none(shape: tuple[int, ...], tmp_path: Path) -> None:
    for frame in (IMAGE_SIZE, (48, 96)):
        sam = build_sam_vit_tiny(image_size=frame)
        state = {**sam.state_dict(), "image_encoder.pos_embed": torch.zeros(shape)}
        with pytest.raises(CheckpointError, match=r"x\.pth: (not a vit_tiny|a checkpoint of)"):
            load_state_dict(sam, state, model_type="vit_tiny", source=Path("x.pth"))
        torch.save(state, tmp_path / "sam.pth")
        with pytest.raises(CheckpointError, match=r"sam\.pth: (not a vit_tiny|a checkpoint of)"):
            build_sam_vit_tiny(tmp_path / "sam.pth", image_size=frame)


@pytest.mark.parametrize(
    "size",
    [10**9, MAX_IMAGE_SIZE + 16, 0, -16, True, "", "64", "64x64", "0x16", "16x99999", "9" * 5000 + "x16", "16x32 "],
    ids=lambda size: repr(size)[:12],
)
def test_a_checkpoint_that_claims_an_absurd_image_size(size: int | str, tmp_path: Path) -> None:
    model = BoxSegmenter(build_sam_vit_tiny(image_size=IMAGE_SIZE))
    info = ModelInfo("vit_tiny", size, "stretch", sam_sha256="ab" * 32)
    save_best(tmp_path / "best.pth", model, info, epoch=0, metrics={}, args={})
    with pytest.raises(UserError, match=r"best\.pth: (image size .* is not supported|not a checkpoint of)"):
        load_checkpoint(tmp_path / "best.pth")


def test_an_image_size_that_no_model_takes(sam_file: Path) -> None:
    for size in (100, "64x100", "100x64"):
        with pytest.raises(UserError, match=f"image size {size}: not supported; preprocess at multiples of 16"):
            build_model("vit_tiny", sam_file, image_size=size)


# --- Pictures


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header, with a right checksum, claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_a_png_without_pixels(tmp_path: Path) -> None:
    data = png(8, 8)
    (tmp_path / "a.png").write_bytes(data[:33] + data[-12:])  # header and end
    with pytest.raises(UserError, match=r"a\.png: cannot be decoded: a PNG without pixels \(the file is damaged"):
        read_size(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_header_that_claims_an_absurd_size(kind: str, tmp_path: Path, error_of: Callable[..., str]) -> None:
    path = tmp_path / f"bomb.{kind}"
    if kind == "png":
        path.write_bytes(png(60_000, 60_000))
    else:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
        data = bytearray(path.read_bytes())
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
        path.write_bytes(data)
    for read in (read_size, read_image):
        with pytest.raises(UserError, match=rf"{path}: its header claims an absurd size, above 89 megapixels"):
            read(path)
    flags = ["--model_type", "vit_tiny", "--output_dir", tmp_path / "out"]
    assert "its header claims an absurd size" in error_of(infer_bdd100k, "--images", path, *flags)


def test_files_of_holes_are_not_read_whole(split: Path, tmp_path: Path) -> None:
    """A terabyte in the folder's listing, and nothing on the disk."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.jpg")
    os.truncate(tmp_path / "a.jpg", 1 << 40)
    with pytest.raises(UserError, match=r"a\.jpg: larger than 341 MiB"):
        read_image(tmp_path / "a.jpg")
    os.truncate(split / "manifest.json", 1 << 40)
    with pytest.raises(UserError, match=r"manifest\.json: larger than 1024 MiB"):
        read_manifest(split)


def test_a_jpeg_of_thousands_of_scans(tmp_path: Path) -> None:
    """Each is a dozen bytes, and a pass over all of the picture."""
    path = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path, progressive=True)
    read_image(path)
    data = path.read_bytes()
    last = data.rindex(b"\xff\xda")
    path.write_bytes(data[:last] + data[last:-2] * MAX_JPEG_SCANS + data[-2:])
    with pytest.raises(UserError, match=rf"{path}: has 1\d\d scans and would take hours to decode"):
        read_image(path)


def test_a_video_that_claims_an_absurd_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    with media.OverlayVideo(path, 10, (48, 64), lambda image, labels: image) as video:
        for _ in range(3):
            video.write("", np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), np.uint8))
    media.find_source(str(path))
    monkeypatch.setattr(media, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(UserError, match=rf"{path}: its header claims frames of an absurd size"):
        media.find_source(str(path))


# --- Names, links and pipes


@pytest.fixture
def split(npy: Path, tmp_path: Path) -> Path:
    """A split of hard links, whose manifest may be replaced."""
    folder = tmp_path / "split"
    for path in (npy / "val").rglob("*.npy"):
        target = folder / path.relative_to(npy / "val")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
    (folder / "manifest.json").write_bytes((npy / "val" / "manifest.json").read_bytes())
    return folder


def edit(split: Path, item: dict[str, Any], **changes: Any) -> None:
    manifest = json.loads((split / "manifest.json").read_bytes())
    manifest["items"][0] |= item
    (split / "manifest.json").write_text(json.dumps({**manifest, **changes}))


VALUES: list[Any] = ["a" * 19, [2**70] * 19, [-1] * 19, [0.5] * 19, [None] * 19, {}, 3]
ITEMS: list[dict[str, Any]] = [
    *[{"name": name} for name in (".", "..", "../../x", "/etc/x", "a/b", "a\0b", "", 3, None, ["a"])],
    *[{key: value} for key in ("height", "width") for value in (10**9, 0, -1, 12.5, True, "9", None)],
    {"height": 20_000, "width": 20_000},
    *[{"pixels": value} for value in VALUES],
    {"ignored": 10**30},
]


@pytest.mark.parametrize("item", ITEMS)
def test_items_that_no_program_of_ours_wrote(item: dict[str, Any], split: Path) -> None:
    read_manifest(split)
    edit(split, item)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of pre_bdd100k\.py"):
        read_manifest(split)


@pytest.mark.parametrize("size", [10**9, MAX_IMAGE_SIZE + 1, 0, True, 64.0, "64"])
def test_an_absurd_image_size_in_a_manifest(size: Any, split: Path) -> None:
    edit(split, {}, image_size=size)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of pre_bdd100k\.py"):
        read_manifest(split)


def test_a_name_that_is_there_twice(split: Path) -> None:
    """It would be evaluated twice, and its prediction written twice."""
    edit(split, {"name": json.loads((split / "manifest.json").read_bytes())["items"][1]["name"]})
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of pre_bdd100k\.py"):
        read_manifest(split)


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "\x1b[2J\nerror: x"])
def test_names_that_no_file_has(name: str, split: Path) -> None:
    edit(split, {"name": name})
    with pytest.raises(UserError) as said:
        NpyFolder(split)
    assert printable(str(said.value)).isprintable()


def test_json_that_is_absurdly_deep(split: Path) -> None:
    (split / "manifest.json").write_text('{"format_version":' + "[" * 100_000)
    with pytest.raises(UserError, match=r"manifest\.json: not JSON"):
        read_manifest(split)


@pytest.mark.parametrize("depth", range(900, 1000, 9))
def test_boxes_as_deep_as_can_just_be_read(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    box = "[" * depth + "]" * depth
    path.write_text(f'[{{"name": "a.jpg", "labels": [{{"category": "car", "box2d": {box}}}]}}]')
    with pytest.raises(UserError, match=r"boxes\.json: (not JSON|image 'a\.jpg', label 0 \(car\): box2d)"):
        read_detections(path, BDD100K)


def test_a_manifest_that_is_no_file(split: Path) -> None:
    (split / "manifest.json").unlink()
    (split / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json: not a regular file"):
        read_manifest(split)
    (split / "manifest.json").rmdir()
    os.mkfifo(split / "manifest.json")  # nobody will ever write into it
    with pytest.raises(UserError, match=r"manifest\.json: not a regular file"):
        read_manifest(split)


def test_pipes_and_devices_are_not_waited_for(split: Path, tmp_path: Path) -> None:
    victim = sorted((split / "gts").iterdir())[0]
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(UserError, match=rf"{victim}: not a regular file"):
        NpyFolder(split)
    victim.unlink()
    victim.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=rf"{victim}: not a regular file"):
        NpyFolder(split)
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg: not a regular file"):
        read_size(tmp_path / "a.jpg")


def test_links_in_a_run_folder_are_replaced_and_not_written_through(
    train: Callable[..., Path], npy: Path, sam_file: Path, tmp_path: Path
) -> None:
    """Who goes on with a run from elsewhere may find links in it, to files of their own."""
    folder = train(tmp_path / "work", "-num_epochs", 1, "-batch_size", 4, "--grad_acc_steps", 1)
    names = (
        "log.jsonl",
        "config.json",
        "starts.jsonl",
        "results.csv",
        "loss_curve.png",
        "train_batch.jpg",
        "medsam_model_best.pth",
        "medsam_model_latest.1.pth",
    )
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(mine)
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures" / "epoch_009.jpg").touch()
    (folder / "val_samples").symlink_to(tmp_path / "my pictures")
    (folder / ".a.1.tmp").mkdir()  # as if it were a temporary file
    flags = ["-num_epochs", 2, "-batch_size", 4, "--grad_acc_steps", 1, "-num_workers", 0, "--device", "cpu"]
    run_script(
        train_bdd100k,
        "-i",
        npy / "train",
        "-model_type",
        "vit_tiny",
        "-checkpoint",
        sam_file,
        "-work_dir",
        tmp_path / "work",
        "--resume",
        folder,
        *flags,
    )
    assert mine.read_text() == "precious"
    assert [path.name for path in (tmp_path / "my pictures").iterdir()] == ["epoch_009.jpg"]
    assert "precious" not in (folder / "starts.jsonl").read_text()
    assert not (folder / "log.jsonl").is_symlink() and len((folder / "log.jsonl").read_text().splitlines()) == 2


def test_what_is_quoted_of_a_file_stays_on_its_line() -> None:
    assert printable("a\nb\x1b[2J\u202e\udcff é 道路") == "a\\nb\\x1b[2J\\u202e\\udcff é 道路"
    assert len(printable("x" * 10**6)) < 2000
