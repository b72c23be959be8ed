"""Reading what `torch.save` wrote, though every byte of it may be meant to harm.

`torch.load(weights_only=True)` runs no code that a file brings, and that is all it promises: it unpacks what is packed
a thousandfold, makes a `bytearray` of any length that it is told, and tensors that claim more than their file has.
Here a file may name nothing but plain tensors, and give no more bytes than it has.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_PICKLE = 16 << 20  # bytes of structure; that of vit_h, its tensors left aside, has some hundred thousand
_MAX_DEPTH = 32  # of containers in containers
# All that is in a state dict or in a checkpoint of plain values.
_GLOBALS = re.compile(
    r"collections OrderedDict|torch Size|torch \w+Storage|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
)
# Opcodes that call or name something by other ways than GLOBAL; `torch.save` writes none of them.
_REFUSED = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, the keys of its storages


def load_plain(path: Path, *, strict: bool = False) -> Any:
    """Read tensors, numbers, strings and None in dicts, lists and tuples, on the CPU; nothing else passes.

    Args:
        strict: take only the archives of today's `torch.save`, not its older format, and compare every checksum.
            PyTorch does not, so that a flipped bit would become a weight.

    Raises:
        ValueError: the file is damaged, holds or claims anything else, or is larger inside than outside.
    """
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"  # as PyTorch decides it
        if is_archive:
            _check_pickle(io.BytesIO(_checked_pickle(path, check_sums=strict)))
        elif strict:
            raise ValueError("not an archive")
        else:
            with open(path, "rb") as file:
                head = io.BytesIO(file.read(MAX_PICKLE))
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are PyTorch's to its caller, and the file's word is not the user's
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        return _plain(loaded, path.stat().st_size, 0, {})
    except Exception as error:  # the unpickler goes where damaged bytes lead it, and raises almost anything there
        raise ValueError(f"{path}: damaged, or not a file of plain tensors") from error


def _checked_pickle(path: Path, *, check_sums: bool) -> bytes:
    """The archive's pickle; no member is packed, twice there, or lies upon another."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = {member.filename.casefold() for member in members}
        pickles = [member for member in members if member.filename.casefold().endswith("/data.pkl")]
        if (
            any(member.compress_type != zipfile.ZIP_STORED for member in members)
            or sum(member.file_size for member in members) > path.stat().st_size
            or len(names) != len(members)
            or len(pickles) != 1
            or pickles[0].file_size > MAX_PICKLE
            or (check_sums and archive.testzip())
        ):
            raise ValueError("not as torch.save writes it")
        return archive.read(pickles[0])


def _check_pickle(stream: io.BytesIO) -> None:
    """Read one pickle to its end, running nothing of it."""
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in _REFUSED or (opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument))):
            raise ValueError(f"names {argument}")


def _plain(value: Any, max_bytes: int, depth: int, done: dict[int, Any]) -> Any:
    """A copy in Python's own containers: an `OrderedDict` of a file may carry an `items` of its own.

    Args:
        max_bytes: the most that a tensor may have: the length of the file. One that repeats an element may claim any
            size, and takes it up when it is copied.
        done: copies by the id of their original; a few containers can hold each other a million times.
    """
    kind = type(value)
    if value is None or kind in (bool, float, str) or (kind is int and abs(value) < 1 << 63):
        return value
    if isinstance(value, Tensor) and value.nbytes <= max_bytes:
        return value.detach()
    if id(value) in done:
        return done[id(value)]
    copy: Any
    if depth < _MAX_DEPTH and isinstance(value, dict) and all(type(key) in (str, int) for key in dict.keys(value)):
        copy = {key: _plain(part, max_bytes, depth + 1, done) for key, part in dict.items(value)}
    elif depth < _MAX_DEPTH and isinstance(value, list | tuple):
        parts = [_plain(part, max_bytes, depth + 1, done) for part in value]
        copy = tuple(parts) if isinstance(value, tuple) else parts
    else:
        raise ValueError(f"holds a {kind.__name__}")
    done[id(value)] = copy
    return copy
