"""The segmentation objective: soft Dice + cross-entropy, as in nnU-Net (Isensee et al. 2021, nnU-Net)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Gather = Callable[[torch.Tensor], torch.Tensor]

TERMS = ("dice", "cross_entropy")
SMOOTH = 1e-5  # nnU-Net's


def segmentation_objective(
    outputs: dict[str, torch.Tensor], gather: Gather, batch_dice: bool = False
) -> dict[str, torch.Tensor]:
    """Soft Dice and cross-entropy of softmax probabilities `p` against one-hot labels `y`, in float32.

    `dice = 1 - mean over crops and classes but the background of (2 sum p y + s) / (sum p + sum y + s)`, sums over the
    voxels of a crop, s = 1e-5 (Milletari et al. 2016, with the denominator of Drozdzal et al. 2016, as nnU-Net's
    default); `cross_entropy`, the mean over all voxels of `-log p` of the true class. nnU-Net minimises their sum.

    Args:
        outputs: `logits` `[B, K, X, Y, Z]`, `labels` `[B, X, Y, Z]` integer, 0 the background.
        gather: `[...]` of this rank -> `[ranks, ...]`, with gradients.
        batch_dice: sum over the voxels of all crops of all ranks, as if they were one.

    Returns:
        `dice` and `cross_entropy`. Of this rank's crops, taken as one, also `dice_1`, `dice_2`, ..., the soft Dice of a
        class (1 = perfect); `predicted_foreground`, the share of voxels that are not taken for background; and
        `foreground`, the true share.
    """
    labels, logits = outputs["labels"].long(), outputs["logits"].float()
    log_probability = logits.log_softmax(dim=1)
    overlap, size = class_sums(log_probability.exp(), labels)
    of_batch = overlap.detach().sum(dim=0), size.detach().sum(dim=0)
    if batch_dice:
        overlap, size = (gather(sums.sum(dim=0)).sum(dim=0, keepdim=True) for sums in (overlap, size))
    losses = {
        "dice": 1 - soft_dice(overlap, size)[:, 1:].mean(),
        "cross_entropy": F.nll_loss(log_probability, labels),
    }
    scores = soft_dice(*of_batch)
    losses |= {f"dice_{number}": scores[number] for number in range(1, len(scores))}
    predicted = logits.detach()[:, 1:].amax(dim=1) > logits.detach()[:, 0]
    return losses | {"predicted_foreground": predicted.float().mean(), "foreground": (labels > 0).float().mean()}


def soft_dice(overlap: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Dice from what `class_sums` returns, or sums of it."""
    return (2 * overlap + SMOOTH) / (size + SMOOTH)


def class_sums(probability: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum p y` and `sum p + sum y` over the voxels of each crop, `[B, K]` each.

    Args:
        probability: `[B, K, X, Y, Z]`.
        labels: `[B, X, Y, Z]`.
    """
    classes = torch.arange(probability.shape[1], device=labels.device)[:, None, None, None]
    true = labels[:, None] == classes
    overlap = (probability * true).sum(dim=(2, 3, 4))
    return overlap, probability.sum(dim=(2, 3, 4)) + true.sum(dim=(2, 3, 4))
