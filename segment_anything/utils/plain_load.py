"""Reading files of `torch.save` that may be hostile.

`torch.load(weights_only=True)` runs no code from a file, but it unpacks zip bombs, allocates a `bytearray` of any
length, and accepts tensors that claim more bytes than the file has. Here a file may hold only plain tensors, only the
operations that `torch.save` writes, and no more bytes than its own size.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

MAX_PICKLE = 16 << 20  # bytes of structure; vit_h has about a hundred thousand beside its tensors
_MAX_DEPTH = 32  # of nested containers
# The globals of a state dict or of a checkpoint of plain values.
_GLOBALS = re.compile(
    r"collections OrderedDict|torch Size|torch \w+Storage|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
)
_ELEMENT_BYTES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "Untyped"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, the keys of its storages


def load_plain(path: Path, *, strict: bool = False) -> Any:
    """Read tensors, numbers, strings and None in dicts, lists and tuples, on the CPU.

    Args:
        path: the file.
        strict: accept only archives, not the older format of `torch.save`, and compare all checksums. PyTorch does not,
            so that a flipped bit would become a weight.

    Raises:
        ValueError: the file is damaged, holds anything else, or claims more bytes than it has.
        OSError: the system does not let us read it.
    """
    try:
        if is_archive(path):
            _check_archive(path, check_sums=strict)
        elif strict:
            raise ValueError("not an archive")
        else:
            with open(path, "rb") as file:
                head = io.BytesIO(file.read(MAX_PICKLE))
            storages: dict[str, int] = {}
            for _ in range(_LEGACY_PICKLES):
                storages |= _Checker().check(head)
            if sum(storages.values()) > path.stat().st_size:
                raise ValueError("claims more bytes than there are")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are for developers
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        return _plain(loaded, path.stat().st_size, 0, {})
    except Exception as error:  # damaged bytes can raise almost anything in the unpickler
        require_readable(path)
        raise ValueError(f"{path}: damaged, or not a file of plain tensors") from error


def is_archive(path: Path) -> bool:
    """Whether it is an archive of `torch.save`, by the test that PyTorch uses. Raises OSError if it is unreadable."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def require_readable(path: Path) -> None:
    """Read a file to its end: what a parser took for damage may be an `OSError` of the system."""
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def _check_archive(path: Path, *, check_sums: bool) -> None:
    """Raise ValueError unless the archive is as `torch.save` writes it: no member is compressed, repeated or overlaps
    another, and each storage has the size that the pickle claims."""
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
        storages = _Checker().check(io.BytesIO(archive.read(pickles[0])))
        folder = pickles[0].filename.rpartition("/")[0]
        sizes = {member.filename: member.file_size for member in members}
        for key, size in storages.items():
            if sizes.get(f"{folder}/data/{key}") != size:
                raise ValueError(f"storage {key} does not have the size that the pickle claims")


@dataclass
class _Value:
    """A value on the unpickler's stack."""

    kind: str
    content: Any = None  # the value of a str, an int or a global, or the values of a tuple


class _Checker:
    """Follows a pickle without executing it, and rejects everything that `torch.save` does not write.

    PyTorch's unpickler checks the names in a pickle, but not the types that opcodes are applied to: it sets items in
    other values than dicts, and replaces the state of tensors.
    """

    _CONSTANTS: ClassVar = {
        "NONE": "none",
        "NEWTRUE": "bool",
        "NEWFALSE": "bool",
        "BINFLOAT": "float",
        "EMPTY_DICT": "dict",
        "EMPTY_LIST": "list",
        **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), "int"),
        **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING"), "str"),
    }
    _FIXED_TUPLES: ClassVar = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

    def __init__(self) -> None:
        self.stack: list[_Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Value] = {}
        self.storages: dict[str, int] = {}

    def check(self, stream: io.BytesIO) -> dict[str, int]:
        """Read one pickle to its end.

        Returns:
            The claimed bytes of each storage by its key.

        Raises:
            ValueError: it holds anything but plain values and tensors.
        """
        for opcode, argument, _ in pickletools.genops(stream):
            self._follow(opcode.name, argument)
        return self.storages

    def _follow(self, name: str, argument: Any) -> None:
        if name in self._CONSTANTS:
            self._push(self._CONSTANTS[name], argument)
        elif name in self._FIXED_TUPLES:
            self._push("tuple", self._pop(self._FIXED_TUPLES[name]))
        elif name == "TUPLE":
            self._push("tuple", self._pop_to_mark())
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self._top("anything")
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            if not _GLOBALS.fullmatch(str(argument)):
                raise ValueError(f"names {argument}")
            self._push("global", str(argument))
        elif name in ("SETITEM", "SETITEMS"):
            pairs = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
            if len(pairs) % 2:
                raise ValueError("a key without a value")
            self._top("dict", "ordered dict")
        elif name in ("APPEND", "APPENDS"):
            _ = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            self._top("list")
        elif name == "BUILD":  # the `_metadata` of Module.state_dict's result
            (state,) = self._pop(1)
            if state.kind not in ("dict", "ordered dict"):
                raise ValueError(f"sets the state of a value by a {state.kind}")
            self._top("ordered dict")
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            self._push(self._result(function, arguments))
        elif name == "BINPERSID":
            self._push("storage", self._storage(*self._pop(1)))
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"has an opcode {name}")

    def _push(self, kind: str, content: Any = None) -> None:
        self.stack.append(_Value(kind, content))

    def _top(self, *kinds: str) -> _Value:
        value = self.stack[-1]
        if len(self.stack) <= (self.marks[-1] if self.marks else 0) or (
            kinds != ("anything",) and value.kind not in kinds
        ):
            raise ValueError(f"applies an operation of a {kinds[0]} to a {value.kind}")
        return value

    def _pop(self, count: int) -> list[_Value]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError("takes more values than the stack has")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _pop_to_mark(self) -> list[_Value]:
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def _result(self, function: _Value, arguments: _Value) -> str:
        """The kind of a call's result."""
        kinds = [value.kind for value in arguments.content] if arguments.kind == "tuple" else None
        name = function.content if function.kind == "global" else function.kind
        if name == "collections OrderedDict" and kinds == []:
            return "ordered dict"
        if name == "torch Size" and kinds == ["tuple"]:
            return "size"
        if name == "torch._utils _rebuild_tensor_v2" and kinds and kinds[0] == "storage":
            return "tensor"
        if name == "torch._utils _rebuild_parameter" and kinds and kinds[0] == "tensor":
            return "tensor"
        raise ValueError(f"calls {name}")

    def _storage(self, value: _Value) -> str:
        """The key of a storage: ("storage", type, key, device, elements), and in the older format one more."""
        parts = value.content if value.kind == "tuple" else []
        kinds = [part.kind for part in parts[:5]]
        if kinds != ["str", "global", "str", "str", "int"] or parts[0].content != "storage":
            raise ValueError("a persistent id is not a storage")
        _, kind, key, _, elements = (part.content for part in parts[:5])
        size = elements * _ELEMENT_BYTES[kind.removeprefix("torch ").removesuffix("Storage")]
        if elements < 0 or self.storages.setdefault(key, size) != size:
            raise ValueError("a storage has two sizes")
        return key


def _plain(value: Any, max_bytes: int, depth: int, done: dict[int, Any]) -> Any:
    """Copy to Python's own containers: an `OrderedDict` in a file may have its own `items`.

    Args:
        max_bytes: of a tensor, the length of the file: a tensor that repeats an element could claim any size.
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
