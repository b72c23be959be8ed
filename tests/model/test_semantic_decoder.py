"""The semantic decoder: what it takes over from SAM, what it gives, and that all of it is trained."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_anything import build_sam_vit_tiny
from segment_anything.modeling.common import MLP
from tests.helpers.inputs import IMAGE_SIZE
from utils.data.classes import BDD100K
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
    assert masks.shape == (2, len(BDD100K), IMAGE_SIZE // 2, IMAGE_SIZE // 2)
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
        for c in range(len(BDD100K)):
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


def channels_first(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The norm by its formula, over the channels of B x C x H x W."""
    centred = x - x.mean(dim=1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=1, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def joined(x: Tensor, join: Any) -> Tensor:
    """A norm and a convolution of one pixel."""
    norm, linear = join
    return F.conv2d(channels_first(x, norm), linear.weight[:, :, None, None], linear.bias)


@torch.no_grad()
def test_the_detail_path_by_plain_convolutions(model: SemanticSegmenter) -> None:
    """Against its formula with channels first: transposed convolutions, and logits by an einsum."""
    torch.manual_seed(0)
    decoder: Any = model.mask_decoder
    path = decoder.detail_path
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    *encoded, pixels = model.inputs(images)

    normed = [norm(feature) for norm, feature in zip(decoder.feature_norms, encoded[1:])]
    stem = decoder.stem(torch.cat([encoded[0], *normed], dim=1))
    x = encoded[0] + decoder.no_mask_embedding + stem
    tokens, image_tokens = decoder.transformer(x, model.image_pe, decoder.mask_tokens.expand(2, -1, -1))
    starts = (image_tokens.transpose(1, 2).reshape(x.shape), stem)
    up_8, up_4 = [], []
    for upscaling, start in zip((decoder.output_upscaling, decoder.detail_upscaling), starts):
        first, norm, activation, second, last = upscaling
        at_8 = activation(channels_first(F.conv_transpose2d(start, first.weight, first.bias, stride=2), norm))
        up_8.append(at_8)
        up_4.append(last(F.conv_transpose2d(at_8, second.weight, second.bias, stride=2)))

    pixels_2 = path.pixels_2(pixels)
    pixels_4 = path.pixels_4[2](F.gelu(channels_first(pixels_2, path.pixels_4[0])))
    pixels_8 = path.pixels_8[2](F.gelu(channels_first(pixels_4, path.pixels_8[0])))
    at_8 = path.blocks_8(joined(torch.cat([*up_8, pixels_8], dim=1), path.join_8))
    at_4 = torch.cat(up_4, dim=1) + F.conv_transpose2d(at_8, path.upscaling_8.weight, path.upscaling_8.bias, stride=2)
    at_4 = at_4 + joined(torch.cat([at_4, pixels_4], dim=1), path.join_4)
    at_4 = path.block_4(at_4)
    at_2 = F.conv_transpose2d(at_4, path.upscaling_4.weight, path.upscaling_4.bias, stride=2)
    norm, conv, activation = path.join_2
    at_2 = activation(conv(channels_first(torch.cat([at_2, pixels_2], dim=1), norm)))

    of_4, of_2 = decoder.output_hypernetworks(tokens).split([at_4.shape[1], at_2.shape[1]], dim=2)
    coarse, fine = (torch.einsum("bmc,bchw->bmhw", w, maps) for w, maps in ((of_4, at_4), (of_2, at_2)))
    coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    (masks,) = model((*encoded, pixels))
    assert min(part.std() for part in (coarse, fine)) > 1e-3  # neither is lost beside the other
    assert (masks - (coarse + fine)).norm() < 1e-5 * masks.norm()


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
    assert masks.shape == (1, len(BDD100K), IMAGE_SIZE // 4, IMAGE_SIZE // 4) and masks.equal(before(features)[0])


def earlier_decoder() -> tuple[SemanticSegmenter, Tensor]:
    """With weights and an image that are a function of their names alone."""
    model = SemanticSegmenter(build_sam_vit_tiny(image_size=IMAGE_SIZE), pixel_channels=0)

    def wave(x: Tensor, name: str) -> Tensor:
        return (torch.arange(x.numel()) * 0.7 + zlib.crc32(name.encode()) % 100).sin().view(x.shape)

    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if "pixel_" not in name:  # SAM's normalisation
            value.copy_(0.05 * wave(value, name))
    return model, (wave(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE), "image") + 1) / 2


@torch.no_grad()
def test_an_earlier_decoder_gives_what_it_gave() -> None:
    """Figures of the version that had no detail path."""
    model, image = earlier_decoder()
    state = model.mask_decoder.state_dict()
    lines = "\n".join(f"{name} {tuple(value.shape)}" for name, value in sorted(state.items()))
    (masks,) = model(model.encode(image))
    assert zlib.crc32(lines.encode()) == 3955676722
    assert masks.double().mean().item() == pytest.approx(5.96230e-4, rel=1e-4)
    assert masks.double().std().item() == pytest.approx(9.22484e-3, rel=1e-4)
