"""utils.evaluate.media: pictures and videos are written, found and read back; overlays are looked at."""

from __future__ import annotations

import errno
import io
import itertools
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.data.bdd100k import read_image
from utils.data.classes import BDD100K, IGNORE_LABEL
from utils.evaluate import media
from utils.evaluate.media import (
    Frame,
    ImageFolder,
    OverlayFolder,
    OverlayVideo,
    Video,
    find_source,
    read_ahead,
    refuse_overwriting,
    write_behind,
)
from utils.evaluate.plots import overlay
from utils.runtime.errors import UnreadableError, UserError

RED, GREEN, BLUE = (200, 30, 40), (20, 180, 60), (30, 50, 210)
ROOT = Path(__file__).parents[2]
draw = partial(overlay, classes=BDD100K)


def picture(height: int, width: int, color: tuple[int, int, int] = BLUE) -> np.ndarray:
    """Of one colour, but red in its upper left quarter."""
    pixels = np.full((height, width, 3), color, dtype=np.uint8)
    pixels[: height // 2, : width // 2] = RED
    return pixels


def write_picture(path: Path, pixels: np.ndarray, mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def drive(count: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """Frames in which a red rectangle moves to the right over green."""
    frames = []
    for i in range(count):
        pixels = np.full((height, width, 3), GREEN, dtype=np.uint8)
        pixels[16:32, 2 * i : 2 * i + 16] = RED
        frames.append(pixels)
    return frames


def write_video(path: Path, frames: list[np.ndarray], codec: str = "mp4v", fps: float = 10) -> Path:
    size = frames[0].shape[1], frames[0].shape[0]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, size)
    assert writer.isOpened()
    for pixels in frames:
        writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def write_mjpeg(path: Path, frames: list[np.ndarray]) -> Path:
    """A bare stream of JPEGs: no header, and any size, odd ones too."""
    stream = io.BytesIO()
    for pixels in frames:
        Image.fromarray(pixels).save(stream, format="JPEG", quality=95)
    path.write_bytes(stream.getvalue())
    return path


def images_of(source: ImageFolder | Video) -> dict[str, np.ndarray]:
    images = {}
    for name, image in source:
        assert isinstance(image, np.ndarray), image
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        images[name] = image
    return images


def names_of(spec: Path | str) -> dict[str, str]:
    source = find_source(str(spec))
    assert isinstance(source, ImageFolder)
    return {name: path.name for name, path in source.pictures.items()}


def error_of(spec: Path | str) -> str:
    with pytest.raises(UserError) as error:
        find_source(str(spec))
    message = str(error.value)
    assert "\n" not in message and str(spec) in message
    return message


def near(image: np.ndarray, expected: np.ndarray | tuple[int, int, int], tolerance: int = 12) -> bool:
    return bool((np.abs(image.astype(int) - np.asarray(expected, dtype=int)) <= tolerance).all())


def test_folder_gives_its_pictures_of_any_size_by_name(tmp_path: Path) -> None:
    write_picture(tmp_path / "b.JPG", picture(30, 50))
    write_picture(tmp_path / "a.jpeg", picture(71, 33))
    write_picture(tmp_path / "c.png", picture(8, 200))
    write_picture(tmp_path / "._b.jpg", picture(8, 8))  # as macOS packs them
    write_picture(tmp_path / "below" / "d.jpg", picture(8, 8))
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    source = find_source(str(tmp_path))
    assert isinstance(source, ImageFolder)
    assert source.count == 3
    images = images_of(source)
    assert {name: image.shape[:2] for name, image in images.items()} == {"a": (71, 33), "b": (30, 50), "c": (8, 200)}
    assert list(images) == ["a", "b", "c"]
    assert (images["c"] == picture(8, 200)).all()
    assert near(images["b"][2, 2], RED) and near(images["b"][28, 48], BLUE)


def test_one_picture_is_a_source(tmp_path: Path) -> None:
    source = find_source(str(write_picture(tmp_path / "one[1].PNG", picture(6, 9))))  # no pattern, though it looks so
    assert source.count == 1
    assert list(images_of(source)) == ["one[1]"]


def test_grey_alpha_and_palette_pictures_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "LA", "RGBA", "P", "1"):
        write_picture(tmp_path / f"{mode}.png", picture(20, 30), mode)
    write_picture(tmp_path / "cmyk.jpg", picture(20, 30), "CMYK")
    images = images_of(find_source(str(tmp_path)))
    assert len(images) == 6
    assert (images["RGBA"] == picture(20, 30)).all()
    assert (images["L"][..., 0] == images["L"][..., 2]).all()
    assert near(images["cmyk"][2, 2], RED, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Stored as a camera held that way stores it, each of the eight shows the same picture."""
    upright = picture(32, 48)
    upright[20:, 30:] = GREEN
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if suffix == ".jpg" else {}
    path = write_picture(tmp_path / f"phone{suffix}", np.ascontiguousarray(stored), exif=exif, **options)
    assert near(images_of(find_source(str(path)))["phone"], upright, 0 if suffix == ".png" else 60)
    assert near(read_image(path), stored, 0 if suffix == ".png" else 60)  # BDD100K's are read as they are stored


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"garbage!", b"MM\0*\0\0\0\x08\0\x05\1"])
def test_damaged_exif_does_not_matter(tmp_path: Path, exif: bytes) -> None:
    path = write_picture(tmp_path / "x.jpg", picture(16, 16), exif=b"Exif\0\0" + exif)
    assert images_of(find_source(str(path)))["x"].shape == (16, 16, 3)


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("city/x1.jpg", "city/x2.jpg", "city/y.jpg", "hills/deep/x3.png", "x0.jpg"):
        write_picture(tmp_path / place, picture(4, 4))
    (tmp_path / "city" / "x1.txt").write_text("notes")
    assert list(names_of(tmp_path / "*" / "x*")) == ["x1", "x2"]
    assert list(names_of(tmp_path / "**" / "x*.*")) == ["x1", "x2", "x3", "x0"]  # sorted by their paths
    assert list(names_of(tmp_path / "city" / "x[2-9].jpg")) == ["x2"]
    monkeypatch.chdir(tmp_path)
    assert list(names_of("*/?.jpg")) == ["y"]
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves ~ alone inside quotes
    assert list(names_of("~/city/y*")) == ["y"]
    assert "matches nothing" in error_of("city/z*.jpg")
    assert "no .jpg, .jpeg, .png" in error_of("city/*.txt")


def test_names_are_unique_and_tell_pictures_apart(tmp_path: Path) -> None:
    for place in ("a/x.jpg", "b/x.jpg", "b/y.jpg", "b/z.jpg", "b/z.png", "b/Z.jpeg"):
        write_picture(tmp_path / place, picture(4, 4))
    source = find_source(f"{tmp_path}/**/*")
    assert isinstance(source, ImageFolder)
    assert {name: str(path.relative_to(tmp_path)) for name, path in source.pictures.items()} == {
        "a_x": "a/x.jpg",
        "b_x": "b/x.jpg",
        "y": "b/y.jpg",
        "b_Z_jpeg": "b/Z.jpeg",
        "b_z_jpg": "b/z.jpg",
        "b_z_png": "b/z.png",
    }
    assert names_of(tmp_path / "b") == {
        "Z_jpeg": "Z.jpeg",
        "x": "x.jpg",
        "y": "y.jpg",
        "z_jpg": "z.jpg",
        "z_png": "z.png",
    }
    write_picture(tmp_path / "a_x.jpg", picture(4, 4))  # the very name that another gets
    names = names_of(f"{tmp_path}/**/*x.jpg")
    assert len(names) == len({name.casefold() for name in names}) == 3
    assert names == names_of(f"{tmp_path}/**/*x.jpg")


def test_what_is_no_source_is_one_clear_error(tmp_path: Path) -> None:
    assert "no such file or folder" in error_of(tmp_path / "none")
    assert "no such file or folder" in error_of("~nobody-of-this-name/x")
    with pytest.raises(UserError, match="no such file"):
        find_source("")  # which pathlib takes for the current folder
    empty, texts = tmp_path / "empty", tmp_path / "texts"
    empty.mkdir()
    texts.mkdir()
    assert "empty folder" in error_of(empty)
    for name in ("a.txt", "b.csv", ".hidden.jpg"):
        (texts / name).write_text("notes\n" * 100)
    assert f"'{texts}/**/*.jpg'" in error_of(texts)
    assert "not a video" in error_of(texts / "a.txt")  # which FFmpeg would draw, letter by letter
    (tmp_path / "a.npy").write_bytes(bytes(5000))
    assert "not a video" in error_of(tmp_path / "a.npy")
    for suffix, kind in (("gif", "GIF"), ("jp2", "JPEG 2000"), ("avif", "AVIF")):  # which may be videos to FFmpeg
        path = write_picture(tmp_path / f"still.{suffix}", picture(16, 16))
        assert f"{kind} is not supported; convert the picture to JPEG" in error_of(path)
    (tmp_path / "damaged.jpg").write_bytes(b"\xff\xd8 and no more")
    assert "JPEG" in error_of(tmp_path / "damaged.jpg")


def test_what_the_system_refuses_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(tmp_path / "in" / "a.jpg", picture(8, 8))
    write_picture(tmp_path / "in" / "b.jpg", picture(8, 8))

    def refuse(path: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("os.listdir", refuse)
        assert error_of(tmp_path / "in") == f"{tmp_path / 'in'}: cannot be read (Permission denied)"
        patch.setattr("glob.glob", lambda *_, **__: [])  # which keeps it to itself
        with pytest.raises(UnreadableError, match=rf"{tmp_path / 'in'}: cannot be read \(Permission denied\)"):
            find_source(str(tmp_path / "in" / "*.jpg"))
    with monkeypatch.context() as patch:
        patch.setattr("os.stat", refuse)
        assert error_of(tmp_path / "in") == f"{tmp_path / 'in'}: cannot be read (Permission denied)"
    stat = os.stat

    def refuse_b(path: Any, *arguments: Any, **keywords: Any) -> Any:
        return refuse(path) if str(path).endswith("b.jpg") else stat(path, *arguments, **keywords)

    with monkeypatch.context() as patch:  # one of many ends no run
        patch.setattr("os.stat", refuse_b)
        read = dict(find_source(str(tmp_path / "in")))
    assert isinstance(read["a"], np.ndarray)
    assert str(read["b"]) == f"{tmp_path / 'in' / 'b.jpg'}: cannot be read (Permission denied)"


def test_damaged_picture_does_not_end_the_run(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        write_picture(tmp_path / f"{name}.jpg", picture(40, 60))
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[:-20])
    (tmp_path / "d.jpg").write_bytes(b"")
    read = dict(find_source(str(tmp_path)))
    assert [name for name, image in read.items() if isinstance(image, UserError)] == ["b", "d"]
    assert list(read) == ["a", "b", "c", "d", "e"]
    assert "b.jpg: truncated" in str(read["b"])


@pytest.mark.parametrize("name", ["a.mp4", "a.AVI", "a.mkv", "a.mov"])
def test_video_gives_its_frames(tmp_path: Path, name: str) -> None:
    frames = drive(12)
    source = find_source(str(write_video(tmp_path / name, frames, "MJPG" if name == "a.AVI" else "mp4v", fps=12.5)))
    assert isinstance(source, Video)
    assert (source.count, source.size) == (12, (64, 96))
    assert source.fps == pytest.approx(12.5, rel=1e-3)
    for _ in range(2):  # it starts anew each time
        read = images_of(source)
        assert list(read) == [f"a_{i:06d}" for i in range(12)]
        for expected, image in zip(frames, read.values()):
            assert image.shape == (64, 96, 3)
            distance = np.abs(image.astype(int) - expected)  # red and blue are not swapped, nor frames
            assert distance.mean() < 6 and np.median(distance) < 6


def test_video_turned_by_its_header_is_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "phone.mp4", drive(3))
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, matrix) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, 0, 65536, 0, -65536, 0, 0, 64 << 16, 0, 1 << 30)  # a quarter clockwise
    path.write_bytes(data)
    source = find_source(str(path))
    assert isinstance(source, Video)
    assert source.size == (96, 64)
    image = images_of(source)["phone_000000"]
    assert image.shape == (96, 64, 3)
    assert near(image[8, 40], RED, 40) and near(image[80, 40], GREEN, 40)


def test_video_without_header_of_odd_size(tmp_path: Path) -> None:
    source = find_source(str(write_mjpeg(tmp_path / "bare.mjpeg", drive(5, 63, 97))))  # a suffix not in the list
    assert isinstance(source, Video)
    assert (source.count, source.fps, source.size) == (None, 25, (63, 97))
    read = images_of(source)
    assert len(read) == 5
    assert all(image.shape == (63, 97, 3) for image in read.values())


def test_absurd_frame_rate_falls_back(tmp_path: Path) -> None:
    source = find_source(str(write_video(tmp_path / "a.mp4", drive(3), fps=1000)))
    assert isinstance(source, Video) and source.fps == 25


def test_video_that_ends_early_tells_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", drive(40), "MJPG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = find_source(str(path))
    assert source.count == 40
    *read, (_, last) = source
    assert 10 <= len(read) <= 30
    assert all(isinstance(image, np.ndarray) for _, image in read)
    assert isinstance(last, UserError)
    assert f"a.avi: ended after {len(read)} of the 40 frames" in str(last)


def test_count_in_a_header_may_be_off_by_one(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", drive(9))
    source = find_source(str(path))
    assert isinstance(source, Video)
    for claimed, told in ((10, False), (11, True), (5, False), (None, False)):
        read = list(Video(path, claimed, source.fps, source.size))
        assert len(read) == 9 + told
        assert isinstance(read[-1][1], UserError) == told


def test_broken_video_is_one_clear_error(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", drive(9)).read_bytes()
    contents = {
        "text": b"hello\n" * 1000,
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "zeros": bytes(9000),
        "garbage": np.random.default_rng(0).bytes(50_000),
        "head": whole[:40],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        assert "not a video that OpenCV can read" in error_of(tmp_path / f"{name}.mp4")
    no_frame = cv2.VideoWriter(str(tmp_path / "none.mp4"), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), 9, (64, 64))
    no_frame.release()
    assert "not a video" in error_of(tmp_path / "none.mp4")


def test_a_broken_video_prints_nothing(tmp_path: Path) -> None:
    """In a process of its own, as FFmpeg's own words can only be turned off before its first use."""
    noise = [np.random.default_rng(i).integers(0, 256, (64, 96, 3), dtype=np.uint8) for i in range(20)]
    data = bytearray(write_video(tmp_path / "a.mp4", noise).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    (tmp_path / "a.mp4").write_bytes(data)
    (tmp_path / "b.mp4").write_bytes(data[:1000])
    code = (
        "import sys; from utils.evaluate.media import *\n"
        "try: find_source(sys.argv[2])\n"
        "except UserError: print(str(list(find_source(sys.argv[1]))[-1][1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.mp4", tmp_path / "b.mp4"],
        cwd=ROOT,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert "of the 20 frames" in done.stdout and done.stdout.count("\n") == 1


def test_frames_are_read_ahead_in_order_and_no_further(tmp_path: Path) -> None:
    images = [np.full((2, 2, 3), i, dtype=np.uint8) for i in range(9)]
    begun: list[int] = []
    closed = threading.Event()

    def source() -> Iterator[Frame]:
        try:
            for i, image in enumerate(images):
                begun.append(i)
                yield str(i), image
        finally:
            closed.set()

    ahead = read_ahead(source(), 3)
    assert next(ahead)[0] == "0"
    deadline = time.monotonic() + 20
    while len(begun) < 4 and time.monotonic() < deadline:  # while nobody asks for more
        time.sleep(0.01)
    assert begun == [0, 1, 2, 3]
    assert [name for name, _ in ahead] == list("12345678")
    assert closed.is_set()
    assert list(read_ahead(iter([]), 3)) == []


def test_a_failure_while_reading_ahead_comes_in_its_turn() -> None:
    def source() -> Iterator[Frame]:
        yield "0", np.zeros((2, 2, 3), np.uint8)
        raise OSError("the disk is gone")

    ahead = read_ahead(source(), 3)
    assert next(ahead)[0] == "0"
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_a_run_that_stops_early_leaves_no_thread() -> None:
    threads = threading.active_count()
    ahead = read_ahead((("x", np.zeros((2, 2, 3), np.uint8)) for _ in itertools.count()), 3)
    next(ahead)
    assert threading.active_count() == threads + 1
    ahead.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def labels_of(image: np.ndarray) -> np.ndarray:
    """Car (0, 0, 142) on the right half, no class on the left."""
    labels = np.full(image.shape[:2], IGNORE_LABEL, dtype=np.uint8)
    labels[:, image.shape[1] // 2 :] = 13
    return labels


def test_images_are_written_behind_in_order_and_all(tmp_path: Path, codec: str) -> None:
    with OverlayVideo(tmp_path / "a.mp4", 10, (64, 96), draw) as sink, write_behind(sink, 2) as write:
        for image in drive(9):
            write("x", image, np.full((64, 96), IGNORE_LABEL, dtype=np.uint8))
    read = list(images_of(find_source(str(tmp_path / "a.mp4"))).values())
    assert len(read) == 9
    for expected, image in zip(drive(9), read):
        assert np.abs(image.astype(int) - expected).mean() < 6


@pytest.mark.parametrize("count", [0, 2, 9])
def test_a_failure_while_writing_behind_is_raised(tmp_path: Path, count: int) -> None:
    (tmp_path / "b.jpg").mkdir()
    threads = threading.active_count()
    image = drive(1)[0]
    with (
        pytest.raises(UserError, match=r"b\.jpg: cannot be written"),
        OverlayFolder(tmp_path, draw) as sink,
        write_behind(sink, count) as write,
    ):
        for name in "abcde":
            write(name, image, labels_of(image))
    assert threading.active_count() == threads
    assert (tmp_path / "a.jpg").is_file()


def test_overlay_folder_writes_jpegs(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    with OverlayFolder(folder, draw) as sink:
        for name, height, width in (("a", 40, 60), ("b.c", 33, 71)):
            image = np.full((height, width, 3), GREEN, dtype=np.uint8)
            sink.write(name, image, labels_of(image))
    assert sorted(path.name for path in folder.iterdir()) == ["a.jpg", "b.c.jpg"]
    written = read_image(folder / "b.c.jpg")
    assert written.shape == (33, 71, 3)
    assert near(written[:, :30], GREEN)
    assert near(written[:, 40:], (10, 90, 101))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"), OverlayFolder(tmp_path / "file" / "out", draw):
        pass


@pytest.fixture(params=["h264", "mpeg4"])
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The codec of the videos that are written: with PyAV, and without it."""
    if request.param == "h264":
        pytest.importorskip("av")
    else:
        monkeypatch.setitem(sys.modules, "av", None)
    assert media.has_h264() == (request.param == "h264")
    return request.param


@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 97), (64, 97), (2, 1), (359, 641)])
def test_overlay_video_keeps_size_rate_and_colors(tmp_path: Path, codec: str, height: int, width: int) -> None:
    path = tmp_path / "out" / "drive.mp4"
    with OverlayVideo(path, 12.5, (height, width), draw) as sink:
        for image in drive(7, height, width):
            sink.write("x", image, labels_of(image))
        assert [p.suffix for p in path.parent.iterdir()] == [".mp4"] and not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["drive.mp4"]
    source = find_source(str(path))
    assert isinstance(source, Video)
    assert source.size == (height + height % 2, width + width % 2)
    assert source.fps == pytest.approx(12.5, rel=1e-3)
    read = list(images_of(source).values())
    assert len(read) == 7
    if width > 1:
        right, left = slice(width * 5 // 8, width - 7), slice(width * 2 // 5)
        assert near(read[6][40:, right], (10, 90, 101), 20) and near(read[6][40:, left], GREEN, 20)
        assert near(read[6][18:30, 16:26], RED, 40)
        assert near(read[6][:, -1], (10, 90, 101), 20)  # what is added is not black


def test_video_is_what_browsers_and_phones_play(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "12:30 %d 街.mp4"
    with OverlayVideo(path, 29.97, (63, 97), draw) as sink:
        for image in drive(9, 63, 97):
            sink.write("x", image, labels_of(image))
    with av.open(str(path)) as file:
        (stream,) = file.streams
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.profile) == ("h264", "yuv420p", "High")
        assert float(stream.average_rate) == pytest.approx(29.97, rel=1e-4)
        # BT.709, limited range: without these, a player guesses by the size.
        assert [int(value) for value in (context.colorspace, context.color_primaries, context.color_trc)] == [1, 1, 1]
        assert int(context.color_range) == 1
    frames = list(images_of(find_source(str(path))).values())
    assert len(frames) == 9
    assert near(frames[8][40:62, 60:90], (10, 90, 101), 20) and near(frames[8][40:62, :40], GREEN, 20)
    content = path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")  # it starts to play before it is loaded


def test_what_is_drawn_may_be_larger_than_the_frame(tmp_path: Path, codec: str) -> None:
    def draw(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return np.pad(image, ((0, 15), (0, 0), (0, 0)), constant_values=255)

    with OverlayVideo(tmp_path / "a.mp4", 10, (64, 96), draw) as sink:
        for image in drive(3):
            sink.write("x", image, labels_of(image))
    source = find_source(str(tmp_path / "a.mp4"))
    assert isinstance(source, Video) and source.size == (80, 96)
    (*_, image) = images_of(source).values()
    assert near(image[50:60], GREEN, 20) and near(image[68:], (255, 255, 255), 20)


def test_frame_of_another_size_is_resized(tmp_path: Path, codec: str) -> None:
    with OverlayVideo(tmp_path / "a.mp4", 10, (64, 96), draw) as sink:
        for image in [*drive(2), *drive(2, 48, 80)]:
            sink.write("x", image, labels_of(image))
    assert len(images_of(find_source(str(tmp_path / "a.mp4")))) == 4


def test_a_folder_in_place_of_the_video(tmp_path: Path) -> None:
    (tmp_path / "drive.mp4").mkdir()
    with pytest.raises(UserError, match=r"drive\.mp4: is a folder, .*; give another --output_dir"):
        OverlayVideo(tmp_path / "drive.mp4", 10, (48, 64), draw).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["drive.mp4"]


def test_stopped_video_leaves_what_was_there(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    image = drive(1)[0]
    with pytest.raises(KeyboardInterrupt), OverlayVideo(path, 10, (64, 96), draw) as sink:
        sink.write("x", image, labels_of(image))
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"old"
    with pytest.raises(UserError, match="no frame"), OverlayVideo(path, 10, (64, 96), draw):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("without", ["", "sys.modules['av'] = None"])
def test_killed_run_leaves_no_video(tmp_path: Path, without: str) -> None:
    code = (
        "import os, sys, numpy as np; from pathlib import Path; from utils.evaluate.media import *\n"
        f"{without}\n"
        "with OverlayVideo(Path(sys.argv[1]), 10, (64, 96), lambda image, labels: image) as sink:\n"
        "    for _ in range(5): sink.write('x', np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), np.uint8))\n"
        "    os._exit(9)"
    )
    path = tmp_path / "a.mp4"
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, timeout=60).returncode == 9
    assert not path.exists()
    assert [p.name.startswith(".a.") for p in tmp_path.iterdir()] == [True]
    with pytest.raises(UserError, match="empty folder"):
        find_source(str(tmp_path))  # what it left is hidden


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on a file's size to set")
@pytest.mark.parametrize("without", ["", "sys.modules['av'] = None"])
def test_full_disk_is_one_clear_error(tmp_path: Path, without: str) -> None:
    code = (
        "import resource, signal, sys, numpy as np; from pathlib import Path; from utils.evaluate.media import *\n"
        f"{without}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000,) * 2)\n"
        "image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)\n"
        "try:\n"
        "    with OverlayVideo(Path(sys.argv[1]), 10, (64, 96), lambda image, labels: image) as sink:\n"
        "        for i in range(50): sink.write('x', np.roll(image, i), np.zeros((64, 96), np.uint8))\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.mp4"], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert "a.mp4: could not be written completely" in done.stdout or "a.mp4: cannot be written (" in done.stdout
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_cannot_be_encoded_is_one_clear_error(tmp_path: Path, codec: str) -> None:
    maker = "PyAV" if codec == "h264" else "OpenCV"
    with pytest.raises(
        UserError, match=rf"a\.mp4: {maker} cannot encode 20000x2 at 25 frames/s \(.*extract the frames"
    ):
        OverlayVideo(tmp_path / "a.mp4", 25, (2, 20000), draw).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_opencv_without_encoder_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)

    class NoEncoder:
        def __init__(self, *_: object) -> None:
            pass

        def isOpened(self) -> bool:
            return False

        fourcc = staticmethod(cv2.VideoWriter.fourcc)

    monkeypatch.setattr(media.cv2, "VideoWriter", NoEncoder)
    with (
        pytest.raises(UserError, match=r"a\.mp4: OpenCV cannot encode 96x64"),
        OverlayVideo(tmp_path / "a.mp4", 25, (64, 96), draw),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_sources_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(tmp_path / "in" / "a.jpg", picture(8, 8))
    video = write_video(tmp_path / "in" / "v.mp4", drive(2))
    monkeypatch.chdir(tmp_path)
    source = find_source("in/*.jpg")
    refuse_overwriting(source, Path("out"))
    refuse_overwriting(source, Path("in/overlays"))
    with pytest.raises(UserError, match="give another --output_dir"):
        refuse_overwriting(source, tmp_path / "in")
    refuse_overwriting(find_source(str(video)), Path("in/w.mp4"))
    os.symlink(tmp_path / "in", tmp_path / "link")
    with pytest.raises(UserError, match="give another --output_dir"):
        refuse_overwriting(find_source(str(video)), Path("link/v.mp4"))
