"""What is frozen, what is trained, and the normalisation that the encoder gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.inputs import IMAGE_SIZE
from utils.model.losses import prompt_losses
from utils.model.segmenter import Segmenter, build_model
from utils.runtime.errors import UserError


@pytest.fixture
def model(sam_file: Path) -> Segmenter:
    return build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE)


def test_only_and_all_of_the_mask_decoder_is_trained(model: Segmenter) -> None:
    model.train()
    assert model.mask_decoder.training
    assert not any(m.training for part in (model.sam.image_encoder, model.sam.prompt_encoder) for m in part.modules())

    features = model.encode(torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert not any(feature.requires_grad for feature in features)
    boxes = torch.tensor([[4.0, 4, 40, 40], [10, 2, 60, 30]]).expand(2, 2, 4)
    masks, ious = model(features, boxes)
    assert masks.shape == (2, 2, IMAGE_SIZE // 4, IMAGE_SIZE // 4)
    assert ious.shape == (2, 2)
    labels = torch.zeros(2, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    losses = prompt_losses(masks, ious, labels, torch.tensor([[0, 1], [0, 1]]))
    torch.stack(list(losses.values())).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    # Without exception: DDP would wait for ever for a parameter that the loss does not reach.
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("sam.mask_decoder.")}
    assert all(p.requires_grad == (name in trained) for name, p in model.named_parameters())


def test_encode_normalises_as_sam_was_trained(model: Segmenter) -> None:
    pixels = torch.randint(0, 256, (1, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    normalised = (pixels.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = model.sam.image_encoder(normalised)
    torch.testing.assert_close(model.encode(pixels)[0], expected)
    torch.testing.assert_close(model.encode(pixels.float() / 255)[0], expected, rtol=1e-4, atol=1e-5)


def test_pixels_are_normalised_as_for_the_encoder(sam_file: Path) -> None:
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE, prompt_mode="semantic")
    pixels = torch.randint(0, 256, (1, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    expected = (pixels.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    encoded = model.encode(pixels)
    for images in (pixels, pixels.float() / 255):
        for inputs in (model.inputs(images), model.inputs(images, encoded)):
            torch.testing.assert_close(inputs[-1], expected, rtol=1e-4, atol=1e-5)
            for feature, same in zip(inputs[:-1], encoded, strict=True):
                torch.testing.assert_close(feature, same, rtol=1e-4, atol=1e-4)


def test_train_and_eval_switch_the_mask_decoder_alone(model: Segmenter) -> None:
    assert model.train() is model
    assert model.training
    assert all(module.training for module in model.mask_decoder.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_forward_gives_sams_single_mask_for_each_box(model: Segmenter) -> None:
    """B x Q boxes in one call are what SAM's own parts give for one box of one image."""
    features = model.encode(torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    boxes = torch.tensor([[[4.0, 4, 40, 40], [10, 2, 60, 30]], [[0, 0, 63, 63], [9, 9, 9, 9]]])
    masks, ious = model(features, boxes)
    for b in range(2):
        for q in range(2):
            sparse, dense = model.sam.prompt_encoder(boxes=boxes[b, q][None])
            mask, iou = model.sam.mask_decoder(
                image_embeddings=features[0][b][None],
                image_pe=model.sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse[None],
                dense_prompt_embeddings=dense[None],
                multimask_output=False,
            )
            torch.testing.assert_close(masks[b, q], mask[0, 0, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ious[b, q], iou[0, 0, 0], rtol=1e-4, atol=1e-5)


def test_sam_file_of_another_model_is_a_user_error(sam_file: Path) -> None:
    with pytest.raises(UserError, match="a checkpoint of vit_tiny, not of vit_b"):
        build_model("vit_b", sam_file, image_size=IMAGE_SIZE)
