"""Reading what `torch.save` wrote, though every byte of it may be meant to harm.

`torch.load(weights_only=True)` runs no code that a file brings, and that is all it promises: it unpacks what is packed
a thousandfold, makes a `bytearray` of any length that it is told, and tensors that claim more than their file has.
Here a file may name nothing but plain tensors, do nothing else to them than `torch.save` writes, and give no more bytes
than it has.
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

MAX_PICKLE = 16 << 20  # bytes of structure; that of vit_h, its tensors left aside, has some hundred thousand
_MAX_DEPTH = 32  # of containers in containers
# All that is in a state dict or in a checkpoint of plain values.
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
    """Read tensors, numbers, strings and None in dicts, lists and tuples, on the CPU; nothing else passes.

    Args:
        strict: take only the archives of today's `torch.save`, not its older format, and compare every checksum.
            PyTorch does not, so that a flipped bit would become a weight.

    Raises:
        ValueError: the file is damaged, holds or claims anything else, or is larger inside than outside.
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
            warnings.simplefilter("ignore")  # they are PyTorch's to its caller, and the file's word is not the user's
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        return _plain(loaded, path.stat().st_size, 0, {})
    except Exception as error:  # the unpickler goes where damaged bytes lead it, and raises almost anything there
        require_readable(path)
        raise ValueError(f"{path}: damaged, or not a file of plain tensors") from error


def is_archive(path: Path) -> bool:
    """Whether it begins as the archives of `torch.save`, as PyTorch decides it; an OSError is the system's."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def require_readable(path: Path) -> None:
    """Read a file to its end: what a reader took for damage may be an `OSError` of the system, which this raises."""
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def _check_archive(path: Path, *, check_sums: bool) -> None:
    """Raise ValueError unless the archive is as `torch.save` writes it: no member is packed, there twice, or lies upon
    another, and each storage has the bytes that the pickle says."""
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
                raise ValueError(f"storage {key} is not of the size that the pickle says")


@dataclass
class _Value:
    """What an opcode leaves on the stack: its kind, and of what has no kind of its own (a dict) nothing else."""

    kind: str
    content: Any = None  # of a str, an int or a global its value, of a tuple its values


class _Checker:
    """Follows a pickle without running anything of it, and takes nothing that `torch.save` does not write.

    PyTorch's unpickler looks at the names in a pickle, and not at what its opcodes are applied to: items are set in
    what is no dict, and the state of a tensor is replaced.
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
            For the key of each storage the bytes that it is said to have.

        Raises:
            ValueError: it holds something else than plain values and tensors.
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
        elif name == "BUILD":  # of the dict that Module.state_dict returns: its `_metadata`
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
            raise ValueError(f"does to a {value.kind} what is done to a {kinds[0]}")
        return value

    def _pop(self, count: int) -> list[_Value]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError("takes more from the stack than there is")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _pop_to_mark(self) -> list[_Value]:
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def _result(self, function: _Value, arguments: _Value) -> str:
        """The kind of what a call gives."""
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
            raise ValueError("a persistent id that is no storage")
        _, kind, key, _, elements = (part.content for part in parts[:5])
        size = elements * _ELEMENT_BYTES[kind.removeprefix("torch ").removesuffix("Storage")]
        if elements < 0 or self.storages.setdefault(key, size) != size:
            raise ValueError("a storage of two sizes")
        return key


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
