"""Finding a data set's images and masks by the patterns of its description."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from utils.data import bdd100k
from utils.data.bdd100k import Item, Split, match_key
from utils.data.description import DEFAULT, PLACEHOLDER, Description, Layout
from utils.data.image_files import IMAGE_SUFFIXES
from utils.runtime.errors import UserError
from utils.runtime.files import is_folder, listed

_ANY_SUFFIX = rf"(?i:{'|'.join(map(re.escape, IMAGE_SUFFIXES))})"


@dataclass(frozen=True)
class _Found:
    """A file that a pattern matches, and the values of the pattern's placeholders, in the form of `match_key`."""

    path: Path
    values: dict[str, str]


def find_split(root: Path, split: str, description: Description) -> Split:
    """Find a split's images and masks, and pair them by the placeholders of the patterns, sorted by name.

    Of the layouts, the first with images and masks of the split is used, else the first with images. A split without
    any mask has no labels, as in `bdd100k.find_split`, which finds BDD100K itself.

    Raises:
        UserError: `root` is not a folder or cannot be read, has no image of the split, two images or two masks have one
            name, or there are masks, but none of any image, or pictures that are no masks in a folder of masks.
    """
    if description.name == DEFAULT:
        return bdd100k.find_split(root, split)
    if Path(split).name != split or split in ("", ".."):  # it is a folder to read and one to write
        raise UserError(f"split {split!r}: not a plain folder name (use train, val or test)")
    if not is_folder(root):
        raise UserError(f"{root}: no such folder; give the data set's folder as --root")
    found = [(layout, *_in_layout(root, split, layout)) for layout in description.layouts]
    usable = [entry for entry in found if entry[1] and entry[2]] or [entry for entry in found if entry[1]]
    if not usable:
        raise UserError(_nothing(root, split, description))
    layout, images, masks = usable[0]
    if not masks and (wrong := _unusable(root, split, [entry[0] for entry in usable])):
        raise UserError(wrong)
    return _paired(root, split, layout, images, masks, description)


def _in_layout(root: Path, split: str, layout: Layout) -> tuple[list[_Found], list[_Found]]:
    """The images and the masks of a split in one layout."""
    if layout.splits is not None and split not in layout.splits:
        return [], []
    of_split = layout.splits[split] if layout.splits else ("*",)
    images, masks = (
        [
            f
            for f in _search(root, pattern.replace("{split}", split))
            if any(fnmatchcase(f.values["stem"], match_key(each)) for each in of_split)
        ]
        for pattern in (layout.images, layout.masks)
    )
    are_masks = {found.path for found in masks}  # both may be in one folder
    return [found for found in images if found.path not in are_masks], masks


def _paired(
    root: Path, split: str, layout: Layout, images: list[_Found], masks: list[_Found], description: Description
) -> Split:
    keys = [name for name in PLACEHOLDER.findall(layout.masks) if name != "split"]
    by_key: dict[tuple[str, ...], _Found] = {}
    for mask in masks:
        other = by_key.setdefault(tuple(mask.values[name] for name in keys), mask)
        if other is not mask:
            raise UserError(f"{mask.path}: a second mask of the same name beside {other.path}; keep one")
    by_name: dict[str, _Found] = {}
    for image in images:
        name = PLACEHOLDER.sub(lambda part, image=image: {**image.values, "split": split}[part[1]], layout.name)  # type: ignore[misc]
        other = by_name.setdefault(name, image)
        if other is not image:
            folders = [p for p in dict.fromkeys(PLACEHOLDER.findall(layout.images)) if p not in ("split", "folders")]
            fix = "keep one"
            if any(other.values[p] != image.values[p] for p in folders):
                fix = f'set name: "{"_".join(f"{{{p}}}" for p in folders)}" in the layout of {description.name}'
            elif other.values != image.values:
                fix = 'write {city} or the like for {folders}, and name: "{city}_{stem}"'
                fix += f" in the layout of {description.name}"
            raise UserError(f"{image.path}: a second image named {name!r} beside {other.path}; {fix}")
    pairs = {name: by_key.get(tuple(image.values[k] for k in keys)) for name, image in sorted(by_name.items())}
    used = {mask.path for mask in pairs.values() if mask}
    if masks and not used:
        raise UserError(
            f"{_fixed_part(root, layout.masks, split)}: holds {len(masks):,} masks, such as {masks[0].path.name}, but "
            f"none belongs to any image, such as {images[0].path}; the patterns are {layout.images} and {layout.masks}"
        )
    return Split(
        items=[Item(n, by_name[n].path, mask.path if mask else None) for n, mask in pairs.items() if mask or not used],
        labelled=bool(used),
        image_dir=_fixed_part(root, layout.images, split),
        mask_dir=_fixed_part(root, layout.masks, split),
        base=root,
        images_without_mask=[by_name[name].path for name, mask in pairs.items() if used and not mask],
        masks_without_image=[mask.path for mask in masks if mask.path not in used],
        notes=[],
        labels=layout.labels or description.labels,
    )


def _unusable(root: Path, split: str, layouts: list[Layout]) -> str | None:
    """Why a split without any mask is not simply unlabelled, if so: a folder of masks holds other pictures."""
    for layout in layouts:
        folder, folders = _fixed_part(root, layout.masks, split), layout.masks.rpartition("/")[0]
        if PLACEHOLDER.findall(folders) != ["split"] or folder == _fixed_part(root, layout.images, split):
            continue  # what it holds may be masks of other splits, or images
        visible = [path for path in (listed(folder) if is_folder(folder) else ()) if not path.name.startswith(".")]
        if found := [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]:
            return (
                f"{folder}: holds {len(found):,} pictures, such as {found[0].name}, but no mask, "
                f"such as {layout.masks.replace('{split}', split)}; rename them, or correct the layout "
                "(JPEG changes labels: save them as PNG)"
            )
    return None


def _nothing(root: Path, split: str, description: Description) -> str:
    """What to say where no layout has an image of the split."""
    layouts = [layout for layout in description.layouts if layout.splits is None or split in layout.splits]
    if not layouts:
        known = dict.fromkeys(name for layout in description.layouts for name in layout.splits or ())
        return f"split {split!r}: {description.name} has no such split; its splits are {', '.join(known)}"
    patterns = dict.fromkeys(
        layout.images.replace("{split}", split)
        + (f" with {' or '.join(layout.splits[split])}" if layout.splits else "")
        for layout in layouts
    )
    fix = "give the folder that holds these as --root, or correct the layout"
    masks = {file.path for layout in layouts for file in _search(root, layout.masks)}
    images = {file.path: file for layout in layouts for file in _search(root, layout.images)}
    found = [file for path, file in images.items() if path not in masks]
    if splits := sorted({file.values["split"] for file in found if "split" in file.values}):
        fix = f"its splits are {', '.join(splits[:10])}"
    elif found:
        fix = f"there are {len(found):,} others, such as {found[0].path.name}; correct splits: in the layout"
    return f"{root}: no images of split {split!r} of {description.name} (searched {' or '.join(patterns)}); {fix}"


def _fixed_part(root: Path, pattern: str, split: str) -> Path:
    """The folder that holds all files of a pattern."""
    folders = pattern.replace("{split}", split).split("/")[:-1]
    fixed = next((i for i, folder in enumerate(folders) if "{" in folder), len(folders))
    return root.joinpath(*folders[:fixed])


def _search(root: Path, pattern: str) -> list[_Found]:
    """All files that match a pattern, hidden ones left out, sorted by path."""
    return list(_below(root, pattern.split("/"), {}))


def _below(folder: Path, parts: list[str], values: dict[str, str]) -> Iterator[_Found]:
    part, *rest = parts
    if part == "{folders}":
        for place in _folders_below(folder) if is_folder(folder) else ():
            yield from _below(place, rest, {**values, "folders": match_key(os.path.relpath(place, folder))})
    elif rest and "{" not in part:
        if is_folder(folder / part):
            yield from _below(folder / part, rest, values)
    elif is_folder(folder):
        expression = _expression(part, values, is_file=not rest)
        for path in listed(folder):
            match = None if path.name.startswith(".") else expression.fullmatch(match_key(path.name))
            if match and rest and is_folder(path):
                yield from _below(path, rest, values | match.groupdict())
            elif match and not rest:
                yield _Found(path, values | match.groupdict())


def _folders_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The folder and all folders below it, by way of links too, but for links to a folder `above`."""
    real = os.path.realpath(folder)
    if real in above:
        return
    yield folder
    for path in listed(folder):
        if not path.name.startswith(".") and is_folder(path):
            yield from _folders_below(path, above | {real})


def _expression(part: str, values: dict[str, str], *, is_file: bool) -> re.Pattern[str]:
    """The regular expression of a part of a pattern, with the values that are known from the folders above."""
    name, suffix = part, ""
    if is_file:
        name, _, suffix = part.rpartition(".")
        suffix = _ANY_SUFFIX if suffix == "*" else rf"\.(?i:{re.escape(suffix)})"
    expression, seen = "", set()
    for i, text in enumerate(PLACEHOLDER.split(name)):
        if i % 2 == 0:
            expression += re.escape(match_key(text))
        elif text in values:
            expression += re.escape(values[text])
        else:
            expression += f"(?P={text})" if text in seen else f"(?P<{text}>.+)"
            seen.add(text)
    return re.compile(expression + suffix)
