"""From logits to label maps: merging by hand, the way to the original size, and whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.inputs import IMAGE_SIZE, write_split
from utils.data.augment import fixed_view
from utils.data.classes import BDD100K, IGNORE_LABEL
from utils.data.datasets import BoxPromptDataset, EvaluationBatch, EvaluationDataset, NpyFolder, collate_evaluation
from utils.data.frame import ImageSize, frame_size
from utils.data.geometry import fitted_size, resize_image
from utils.evaluate.evaluate import evaluate
from utils.model.prediction import Prediction, average_mirrored, features_of, merge_masks, mirror, predict
from utils.model.segmenter import Segmenter, build_model
from utils.runtime.choices import MapRule
from utils.runtime.device import Precision

CPU = Precision(torch.device("cpu"))
MODES = ["box", "semantic"]


def test_merge_masks_by_hand() -> None:
    # Rows: only 13 claims | both do | none does | a logit of 0 claims nothing.
    of_class_13 = [[3.0, -1.0], [2.0, 5.0], [-1.0, -9.0], [0.0, -1.0]]
    of_class_0 = [[-1.0, -2.0], [4.0, 4.5], [-2.0, -0.1], [-1.0, 0.1]]
    planes = torch.tensor([of_class_13, of_class_0])
    merged = merge_masks(planes, torch.tensor([13, 0]), 0.0, (4, 2))
    assert merged.dtype == torch.uint8
    assert merged.tolist() == [[13, 255], [0, 13], [255, 255], [255, 0]]
    always = merge_masks(planes, torch.tensor([13, 0]), -torch.inf, (4, 2))
    assert always.tolist() == [[13, 13], [0, 13], [13, 0], [13, 0]]
    assert merge_masks([], torch.tensor([], dtype=torch.int64), 0.0, (1, 2)).tolist() == [[255, 255]]


def test_a_mask_claims_no_pixel_outside_its_region() -> None:
    planes = torch.tensor([[[9.0, 9.0, 9.0]], [[1.0, -5.0, -7.0]]])
    regions = [(slice(0, 1), slice(0, 1)), (slice(0, 1), slice(0, 2))]
    merged = merge_masks(planes, torch.tensor([13, 0]), -torch.inf, (1, 3), regions)
    assert merged.tolist() == [[13, 0, 255]]
    assert merge_masks(planes, torch.tensor([13, 0]), 0.0, (1, 3), regions).tolist() == [[13, 255, 255]]


@pytest.mark.parametrize("image_size", [64, "48x80", "80x64"])
@pytest.mark.parametrize("resize_mode", ["stretch", "pad"])
def test_masks_end_at_their_boxes_at_any_size(resize_mode: str, image_size: ImageSize) -> None:
    """Against the argmax of planes from which what lies outside a box was taken away."""
    torch.manual_seed(0)
    rows_of_frame, columns_of_frame = frame_size(image_size)
    low_res = torch.randn(4, rows_of_frame // 4, columns_of_frame // 4)
    class_ids = torch.tensor([2, 7, 18, 0])
    boxes = torch.tensor([[3.0, 5, 30, 25], [0, 0, 60, 35], [20, 10, 20, 30], [40, 2, 55, 33]])
    prediction = Prediction(low_res, class_ids, boxes)
    frame = F.interpolate(low_res[None], frame_size(image_size), mode="bilinear", align_corners=False)[0]
    height, width = fitted_size(45, 80, image_size, resize_mode)
    original = F.interpolate(frame[None, :, :height, :width], (45, 80), mode="bilinear", align_corners=False)[0]
    ys, xs = (torch.arange(45) + 0.5) * height / 45, (torch.arange(80) + 0.5) * width / 80
    centres = (torch.arange(rows_of_frame) + 0.5, torch.arange(columns_of_frame) + 0.5)
    at_frame = (frame, *centres, prediction.label_map(image_size))
    restored = prediction.original_label_map(45, 80, image_size=image_size, resize_mode=resize_mode)
    at_original = (original, ys, xs, restored)
    for planes, rows, columns, actual in (at_frame, at_original):
        x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
        inside = ((rows >= y0) & (rows < y1 + 1))[:, :, None] & ((columns >= x0) & (columns < x1 + 1))[:, None]
        best, winner = torch.where(inside, planes, -torch.inf).max(dim=0)
        expected = torch.where(best > -torch.inf, class_ids[winner], 255)
        assert set(expected.unique().tolist()) >= {0, 2, 7, 255}
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("rule", "bounded", "threshold"),
    [("argmax", True, -torch.inf), ("box_threshold", True, 0.0), ("threshold", False, 0.0)],
)
def test_map_rules(rule: MapRule, bounded: bool, threshold: float, sam_file: Path, npy: Path) -> None:
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE)
    (batch,) = evaluation_batches(NpyFolder(npy / "val"), 3, "box")
    for prediction, boxes in zip(predict(model, batch, CPU, rule), batch["boxes"]):
        assert prediction.threshold == threshold
        assert (prediction.boxes is not None) == bounded
        if prediction.boxes is not None:
            assert torch.equal(prediction.boxes, boxes.float())


def test_with_boxes_of_the_ground_truth_every_labelled_pixel_is_some_class(sam_file: Path, npy: Path) -> None:
    """And the class is one whose box holds the pixel."""
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE)
    (batch,) = evaluation_batches(NpyFolder(npy / "val"), 3, "box")
    for prediction, labels in zip(predict(model, batch, CPU), batch["labels"]):
        predicted = prediction.label_map(IMAGE_SIZE)
        assert (predicted[labels != IGNORE_LABEL] != IGNORE_LABEL).all()
        assert prediction.boxes is not None
        for class_id, (x0, y0, x1, y1) in zip(prediction.class_ids.tolist(), prediction.boxes.int().tolist()):
            y, x = torch.nonzero(predicted == class_id, as_tuple=True)
            assert ((y0 <= y) & (y <= y1) & (x0 <= x) & (x <= x1)).all()


@pytest.mark.parametrize("image_size", [64, "48x80", "80x64"])
@pytest.mark.parametrize(("rows", "columns"), [(45, 80), (80, 45)])
@pytest.mark.parametrize("resize_mode", ["stretch", "pad"])
def test_the_original_size_is_reached_by_cropping_and_resizing_logits(
    resize_mode: str, rows: int, columns: int, image_size: ImageSize
) -> None:
    torch.manual_seed(0)
    size = frame_size(image_size)
    low_res = torch.randn(5, size[0] // 4, size[1] // 4)
    class_ids = torch.tensor([2, 7, 7, 18, 0])  # a class may have several masks
    prediction = Prediction(low_res, class_ids, threshold=0.2)
    frame = F.interpolate(low_res[None], size, mode="bilinear", align_corners=False)
    height, width = fitted_size(rows, columns, image_size, resize_mode)
    original = F.interpolate(frame[..., :height, :width], (rows, columns), mode="bilinear", align_corners=False)[0]
    best, winner = original.max(dim=0)
    expected = torch.where(best > 0.2, class_ids[winner], 255)
    assert 255 in expected
    actual = prediction.original_label_map(rows, columns, image_size=image_size, resize_mode=resize_mode)
    assert actual.tolist() == expected.tolist()
    best, winner = frame[0].max(dim=0)
    assert prediction.label_map(image_size).tolist() == torch.where(best > 0.2, class_ids[winner], 255).tolist()
    assert prediction.label_map(size).equal(prediction.label_map(image_size))


def evaluation_batches(source: NpyFolder, batch_size: int, mode: str) -> DataLoader:
    data = EvaluationDataset(source, "oracle" if mode == "box" else None)
    return DataLoader(data, batch_size=batch_size, collate_fn=collate_evaluation)


def same_but_for_rounding(maps: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether label maps agree, where a pixel in a thousand may be a tie that rounding decides."""
    one, other = torch.stack(list(maps)), torch.stack(list(others))
    return (one != other).double().mean().item() <= 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_predict_gives_the_same_maps_for_any_batch_size(mode: str, sam_file: Path, npy: Path) -> None:
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE, prompt_mode=mode)
    torch.manual_seed(1)  # as built, all classes are alike
    for parameter in model.mask_decoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    source = NpyFolder(npy / "val")
    one, three = (
        [
            prediction.label_map(IMAGE_SIZE)
            for batch in evaluation_batches(source, size, mode)
            for prediction in predict(model, batch, CPU)
        ]
        for size in (1, 3)
    )
    assert len(one) == len(three) == len(source.items)
    assert len({int(value) for labels in one for value in labels.unique()}) > 3  # the random decoder says something
    assert same_but_for_rounding(one, three)
    if mode == "semantic":
        assert not any((labels == IGNORE_LABEL).any() for labels in one)  # every pixel is some class


def speaking(sam_file: Path) -> Segmenter:
    """A semantic model that tells classes apart somehow, in logits small enough that no softmax is 1."""
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE, prompt_mode="semantic")
    torch.manual_seed(1)
    for parameter in model.mask_decoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


# Original sizes of pictures padded to the frame: below, on the right, by an odd number of columns, not at all.
PADDED = [(36, 64), (64, 48), (64, 45), (64, 64)]
WIDTHS = [64, 48, 45, 64]


def padded_frames() -> tuple[Tensor, Tensor]:
    """A batch of pictures of noise in their frames, and of their mirror images, by the views of training."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in PADDED]
    frames = [resize_image(picture, IMAGE_SIZE, "pad") for picture in pictures]
    mirrored = [fixed_view("", 1).image(frame, size) for frame, size in zip(frames, PADDED)]
    return torch.from_numpy(np.stack(frames)), torch.stack(mirrored)


def test_mirror_images_are_averaged_as_by_hand(sam_file: Path) -> None:
    model = speaking(sam_file)
    images, mirrored = padded_frames()
    with torch.no_grad():
        logits = [model(features_of(model, {"image": batch}, CPU))[0] for batch in (images, mirrored)]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    ours, theirs = (F.interpolate(x, size, mode="bilinear", align_corners=False).softmax(dim=1) for x in logits)
    predictions = list(predict(model, {"image": images, "mirror_width": WIDTHS}, CPU))
    plain = list(predict(model, {"image": images}, CPU))
    for i, (height, width) in enumerate(PADDED):
        average = (ours[i, :, :height, :width] + theirs[i, :, :height, :width].flip(-1)) / 2
        found = predictions[i].label_map(IMAGE_SIZE)[:height, :width]
        assert same_but_for_rounding([found], [average.argmax(dim=0)])
        assert len(found.unique()) > 3 and (found != plain[i].label_map(IMAGE_SIZE)[:height, :width]).any()
        original = predictions[i].original_label_map(height, width, image_size=IMAGE_SIZE, resize_mode="pad")
        assert torch.equal(original, found)
        larger = predictions[i].original_label_map(2 * height, 2 * width, image_size=IMAGE_SIZE, resize_mode="pad")
        resized = F.interpolate(average.log()[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
        assert same_but_for_rounding([larger], [resized.argmax(dim=0)])


def test_a_mirrored_picture_gets_exactly_the_mirrored_map(sam_file: Path) -> None:
    model = speaking(sam_file)
    maps, mirrored_maps = (
        [prediction.label_map(IMAGE_SIZE) for prediction in predict(model, {"image": x, "mirror_width": WIDTHS}, CPU)]
        for x in padded_frames()
    )
    for one, other, (height, width) in zip(maps, mirrored_maps, PADDED):
        assert torch.equal(one[:height, :width], other[:height, :width].flip(-1))
        # The padding is not mirrored into the picture, nor the picture into the padding.
        assert torch.equal(mirror(one, width, dim=1)[:, width:], one[:, width:])


def test_two_equal_views_give_the_map_of_one() -> None:
    torch.manual_seed(0)
    half = 3 * torch.randn(len(BDD100K), 16, 8)
    logits = torch.cat([half, half.flip(-1)], dim=-1)
    both = average_mirrored(logits, logits, 64, (64, 64))
    one, two = (Prediction(masks, torch.arange(len(BDD100K))) for masks in (logits, both))
    assert same_but_for_rounding([one.label_map(64)], [two.label_map(64)])
    maps = [p.original_label_map(45, 80, image_size=64, resize_mode="stretch") for p in (one, two)]
    assert same_but_for_rounding(maps[:1], maps[1:])


def test_many_boxes_are_decoded_as_each_by_itself(sam_file: Path, npy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE)
    image = torch.from_numpy(NpyFolder(npy / "val").read_image(0))[None]
    boxes = torch.tensor([[i, i, i + 20, i + 30] for i in range(7)], dtype=torch.float32)
    batch: EvaluationBatch = {"image": image, "class_ids": [torch.arange(7)], "boxes": [boxes]}
    (together,) = predict(model, batch, CPU)
    monkeypatch.setattr("utils.model.prediction.MAX_PROMPTS", 3)
    (in_turn,) = predict(model, batch, CPU)
    assert together.low_res_masks.shape == in_turn.low_res_masks.shape == (7, IMAGE_SIZE // 4, IMAGE_SIZE // 4)
    assert torch.allclose(in_turn.low_res_masks, together.low_res_masks, rtol=1e-4, atol=1e-4)


def test_an_image_without_labelled_pixels_is_no_class_and_counts_nowhere(sam_file: Path, tmp_path: Path) -> None:
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, len(BDD100K), (IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    nothing = np.full_like(labels, IGNORE_LABEL)
    source = NpyFolder(write_split(tmp_path / "val", {"empty": (image, nothing), "full": (image, labels)}))

    (batch,) = evaluation_batches(source, 2, "box")
    empty, full = (prediction.label_map(IMAGE_SIZE) for prediction in predict(model, batch, CPU))
    assert (empty == IGNORE_LABEL).all()
    assert (full != IGNORE_LABEL).any()
    confusion = evaluate(model, evaluation_batches(source, 2, "box"), CPU)
    assert confusion.matrix.sum() == labels.size
    # To train on, there is only the other one.
    assert len(BoxPromptDataset(source, classes_per_image=1, bbox_shift=0, seed=0)) == 1
