"""Compare evaluations class by class.

python -m utils.compare demo/before demo/after demo/semantic
python -m utils.compare demo/before demo/after --html    # also a page, with the images that changed most
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from utils.runtime import cli
from utils.runtime.errors import UserError, printable
from utils.runtime.files import is_folder, make_folder, read_json
from utils.runtime.text import class_column, display_width


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output folders of infer_bdd100k.py")
    parser.add_flag(
        "html",
        type=Path,
        nargs="?",
        const=Path("comparison.html"),
        metavar="FILE",
        help="also write a page that compares them with the first one (FILE: comparison.html if left out)",
    )
    return parser


class ClassResult(TypedDict):
    """A class in `evaluation_results.json`; only what is printed."""

    id: int
    name: str
    iou: float | None
    gt_pixels: int


class Results(TypedDict, total=False):
    """The content of `evaluation_results.json`; only what is printed."""

    miou: float | None
    boxes: object
    per_class: list[ClassResult]
    map_rule: object  # missing from files of earlier versions


def read_results(folder: Path) -> Results:
    """Read `folder/evaluation_results.json`.

    Raises:
        UserError: it is missing, or is not a result of `infer_bdd100k.py`.
    """
    path = folder / "evaluation_results.json"
    results = read_json(path, "give an --output_dir of infer_bdd100k.py")
    if not _is_results(results):
        raise UserError(f"{path}: not a result of infer_bdd100k.py")
    return results


def _is_results(results: Any) -> bool:
    """Whether all that is printed is present and of its type."""
    try:
        classes = results["per_class"]
        figures = [results["miou"], *(entry["iou"] for entry in classes)]
        return (
            "boxes" in results
            and all(figure is None or (isinstance(figure, float | int) and 0 <= figure <= 1) for figure in figures)
            and all(isinstance(entry["name"], str) for entry in classes)
            and all(isinstance(entry[key], int) for entry in classes for key in ("id", "gt_pixels"))
            and all((entry["iou"] is None) == (entry["gt_pixels"] == 0) for entry in classes)
        )
    except (KeyError, TypeError, IndexError):
        return False


def format_comparison(results: Mapping[str, Results]) -> str:
    """A table with a column for each of the named results: classes in the ground truth, mIoU, and box sources."""
    width = max(10, *(len(name) + 2 for name in results))
    per_class = list(zip(*(result["per_class"] for result in results.values())))
    labels = class_column([first["name"] for first, *_ in per_class], [first["id"] for first, *_ in per_class])
    first_width = max(24, *map(display_width, labels))
    lines = [f"{'IoU':<{first_width}}{'gt pixels':>14}" + "".join(f"{name:>{width}}" for name in results)]
    for label, entries in zip(labels, per_class):
        if entries[0]["iou"] is not None:
            ious = "".join(f"{entry['iou']:>{width}.4f}" for entry in entries)
            lines.append(f"{label}{entries[0]['gt_pixels']:>14d}{ious}")
    mious = [math.nan if result["miou"] is None else result["miou"] for result in results.values()]
    lines.append(f"{'mIoU':<{first_width}}{'':>14}" + "".join(f"{miou:>{width}.4f}" for miou in mious))
    sources = [str(result["boxes"]) for result in results.values()]
    lines.append(f"boxes: {_shared(sources)}")
    if any("map_rule" in result for result in results.values()):
        # Earlier versions had one rule for boxes and did not write it.
        former = ["argmax" if source == "none" else "threshold" for source in sources]
        rules = [str(result.get("map_rule", rule)) for result, rule in zip(results.values(), former)]
        lines.append(f"map rule: {_shared(rules)}")
    if any(result.get("tta") for result in results.values()):
        lines.append(f"tta: {_shared(['yes' if result.get('tta') else 'no' for result in results.values()])}")
    return "\n".join(lines)


def _shared(values: list[str]) -> str:
    """The values of all columns, or the one that they share."""
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as they must be to differ: a/eval-val and b/eval-val."""
    deepest = max(len(folder.parts) for folder in folders)
    for depth in range(1, deepest):
        names = [str(Path(*folder.parts[-depth:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def main(args: argparse.Namespace) -> None:
    if args.html and is_folder(args.html):
        raise UserError(f"--html {args.html}: is a folder; give the folders first, then --html")
    if args.html and len(set(args.folders)) < 2:
        raise UserError("--html compares evaluations; give two folders or more")
    read = {folder: read_results(folder) for folder in args.folders}
    first, *others = read
    pixels = {folder: [entry["gt_pixels"] for entry in result["per_class"]] for folder, result in read.items()}
    names_of = {folder: [entry["name"] for entry in result["per_class"]] for folder, result in read.items()}
    for other in others:
        if names_of[other] != names_of[first]:
            lists = [f"{folder} has the classes {', '.join(names_of[folder])}" for folder in (first, other)]
            raise UserError(f"{'; '.join(lists)}; only evaluations of the same classes are comparable")
        if pixels[other] != pixels[first]:
            sizes = [str(read[folder].get("eval_size", "frame")) for folder in (first, other)]
            if sizes[0] != sizes[1]:
                raise UserError(f"{first} has --eval_size {sizes[0]} and {other} {sizes[1]}; evaluate both alike")
            raise UserError(f"{first} and {other} were measured on different data; evaluate both on the same split")
    names = short_names(list(read))
    print(format_comparison(dict(zip(names, read.values()))))
    if args.html:
        from utils.evaluate.comparison import write_comparison  # takes seconds, as it imports PyTorch

        make_folder(args.html.parent, "--html")
        missing = write_comparison(args.html, read, names)
        print(f"\nPage: {printable(str(args.html))}{f' ({missing})' if missing else ''}")


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
