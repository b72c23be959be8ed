"""Files that are whole or absent."""

import errno
import os
import tempfile
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.runtime import files
from utils.runtime.errors import UnreadableError, UserError
from utils.runtime.files import (
    atomic_write,
    check_npy,
    exists,
    is_file,
    is_folder,
    listed,
    load_npy,
    make_folder,
    open_untrusted,
    read_json,
    remove_temporaries,
    require_readable,
    require_writable,
    status,
)


def test_atomic_write_replaces_only_at_the_end(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_leaves_no_trace_of_a_failure(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("hard_links", [True, False])
def test_earlier_versions_stay(tmp_path, monkeypatch, hard_links):
    path = tmp_path / "a.pth"
    was_there = []
    replace = os.replace

    def replace_and_look(source, target):
        replace(source, target)
        was_there.append(path.exists())

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("os.replace", replace_and_look)
    if not hard_links:
        monkeypatch.setattr("os.link", refuse)
    for version in range(4):
        with atomic_write(path, keep=2) as file:
            file.write(b"%d" % version)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == {"a.pth": b"3", "a.1.pth": b"2", "a.2.pth": b"1"}
    assert all(was_there) == hard_links  # with them, there is a file of that name at all times


def test_a_kill_between_two_renames_leaves_no_trace_in_the_next_version(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "a.1.pth")  # the new one was not yet given its name
    with atomic_write(path, keep=1) as file:
        file.write(b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.pth": b"new", "a.1.pth": b"old"}


def test_what_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder, what in (("nowhere", "No such file or directory"), ("file", "Not a directory")):
        said = rf"{folder}/a: cannot be written \({what}\)"
        with pytest.raises(UserError, match=said), atomic_write(tmp_path / folder / "a"):
            pass


def test_remove_temporaries_takes_nothing_else(tmp_path):
    (tmp_path / "imgs").mkdir()
    kept = [tmp_path / name for name in ("a.npy", "a.tmp", ".hidden", "imgs/b.npy")]
    gone = [tmp_path / name for name in (".a.npy.12.tmp", "imgs/.b.npy.3.tmp")]
    for path in (*kept, *gone):
        path.touch()
    remove_temporaries(tmp_path)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)


def test_check_npy(tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(UserError, match=r"a\.npy: no such file"):
        check_npy(path, (2, 3), "uint8")
    np.save(path, np.zeros((2, 3), np.uint8))
    check_npy(path, (2, 3), "uint8")
    for shape, dtype in (((3, 2), "uint8"), ((2, 3), "float32")):
        with pytest.raises(UserError, match=r"a\.npy: expected"):
            check_npy(path, shape, dtype)
    whole = path.read_bytes()
    spoilt = {"truncated by 1": whole[:-1], "too long by 2": whole + b"xx", "damaged": whole[:50], "an .npy": b""}
    for said, data in spoilt.items():
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"a\.npy: .*{said}"):
            check_npy(path, (2, 3), "uint8")
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="pickled objects"):
        check_npy(path, (1,), "uint8")


def test_any_byte_of_a_header_may_be_damaged(tmp_path):
    path, shape, dtype = tmp_path / "a.npy", (16, 16, 3), "float32"
    np.save(path, np.zeros(shape, dtype))
    whole = path.read_bytes()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for position in range(whole.index(b"\n")):
            for value in b"\0(\\":
                path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
                try:
                    check_npy(path, shape, dtype)
                except UserError:
                    continue
                assert (np.load(path) == np.zeros(shape, dtype)).all()  # what is let through can be read
    assert not warned


@pytest.mark.parametrize(
    "header",
    [
        b"\x01\x00\x76\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (999999999, 999999999), }".ljust(118),
        b"\x02\x00\xf0\xff\xff\xff{}",  # a header of 4 GiB
        b"\x09\x09\xf0\xff\xff\xff{}",
    ],
)
def test_a_header_that_claims_much_costs_no_memory(tmp_path, header):
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY" + header)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.npy: (damaged|expected)"):
        check_npy(path, (16, 16), "uint8")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    require_writable(tmp_path, "--x")
    require_writable(tmp_path / "new" / "er", "--x")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(UserError, match=rf"{folder}: cannot be written \(Not a directory\); give another --x"):
            require_writable(folder, "--x")

    def refuse(**_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    number = errno.EROFS  # as root writes whatever its permissions
    with pytest.raises(UserError, match="Read-only file system"):
        make_folder(tmp_path / "new", "--x")  # which an evaluation would find out at its end
    number = errno.ENOSPC
    with pytest.raises(UserError, match=r"No space left on device: the disk at .* has .* MiB free; make room there"):
        require_writable(tmp_path, "--x")


# ---------------------------------------------------------------- what the system says


def test_what_is_there(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    assert exists(tmp_path / "file") and is_file(tmp_path / "file") and not is_folder(tmp_path / "file")
    assert exists(tmp_path) and is_folder(tmp_path) and not is_file(tmp_path)
    for name in ("none", "file/x", "dangling", "a\0b"):
        assert not any(look(tmp_path / name) for look in (exists, is_folder, is_file)), name
    assert listed(tmp_path) == [tmp_path / "dangling", tmp_path / "file"]


def test_a_loop_of_links_and_a_long_name_are_the_systems_errors(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UnreadableError, match=r"loop: cannot be read \(Too many levels of symbolic links\)"):
        exists(tmp_path / "loop")
    with pytest.raises(UnreadableError, match=r"cannot be read \(File name too long\)"):
        is_file(tmp_path / ("x" * 300))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    ("call", "read"),
    [
        *[("os.stat", read) for read in (status, exists, is_file, is_folder)],
        ("os.listdir", listed),
        *[("builtins.open", read) for read in (require_readable, lambda path: check_npy(path, (2,), "uint8"))],
        ("os.stat", lambda path: check_npy(path, (2,), "uint8")),
    ],
)
def test_the_system_is_quoted(tmp_path, monkeypatch, number, call, read):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(2, np.uint8))
    with monkeypatch.context() as patch:
        patch.setattr(call, refusing(number))
        with pytest.raises(UnreadableError) as error:
            read(path)
    assert str(error.value) == f"{path}: cannot be read ({os.strerror(number)})"


def refusing(number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


def test_json_that_the_system_refuses(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("{}")
    for call in ("os.stat", "builtins.open"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(UnreadableError, match=r"cannot be read \(Permission denied"),
        ):
            patch.setattr(call, refusing(errno.EACCES))
            read_json(tmp_path / "a.json", "mend it")


def test_files_that_anybody_may_have_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    with open_untrusted(tmp_path / "a", 1 << 20) as file:
        assert len(file.read()) == 1 << 20
    os.mkfifo(tmp_path / "pipe")  # nobody will ever write into it
    for path, wrong in (
        (tmp_path / "gone", "no such file"),
        (tmp_path / "a" / "b", "no such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
    ):
        with pytest.raises(UserError) as error, open_untrusted(path, fix="give another"):
            pass
        assert str(error.value) == f"{path}: {wrong}; give another"
    os.truncate(tmp_path / "a", (1 << 20) + 1)
    with pytest.raises(UserError, match=r"a: larger than 1 MiB$"), open_untrusted(tmp_path / "a", 1 << 20):
        pass
    with (
        pytest.raises(UnreadableError, match=r"a: cannot be read \(Input/output error\)"),
        open_untrusted(tmp_path / "a"),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # midway


def test_arrays_are_read_as_they_were_checked(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(load_npy(tmp_path / "a.npy", (2, 3), "uint8"), array)
    with pytest.raises(UserError, match=r"a\.npy: expected uint8 of shape \(3, 2\), found uint8 of \(2, 3\)"):
        load_npy(tmp_path / "a.npy", (3, 2), "uint8")


def test_an_array_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((64, 64), dtype=np.uint8))
    check = files._wrong_with_npy

    def check_and_cut(*arguments: Any) -> str | None:
        wrong = check(*arguments)
        os.truncate(path, 200)
        return wrong

    monkeypatch.setattr(files, "_wrong_with_npy", check_and_cut)
    with pytest.raises(UserError, match=r"a\.npy: was changed while it was read; run pre_bdd100k\.py again"):
        files.load_npy(path, (64, 64), "uint8")
