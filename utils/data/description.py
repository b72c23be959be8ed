"""A data set's description: its classes, what its masks hold, and where its files are (`descriptions/*.yaml`)."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn

import yaml

from utils.data.classes import BDD100K, IGNORE_LABEL, MAX_CLASSES, ClassTable, SemanticClass, is_class_name, is_color
from utils.data.image_files import IMAGE_SUFFIXES
from utils.runtime.errors import UserError
from utils.runtime.files import is_file, open_untrusted

Value = int | tuple[int, int, int]  # of a mask's pixel: an id of 0-255, or a colour

BUILT_IN = Path(__file__).with_name("descriptions")
DEFAULT = "bdd100k"
MAX_BYTES = 1 << 20  # of a description
_MAX_MESSAGE = 500  # characters of a message
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # the formats that keep every value
_MAX_DEPTH = 8  # a description nests five levels
PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,8})")  # YAML also reads 010 as 8, and 1:30 as 90


@dataclass(frozen=True)
class Labels:
    """What the values of a mask's pixels mean."""

    kind: Literal["ids", "colors"]  # one byte a pixel (greyscale, or the index of a palette); or an RGB picture
    class_ids: Mapping[Value, int]  # the class of each value; several values may have one class
    ignored: frozenset[Value]  # values that are not labelled
    unlisted: Literal["error", "ignore"]  # what any other value is

    def to_plain(self, classes: ClassTable) -> dict[str, Any]:
        values: dict[str, list[Value]] = {}
        for value, class_id in sorted(self.class_ids.items(), key=lambda entry: (entry[1], entry[0])):
            values.setdefault(classes.names[class_id], []).append(value)
        return {"kind": self.kind, "values": values, "ignore": sorted(self.ignored), "unlisted": self.unlisted}


def train_ids(classes: ClassTable) -> Labels:
    """The labels of masks that hold the classes' own ids, and 255."""
    return Labels("ids", {c.id: c.id for c in classes}, frozenset({IGNORE_LABEL}), "error")


@dataclass(frozen=True)
class Layout:
    """Patterns of the images and their masks below the root.

    Placeholders: `{split}`, `{stem}`, `{folders}` (any number of folders, also none) and any other name (one folder, or
    a part of a name). An image and a mask belong together if all placeholders are equal. `.*` is any picture suffix.
    """

    images: str
    masks: str
    name: str = "{stem}"  # of the .npy file; several placeholders where stems are not unique
    labels: Labels | None = None  # of this layout's masks, None for those of the description
    splits: Mapping[str, tuple[str, ...]] | None = None  # for data without split folders: patterns of the stems

    def to_plain(self, classes: ClassTable) -> dict[str, Any]:
        plain: dict[str, Any] = {"images": self.images, "masks": self.masks, "name": self.name}
        if self.labels:
            plain["labels"] = self.labels.to_plain(classes)
        if self.splits:
            plain["splits"] = {split: list(patterns) for split, patterns in self.splits.items()}
        return plain


@dataclass(frozen=True)
class Description:
    """A data set."""

    name: str
    classes: ClassTable
    labels: Labels
    layouts: tuple[Layout, ...]  # the first that has images and masks of a split is used

    def to_plain(self) -> dict[str, Any]:
        """Plain values for manifest.json, in the form of the YAML file; `read_plain_description` reads them."""
        classes = [{"id": i, **entry} for i, entry in enumerate(self.classes.to_plain()["classes"])]
        return {
            "name": self.name,
            "classes": classes,
            "labels": self.labels.to_plain(self.classes),
            "layout": [layout.to_plain(self.classes) for layout in self.layouts],
        }


def built_in_names() -> list[str]:
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def load_description(name_or_path: str) -> Description:
    """Read a description by the name of a built-in data set, or from a YAML file.

    Raises:
        UserError: there is no such name or file, or the file is wrong; the message names the line.
    """
    if name_or_path in built_in_names():
        return _read(BUILT_IN / f"{name_or_path}.yaml", is_built_in=True)
    path = Path(name_or_path)
    if path.suffix.lower() in (".yaml", ".yml") or is_file(path):
        return _read(path, is_built_in=False)
    raise UserError(
        f"{name_or_path}: no such data set and no such file; give a YAML file, or one of {', '.join(built_in_names())}"
    )


def read_plain_description(plain: Any) -> Description:
    """Check and read the result of `Description.to_plain`.

    Raises:
        ValueError: it is not a description.
    """
    try:
        text = json.dumps(plain, ensure_ascii=False)
        if len(text) > MAX_BYTES:
            raise UserError("above 1 MiB")
        return _Reader("", text, is_built_in=True).description()
    except (UserError, TypeError, RecursionError) as error:
        raise ValueError(f"not a description of a data set {error}") from None


def _read(path: Path, *, is_built_in: bool) -> Description:
    with open_untrusted(path, MAX_BYTES, fix="a description is a small YAML file") as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    return _Reader(str(path), text, is_built_in=is_built_in).description()


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that a description may not hold."""


class _Loader(yaml.SafeLoader):
    """Gives nodes with their lines, without what could make a small file large or run code."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        wrong = None
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            wrong = "anchors (&) and aliases (*) are not supported; write the value out, or put text in quotes"
        elif event.tag:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            wrong = f"tags such as {tag} are not supported; remove it, or put text in quotes"
        elif self.depth == _MAX_DEPTH:
            wrong = f"nested more than {_MAX_DEPTH} levels deep; see the example in the documentation"
        if wrong:
            raise _Refused(problem=wrong, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    """Checks one description; every error names its line."""

    def __init__(self, path: str, text: str, *, is_built_in: bool) -> None:
        self.path = path
        self.text = text
        self.is_built_in = is_built_in

    def description(self) -> Description:
        root = self._compose()
        fields = self._fields(root, "the description", ("name", "classes", "labels", "layout"))
        name = self._text(fields["name"], "name")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            self._fail(fields["name"], f"name {name!r} must be letters, digits, - and _, at most 64")
        if name in built_in_names() and not self.is_built_in:
            self._fail(fields["name"], f"name {name!r} is a built-in data set's; choose another")
        classes = self._classes(fields["classes"])
        return Description(
            name, classes, self._labels(fields["labels"], classes), self._layouts(fields["layout"], classes)
        )

    def _compose(self) -> yaml.Node:
        try:
            root = yaml.compose(self.text, _Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            if error.problem == "could not find expected ':'":  # which is told of the line after the key
                mark = error.context_mark
            line = mark.line + 1 if mark else 1
            what = error.problem if isinstance(error, _Refused) else self._not_yaml(error, line)
            raise UserError(f"{self.path}:{line}: {what}") from None
        except yaml.reader.ReaderError as error:
            line = self.text[: error.position].count("\n") + 1
            raise UserError(f"{self.path}:{line}: holds a control character; remove it") from None
        if root is None:
            raise UserError(f"{self.path}:1: is empty; give name, classes, labels and layout")
        return root

    def _not_yaml(self, error: yaml.MarkedYAMLError, line: int) -> str:
        """What is wrong, with what often is the reason, if it occurs at the line of the error or just before it."""
        if "expected a single document" in str(error.context):
            return "a second document begins here; keep one"
        what = f"not valid YAML: {error.problem or error.context}"
        lines = self.text.splitlines()
        for number in range(line, max(0, line - 3), -1):
            text = lines[number - 1] if number <= len(lines) else ""
            if wide := re.search("[：，［］｛｝＃]", text):
                return f"{what}; line {number} has a full-width {wide[0]}, which YAML does not read"
            if re.match(r"\s*\t", text):
                return f"{what}; line {number} begins with a tab; use spaces"
            if re.search(r":\s+\{[^}]*\}[^\s,}\]]", text):
                return f"{what}; in line {number}, put the text that begins with {{ in quotes"
        return what

    def _fail(self, node: yaml.Node, what: str) -> NoReturn:
        what = what if len(what) <= _MAX_MESSAGE else f"{what[:_MAX_MESSAGE]}..."  # a value may be as long as the file
        raise UserError(f"{self.path}:{node.start_mark.line + 1}: {what}")

    # The kinds of nodes.

    def _entries(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The key's node and the value's node by key."""
        if not isinstance(node, yaml.MappingNode):
            self._fail(node, f"{what} must be `key: value` entries, not {_kind(node)}")
        entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) and key.tag.endswith(":merge") else None
            name = name or self._text(key, f"a key of {what}")
            if name in entries:
                self._fail(key, f"{name!r} is given twice in {what}; keep one")
            entries[name] = key, value
        return entries

    def _fields(
        self, node: yaml.Node, what: str, required: Sequence[str], optional: Sequence[str] = ()
    ) -> dict[str, yaml.Node]:
        entries = self._entries(node, what)
        allowed = (*required, *optional)
        for name, (key, _) in entries.items():
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, 1)
                meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(allowed)}"
                self._fail(key, f"unknown field {name!r} in {what}; {meant}")
        if missing := [name for name in required if name not in entries]:
            self._fail(node, f"{what} lacks {', '.join(missing)}; add it")
        return {name: value for name, (_, value) in entries.items()}

    def _list(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self._fail(node, f"{what} must be a list such as [..., ...], not {_kind(node)}")
        return node.value

    def _text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            self._fail(node, f"{what} must be text, not {_kind(node)}")
        if not node.tag.endswith(":str"):
            fix = f'; put it in quotes: "{node.value}"' if node.value else ""
            self._fail(node, f"{what} must be text, not {_kind(node)}{fix}")
        return node.value

    def _integer(self, node: yaml.Node, what: str, low: int, high: int, why: str = "") -> int:
        text = node.value if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") else None
        if text is None or not _INTEGER.fullmatch(text):
            self._fail(node, f"{what} must be a whole number, not {_kind(node)}")
        if not low <= int(text) <= high:
            self._fail(node, f"{what} is {text}; it must be {low} to {high}{why and f', as {why}'}")
        return int(text)

    def _one_of(self, node: yaml.Node, what: str, choices: Sequence[str]) -> Any:
        text = self._text(node, what)
        if text not in choices:
            self._fail(node, f"{what} {text!r} is unknown; it is one of {', '.join(choices)}")
        return text

    def _color(self, node: yaml.Node, what: str, *, in_list: bool = False) -> tuple[int, int, int]:
        if not isinstance(node, yaml.SequenceNode):
            code = re.fullmatch(r"#?([0-9a-fA-F]{6})", str(node.value)) if isinstance(node, yaml.ScalarNode) else None
            example = str([*bytes.fromhex(code[1])]) if code else "[128, 64, 128]"
            if in_list:
                example += f", and one color in a list [{example}]"
            self._fail(node, f"{what} must be red, green and blue, such as {example}, not {_kind(node)}")
        color = [int(p.value) if _INTEGER.fullmatch(str(p.value)) else None for p in node.value]
        if not is_color(color):
            self._fail(node, f"{what} must be three bytes, red, green and blue, such as [128, 64, 128]")
        return color[0], color[1], color[2]  # type: ignore[return-value]

    # The parts of a description.

    def _built_in(self, node: yaml.Node, what: str) -> str:
        return self._one_of(node, what, built_in_names())

    def _classes(self, node: yaml.Node) -> ClassTable:
        if isinstance(node, yaml.ScalarNode):
            name = self._built_in(node, "classes")
            return BDD100K if name == DEFAULT else load_description(name).classes  # bdd100k.yaml names itself
        nodes = self._list(node, "classes")
        if not 0 < len(nodes) <= MAX_CLASSES:
            self._fail(node, f"there are {len(nodes)} classes; give 1 to {MAX_CLASSES}")
        found: dict[int, SemanticClass] = {}
        names: set[str] = set()
        colors: dict[tuple[int, int, int], str] = {}
        aliases: list[tuple[yaml.Node, str, str]] = []
        for entry in nodes:
            fields = self._fields(entry, "a class", ("id", "name", "color"), ("group", "aliases"))
            name = self._class_name(fields["name"], "a class's name")
            class_id = self._integer(fields["id"], f"the id of {name!r}", 0, len(nodes) - 1, "ids count from 0")
            if class_id in found:
                self._fail(
                    fields["id"], f"id {class_id} is both {found[class_id].name!r} and {name!r}; number them anew"
                )
            if name.lower() in names:
                self._fail(fields["name"], f"class {name!r} is given twice; each name needs its own class")
            color = self._color(fields["color"], f"the color of {name!r}")
            if color in colors:
                self._fail(fields["color"], f"{colors[color]!r} and {name!r} have one color; change one")
            group = self._text(fields["group"], f"the group of {name!r}") if "group" in fields else ""
            if not (group.isprintable() and len(group) <= 64):
                self._fail(fields["group"], f"the group of {name!r} must be at most 64 printable characters")
            own = self._list(fields["aliases"], f"the aliases of {name!r}") if "aliases" in fields else []
            texts = [self._class_name(alias, f"an alias of {name!r}") for alias in own]
            aliases += [(alias, text, name) for alias, text in zip(own, texts)]
            found[class_id] = SemanticClass(class_id, name, color, group, tuple(texts))
            names.add(name.lower())
            colors[color] = name
        for alias, text, name in aliases:
            if text.lower() in names:
                self._fail(alias, f"alias {text!r} of {name!r} is used twice; each name means one class")
            names.add(text.lower())
        return ClassTable(tuple(found[i] for i in range(len(found))))

    def _class_name(self, node: yaml.Node, what: str) -> str:
        name = self._text(node, what)
        if not is_class_name(name):
            self._fail(node, f"{what} {name!r} must be 1 to 64 printable characters, without a comma or a quote")
        return name

    def _labels(self, node: yaml.Node, classes: ClassTable) -> Labels:
        fields = self._fields(node, "labels", ("kind",), ("values", "ignore", "unlisted"))
        kind = self._one_of(fields["kind"], "kind", ("train_ids", "ids", "colors"))
        read: Callable[[yaml.Node, str], Value] = self._byte
        if kind == "colors":
            read = partial(self._color, in_list=True)
        class_ids: dict[Value, int] = {}
        if "values" in fields:
            if kind == "train_ids":
                self._fail(fields["values"], "kind train_ids takes no values, as they are the ids; use kind ids")
            entries = self._entries(fields["values"], "values")
            by_name = {c.name: c.id for c in classes}
            for name, (key, values) in entries.items():
                if name not in by_name:
                    near = difflib.get_close_matches(name, by_name, 1)
                    meant = f"did you mean {near[0]!r}?" if near else f"the classes are {', '.join(by_name)}"
                    self._fail(key, f"values of an unknown class {name!r}; {meant}")
                for value_node in self._list(values, f"the values of {name!r}"):
                    value = read(value_node, f"a value of {name!r}")
                    if value in class_ids:
                        other = classes.names[class_ids[value]]
                        self._fail(value_node, f"value {_shown(value)} is listed for {other!r} and {name!r}; keep one")
                    class_ids[value] = by_name[name]
            if not class_ids:
                self._fail(fields["values"], "values is empty; list the values of each class")
        elif kind == "ids":
            self._fail(node, "kind ids needs values: {class: [numbers]}; or use kind train_ids")
        elif kind == "colors":
            class_ids = {c.color: c.id for c in classes}
        else:
            class_ids = {c.id: c.id for c in classes}
        ignored: set[Value] = set()
        for value_node in self._list(fields["ignore"], "ignore") if "ignore" in fields else []:
            is_minus_one = kind != "colors" and value_node.value == "-1"  # 255 in a byte
            value = IGNORE_LABEL if is_minus_one else read(value_node, "a value of ignore")
            if value in class_ids:
                name = classes.names[class_ids[value]]
                self._fail(value_node, f"value {_shown(value)} is listed for {name!r} and in ignore; keep one")
            ignored.add(value)
        if kind != "colors" and IGNORE_LABEL not in class_ids:
            ignored.add(IGNORE_LABEL)
        unlisted = "error"
        if "unlisted" in fields:
            unlisted = self._one_of(fields["unlisted"], "unlisted", ("error", "ignore"))
        return Labels("colors" if kind == "colors" else "ids", class_ids, frozenset(ignored), unlisted)  # type: ignore[arg-type]

    def _byte(self, node: yaml.Node, what: str) -> int:
        return self._integer(node, what, 0, 255)

    def _layouts(self, node: yaml.Node, classes: ClassTable) -> tuple[Layout, ...]:
        if isinstance(node, yaml.ScalarNode):
            name = self._built_in(node, "layout")
            layouts = load_description(name).layouts
            if any(layout.labels for layout in layouts):
                self._fail(node, f"the layout of {name} has labels of its own; write the patterns out")
            return layouts
        nodes = self._list(node, "layout") if isinstance(node, yaml.SequenceNode) else [node]
        if not nodes:
            self._fail(node, "layout is empty; give images and masks")
        return tuple(self._layout(entry, classes) for entry in nodes)

    def _layout(self, node: yaml.Node, classes: ClassTable) -> Layout:
        fields = self._fields(node, "a layout", ("images", "masks"), ("name", "labels", "splits"))
        splits = self._splits(fields["splits"]) if "splits" in fields else None
        needed = ("stem",) if splits else ("split", "stem")
        images = self._pattern(fields["images"], "images", needed)
        suffix = PurePosixPath(images).suffix
        if suffix != ".*" and suffix.lower() not in IMAGE_SUFFIXES:
            self._fail(fields["images"], f"images {images!r} must end in .* or one of {', '.join(IMAGE_SUFFIXES)}")
        masks = self._pattern(fields["masks"], "masks", needed)
        if PurePosixPath(masks).suffix.lower() not in MASK_SUFFIXES:
            lossy = "JPEG and WebP change values; " if masks.lower().endswith((".jpg", ".jpeg", ".webp")) else ""
            self._fail(
                fields["masks"], f"masks {masks!r} must end in one of {', '.join(MASK_SUFFIXES)}; {lossy}use PNG"
            )
        known = PLACEHOLDER.findall(images)
        self._require_known(fields["masks"], "masks", masks, known)
        name = self._text(fields["name"], "the name") if "name" in fields else "{stem}"
        if "name" in fields:
            self._check_braces(fields["name"], "name", name, ("stem",))
            if "{folders}" in name:
                self._fail(
                    fields["name"],
                    f"name {name!r} has {{folders}}, which may be several folders; name each folder of the "
                    "patterns, such as {city}/{stem}.*, and use that",
                )
            self._require_known(fields["name"], "name", name, known)
            if "/" in name or "\\" in name or not name.isprintable():
                self._fail(fields["name"], f"name {name!r} must be a file's name, without a folder or a suffix")
        labels = self._labels(fields["labels"], classes) if "labels" in fields else None
        return Layout(images, masks, name, labels, splits)

    def _splits(self, node: yaml.Node) -> dict[str, tuple[str, ...]]:
        splits = {}
        for name, (key, patterns) in self._entries(node, "splits").items():
            if PurePosixPath(name).name != name or name == ".." or not name.isprintable():
                self._fail(key, f"split {name!r} must be a plain folder name, such as train")
            nodes = self._list(patterns, f"the patterns of split {name!r}")
            splits[name] = tuple(self._text(each, f"a pattern of split {name!r}") for each in nodes)
            if not (splits[name] and all(pattern.isprintable() for pattern in splits[name])):
                self._fail(patterns, f"split {name!r} needs printable patterns of stems, such as [0001_*]")
        if not splits:
            self._fail(node, "splits is empty; give at least one split, or remove it")
        return splits

    def _pattern(self, node: yaml.Node, what: str, needed: Iterable[str]) -> str:
        pattern = self._text(node, what)
        parts = pattern.split("/")
        if not pattern.isprintable() or "\\" in pattern:
            self._fail(node, f"{what} {pattern!r} must be printable, with / between folders")
        if pattern.startswith(("/", "~")) or re.match(r"[A-Za-z]:", pattern) or ".." in parts:
            self._fail(node, f"{what} {pattern!r} leads out of the root; give a path below it, without ..")
        if "" in parts or "." in parts:
            self._fail(node, f"{what} {pattern!r} has an empty folder name; remove // and ./")
        self._check_braces(node, what, pattern, needed)
        if "*" in pattern.removesuffix(".*"):
            self._fail(
                node, f"{what} {pattern!r} has a *, which is only for any suffix, as in {{stem}}.*; use a placeholder"
            )
        if any("{folders}" in part and part != "{folders}" for part in parts) or parts.count("{folders}") > 1:
            self._fail(node, f"{what} {pattern!r} must have {{folders}} once and alone between two /")
        return pattern

    def _check_braces(self, node: yaml.Node, what: str, pattern: str, needed: Iterable[str]) -> None:
        if set("{}") & set(PLACEHOLDER.sub("", pattern)):
            self._fail(
                node, f"{what} {pattern!r} has a brace that is not a placeholder such as {{stem}}; pair the braces"
            )
        if re.search(r"\}\{", pattern):
            self._fail(node, f"{what} {pattern!r} has two placeholders side by side; put text between them")
        for name in needed:
            if f"{{{name}}}" not in pattern:
                other = ", or divide the images with splits: {train: [...]}" if name == "split" else ""
                self._fail(node, f"{what} {pattern!r} lacks {{{name}}}; add it{other}")

    def _require_known(self, node: yaml.Node, what: str, pattern: str, known: Sequence[str]) -> None:
        for name in PLACEHOLDER.findall(pattern):
            if name not in known:
                self._fail(node, f"{what} {pattern!r} has {{{name}}}, which images lack; images have {_braced(known)}")


def _braced(names: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in dict.fromkeys(names))


def _shown(value: Value) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _kind(node: yaml.Node) -> str:
    """A node in the user's words."""
    if isinstance(node, yaml.MappingNode):
        return "`key: value` entries"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    kinds = {"null": "nothing", "bool": "yes or no", "int": "a number", "float": "a number", "timestamp": "a date"}
    kind = kinds.get(node.tag.rsplit(":", 1)[-1], "text")
    return f"{kind} ({node.value})" if node.value else kind
