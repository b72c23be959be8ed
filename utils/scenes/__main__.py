"""Draw a data set of driving scenes in BDD100K's layout, to run everything without a download.

python -m utils.scenes --output_dir data/scenes --train 48 --val 16 --seed 0
"""

from __future__ import annotations

from pathlib import Path

from utils.runtime.cli import Parser, non_negative_int, positive_int, run, seed
from utils.runtime.errors import UserError
from utils.scenes.dataset import write_dataset


def main() -> None:
    parser = Parser(__doc__)
    parser.prog = "python -m utils.scenes"  # argparse would say __main__.py
    parser.add_flag("output_dir", type=Path, required=True, help="folder to write the data set to")
    parser.add_flag("train", type=non_negative_int, default=48, help="scenes for training")
    parser.add_flag("val", type=non_negative_int, default=16, help="scenes for validation")
    parser.add_flag("seed", type=seed, default=0, help="the same seed gives the same files")
    parser.add_flag("height", type=positive_int, default=720, help="pixels")
    parser.add_flag("width", type=positive_int, default=1280, help="pixels")
    parser.add_flag("num_workers", type=non_negative_int, default=0, help="processes; 0 and 1 draw in this one")
    args = parser.parse_args()
    counts = {split: count for split, count in (("train", args.train), ("val", args.val)) if count}
    if not counts:
        raise UserError("nothing to draw: --train and --val are both 0")
    write_dataset(args.output_dir, counts, args.seed, args.num_workers, args.height, args.width)


if __name__ == "__main__":
    run(main)
