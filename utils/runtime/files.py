"""Files that are either whole or absent, and arrays that are what they should be."""

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

MAX_JSON = 1 << 30  # bytes; the boxes of det_20's 70,000 training images have some hundred million


def cannot_be_read(path: Path, error: OSError) -> UnreadableError:
    """The system's own word, such as "Permission denied"."""
    return UnreadableError(f"{path}: cannot be read ({error.strerror or error})")


def status(path: Path) -> os.stat_result | None:
    """What the system says of a path, links followed; None where nothing is there.

    `Path.exists` and the like are not used: by Python's version, they raise what the system says, or take it for
    "nothing is there".

    Raises:
        UnreadableError: it cannot be told (no permission, an I/O error, a stale handle).
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last, of a name that no file can have
        return None
    except OSError as error:
        raise cannot_be_read(path, error) from None


def exists(path: Path) -> bool:
    """Whether something is there; raises as `status`."""
    return status(path) is not None


def is_folder(path: Path) -> bool:
    """Whether a folder is there; raises as `status`."""
    found = status(path)
    return found is not None and S_ISDIR(found.st_mode)


def is_file(path: Path) -> bool:
    """Whether a regular file is there; raises as `status`."""
    found = status(path)
    return found is not None and S_ISREG(found.st_mode)


def listed(folder: Path) -> list[Path]:
    """What is in a folder, sorted.

    Raises:
        UnreadableError: it cannot be listed.
    """
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except OSError as error:
        raise cannot_be_read(folder, error) from None


def require_readable(path: Path) -> None:
    """Read a file to its end, for what its reader took for damage may be the system's error.

    Raises:
        UnreadableError: the system does not let us read it.
    """
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        raise cannot_be_read(path, error) from None


@contextmanager
def atomic_write(path: Path, *, keep: int = 0) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success flush it to disk and rename it to `path`.

    A reader, or a run that is killed at any moment, sees the old file or the new one, never a half of it. On an
    exception the temporary file is removed and `path` is left as it was.

    Args:
        keep: so many earlier versions stay, `<stem>.1<suffix>` the last of them. On a file system without hard links,
            who is killed between the two renames leaves no file of the name itself, and the versions before it whole.

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
        with suppress(OSError):  # it was renamed, or never made
            temporary.unlink()


def _give_up_name(path: Path, name: Path) -> None:
    """Rename, but for that `path` stays until it is replaced, if there are hard links."""
    link = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        os.link(path, link)
    except FileNotFoundError:
        raise
    except OSError:
        os.replace(path, name)
    else:
        os.replace(link, name)
        link.unlink(missing_ok=True)  # which is still there where both were one file, as after a kill


def _room(path: Path, error: OSError) -> str:
    """Which disk it is that has no room, if that is the error."""
    return f": {free_room(path)}; make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""


def free_room(path: Path) -> str:
    """Name the disk of `path`, which need not exist yet, and its free room, in words."""
    path = path.absolute()
    disk = next((folder for folder in (path, *path.parents) if folder.is_mount()), path.parent)
    return f"the disk at {disk} has {shutil.disk_usage(disk).free / 2**20:.1f} MiB free"


def earlier(path: Path, number: int) -> Path:
    """The version so many before the last; 0 is `path` itself."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}") if number else path


def require_writable(folder: Path, flag: str) -> None:
    """Check that a file can be written in `folder` or, if it is not there, in the one that it will be made in.

    Raises:
        UserError: it cannot; `flag` names another.
    """
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if exists(path))
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = f"{error.strerror}{_room(folder, error)}"
        raise UserError(f"{folder}: cannot be written ({reason}); give another {flag}") from None


def make_folder(folder: Path, flag: str) -> None:
    """Make `folder`, if it is not there, and those that it is in.

    Raises:
        UserError: it cannot be made or written; `flag` names another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); give another {flag}") from None
    require_writable(folder, flag)


def remove_temporaries(folder: Path) -> None:
    """Remove what runs that were killed inside `atomic_write` left anywhere below `folder`; no other may be at work."""
    for path in folder.rglob(".*.*.tmp"):
        with suppress(OSError):  # what cannot be removed is in nobody's way; a folder is nothing that we left
            path.unlink()


def read_json(path: Path) -> Any:
    """
    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or absurdly deep.
    """
    found = os.stat(path)
    if not S_ISREG(found.st_mode):  # a pipe would keep us waiting, a device would never end
        raise OSError(errno.EINVAL, "not a regular file")
    if found.st_size > MAX_JSON:
        raise OSError(errno.EFBIG, f"larger than {MAX_JSON >> 20} MiB")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_npy(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Check by header and length, without reading it, that a file is a whole .npy array of `shape` and `dtype`.

    Raises:
        UserError: it is missing, damaged, truncated, of another shape or type, or holds pickled objects; an
            `UnreadableError`, the system does not let us read it.
    """
    hint = "run pre_bdd100k.py again, which mends it"
    try:
        found = os.stat(path)
        if not S_ISREG(found.st_mode):  # a pipe would keep us waiting
            raise ValueError
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("error")  # of headers that are no Python, or Python 2's
            # np.save takes the later versions for headers above 64 KiB; in a damaged file they would be read first.
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError
            actual_shape, fortran_order, actual_dtype = np.lib.format.read_array_header_1_0(file)
            missing = file.tell() + actual_dtype.itemsize * math.prod(actual_shape) - found.st_size
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {hint}") from None
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except Exception:  # NumPy tokenizes and evaluates a header, and damaged ones raise almost anything there
        raise UserError(f"{path}: damaged, or not an .npy file; {hint}") from None
    if actual_dtype.hasobject:
        raise UserError(f"{path}: holds pickled objects, which are never loaded; {hint}")
    if (actual_shape, actual_dtype, fortran_order) != (shape, np.dtype(dtype), False):
        raise UserError(f"{path}: expected {dtype} of shape {shape}, found {actual_dtype} of {actual_shape}; {hint}")
    if missing:
        raise UserError(f"{path}: {'truncated' if missing > 0 else 'too long'} by {abs(missing)} bytes; {hint}")
