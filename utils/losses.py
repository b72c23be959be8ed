"""The losses, in float32, over labelled pixels only: one number for each prompt, or for each image without prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor

from utils.bdd100k import IGNORE_LABEL

MAX_CLASS_WEIGHT = 20.0  # a class of a few pixels shall not outweigh all the others

# Squared denominator, as MedSAM trains its mask decoder (Ma et al., 2024).
_dice_loss = DiceLoss(sigmoid=False, squared_pred=True, reduction="none")


def prompt_losses(
    low_res_masks: Tensor, iou_predictions: Tensor, labels: Tensor, class_ids: Tensor
) -> dict[str, Tensor]:
    """Dice and BCE of each prompt's mask against its class, and the squared error of the IoU predicted for it.

    Logits are upsampled to the labels' size first, so that thin classes are learned at the size they are scored at.
    Pixels of value 255 count in none of the three.

    Args:
        low_res_masks: B x Q x h x w logits.
        iou_predictions: B x Q.
        labels: B x S x S uint8.
        class_ids: B x Q int64.

    Returns:
        "dice", "bce" and "iou", each B x Q float32.
    """
    b, q = class_ids.shape
    logits = F.interpolate(low_res_masks.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    target = labels[:, None] == class_ids[:, :, None, None]  # B x Q x S x S
    labelled = (labels != IGNORE_LABEL)[:, None].expand_as(target)

    bce = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none") * labelled
    num_labelled = labelled.flatten(2).sum(-1).clamp(min=1)
    # Masked after the sigmoid: a masked logit would still be a probability of one half.
    dice = _dice_loss((logits.sigmoid() * labelled).flatten(0, 1)[:, None], target.float().flatten(0, 1)[:, None])

    with torch.no_grad():  # the true IoU is what the IoU head should say; the mask is not to be moved by it
        claimed = (logits > 0) & labelled
        intersection = (claimed & target).flatten(2).sum(-1)
        true_iou = intersection / (claimed | target).flatten(2).sum(-1).clamp(min=1)
    return {
        "dice": dice.view(b, q),
        "bce": bce.flatten(2).sum(-1) / num_labelled,
        "iou": (iou_predictions.float() - true_iou).square(),
    }


def class_weights(pixels: Tensor) -> Tensor:
    """Weights for the cross-entropy that keep rare classes from vanishing: the inverse square root of the frequency.

    Args:
        pixels: labelled pixels of each class in the training data.

    Returns:
        float32, with mean 1 over those pixels but for what exceeds MAX_CLASS_WEIGHT; 0 for a class that does not occur.
    """
    frequency = pixels.double() / pixels.sum()
    weights = torch.where(frequency > 0, frequency.clamp(min=1e-9).rsqrt(), 0.0)
    return (weights / (weights * frequency).sum()).clamp(max=MAX_CLASS_WEIGHT).float()


def semantic_losses(
    low_res_masks: Tensor, labels: Tensor, weights: Tensor, *, stride: int = 2
) -> dict[str, Tensor]:
    """Weighted cross-entropy and Dice of a semantic map, the latter a mean over the classes that occur in the image.

    Logits are upsampled to the labels' size, and compared with them at every second pixel of both axes, which is twice
    as fine as the logits and a quarter of the work. Pixels of value 255 count in neither.

    Args:
        low_res_masks: B x C x h x w logits.
        labels: B x S x S uint8.
        weights: of the C classes in the cross-entropy.
        stride: pixels from one that is compared to the next.

    Returns:
        "ce" and "dice", each B float32; 0 for an image without a labelled pixel.
    """
    compared = slice(stride // 2, None, stride)
    labels = labels[..., compared, compared]
    # Bilinear interpolation is a product with one matrix for each axis, of which only the rows compared are needed.
    low, high = low_res_masks.shape[-1], labels.shape[-1]
    weights_1d = F.interpolate(
        torch.eye(low, device=labels.device)[None], high * stride, mode="linear", align_corners=False
    )[0, :, compared]  # h x S/stride
    logits = weights_1d.T @ low_res_masks.float() @ weights_1d
    labelled = labels != IGNORE_LABEL
    target = torch.where(labelled, labels, 0).long()
    log_probabilities = logits.log_softmax(dim=1)
    ce = -log_probabilities.gather(1, target[:, None])[:, 0] * weights[target] * labelled
    num_labelled = labelled.flatten(1).sum(-1).clamp(min=1)

    one_hot = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2) * labelled[:, None]  # B x C x h x w
    probabilities = log_probabilities.exp() * labelled[:, None]
    occurs = one_hot.flatten(2).any(-1)  # B x C
    dice = _dice_loss(probabilities, one_hot.float())[..., 0, 0] * occurs
    return {
        "ce": ce.flatten(1).sum(-1) / num_labelled,
        "dice": dice.sum(-1) / occurs.sum(-1).clamp(min=1),
    }
