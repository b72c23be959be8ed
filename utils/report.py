"""The result of an evaluation: printed, and written as text, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from utils.files import atomic_write
from utils.metrics import format_details, format_report, results_dict
from utils.prediction import MAP_RULES, MapRule
from utils.visualize import save_confusion_matrix

_SIZES = {"frame": "in the preprocessed S x S frame", "original": "at the original size of the images"}


def write_report(
    output_dir: Path, matrix: Tensor, *, model: str, data: str, box_source: str, eval_size: str, map_rule: MapRule
) -> None:
    """
    Args:
        matrix: the confusion matrix, (19, 20) int64 on the CPU.
        model, data: what was evaluated on what.
        box_source: see `format_details`.
        eval_size: "frame" or "original".
        map_rule: how masks became a map.
    """
    details = format_details(matrix, box_source=box_source)
    rule = "each pixel goes to its highest logit" if box_source == "none" else f"{map_rule}: {MAP_RULES[map_rule]}"
    text = f"{format_report(matrix)}\n\n{details}\nmap rule: {rule}\nscored {_SIZES[eval_size]}\n"
    origin = {"model": model, "data": data, "boxes": box_source, "map_rule": map_rule, "eval_size": eval_size}
    results = json.dumps({**origin, **results_dict(matrix)}, indent=1, ensure_ascii=False)
    print(f"\n{text}")
    outputs = {"evaluation_results.txt": text, "evaluation_results.json": results + "\n"}
    for name, content in outputs.items():
        with atomic_write(output_dir / name) as file:
            file.write(content.encode(errors="backslashreplace"))  # a path need not be text; as JSON has it
    save_confusion_matrix(output_dir / "confusion_matrix.png", matrix.numpy())
    print(f"Results: {', '.join(str(output_dir / name) for name in [*outputs, 'confusion_matrix.png'])}")
