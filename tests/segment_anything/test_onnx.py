"""SamOnnxModel: the public package's numbers, and a graph that takes any number of points and any image size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.public import public_sam
from segment_anything import SamPredictor, build_sam_vit_tiny
from segment_anything.modeling import Sam
from segment_anything.utils.onnx import SamOnnxModel
from tests.helpers.oracles import public_tiny, relative_error

WEIGHTS = Path(__file__).parents[2] / "assets" / "sam_vit_tiny_scenes.pth"
SIDE = 128
FLAGS = list(itertools.product([False, True], repeat=3))


@pytest.fixture(scope="module")
def sam() -> Sam:
    """`vit_tiny` of 128 pixels; the masks for ambiguous prompts have untrained weights."""
    return build_sam_vit_tiny(WEIGHTS, image_size=SIDE)


@pytest.fixture(scope="module")
def public(sam: Sam) -> Any:
    return public_tiny(sam)


def prompts() -> Iterator[dict[str, Tensor]]:
    """One to five points of every label, with and without a mask, on upright, wide, small and large images."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, 128, SIDE // 16, SIDE // 16, generator=generator)
    labels = torch.tensor([[1.0, -1.0, 0.0, 2.0, 3.0]])
    for count, size, has_mask in ((1, (120, 180), 0), (2, (97, 64), 1), (3, (128, 128), 0), (5, (300, 201), 1)):
        yield {
            "image_embeddings": embeddings,
            "point_coords": SIDE * torch.rand(1, count, 2, generator=generator),
            "point_labels": labels[:, :count],
            "mask_input": 5 * torch.randn(1, 1, SIDE // 4, SIDE // 4, generator=generator),
            "has_mask_input": torch.tensor([float(has_mask)]),
            "orig_im_size": torch.tensor(size, dtype=torch.float32),
        }


@pytest.mark.parametrize(("return_single_mask", "use_stability_score", "return_extra_metrics"), FLAGS)
def test_the_outputs_are_the_public_packages(
    sam: Sam, public: Any, return_single_mask: bool, use_stability_score: bool, return_extra_metrics: bool
) -> None:
    flags = (return_single_mask, use_stability_score, return_extra_metrics)
    ours, theirs = SamOnnxModel(sam, *flags), public_sam().utils.onnx.SamOnnxModel(public, *flags)
    names = ["masks", "scores", *["stability", "areas"] * return_extra_metrics, "low-res masks"]
    for inputs in prompts():
        actual, expected = ours(**inputs), theirs(**inputs)
        assert len(actual) == len(expected) == (5 if return_extra_metrics else 3)
        assert actual[0].shape == (1, 1 if return_single_mask else 4, *inputs["orig_im_size"].int().tolist())
        for name, value, public_value in zip(names, actual, expected):
            assert value.dtype == public_value.dtype
            torch.testing.assert_close(
                value, public_value, rtol=1e-4, atol=2 if name == "areas" else 1e-3, equal_nan=True, msg=name
            )


def test_a_click_is_the_predictors(sam: Sam) -> None:
    """A point and its padding, without a mask: the three masks that `predict` gives."""
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    click = np.array([[40.0, 70.0]])
    expected = predictor.predict(click, np.array([1]), return_logits=True)
    scaled = predictor.transform.apply_coords(click, image.shape[:2])
    masks, scores, low_res_masks = SamOnnxModel(sam, return_single_mask=False)(
        predictor.get_image_embedding(),
        torch.tensor(np.concatenate([scaled, np.zeros((1, 2))])[None], dtype=torch.float32),
        torch.tensor([[1.0, -1.0]]),
        torch.zeros(1, 1, SIDE // 4, SIDE // 4),
        torch.zeros(1),
        torch.tensor(image.shape[:2], dtype=torch.float32),
    )
    for actual, value in zip((masks, low_res_masks), expected[::2]):
        assert relative_error(actual[0, 1:], value) < 1e-5
    np.testing.assert_allclose(scores[0, 1:], expected[1], atol=1e-5)


@torch.no_grad()
def test_a_frame_that_is_no_square() -> None:
    """Positions of points and the way back to the image's size: the three masks that `predict` gives."""
    sam = build_sam_vit_tiny(WEIGHTS, image_size=(64, 128))
    image = np.random.default_rng(0).integers(0, 256, (55, 120, 3), dtype=np.uint8)  # scaled to 59 x 128
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    click = np.array([[40.0, 30.0]])
    expected = predictor.predict(click, np.array([1]), return_logits=True)
    scaled = predictor.transform.apply_coords(click, image.shape[:2])
    masks, _, low_res_masks = SamOnnxModel(sam, return_single_mask=False)(
        predictor.get_image_embedding(),
        torch.tensor(np.concatenate([scaled, np.zeros((1, 2))])[None], dtype=torch.float32),
        torch.tensor([[1.0, -1.0]]),
        torch.zeros(1, 1, 16, 32),
        torch.zeros(1),
        torch.tensor(image.shape[:2], dtype=torch.float32),
    )
    for actual, value in zip((masks, low_res_masks), expected[::2]):
        assert relative_error(actual[0, 1:], value) < 1e-5


def test_three_points_are_unambiguous(sam: Sam) -> None:
    every, best = (SamOnnxModel(sam, return_single_mask=single) for single in (False, True))
    for inputs in prompts():
        masks, scores, _ = every(**inputs)
        mask, score, _ = best(**inputs)
        index = 0 if inputs["point_coords"].shape[1] > 2 else 1 + int(scores[0, 1:].argmax())
        assert torch.equal(mask[:, 0], masks[:, index])
        assert torch.equal(score[:, 0], scores[:, index])


@pytest.mark.filterwarnings("ignore:.*jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("exporter", ["trace", "export"])
@pytest.mark.slow
def test_a_graph_takes_other_points_and_sizes(sam: Sam, exporter: str) -> None:
    """What PyTorch's two exports to ONNX begin with. The public 1.0 keeps the example's image size, or fails."""
    model = SamOnnxModel(sam, return_single_mask=True)
    *others, example = prompts()
    graph: Any
    if exporter == "trace":
        graph = torch.jit.trace(model, tuple(example.values()))
    else:
        points = {1: torch.export.Dim("points", min=1, max=64)}
        shapes = {name: points if name.startswith("point_") else None for name in example}
        graph = torch.export.export(model, tuple(example.values()), dynamic_shapes=shapes).module()
    for inputs in others:
        for actual, expected in zip(graph(*inputs.values()), model(**inputs)):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3, equal_nan=True)
