"""The user's own pictures and videos: what a path given by the user means, reading it, and writing overlays of it.

A source, `ImageFolder` or `Video`, is checked by `find_source` before any long work. Iterated over, it gives
`(name, image)`, and in an image's place the `UserError` of what could not be read, so that one damaged file does not
end a run over a thousand. A sink, `OverlayFolder` or `OverlayVideo`, takes the image and its predicted classes.

    source = find_source("drive/*.jpg")
    with OverlayFolder(Path("overlays")) as sink:
        for name, image in source:
            if isinstance(image, UserError):
                failures.append(image)
            else:
                sink.write(name, image, labels_of(image))
"""

from __future__ import annotations

import glob
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from types import TracebackType

import cv2
import numpy as np
from PIL import Image

from utils.data.bdd100k import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, read_image, read_size
from utils.data.image_files import MAX_PIXELS
from utils.evaluate.plots import overlay
from utils.runtime.errors import UnreadableError, UserError
from utils.runtime.files import atomic_write, cannot_be_read, is_folder, listed, make_folder, status

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")  # in any case; more is tried, see `find_source`
DEFAULT_FPS = 25.0  # of a video whose header tells none
_MAX_FPS = 240.0  # above it, the header tells the clock of a variable frame rate (such as 1000), not the frame rate
_JPEG_QUALITY = 92
_READ = "no .jpg, .jpeg or .png picture, nor .webp, .bmp or .tif,"
_TAKES = "give a .jpg or .png picture, a folder of them, a quoted pattern such as 'drive/*.jpg', or a video"

Frame = tuple[str, "np.ndarray | UserError"]  # a name and (H, W, 3) uint8 RGB, or why there is no image


@dataclass(frozen=True)
class ImageFolder:
    """Pictures, each read when its turn comes, turned upright as their EXIF orientation says."""

    pictures: dict[str, Path]  # by names that are unique, also where a file system takes upper case for lower
    videos: Sequence[Path] = ()  # that lie among them, and are sources by themselves only
    foreign: Sequence[Path] = ()  # pictures that lie among them, of formats that are not read

    @property
    def count(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Frame]:
        for name, path in self.pictures.items():
            try:
                yield name, read_image(path, upright=True)
            except UserError as error:
                yield name, error


@dataclass(frozen=True)
class Video:
    """A video file, of which the first frame could be read; turned upright as its header says."""

    path: Path
    count: int | None  # frames, as the header claims: perhaps wrong. None where it tells none
    fps: float
    size: tuple[int, int]  # (H, W) of the first frame

    def __iter__(self) -> Iterator[Frame]:
        """Every frame in order. One that cannot be read ends the video; what is missing is told by a last `UserError`.

        OpenCV does not say whether it stopped at the end or at a broken frame, so frames are counted. Some headers
        hold an estimate: 1 %, and be it one frame, may be missing without a word.
        """
        capture = _open_video(self.path)
        read = 0
        try:
            while (image := _next_frame(capture)) is not None:
                yield f"{self.path.stem}_{read:06d}", image
                read += 1
        finally:
            capture.release()
        if self.count is not None and self.count - read > max(1, self.count // 100):
            yield (
                f"{self.path.stem}_{read:06d}",
                UserError(
                    f"{self.path}: ended after {read} of the {self.count} frames that its header claims "
                    "(cut off or damaged, or trimmed without re-encoding; convert it again)"
                ),
            )


def find_source(spec: str) -> ImageFolder | Video:
    """What a user's path means: a picture, a folder of pictures, a glob pattern (`**` = any folders), or a video.

    A file of another suffix is a video if OpenCV reads two frames or more of it; by one alone, stills of formats that
    are not read here (.gif, .jp2, ...) would pass for videos.

    Raises:
        UserError: nothing is there, or neither pictures nor a video that can be read; an `UnreadableError`, the system
            does not let us look.
    """
    path = Path(os.path.expanduser(spec))
    found = status(path) if spec else None
    if found and S_ISDIR(found.st_mode):
        return _folder(path)
    if found and S_ISREG(found.st_mode):
        if path.suffix.lower() in (*IMAGE_SUFFIXES, *FOREIGN_SUFFIXES):
            read_size(path)  # one damaged picture among many is told at the end, the only one at once
            return ImageFolder({path.stem: path})
        return _video(path)
    if glob.has_magic(spec):
        matches = glob.glob(str(path), recursive=True)
        if not matches:
            _require_listable(path)
            raise UserError(f"{spec}: the pattern matches nothing ({_TAKES})")
        source = _folder_of(map(Path, matches))
        if not source.pictures:
            raise UserError(f"{spec}: the pattern matches {_READ} that is read here{_others(source)} ({_TAKES})")
        return source
    raise UserError(f"{spec or repr(spec)}: no such file or folder ({_TAKES})")


def _require_listable(pattern: Path) -> None:
    """Raise an `UnreadableError` if a pattern matches nothing because its folder cannot be listed; `glob` says none."""
    folder = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    if is_folder(folder):
        listed(folder)


def _others(source: ImageFolder) -> str:
    """What there is in place of pictures that are read."""
    if source.foreign:
        return f", but {len(source.foreign)} of other formats, such as {source.foreign[0].name}: convert them to JPEG"
    return ""


def refuse_overwriting(source: ImageFolder | Video, output: Path) -> None:
    """Check that overlays written to `output`, a folder or a video file, do not come to lie among what is read.

    Raises:
        UserError: they would, and so replace the user's pictures, or be taken for pictures by the next run.
    """
    inputs = {source.path} if isinstance(source, Video) else {path.parent for path in source.pictures.values()}
    if output.resolve() in {path.resolve() for path in inputs}:
        raise UserError(f"{output}: holds the pictures themselves, which overlays would replace (write elsewhere)")


def _folder(path: Path) -> ImageFolder:
    entries = [entry for entry in listed(path) if not entry.name.startswith(".")]
    if not entries:
        raise UserError(f"{path}: an empty folder ({_TAKES})")
    source = _folder_of(entries)
    if not source.pictures:
        raise UserError(
            f"{path}: {_READ} directly in this folder{_others(source)} (for those in folders below, "
            f"give a quoted pattern such as '{path / '**' / '*.jpg'}'; videos one at a time)"
        )
    return source


def _folder_of(paths: Iterable[Path]) -> ImageFolder:
    """Those of the paths that are files, sorted, by what their suffixes say."""
    files = sorted(filter(_may_be_read, set(paths)))
    pictures, videos, foreign = (
        [path for path in files if path.suffix.lower() in suffixes]
        for suffixes in (IMAGE_SUFFIXES, VIDEO_SUFFIXES, FOREIGN_SUFFIXES)
    )
    return ImageFolder(dict(zip(_unique_names(pictures), pictures)), videos, foreign)


def _may_be_read(path: Path) -> bool:
    """Whether a regular file is there, or one that the system does not tell us of: reading it says why, in its turn."""
    try:
        found = status(path)
    except UnreadableError:
        return True
    return found is not None and S_ISREG(found.st_mode)


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: its stem, or if that is another's too, as much of the path as tells them apart."""
    if not paths:
        return []
    root = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    relative = [Path(os.path.relpath(path, root)) for path in paths]
    names = [path.stem for path in relative]
    for longer in (
        ["_".join(path.with_suffix("").parts) for path in relative],  # city/x.jpg, hills/x.jpg
        ["_".join(path.parts).replace(".", "_") for path in relative],
    ):  # x.jpg, x.png
        uses = Counter(name.casefold() for name in names)
        names = [long if uses[name.casefold()] > 1 else name for name, long in zip(names, longer)]
    taken: set[str] = set()
    for i, name in enumerate(names):
        number = 1
        while names[i].casefold() in taken:  # city/x.jpg beside city_x.jpg, and the like
            number += 1
            names[i] = f"{name}_{number}"
        taken.add(names[i].casefold())
    return names


def _video(path: Path) -> Video:
    kind = f"not a video that OpenCV can read ({_TAKES})"
    if path.suffix.lower() in VIDEO_SUFFIXES:
        kind = "not a video that OpenCV can read (damaged, cut off, or of an unknown codec: convert it to H.264 .mp4)"
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise cannot_be_read(path, error) from None
    # FFmpeg makes a video of the letters of a text file, and follows the addresses in a playlist. A video's header
    # holds zeros, a text none.
    if b"\0" not in start:
        raise UserError(f"{path}: {kind}")
    capture = _open_video(path)
    try:
        count, fps = (capture.get(key) for key in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
        if capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT) > MAX_PIXELS:
            raise UserError(f"{path}: its header claims frames of an absurd size (damaged: convert it again)")
        first = _next_frame(capture)
        if first is None or (path.suffix.lower() not in VIDEO_SUFFIXES and _next_frame(capture) is None):
            raise UserError(f"{path}: {kind}")
    finally:
        capture.release()
    return Video(
        path,
        count=int(count) if math.isfinite(count) and count > 0 else None,
        fps=fps if 0 < fps <= _MAX_FPS else DEFAULT_FPS,
        size=first.shape[:2],
    )


def _open_video(path: Path) -> cv2.VideoCapture:
    """Open a video through FFmpeg alone: others of OpenCV's readers take `x_01.png` for the first of a sequence."""
    _silence()
    # Absolute, since FFmpeg takes what is before the colon in `12:30.mp4` for a protocol.
    return cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)


def _silence() -> None:
    """Keep OpenCV and FFmpeg from printing, of a damaged frame up to a thousand lines: our one line says what matters.

    FFmpeg's level is read when OpenCV first opens a video, for reading or writing, and never again.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _next_frame(capture: cv2.VideoCapture) -> np.ndarray | None:
    """The next frame, (H, W, 3) uint8 RGB, or None at the end and where it cannot be read."""
    whole, image = capture.read()
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if whole else None


class OverlayFolder:
    """Writes `<folder>/<name>.jpg`, each atomically.

    JPEG, since overlays are for looking at: one of 12 megapixels is some 4 MB and written in a fraction of a second,
    as PNG 20 MB. Colour is kept at full resolution (4:4:4), for the borders between classes to stay sharp.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> OverlayFolder:
        make_folder(self.folder, "--output_dir")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, name: str, image: np.ndarray, labels: np.ndarray) -> None:
        """Write one overlay: image (H, W, 3) uint8 RGB, labels (H, W) uint8, 255 = no class.

        Raises:
            UserError: it cannot be written.
        """
        drawn = Image.fromarray(overlay(image, labels))
        with atomic_write(self.folder / f"{name}.jpg") as file:
            drawn.save(file, format="JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")


class OverlayVideo:
    """Writes an .mp4 (MPEG-4, which every OpenCV can write), whole or not at all.

    Frames go to a hidden temporary file beside it, which gets the final name when the `with` block is left without an
    exception. Of an odd width or height, of which MPEG-4 knows none, the last column or row is written twice.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        """Args:
        path: where to write.
        fps: frames a second, above 0.
        size: (H, W) of the frames; one of another size is resized.
        """
        self.path, self.fps, self.size = path, fps, size
        self._temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")  # OpenCV goes by the suffix
        self._writer: cv2.VideoWriter | None = None
        self._written = 0  # frames

    def __enter__(self) -> OverlayVideo:
        make_folder(self.path.parent, "--output_dir")
        try:
            self._temporary.touch()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        _silence()
        height, width = (side + side % 2 for side in self.size)
        self._writer = cv2.VideoWriter(
            os.path.abspath(self._temporary), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), self.fps, (width, height)
        )
        if not self._writer.isOpened():
            self._remove_temporary()
            raise UserError(
                f"{self.path}: OpenCV cannot encode {width}x{height} MPEG-4 at {self.fps:g} frames/s here "
                "(pip install opencv-python-headless, or extract the frames and give their folder)"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._writer is not None
        self._writer.release()
        try:
            if kind is None:
                self._publish()
        finally:
            self._remove_temporary()

    def write(self, name: str, image: np.ndarray, labels: np.ndarray) -> None:
        """Append one overlay: image (H, W, 3) uint8 RGB, labels (H, W) uint8, 255 = no class; the name is not used."""
        assert self._writer is not None, "used outside its `with` block"
        drawn = overlay(image, labels)
        height, width = self.size
        if drawn.shape[:2] != self.size:  # a stream may change its size midway
            drawn = cv2.resize(drawn, (width, height), interpolation=cv2.INTER_AREA)
        drawn = cv2.copyMakeBorder(drawn, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        self._writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
        self._written += 1

    def _publish(self) -> None:
        """Give the finished file its name; OpenCV keeps failed writes to itself, so look whether all of it is there."""
        capture = _open_video(self._temporary)
        whole = _next_frame(capture) is not None and capture.get(cv2.CAP_PROP_FRAME_COUNT) >= self._written
        capture.release()
        if not whole:
            raise UserError(f"{self.path}: could not be written whole (no frame was given, or is the disk full?)")
        try:
            with open(self._temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _remove_temporary(self) -> None:
        with suppress(OSError):  # it has its final name
            self._temporary.unlink()
