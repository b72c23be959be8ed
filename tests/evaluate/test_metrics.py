"""utils.evaluate.metrics: matrices by hand, a slow count in plain Python, torchmetrics, BDD100K's own toolkit."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from tests.helpers.tables import table_of
from utils.data.classes import BDD100K, IGNORE_LABEL
from utils.evaluate.metrics import (
    ConfusionMatrix,
    count_pixels,
    format_details,
    format_report,
    image_figures,
    iou_per_class,
    mean_iou,
    pixel_accuracy,
    precision_per_class,
    predicted_pixels,
    recall_per_class,
    results_dict,
    target_pixels,
    unclaimed_share,
)
from utils.runtime.text import display_width

NO_CLASS = len(BDD100K)  # column of the pixels predicted as no class
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))

# Three classes; 255 in the target at a pixel that is predicted as road, and class 5 only in the prediction.
TARGET = [[0, 0, 0, 1], [1, 255, 2, 2]]
PREDICTION = [[0, 0, 1, 1], [255, 0, 5, 2]]


def count(prediction: Tensor, target: Tensor) -> Tensor:
    confusion = ConfusionMatrix(len(BDD100K))
    confusion.update(prediction, target)
    return confusion.matrix


def hand_matrix() -> Tensor:
    return count(torch.tensor(PREDICTION, dtype=torch.uint8), torch.tensor(TARGET, dtype=torch.uint8))


def random_maps(seed: int, n: int = 3, height: int = 37, width: int = 53) -> tuple[np.ndarray, np.ndarray]:
    """Label maps (N, H, W) uint8 that agree in about half of their pixels.

    Both hold 255; ids 15 and above are in no target, and of those 17 and 18 in no prediction either.
    """
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 15, (n, height, width)).astype(np.uint8)
    prediction = np.where(rng.random(target.shape) < 0.5, target, rng.integers(0, 17, target.shape)).astype(np.uint8)
    target[rng.random(target.shape) < 0.15] = IGNORE_LABEL
    prediction[rng.random(target.shape) < 0.1] = IGNORE_LABEL
    return prediction, target


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_matrix_worked_by_hand(device: str, dtype: torch.dtype) -> None:
    confusion = ConfusionMatrix(len(BDD100K), device)
    confusion.update(
        torch.tensor(PREDICTION, dtype=dtype, device=device), torch.tensor(TARGET, dtype=dtype, device=device)
    )
    expected = torch.zeros(19, 20, dtype=torch.int64)
    for row, column, pixels in [(0, 0, 2), (0, 1, 1), (1, 1, 1), (1, NO_CLASS, 1), (2, 5, 1), (2, 2, 1)]:
        expected[row, column] = pixels
    assert confusion.matrix.device.type == device
    assert confusion.matrix.dtype == torch.int64
    assert torch.equal(confusion.matrix.cpu(), expected)
    assert mean_iou(confusion.matrix) == pytest.approx(0.5, abs=1e-15)


def test_figures_worked_by_hand() -> None:
    matrix = hand_matrix()
    nan = math.nan
    assert iou_per_class(matrix).tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 2] + [nan] * 16, abs=1e-15, nan_ok=True)
    assert precision_per_class(matrix).tolist() == pytest.approx([1, 1 / 2, 1, nan, nan, 0] + [nan] * 13, nan_ok=True)
    assert recall_per_class(matrix).tolist() == pytest.approx([2 / 3, 1 / 2, 1 / 2] + [nan] * 16, nan_ok=True)
    assert target_pixels(matrix).tolist() == [3, 2, 2] + [0] * 16
    assert predicted_pixels(matrix).tolist() == [2, 2, 1, 0, 0, 1] + [0] * 13
    assert mean_iou(matrix) == pytest.approx((2 / 3 + 1 / 3 + 1 / 2) / 3, abs=1e-15)
    assert pixel_accuracy(matrix) == pytest.approx(4 / 7, abs=1e-15)
    assert unclaimed_share(matrix) == pytest.approx(1 / 7, abs=1e-15)


def test_counts_of_a_large_data_set_stay_exact() -> None:
    # 10,000 images of 1280 x 720 hold 9.2e9 pixels: past int32, and past what float32 counts exactly.
    large = hand_matrix() * 3_000_000_000
    assert target_pixels(large).tolist()[:3] == [9_000_000_000, 6_000_000_000, 6_000_000_000]
    large[0, 0] += 1
    assert iou_per_class(large)[0].item() == 6_000_000_001 / 9_000_000_001
    assert results_dict(large, BDD100K)["confusion_matrix"][0][0] == 6_000_000_001


@pytest.mark.parametrize("value", [-1, 19, 100, 255, 256, 300, -255])
def test_prediction_that_is_no_class_is_a_miss(value: int) -> None:
    matrix = count(torch.tensor([[value, 3]]), torch.tensor([[3, 3]]))
    assert matrix[3, NO_CLASS] == 1
    assert matrix[3, 3] == 1
    assert matrix.sum() == 2
    assert mean_iou(matrix) == 0.5


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(19, torch.uint8), (42, torch.int64), (254, torch.uint8), (-1, torch.int64), (-1, torch.int8), (256, torch.int32)],
)
def test_target_that_is_no_label_is_an_error_and_counts_nothing(value: int, dtype: torch.dtype) -> None:
    confusion = ConfusionMatrix(len(BDD100K))
    target = torch.tensor([[3, value]], dtype=dtype)
    with pytest.raises(ValueError, match=rf"target must be 0-18 or 255, got \[{value}\]"):
        confusion.update(torch.zeros_like(target), target)
    assert confusion.matrix.sum() == 0


def test_maps_that_do_not_fit_are_errors() -> None:
    confusion = ConfusionMatrix(len(BDD100K))
    labels = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="differ in shape"):
        confusion.update(labels, labels.T)
    with pytest.raises(ValueError, match=r"prediction must hold integers, got torch\.float32"):
        confusion.update(labels.float(), labels)
    with pytest.raises(ValueError, match=r"target must hold integers, got torch\.bool"):
        confusion.update(labels, labels.bool())
    with pytest.raises(ValueError, match=r"\(19, 20\)"):
        mean_iou(torch.zeros(19, 19, dtype=torch.int64))
    assert confusion.matrix.sum() == 0


def test_parts_sum_to_the_whole() -> None:
    prediction, target = (torch.from_numpy(maps) for maps in random_maps(0, n=4))
    whole = count(prediction, target)
    first, second = ConfusionMatrix(len(BDD100K)), ConfusionMatrix(len(BDD100K))
    first.update(prediction[0], target[0])
    second.update(prediction[1:3], target[1:3])
    second.update(prediction[3], target[3])
    first.matrix += second.matrix
    assert torch.equal(first.matrix, whole)
    assert torch.equal(count(prediction.flip(0), target.flip(0)), whole)


def slow_figures(prediction: np.ndarray, target: np.ndarray) -> tuple[list[float], list[float], list[float], float]:
    """IoU, precision and recall per class and pixel accuracy, from sets of pixel positions instead of a matrix."""
    predicted: dict[int, set[int]] = {k: set() for k in range(len(BDD100K))}
    true: dict[int, set[int]] = {k: set() for k in range(len(BDD100K))}
    for i, (p, t) in enumerate(zip(prediction.ravel().tolist(), target.ravel().tolist())):
        if t != 255:
            true[t].add(i)
            if p in predicted:
                predicted[p].add(i)
    iou, precision, recall = [], [], []
    for k in range(len(BDD100K)):
        hits = len(predicted[k] & true[k])
        iou.append(hits / len(predicted[k] | true[k]) if true[k] else math.nan)
        precision.append(hits / len(predicted[k]) if predicted[k] else math.nan)
        recall.append(hits / len(true[k]) if true[k] else math.nan)
    right = sum(len(predicted[k] & true[k]) for k in range(len(BDD100K)))
    return iou, precision, recall, right / sum(len(true[k]) for k in range(len(BDD100K)))


@pytest.mark.parametrize("seed", range(4))
def test_equals_slow_count(seed: int) -> None:
    prediction, target = random_maps(seed)
    matrix = count(torch.from_numpy(prediction), torch.from_numpy(target))
    iou, precision, recall, accuracy = slow_figures(prediction, target)
    assert iou_per_class(matrix).tolist() == pytest.approx(iou, abs=1e-14, nan_ok=True)
    assert precision_per_class(matrix).tolist() == pytest.approx(precision, abs=1e-14, nan_ok=True)
    assert recall_per_class(matrix).tolist() == pytest.approx(recall, abs=1e-14, nan_ok=True)
    assert pixel_accuracy(matrix) == pytest.approx(accuracy, abs=1e-14)
    defined = [value for value in iou if not math.isnan(value)]
    assert len(defined) == 15
    assert mean_iou(matrix) == pytest.approx(sum(defined) / 15, abs=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_equals_torchmetrics(seed: int) -> None:
    prediction, target = (torch.from_numpy(maps).long() for maps in random_maps(seed))
    matrix = count(prediction, target)
    # torchmetrics wants predictions among its classes: "no class" becomes a twentieth, which no target has.
    claimed = prediction.where(prediction < len(BDD100K), NO_CLASS)
    theirs = MulticlassConfusionMatrix(num_classes=20, ignore_index=IGNORE_LABEL)(claimed, target)
    assert torch.equal(theirs[: len(BDD100K)], matrix)
    assert theirs[NO_CLASS].sum() == 0
    jaccard = MulticlassJaccardIndex(num_classes=20, ignore_index=IGNORE_LABEL, average="none")(claimed, target)
    present = target_pixels(matrix) > 0
    ours = iou_per_class(matrix)
    assert torch.equal(ours.isnan(), ~present)
    torch.testing.assert_close(jaccard[: len(BDD100K)][present].double(), ours[present], rtol=0, atol=1e-6)  # float32


# The toolkit divides 0 by 0 for absent classes, and was written for pydantic 1.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("seed", range(3))
def test_equals_bdd100k_toolkit(seed: int, tmp_path: Path) -> None:
    """The toolkit's own evaluation (`pip install bdd100k==1.0.1`) of the same maps as PNG files."""
    from bdd100k.eval.seg import evaluate_sem_seg

    prediction, target = random_maps(seed, n=5)
    paths: dict[str, list[str]] = {}
    for kind, maps in (("gt", target), ("pred", prediction)):
        (tmp_path / kind).mkdir()
        paths[kind] = [str(tmp_path / kind / f"{i}.png") for i in range(len(maps))]
        for path, labels in zip(paths[kind], maps):
            assert cv2.imwrite(path, labels)
    theirs = evaluate_sem_seg(paths["gt"], paths["pred"], nproc=1, with_logs=False)

    matrix = count(torch.from_numpy(prediction), torch.from_numpy(target))
    per_class, average = theirs.IoU
    assert tuple(per_class) == BDD100K.names
    # It works in percent, and writes 0 for the classes that the ground truth lacks, which its mean leaves out as well.
    ours = (100 * iou_per_class(matrix)).tolist()
    assert sum(math.isnan(iou) for iou in ours) == 4
    assert [0 if math.isnan(iou) else iou for iou in ours] == pytest.approx(list(per_class.values()), abs=1e-12, rel=0)
    assert 100 * mean_iou(matrix) == pytest.approx(average["AVERAGE"], abs=1e-12, rel=0)
    assert 100 * pixel_accuracy(matrix) == pytest.approx(theirs.pAcc, abs=1e-12, rel=0)
    # What it calls accuracy of a class is the share of the class's predictions that are right.
    precision = (100 * precision_per_class(matrix)).nan_to_num(0).tolist()
    assert precision == pytest.approx(list(theirs.Acc[0].values()), abs=1e-12, rel=0)


# The example of the specification (README_BDD100K.md, 示例输出), character by character.
SPECIFIED = """\
评估结果
============================================================
整体 mIoU: 0.6523

每个类别的 IoU:
------------------------------------------------------------
 0. road                : 0.9234
 1. sidewalk            : 0.7821
 2. building            : 0.8456
...
18. bicycle             : 0.5123
============================================================"""


def specified_matrix() -> Tensor:
    """10,000 pixels per class, so many of them right, and the others claimed by no class, that the example results."""
    right = torch.tensor([9234, 7821, 8456] + [6220] * 12 + [6221] * 3 + [5123])
    matrix = torch.diag_embed(right)
    return torch.cat([matrix, 10_000 - right[:, None]], dim=1)


def test_report_is_the_specifications() -> None:
    report = format_report(specified_matrix(), BDD100K)
    before, after = SPECIFIED.split("\n...\n")
    assert report.startswith(before + "\n")
    assert report.endswith("\n" + after)
    lines = report.split("\n")
    assert len(lines) == 6 + 19 + 1
    assert [line[4:24].rstrip() for line in lines[6:25]] == list(BDD100K.names)
    assert {len(line) for line in lines[6:25]} == {len(" 0. road                : 0.9234")}
    assert lines[9] == " 3. wall                : 0.6220"


def test_report_prints_nan_for_classes_that_the_ground_truth_lacks() -> None:
    lines = format_report(hand_matrix(), BDD100K).split("\n")
    assert lines[2] == "整体 mIoU: 0.5000"
    assert lines[6:10] == [
        " 0. road                : 0.6667",
        " 1. sidewalk            : 0.3333",
        " 2. building            : 0.5000",
        " 3. wall                : nan",
    ]
    assert lines[11] == " 5. pole                : nan"  # predicted, but never true
    assert format_report(ConfusionMatrix(len(BDD100K)).matrix, BDD100K).split("\n")[2] == "整体 mIoU: nan"


def test_details_give_pixels_and_the_source_of_boxes() -> None:
    details = format_details(hand_matrix(), "oracle", BDD100K)
    rows = [line.split() for line in details.split("\n")]
    assert rows[1] == ["0.", "road", "3", "42.86%", "1.0000", "0.6667"]
    assert rows[6] == ["5.", "pole", "0", "0.00%", "0.0000", "nan"]
    assert "pixel accuracy: 0.5714 of 7 labelled pixels; 14.29% of them predicted as no class" in details
    assert "oracle boxes: taken from the ground truth; these figures are an upper bound" in details
    other = format_details(hand_matrix(), "a detector", BDD100K)
    assert "oracle" not in other
    assert other.endswith("boxes: a detector")
    assert "nan of them" in format_details(ConfusionMatrix(len(BDD100K)).matrix, "oracle", BDD100K).replace(
        "nan%", "nan"
    )


def test_results_are_strict_json() -> None:
    results = json.loads(json.dumps(results_dict(hand_matrix(), BDD100K), allow_nan=False))
    assert results["miou"] == pytest.approx(0.5)
    assert results["pixel_accuracy"] == pytest.approx(4 / 7)
    assert results["unclaimed_share"] == pytest.approx(1 / 7)
    assert results["labelled_pixels"] == 7
    assert results["per_class"][0] == {
        "id": 0,
        "name": "road",
        "iou": pytest.approx(2 / 3),
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "gt_pixels": 3,
        "predicted_pixels": 2,
    }
    assert results["per_class"][5] == {
        "id": 5,
        "name": "pole",
        "iou": None,
        "precision": 0.0,
        "recall": None,
        "gt_pixels": 0,
        "predicted_pixels": 1,
    }
    assert [entry["name"] for entry in results["per_class"]] == list(BDD100K.names)
    assert [len(row) for row in results["confusion_matrix"]] == [19] * 19
    assert results["confusion_matrix"][0][:2] == [2, 1]
    assert results["unclaimed"] == [0, 1] + [0] * 17
    for row, unclaimed, entry in zip(results["confusion_matrix"], results["unclaimed"], results["per_class"]):
        assert sum(row) + unclaimed == entry["gt_pixels"]
    empty = json.loads(json.dumps(results_dict(ConfusionMatrix(len(BDD100K)).matrix, BDD100K), allow_nan=False))
    assert empty["miou"] is None
    assert empty["pixel_accuracy"] is None


def test_one_class() -> None:
    matrix = count_pixels(torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 255, 0, 0]]), 1)
    assert matrix.tolist() == [[1, 2]]
    assert iou_per_class(matrix).tolist() == [1 / 3]
    assert unclaimed_share(matrix) == 2 / 3
    assert " 0. 车                  : 0.3333" in format_report(matrix, table_of("车")).split("\n")
    assert image_figures("a", matrix, table_of("车"))["iou"] == {"车": 1 / 3}
    with pytest.raises(ValueError, match=r"target must be 0-0 or 255, got \[1\]"):
        count_pixels(torch.tensor([[0]]), torch.tensor([[1]]), 1)


@pytest.mark.parametrize(
    "names", [("道路", "road", "人行横道与非机动车混合车道"), tuple(f"第{i}类" for i in range(150))]
)
def test_columns_are_straight_with_wide_names_and_three_digits(names: tuple[str, ...]) -> None:
    classes = table_of(*names)
    labels = torch.arange(len(names)).repeat(2, 1)
    matrix = count_pixels(labels, labels, len(names))
    block = format_report(matrix, classes).split("\n")[6:-1]
    assert len(block) == len(names)
    assert {display_width(line[: line.rindex(":")]) for line in block} == {display_width(block[0]) - 8}
    assert all(name in line and line.endswith(": 1.0000") for name, line in zip(names, block))
    table = format_details(matrix, "none", classes).split("\n")[: len(names) + 1]
    assert len({display_width(line) for line in table}) == 1


def test_table_of_another_length_is_an_error() -> None:
    for write in (format_report, results_dict):
        with pytest.raises(ValueError, match="zip"):
            write(torch.zeros(3, 4, dtype=torch.int64), table_of("a", "b"))
