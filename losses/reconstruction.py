"""Masked reconstruction (He et al. 2022, MAE), with the Huber loss of CVA."""

import torch
import torch.nn.functional as F


def masked_huber(
    prediction: torch.Tensor, target: torch.Tensor, voxel_mask: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """Huber loss (delta = 1) averaged over the masked voxels; over all where none is masked (an autoencoder).

    Args:
        prediction, target: `[B, C, X, Y, Z]`.
        voxel_mask: `[B, 1, X, Y, Z]`, True = masked.
        present: `[B, C]`, False = a channel that its volume lacks: no voxel of it counts.
    """
    error = F.huber_loss(prediction, target, reduction="none", delta=1.0)
    counted = counted_voxels(voxel_mask, present).expand_as(error)
    return (error * counted).sum() / counted.sum()


def counted_voxels(voxel_mask: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Those that a reconstruction is judged by: `[B, C, X, Y, Z]`, from the arguments of `masked_huber`."""
    return (voxel_mask | ~voxel_mask.any()) & present[:, :, None, None, None]
