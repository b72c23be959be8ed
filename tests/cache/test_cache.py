"""utils/cache and --cache_embeddings: exactness, resuming, and rejecting whatever does not match."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load

import infer_bdd100k
import pre_bdd100k
import train_bdd100k
from segment_anything.build_sam import file_digest
from tests.helpers.faults import small_disk
from tests.helpers.inputs import IMAGE_SIZE
from tests.helpers.scripts import good_flags, read_results, run_script, training_flags
from utils.cache import lock, writer
from utils.cache.keys import CacheKey, Request
from utils.cache.reader import EmbeddingCache, entry_path
from utils.cache.writer import prepare_caches
from utils.data.augment import fixed_view
from utils.data.datasets import EvaluationDataset, NpyFolder, SemanticDataset, collate_evaluation
from utils.model import checkpoint
from utils.model.checkpoint import Checkpoint, ModelInfo
from utils.model.segmenter import Features, Segmenter, build_model
from utils.model.tensor_files import read_tensors, write_tensors
from utils.runtime.device import Precision
from utils.runtime.errors import Interrupted, LostWorkerError, UnreadableError, UserError
from utils.runtime.files import cannot_be_read

CPU = Precision(torch.device("cpu"))


@pytest.fixture
def split(npy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(npy / "train", tmp_path / "npy" / "train")


@pytest.fixture(scope="module")
def segmenter(sam_file: Path) -> Segmenter:
    return build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE, prompt_mode="semantic")


@pytest.fixture
def encoded(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that were encoded since."""
    sizes: list[int] = []
    encode = segmenter.encode

    def counting(images: torch.Tensor) -> Features:
        sizes.append(len(images))
        return encode(images)

    monkeypatch.setattr(segmenter, "encode", counting)
    return sizes


def prepare(
    split: Path,
    segmenter: Segmenter,
    sam_file: Path,
    where: str = "auto",
    *,
    num_views: int = 1,
    dtype: str = "float32",
    **changed: Any,
) -> EmbeddingCache:
    requests = [Request(NpyFolder(split), num_views, passes=100)]
    (cache,) = prepare_requests(requests, segmenter, sam_file, where, dtype=dtype, **changed)
    assert cache is not None
    return cache


def prepare_requests(
    requests: list[Request],
    segmenter: Segmenter,
    sam_file: Path,
    where: str,
    *,
    dtype: str = "float16",
    **changed: Any,
) -> list[EmbeddingCache | None]:
    source = requests[0].source
    info = ModelInfo("vit_tiny", source.image_size, source.resize_mode, file_digest(sam_file), "semantic")
    key = CacheKey.of(segmenter, info, CPU, dtype)
    key = dataclasses.replace(key, **changed)
    return prepare_caches(where, requests, segmenter, CPU, key, batch_size=4, num_workers=0)


def test_a_cache_of_a_square_has_the_name_that_it_has_always_had() -> None:
    """As written by the version before there were other frames; another name would have it made anew."""
    key = CacheKey("ab" * 32, "semantic", 64, "stretch", [123.675], [58.395], "float32", "float16")
    assert key.digest == "cc7b57538f8141a30bb73f9e6c90b85936fef19459f2d2752c6a917b46cab845"
    assert dataclasses.replace(key, image_size="64x96").digest != key.digest


def test_it_holds_what_the_encoder_gives(split: Path, segmenter: Segmenter, sam_file: Path) -> None:
    cache = prepare(split, segmenter, sam_file, num_views=2)
    source = NpyFolder(split)
    for index in (0, len(source.items) - 1):
        image = torch.from_numpy(source.read_image(index)).permute(2, 0, 1)[None]
        for view, pixels in enumerate((image, image.flip(-1))):
            for got, expected in zip(cache.read(index, view), segmenter.encode(pixels), strict=True):
                torch.testing.assert_close(got, expected[0], rtol=1e-4, atol=1e-4)


def test_data_sets_give_features_in_place_of_images(split: Path, segmenter: Segmenter, sam_file: Path) -> None:
    data, pixels = (SemanticDataset(NpyFolder(split), seed=3) for _ in range(2))
    cache = prepare(split, segmenter, sam_file, num_views=2)
    data.use(cache, takes_pixels=False)
    for index in range(len(data)):  # some are mirrored
        features = segmenter.encode(pixels[index]["image"].permute(2, 0, 1)[None])
        torch.testing.assert_close(data[index]["features"][0], features[0][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(data[index]["labels"], pixels[index]["labels"])
        assert "image" not in data[index]
    val = EvaluationDataset(NpyFolder(split), None)
    val.use(cache, takes_pixels=False)
    batch = collate_evaluation([val[0], val[1]])
    assert torch.equal(batch["features"][0][1], cache.read(1)[0])


def test_what_is_there_is_not_encoded_again(
    split: Path, segmenter: Segmenter, sam_file: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = prepare(split, segmenter, sam_file)
    assert "encoding 7 images once" in capsys.readouterr().out
    encoded.clear()
    prepare(split, segmenter, sam_file)
    assert encoded == []
    assert capsys.readouterr().out == ""
    entry_path(cache.folder, cache.entries[3][0]).unlink()
    prepare(split, segmenter, sam_file)
    assert encoded == [1, 1]  # an empty image, to tell the time by, and the one that lacked
    prepare(split, segmenter, sam_file, num_views=2)
    assert "7 entries are without the requested views" in capsys.readouterr().out


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [flip_byte, lambda path: path.write_bytes(path.read_bytes()[:-10]), lambda path: path.write_bytes(b"")]
)
def test_damage_is_found_and_mended(
    damage: Callable[[Path], object],
    split: Path,
    segmenter: Segmenter,
    sam_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = prepare(split, segmenter, sam_file)
    before = [tensor.clone() for tensor in cache.read(5)]
    damage(entry_path(cache.folder, cache.entries[5][0]))
    capsys.readouterr()
    prepare(split, segmenter, sam_file)
    assert "1 of 7 entries are damaged\n" in capsys.readouterr().out
    for got, expected in zip(cache.read(5), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_entry_whose_views_are_nested_too_deeply_is_damaged(
    split: Path, segmenter: Segmenter, sam_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = prepare(split, segmenter, sam_file)
    path = entry_path(cache.folder, cache.entries[0][0])
    tensors, metadata = read_tensors(path) or ({}, {})
    write_tensors(path, tensors, {**metadata, "views_are": "[" * 100_000})
    prepare(split, segmenter, sam_file)
    assert "1 of 7 entries are damaged\n" in capsys.readouterr().out


@pytest.mark.parametrize("call", ["safe_open", "os.stat"])
def test_what_the_system_says_of_an_entry_is_no_damage(
    split: Path,
    segmenter: Segmenter,
    sam_file: Path,
    tmp_path: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    cache = prepare(split, segmenter, sam_file, where=str(tmp_path / "cache"))
    assert cache is not None
    entry = entry_path(cache.folder, cache.entries[0][0])
    before = entry.read_bytes()
    real: Callable[..., Any] = os.stat if call == "os.stat" else safe_open
    encoded.clear()

    def refuse(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if str(path) == str(entry):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        for module in ("utils.cache.reader", "utils.model.tensor_files"):
            patch.setattr(f"{module}.{call}" if call == "safe_open" else call, refuse)
            patch.setattr(f"{module}.require_readable", lambda path: open_refused(path))
        with pytest.raises(UnreadableError, match=rf"{entry}: cannot be read \(Input/output error\)"):
            prepare(split, segmenter, sam_file, where=str(tmp_path / "cache"))
        if call != "os.stat":
            with pytest.raises(UnreadableError, match=rf"{entry}: cannot be read \(Input/output error\)"):
                cache.read(0)
    assert not encoded and entry.read_bytes() == before


def open_refused(path: Path) -> None:
    raise cannot_be_read(path, OSError(errno.EIO, "Input/output error"))


def test_an_image_that_changed_is_encoded_again(
    split: Path, segmenter: Segmenter, sam_file: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = prepare(split, segmenter, sam_file)
    path = NpyFolder(split).image_path(2)
    encoded.clear()
    os.utime(path)  # the same picture with another time is the same picture
    prepare(split, segmenter, sam_file)
    assert encoded == []
    np.save(path, np.load(path)[::-1].copy())
    os.utime(path, ns=(1, 1))
    before = cache.read(2)[0].clone()
    changed = prepare(split, segmenter, sam_file)
    assert "1 of 7 entries are of images that have changed since" in capsys.readouterr().out
    assert not torch.allclose(changed.read(2)[0], before, atol=1e-2)
    with pytest.raises(UserError, match="was replaced while it was in use"):
        cache.read(2)  # as a run would that goes on with the old picture


def test_another_split_of_the_same_names_sizes_and_dates_is_another(
    npy: Path, segmenter: Segmenter, sam_file: Path, tmp_path: Path, encoded: list[int]
) -> None:
    """As archives hold them that give all files one date."""
    splits = [shutil.copytree(npy / "train", tmp_path / name / "train") for name in ("one", "two")]
    for index, split in enumerate(splits):
        for path in (split / "imgs").iterdir():
            np.save(path, np.roll(np.load(path), 8 * index, axis=0))
            os.utime(path, ns=(1, 1))
    caches = []
    for split in splits:
        encoded.clear()
        caches.append(prepare(split, segmenter, sam_file, str(tmp_path / "cache")))
        assert sum(encoded) == 8  # an empty image and all of the split
    image = torch.from_numpy(NpyFolder(splits[1]).read_image(0)).permute(2, 0, 1)[None]
    torch.testing.assert_close(caches[1].read(0)[0], segmenter.encode(image)[0][0], rtol=1e-4, atol=1e-4)


def test_a_cache_that_moves_with_its_images_reads_none_of_them(
    split: Path, segmenter: Segmenter, sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(split, segmenter, sam_file)
    split.parent.rename(tmp_path / "moved")

    def refuse(*_: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(NpyFolder, "read_image", refuse)
    prepare(tmp_path / "moved" / "train", segmenter, sam_file)


def test_entries_of_older_versions_which_record_no_path(
    split: Path, segmenter: Segmenter, sam_file: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        signature = Request.signature
        older.setattr(Request, "signature", lambda *arguments: signature(*arguments).rsplit(" ", 1)[0])
        prepare(split, segmenter, sam_file)
    encoded.clear()
    prepare(split, segmenter, sam_file)
    assert encoded == []


@pytest.mark.parametrize(
    "key, value",
    [("sam_sha256", "0" * 64), ("resize_mode", "pad"), ("stored_in", "float16"), ("format_version", 1)],
)
def test_a_cache_of_something_else_is_refused_with_the_reason(
    key: str, value: Any, split: Path, segmenter: Segmenter, sam_file: Path, tmp_path: Path, encoded: list[int]
) -> None:
    prepare(split, segmenter, sam_file, str(tmp_path / "cache"))
    encoded.clear()
    with pytest.raises(UserError, match=rf"a cache with a different {key};"):
        prepare(split, segmenter, sam_file, str(tmp_path / "cache"), **{key: value})
    prepare(split, segmenter, sam_file)  # beside the images each kind has a folder of its own
    assert len(encoded) > 1


def test_an_entry_of_another_cache_is_noticed(
    split: Path, segmenter: Segmenter, sam_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = prepare(split, segmenter, sam_file)
    theirs = prepare(split, segmenter, sam_file, str(tmp_path / "cache"), sam_sha256="0" * 64)
    shutil.copy(entry_path(theirs.folder, theirs.entries[0][0]), entry_path(mine.folder, mine.entries[0][0]))
    capsys.readouterr()
    prepare(split, segmenter, sam_file)
    assert "1 of 7 entries are of another cache" in capsys.readouterr().out


def test_folders_that_cannot_be_a_cache(
    split: Path, segmenter: Segmenter, sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="not empty and not a cache"):
        prepare(split, segmenter, sam_file, str(tmp_path / "full"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"cache\.json: not JSON .*; delete"):
        prepare(split, segmenter, sam_file, str(tmp_path / "damaged"))
    monkeypatch.setattr(writer, "FREE_GIB", 1 << 30)
    with pytest.raises(UserError, match=r"the cache needs .* GiB of disk"):
        prepare(split, segmenter, sam_file, str(tmp_path / "new"))
    assert not list((tmp_path / "new" / "train").glob("*.safetensors"))


def test_what_a_killed_run_left_does_not_count(split: Path, segmenter: Segmenter, sam_file: Path) -> None:
    root = split.parent / "cache"
    root.mkdir()
    (root / ".cache.json.123.tmp").touch()
    (root / lock.LOCK).touch()
    prepare(split, segmenter, sam_file, str(root))
    assert {path.name for path in root.iterdir()} == {"cache.json", "train", lock.LOCK}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_a_lock_temporaries_stay(
    number: int, split: Path, segmenter: Segmenter, sam_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    root = split.parent / "cache"
    root.mkdir()
    (root / ".cache.json.123.tmp").touch()  # which may be that of a run at work
    prepare(split, segmenter, sam_file, str(root))
    assert (root / ".cache.json.123.tmp").exists()


def test_a_cache_that_may_only_be_read_serves(
    split: Path, segmenter: Segmenter, sam_file: Path, tmp_path: Path, encoded: list[int]
) -> None:
    try:
        with small_disk(tmp_path / "disk", 2048) as disk:
            prepare(split, segmenter, sam_file, str(disk / "cache"))
            (disk / "cache" / lock.LOCK).unlink()  # as in a cache of a version without locks
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            encoded.clear()
            cache = prepare(split, segmenter, sam_file, str(disk / "cache"))
            assert encoded == [] and cache.read(0)[0].isfinite().all()
            with lock.exclusive(disk / "cache") as has_lock:
                assert not has_lock
            del cache
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_auto_goes_on_without_where_the_disk_has_no_room(
    split: Path, sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer, "FREE_GIB", 1 << 30)
    train(split, sam_file, tmp_path, "--cache_embeddings", "auto", "-num_epochs", 2)
    assert "continuing without a cache" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["auto", "folder"])
def test_what_cannot_be_written_stops_only_who_asked_for_it(
    where: str, split: Path, segmenter: Segmenter, sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = segmenter.encode
    monkeypatch.setattr(segmenter, "encode", lambda images: tuple(feature * 1e9 for feature in encode(images)))
    requests = [Request(NpyFolder(split), num_views=1, passes=100)] * 2
    if where == "auto":
        assert prepare_requests(requests, segmenter, sam_file, "auto") == [None, None]
    else:
        with pytest.raises(UserError, match="its features are not finite in float16"):
            prepare_requests(requests, segmenter, sam_file, str(tmp_path / "cache"))


def test_the_projection_is_fitted_to_the_first_split_or_not_at_all(
    npy: Path, split: Path, segmenter: Segmenter, sam_file: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    source, val = NpyFolder(split), NpyFolder(shutil.copytree(npy / "val", split.parent / "val"))
    root = split.parent / "embeddings"
    requests = [Request(source, num_views=4, passes=4), Request(val, num_views=1, passes=100)]
    assert prepare_requests(requests, segmenter, sam_file, "auto") == [None, None]
    assert not root.exists()
    assert (
        "no cache of features: to encode 4 views of each image costs no less than to encode the images of 4 epochs"
        in capsys.readouterr().out
    )
    requests[0] = Request(source, num_views=4, passes=5)
    assert all(prepare_requests(requests, segmenter, sam_file, "auto"))
    assert sum(encoded) == (1 + 7 + 4 * 7) + (1 + 3)  # an empty image first; fitted to the first split, once


def test_auto_reads_for_one_pass_only_what_is_whole(
    split: Path, segmenter: Segmenter, sam_file: Path, encoded: list[int]
) -> None:
    cache = prepare(split, segmenter, sam_file, dtype="float16")
    once = [Request(NpyFolder(split), num_views=1, passes=1)]
    assert all(prepare_requests(once, segmenter, sam_file, "auto"))
    missing = entry_path(cache.folder, cache.entries[3][0])
    missing.unlink()
    encoded.clear()
    assert prepare_requests(once, segmenter, sam_file, "auto") == [None]
    assert encoded == [] and not missing.exists()


def test_auto_does_not_go_on_without_a_cache_where_a_loader_process_was_lost(
    split: Path, segmenter: Segmenter, sam_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*args: Any, **options: Any) -> None:
        raise LostWorkerError("a loader process has ended")

    monkeypatch.setattr(writer, "Loader", lost)
    with pytest.raises(LostWorkerError):
        prepare(split, segmenter, sam_file, "auto")


def test_machines_without_a_common_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second process is played: it sees what the first one wrote, or does not.
    monkeypatch.setattr(lock.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(lock.distributed, "all_gather", lambda value: [value, True])
    lock.require_shared_disk(tmp_path, "cache.json")
    monkeypatch.setattr(lock.distributed, "all_gather", lambda value: [value, False])
    with pytest.raises(UserError, match="process 1 of 2 does not see what process 0 writes there"):
        lock.require_shared_disk(tmp_path, "cache.json")
    assert not list(tmp_path.iterdir())


def test_processes_wait_for_each_other_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SECONDS_PER_ROUND", -1.0)
    done: list[int] = []
    gathered: list[object] = []

    def gather(value: object) -> list[object]:
        gathered.append(value)
        return [value]

    def work(fails: bool) -> Generator[None, None, None]:
        for number in range(3):
            done.append(number)
            yield
        if fails:
            raise UserError("no room")

    monkeypatch.setattr(lock.distributed, "all_gather", gather)
    lock.in_rounds(work(False))
    assert done == [0, 1, 2] and gathered == [False, False, False, True]
    with pytest.raises(UserError, match="no room"):
        lock.in_rounds(work(True))
    monkeypatch.setattr(lock.distributed, "all_gather", lambda value: [value, UserError("theirs")])
    with pytest.raises(UserError, match="theirs"):
        lock.in_rounds(work(False))
    monkeypatch.setattr(lock.distributed, "launcher_has_ended", lambda: True)
    with pytest.raises(Interrupted, match="the launcher has ended"):
        lock.in_rounds(work(False))


@pytest.mark.slow
def test_whether_there_is_a_cache_is_part_of_the_run(
    split: Path, sam_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = training_flags(split, sam_file, tmp_path / "work")
    run_script(train_bdd100k, *common, "-num_epochs", 1, "-task_name", "plain")
    (plain,) = (tmp_path / "work").glob("plain*")
    run_script(train_bdd100k, *common, "-num_epochs", 2, "--resume", plain)  # where a new run would write a cache
    said = capsys.readouterr().out
    assert "the run has no cache of features, and resumes without one" in said and "features are read" not in said
    assert "--cache_embeddings off" not in said  # of which the command to evaluate knows nothing
    with pytest.raises(UserError, match="the run has no cache of features; give --cache_embeddings off"):
        run_script(train_bdd100k, *common, "-num_epochs", 3, "--resume", plain, "--cache_embeddings", tmp_path / "c")
    assert not (tmp_path / "c").exists()  # told before anything is encoded
    run_script(train_bdd100k, *common, "-num_epochs", 2, "-task_name", "cached")
    (cached,) = (tmp_path / "work").glob("cached*")
    shutil.rmtree(split.parent / "embeddings")  # it is made again
    run_script(train_bdd100k, *common, "-num_epochs", 3, "--resume", cached)
    for flags, message in (
        (["--cache_embeddings", "off"], "the run reads features from a cache; give its --cache_embeddings"),
        (["--cache_dtype", "float32"], "--cache_dtype is float32, but the run has float16"),
    ):
        before = sorted((split.parent / "embeddings").iterdir())
        with pytest.raises(UserError, match=message):
            run_script(train_bdd100k, *common, "-num_epochs", 4, "--resume", cached, *flags)
        assert sorted((split.parent / "embeddings").iterdir()) == before


def train(split: Path, sam_file: Path, tmp_path: Path, *flags: object) -> Checkpoint:
    """Train on a split, which is validated on too; returns `latest`."""
    work_dir = tmp_path / f"work{len(list(tmp_path.glob('work*')))}"
    common = [*training_flags(split, sam_file, work_dir), "--val_npy_path", split, "-lr", "1e-3", "--device", "cpu"]
    run_script(train_bdd100k, *common, *flags)
    (folder,) = work_dir.iterdir()
    return checkpoint.load_checkpoint(folder / checkpoint.LATEST)


@pytest.mark.parametrize("prompt_mode", ["box", "semantic"])
@pytest.mark.slow
def test_training_from_the_cache_gives_the_weights_of_training_without(
    prompt_mode: str, split: Path, sam_file: Path, tmp_path: Path
) -> None:
    # As --augment full draws from fixed views with a cache, and anew without.
    flags = ["--prompt_mode", prompt_mode, "-num_epochs", 2, "-batch_size", 4, "--grad_acc_steps", 1]
    flags += ["--augment", "flip"]
    plain, exact, half = (
        train(
            split,
            sam_file,
            tmp_path,
            *flags,
            "--cache_embeddings",
            tmp_path / f"{dtype}" if dtype else "off",
            "--cache_dtype",
            dtype or "float16",
        )
        for dtype in ("", "float32", "float16")
    )
    # All of them at once: what has no gradient, such as a key's bias, moves by the sign of rounding alone.
    weights, expected = (torch.cat([v.flatten() for v in state["model"].values()]) for state in (exact, plain))
    assert (weights - expected).norm() <= 1e-4 * expected.norm()
    assert exact["metrics"]["val_miou"] == pytest.approx(plain["metrics"]["val_miou"], abs=1e-4)
    assert half["metrics"]["train_loss"] == pytest.approx(plain["metrics"]["train_loss"], rel=1e-2)
    # Blocks are reduced in semantic mode, and its first steps move a mIoU of so few pixels more.
    bound = 2e-3 if prompt_mode == "box" else 1e-2
    assert half["metrics"]["val_miou"] == pytest.approx(plain["metrics"]["val_miou"], abs=bound)


@pytest.mark.slow
def test_inference_writes_no_cache_that_spares_nothing_and_reads_one_that_is_there(
    npy: Path, sam_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(npy, tmp_path / "npy", ignore=shutil.ignore_patterns("embeddings"))
    flags = good_flags(sam_file, data, tmp_path)
    run_script(infer_bdd100k, *flags)
    assert {path.name for path in data.iterdir()} == {"train", "val"}
    assert "features are read" not in capsys.readouterr().out
    plain = read_results(tmp_path / "out")["miou"]
    run_script(infer_bdd100k, *flags, "--cache_embeddings", tmp_path / "cache", "--cache_dtype", "float32")
    assert f"val: features are read from {tmp_path / 'cache' / 'val'}" in capsys.readouterr().out
    assert read_results(tmp_path / "out")["miou"] == pytest.approx(plain, abs=1e-4)
    train(data / "val", sam_file, tmp_path, "-num_epochs", 3)  # by default it writes one
    capsys.readouterr()
    run_script(infer_bdd100k, *flags)
    assert f"val: features are read from {data / 'embeddings'}" in capsys.readouterr().out
    assert read_results(tmp_path / "out")["miou"] == pytest.approx(plain, abs=2e-3)


@pytest.mark.slow
def test_auto_says_that_it_does_not_read_what_is_not_whole(
    split: Path, sam_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = split.parent.rename(tmp_path / "with spaces") / split.name
    train(split, sam_file, tmp_path, "-num_epochs", 2)
    (entry, *_) = sorted(split.parent.glob("embeddings/*/train/*.safetensors"))
    entry.write_bytes(b"")
    capsys.readouterr()
    train(split, sam_file, tmp_path, "-num_epochs", 1)
    said = capsys.readouterr().out
    assert "train: 1 of 7 entries are damaged\n" in said
    assert "train: not read, as 1 of 7 images have no valid entry; to complete it, set " in said
    assert f"set --cache_embeddings '{entry.parents[1]}'\n" in said
    assert "features are read" not in said and not entry.read_bytes()
    train(split, sam_file, tmp_path, "-num_epochs", 3, "--augment", "full", "--cache_views", 3)
    said = capsys.readouterr().out
    assert "train: not read, as 7 of 7 images" in said and "features are read" not in said
    flags = ["-num_epochs", 1, "--cache_embeddings", entry.parents[1]]  # as was said
    train(split, sam_file, tmp_path, *flags)
    assert "features are read" in capsys.readouterr().out and entry.read_bytes()


def test_auto_writes_nothing_for_a_single_epoch(split: Path, sam_file: Path, tmp_path: Path) -> None:
    train(split, sam_file, tmp_path, "-num_epochs", 1)
    assert not (split.parent / "embeddings").exists()


@pytest.fixture
def reduced(split: Path, segmenter: Segmenter, sam_file: Path) -> EmbeddingCache:
    return prepare(split, segmenter, sam_file, dtype="float16", num_views=2)


def test_in_float16_blocks_are_reduced_and_restored(
    reduced: EmbeddingCache, split: Path, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.from_numpy(NpyFolder(split).read_image(2))[None].permute(0, 3, 1, 2)
    raw = segmenter.encode(image)
    stored = reduced.read(2)
    assert [tensor.dtype for tensor in stored] == [torch.float16, torch.uint8, torch.float32]
    assert sum(tensor.nbytes for tensor in stored) < 0.3 * sum(tensor.nbytes for tensor in raw) / 2
    monkeypatch.setattr(segmenter, "feature_pca", reduced.feature_pca)
    restored = segmenter.restore(tuple(tensor[None] for tensor in stored))
    assert [tensor.shape for tensor in restored] == [tensor.shape for tensor in raw]
    with torch.no_grad():
        masks, expected = (segmenter(segmenter.inputs(image, features))[0] for features in (restored, raw))
    torch.testing.assert_close(masks, expected, rtol=0.02, atol=0.02)


def test_all_splits_of_a_cache_share_one_projection(
    reduced: EmbeddingCache, npy: Path, split: Path, segmenter: Segmenter, sam_file: Path, encoded: list[int]
) -> None:
    projection = reduced.folder.parent / "projection.safetensors"
    before = projection.read_bytes()
    val = shutil.copytree(npy / "val", split.parent / "val")
    cache = prepare(val, segmenter, sam_file, dtype="float16")  # as a run of infer_bdd100k.py would
    assert cache.folder.parent == reduced.folder.parent and cache.identity == reduced.identity
    assert encoded == [1, 3]  # an empty image to tell the time by, and the split: nothing was fitted
    assert projection.read_bytes() == before


def test_a_damaged_projection_is_noticed(
    reduced: EmbeddingCache, split: Path, segmenter: Segmenter, sam_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    projection = reduced.folder.parent / "projection.safetensors"
    before = load(projection.read_bytes())  # the order of the metadata is left to chance
    flip_byte(projection)
    capsys.readouterr()
    prepare(split, segmenter, sam_file, dtype="float16", num_views=2)
    printed = capsys.readouterr().out
    assert "projection.safetensors: damaged or of another cache" in printed
    assert "7 of 7 entries are of another cache" in printed
    after = load(projection.read_bytes())  # fitted to the same images, it is the same
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_an_entry_that_is_replaced_in_use_is_not_read(
    reduced: EmbeddingCache, split: Path, segmenter: Segmenter, sam_file: Path, tmp_path: Path
) -> None:
    foreign = prepare(split, segmenter, sam_file, str(tmp_path / "cache"), dtype="float16", resize_mode="pad")
    shutil.copy(entry_path(foreign.folder, foreign.entries[0][0]), entry_path(reduced.folder, reduced.entries[0][0]))
    with pytest.raises(UserError, match="was replaced while it was in use"):
        reduced.read(0)


@pytest.mark.parametrize("resize_mode", ["stretch", "pad"])
@pytest.mark.slow
def test_random_views_are_those_that_the_labels_say(
    resize_mode: str, scenes: Path, segmenter: Segmenter, sam_file: Path, tmp_path: Path
) -> None:
    flags = ["--bdd100k_root", scenes, "--output_path", tmp_path, "--image_size", IMAGE_SIZE, "--splits", "train"]
    run_script(pre_bdd100k, *flags, "--resize_mode", resize_mode, "--image_dtype", "uint8", "--num_workers", 1)
    source = NpyFolder(tmp_path / "train")
    data = SemanticDataset(source, seed=3, augment="full", num_views=4)
    data.cache = prepare(source.folder, segmenter, sam_file, num_views=4)
    seen = set()
    for epoch in range(3):
        data.set_epoch(epoch)
        for index in range(len(data)):
            sample = data[index]
            numbers = [n for n in range(4) if torch.equal(sample["features"][0], data.cache.read(index, n)[0])]
            assert len(numbers) == 1
            view = fixed_view(sample["name"], numbers[0])
            size = source.fitted_size(index)
            assert np.array_equal(sample["labels"], view.labels(source.read_labels(index), size))
            image = view.image(source.read_image(index), size)
            assert torch.equal(sample["image"], image)  # the pixels that the decoder sees beside the features
            encoded = segmenter.encode(image.permute(2, 0, 1)[None])
            torch.testing.assert_close(sample["features"][0], encoded[0][0], rtol=1e-4, atol=1e-4)
            seen.add(numbers[0])
    assert seen == {0, 1, 2, 3}


def test_entries_of_other_views_are_made_anew(
    split: Path,
    segmenter: Segmenter,
    sam_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(split, segmenter, sam_file, num_views=3)
    monkeypatch.setattr("utils.data.augment.MIN_CROP_AREA", 0.3)
    capsys.readouterr()
    prepare(split, segmenter, sam_file, num_views=2)  # these are as they were
    assert capsys.readouterr().out == ""
    prepare(split, segmenter, sam_file, num_views=3)
    assert "7 entries are without the requested views" in capsys.readouterr().out


def test_two_splits_of_one_name_do_not_share_a_cache(split: Path, sam_file: Path, tmp_path: Path) -> None:
    other = shutil.copytree(split, tmp_path / "other" / "train")
    with pytest.raises(UserError, match="have the same name"):
        train(split, sam_file, tmp_path, "--val_npy_path", other, "--cache_embeddings", tmp_path / "cache")


def test_a_second_run_waits_for_the_first(
    reduced: EmbeddingCache,
    split: Path,
    segmenter: Segmenter,
    sam_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = reduced.folder.parent
    handle = os.open(root / lock.LOCK, os.O_RDWR)  # as the version before this one takes it
    fcntl.flock(handle, fcntl.LOCK_EX)
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        os.close(handle)  # the first run ends

    monkeypatch.setattr(lock, "SECONDS_PER_TRY", 0.01)
    monkeypatch.setattr(lock.distributed, "say", say)
    prepare(split, segmenter, sam_file, dtype="float16", num_views=2)
    assert said == [f"{root}: another run is writing this cache; waiting for it to finish"]


def test_the_lock_of_a_killed_run_is_released_at_once(tmp_path: Path) -> None:
    """Though its loader processes, which were forked while it had the lock, live a little longer."""
    script = (
        "import os, sys, time; from pathlib import Path; from utils.cache.lock import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child: print(child, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        child = int(run.stdout.readline())
        try:
            with pytest.raises(Timeout):
                FileLock(tmp_path / lock.LOCK).acquire(timeout=0)
            run.kill()
            run.wait()
            with lock.exclusive(tmp_path) as has_lock:
                assert has_lock
                os.kill(child, 0)  # it is still there
        finally:
            run.kill()
            os.kill(child, signal.SIGKILL)


# How far the run has come when it is killed: the files of its cache that there are by then.
@pytest.mark.parametrize("until", ["cache.json", "projection.safetensors", "train/*.safetensors"])
@pytest.mark.slow
def test_a_killed_caching_run_goes_on_where_it_was(
    until: str, split: Path, segmenter: Segmenter, sam_file: Path, encoded: list[int]
) -> None:
    script = (
        "import sys, torch; from pathlib import Path; from tests.cache.test_cache import *;"
        "torch.set_num_threads(1); split, sam = map(Path, sys.argv[1:]);"
        "model = build_model('vit_tiny', sam, image_size=IMAGE_SIZE, prompt_mode='semantic');"
        "prepare(split, model, sam, dtype='float16')"
    )
    process = subprocess.Popen([sys.executable, "-c", script, split, sam_file], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    folder = split.parent / "embeddings"
    while time.monotonic() < deadline and process.poll() is None and not list(folder.glob(f"*/{until}")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written, fitted = len(list(folder.glob("*/train/*.safetensors"))), bool(list(folder.glob("*/projection.*")))
    assert list(folder.glob(f"*/{until}"))
    projection = [path.read_bytes() for path in folder.glob("*/projection.*")]
    cache = prepare(split, segmenter, sam_file, dtype="float16")
    left = len(cache.entries) - written
    assert sum(encoded) == (1 if left else 0) + (0 if fitted else 7) + left  # an empty image first
    if fitted:
        assert [path.read_bytes() for path in folder.glob("*/projection.*")] == projection
    assert not list(split.parent.rglob(".*.tmp"))
    assert [len(cache.read(i)) for i in range(len(cache.entries))] == [3] * 7
