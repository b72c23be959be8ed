"""The losses, in float32, over labelled pixels only: one number for each prompt, or for each image without prompts."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segment_anything.modeling.common import interpolate_axis
from utils.data.classes import IGNORE_LABEL

COMPETING_WEIGHT = 4.0  # of the cross-entropy beside the losses of each mask by itself
MAX_CLASS_WEIGHT = 20.0  # a class of a few pixels shall not outweigh all the others


@functools.cache
def _dice_loss() -> Any:
    """With a squared denominator, as MedSAM trains its mask decoder (Ma et al., 2024)."""
    from monai.losses import DiceLoss  # here, as it takes seconds to import and inference needs none of it

    return DiceLoss(sigmoid=False, squared_pred=True, reduction="none")


def compared(low_res_masks: Tensor, labels: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Logits upsampled to the size of the labels, and the labels, where a loss compares them.

    That is at every `stride`-th pixel of both axes: with 2, a quarter of all pixels. Only these are interpolated.

    Args:
        low_res_masks: B x K x h x w; H / h = W / w is a whole number, which `stride` divides.
        labels: B x H x W.

    Returns:
        B x K x H/stride x W/stride float32, as `F.interpolate` has them (bilinear, not aligned to corners), and
        B x H/stride x W/stride.

    Raises:
        ValueError: `stride` does not divide the pixels of a logit.
    """
    scale = labels.shape[-1] // low_res_masks.shape[-1]  # pixels of a logit
    if scale % stride:
        raise ValueError(f"stride must divide the {scale} pixels of a logit, got {stride}")
    first = stride // 2
    # Where the compared pixels of each logit lie on an axis, in logits from the logit's centre.
    offsets = [(pixel + 0.5) / scale - 0.5 for pixel in range(first, scale, stride)]
    logits = low_res_masks.float()
    for dim in (2, 3):
        logits = interpolate_axis(logits, dim, offsets)
    return logits, labels[:, first::stride, first::stride]


def prompt_losses(
    low_res_masks: Tensor,
    iou_predictions: Tensor,
    labels: Tensor,
    class_ids: Tensor,
    boxes: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    stride: int = 2,
) -> dict[str, Tensor]:
    """Dice and BCE of each prompt's mask against its class, the squared error of the IoU predicted for it, and how the
    mask competes with the others of its image.

    Compared at the pixels that `compared` takes. Pixels of value 255 count in none of them.

    Args:
        low_res_masks: B x Q x h x w logits.
        iou_predictions: B x Q.
        labels: B x H x W uint8.
        class_ids: B x Q int64, 255 for a prompt that only pads the batch.
        boxes: B x Q x 4, xyxy in pixels of the frame, inclusive corners; None for masks that do not compete.
        weights: of the C classes in that competition.
        stride: see `compared`.

    Returns:
        "dice", "bce", "iou" and, with boxes, "ce" (`competing_cross_entropy`), each B x Q float32. All are 0 where the
        class is on no compared pixel: it is in its box all the same, and an empty mask would be a wrong target.
    """
    b, q = class_ids.shape
    logits, labels = compared(low_res_masks, labels, stride)
    labelled = (labels != IGNORE_LABEL)[:, None].expand(b, q, -1, -1)
    target = (labels[:, None] == class_ids[:, :, None, None]) & labelled  # B x Q x H/stride x W/stride

    bce = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none") * labelled
    num_labelled = labelled.flatten(2).sum(-1).clamp(min=1)
    # Masked after the sigmoid: a masked logit would still be a probability of one half.
    dice = _dice_loss()((logits.sigmoid() * labelled).flatten(0, 1)[:, None], target.float().flatten(0, 1)[:, None])

    with torch.no_grad():  # the true IoU is what the IoU head should say; the mask is not to be moved by it
        claimed = (logits > 0) & labelled
        intersection = (claimed & target).flatten(2).sum(-1)
        true_iou = intersection / (claimed | target).flatten(2).sum(-1).clamp(min=1)
    losses = {
        "dice": dice.view(b, q),
        "bce": bce.flatten(2).sum(-1) / num_labelled,
        "iou": (iou_predictions.float() - true_iou).square(),
    }
    if boxes is not None and weights is not None:
        inside = _inside(boxes, labels.shape[1] * stride, labels.shape[2] * stride, stride)
        inside &= (class_ids != IGNORE_LABEL)[:, :, None, None]
        padded_weights = F.pad(weights, (0, IGNORE_LABEL + 1 - len(weights)))  # a prompt that pads a batch has none
        losses["ce"] = competing_cross_entropy(logits, target, inside, padded_weights[class_ids])
    occurs = target.flatten(2).any(-1)
    return {name: loss * occurs for name, loss in losses.items()}


def competing_cross_entropy(logits: Tensor, target: Tensor, inside: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy between the prompts of an image, as they compete for a map: those whose box holds a pixel.

    It is a mean over the image's pixels whose class has a prompt, the box of which holds them.

    Args:
        logits: B x Q x h x w float32.
        target: B x Q x h x w bool, the pixels of each prompt's class; no two prompts of an image share one.
        inside: B x Q x h x w bool, the pixels that each prompt's box holds.
        weights: B x Q, of each prompt's class.

    Returns:
        B x Q float32, times COMPETING_WEIGHT: the same for all prompts of an image.
    """
    lowest = torch.finfo(logits.dtype).min  # not -inf, which has no gradient where no box holds a pixel
    total = torch.where(inside, logits, lowest).logsumexp(dim=1, keepdim=True)
    own = target & inside
    ce = (torch.where(own, total - logits, 0).flatten(2).sum(-1) * weights).sum(1) / own.flatten(1).sum(-1).clamp(min=1)
    return COMPETING_WEIGHT * ce[:, None].expand_as(weights)


def _inside(boxes: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The compared pixels that each box holds: B x Q x 4 -> B x Q x H/stride x W/stride bool."""
    first_x, first_y, last_x, last_y = boxes[..., None].unbind(2)  # B x Q x 1 each
    x, y = (torch.arange(stride // 2, side, stride, device=boxes.device) for side in (width, height))
    x, y = (x >= first_x) & (x <= last_x), (y >= first_y) & (y <= last_y)  # B x Q x W/stride, B x Q x H/stride
    return y[..., :, None] & x[..., None, :]


def class_weights(pixels: Tensor, power: float) -> Tensor:
    """Weights for a cross-entropy that keep rare classes from vanishing: the frequency to the power of -`power`.

    Args:
        pixels: labelled pixels of each class in the training data.
        power: 0 for equal weights, 1 for classes that weigh the same in sum.

    Returns:
        float32, with mean 1 over those pixels but for what exceeds MAX_CLASS_WEIGHT; 0 for a class that does not occur.
    """
    frequency = pixels.double() / pixels.sum()
    weights = torch.where(frequency > 0, frequency.clamp(min=1e-9) ** -power, 0.0)
    return (weights / (weights * frequency).sum()).clamp(max=MAX_CLASS_WEIGHT).float()


def semantic_losses(low_res_masks: Tensor, labels: Tensor, weights: Tensor, *, stride: int = 2) -> dict[str, Tensor]:
    """Weighted cross-entropy and Dice of a semantic map, the latter a mean over the classes that occur in the image.

    Compared at the pixels that `compared` takes. Pixels of value 255 count in neither.

    Args:
        low_res_masks: B x C x h x w logits.
        labels: B x H x W uint8.
        weights: of the C classes in the cross-entropy.
        stride: see `compared`.

    Returns:
        "ce" and "dice", each B float32; 0 for an image without a labelled pixel.
    """
    logits, labels = compared(low_res_masks, labels, stride)
    labelled = labels != IGNORE_LABEL
    target = torch.where(labelled, labels, 0).long()
    log_probabilities = logits.log_softmax(dim=1)
    ce = -log_probabilities.gather(1, target[:, None])[:, 0] * weights[target] * labelled
    num_labelled = labelled.flatten(1).sum(-1).clamp(min=1)

    one_hot = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2) * labelled[:, None]  # B x C x h x w
    probabilities = log_probabilities.exp() * labelled[:, None]
    occurs = one_hot.flatten(2).any(-1)  # B x C
    dice = _dice_loss()(probabilities, one_hot.float())[..., 0, 0] * occurs
    return {
        "ce": ce.flatten(1).sum(-1) / num_labelled,
        "dice": dice.sum(-1) / occurs.sum(-1).clamp(min=1),
    }
