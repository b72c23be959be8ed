"""SamAutomaticMaskGenerator and its helpers: equal to the public package's; wrong arguments are errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.public import public_sam
from segment_anything import SamAutomaticMaskGenerator, build_sam_vit_tiny
from segment_anything.modeling import Sam
from segment_anything.utils import amg
from tests.helpers.oracles import public_tiny

WEIGHTS = Path(__file__).parents[2] / "assets" / "sam_vit_tiny_scenes.pth"
SOME: dict[str, Any] = {"points_per_side": 8, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.3}
GRIDS = [np.random.default_rng(1).random((n, 2)) for n in (40, 15)]


@pytest.fixture(scope="module")
def sam() -> Sam:
    """A SAM of 128 pixels that draws a compact mask, each of its three another, around most points.

    The weights were trained with boxes and the single mask: a point takes the place of a box's corners, and the other
    masks' weights are those of the single one, moved a little.
    """
    sam = build_sam_vit_tiny(WEIGHTS, image_size=128)
    generator = torch.Generator().manual_seed(0)
    decoder: Any = sam.mask_decoder
    prompts: Any = sam.prompt_encoder
    first = decoder.output_hypernetworks_mlps[0]
    with torch.no_grad():
        corners = [prompts.point_embeddings[i].weight for i in (2, 3)]
        prompts.point_embeddings[1].weight.copy_((corners[0] + corners[1]) / 2)
        prompts.not_a_point_embed.weight.copy_(corners[1])
        tokens = decoder.mask_tokens.weight
        tokens[1:] = tokens[0] + 0.3 * torch.randn(3, tokens.shape[1], generator=generator)
        for parameter in first.layers[-1].parameters():
            parameter.mul_(3)  # steeper masks, which are stabler
        for network in decoder.output_hypernetworks_mlps:
            network.load_state_dict(first.state_dict())
        scores = decoder.iou_prediction_head.layers[-1]
        scores.weight.copy_(torch.randn(scores.weight.shape, generator=generator))
        scores.bias.add_(2)
    return sam


@pytest.fixture(scope="module")
def public(sam: Sam) -> Any:
    return public_tiny(sam)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Twelve discs and rectangles, 120 x 180."""
    rng = np.random.default_rng(0)
    picture = Image.new("RGB", (180, 120), (120, 160, 90))
    draw = ImageDraw.Draw(picture)
    for i in range(12):
        x, y, size = (int(rng.integers(high)) for high in (180, 120, 25))
        shape = draw.ellipse if i % 2 else draw.rectangle
        shape((x - 6 - size, y - 6 - size, x + 6 + size, y + 6 + size), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return np.array(picture)


@pytest.mark.parametrize(
    ("arguments", "at_least"),
    [
        ({}, 12),
        ({"points_per_batch": 7, "stability_score_offset": 0.5, "box_nms_thresh": 0.4}, 8),
        ({"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}, 50),  # nothing is dropped, not even empty masks
        ({"output_mode": "uncompressed_rle"}, 12),
        ({"output_mode": "coco_rle"}, 12),
        ({"crop_n_layers": 1, "crop_nms_thresh": 0.4, "crop_overlap_ratio": 0.2}, 12),
        ({"crop_n_layers": 2, "crop_n_points_downscale_factor": 2}, 20),
        ({"points_per_side": None, "point_grids": GRIDS, "crop_n_layers": 1}, 8),
        ({"min_mask_region_area": 20}, 12),
        ({"min_mask_region_area": 300, "box_nms_thresh": 0.9}, 12),
        ({"pred_iou_thresh": 99.0, "min_mask_region_area": 20}, 0),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else "",
)
@pytest.mark.slow
def test_the_records_are_the_public_packages_on_the_same_predictions(
    sam: Sam, public: Any, image: np.ndarray, arguments: dict[str, Any], at_least: int
) -> None:
    """Both ask our predictor, so that no float may differ."""
    ours = SamAutomaticMaskGenerator(sam, **{**SOME, **arguments})
    theirs = public_sam().SamAutomaticMaskGenerator(public, **{**SOME, **arguments})
    theirs.predictor = ours.predictor
    actual, expected = ours.generate(image), theirs.generate(image)
    assert len(actual) >= at_least
    np.testing.assert_equal(actual, expected)
    for record, public_record in zip(actual, expected):
        assert {key: type(value) for key, value in record.items()} == {
            key: type(value) for key, value in public_record.items()
        }


def test_the_whole_is_equal_to_the_public_package(sam: Sam, public: Any, image: np.ndarray) -> None:
    arguments = {**SOME, "crop_n_layers": 1}
    actual = SamAutomaticMaskGenerator(sam, **arguments).generate(image)
    expected = public_sam().SamAutomaticMaskGenerator(public, **arguments).generate(image)
    assert len(actual) == len(expected) >= 15
    for mask, public_mask in zip(actual, expected):
        assert mask["point_coords"] == public_mask["point_coords"]
        assert mask["crop_box"] == public_mask["crop_box"]
        assert abs(mask["predicted_iou"] - public_mask["predicted_iou"]) < 1e-4
        # A logit that is zero but for rounding may fall on either side.
        assert (mask["segmentation"] != public_mask["segmentation"]).sum() <= 2


def test_a_frame_that_is_no_square(sam: Sam, public: Any, image: np.ndarray, tmp_path: Path) -> None:
    """Pictures that fit are segmented; one that does not is an error that says what to do."""
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    wide = build_sam_vit_tiny(tmp_path / "sam.pth", image_size=(96, 128))
    ours = SamAutomaticMaskGenerator(wide, **SOME)
    theirs = public_sam().SamAutomaticMaskGenerator(public, **SOME)
    theirs.predictor = ours.predictor
    actual, expected = ours.generate(image), theirs.generate(image)
    assert len(actual) >= 5
    np.testing.assert_equal(actual, expected)
    with pytest.raises(ValueError, match="does not fit the model's 96 x 128; use a model of a square frame"):
        ours.generate(np.ascontiguousarray(image.transpose(1, 0, 2)))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools
def test_a_compressed_mask_is_the_mask(sam: Sam, image: np.ndarray) -> None:
    from pycocotools import mask as coco

    masks, encoded = (
        SamAutomaticMaskGenerator(sam, **SOME, output_mode=mode).generate(image) for mode in ("binary_mask", "coco_rle")
    )
    assert len(masks) == len(encoded)
    for mask, rle in zip(masks, encoded):
        assert np.array_equal(coco.decode(rle["segmentation"]), mask["segmentation"])
        assert mask["area"] == mask["segmentation"].sum()


def test_crops_without_a_mask_are_no_masks(sam: Sam, image: np.ndarray) -> None:
    """The public 1.0 stops with an IndexError."""
    assert SamAutomaticMaskGenerator(sam, 4, pred_iou_thresh=99.0, crop_n_layers=1).generate(image) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points_per_side": None}, "exactly one of points_per_side and point_grids"),
        ({"point_grids": GRIDS}, "exactly one of points_per_side and point_grids"),
        ({"points_per_side": None, "point_grids": GRIDS, "crop_n_layers": 2}, "3 point_grids, got 2"),
        ({"output_mode": "png"}, "binary_mask, uncompressed_rle, coco_rle, got 'png'"),
    ],
)
def test_wrong_arguments_are_told_at_once(sam: Sam, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        SamAutomaticMaskGenerator(sam, **arguments)


def test_crops_do_not_fit_a_non_square_frame() -> None:
    sam = build_sam_vit_tiny(image_size=(48, 64))
    SamAutomaticMaskGenerator(sam)
    fix = "crop_n_layers=1: crops do not all fit the model's 48 x 64; give crop_n_layers=0, or use a model"
    with pytest.raises(ValueError, match=fix):
        SamAutomaticMaskGenerator(sam, crop_n_layers=1)


def test_missing_pycocotools_is_told_at_once(sam: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match="pip install pycocotools"):
        SamAutomaticMaskGenerator(sam, output_mode="coco_rle")


# --- utils.amg


def random_masks(*shape: int) -> Tensor:
    """Rectangles and noise: an empty mask, a full one, some that begin with True, some of many parts."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(shape, generator=generator) < torch.rand(*shape[:-2], 1, 1, generator=generator) ** 4
    flat = masks.flatten(0, -3) if len(shape) > 2 else masks[None]
    flat[0] = False
    if len(flat) > 3:
        flat[1] = True
        flat[2] = False
        flat[2, 3:9, 5:6] = True
        flat[3, :2, :2] = True
    return masks


@pytest.mark.parametrize("shape", [(20, 30), (12, 20, 30), (3, 4, 30, 20)])
def test_boxes_of_masks(shape: tuple[int, ...]) -> None:
    masks = random_masks(*shape)
    actual, expected = (module.batched_mask_to_box(masks) for module in (amg, public_sam().utils.amg))
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_boxes_of_no_masks() -> None:
    assert amg.batched_mask_to_box(torch.zeros(0, 20, 30, dtype=torch.bool)).shape == (0, 4)


def test_run_lengths() -> None:
    masks, theirs = random_masks(12, 20, 30), public_sam().utils.amg
    encoded = amg.mask_to_rle_pytorch(masks)
    assert encoded == theirs.mask_to_rle_pytorch(masks)
    assert amg.mask_to_rle_pytorch(masks[:0]) == []
    for mask, rle in zip(masks.numpy(), encoded):
        assert np.array_equal(amg.rle_to_mask(rle), mask)
        assert amg.area_from_rle(rle) == mask.sum()
        assert amg.coco_encode_rle(rle) == theirs.coco_encode_rle(rle)


def test_stability_scores() -> None:
    logits = 3 * torch.randn(2, 5, 20, 30, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = -9  # 0 / 0
    actual, expected = (module.calculate_stability_score(logits, 0.5, 1.0) for module in (amg, public_sam().utils.amg))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", ["holes", "islands"])
@pytest.mark.parametrize("area", [1, 3, 20, 10_000])
def test_small_regions(mode: str, area: int) -> None:
    changes = set()
    for mask in random_masks(12, 20, 30).numpy():
        before = mask.copy()
        actual, changed = amg.remove_small_regions(mask, area, mode)
        expected, should_change = public_sam().utils.amg.remove_small_regions(mask, area, mode)
        assert np.array_equal(actual, expected)
        assert changed == should_change
        assert np.array_equal(mask, before)
        changes.add(changed)
    assert area == 1 or True in changes


def test_small_regions_of_another_mode() -> None:
    with pytest.raises(AssertionError, match="holes or islands"):
        amg.remove_small_regions(np.zeros((2, 2), dtype=bool), 1, "specks")


def test_grids_of_points() -> None:
    theirs = public_sam().utils.amg
    for n in (1, 2, 7, 32):
        assert np.array_equal(amg.build_point_grid(n), theirs.build_point_grid(n))
    actual, expected = (module.build_all_layer_point_grids(32, 2, 3) for module in (amg, theirs))
    assert [len(grid) for grid in actual] == [32**2, 10**2, 3**2]
    np.testing.assert_equal(actual, expected)


@pytest.mark.parametrize("size", [(120, 180), (1080, 607), (33, 47)])
@pytest.mark.parametrize("ratio", [0.0, 512 / 1500, 0.9])
def test_crops(size: tuple[int, int], ratio: float) -> None:
    actual, expected = (module.generate_crop_boxes(size, 3, ratio) for module in (amg, public_sam().utils.amg))
    assert actual == expected
    assert len(actual[0]) == 1 + 4 + 16 + 64


def test_back_from_a_crop() -> None:
    theirs, crop = public_sam().utils.amg, [30, 0, 90, 80]
    generator = torch.Generator().manual_seed(0)
    boxes = torch.randint(0, 60, (200, 4), generator=generator)
    points, masks = 60 * torch.rand(50, 2, generator=generator, dtype=torch.float64), random_masks(5, 80, 60)
    for name, value, *sizes in (
        ("uncrop_boxes_xyxy", boxes),
        ("uncrop_boxes_xyxy", boxes[:, None]),
        ("uncrop_points", points),
        ("uncrop_points", points[:, None]),
        ("uncrop_masks", masks, 100, 95),
        ("uncrop_masks", masks, 80, 90),
    ):
        actual, expected = (getattr(module, name)(value, crop, *sizes) for module in (amg, theirs))
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    whole = [0, 0, 60, 80]
    assert amg.uncrop_masks(masks, whole, 80, 60) is masks
    for arguments in ((crop, [0, 0, 95, 100]), (crop, [0, 0, 95, 100], 5.0), (whole, whole)):
        near = amg.is_box_near_crop_edge(boxes, *arguments)
        assert torch.equal(near, theirs.is_box_near_crop_edge(boxes, *arguments))
        assert near.any() == (arguments[0] is crop)


def test_corners_and_sides_of_a_box() -> None:
    corners = [3, 4, 10, 20]
    for box in (torch.tensor(corners), np.array(corners), corners.copy()):
        assert list(amg.box_xyxy_to_xywh(box)) == [3, 4, 7, 16]
        assert list(box) == corners


def test_batches() -> None:
    assert list(amg.batch_iterator(2, [1, 2, 3], "abc")) == [[[1, 2], "ab"], [[3], "c"]]
    assert list(amg.batch_iterator(2, [])) == []
    for arguments in ((), ([1], [1, 2])):
        with pytest.raises(AssertionError, match="one length"):
            list(amg.batch_iterator(2, *arguments))


@pytest.mark.parametrize("keep", [torch.tensor([True, False, True]), torch.tensor([2, 0])], ids=["mask", "indices"])
def test_a_table_of_masks(keep: Tensor) -> None:
    tables = [
        module.MaskData(tensor=torch.arange(3), array=np.arange(3), rows=["a", "b", "c"])
        for module in (amg, public_sam().utils.amg)
    ]
    for table in tables:
        table.filter(keep)
        table.cat(table)
        table["more"] = [1, 2, 3, 4]
        table.to_numpy()
        del table["array"]
    actual, expected = (dict(table.items()) for table in tables)
    np.testing.assert_equal(actual, expected)
    assert isinstance(actual["tensor"], np.ndarray)


def test_a_table_takes_a_copy() -> None:
    table, rows = amg.MaskData(), [{"size": [1, 1], "counts": [1]}]
    table.cat(amg.MaskData(rows=rows))
    table["rows"][0]["counts"] = []
    assert rows[0]["counts"] == [1]


def test_a_table_holds_columns_alone() -> None:
    with pytest.raises(AssertionError, match="got int"):
        amg.MaskData(rows=3)  # type: ignore[arg-type]
