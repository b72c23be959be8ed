"""The losses, in float32 over labelled pixels only: one value for each prompt, or for each image without prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segment_anything.modeling.common import interpolate_axis
from utils.data.classes import IGNORE_LABEL

COMPETING_WEIGHT = 4.0  # of the cross-entropy, beside the losses of single masks
MAX_CLASS_WEIGHT = 20.0  # so that a class of a few pixels does not outweigh all others


def dice_loss(probabilities: Tensor, target: Tensor) -> Tensor:
    """Dice with a squared denominator (Milletari et al., 2016, arXiv 1606.04797), as in MedSAM (Ma et al., 2024).

    Args:
        probabilities: ... x h x w.
        target: ... x h x w, 0 or 1.

    Returns:
        The loss of each map. It is MONAI's `DiceLoss(squared_pred=True)`, in a form that `torch.compile` takes whole.
    """
    smooth = 1e-5
    overlap = (probabilities * target).flatten(-2).sum(-1)
    total = (probabilities.square() + target).flatten(-2).sum(-1)  # the square of 0 or 1 is itself
    return 1 - (2 * overlap + smooth) / (total + smooth)


def sample_at_stride(low_res_masks: Tensor, labels: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Sample logits, upsampled to the size of the labels, and labels at every `stride`-th pixel of both axes.

    Only these pixels are interpolated: with a stride of 2, a quarter of all.

    Args:
        low_res_masks: B x K x h x w; H / h = W / w is a whole number, which `stride` divides.
        labels: B x H x W.

    Returns:
        The logits, B x K x H/stride x W/stride float32, equal to those of `F.interpolate` (bilinear, not aligned to
        corners), and the labels, B x H/stride x W/stride.

    Raises:
        ValueError: `stride` does not divide the pixels of a logit.
    """
    scale = labels.shape[-1] // low_res_masks.shape[-1]  # pixels of a logit
    if scale % stride:
        raise ValueError(f"stride must divide the {scale} pixels of a logit, got {stride}")
    first = stride // 2
    # Where the sampled pixels of each logit lie on an axis, in logits from the logit's centre.
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
    """The losses of box mode: Dice, BCE, the error of the predicted IoU, and the competition between masks.

    They are computed at the pixels of `sample_at_stride`, without those of value 255.

    Args:
        low_res_masks: B x Q x h x w logits.
        iou_predictions: B x Q.
        labels: B x H x W uint8.
        class_ids: B x Q int64, 255 for padding.
        boxes: B x Q x 4, xyxy in pixels of the frame, inclusive corners; None to leave out "ce".
        weights: of the C classes in "ce".
        stride: see `sample_at_stride`.

    Returns:
        "dice", "bce", "iou" and, with boxes, "ce" (`competing_cross_entropy`), each B x Q float32. All are 0 if no
        sampled pixel has the class: an empty mask would be a wrong target.
    """
    b, q = class_ids.shape
    logits, labels = sample_at_stride(low_res_masks, labels, stride)
    labelled = (labels != IGNORE_LABEL)[:, None].expand(b, q, -1, -1)
    target = (labels[:, None] == class_ids[:, :, None, None]) & labelled  # B x Q x H/stride x W/stride

    bce = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none") * labelled
    num_labelled = labelled.flatten(2).sum(-1).clamp(min=1)
    # Masked after the sigmoid: a logit of 0 would be a probability of one half.
    dice = dice_loss(logits.sigmoid() * labelled, target.float())

    with torch.no_grad():  # the true IoU is the target of the IoU head alone
        predicted = (logits > 0) & labelled
        intersection = (predicted & target).flatten(2).sum(-1)
        true_iou = intersection / (predicted | target).flatten(2).sum(-1).clamp(min=1)
    losses = {
        "dice": dice,
        "bce": bce.flatten(2).sum(-1) / num_labelled,
        "iou": (iou_predictions.float() - true_iou).square(),
    }
    if boxes is not None and weights is not None:
        inside = _inside(boxes, labels.shape[1] * stride, labels.shape[2] * stride, stride)
        inside &= (class_ids != IGNORE_LABEL)[:, :, None, None]
        padded_weights = F.pad(weights, (0, IGNORE_LABEL + 1 - len(weights)))  # padding weighs 0
        losses["ce"] = competing_cross_entropy(logits, target, inside, padded_weights[class_ids])
    occurs = target.flatten(2).any(-1)
    return {name: loss * occurs for name, loss in losses.items()}


def competing_cross_entropy(logits: Tensor, target: Tensor, inside: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy between the prompts of an image; at each pixel, those whose box holds it compete.

    It is the mean over the pixels that lie in the box of their own class.

    Args:
        logits: B x Q x h x w float32.
        target: B x Q x h x w bool, the pixels of each prompt's class; no two prompts of an image share one.
        inside: B x Q x h x w bool, the pixels that each prompt's box holds.
        weights: B x Q, of each prompt's class.

    Returns:
        B x Q float32, times COMPETING_WEIGHT; the same for all prompts of an image.
    """
    lowest = torch.finfo(logits.dtype).min  # with -inf, a pixel in no box would have no gradient
    total = torch.where(inside, logits, lowest).logsumexp(dim=1, keepdim=True)
    own = target & inside
    ce = (torch.where(own, total - logits, 0).flatten(2).sum(-1) * weights).sum(1) / own.flatten(1).sum(-1).clamp(min=1)
    return COMPETING_WEIGHT * ce[:, None].expand_as(weights)


def _inside(boxes: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The sampled pixels that each box holds: B x Q x 4 -> B x Q x H/stride x W/stride bool."""
    first_x, first_y, last_x, last_y = boxes[..., None].unbind(2)  # B x Q x 1 each
    x, y = (torch.arange(stride // 2, side, stride, device=boxes.device) for side in (width, height))
    x, y = (x >= first_x) & (x <= last_x), (y >= first_y) & (y <= last_y)  # B x Q x W/stride, B x Q x H/stride
    return y[..., :, None] & x[..., None, :]


def class_weights(pixels: Tensor, power: float) -> Tensor:
    """Class weights of the cross-entropy: the frequency to the power of -`power`.

    Args:
        pixels: labelled pixels of each class in the training data.
        power: 0 for equal weights; with 1, all classes have the same total weight.

    Returns:
        float32, clipped at MAX_CLASS_WEIGHT; the mean over all pixels is 1 before that. 0 for a class without pixels.
    """
    frequency = pixels.double() / pixels.sum()
    weights = torch.where(frequency > 0, frequency.clamp(min=1e-9) ** -power, 0.0)
    return (weights / (weights * frequency).sum()).clamp(max=MAX_CLASS_WEIGHT).float()


def semantic_losses(low_res_masks: Tensor, labels: Tensor, weights: Tensor, *, stride: int = 2) -> dict[str, Tensor]:
    """The losses of semantic mode: weighted cross-entropy, and Dice as a mean over the classes in the image.

    They are computed at the pixels of `sample_at_stride`, without those of value 255.

    Args:
        low_res_masks: B x C x h x w logits.
        labels: B x H x W uint8.
        weights: of the C classes in the cross-entropy.
        stride: see `sample_at_stride`.

    Returns:
        "ce" and "dice", each B float32; 0 for an image without a labelled pixel.
    """
    logits, labels = sample_at_stride(low_res_masks, labels, stride)
    labelled = labels != IGNORE_LABEL
    target = torch.where(labelled, labels, 0).long()
    log_probabilities = logits.log_softmax(dim=1)
    ce = -log_probabilities.gather(1, target[:, None])[:, 0] * weights[target] * labelled
    num_labelled = labelled.flatten(1).sum(-1).clamp(min=1)

    one_hot = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2) * labelled[:, None]  # B x C x h x w
    probabilities = log_probabilities.exp() * labelled[:, None]
    occurs = one_hot.flatten(2).any(-1)  # B x C
    dice = dice_loss(probabilities, one_hot.float()) * occurs
    return {"ce": ce.flatten(1).sum(-1) / num_labelled, "dice": dice.sum(-1) / occurs.sum(-1).clamp(min=1)}
