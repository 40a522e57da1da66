"""Masked reconstruction (He et al. 2022, MAE), with the Huber loss of CVA."""

import torch
import torch.nn.functional as F


def masked_huber(prediction: torch.Tensor, target: torch.Tensor, voxel_mask: torch.Tensor) -> torch.Tensor:
    """Huber loss (delta = 1) averaged over the masked voxels; over all where none is masked (an autoencoder).

    Args:
        prediction, target: `[B, C, X, Y, Z]`.
        voxel_mask: `[B, 1, X, Y, Z]`, True = masked.
    """
    error = F.huber_loss(prediction, target, reduction="none", delta=1.0)
    weight = (voxel_mask | ~voxel_mask.any()).expand_as(error).to(error.dtype)
    return (error * weight).sum() / weight.sum()
