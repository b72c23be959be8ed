"""Damaged and hostile files for every reader. Each file must be read, or rejected with the error meant for users.

    python -m tests.helpers.fuzz --examples 2000

This tests 2,000 inputs of each kind of file and prints the outcomes. `tests/test_fuzz.py` is the short form. The inputs
are random bytes and valid files with flipped, missing or added bytes, with edited headers and correct checksums, or
with parts that a hostile author would write.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import resource
import signal
import struct
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from segment_anything import CheckpointError
from segment_anything.build_sam import CONFIGS, SamConfig, build_sam_of_type, load_state_dict, read_state_dict
from tests.helpers.oracles import TENSOR, torch_archive
from utils.cache.keys import CacheKey, Request
from utils.cache.writer import prepare_caches
from utils.compare import format_comparison, read_results
from utils.data.bdd100k import read_image, read_mask, read_size
from utils.data.boxes import class_boxes
from utils.data.classes import BDD100K
from utils.data.datasets import NpyFolder
from utils.data.detections import read_detections
from utils.data.manifest import Manifest, ManifestItem, Source
from utils.evaluate.comparison import write_comparison
from utils.evaluate.gallery import LABEL_MAPS, ScoredImage, read_label_maps, save_label_maps
from utils.model.checkpoint import ModelInfo, load_checkpoint, load_decoder, save_latest, save_safetensors
from utils.model.segmenter import BoxSegmenter
from utils.runtime.device import Precision
from utils.runtime.errors import UserError, printable
from utils.train.resume import read_resume

SIZE = 64
# A SAM of about 100 kB, so that thousands of files are written and read quickly.
SMALL = SamConfig(16, 2, 2, (1,), image_size=SIZE, window_size=2, prompt_embed_dim=16, decoder_mlp_dim=16)
SECONDS = 60  # until an input counts as hanging
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 60000, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1]
NAMES = ["", ".", "..", "../../x", "/etc/x", "a/b", "a\0b", "x" * 300, "\ud800", "\x1b[2J\nerror: x", "\u202ex"]
NAMES += ["64x96", "4096x4096", "9x99999"]  # image sizes
NUMBERS = [None, True, -1, 0, 1, 10**9, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf")]
DEEP: list[Any] = []
for _ in range(50):
    DEEP = [DEEP]


# --- Damage


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid file with one to four edits, mostly near its beginning."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        reach = min(draw(st.sampled_from([16, 64, 512, len(data)])), len(data))
        at = draw(st.integers(0, max(0, reach - 1)))
        kind = draw(st.sampled_from(["flip", "number", "cut", "insert", "drop", "repeat"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            width, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
            number = draw(st.sampled_from(EXTREMES)) % 256**width
            data[at : at + width] = number.to_bytes(width, order)
        elif kind == "cut":
            del data[draw(st.integers(0, len(data))) :]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=40))
        else:
            end = at + draw(st.integers(1, 64))
            data[at:end] = b"" if kind == "drop" else data[at:end] * 2
    return bytes(data)


def anything(*beginnings: bytes) -> st.SearchStrategy[bytes]:
    """Random bytes, some after one of these beginnings."""
    return st.builds(lambda start, rest: start + rest, st.sampled_from([b"", *beginnings]), st.binary(max_size=200))


@st.composite
def replaced(draw: st.DrawFn, tree: Any, odd: list[Any]) -> Any:
    """A copy of nested dicts and lists with one to three nodes removed, repeated, renamed or replaced."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node, parent = tree, None
        key: Any = None
        while isinstance(node, dict | list) and node and (parent is None or draw(st.integers(0, 4))):
            parent = node
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            node = parent[key]
        if parent is None:
            return copy.deepcopy(draw(st.sampled_from(odd)))
        kind = draw(st.sampled_from(["odd", "odd", "odd", "remove", "repeat", "rename"]))
        if kind == "remove":
            del parent[key]
        elif kind == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(node))
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(NAMES))] = parent.pop(key)
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(odd)))  # the next edit may change it
    return tree


def damaged_json(tree: Any) -> st.SearchStrategy[bytes]:
    """JSON with other contents, or damaged."""
    structure = replaced(tree, [*NAMES, *NUMBERS, [], {}, DEEP, "a" * len(BDD100K.names)]).map(_dumps)
    return structure | structure | damaged([_dumps(tree)]) | anything(b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000)


def _dumps(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@st.composite
def damaged_chunks(draw: st.DrawFn, png: bytes) -> bytes:
    """A PNG with damaged chunks and correct checksums."""
    chunks, at = [], 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    which = draw(st.integers(0, len(chunks) - 1))
    if draw(st.booleans()):
        chunks.insert(which, draw(st.sampled_from(chunks)))
    kind, body = chunks[which]
    kind = draw(st.sampled_from([kind, kind, kind, b"zTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"fcTL"]))
    chunks[which] = kind, draw(damaged([body]))
    return png[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@st.composite
def damaged_pickle(draw: st.DrawFn, archive: bytes) -> bytes:
    """A checkpoint with a damaged pickle and correct checksums."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(output, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, draw(damaged([content])) if name.endswith("data.pkl") else content)
    return output.getvalue()


@st.composite
def misused_opcodes(draw: st.DrawFn) -> bytes:
    """A checkpoint whose pickle sets items or state of unsuitable values, or states a wrong storage size."""
    values = [
        b"]",
        b"}",
        b")",
        b"N",
        b"K\x01",
        b"X\x01\0\0\0b",
        b"ccollections\nOrderedDict\n)R",
        TENSOR,
        b"ctorch\nFloatStorage\n",
        TENSOR[TENSOR.index(b"(X") : TENSOR.index(b"Q") + 1],
    ]
    a, b, c = (draw(st.sampled_from(values)) for _ in range(3))
    last = [b"s", b"a", b"b", b"R", b"\x86", b"0", b"Q"]
    shapes = [a, a + b"(" + b + c + b"u", a + b"(" + b + b"e", a + b + c + b"s", a + b"(" + b + b"u"]
    shapes += [a + b + end for end in last] + [a + b + b"\x85" + end for end in last]
    opcodes = draw(st.sampled_from(shapes))
    return torch_archive(opcodes, bytes(draw(st.sampled_from([16, 16, 0, 4, 15, 17, 4096]))))


def damaged_checkpoint(payload: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A checkpoint with other contents, or damaged, in both of PyTorch's formats."""
    tensors = [
        torch.ones(3, dtype=torch.int64),
        torch.zeros(()),
        torch.ones(1).expand(10**6),
        torch.zeros(0, 2),
        torch.ones(2, 2, dtype=torch.complex64),
        torch.full((1, 1, 1, 16), float("nan")),
    ]
    odd = [*NAMES, *NUMBERS, [], {}, *tensors, DEEP[0][0], b"bytes", (1, 2)]
    archive = _saved(payload)
    structure = replaced(payload, odd).map(_saved)
    old = io.BytesIO()
    torch.save(payload, old, _use_new_zipfile_serialization=False)
    raw = damaged([archive, old.getvalue()])
    odd_bytes = anything(b"PK\x03\x04", archive[:200], b"\x80\x02")
    return structure | structure | damaged_pickle(archive) | misused_opcodes() | raw | odd_bytes


def _saved(payload: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def damaged_tensors(written: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with another header, or damaged."""
    foreign = [
        save({"0.0": torch.ones(16, 4, 4, dtype=kind)}, {"sha256": "0"}) for kind in (torch.bfloat16, torch.bool)
    ]
    length = struct.unpack("<Q", written[:8])[0]
    header = json.loads(written[8 : 8 + length])
    odd: list[Any] = [*NAMES, *NUMBERS, [], {}, [0, 2**63], "F8_E4M3", "BF16", "[" * 100_000, '{"a":[]}']
    metadata = replaced(header["__metadata__"], odd).map(lambda other: {**header, "__metadata__": other})
    edited = (
        (replaced(header, odd) | metadata)
        .map(_dumps)
        .map(lambda header: struct.pack("<Q", len(header)) + header + written[8 + length :])
    )
    return damaged([written, *foreign]) | edited | anything(written[:8])


# --- Readers


@dataclass
class Target:
    """A kind of file: its inputs and its reader."""

    inputs: st.SearchStrategy[bytes]
    read: Callable[[bytes], object]
    outcomes: Counter[str] = field(default_factory=Counter)


def make_targets(folder: Path) -> dict[str, Target]:
    """The targets by name. Their files are in `folder`."""
    CONFIGS["small"] = SMALL
    torch.manual_seed(0)
    model = BoxSegmenter(build_sam_of_type("small"))
    split = folder / "train"
    for kind in ("imgs", "gts"):
        (split / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, 19, (SIZE, SIZE), dtype=np.uint8)
    counts = np.bincount(labels.ravel(), minlength=19).tolist()
    items = [ManifestItem("a", 720, 1280, counts, 0), ManifestItem("b", 720, 1280, counts, 0)]
    sources: dict[str, list[Source]] = {"a": [["/data/a.jpg", 7, 8], ["/data/a.png", 9, 10]]}
    Manifest(SIZE, "uint8", "stretch", labelled=True, complete=True, items=items, sources=sources).write(split)
    for name in "ab":
        np.save(split / "imgs" / name, image)
        np.save(split / "gts" / name, labels)
    return {
        **_picture_targets(folder, image, labels),
        **_data_targets(folder, split),
        **_model_targets(folder, split, model),
    }


def _picture_targets(folder: Path, image: np.ndarray, labels: np.ndarray) -> dict[str, Target]:
    pictures: dict[str, bytes] = {}
    for kind, pixels, options in (
        ("png", image, {}),
        ("mask", labels, {}),
        ("jpeg", image, {}),
        ("progressive", image, {"progressive": True}),
    ):
        buffer, drawn = io.BytesIO(), Image.fromarray(pixels)
        exif = Image.Exif()
        exif[0x0112] = 6
        drawn.save(buffer, "PNG" if kind in ("png", "mask") else "JPEG", exif=exif, **options)
        pictures[kind] = buffer.getvalue()
    for kind, packing in (("webp", {}), ("bmp", {}), ("tiff", {"compression": "tiff_lzw"})):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind, **packing)
        pictures[kind] = buffer.getvalue()

    def read(data: bytes) -> None:
        path = folder / "picture.png"  # readers go by the content, not by the name
        path.write_bytes(data)
        height, width = read_size(path)
        if height * width > 1 << 24:
            return  # valid, but too slow to read a thousand times
        with contextlib.suppress(UserError):
            read_mask(path, height, width)
        read_image(path, upright=True)

    png = damaged([pictures["png"], pictures["mask"]]) | damaged_chunks(pictures["png"])
    png = png | anything(b"\x89PNG\r\n\x1a\n")
    jpeg = damaged([pictures["jpeg"], pictures["progressive"]]) | anything(b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1")
    others = damaged([pictures[kind] for kind in ("webp", "bmp", "tiff")])
    others = others | anything(b"RIFF\x40\0\0\0WEBP", b"BM", b"II*\0")
    return {"PNG": Target(png, read), "JPEG": Target(jpeg, read), "other pictures": Target(others, read)}


def _data_targets(folder: Path, split: Path) -> dict[str, Target]:
    manifest, array = (split / "manifest.json").read_bytes(), (split / "gts/a.npy").read_bytes()

    def read_split() -> None:
        source = NpyFolder(split)
        source.class_pixels()
        class_boxes(source.read(0)[1], 19)

    def read_npy(data: bytes) -> None:
        (split / "gts/a.npy").write_bytes(data)
        try:
            read_split()
        finally:
            (split / "gts/a.npy").write_bytes(array)

    def read_manifest(data: bytes) -> None:
        (split / "manifest.json").write_bytes(data)
        try:
            read_split()
        finally:
            (split / "manifest.json").write_bytes(manifest)

    def read_boxes(data: bytes) -> None:
        (folder / "boxes.json").write_bytes(data)
        read_detections(folder / "boxes.json", BDD100K)

    def read_evaluation(data: bytes) -> None:
        (folder / "evaluation_results.json").write_bytes(data)
        found = read_results(folder)
        format_comparison({"a": found})
        write_comparison(
            folder / "page.html", {folder / "other": {**found, "images": images}, folder: found}, ["a", "b"]
        )

    def read_maps(data: bytes) -> None:
        (folder / LABEL_MAPS).write_bytes(data)
        read_label_maps(folder / LABEL_MAPS, [0, 1])

    headers = st.builds(
        lambda shape, dtype, order: _npy(f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}"),
        st.sampled_from(["(64, 64)", f"({10**9},)", f"({10**18}, {10**18})", "(-1, 64)", "()", "(64", "'a'", "(" * 99]),
        st.sampled_from(["|u1", "|O", "<f8", "|V9999999999", "|S64", ",".join(["f8"] * 50), "x"]),
        st.sampled_from(["False", "True", "1", "__import__('os')"]),
    )
    label = {"category": "Car", "box2d": {"x1": 1, "y1": 2, "x2": 3.5, "y2": 4}}
    frames = {"frames": [{"name": "a.jpg", "labels": [label, label]}, {"name": "b.jpg", "labels": None}]}
    per_class = [{"id": i, "name": name, "iou": 0.5, "gt_pixels": 9} for i, name in enumerate(BDD100K.names)]
    images = [{"name": name, "miou": 0.5, "pixel_accuracy": 0.5, "iou": {"road": 0.25}} for name in "ab"]
    results = {"miou": 0.5, "boxes": "oracle", "data": str(split), "per_class": per_class, "images": images}
    maps = [ScoredImage(i, np.zeros(0), cv2.imencode(".png", np.eye(9, dtype=np.uint8))[1].tobytes()) for i in (0, 1)]
    save_label_maps(folder / LABEL_MAPS, maps)
    archive = (folder / LABEL_MAPS).read_bytes()
    (folder / "other").mkdir()
    (folder / "other" / LABEL_MAPS).write_bytes(archive)
    arrays = damaged([array]) | headers | anything(b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x80\x04")
    return {
        "npy": Target(arrays, read_npy),
        "manifest": Target(damaged_json(json.loads(manifest)), read_manifest),
        "Scalabel": Target(damaged_json(frames), read_boxes),
        "evaluation": Target(damaged_json(results), read_evaluation),
        "label maps": Target(damaged([archive]) | anything(archive[:60]), read_maps),
    }


def _npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + bytes(64 * 64)


def _model_targets(folder: Path, split: Path, model: BoxSegmenter) -> dict[str, Target]:
    info = ModelInfo("small", SIZE, "stretch", sam_sha256="ab" * 32)
    progress = {"steps": 3, "skipped_steps": 0, "sums": torch.ones(4, dtype=torch.float64), "seconds": 1.5}
    history = [{"epoch": 0, "train_loss": 0.5, "val_miou": 0.25}]
    run_state = {"history": history, "best_score": 0.25, "rng": [{"cpu": torch.get_rng_state()}], "progress": progress}
    args = {"lr": 1e-4, "resume": None}
    path = folder / "model.pth"
    save_latest(path, model, info, epoch=0, metrics=history[0], args=args, run_state=run_state, keep=0)
    payload = torch.load(path, weights_only=True)

    def read_checkpoint(data: bytes) -> None:
        path.write_bytes(data)
        state = load_checkpoint(path)
        state["info"].require_same(info, path)
        load_decoder(model, state["model"], path)
        read_resume(path).finished(num_epochs=100, patience=1)

    def read_sam(data: bytes) -> None:
        path.write_bytes(data)
        load_state_dict(model.sam, read_state_dict(path, "small"), model_type="small", source=path)

    source, precision = NpyFolder(split), Precision(torch.device("cpu"))
    key = CacheKey.of(model, info, precision, "float16")

    def prepare() -> None:
        requests = [Request(source, 1, 1)]
        (cache,) = prepare_caches(str(folder / "cache"), requests, model, precision, key, batch_size=1, num_workers=0)
        assert cache is not None and cache.read(0)[0].shape == (16, SIZE // 16, SIZE // 16)

    with contextlib.redirect_stdout(io.StringIO()):
        prepare()
    entry = folder / "cache/train/a.safetensors"

    def read_entry(data: bytes) -> None:
        entry.write_bytes(data)
        prepare()

    written, decoder = entry.read_bytes(), folder / "decoder.safetensors"
    save_safetensors(decoder, load_checkpoint(path))

    def read_decoder(data: bytes) -> None:
        decoder.write_bytes(data)
        load_decoder(model, load_checkpoint(decoder)["model"], decoder)

    return {
        "checkpoint": Target(damaged_checkpoint(payload), read_checkpoint),
        "SAM file": Target(damaged_checkpoint(model.sam.state_dict()), read_sam),
        "cache entry": Target(damaged_tensors(written), read_entry),
        "decoder": Target(damaged_tensors(decoder.read_bytes()), read_decoder),
    }


# --- Running them


class Hangs(BaseException):
    """An input hangs. No reader catches this."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(target: Target, examples: int, *, derandomize: bool = True) -> None:
    """Test `examples` inputs of a target. An unexpected error is raised with the smallest input that causes it."""

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def check(data: bytes) -> None:
        try:
            with _alarm(), contextlib.redirect_stdout(io.StringIO()):
                target.read(data)
            target.outcomes["read"] += 1
        except (UserError, CheckpointError) as error:
            target.outcomes["rejected"] += 1
            line = printable(str(error))
            assert line.strip() and line.isprintable() and len(line) < 3000

    check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="inputs for each kind of file")
    parser.add_argument("--only", nargs="*", help="kinds of file to test (default: all)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Path(folder))
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, target in targets.items():
            if args.only and name not in args.only:
                continue
            began = time.monotonic()
            fuzz(target, args.examples, derandomize=False)
            growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
            print(
                f"{name:<12} {sum(target.outcomes.values()):>6} inputs: {dict(target.outcomes)}, "
                f"{time.monotonic() - began:.0f} s, peak memory so far +{growth:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
