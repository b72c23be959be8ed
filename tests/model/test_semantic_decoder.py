"""The semantic decoder: what it takes over from SAM, what it gives, and that all of it is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from segment_anything import build_sam_vit_tiny
from segment_anything.modeling.common import MLP
from tests.helpers.inputs import IMAGE_SIZE
from utils.data.classes import NUM_CLASSES
from utils.model.segmenter import SemanticSegmenter, build_model
from utils.model.semantic_decoder import ClassMLPs, doubled


@pytest.fixture
def model(sam_file: Path) -> SemanticSegmenter:
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE, prompt_mode="semantic")
    assert isinstance(model, SemanticSegmenter)
    return model


def test_one_map_of_all_classes_and_nothing_untrained(model: SemanticSegmenter) -> None:
    model.train()
    assert model.mask_decoder.training
    assert not any(m.training for part in (model.sam.image_encoder, model.sam.prompt_encoder) for m in part.modules())
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    features = model.encode(images)
    assert [tuple(f.shape) for f in features] == [(2, 128, 4, 4)] + 4 * [(2, 192, 4, 4)]
    assert not any(feature.requires_grad for feature in features)
    (masks,) = model(model.inputs(images, features))
    assert masks.shape == (2, NUM_CLASSES, IMAGE_SIZE // 2, IMAGE_SIZE // 2)
    labels = torch.randint(0, 19, (2, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    torch.stack(list(model.losses((masks,), {"labels": labels}).values())).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # Without exception: DDP would wait for ever for a parameter that the loss does not reach.
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("sam.mask_decoder.")}
    assert all(p.requires_grad == (name in trained) for name, p in model.named_parameters())


def test_the_features_are_the_outputs_of_the_global_blocks(model: SemanticSegmenter) -> None:
    seen: list[torch.Tensor] = []
    encoder = model.sam.image_encoder
    for index in (1, 3, 5, 7):
        encoder.blocks[index].register_forward_hook(lambda module, inputs, output: seen.append(output))
    embeddings, *features = model.encode(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    for feature, output in zip(features, seen, strict=True):
        assert torch.equal(feature, output.permute(0, 3, 1, 2))
    torch.testing.assert_close(embeddings, encoder.neck(seen[-1].permute(0, 3, 1, 2)))


def test_sams_decoder_is_taken_over() -> None:
    torch.manual_seed(0)
    sam = build_sam_vit_tiny(image_size=IMAGE_SIZE)
    before = {key: value.clone() for key, value in sam.mask_decoder.state_dict().items()}
    decoder = SemanticSegmenter(sam).mask_decoder
    after = decoder.state_dict()
    shared = [key for key in before if key.startswith(("transformer.", "output_upscaling."))]
    assert len(shared) > 50
    assert all(torch.equal(after[key], before[key]) for key in shared)
    # Each class's token lies about SAM's, and its hypernetwork begins as SAM's.
    offsets = after["mask_tokens"] - before["mask_tokens.weight"][0]
    assert 0.9 < offsets.std() < 1.1 and abs(offsets.mean()) < 0.1
    for i in range(3):
        for c in range(NUM_CLASSES):
            theirs = before[f"output_hypernetworks_mlps.0.layers.{i}.weight"]
            assert torch.equal(after[f"output_hypernetworks.weights.{i}"][c].T[: len(theirs)], theirs)


def test_class_mlps_are_one_mlp_each() -> None:
    torch.manual_seed(0)
    mlps = ClassMLPs(MLP(8, 16, 4, 3), num_classes=3, further_outputs=2)
    for parameter in mlps.parameters():
        parameter.data = torch.randn_like(parameter)
    x = torch.randn(5, 3, 8)
    out = mlps(x)
    assert out.shape == (5, 3, 6)
    for c in range(3):
        y = x[:, c]
        for i in range(3):
            y = y @ mlps.weights[i][c] + mlps.biases[i][c]
            y = F.relu(y) if i < 2 else y
        torch.testing.assert_close(out[:, c], y)


def test_each_image_of_a_batch_is_decoded_by_itself(model: SemanticSegmenter) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    features = model.inputs(images)
    together = model(features)[0]
    for i in range(3):
        alone = model(tuple(feature[i : i + 1] for feature in features))[0]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_doubled_is_bilinear_interpolation() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(doubled(x), expected)


def test_the_detail_path_sees_pixels(model: SemanticSegmenter) -> None:
    """A pole of one pixel is drawn where it stands, though the encoder's features know nothing of it."""
    torch.manual_seed(0)
    images = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    features = model.encode(images)
    with_pole = images.clone()
    with_pole[..., 40] = 0
    masks, others = (model(model.inputs(seen, features))[0] for seen in (images, with_pole))
    change = (masks - others).abs().mean(dim=(0, 1, 2))  # of each column of logits, two pixels wide
    assert change.argmax() in (19, 20, 21)


def test_an_earlier_decoder_has_no_detail_path(sam_file: Path) -> None:
    sam = build_sam_vit_tiny(sam_file, image_size=IMAGE_SIZE)
    before = SemanticSegmenter(sam, pixel_channels=0)
    state = before.mask_decoder.state_dict()
    assert not before.takes_pixels and not any("detail_path" in key for key in state)
    built = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE, prompt_mode="semantic", decoder=state)
    built.mask_decoder.load_state_dict(state)
    features = built.encode(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    masks = built(features)[0]
    assert masks.shape == (1, NUM_CLASSES, IMAGE_SIZE // 4, IMAGE_SIZE // 4) and masks.equal(before(features)[0])
