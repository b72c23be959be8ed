"""SAM: equal to the public package on the same weights, strict about what it loads, one decoding for B x Q prompts.

Every comparison records its relative error: `pytest tests/segment_anything/test_segment_anything.py -s` prints them.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import operator
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import segment_anything
from benchmarks.public import public_sam
from segment_anything import (
    CheckpointError,
    SamPredictor,
    build_sam,
    build_sam_vit_b,
    build_sam_vit_tiny,
    modeling,
    sam_model_registry,
)
from segment_anything.build_sam import read_state_dict
from segment_anything.modeling import MaskDecoder, Sam, image_encoder
from segment_anything.utils.transforms import ResizeLongestSide
from tests.helpers.oracles import Payload, public_tiny, relative_error

TOLERANCE = 1e-4
IMAGE = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
Compare = Callable[[str, Any, Any], None]


@pytest.fixture
def compare(record_property: Callable[[str, object], None]) -> Compare:
    """`compare(what, actual, expected)`: the relative error is recorded, and under TOLERANCE."""

    def check(what: str, actual: Any, expected: Any) -> None:
        error = relative_error(actual, expected)
        record_property(what, error)
        print(f"{what}: relative error {error:.1e}")
        assert error < TOLERANCE

    return check


def randomise(module: nn.Module) -> None:
    """Move every parameter that starts as zeros or ones: with those, half of the arithmetic could be wrong unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 or "pos" in name:  # biases, norms, pos_embed, rel_pos_h, rel_pos_w
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def random_tiny(image_size: int | tuple[int, int] = 64) -> Sam:
    torch.manual_seed(0)
    sam = build_sam_vit_tiny(image_size=image_size)
    randomise(sam)
    return sam


# --- The public package's keys and numbers


@pytest.mark.parametrize("model_type", ["vit_b", "vit_l", "vit_h", "default"])
def test_keys_and_shapes_are_the_public_packages(model_type: str) -> None:
    with torch.device("meta"):  # shapes without memory
        ours = sam_model_registry[model_type]().state_dict()
        theirs = public_sam().sam_model_registry[model_type]().state_dict()
    assert {key: tuple(value.shape) for key, value in ours.items()} == {
        key: tuple(value.shape) for key, value in theirs.items()
    }


@pytest.fixture(scope="module")
def vit_b() -> tuple[Sam, Any]:
    """Our vit_b at 1024 and the public package's, both on the same random tensors."""
    torch.manual_seed(0)
    ours = build_sam_vit_b()
    randomise(ours)
    with torch.device("meta"):
        theirs = public_sam().build_sam_vit_b()
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return ours, theirs


@pytest.fixture(scope="module")
def predictors(vit_b: tuple[Sam, Any]) -> tuple[SamPredictor, Any]:
    """Both predictors with IMAGE set. This encodes at 1024, once each, and is what takes the time in this file."""
    ours, theirs = SamPredictor(vit_b[0]), public_sam().SamPredictor(vit_b[1])
    for predictor in (ours, theirs):
        predictor.set_image(IMAGE)
    return ours, theirs


@pytest.mark.slow
def test_image_encoder(predictors: tuple[SamPredictor, Any], compare: Compare) -> None:
    ours, theirs = (predictor.get_image_embedding() for predictor in predictors)
    assert ours.shape == (1, 256, 64, 64)
    compare("vit_b image encoder at 1024", ours, theirs)


_POINTS: dict[str, Any] = {"point_coords": np.array([[120.0, 80.5], [333.0, 290.0]]), "point_labels": np.array([1, 0])}
_BOX: dict[str, Any] = {"box": np.array([50.0, 20.0, 401.0, 299.0])}
_MASK: dict[str, Any] = {"mask_input": np.random.default_rng(1).normal(0, 5, (1, 256, 256)).astype(np.float32)}


@pytest.mark.parametrize("multimask_output", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize(
    "prompt",
    [_POINTS, _BOX, {**_POINTS, **_BOX}, _MASK, {**_POINTS, **_BOX, **_MASK}],
    ids=["points", "box", "points+box", "mask", "all"],
)
@pytest.mark.slow
def test_predictor_end_to_end(
    predictors: tuple[SamPredictor, Any],
    compare: Compare,
    request: pytest.FixtureRequest,
    prompt: dict[str, Any],
    multimask_output: bool,
) -> None:
    ours, theirs = (
        predictor.predict(**prompt, multimask_output=multimask_output, return_logits=True) for predictor in predictors
    )
    count = 3 if multimask_output else 1
    assert [array.shape for array in ours] == [(count, 300, 500), (count,), (count, 256, 256)]
    for what, actual, expected in zip(("masks", "low-res masks"), ours[::2], theirs[::2]):
        compare(f"predictor {request.node.callspec.id} {what}", actual, expected)
    # A few numbers of the order of one, any of which may be close to zero by chance: an absolute error.
    assert np.abs(ours[1] - theirs[1]).max() < TOLERANCE


def test_predictor_thresholds_masks_at_zero(predictors: tuple[SamPredictor, Any]) -> None:
    masks, _, _ = predictors[0].predict(**_BOX)
    logits, _, _ = predictors[0].predict(**_BOX, return_logits=True)
    assert masks.dtype == bool
    assert np.array_equal(masks, logits > 0)


@pytest.mark.parametrize("kinds", ["points", "boxes", "masks", "points boxes", "points boxes masks", ""])
@torch.no_grad()
def test_prompt_encoder(vit_b: tuple[Sam, Any], compare: Compare, kinds: str) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = {
        "points": (1024 * torch.rand(3, 4, 2, generator=generator), torch.tensor([[1, 0, -1, 1]] * 3)),
        "boxes": 1024 * torch.rand(3, 4, generator=generator),
        "masks": 5 * torch.randn(3, 1, 256, 256, generator=generator),
    }
    given: dict[str, Any] = {"points": None, "boxes": None, "masks": None}
    given |= {kind: prompts[kind] for kind in kinds.split()}
    ours, theirs = (sam.prompt_encoder(**given) for sam in vit_b)
    if "points" in kinds or "boxes" in kinds:
        compare(f"prompt encoder, {kinds}: sparse", ours[0], theirs[0])
    else:
        assert ours[0].shape == theirs[0].shape == (3 if kinds else 1, 0, 256)
    compare(f"prompt encoder, {kinds or 'no prompt'}: dense", ours[1], theirs[1])


@torch.no_grad()
def test_dense_positions(vit_b: tuple[Sam, Any], compare: Compare) -> None:
    compare("get_dense_pe", *(sam.prompt_encoder.get_dense_pe() for sam in vit_b))


@pytest.mark.parametrize("multimask_output", [False, True], ids=["single", "multi"])
@torch.no_grad()
def test_mask_decoder(vit_b: tuple[Sam, Any], compare: Compare, multimask_output: bool) -> None:
    """On a 24 x 16 grid: the decoder takes any, and height and width must not be confused."""
    generator = torch.Generator().manual_seed(0)
    image_embeddings, image_pe, sparse, dense = (
        torch.randn(shape, generator=generator)
        for shape in ((1, 256, 24, 16), (1, 256, 24, 16), (3, 2, 256), (3, 256, 24, 16))
    )
    common = {"image_embeddings": image_embeddings, "image_pe": image_pe, "multimask_output": multimask_output}
    ours = vit_b[0].mask_decoder(**common, sparse_prompt_embeddings=sparse[None], dense_prompt_embeddings=dense[None])
    theirs = vit_b[1].mask_decoder(**common, sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense)
    name = "mask decoder, " + ("multi" if multimask_output else "single")
    compare(f"{name}: masks", ours[0][0], theirs[0])
    compare(f"{name}: IoU", ours[1][0], theirs[1])


@pytest.mark.parametrize("kind", ["windowed", "global"])
@pytest.mark.parametrize("model_type", ["vit_l", "vit_h"])
@torch.no_grad()
@pytest.mark.slow
def test_encoder_blocks_of_the_larger_models(compare: Compare, model_type: str, kind: str) -> None:
    """On a 20 x 20 grid, which windows of 14 do not divide."""
    grid_size = 20
    with torch.device("meta"):  # only the one block that is compared gets memory
        ours = sam_model_registry[model_type](image_size=16 * grid_size).image_encoder
        theirs = public_sam().sam_model_registry[model_type]().image_encoder
    index = next(i for i, size in enumerate(ours.window_sizes) if bool(size) == (kind == "windowed"))
    assert ours.window_sizes == [block.window_size for block in theirs.blocks]
    block: Any
    public_block: Any
    block, public_block = (encoder.blocks[index].to_empty(device="cpu") for encoder in (ours, theirs))
    torch.manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
    nn.init.zeros_(block.attn.rel_pos_h)
    nn.init.zeros_(block.attn.rel_pos_w)
    randomise(block)
    # The tables alone depend on the grid, which is the public model's 64 x 64 there.
    public_block.attn.rel_pos_h, public_block.attn.rel_pos_w = block.attn.rel_pos_h, block.attn.rel_pos_w
    public_block.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2, grid_size - 3, grid_size, block.norm1.weight.numel())
    compare(f"{model_type} {kind} block", block(x), public_block(x))


@torch.no_grad()
@pytest.mark.slow
def test_the_encoder_works_after_an_export() -> None:
    """Nothing of a trace, whose tensors hold no values, is kept for later."""
    encoder = random_tiny().image_encoder.requires_grad_(False)
    images = torch.randn(1, 3, encoder.img_size, encoder.img_size)
    exported = torch.export.export(encoder, (images,)).module()
    assert relative_error(exported(images), encoder(images)) < TOLERANCE


def test_gradients_of_a_block_with_windows(compare: Compare) -> None:
    """The encoder can be trained too, and its padding is one token that many windows share."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"dim": 24, "num_heads": 3, "window_size": 5, "use_rel_pos": True}
    ours = image_encoder.Block(**arguments)
    randomise(ours)
    theirs = public_sam().modeling.image_encoder.Block(**arguments)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, weights = torch.randn(2, 7, 12, 24), torch.randn(2, 7, 12, 24)
    gradients = []
    for block in (ours, theirs):
        inputs = [x.clone().requires_grad_(), *block.parameters()]
        gradients.append(torch.autograd.grad((block(inputs[0]) * weights).sum(), inputs))
    for name, actual, expected in zip(["x", *dict(ours.named_parameters())], *gradients):
        compare(f"gradient of {name}", actual, expected)


@torch.no_grad()
def test_images_of_a_batch_are_encoded_each_by_itself() -> None:
    encoder = random_tiny().image_encoder
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    together, features = encoder.forward_features(images, [0, 3])
    for i, image in enumerate(images):
        alone, features_alone = encoder.forward_features(image[None], [0, 3])
        for batch, single in zip([together, *features], [alone, *features_alone]):
            assert relative_error(batch[i], single[0]) < 1e-5


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("limit", [1, 3000, 100_000, 2**26])  # a query, queries, heads, everything at a time
def test_the_encoder_does_not_depend_on_its_pieces(monkeypatch: pytest.MonkeyPatch, limit: int, grad: bool) -> None:
    encoder = random_tiny().image_encoder
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = encoder(images)
    monkeypatch.setitem(image_encoder.MAX_ELEMENTS, "cpu", limit)
    with torch.set_grad_enabled(grad):
        assert relative_error(encoder(images).detach(), expected) < 1e-6


def test_resize_longest_side() -> None:
    ours, theirs = ResizeLongestSide(1024), public_sam().utils.transforms.ResizeLongestSide(1024)
    rng = np.random.default_rng(0)
    for height, width in ((300, 500), (720, 1280), (1080, 607), (1025, 1025)):
        size = (height, width)
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        assert np.array_equal(ours.apply_image(image), theirs.apply_image(image))
        coords, boxes = 300 * rng.random((5, 2)), 300 * rng.random((5, 4))
        np.testing.assert_allclose(ours.apply_coords(coords, size), theirs.apply_coords(coords, size))
        np.testing.assert_allclose(ours.apply_boxes(boxes, size), theirs.apply_boxes(boxes, size))
        for name, values in (("apply_coords_torch", coords), ("apply_boxes_torch", boxes)):
            mine, public = (getattr(t, name)(torch.from_numpy(values), size) for t in (ours, theirs))
            torch.testing.assert_close(mine, public)


def test_resize_longest_side_of_tensors() -> None:
    """The public 1.0 takes the batch size and the channels for height and width: squares alone can be compared."""
    ours, theirs = ResizeLongestSide(64), public_sam().utils.transforms.ResizeLongestSide(64)
    batch = torch.rand(3, 3, 50, 50)
    torch.testing.assert_close(ours.apply_image_torch(batch), theirs.apply_image_torch(batch))
    assert ours.apply_image_torch(torch.rand(2, 3, 30, 50)).shape == (2, 3, 38, 64)


def test_resizing_leaves_its_input_alone() -> None:
    coords = np.array([[10.0, 20.0]])
    assert np.array_equal(ResizeLongestSide(100).apply_coords(coords, (25, 50)), [[20, 40]])
    assert np.array_equal(coords, [[10, 20]])


def test_preprocess_and_postprocess(vit_b: tuple[Sam, Any], compare: Compare) -> None:
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(1, 3, 614, 1024, generator=generator)
    compare("preprocess", *(sam.preprocess(image) for sam in vit_b))
    assert not vit_b[0].preprocess(image)[..., 614:, :].any()  # zeros are the mean colour: padded after normalising
    low_res = torch.randn(2, 3, 256, 256, generator=generator)
    compare("postprocess_masks", *(sam.postprocess_masks(low_res, (614, 1024), (300, 500)) for sam in vit_b))


# --- The public package's calls: each class, function and form, on random weights of a small SAM


def small_sam(modeling: Any) -> Any:
    """A SAM of 128 pixels, built by the constructors of `modeling`: ours or the public package's."""
    return modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=2,
            embed_dim=48,
            img_size=128,
            mlp_ratio=3,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_heads=4,
            patch_size=16,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=[1],
            window_size=5,
            out_chans=32,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=32, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=16
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=2),
            transformer_dim=32,
            iou_head_depth=3,
            iou_head_hidden_dim=24,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    ).eval()


def pair_of(make: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What `make` makes of our `modeling` and of the public one, on the same random weights."""
    torch.manual_seed(0)
    ours, theirs = make(modeling), make(public_sam().modeling)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture
def small() -> tuple[Any, Any]:
    return pair_of(small_sam)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SMALL_EMBEDDING = random(1, 32, 8, 8)
SMALL_BOXES = torch.tensor([[10.0, 20, 90, 120], [0, 0, 127, 127], [5, 60, 50, 70], [3, 3, 9, 9], [64, 0, 80, 127]])


def decoder_inputs(sam: Any, **prompts: Any) -> dict[str, Tensor]:
    given: dict[str, Any] = {"points": None, "boxes": None, "masks": None}
    sparse, dense = sam.prompt_encoder(**(given | (prompts or {"boxes": SMALL_BOXES})))
    return {
        "image_embeddings": SMALL_EMBEDDING,
        "image_pe": sam.prompt_encoder.get_dense_pe(),
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
    }


def compare_all(compare: Compare, what: str, ours: Any, theirs: Any) -> None:
    """Tensors, or tuples of them."""
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    for i, (actual, expected) in enumerate(pairs):
        assert actual.dtype == expected.dtype
        compare(f"{what} {i}", actual.detach(), expected.detach())


PUBLIC_MODULES = (
    "predictor",
    "modeling.common",
    "modeling.image_encoder",
    "modeling.mask_decoder",
    "modeling.prompt_encoder",
    "modeling.sam",
    "modeling.transformer",
    "utils.transforms",
)


def public_signatures() -> dict[str, Any]:
    """Every function and method that the public package defines, by its place: "predictor.SamPredictor.predict"."""
    found: dict[str, Any] = {}
    for place in PUBLIC_MODULES:
        for name, value in vars(operator.attrgetter(place)(public_sam())).items():
            if getattr(value, "__module__", "") != f"segment_anything.{place}":
                continue
            members = {f".{k}": v for k, v in vars(value).items()} if inspect.isclass(value) else {"": value}
            for member, function in members.items():
                if member == ".__init__" or (callable(function) and not member.startswith(".__")):
                    found[f"{place}.{name}{member}"] = function
    return found


def test_every_public_function_takes_the_same_arguments() -> None:
    """Names, order and kinds; a default is the public one where that has one."""
    signatures = public_signatures()
    assert len(signatures) >= 60
    for place, theirs in signatures.items():
        ours = operator.attrgetter(place)(segment_anything)
        pairs = zip_longest(inspect.signature(ours).parameters.values(), inspect.signature(theirs).parameters.values())
        for mine, public in pairs:
            assert (mine.name, mine.kind) == (public.name, public.kind), place
            if public.default is not public.empty:
                default = list(mine.default) if isinstance(public.default, list) else mine.default
                assert default == public.default, f"{place} {mine.name}"


def test_every_module_has_the_public_attributes(small: tuple[Any, Any]) -> None:
    ours, theirs = (dict(sam.named_modules()) for sam in small)
    assert list(ours) == list(theirs)
    for name, module in theirs.items():
        assert type(ours[name]).__name__ == type(module).__name__, name
        assert vars(module).keys() <= vars(ours[name]).keys(), name
    assert vars(public_sam().SamPredictor(small[1])).keys() <= vars(SamPredictor(small[0])).keys()


def test_builders_are_called_as_the_public_ones(tmp_path: Path) -> None:
    assert sam_model_registry["default"] is sam_model_registry["vit_h"] is build_sam
    for name in ("build_sam", "build_sam_vit_h", "build_sam_vit_l", "build_sam_vit_b"):
        (checkpoint, *further) = inspect.signature(getattr(segment_anything, name)).parameters.values()
        assert (checkpoint.name, checkpoint.default) == ("checkpoint", None)
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in further)
    path = tmp_path / "sam.pth"
    torch.save(random_tiny(256).state_dict(), path)
    assert not sam_model_registry["vit_tiny"](str(path)).training


_ENCODERS: dict[str, dict[str, Any]] = {
    "public defaults": {},  # no windows and no relative positions
    "positions": {"use_rel_pos": True, "rel_pos_zero_init": False},
    "windows without positions": {"window_size": 3, "global_attn_indexes": (0,), "use_abs_pos": False},
    "windows, no biases": {"window_size": 4, "use_rel_pos": True, "qkv_bias": False, "act_layer": nn.ReLU},
    "channels and patches": {"in_chans": 4, "patch_size": 8, "mlp_ratio": 2.5, "act_layer": nn.SiLU},
    "another norm": {"norm_layer": partial(nn.RMSNorm, eps=1e-3), "window_size": 5, "use_rel_pos": True},
}


@pytest.mark.parametrize("options", _ENCODERS.values(), ids=_ENCODERS)
@torch.no_grad()
def test_encoders_of_other_options(compare: Compare, options: dict[str, Any]) -> None:
    sizes = {"img_size": 96, "embed_dim": 24, "depth": 2, "num_heads": 3, "out_chans": 16}
    ours, theirs = pair_of(lambda m: m.ImageEncoderViT(**sizes, **options))
    images = random(2, options.get("in_chans", 3), 96, 96)
    compare("encoder", ours(images), theirs(images))


@torch.no_grad()
def test_blocks_are_called_one_by_one(small: tuple[Any, Any], compare: Compare) -> None:
    encoder = small[0].image_encoder
    images = random(2, 3, 128, 128)
    x = encoder.patch_embed(images) + encoder.pos_embed
    for block, public_block in zip(encoder.blocks, small[1].image_encoder.blocks):
        compare("block", block(x), public_block(x))
        x = block(x)
        compare("attention of a map", block.attn(x), public_block.attn(x))
    compare("neck", encoder.neck(x.permute(0, 3, 1, 2)), small[1].image_encoder(images))


@torch.no_grad()
def test_window_and_position_helpers(compare: Compare) -> None:
    ours, theirs = modeling.image_encoder, public_sam().modeling.image_encoder
    for height, width in ((7, 12), (10, 10), (3, 2)):
        x = random(2, height, width, 6)
        (windows, padded), (public_windows, public_padded) = (m.window_partition(x, 5) for m in (ours, theirs))
        assert torch.equal(windows, public_windows) and padded == public_padded
        assert torch.equal(ours.window_unpartition(windows, 5, padded, (height, width)), x)
    table = random(9, 6)
    for q_size, k_size in ((5, 5), (4, 7), (7, 4), (2, 6)):
        compare("get_rel_pos", *(m.get_rel_pos(q_size, k_size, table) for m in (ours, theirs)))
    q, attn = random(3, 4 * 5, 6), random(3, 4 * 5, 2 * 7)
    biased = (m.add_decomposed_rel_pos(attn, q, table, random(13, 6), (4, 5), (2, 7)) for m in (ours, theirs))
    compare("add_decomposed_rel_pos", *biased)


_PROMPTS: dict[str, dict[str, Any]] = {
    "one box": {"boxes": SMALL_BOXES[:1]},
    "five boxes": {"boxes": SMALL_BOXES},
    "points": {"points": (random(2, 3, 2, scale=40), torch.tensor([[1, 0, -1], [0, 1, 1]]))},
    "many points": {"points": (random(2, 60, 2, scale=40), torch.ones(2, 60))},
    "boxes and masks": {"boxes": SMALL_BOXES, "masks": random(5, 1, 32, 32)},
    "nothing": {"points": None},
}


@pytest.mark.parametrize("prompts", _PROMPTS.values(), ids=_PROMPTS)
@torch.no_grad()
def test_the_decoder_takes_prompts_of_one_image(
    small: tuple[Any, Any], compare: Compare, prompts: dict[str, Any]
) -> None:
    inputs, public_inputs = (decoder_inputs(sam, **prompts) for sam in small)
    ours, theirs = (sam.mask_decoder for sam in small)
    for multimask_output in (False, True):
        expected = theirs(**public_inputs, multimask_output=multimask_output)
        compare_all(compare, "masks, IoU", ours(**inputs, multimask_output=multimask_output), expected)
        compare_all(compare, "positional", ours(*inputs.values(), multimask_output), expected)
    compare_all(compare, "all masks", ours.predict_masks(**inputs), theirs.predict_masks(**public_inputs))


@torch.no_grad()
def test_the_decoder_takes_images_with_one_prompt_each(small: tuple[Any, Any], compare: Compare) -> None:
    """As MedSAM's training does with a decoder of its own; the public 1.0 takes one image at a time."""
    inputs, images = decoder_inputs(small[0]), random(5, 32, 8, 8)
    together = small[0].mask_decoder(**{**inputs, "image_embeddings": images}, multimask_output=True)
    for i in range(5):
        single = {key: value[i : i + 1] for key, value in inputs.items() if key.endswith("prompt_embeddings")}
        alone = small[1].mask_decoder(
            **single, image_embeddings=images[i : i + 1], image_pe=inputs["image_pe"], multimask_output=True
        )
        compare_all(compare, "masks, IoU", tuple(part[i : i + 1] for part in together), alone)
    with pytest.raises(AssertionError, match="5 prompts for 3 images: give one for each, or"):
        small[0].mask_decoder(**{**inputs, "image_embeddings": images[:3]}, multimask_output=True)


@torch.no_grad()
def test_the_decoders_parts_take_maps(compare: Compare) -> None:
    def decoder(m: Any) -> Any:
        transformer = m.TwoWayTransformer(3, 32, 4, 48, activation=nn.GELU, attention_downsample_rate=4)
        return m.MaskDecoder(transformer=transformer, transformer_dim=32, activation=nn.Tanh, num_multimask_outputs=2)

    ours, theirs = pair_of(decoder)
    image, pe, tokens = random(2, 32, 6, 9), random(2, 32, 6, 9, seed=1), random(2, 7, 32)
    compare_all(compare, "transformer", ours.transformer(image, pe, tokens), theirs.transformer(image, pe, tokens))
    compare("upscaling", ours.output_upscaling(image), theirs.output_upscaling(image))
    q, k = random(2, 5, 32), random(2, 7, 32, seed=1)
    names = [f"transformer.layers.0.{kind}" for kind in ("self_attn", "cross_attn_token_to_image")]
    for name in (*names, "transformer.final_attn_token_to_image"):
        compare(name, *(decoder.get_submodule(name)(q, k, k) for decoder in (ours, theirs)))
    block, public_block = (decoder.transformer.layers[1] for decoder in (ours, theirs))
    compare_all(compare, "block", block(q, k, q, k), public_block(q, k, q, k))
    masks = ours.predict_masks(image[:1], pe[:1], tokens[:1], image[1:])
    compare_all(compare, "masks", masks, theirs.predict_masks(image[:1], pe[:1], tokens[:1], image[1:]))


def test_mlps(compare: Compare) -> None:
    for sigmoid_output in (False, True):
        ours, theirs = pair_of(lambda m: m.mask_decoder.MLP(8, 16, 4, 3, sigmoid_output=sigmoid_output))  # noqa: B023
        compare("MLP", ours(random(5, 8)).detach(), theirs(random(5, 8)).detach())
    ours, theirs = pair_of(lambda m: m.common.MLPBlock(embedding_dim=8, mlp_dim=16))
    compare("MLPBlock", ours(random(5, 8)).detach(), theirs(random(5, 8)).detach())


@torch.no_grad()
def test_position_encodings_and_prompt_embeddings(small: tuple[Any, Any], compare: Compare) -> None:
    ours, theirs = (sam.prompt_encoder for sam in small)
    coords = random(2, 3, 2, scale=50)
    for name, arguments in (("forward_with_coords", (coords, (100, 128))), ("_pe_encoding", (coords / 50,))):
        compare(name, *(getattr(encoder.pe_layer, name)(*arguments) for encoder in (ours, theirs)))
    labels = torch.tensor([[0, 1, -1], [1, 1, 0]])
    for pad in (False, True):
        compare("points", *(encoder._embed_points(coords, labels, pad=pad) for encoder in (ours, theirs)))
    compare("boxes", *(encoder._embed_boxes(SMALL_BOXES) for encoder in (ours, theirs)))
    compare("masks", *(encoder._embed_masks(random(2, 1, 32, 32)) for encoder in (ours, theirs)))
    assert ours._get_batch_size(None, SMALL_BOXES, None) == 5 and ours._get_batch_size(None, None, None) == 1
    for scale, deviation in ((None, 1), (-3.0, 1), (5.0, 5)):
        layer = modeling.prompt_encoder.PositionEmbeddingRandom(2000, scale)
        assert 0.9 * deviation < layer.positional_encoding_gaussian_matrix.std() < 1.1 * deviation


def test_sam_takes_a_list_of_images(small: tuple[Any, Any], compare: Compare) -> None:
    wide, high = random(3, 96, 128, scale=60).abs(), random(3, 128, 70, seed=1, scale=60).abs()
    batch: list[dict[str, Any]] = [
        {"image": wide, "original_size": (120, 160), "boxes": SMALL_BOXES[:2]},
        {
            "image": high,
            "original_size": (64, 35),
            "point_coords": random(3, 2, 2, scale=30),
            "point_labels": torch.ones(3, 2),
        },
        {"image": wide, "original_size": (30, 40), "boxes": SMALL_BOXES, "mask_inputs": random(5, 1, 32, 32)},
        {"image": high, "original_size": (128, 70)},
    ]
    for multimask_output in (False, True):
        ours, theirs = (sam(batch, multimask_output=multimask_output) for sam in small)
        for record, actual, expected in zip(batch, ours, theirs, strict=True):
            assert actual.keys() == expected.keys()
            for name in ("iou_predictions", "low_res_logits"):
                assert not actual[name].requires_grad
                compare(name, actual[name], expected[name])
            assert actual["masks"].dtype == torch.bool and actual["masks"].shape == expected["masks"].shape
            assert actual["masks"].shape[-2:] == record["original_size"]
            assert (actual["masks"] != expected["masks"]).float().mean() < 1e-3  # logits next to 0 round either way


# --- Adapters, hooks and parts of a client's own


class LoRA(nn.Module):
    """Two narrow layers beside one that is frozen."""

    def __init__(self, layer: nn.Linear, seed: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(random(2, layer.in_features, seed=seed, scale=0.3))
        self.up = nn.Parameter(random(layer.out_features, 2, seed=seed + 1, scale=0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def linears(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if type(part) is nn.Linear]


def with_lora(sam: Any, names: Iterable[str]) -> Any:
    for i, name in enumerate(names):
        parent, _, leaf = name.rpartition(".")
        setattr(sam.get_submodule(parent), leaf, LoRA(sam.get_submodule(name), seed=i))
    return sam


def encode_and_decode(sam: Any) -> Tensor:
    """One number that everything in the encoder and the decoder has a share in."""
    inputs = {**decoder_inputs(sam), "image_embeddings": sam.image_encoder(random(1, 3, 128, 128))}
    masks, ious = sam.mask_decoder.predict_masks(**inputs)
    return (masks * random(*masks.shape, seed=3)).sum() + (ious * random(*ious.shape, seed=4)).sum()


def test_lora_on_every_linear_layer_is_run_and_trained(small: tuple[Any, Any], compare: Compare) -> None:
    names = linears(small[0])
    assert names == linears(small[1]) and len(names) > 50
    ours, theirs = (with_lora(sam, names) for sam in small)
    results = [encode_and_decode(sam) for sam in (ours, theirs)]
    compare("with LoRA", *(result.detach() for result in results))
    for result in results:
        result.backward()
    for name in names:
        for part in ("down", "up"):
            actual, expected = (sam.get_submodule(name).get_parameter(part).grad for sam in (ours, theirs))
            compare(f"gradient of {name}.{part}", actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "parametrized", "patched", "subclass", "no bias"])
@pytest.mark.slow
def test_an_adapted_layer_among_plain_ones_is_run(small: tuple[Any, Any], compare: Compare, kind: str) -> None:
    """One layer at a time, so that each fast path meets each layer that it would take the weights of."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    def adapt(sam: Any, name: str) -> None:
        layer = sam.get_submodule(name)
        if kind == "lora":
            with_lora(sam, [name])
        elif kind == "parametrized":
            parametrize.register_parametrization(layer, "weight", Halved())
        elif kind == "patched":  # as accelerate's offloading does
            layer.forward = lambda x, forward=layer.forward: 3 * forward(x)
        elif kind == "subclass":
            layer.__class__ = Doubled
        else:
            layer.bias = None

    names = [
        *(name for name in linears(small[0]) if "transformer.layers.1" in name or "blocks.0" in name),
        *(f"mask_decoder.transformer.final_attn_token_to_image.{part}_proj" for part in ("q", "k", "v", "out")),
    ]
    assert len(names) == 22
    before = encode_and_decode(small[0]).item()
    for name in names:
        ours, theirs = (copy.deepcopy(sam) for sam in small)
        for sam in (ours, theirs):
            adapt(sam, name)
        actual, expected = (encode_and_decode(sam) for sam in (ours, theirs))
        if not (kind == "no bias" and "k_proj" in name):  # which changes all scores of a query alike
            assert abs(actual.item() - before) > 1e-5 * abs(before), f"{kind} on {name} changes nothing"
        compare(f"{kind} on {name}", actual, expected)


@pytest.mark.parametrize("hooks", ["all", "one at a time", "before", "global"])
@torch.no_grad()
def test_hooks_see_what_they_see_in_the_public_package(small: tuple[Any, Any], hooks: str) -> None:
    """Each module, as often and with the same shapes."""

    def run(sam: Any, names: list[str]) -> list[tuple[str, list[tuple[int, ...]]]]:
        seen: list[tuple[str, list[tuple[int, ...]]]] = []
        place = {module: name for name, module in sam.named_modules()}

        def see(module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if module in place:
                seen.append((place[module], [tuple(x.shape) for x in (*inputs, *outputs) if isinstance(x, Tensor)]))

        register = {"before": nn.Module.register_forward_pre_hook}.get(hooks, nn.Module.register_forward_hook)
        handles = [register(sam.get_submodule(name), see) for name in names]
        if hooks == "global":
            handles = [nn.modules.module.register_module_forward_hook(see)]
        if any(name.startswith("image_encoder") for name in names):
            sam.image_encoder(random(1, 3, 128, 128))
        if any(name.startswith("mask_decoder") for name in names):
            sam.mask_decoder(**decoder_inputs(sam), multimask_output=True)
        for handle in handles:
            handle.remove()
        return sorted(seen)  # masks are made of what may be made in any order

    called = [name for name, module in small[1].named_modules() if type(module).forward is not nn.Module.forward]
    called = [name for name in called if name and not isinstance(small[1].get_submodule(name), nn.Embedding)]
    for names in [[name] for name in called] if hooks == "one at a time" else [called]:
        ours, theirs = (run(sam, names) for sam in small)
        assert ours == theirs
        if names == ["mask_decoder.transformer.layers.0.cross_attn_token_to_image.k_proj"]:
            assert ours == [(names[0], [(5, 64, 32), (5, 64, 16)])]


def test_hooks_on_the_way_back_are_called(small: tuple[Any, Any]) -> None:
    sam, seen = small[0], set()
    for name in linears(sam):
        sam.get_submodule(name).register_full_backward_hook(lambda *_, name=name: seen.add(name))
    encode_and_decode(sam).backward()
    assert seen == set(linears(sam))


def test_plain_layers_take_the_fast_path(small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Projected image tokens, windows and full-size channels would be made by these."""

    def forbidden(*_: Any) -> Any:
        raise AssertionError("the general formula was used")

    attention = modeling.transformer.Attention
    general = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, q, k, v: general(self, q, k, v) if q is k else forbidden())
    monkeypatch.setattr(nn.ConvTranspose2d, "forward", forbidden)
    monkeypatch.setattr(image_encoder, "window_partition", forbidden)
    small[0].image_encoder(random(1, 3, 128, 128))
    small[0].mask_decoder(**decoder_inputs(small[0]), multimask_output=False)


@torch.no_grad()
def test_parts_that_a_client_puts_in_place_of_ours(small: tuple[Any, Any], compare: Compare) -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module, factor: float) -> None:
            super().__init__()
            self.module = module
            self.factor = factor

        def forward(self, *inputs: Any, **named: Any) -> Any:
            sizes = {len(x) for x in (*inputs, *named.values()) if x.ndim > 2 and len(x) > 1}
            assert len(sizes) <= 1  # the public package knows of no prompts that share an image
            output = self.module(*inputs, **named)
            return (self.factor * output[0], output[1]) if isinstance(output, tuple) else self.factor * output

    replaced = (
        "image_encoder.patch_embed",
        "image_encoder.blocks.0",
        "image_encoder.blocks.0.attn",
        "image_encoder.blocks.1.attn",
        "image_encoder.blocks.0.mlp",
        "image_encoder.blocks.0.norm2",
        "image_encoder.neck",
        "mask_decoder.transformer",
        "mask_decoder.transformer.layers.0",
        "mask_decoder.transformer.layers.1",
        "mask_decoder.transformer.layers.0.cross_attn_token_to_image",
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token",
        "mask_decoder.transformer.final_attn_token_to_image",
        "mask_decoder.transformer.layers.0.mlp",
        "mask_decoder.output_upscaling",
        "mask_decoder.output_upscaling.0",
        "mask_decoder.output_upscaling.1",
        "mask_decoder.output_upscaling.2",
        "mask_decoder.output_hypernetworks_mlps.1",
    )
    for name in replaced:
        ours, theirs = (copy.deepcopy(sam) for sam in small)
        for sam in (ours, theirs):
            parent, _, leaf = name.rpartition(".")
            setattr(sam.get_submodule(parent), leaf, Wrapped(sam.get_submodule(name), 1.5))
        compare(f"{name} replaced", encode_and_decode(ours), encode_and_decode(theirs))


def test_a_decoder_of_a_clients_own_is_asked(small: tuple[Any, Any]) -> None:
    class OneMask(MaskDecoder):
        def predict_masks(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            masks, ious = super().predict_masks(*args, **kwargs)
            return masks + 1000, ious

    decoder, inputs = small[0].mask_decoder, decoder_inputs(small[0])
    expected = decoder(**inputs, multimask_output=True)[0] + 1000
    decoder.__class__ = OneMask
    torch.testing.assert_close(decoder(**inputs, multimask_output=True)[0], expected)


# --- Devices, types, copies


def test_the_encoder_on_a_device_that_it_does_not_know(small: tuple[Any, Any]) -> None:
    """Anything but a CPU: CUDA, MPS, XPU; here one that computes nothing."""
    encoder = small[0].image_encoder.to("meta")
    assert encoder(torch.zeros(2, 3, 128, 128, device="meta")).shape == (2, 32, 8, 8)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float16, 0.02), (torch.bfloat16, 0.1), (torch.float64, 1e-5)], ids=str
)
def test_a_predictor_in_another_type(small: tuple[Any, Any], dtype: torch.dtype, error: float) -> None:
    prompt: dict[str, Any] = {**_POINTS, **_BOX, "mask_input": random(1, 32, 32).numpy(), "return_logits": True}
    results = []
    for sam in (copy.deepcopy(small[0]).to(dtype), small[0]):
        predictor = SamPredictor(sam)
        predictor.set_image(IMAGE)
        features = predictor.get_image_embedding()
        assert features.dtype == next(sam.parameters()).dtype
        results.append((features.detach().float(), *predictor.predict(**prompt)))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < error
    numpy_type = np.float32 if dtype == torch.bfloat16 else np.dtype(str(dtype).removeprefix("torch."))
    assert {array.dtype for array in results[0][1:]} == {np.dtype(numpy_type)}


def test_copies_and_pickles_give_the_same(small: tuple[Any, Any]) -> None:
    expected = encode_and_decode(small[0])
    for sam in (copy.deepcopy(small[0]), pickle.loads(pickle.dumps(small[0]))):
        assert torch.equal(encode_and_decode(sam), expected)


@torch.no_grad()
@pytest.mark.slow
def test_an_exported_decoder_takes_any_number_of_tokens(small: tuple[Any, Any]) -> None:
    class AllMasks(nn.Module):
        def __init__(self, decoder: Any) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self.decoder.predict_masks(*inputs)

    def inputs(count: int) -> tuple[Tensor, ...]:
        return tuple(decoder_inputs(small[0], points=(random(1, count, 2, scale=40), torch.ones(1, count))).values())

    decoder = small[0].mask_decoder
    shapes = (None, None, {1: torch.export.Dim("tokens", min=2, max=100)}, None)
    exported = torch.export.export(AllMasks(decoder), inputs(2), dynamic_shapes=(shapes,)).module()
    for count in (1, 5, 40):
        assert relative_error(exported(*inputs(count))[0], decoder.predict_masks(*inputs(count))[0]) < TOLERANCE


# --- B images x Q prompts


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("limit", [3000, 2**26])
def test_the_encoder_in_bf16(monkeypatch: pytest.MonkeyPatch, limit: int, grad: bool) -> None:
    """Its attention is made of other operations there."""
    encoder = random_tiny().image_encoder
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = encoder(images)
    monkeypatch.setitem(image_encoder.MAX_ELEMENTS, "cpu", limit)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        assert relative_error(encoder(images).detach().float(), expected) < 0.02


@torch.no_grad()
def test_a_dense_prompt_that_prompts_share_is_given_once() -> None:
    sam, b, q = random_tiny(), 2, 3
    sparse, dense = sam.prompt_encoder(boxes=64 * torch.rand(b * q, 4))
    dense = dense.unflatten(0, (b, q))
    image_embeddings = torch.randn(b, 128, 4, 4)
    shared, repeated = (
        sam.mask_decoder(
            image_embeddings=image_embeddings,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse.unflatten(0, (b, q)),
            dense_prompt_embeddings=some,
            multimask_output=True,
        )
        for some in (dense[:, :1], dense)
    )
    for ours, expected in zip(shared, repeated):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("multimask_output", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("with_masks", [False, True], ids=["boxes", "boxes+masks"])
@torch.no_grad()
def test_decoding_b_images_with_q_prompts_is_decoding_each(multimask_output: bool, with_masks: bool) -> None:
    sam, b, q = random_tiny(), 2, 3
    image_embeddings = torch.randn(b, 128, 4, 4)
    masks = 5 * torch.randn(b * q, 1, 16, 16) if with_masks else None
    sparse, dense = sam.prompt_encoder(boxes=64 * torch.rand(b * q, 4), masks=masks)
    sparse, dense = sparse.unflatten(0, (b, q)), dense.unflatten(0, (b, q))

    def decode(images: slice, prompts: slice) -> tuple[Tensor, Tensor]:
        return sam.mask_decoder(
            image_embeddings=image_embeddings[images],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse[images, prompts],
            dense_prompt_embeddings=dense[images, prompts],
            multimask_output=multimask_output,
        )

    together = decode(slice(None), slice(None))
    count = 3 if multimask_output else 1
    assert [tensor.shape for tensor in together] == [(b, q, count, 16, 16), (b, q, count)]
    for i in range(b):
        for j in range(q):
            alone = decode(slice(i, i + 1), slice(j, j + 1))
            for whole, part in zip(together, alone):
                torch.testing.assert_close(whole[i, j], part[0, 0], rtol=1e-4, atol=1e-5)


# --- Loading


@pytest.fixture(scope="module")
def tiny_state() -> dict[str, Tensor]:
    """The state dict of a random vit_tiny at 64. Tests change copies of it."""
    return random_tiny().state_dict()


def load_tiny(path: Path, **options: Any) -> Sam:
    return build_sam_vit_tiny(checkpoint=path, **{"image_size": 64, **options})


def save(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def test_a_state_dict_is_loaded_whole(tmp_path: Path, tiny_state: dict[str, Tensor]) -> None:
    sam = load_tiny(save(tiny_state, tmp_path / "sam.pth"))
    assert not sam.training
    loaded = sam.state_dict()
    assert loaded.keys() == tiny_state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in tiny_state.items())


def test_half_precision_is_loaded_into_float32(tmp_path: Path, tiny_state: dict[str, Tensor]) -> None:
    half = {key: value.half() for key, value in tiny_state.items()}
    for image_size in (64, 128):  # with and without resampling of the positions
        sam = load_tiny(save(half, tmp_path / "sam.pth"), image_size=image_size)
        assert {value.dtype for value in sam.state_dict().values()} == {torch.float32}
    key = "image_encoder.neck.0.weight"
    assert torch.equal(sam.state_dict()[key], half[key].float())


def test_a_missing_file_is_told_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such checkpoint; this repository has one: assets/"):
        load_tiny(tmp_path / "nowhere.pth")
    url = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"
    with pytest.raises(CheckpointError, match=rf"no such checkpoint; download it with: wget -P {tmp_path} {url}"):
        read_state_dict(tmp_path / "nowhere.pth", "vit_b")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, zipped: bool) -> None:
    """Cut at many places: what the unpickler raises depends on where the file ends."""
    buffer = io.BytesIO()
    state = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "cut.pth"
    for length in range(0, len(buffer.getvalue()), 23 if zipped else 5):
        path.write_bytes(buffer.getvalue()[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth: truncated, or not a PyTorch checkpoint"):
            read_state_dict(path, "vit_b")
    path.write_bytes(buffer.getvalue())
    assert read_state_dict(path, "vit_b").keys() == state.keys()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "not a checkpoint")
    contents = {
        "zip": archive.getvalue(),
        "text": b"<html>404 Not Found</html>\n",
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 3\n",
        "list": pickle.dumps([1, 2, 3], protocol=2),
    }
    path = tmp_path / "sam.pth"
    for what, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"sam\.pth: truncated, or not a PyTorch checkpoint"):
            load_tiny(path)
            pytest.fail(f"{what} was loaded")
    for other in ({}, [torch.zeros(1)], {"model": {"a": torch.zeros(1)}}, {0: torch.zeros(1)}):
        torch.save(other, path)
        with pytest.raises(CheckpointError, match=r"sam\.pth: does not hold a SAM state dict"):
            load_tiny(path)


@pytest.mark.parametrize("saved_by", ["torch", "torch_legacy", "pickle"])
def test_what_a_pickle_wants_to_run_is_not_run(tmp_path: Path, saved_by: str) -> None:
    made, path = tmp_path / "made", tmp_path / "sam.pth"
    if saved_by == "pickle":
        path.write_bytes(pickle.dumps(Payload(made), protocol=2))
    else:
        torch.save({"a": Payload(made)}, path, _use_new_zipfile_serialization=saved_by == "torch")
    with pytest.raises(CheckpointError, match=r"sam\.pth: truncated, or not a PyTorch checkpoint of plain tensors"):
        load_tiny(path)
    assert not made.exists()
    if saved_by == "torch":  # the payload is live: an unguarded reader would have run it
        torch.load(path, weights_only=False)
        assert made.exists()


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path, tiny_state: dict[str, Tensor]) -> None:
    path = tmp_path / "sam.pth"
    for model_type, width in (("vit_b", 768), ("vit_l", 1024), ("vit_h", 1280)):
        save({**tiny_state, "image_encoder.pos_embed": torch.zeros(1, 64, 64, width)}, path)
        with pytest.raises(CheckpointError, match=rf"sam\.pth: a checkpoint of {model_type}, not of vit_tiny"):
            load_tiny(path)


def test_keys_that_do_not_fit_are_named(tmp_path: Path, tiny_state: dict[str, Tensor]) -> None:
    token, table = "mask_decoder.iou_token.weight", "image_encoder.blocks.0.attn.rel_pos_h"
    without = {key: value for key, value in tiny_state.items() if key != token}
    cases = {
        rf"it lacks 1 of \d+ keys \({token}\)": without,
        r"it has foreign 2 of \d+ keys \(ema, step\)": {**tiny_state, "ema": torch.ones(1), "step": torch.ones(1)},
        rf"it has other shapes of 1 of \d+ keys \({token}\)": {**tiny_state, token: torch.zeros(1, 64)},
        r"it lacks \d+ of \d+ keys \(.+, .+, .+, \.\.\.\)": {"a": torch.zeros(1)},
        # Windows have one size whatever the image's: another one is another model, and nothing to resample.
        rf"it has other shapes of 1 of \d+ keys \({table}\)": {**tiny_state, table: torch.zeros(27, 32)},
    }
    for message, state in cases.items():
        with pytest.raises(CheckpointError, match=rf"sam\.pth: not a vit_tiny SAM checkpoint: {message}"):
            load_tiny(save(state, tmp_path / "sam.pth"))


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])  # Meta's names carry MD5, PyTorch Hub's SHA-256
def test_the_hash_in_the_name_is_checked_on_request(
    tmp_path: Path, tiny_state: dict[str, Tensor], algorithm: str
) -> None:
    path = save(tiny_state, tmp_path / "sam.pth")
    beginning = hashlib.new(algorithm, path.read_bytes()).hexdigest()[:6]
    load_tiny(path.rename(tmp_path / f"sam_vit_tiny_{beginning}.pth"), check_hash=True)
    wrong = save(tiny_state, tmp_path / "sam_vit_tiny_000000.pth")
    load_tiny(wrong)  # nobody asked
    with pytest.raises(
        CheckpointError, match=r"000000\.pth: damaged or renamed: its name has the hash 000000, but its SHA"
    ):
        load_tiny(wrong, check_hash=True)
    plain = save(tiny_state, tmp_path / "medsam_vit_b.pth")
    with pytest.raises(CheckpointError, match=r"medsam_vit_b\.pth: its name holds no hash"):
        load_tiny(plain, check_hash=True)


# --- Another image size than the checkpoint's


def test_at_its_own_image_size_the_weights_are_those_of_the_file(tmp_path: Path, tiny_state: dict[str, Tensor]) -> None:
    loaded = load_tiny(save(tiny_state, tmp_path / "sam.pth"), image_size=64).state_dict()
    assert loaded.keys() == tiny_state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in tiny_state.items())


def test_positions_are_resampled_to_another_image_size(tmp_path: Path, tiny_state: dict[str, Tensor]) -> None:
    path = save(tiny_state, tmp_path / "sam.pth")
    larger = load_tiny(path, image_size=128)
    state = larger.state_dict()
    changed = {key for key, value in tiny_state.items() if state[key].shape != value.shape}
    assert changed == {"image_encoder.pos_embed"} | {
        f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (1, 3, 5, 7) for axis in "hw"
    }
    assert all(torch.equal(state[key], value) for key, value in tiny_state.items() if key not in changed)
    with torch.no_grad():
        assert larger.image_encoder(torch.randn(1, 3, 128, 128)).shape == (1, 128, 8, 8)


def test_the_position_embedding_keeps_its_axes_and_values(tmp_path: Path, tiny_state: dict[str, Tensor]) -> None:
    """A ramp down the rows stays one, which a resampling along the wrong axes would turn or bend."""
    rows = torch.arange(16.0)[:, None, None].expand(16, 16, 192)
    state = {**tiny_state, "image_encoder.pos_embed": rows[None].clone()}
    # The global tables of this file go with a 4 x 4 grid and the embedding with 16 x 16; each is resampled by itself.
    sam = load_tiny(save(state, tmp_path / "sam.pth"), image_size=512)
    assert sam.image_encoder.pos_embed is not None
    resampled = sam.image_encoder.pos_embed[0, :, :, 0]  # 32 x 32
    centres = (torch.arange(32.0) + 0.5) / 2 - 0.5
    # PyTorch's bicubic kernel is exact on constants and follows a ramp of slope 1 to within 0.05.
    torch.testing.assert_close(resampled[4:-4], centres[4:-4, None].expand(-1, 32), rtol=0, atol=0.05)


@torch.no_grad()
def test_relative_positions_are_resampled_as_the_public_package_does(
    tmp_path: Path, tiny_state: dict[str, Tensor], compare: Compare
) -> None:
    """The public block keeps the 4 x 4 grid's tables and interpolates them whenever it sees another grid."""
    sam = load_tiny(save(tiny_state, tmp_path / "sam.pth"), image_size=128)
    block = sam.image_encoder.blocks[1]
    public_block = public_sam().modeling.image_encoder.Block(
        dim=192, num_heads=6, use_rel_pos=True, input_size=(4, 4), norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6)
    )
    prefix = "image_encoder.blocks.1."
    public_block.load_state_dict(
        {key.removeprefix(prefix): value for key, value in tiny_state.items() if key.startswith(prefix)}
    )
    x = torch.randn(1, 8, 8, 192, generator=torch.Generator().manual_seed(0))
    compare("global block at another size", block(x), public_block(x))


@pytest.mark.parametrize("image_size", [40, 1000, -16, (0, 16), (16,), (16, 24), "32x48"])
def test_an_image_size_that_patches_do_not_divide_is_refused(image_size: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"image_size must be a multiple of 16, got {image_size}")):
        build_sam_vit_tiny(image_size=image_size)


# --- Non-square frames

FRAMES = [(64, 96), (96, 64), (32, 128), (128, 48)]  # within a square of 128


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint of vit_tiny at 128 x 128, and the public package's model of it."""
    sam = random_tiny(128)
    return save(sam.state_dict(), tmp_path_factory.mktemp("square") / "sam.pth"), public_tiny(sam)


def global_tables(encoder: Any) -> list[tuple[Tensor, Tensor]]:
    return [(encoder.blocks[i].attn.rel_pos_h, encoder.blocks[i].attn.rel_pos_w) for i in (1, 3, 5, 7)]


@pytest.mark.parametrize("frame", FRAMES)
@torch.no_grad()
def test_positions_of_a_smaller_frame_are_the_top_left_of_the_squares(
    square: tuple[Path, Any], compare: Compare, frame: tuple[int, int]
) -> None:
    path, public = square
    sam = build_sam_vit_tiny(path, image_size=frame)
    h, w = (side // 16 for side in frame)
    assert sam.frame_size == frame and sam.prompt_encoder.image_embedding_size == (h, w)
    assert sam.image_encoder.pos_embed is not None
    assert sam.image_encoder.pos_embed.equal(public.image_encoder.pos_embed[:, :h, :w])
    for tables, public_tables in zip(global_tables(sam.image_encoder), global_tables(public.image_encoder)):
        for table, public_table, length in zip(tables, public_tables, (h, w)):
            assert len(table) == 2 * length - 1
            for distance in range(1 - length, length):  # the same row for the same distance
                assert table[distance + length - 1].equal(public_table[distance + 7])
    expected = public.prompt_encoder.get_dense_pe()[:, :, :h, :w]
    compare("get_dense_pe", sam.prompt_encoder.get_dense_pe(), expected)
    assert sam.prompt_encoder.get_dense_pe().equal(
        build_sam_vit_tiny(path, image_size=128).prompt_encoder.get_dense_pe()[:, :, :h, :w]
    )
    corners = torch.rand(5, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([frame[1], frame[0]])
    prompts: dict[str, Any] = {
        "points": (corners, torch.tensor([[1, 0]] * 5)),
        "boxes": corners.flatten(1),
        "masks": None,
    }
    compare("points and boxes", *(model.prompt_encoder(**prompts)[0] for model in (sam, public)))
    assert sam.prompt_encoder(**prompts)[1].shape == (5, 128, h, w)
    masks = torch.randn(2, 1, 4 * h, 4 * w)
    assert sam.prompt_encoder.mask_input_size == (4 * h, 4 * w)
    compare("masks", *(model.prompt_encoder(None, None, masks)[1] for model in (sam, public)))


def public_encoder_at(public: Any, grid: tuple[int, int]) -> Any:
    """The public package's square encoder with its tables cut by hand."""
    encoder = copy.deepcopy(public.image_encoder)
    side = encoder.pos_embed.shape[1]
    encoder.pos_embed = nn.Parameter(encoder.pos_embed[:, : grid[0], : grid[1]])
    for i in (1, 3, 5, 7):
        attn = encoder.blocks[i].attn
        for name, length in zip(("rel_pos_h", "rel_pos_w"), grid):
            setattr(attn, name, nn.Parameter(getattr(attn, name)[side - length : side + length - 1]))
    return encoder


@pytest.mark.parametrize("frame", FRAMES)
@torch.no_grad()
def test_the_encoder_on_non_square_frames(square: tuple[Path, Any], compare: Compare, frame: tuple[int, int]) -> None:
    path, public = square
    encoder = build_sam_vit_tiny(path, image_size=frame).image_encoder
    grid = (frame[0] // 16, frame[1] // 16)
    images = torch.randn(2, 3, *frame, generator=torch.Generator().manual_seed(0))
    assert encoder(images).shape == (2, 128, *grid)
    compare(f"encoder at {frame}", encoder(images), public_encoder_at(public, grid)(images))


@pytest.mark.parametrize("frame", [(64, 96), (96, 64), (32, 80), (80, 16)])
@torch.no_grad()
def test_positions_beyond_the_pretrained_size_are_scaled_alike_on_both_axes(
    tmp_path: Path, compare: Compare, frame: tuple[int, int]
) -> None:
    """As the square of the longest side has them, also on an axis that the checkpoint's own tables would fit."""
    path, side = save(random_tiny(64).state_dict(), tmp_path / "sam.pth"), max(frame)
    larger, sam = build_sam_vit_tiny(path, image_size=side), build_sam_vit_tiny(path, image_size=frame)
    public, (h, w) = public_tiny(larger), (frame[0] // 16, frame[1] // 16)
    cut = public_encoder_at(public, (h, w))
    assert sam.image_encoder.pos_embed is not None and sam.image_encoder.pos_embed.equal(cut.pos_embed)
    for tables, expected in zip(global_tables(sam.image_encoder), global_tables(cut)):
        assert all(table.equal(value) for table, value in zip(tables, expected))
    compare("get_dense_pe", sam.prompt_encoder.get_dense_pe(), public.prompt_encoder.get_dense_pe()[:, :, :h, :w])
    boxes = torch.tensor([[0.0, 0, 15, 15], [3, 2, frame[1] - 1, frame[0] - 1]])
    compare("boxes", *(model.prompt_encoder(None, boxes, None)[0] for model in (sam, public)))
    images = torch.randn(1, 3, *frame, generator=torch.Generator().manual_seed(0))
    compare("encoder", sam.image_encoder(images), cut(images))


@torch.no_grad()
def test_a_square_frame_is_resampled_to_the_bit(tmp_path: Path, tiny_state: dict[str, Tensor]) -> None:
    path = save(tiny_state, tmp_path / "sam.pth")
    for size in (48, 128):
        sam, same = load_tiny(path, image_size=size), load_tiny(path, image_size=(size, size))
        assert all(value.equal(same.state_dict()[key]) for key, value in sam.state_dict().items())
        table = tiny_state["image_encoder.pos_embed"].permute(0, 3, 1, 2)
        expected = F.interpolate(table, (size // 16, size // 16), mode="bicubic", align_corners=False)
        assert sam.image_encoder.pos_embed is not None
        assert sam.image_encoder.pos_embed.equal(expected.permute(0, 2, 3, 1))
        distances = tiny_state["image_encoder.blocks.3.attn.rel_pos_w"].T[None]
        expected = F.interpolate(distances, 2 * size // 16 - 1, mode="linear", align_corners=False)[0].T
        assert global_tables(sam.image_encoder)[1][1].equal(expected)
        encoder = sam.prompt_encoder
        assert encoder.input_image_size == (size, size)
        assert encoder.get_dense_pe()[0].equal(encoder.pe_layer((size // 16, size // 16)))


@torch.no_grad()
def test_a_checkpoint_of_a_frame_is_loaded_at_its_own_frame_as_it_is(tmp_path: Path) -> None:
    sam = random_tiny((48, 96))
    path = save(sam.state_dict(), tmp_path / "sam.pth")
    again = build_sam_vit_tiny(path, image_size=(48, 96))
    assert all(value.equal(again.state_dict()[key]) for key, value in sam.state_dict().items())
    assert again.prompt_encoder.get_dense_pe().equal(sam.prompt_encoder.get_dense_pe())
    boxes = torch.tensor([[1.0, 2, 30, 40]])
    assert again.prompt_encoder(boxes=boxes)[0].equal(sam.prompt_encoder(boxes=boxes)[0])
    for other in (64, (96, 48), (48, 128)):
        with pytest.raises(
            CheckpointError,
            match=r"sam\.pth: its positions fit only the frame 48x96; "
            "use the image size 48x96$",
        ):
            build_sam_vit_tiny(path, image_size=other)


def test_sams_own_frames() -> None:
    """Without a checkpoint too, positions are shares of the size that SAM was made for."""
    with torch.device("meta"):
        sam = build_sam_vit_b(image_size=(576, 1024))
        large = build_sam_vit_b(image_size=(720, 1280))
    state = sam.state_dict()
    assert state["image_encoder.pos_embed"].shape == (1, 36, 64, 768)
    assert state["image_encoder.blocks.2.attn.rel_pos_h"].shape == (71, 64)
    assert state["image_encoder.blocks.2.attn.rel_pos_w"].shape == (127, 64)
    assert state["image_encoder.blocks.1.attn.rel_pos_h"].shape == (27, 64)
    assert sam.prompt_encoder.input_image_size == (1024, 1024)
    assert large.prompt_encoder.input_image_size == (1280, 1280)
    assert sam.image_encoder.img_size == 1024


def test_sizes_of_numpy() -> None:
    for size in (np.int64(64), (np.int64(64), np.int32(64))):
        assert build_sam_vit_tiny(image_size=size).frame_size == (64, 64)


@pytest.mark.parametrize("bad", [(64, 100), (8, 64), (), (64,), "64x96", 64.0])
def test_frames_that_patches_do_not_divide(bad: Any) -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of 16"):
        build_sam_vit_tiny(image_size=bad)


@torch.no_grad()
def test_the_predictor_on_a_non_square_frame(square: tuple[Path, Any], compare: Compare) -> None:
    """Against the public package's parts, put together by hand."""
    path, public = square
    predictor = SamPredictor(build_sam_vit_tiny(path, image_size=(64, 128)))
    image = IMAGE[:230]  # scaled to 59 x 128
    predictor.set_image(image)
    scaled = torch.from_numpy(predictor.transform.apply_image(image)).permute(2, 0, 1).float()
    assert scaled.shape == (3, 59, 128)
    padded = F.pad((scaled - public.pixel_mean) / public.pixel_std, (0, 0, 0, 5))
    embedding = public_encoder_at(public, (4, 8))(padded[None])
    compare("embedding", predictor.get_image_embedding(), embedding)
    box = torch.tensor([[5.0, 4, 100, 50]]) * torch.tensor([128 / 500, 59 / 230] * 2)
    sparse, dense = public.prompt_encoder(None, box, None)
    expected, scores = public.mask_decoder(
        image_embeddings=embedding,
        image_pe=public.prompt_encoder.get_dense_pe()[:, :, :4],
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense[:, :, :4],
        multimask_output=True,
    )
    full = F.interpolate(expected, (64, 128), mode="bilinear", align_corners=False)[:, :, :59]
    full = F.interpolate(full, (230, 500), mode="bilinear", align_corners=False)
    ours = predictor.predict(box=np.array([5, 4, 100, 50]), return_logits=True)
    for what, actual, value in zip(("masks", "scores", "low-res masks"), ours, (full, scores, expected)):
        compare(what, actual, value[0])
    record = {"image": scaled, "original_size": (230, 500), "boxes": box}
    (output,) = predictor.model([record], multimask_output=True)
    compare("low-res masks of Sam.forward", output["low_res_logits"][0], expected[0])
    assert output["masks"].shape == (1, 3, 230, 500)


def test_a_picture_that_does_not_fit_the_frame() -> None:
    sam = random_tiny((48, 64))
    predictor = SamPredictor(sam)
    predictor.set_image(IMAGE)
    fix = "does not fit the model's 48 x 64; use a model of a square frame, which takes every shape"
    for image, size in ((IMAGE.transpose(1, 0, 2), "64 x 38"), (IMAGE[:, :300], "64 x 64")):
        with pytest.raises(ValueError, match=f"an image of {size} {fix}"):
            predictor.set_image(np.ascontiguousarray(image))
    with pytest.raises(ValueError, match="an image of 64 x 38 does not fit the model's 48 x 64; resize it first"):
        sam.preprocess(torch.zeros(3, 64, 38))


# --- vit_tiny, and what the predictor refuses


def test_vit_tiny_is_tiny_and_runs_at_256() -> None:
    sam = build_sam_vit_tiny()
    assert 4.5e6 < sum(parameter.numel() for parameter in sam.parameters()) < 5.5e6
    predictor = SamPredictor(sam)
    predictor.set_image(IMAGE)
    masks, iou_predictions, low_res_masks = predictor.predict(box=np.array([10, 20, 300, 200]))
    assert (masks.shape, iou_predictions.shape, low_res_masks.shape) == ((3, 300, 500), (3,), (3, 64, 64))


def test_predictor_takes_bgr() -> None:
    predictor = SamPredictor(random_tiny())
    predictor.set_image(IMAGE)
    from_rgb = predictor.get_image_embedding()
    predictor.set_image(IMAGE[..., ::-1], image_format="BGR")
    assert torch.equal(predictor.get_image_embedding(), from_rgb)
    predictor.set_image(IMAGE, image_format="BGR")
    assert not torch.equal(predictor.get_image_embedding(), from_rgb)


def test_predict_torch_takes_many_prompts() -> None:
    predictor = SamPredictor(random_tiny())
    predictor.set_image(IMAGE)
    boxes = np.array([[10, 20, 300, 200], [0, 0, 499, 299]])
    scaled = torch.from_numpy(predictor.transform.apply_boxes(boxes, IMAGE.shape[:2])).float()
    together = predictor.predict_torch(None, None, boxes=scaled, return_logits=True)
    for i, box in enumerate(boxes):
        for whole, part in zip(together, predictor.predict(box=box, return_logits=True)):
            np.testing.assert_allclose(whole[i].numpy(), part, rtol=1e-4, atol=1e-4)


def test_predictor_errors() -> None:
    predictor = SamPredictor(random_tiny())
    with pytest.raises(RuntimeError, match="no image is set; call set_image first"):
        predictor.predict(box=np.array([0, 0, 9, 9]))
    with pytest.raises(RuntimeError, match="call set_image first"):
        predictor.get_image_embedding()
    with pytest.raises(ValueError, match="image_format must be RGB or BGR, got 'GRB'"):
        predictor.set_image(IMAGE, image_format="GRB")
    for image in (IMAGE.astype(np.float32), IMAGE[..., 0], IMAGE[..., :2]):
        with pytest.raises(ValueError, match="image must be H x W x 3 of uint8, got"):
            predictor.set_image(image)
    with pytest.raises(ValueError, match="longest side 64"):
        predictor.set_torch_image(torch.zeros(1, 3, 32, 32), (300, 500))
    predictor.set_image(IMAGE)
    with pytest.raises(ValueError, match="point_coords need point_labels"):
        predictor.predict(point_coords=np.array([[3.0, 4.0]]))
    predictor.reset_image()
    with pytest.raises(RuntimeError, match="call set_image first"):
        predictor.get_image_embedding()


def test_a_missing_checkpoint_is_what_programs_for_either_package_catch(tmp_path: Path) -> None:
    for expected in (FileNotFoundError, CheckpointError):
        with pytest.raises(expected, match=r"none\.pth: no such checkpoint"):
            sam_model_registry["vit_b"](checkpoint=tmp_path / "none.pth")
