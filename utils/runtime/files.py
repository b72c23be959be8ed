"""Files that are written completely or not at all, and the checked ways to read a file."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO

import numpy as np

from utils.runtime.errors import UnreadableError, UserError

MAX_JSON = 1 << 30  # bytes; the detections of det_20's 70,000 training images take about 100 MB


def cannot_be_read(path: Path, error: OSError) -> UnreadableError:
    """The error for a path that the system does not let us read, in the system's words."""
    return UnreadableError(f"{path}: cannot be read ({error.strerror or error})")


def status(path: Path) -> os.stat_result | None:
    """The status of a path, links followed; None if nothing exists there.

    `Path.exists` and its like are not used: depending on Python's version, a system error raises or counts as absent.

    Raises:
        UnreadableError: the system does not tell (no permission, an I/O error, a stale handle).
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file can have such a name
        return None
    except OSError as error:
        raise cannot_be_read(path, error) from None


def exists(path: Path) -> bool:
    """Whether the path exists; raises as `status`."""
    return status(path) is not None


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; raises as `status`."""
    found = status(path)
    return found is not None and S_ISDIR(found.st_mode)


def is_file(path: Path) -> bool:
    """Whether the path is a regular file; raises as `status`."""
    found = status(path)
    return found is not None and S_ISREG(found.st_mode)


def listed(folder: Path) -> list[Path]:
    """The paths in a folder, sorted.

    Raises:
        UnreadableError: it cannot be listed.
    """
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except OSError as error:
        raise cannot_be_read(folder, error) from None


def require_readable(path: Path) -> None:
    """Read a file to its end: what a parser took for damage may be a system error.

    Raises:
        UnreadableError: the system does not let us read it.
    """
    with open_untrusted(path) as file:
        while file.read(1 << 20):
            pass


@contextmanager
def atomic_write(path: Path, *, keep: int = 0) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success flush it to disk and rename it to `path`.

    At any moment, also after a kill, `path` is the complete old file or the complete new one. An exception removes the
    temporary file and leaves `path` unchanged.

    Args:
        keep: this many earlier versions are kept; the latest of them is `<stem>.1<suffix>`. On a file system without
            hard links, a kill between the two renames leaves no `path`, but all earlier versions.

    Raises:
        UserError: the file cannot be written (disk full, no permission, no such folder).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for number in range(keep, 0, -1):
            with suppress(FileNotFoundError):
                _give_up_name(earlier(path, number - 1), earlier(path, number))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}{_room(path, error)})") from error
    finally:
        with suppress(OSError):  # already renamed, or never created
            temporary.unlink()


def _give_up_name(path: Path, name: Path) -> None:
    """Rename `path` to `name`; with hard links, `path` itself stays until it is replaced."""
    link = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        os.link(path, link)
    except FileNotFoundError:
        raise
    except OSError:
        os.replace(path, name)
    else:
        os.replace(link, name)
        link.unlink(missing_ok=True)  # after a kill both may be the same file, and the rename did nothing


def _room(path: Path, error: OSError) -> str:
    """The disk without room, if that is the error."""
    return f": {free_room(path)}; make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""


def free_room(path: Path) -> str:
    """Describe the disk of `path` and its free room; `path` need not exist."""
    path = path.absolute()
    disk = next((folder for folder in (path, *path.parents) if folder.is_mount()), path.parent)
    return f"the disk at {disk} has {shutil.disk_usage(disk).free / 2**20:.1f} MiB free"


def earlier(path: Path, number: int) -> Path:
    """The path of an earlier version: 1 is the latest of them, 0 is `path` itself."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}") if number else path


def require_writable(folder: Path, flag: str) -> None:
    """Check that a file can be written in `folder`, or in the folder where it will be created.

    Raises:
        UserError: it cannot be written; the message tells the user to change `flag`.
    """
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if exists(path))
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = f"{error.strerror}{_room(folder, error)}"
        raise UserError(f"{folder}: cannot be written ({reason}); give another {flag}") from None


def make_folder(folder: Path, flag: str) -> None:
    """Create `folder` and its parents where they are missing.

    Raises:
        UserError: it cannot be created or written; the message tells the user to change `flag`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror}); give another {flag}") from None
    require_writable(folder, flag)


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed runs below `folder`. No other process may be writing there."""
    for path in folder.rglob(".*.*.tmp"):
        with suppress(OSError):  # harmless if it stays; a folder is not ours
            path.unlink()


@contextmanager
def open_untrusted(path: Path, limit: int | None = None, *, fix: str = "") -> Iterator[BinaryIO]:
    """Open a file that anybody may have written, for reading.

    Args:
        limit: the most bytes that it may have.
        fix: ends the error message: what the user can do.

    Raises:
        UserError: the file is missing, too large, or not a regular file: a pipe would block, a device never ends.
        UnreadableError: the system does not let us read it, also within the context.
    """
    found = status(path)
    wrong = None
    if found is None:
        wrong = "no such file"
    elif not S_ISREG(found.st_mode):
        wrong = "not a regular file"
    elif limit is not None and found.st_size > limit:
        wrong = f"larger than {limit >> 20} MiB"
    if wrong:
        raise UserError(f"{path}: {wrong}{fix and f'; {fix}'}")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise cannot_be_read(path, error) from None


def read_json(path: Path, fix: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: as `open_untrusted`; or the file is not JSON, or nested too deeply.
    """
    with open_untrusted(path, MAX_JSON, fix=fix) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:  # also not text, or a number of thousands of digits
            raise UserError(f"{path}: not JSON ({error}); {fix}") from None


_PREPROCESS = "run pre_bdd100k.py again to repair it"


def check_npy(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Check by header and length alone that a file is a complete .npy array of `shape` and `dtype`.

    Raises:
        UserError: it is missing, damaged, truncated, of another shape or type, or holds pickled objects.
        UnreadableError: the system does not let us read it.
    """
    with _checked_npy(path, shape, dtype):
        pass


def load_npy(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Read an .npy file; raises as `check_npy`, before memory is allocated for what its header claims."""
    with _checked_npy(path, shape, dtype) as file:
        try:
            return np.load(file, allow_pickle=False)
        except (ValueError, EOFError):
            raise UserError(f"{path}: was changed while it was read; {_PREPROCESS}") from None


@contextmanager
def _checked_npy(path: Path, shape: tuple[int, ...], dtype: str) -> Iterator[BinaryIO]:
    with open_untrusted(path, fix=_PREPROCESS) as file:
        if wrong := _wrong_with_npy(file, shape, np.dtype(dtype)):
            raise UserError(f"{path}: {wrong}; {_PREPROCESS}")
        file.seek(0)
        yield file


def _wrong_with_npy(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> str | None:
    """What is wrong with an .npy file, in words."""
    header = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # headers that are not Python, or Python 2
            # np.save uses later versions for headers above 64 KiB only; a damaged file could claim 4 GiB.
            if np.lib.format.read_magic(file) == (1, 0):
                header = np.lib.format.read_array_header_1_0(file)
    except OSError:
        raise
    except Exception:  # NumPy tokenizes and evaluates a header: a damaged one can raise almost anything
        pass
    if header is None:
        return "damaged, or not an .npy file"
    found_shape, fortran_order, found = header
    if found.hasobject:
        return "holds pickled objects, which are never loaded"
    if (found_shape, found, fortran_order) != (shape, dtype, False):
        return f"expected {dtype} of shape {shape}, found {found} of {found_shape}"
    missing = file.tell() + dtype.itemsize * math.prod(shape) - os.fstat(file.fileno()).st_size
    return f"{'truncated' if missing > 0 else 'too long'} by {abs(missing)} bytes" if missing else None
