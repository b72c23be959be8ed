"""Two evaluations side by side, class by class.

    python -m utils.compare demo/before demo/after
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from utils import cli
from utils.errors import UserError


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("before", type=Path, help="an --output_dir of infer_bdd100k.py")
    parser.add_argument("after", type=Path, help="another one, over the same data")
    return parser


def read_results(folder: Path) -> dict[str, Any]:
    """Read `folder/evaluation_results.json`.

    Raises:
        UserError: it is missing or not a result of `infer_bdd100k.py`.
    """
    path = folder / "evaluation_results.json"
    try:
        results = json.loads(path.read_bytes())
        if not {"miou", "boxes", "per_class"} <= results.keys():
            raise ValueError("other keys")
        if not all({"id", "name", "iou", "gt_pixels"} <= entry.keys() for entry in results["per_class"]):
            raise ValueError("other keys of a class")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); infer_bdd100k.py writes it") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: not a result of infer_bdd100k.py") from None
    return results


def format_comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A line for each class that occurs in the ground truth, and the mIoU; the arguments are as the JSON has them."""
    lines = [f"{'IoU':<24}{'gt pixels':>14}{'before':>10}{'after':>10}"]
    for old, new in zip(before["per_class"], after["per_class"]):
        if new["iou"] is not None:
            label = f"{new['id']:2d}. {new['name']:<20}"
            lines.append(f"{label}{new['gt_pixels']:>14d}{old['iou']:>10.4f}{new['iou']:>10.4f}")
    mious = [math.nan if results["miou"] is None else results["miou"] for results in (before, after)]
    lines.append(f"{'mIoU':<24}{'':>14}{mious[0]:>10.4f}{mious[1]:>10.4f}")
    return "\n".join([*lines, f"boxes: {after['boxes']}"])


def main(args: argparse.Namespace) -> None:
    before, after = read_results(args.before), read_results(args.after)
    pixels = [[entry["gt_pixels"] for entry in results["per_class"]] for results in (before, after)]
    if pixels[0] != pixels[1]:
        raise UserError(f"{args.before} and {args.after} were measured on different data; evaluate both on the same")
    print(format_comparison(before, after))


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
