"""The prompt losses against a slow oracle from which ignored pixels are physically removed."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss

from utils.model import losses as product
from utils.model.losses import MAX_CLASS_WEIGHT, class_weights, sample_at_stride, semantic_losses

# Unless they say otherwise, these tests have logits at the labels' own size, and every pixel is compared.
prompt_losses = partial(product.prompt_losses, stride=1)


def oracle(logits: np.ndarray, predicted_iou: float, labels: np.ndarray, class_id: int) -> dict[str, float]:
    """One prompt, by the formulas; logits at the labels' own size."""
    kept = labels != 255
    x, t = logits[kept].astype(np.float64), (labels[kept] == class_id).astype(np.float64)
    p = 1 / (1 + np.exp(-x))
    claimed = x > 0
    union = (claimed | (t > 0)).sum()
    return {
        "dice": 1 - (2 * (p * t).sum() + 1e-5) / ((p**2).sum() + (t**2).sum() + 1e-5),
        "bce": float(-(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()),
        "iou": (predicted_iou - (claimed & (t > 0)).sum() / union) ** 2,
    }


def random_case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (2, 12, 12), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    logits = torch.randn(2, 3, 12, 12, generator=generator) * 2
    return logits, torch.rand(2, 3, generator=generator), labels, torch.tensor([[0, 1, 2], [3, 0, 1]])


def test_equals_the_oracle() -> None:
    logits, ious, labels, class_ids = random_case()
    losses = prompt_losses(logits, ious, labels, class_ids)
    for b in range(2):
        for q in range(3):
            expected = oracle(logits[b, q].numpy(), ious[b, q].item(), labels[b].numpy(), int(class_ids[b, q]))
            for key, value in expected.items():
                assert abs(losses[key][b, q].item() - value) < 1e-5, key


def test_worked_by_hand() -> None:
    """Four pixels: certain and right, certain and wrong, undecided on another class, and not labelled."""
    logits = torch.tensor([[[[20.0, 20.0], [0.0, 20.0]]]])
    labels = torch.tensor([[[5, 6], [6, 255]]], dtype=torch.uint8)
    losses = prompt_losses(logits, torch.tensor([[0.75]]), labels, torch.tensor([[5]]))
    # p = 1, 1, 1/2 and t = 1, 0, 0: the overlap is 1, the sums of squares are 2.25 and 1.
    torch.testing.assert_close(losses["dice"], torch.tensor([[1 - 2 / 3.25]]))
    # -log p of the first is 0; -log(1 - p) of the second is 20, of the third log 2.
    torch.testing.assert_close(losses["bce"], torch.tensor([[(20 + math.log(2)) / 3]]))
    # The first two are claimed (a logit of 0 claims nothing), one of them rightly: the true IoU is 1/2.
    torch.testing.assert_close(losses["iou"], torch.tensor([[0.25**2]]))


def test_dice_is_monais_where_everything_is_labelled() -> None:
    logits, ious, labels, class_ids = random_case(4)
    labels[labels == 255] = 4
    target = (labels[:, None] == class_ids[:, :, None, None]).float()
    monai = DiceLoss(sigmoid=True, squared_pred=True, reduction="none")
    expected = monai(logits.flatten(0, 1)[:, None], target.flatten(0, 1)[:, None]).view(2, 3)
    torch.testing.assert_close(prompt_losses(logits, ious, labels, class_ids)["dice"], expected)


def test_what_is_not_labelled_changes_nothing() -> None:
    logits, ious, labels, class_ids = random_case(1)
    before = prompt_losses(logits, ious, labels, class_ids)
    noise = torch.randn_like(logits) * 50
    after = prompt_losses(torch.where((labels == 255)[:, None], noise, logits), ious, labels, class_ids)
    for key in before:
        torch.testing.assert_close(before[key], after[key])


def test_what_is_not_labelled_gets_no_gradient() -> None:
    logits, ious, labels, class_ids = random_case(1)
    logits.requires_grad_()
    torch.stack(list(prompt_losses(logits, ious, labels, class_ids).values())).sum().backward()
    ignored = (labels == 255)[:, None].expand_as(logits)
    assert logits.grad is not None
    assert not logits.grad[ignored].any()
    assert logits.grad[~ignored].all()


def test_the_true_iou_moves_the_iou_head_and_not_the_mask() -> None:
    logits, ious, labels, class_ids = random_case(5)
    loss = prompt_losses(logits.requires_grad_(), ious.requires_grad_(), labels, class_ids)["iou"].sum()
    mask_gradient, iou_gradient = torch.autograd.grad(loss, (logits, ious), allow_unused=True)
    assert mask_gradient is None
    assert iou_gradient.all()


def test_a_class_that_is_on_no_compared_pixel_teaches_nothing() -> None:
    """Its target would be an empty mask, and there is something in the box."""
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[0, 2, 4] = 5  # rows and columns 1, 3, 5 and 7 are compared
    logits, class_ids = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 5]])
    for loss in product.prompt_losses(logits, torch.full((1, 2), 0.5), labels, class_ids).values():
        assert loss[0, 0] > 0 and loss[0, 1] == 0


def test_extreme_logits_and_prompts_that_pad_a_batch_stay_finite() -> None:
    """A padding prompt's class id is 255. The loop multiplies its losses by 0, which would not mend a nan."""
    logits, ious, labels, class_ids = random_case(6)
    extreme = (1e4 * logits.sign()).requires_grad_()
    for ids in (class_ids, torch.full_like(class_ids, 255)):
        losses = torch.stack(list(prompt_losses(extreme, ious, labels, ids).values()))
        (gradient,) = torch.autograd.grad(losses.sum(), extreme)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()


def test_logits_are_upsampled_to_the_labels() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[:, :, 4:] = 1
    logits = torch.full((1, 1, 2, 2), -20.0)
    logits[..., 1] = 20.0
    losses = prompt_losses(logits, torch.ones(1, 1), labels, torch.tensor([[1]]))
    # Columns 0-1 and 6-7 are certain and right; in between the logit rises through 0 between columns 3 and 4.
    columns = torch.tensor([-20.0, -20, -15, -5, 5, 15, 20, 20])
    expected = torch.nn.functional.softplus(-columns.abs()).mean()
    torch.testing.assert_close(losses["bce"], expected.view(1, 1))
    assert losses["iou"].item() == 0


def test_an_image_without_labels_gives_finite_values_and_gradients() -> None:
    logits, ious, labels, class_ids = random_case(2)
    logits.requires_grad_()
    losses = prompt_losses(logits, ious, torch.full_like(labels, 255), class_ids)
    torch.stack(list(losses.values())).sum().backward()
    assert all(value.isfinite().all() for value in losses.values())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_float32_whatever_the_model_computes_in() -> None:
    logits, ious, labels, class_ids = random_case(3)
    losses = prompt_losses(logits.half(), ious.half(), labels, class_ids)
    assert {value.dtype for value in losses.values()} == {torch.float32}


@pytest.mark.parametrize("size", [(20, 20), (12, 32), (28, 8)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_what_is_compared_is_the_upsampled_mask_at_every_nth_pixel(stride: int, size: tuple[int, int]) -> None:
    low_res = torch.randn(2, 3, size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(2 * size[0] * size[1]).view(2, *size)
    logits, at = sample_at_stride(low_res, labels, stride)
    full = F.interpolate(low_res, size, mode="bilinear", align_corners=False)
    first = stride // 2
    torch.testing.assert_close(logits, full[..., first::stride, first::stride])
    assert torch.equal(at, labels[:, first::stride, first::stride])


def test_prompts_are_compared_at_every_second_pixel() -> None:
    generator = torch.Generator().manual_seed(8)
    low_res, ious = torch.randn(2, 3, 4, 4, generator=generator), torch.rand(2, 3, generator=generator)
    labels = torch.randint(0, 4, (2, 16, 16), generator=generator, dtype=torch.uint8)
    class_ids = torch.tensor([[0, 1, 2], [3, 0, 1]])
    logits, at = sample_at_stride(low_res, labels, 2)
    for b in range(2):
        for q in range(3):
            expected = oracle(logits[b, q].numpy(), ious[b, q].item(), at[b].numpy(), int(class_ids[b, q]))
            losses = product.prompt_losses(low_res, ious, labels, class_ids)
            assert {key: losses[key][b, q].item() for key in expected} == pytest.approx(expected, abs=1e-5)


def test_competing_cross_entropy_by_hand() -> None:
    """Columns: both boxes hold the first and the second, only the first box the third, no box the fourth."""
    labels = torch.tensor([[[3, 7, 3, 7]]], dtype=torch.uint8).expand(1, 4, 4)
    logits = torch.tensor([[[1.0, 2.0, -5.0, 0.0], [0.5, 4.0, 9.0, 9.0]]])[:, :, None].expand(1, 2, 4, 4)
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 1.0, 3.0]]])
    weights = torch.ones(19)
    weights[3], weights[7] = 2, 5
    ce = prompt_losses(logits, torch.ones(1, 2), labels, torch.tensor([[3, 7]]), boxes, weights)["ce"]
    # Class 3: ln(e^1 + e^0.5) - 1 where the other competes, and 0 where it is alone. Class 7: one column of its box.
    first, second = math.log(math.e + math.exp(0.5)) - 1, math.log(math.exp(2) + math.exp(4)) - 4
    mean = (2 * first + 5 * second) / 3  # over three columns
    torch.testing.assert_close(ce, torch.full((1, 2), product.COMPETING_WEIGHT * mean))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_competing_cross_entropy_equals_a_slow_oracle(stride: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 5, (3, height, width), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    low_res = torch.randn(3, 4, height // 4, width // 4, generator=generator) * 3
    class_ids = torch.tensor([[0, 1, 2, 3], [4, 2, 255, 255], [3, 255, 255, 255]])
    shares = [torch.randint(*ends, (3, 4, 2), generator=generator) for ends in ((0, 12), (12, 24))]
    boxes = (torch.cat(shares, dim=2) * torch.tensor([width, height] * 2) // 24).float()
    boxes[class_ids == 255] = 0  # as a batch is padded
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    losses = product.prompt_losses(low_res, torch.ones(3, 4), labels, class_ids, boxes, weights, stride=stride)
    logits = F.interpolate(low_res.double(), (height, width), mode="bilinear", align_corners=False)
    for b in range(3):
        of_pixels = []
        for y in range(stride // 2, height, stride):
            for x in range(stride // 2, width, stride):
                held = [
                    q
                    for q, (x0, y0, x1, y1) in enumerate(boxes[b].tolist())
                    if class_ids[b, q] != 255 and x0 <= x <= x1 and y0 <= y <= y1
                ]
                for q in held:
                    if class_ids[b, q] == labels[b, y, x]:
                        total = sum(math.exp(logits[b, other, y, x]) for other in held)
                        weight = float(weights[class_ids[b, q]])
                        of_pixels.append(weight * (math.log(total) - logits[b, q, y, x].item()))
        occurs = [(labels[b, stride // 2 :: stride, stride // 2 :: stride] == k).any() for k in class_ids[b]]
        mean = product.COMPETING_WEIGHT * float(np.mean(of_pixels)) if of_pixels else 0.0
        expected = [mean if k != 255 and here else 0.0 for k, here in zip(class_ids[b].tolist(), occurs)]
        assert losses["ce"][b].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (losses["ce"] > 0).sum() >= 3


def test_a_single_prompt_has_nothing_to_compete_with() -> None:
    logits, ious, labels, class_ids = random_case(9)
    boxes = torch.tensor([[[0.0, 0, 11, 11]]] * 2)
    losses = prompt_losses(logits[:, :1], ious[:, :1], labels, class_ids[:, :1], boxes, torch.ones(19))
    assert losses["ce"].tolist() == [[0.0], [0.0]]


def test_masks_that_compete_outside_every_box_stay_finite() -> None:
    logits, ious, labels, class_ids = random_case(10)
    extreme = (1e4 * logits.sign()).requires_grad_()
    boxes = torch.tensor([[[0.0, 0, 2, 2], [1, 1, 3, 3], [2, 2, 2, 2]]] * 2)
    losses = torch.stack(list(prompt_losses(extreme, ious, labels, class_ids, boxes, torch.ones(19)).values()))
    (gradient,) = torch.autograd.grad(losses.sum(), extreme)
    assert losses.isfinite().all() and gradient.isfinite().all()


def test_class_weights_by_hand() -> None:
    weights = class_weights(torch.tensor([900, 100, 0]), 0.5)
    # 1 / sqrt(0.9) and 1 / sqrt(0.1), over their mean over the pixels, sqrt(0.9) + sqrt(0.1).
    mean = math.sqrt(0.9) + math.sqrt(0.1)
    torch.testing.assert_close(weights, torch.tensor([0.9**-0.5 / mean, 0.1**-0.5 / mean, 0.0]))


def test_the_power_says_how_much_rare_classes_weigh() -> None:
    pixels = torch.tensor([800, 200])
    assert class_weights(pixels, 0).tolist() == [1, 1]
    torch.testing.assert_close(class_weights(pixels, 1), torch.tensor([0.625, 2.5]))  # half of the sum each


def test_a_class_of_a_few_pixels_does_not_outweigh_the_rest() -> None:
    weights = class_weights(torch.tensor([100_000_000, 100_000_000, 20]), 0.5)
    assert weights[2] == MAX_CLASS_WEIGHT
    torch.testing.assert_close(weights[:2], torch.ones(2), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (16, 40)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_semantic_losses_equal_a_slow_oracle(stride: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (3, height, width), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    labels[2] = 255  # an image that has nothing to teach
    low_res = torch.randn(3, 5, height // 4, width // 4, generator=generator) * 2  # class 4 occurs nowhere
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    losses = semantic_losses(low_res, labels, weights, stride=stride)
    logits = F.interpolate(low_res.double(), (height, width), mode="bilinear", align_corners=False)
    for b in range(2):
        ce, overlap, square_p, square_t = [], np.zeros(5), np.zeros(5), np.zeros(5)
        for y in range(stride // 2, height, stride):
            for x in range(stride // 2, width, stride):
                target = int(labels[b, y, x])
                if target == 255:
                    continue
                p = torch.softmax(logits[b, :, y, x], dim=0).numpy()
                ce.append(float(weights[target]) * -math.log(p[target]))
                truth = np.eye(5)[target]
                overlap, square_p, square_t = overlap + p * truth, square_p + p**2, square_t + truth
        dice = (1 - (2 * overlap + 1e-5) / (square_p + square_t + 1e-5))[square_t > 0]
        assert losses["ce"][b].item() == pytest.approx(np.mean(ce), rel=1e-5)
        assert losses["dice"][b].item() == pytest.approx(dice.mean(), rel=1e-5)
    assert losses["ce"][2].item() == losses["dice"][2].item() == 0
    assert all(loss.dtype == torch.float32 for loss in losses.values())
