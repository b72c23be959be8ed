"""Evaluations side by side, class by class.

python -m utils.compare demo/before demo/after demo/semantic
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.runtime import cli
from utils.runtime.errors import UserError
from utils.runtime.files import cannot_be_read, read_json


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="each an --output_dir of infer_bdd100k.py on one split")
    return parser


def read_results(folder: Path) -> dict[str, Any]:
    """Read `folder/evaluation_results.json`.

    Raises:
        UserError: it is missing or not a result of `infer_bdd100k.py`.
    """
    path = folder / "evaluation_results.json"
    try:
        results = read_json(path)
        if not {"miou", "boxes", "per_class"} <= results.keys():
            raise ValueError("other keys")
        if not all({"id", "name", "iou", "gt_pixels"} <= entry.keys() for entry in results["per_class"]):
            raise ValueError("other keys of a class")
        figures = [results["miou"], *(entry["iou"] for entry in results["per_class"])]
        counts = [entry[key] for entry in results["per_class"] for key in ("id", "gt_pixels")]
        if not all(figure is None or (isinstance(figure, float | int) and 0 <= figure <= 1) for figure in figures):
            raise ValueError("a figure that is none")
        if not all(isinstance(entry["name"], str) for entry in results["per_class"]):
            raise ValueError("a name that is none")
        if not all(isinstance(count, int) for count in counts):
            raise ValueError("a count that is none")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); infer_bdd100k.py writes it") from None
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: not a result of infer_bdd100k.py") from None
    return results


def format_comparison(results: Mapping[str, dict[str, Any]]) -> str:
    """A line for each class that occurs in the ground truth, the mIoU, and where the boxes came from; a column for each
    of `results`, which are as the JSON has them, under its name."""
    width = max(10, *(len(name) + 2 for name in results))
    per_class = [result["per_class"] for result in results.values()]
    lines = [f"{'IoU':<24}{'gt pixels':>14}" + "".join(f"{name:>{width}}" for name in results)]
    for entries in zip(*per_class):
        if entries[0]["iou"] is not None:
            label = f"{entries[0]['id']:2d}. {entries[0]['name']:<20}"
            ious = "".join(f"{entry['iou']:>{width}.4f}" for entry in entries)
            lines.append(f"{label}{entries[0]['gt_pixels']:>14d}{ious}")
    mious = [math.nan if result["miou"] is None else result["miou"] for result in results.values()]
    lines.append(f"{'mIoU':<24}{'':>14}" + "".join(f"{miou:>{width}.4f}" for miou in mious))
    sources = [str(result["boxes"]) for result in results.values()]
    lines.append(f"boxes: {_shared(sources)}")
    if any("map_rule" in result for result in results.values()):
        # Earlier versions had one rule for boxes and did not name it.
        former = ["argmax" if source == "none" else "threshold" for source in sources]
        rules = [str(result.get("map_rule", rule)) for result, rule in zip(results.values(), former)]
        lines.append(f"map rule: {_shared(rules)}")
    if any(result.get("tta") for result in results.values()):
        lines.append(f"tta: {_shared(['yes' if result.get('tta') else 'no' for result in results.values()])}")
    return "\n".join(lines)


def _shared(values: list[str]) -> str:
    """One for each column, or the one that all have."""
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def main(args: argparse.Namespace) -> None:
    read = {folder: read_results(folder) for folder in args.folders}
    first, *others = read
    pixels = {folder: [entry["gt_pixels"] for entry in result["per_class"]] for folder, result in read.items()}
    for other in others:
        if pixels[other] != pixels[first]:
            raise UserError(f"{first} and {other} were measured on different data; evaluate both on the same")
    names = [folder.name for folder in read]
    unique = len(set(names)) == len(names)
    print(format_comparison({folder.name if unique else str(folder): result for folder, result in read.items()}))


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
