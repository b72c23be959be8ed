"""The user's own pictures and videos: finding them, reading them, and writing overlays.

A source, `ImageFolder` or `Video`, is checked by `find_source` before any long work. It yields `(name, image)`, or
`(name, UserError)` for an image that cannot be read, so that one damaged file does not end a run over a thousand. A
sink, `OverlayFolder` or `OverlayVideo`, takes the image and its predicted classes, and a function that draws them.

    source = find_source("drive/*.jpg")
    with OverlayFolder(Path("overlays"), OverlayStyle(BDD100K).draw) as sink:
        for name, image in read_ahead(source, 4):
            if isinstance(image, UserError):
                failures.append(image)
            else:
                sink.write(name, image, labels_of(image))
"""

from __future__ import annotations

import errno
import glob
import math
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from types import TracebackType

import cv2
import numpy as np
from PIL import Image

from utils.data.bdd100k import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, read_image, read_size
from utils.data.classes import IGNORE_LABEL
from utils.data.image_files import MAX_PIXELS
from utils.runtime.errors import UnreadableError, UserError
from utils.runtime.files import atomic_write, is_folder, listed, make_folder, open_untrusted, status

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")  # in any case; others are tried, see `find_source`
DEFAULT_FPS = 25.0  # if the header has none
_MAX_FPS = 240.0  # a higher value is the clock of a variable frame rate (such as 1000), not the frame rate
_JPEG_QUALITY = 92
_BT709 = 1  # FFmpeg's number
_NONE = "no .jpg, .jpeg, .png, .webp, .bmp or .tif picture"
_TAKES = "give a .jpg or .png picture, a folder of them, a quoted pattern such as 'drive/*.jpg', or a video"

Frame = tuple[str, "np.ndarray | UserError"]  # a name and (H, W, 3) uint8 RGB, or why there is no image
Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]  # an overlay, RGB, of an image and its labels
Write = Callable[[str, np.ndarray, np.ndarray], None]  # a sink's `write`


@dataclass(frozen=True)
class ImageFolder:
    """Pictures, read one by one and turned upright by their EXIF orientation."""

    pictures: dict[str, Path]  # by names that are unique in any case
    videos: Sequence[Path] = ()  # found among them; a video must be given alone
    foreign: Sequence[Path] = ()  # pictures among them in formats that are not supported

    @property
    def count(self) -> int:
        return len(self.pictures)

    @property
    def skipped(self) -> list[str]:
        """What is not read, with the reason."""
        return [
            *(f"{video}: a video; give it alone as --images" for video in self.videos),
            *(f"{path}: its format is not supported; convert it to JPEG or PNG" for path in self.foreign),
        ]

    def holds(self, name: str) -> bool:
        """Whether a picture has that name."""
        return name in self.pictures

    def __iter__(self) -> Iterator[Frame]:
        for name, path in self.pictures.items():
            try:
                yield name, read_image(path, upright=True)
            except UserError as error:
                yield name, error


@dataclass(frozen=True)
class Video:
    """A video file with a readable first frame, turned upright by its header."""

    path: Path
    count: int | None  # number of frames by the header, perhaps wrong; None if it has none
    fps: float
    size: tuple[int, int]  # (H, W) of the first frame
    skipped: Sequence[str] = ()  # as in `ImageFolder`

    def holds(self, name: str) -> bool:
        """Whether a frame may have that name."""
        return bool(re.fullmatch(re.escape(self.path.stem) + r"_\d{6,}", name))

    def __iter__(self) -> Iterator[Frame]:
        """Every frame in order. A frame that cannot be read ends the video with a last `UserError`.

        OpenCV does not say whether it stopped at the end or at a broken frame, so frames are counted. Some headers hold
        an estimate: up to 1 %, at least one frame, may be missing without an error.
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
                    f"{self.path}: ended after {read} of the {self.count} frames in its header (cut off, damaged, or "
                    "trimmed without re-encoding; convert it again)"
                ),
            )


def find_source(spec: str) -> ImageFolder | Video:
    """Find what a user's path names: a picture, a folder, a glob pattern (`**` = any folders), or a video.

    A file with another suffix is a video if OpenCV reads at least two frames; still pictures of unsupported formats
    (.gif, .jp2, ...) have one.

    Raises:
        UserError: nothing exists there, or neither pictures nor a readable video.
        UnreadableError: the system does not let us look.
    """
    path = Path(os.path.expanduser(spec))
    found = status(path) if spec else None
    if found and S_ISDIR(found.st_mode):
        return _folder(path)
    if found and S_ISREG(found.st_mode):
        if path.suffix.lower() in (*IMAGE_SUFFIXES, *FOREIGN_SUFFIXES):
            read_size(path)  # fails at once if the only picture is damaged; among many, it fails at the end
            return ImageFolder({path.stem: path})
        return _video(path)
    if glob.has_magic(spec):
        matches = glob.glob(str(path), recursive=True)
        source = _folder_of(map(Path, matches))
        if not matches:
            _require_listable(path)
        if not source.pictures:
            matched = f"{_NONE}{_others(source)}" if matches else "nothing"
            raise UserError(f"{spec}: the pattern matches {matched} ({_TAKES})")
        return source
    raise UserError(f"{spec or repr(spec)}: no such file or folder ({_TAKES})")


def _require_listable(pattern: Path) -> None:
    """Raise an `UnreadableError` if the folder of a pattern cannot be listed, which `glob` hides."""
    folder = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    if is_folder(folder):
        listed(folder)


def _others(source: ImageFolder) -> str:
    """The pictures in formats that are not supported, if there are any."""
    if source.foreign:
        return f", but {len(source.foreign)} in other formats, such as {source.foreign[0].name}; convert them to JPEG"
    return ""


def refuse_overwriting(source: ImageFolder | Video, output: Path) -> None:
    """Check that overlays are not written to `output`, a folder or a video file, where the source is.

    Raises:
        UserError: they would replace the user's pictures, or the next run would read them.
    """
    inputs = {source.path} if isinstance(source, Video) else {path.parent for path in source.pictures.values()}
    if output.resolve() in {path.resolve() for path in inputs}:
        raise UserError(f"{output}: the input is there and would be replaced; give another --output_dir")


def _folder(path: Path) -> ImageFolder:
    entries = [entry for entry in listed(path) if not entry.name.startswith(".")]
    source = _folder_of(entries)
    if not source.pictures:
        reason = (
            f"{_NONE} directly in this folder{_others(source)} (for folders below, give a quoted pattern such as "
            f"'{path / '**' / '*.jpg'}'; give videos one at a time)"
        )
        raise UserError(f"{path}: {reason if entries else f'an empty folder ({_TAKES})'}")
    return source


def _folder_of(paths: Iterable[Path]) -> ImageFolder:
    """The files among the paths, sorted, by their suffixes."""
    files = sorted(filter(_may_be_read, set(paths)))
    pictures, videos, foreign = (
        [path for path in files if path.suffix.lower() in suffixes]
        for suffixes in (IMAGE_SUFFIXES, VIDEO_SUFFIXES, FOREIGN_SUFFIXES)
    )
    return ImageFolder(dict(zip(_unique_names(pictures), pictures)), videos, foreign)


def _may_be_read(path: Path) -> bool:
    """Whether it is a regular file, or unknown because of a system error, which reading will report."""
    try:
        found = status(path)
    except UnreadableError:
        return True
    return found is not None and S_ISREG(found.st_mode)


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """A unique name for each path: its stem, or if others have the same, more of the path."""
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
    has_suffix = path.suffix.lower() in VIDEO_SUFFIXES
    hint = "damaged, cut off, or of an unknown codec: convert it to H.264 .mp4" if has_suffix else _TAKES
    unreadable = UserError(f"{path}: not a video that OpenCV can read ({hint})")
    with open_untrusted(path) as file:
        start = file.read(4096)
    # FFmpeg makes a video of a text file, and follows the addresses in a playlist. Text holds no zeros, unlike a video.
    if b"\0" not in start:
        raise unreadable
    capture = _open_video(path)
    try:
        count, fps = (capture.get(key) for key in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
        if capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT) > MAX_PIXELS:
            raise UserError(f"{path}: its header claims frames of an absurd size (damaged: convert it again)")
        first = _next_frame(capture)
        if first is None or not (has_suffix or _next_frame(capture) is not None):
            raise unreadable
    finally:
        capture.release()
    return Video(
        path,
        count=int(count) if math.isfinite(count) and count > 0 else None,
        fps=fps if 0 < fps <= _MAX_FPS else DEFAULT_FPS,
        size=first.shape[:2],
    )


def _open_video(path: Path) -> cv2.VideoCapture:
    """Open a video with FFmpeg: other readers of OpenCV take `x_01.png` for the first picture of a sequence."""
    _silence()
    # Absolute, as FFmpeg takes `12` in `12:30.mp4` for a protocol.
    return cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)


def _silence() -> None:
    """Silence OpenCV and FFmpeg, which print up to a thousand lines for a damaged frame.

    FFmpeg's level is read only when OpenCV first opens a video, for reading or writing.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _next_frame(capture: cv2.VideoCapture) -> np.ndarray | None:
    """The next frame, (H, W, 3) uint8 RGB, or None at the end or if it cannot be read."""
    success, image = capture.read()
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if success else None


def read_ahead(frames: Iterable[Frame], count: int) -> Iterator[Frame]:
    """The frames in their order; up to `count` of them are read in a thread while the caller works."""
    iterator = iter(frames)
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = deque(thread.submit(next, iterator, None) for _ in range(count))
        try:
            while (frame := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, iterator, None))
                yield frame
        finally:
            thread.shutdown(cancel_futures=True)


@contextmanager
def write_behind(sink: OverlayFolder | OverlayVideo, count: int) -> Iterator[Write]:
    """A `sink.write` that works in a thread while the caller goes on; up to `count` images wait for it.

    Raises:
        UserError: an image cannot be written; from a later call, or at the end.
    """
    waiting: deque[Future[None]] = deque()

    def write(name: str, image: np.ndarray, labels: np.ndarray) -> None:
        waiting.append(thread.submit(sink.write, name, image, labels))
        if len(waiting) > count:
            waiting.popleft().result()

    with ThreadPoolExecutor(max_workers=1) as thread:
        yield write
        while waiting:
            waiting.popleft().result()


class OverlayFolder:
    """Writes `<folder>/<name>.jpg`, each atomically.

    A JPEG of 12 megapixels takes about 4 MB, a PNG 20 MB. Colour is stored at full resolution (4:4:4), so that borders
    between classes stay sharp.
    """

    def __init__(self, folder: Path, draw: Draw) -> None:
        self.folder, self.draw = folder, draw

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
        drawn = Image.fromarray(self.draw(image, labels))
        with atomic_write(self.folder / f"{name}.jpg") as file:
            drawn.save(file, format="JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn each of PyAV's errors into an `OSError`."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from None


class _H264:
    """Encodes frames of even sides as H.264 in the form that browsers and phones play: 4:2:0, the index in front."""

    made_by = "PyAV"

    @_as_os_error()
    def __init__(self, path: str, fps: float, width: int, height: int) -> None:
        import av  # optional

        self._file = av.open(path, "w", format="mp4", options={"movflags": "+faststart"})
        self._stream = self._file.add_stream("libx264", Fraction(fps).limit_denominator(1001))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.options = {"preset": "veryfast", "crf": "20"}  # a third of the size of `_Mpeg4`
        context = self._stream.codec_context  # players guess the colours of a video that does not tell
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = 1  # 16 to 235
        context.open()  # fails here, not after the first frame
        self._frames = 0

    @_as_os_error()
    def write(self, image: np.ndarray) -> None:
        from av import VideoFrame

        frame = VideoFrame.from_ndarray(image, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709)
        frame.pts = self._frames
        self._frames += 1
        self._file.mux(self._stream.encode(frame))

    @_as_os_error()
    def close(self) -> None:
        try:
            self._file.mux(self._stream.encode(None))
        finally:
            self._file.close()


class _Mpeg4:
    """Encodes frames of even sides as MPEG-4 Part 2, which every OpenCV can write."""

    made_by = "OpenCV"

    def __init__(self, path: str, fps: float, width: int, height: int) -> None:
        self._writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
        if not self._writer.isOpened():
            raise OSError(errno.EINVAL, "no MPEG-4 encoder for it")

    def write(self, image: np.ndarray) -> None:
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self._writer.release()


def has_h264() -> bool:
    """Whether videos are written as H.264, which needs PyAV with x264."""
    try:
        import av
    except ImportError:  # missing, or its libraries do not load
        return False
    return "libx264" in av.codecs_available


class OverlayVideo:
    """Writes an .mp4, completely or not at all.

    Frames go to a hidden temporary file, which is renamed when the `with` block ends without an exception. Both codecs
    need even sides: the last column or row of an odd side is written twice.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int], draw: Draw) -> None:
        """Write to `path` at `fps` frames a second; frames of another `size` (H, W) are resized once drawn."""
        self.path, self.fps, self.draw = path, fps, draw
        # What is drawn may be larger than the frame, as it may have a legend.
        blank = np.zeros((*size, 3), dtype=np.uint8)
        self.size = draw(blank, np.full(size, IGNORE_LABEL, dtype=np.uint8)).shape[:2]
        self._temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")  # OpenCV needs the suffix
        self._encoder: _H264 | _Mpeg4 | None = None
        self._written = 0  # frames

    def __enter__(self) -> OverlayVideo:
        make_folder(self.path.parent, "--output_dir")
        if is_folder(self.path):
            raise UserError(f"{self.path}: is a folder, where the video would be written; give another --output_dir")
        try:
            self._temporary.touch()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        _silence()
        height, width = (side + side % 2 for side in self.size)
        codec: type[_H264] | type[_Mpeg4] = _H264 if has_h264() else _Mpeg4
        try:
            # Absolute, as FFmpeg takes `12` in `12:30.mp4` for a protocol.
            self._encoder = codec(os.path.abspath(self._temporary), self.fps, width, height)
        except OSError as error:
            self._remove_temporary()
            raise UserError(
                f"{self.path}: {codec.made_by} cannot encode {width}x{height} at {self.fps:g} frames/s "
                f"({error.strerror}); extract the frames and give their folder"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._encoder is not None
        try:
            with self._telling_failure() if kind is None else suppress(OSError):
                self._encoder.close()
            if kind is None:
                self._publish()
        finally:
            self._remove_temporary()

    def write(self, name: str, image: np.ndarray, labels: np.ndarray) -> None:
        """Append one overlay: image (H, W, 3) uint8 RGB, labels (H, W) uint8, 255 = no class. `name` is ignored.

        Raises:
            UserError: it cannot be written.
        """
        assert self._encoder is not None, "used outside its `with` block"
        drawn = self.draw(image, labels)
        height, width = self.size
        if drawn.shape[:2] != self.size:  # a stream may change its size
            drawn = cv2.resize(drawn, (width, height), interpolation=cv2.INTER_AREA)
        drawn = cv2.copyMakeBorder(drawn, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        with self._telling_failure():
            self._encoder.write(drawn)
        self._written += 1

    def _publish(self) -> None:
        """Rename the finished file, after a check that it is complete: OpenCV hides failed writes."""
        capture = _open_video(self._temporary)
        complete = _next_frame(capture) is not None and capture.get(cv2.CAP_PROP_FRAME_COUNT) >= self._written
        capture.release()
        if not complete:
            raise UserError(f"{self.path}: could not be written completely (no frame, or is the disk full?)")
        with self._telling_failure():
            with open(self._temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self._temporary, self.path)

    @contextmanager
    def _telling_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _remove_temporary(self) -> None:
        with suppress(OSError):  # already renamed
            self._temporary.unlink()
