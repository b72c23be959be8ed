"""manifest.json: what is written is read back, and nothing else is taken for one."""

import hashlib
import json
from typing import Any

import pytest

from utils.data.classes import BDD100K
from utils.data.description import load_description
from utils.data.manifest import FORMAT_VERSION, Manifest, ManifestItem, read_manifest, source_of
from utils.runtime.errors import UserError

BAD_SOURCES: list[Any] = [[], {"a": 3}, {"a": ["b"]}, {"a": [["b", 1]]}, {"a": [["b", 1, 1.5]]}]
BAD_NAMES: list[Any] = ["../a", "/etc/a", "", "..", "a/b", 3]


def manifest(**changes):
    items = [ManifestItem("a", 720, 1280, [5, *[0] * 17, 4], 1015), ManifestItem("b", 8, 9, [0] * 19, 1024)]
    fields = {"image_size": 32, "image_dtype": "float16", "resize_mode": "pad", "labelled": True, "complete": True}
    return Manifest(**{**fields, "items": items, **changes})


def test_round_trip(tmp_path):
    manifest().write(tmp_path)
    assert read_manifest(tmp_path) == manifest()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_frame_that_is_no_square(tmp_path):
    wide = manifest(image_size="16x64")  # 1,024 pixels, as the items count
    wide.write(tmp_path)
    assert read_manifest(tmp_path) == wide
    assert json.loads((tmp_path / "manifest.json").read_text())["image_size"] == "16x64"


def test_the_file_of_a_square_is_that_of_earlier_versions(tmp_path):
    """To the byte, as the version before there were other frames wrote it."""
    manifest(items=[ManifestItem("a", 720, 1280, [5, *[0] * 17, 4], 1015)]).write(tmp_path)
    written = hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert written == "389c2e7d482b5c67100393266432635546b3a85a5d23c68ea4c3f26f8411cbe5"


def test_sources_round_trip_and_older_files_have_none(tmp_path):
    sources = {"a": [["/data/a.jpg", 7, 10**18 + 1], ["/data/a.png", 8, 0]]}
    manifest(sources=sources).write(tmp_path)
    assert read_manifest(tmp_path).sources == sources
    manifest().write(tmp_path)
    assert "sources" not in json.loads((tmp_path / "manifest.json").read_text())
    assert read_manifest(tmp_path).sources is None


def test_another_data_set(tmp_path):
    """Of BDD100K's classes, so that the items fit; a damaged description is refused."""
    plain = load_description("folders").to_plain()
    other = manifest(dataset=plain)
    other.write(tmp_path)
    assert read_manifest(tmp_path) == other
    assert read_manifest(tmp_path).description == load_description("folders")
    assert manifest().classes is BDD100K and manifest().description == load_description("bdd100k")
    classes = [{**c, "name": "street"} if c["name"] == "road" else c for c in plain["classes"]]
    for wrong in ({}, {**plain, "name": "../x"}, {**plain, "classes": classes}, {**plain, "layout": []}):
        manifest(dataset=wrong).write(tmp_path)
        with pytest.raises(UserError, match=r"not a manifest of pre_bdd100k\.py"):
            read_manifest(tmp_path)


def test_a_source_is_the_file_that_a_link_leads_to(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "link").symlink_to("a")
    assert (
        source_of(tmp_path / "link")
        == source_of(tmp_path / "a")
        == [str(tmp_path / "a"), 3, (tmp_path / "a").stat().st_mtime_ns]
    )
    with pytest.raises(FileNotFoundError):
        source_of(tmp_path / "b")


def test_the_file_as_others_read_it(tmp_path):
    manifest().write(tmp_path)
    fields = json.loads((tmp_path / "manifest.json").read_text())
    assert fields["format_version"] == FORMAT_VERSION == 1
    assert fields["class_names"] == list(BDD100K.names)
    assert (fields["image_size"], fields["image_dtype"], fields["resize_mode"]) == (32, "float16", "pad")
    assert fields["items"][0] == {
        "name": "a",
        "height": 720,
        "width": 1280,
        "pixels": [5, *[0] * 17, 4],
        "ignored": 1015,
    }


def test_unlabelled_round_trip(tmp_path):
    unlabelled = manifest(labelled=False, items=[ManifestItem("a", 720, 1280, [], 0)])
    unlabelled.write(tmp_path)
    assert read_manifest(tmp_path) == unlabelled


def test_a_stopped_run_is_told_apart(tmp_path):
    manifest(complete=False, items=[]).write(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json: .*stopped before its end; run pre_bdd100k\.py again"):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, allow_incomplete=True).image_size == 32


def test_missing(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"manifest\.json: no such file; .* was not written by pre_bdd100k\.py"):
        read_manifest(tmp_path)


def test_the_folder_above_the_splits(tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        manifest().write(tmp_path / name)
    with pytest.raises(UserError, match=f"holds splits; give one of them, such as {tmp_path}/train$"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"format_version": 1}', '{"format_version": 1, "items": 3}']
)
def test_not_a_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(
        UserError, match=r"manifest\.json: not (JSON .*|a manifest of pre_bdd100k\.py); run pre_bdd100k"
    ):
        read_manifest(tmp_path)


def test_another_format_version(tmp_path):
    manifest(format_version=2).write(tmp_path)
    with pytest.raises(UserError, match="format 2, this version reads 1"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 0},
        *[{"image_size": size} for size in ("32", "32x32", "32x", "x", "0x32", "32x5000", "032x64", 32.0, [32, 64])],
        {"image_size": "31x33"},  # one pixel less than its items count
        {"image_dtype": "object"},
        {"resize_mode": "crop"},
        {"class_names": ["road"]},
        {"labelled": False},  # though its items count pixels
        {"items": [ManifestItem("a", 720, 1280, [0] * 18, 0)]},
        {"items": [ManifestItem("a", 0, 1280, [0] * 19, 0)]},
        *[{"items": [ManifestItem(name, 7, 8, [0] * 19, 0)]} for name in BAD_NAMES],
        *[{"sources": sources} for sources in BAD_SOURCES],
    ],
)
def test_values_that_are_never_written(tmp_path, changes):
    manifest(**changes).write(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of pre_bdd100k\.py"):
        read_manifest(tmp_path)
