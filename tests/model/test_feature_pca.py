"""Encoder blocks' outputs in few bytes: how many, how exactly, and that the decoder does not see the difference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segment_anything.modeling.common import LayerNorm2d
from utils.model.feature_pca import KEPT, FeaturePCA


def drawn(seed: int, *, rank: int = 20, images: int = 3, blocks: int = 2, channels: int = 64) -> tuple[Tensor, ...]:
    """Embeddings, and blocks that share `rank` directions, as the same for every seed, on top of some noise."""
    mixing = torch.randn(blocks, channels, rank, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    common = torch.randn(images, rank, 6, 6, generator=generator)
    noise = 0.01 * torch.randn(blocks, images, channels, 6, 6, generator=generator)
    outputs = torch.einsum("nck,bkhw->nbchw", mixing, common) + noise
    return torch.randn(images, 8, 6, 6, generator=generator), *outputs


def normalised(block: Tensor) -> Tensor:
    return F.layer_norm(block.transpose(1, 3), block.shape[1:2]).transpose(1, 3)


def test_vit_b_at_1024_takes_less_than_4_mib_an_image() -> None:
    features = [torch.zeros(1, 256, 64, 64), *(torch.zeros(1, 768, 64, 64) for _ in range(4))]
    embeddings, *reduced = FeaturePCA.blank(features).reduce(features)
    size = embeddings.half().nbytes + sum(part.nbytes for part in reduced)
    assert 3.5 * 2**20 < size < 4 * 2**20


def test_what_is_restored_is_the_normalised_output_of_the_blocks() -> None:
    reduction = FeaturePCA.fit([drawn(0), drawn(1)])
    features = drawn(7)
    restored = reduction.expand(reduction.reduce(features))
    assert torch.equal(restored[0], features[0])
    assert [block.shape for block in restored[1:]] == [block.shape for block in features[1:]]
    for got, block in zip(restored[1:], features[1:]):
        expected = normalised(block)
        assert (got - expected).square().mean() < 1e-2 * expected.square().mean()
        norm = LayerNorm2d(block.shape[1])  # as the decoder has it; to it, both are the same
        assert (norm(got) - norm(block)).square().mean() < 1e-2 * norm(block).square().mean()


def test_each_image_has_its_own_ranges() -> None:
    reduction = FeaturePCA.fit([drawn(0)])
    features = drawn(5)
    alone = reduction.expand(reduction.reduce([feature[1:2] for feature in features]))
    together = reduction.expand(reduction.reduce(features))
    for one, many in zip(alone, together):
        torch.testing.assert_close(one[0], many[1])


def test_codes_are_exact_to_half_a_step() -> None:
    features = drawn(0, blocks=1)
    identity = FeaturePCA(torch.zeros(64), torch.eye(64), 1)
    _, codes, ranges = identity.reduce(features)
    assert codes.dtype == torch.uint8
    difference = (identity.expand((features[0], codes, ranges))[1] - normalised(features[1])).abs()
    assert (difference.flatten(2) <= ranges[:, 1, :, None] * 0.501).all()
    assert codes.amax() == 255 and codes.amin() == 0


def test_a_constant_component_and_a_value_that_is_none() -> None:
    features = [torch.zeros(1, 8, 2, 2), torch.zeros(1, 64, 2, 2)]
    identity = FeaturePCA(torch.zeros(64), torch.eye(64), 1)
    assert torch.equal(identity.expand(identity.reduce(features))[1], torch.zeros(1, 64, 2, 2))
    features[1][0, 3, 1, 1] = torch.nan
    assert not identity.reduce(features)[2].isfinite().all()  # which is how a cache notices


def test_fitting_is_a_function_of_the_samples() -> None:
    first, second = (FeaturePCA.fit([drawn(0), drawn(1)]) for _ in range(2))
    assert torch.equal(first.basis, second.basis) and torch.equal(first.mean, second.mean)
    assert len(first.basis) == int(128 * KEPT)
    torch.testing.assert_close(first.basis @ first.basis.T, torch.eye(len(first.basis)), atol=1e-5, rtol=0)
    cut = FeaturePCA.fit([[f[:1] for f in drawn(0)], [f[1:] for f in drawn(0)]])  # however they are batched
    torch.testing.assert_close(cut.basis[:5], FeaturePCA.fit([drawn(0)]).basis[:5], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_it_works_under_autocast(device: str) -> None:
    reduction = FeaturePCA.fit([drawn(0)]).to(device)
    features = [feature.to(device) for feature in drawn(3)]
    exact = reduction.expand(reduction.reduce(features))
    with torch.autocast(device, dtype=torch.bfloat16):
        got = reduction.expand(reduction.reduce(features))
    for one, other in zip(got[1:], exact[1:]):
        assert one.dtype == torch.float32
        assert (one - other).square().mean() < 1e-3 * other.square().mean()
