"""Heads used in pretraining only: projector, predictor and the batch norm inside them (Grill et al. 2020, BYOL)."""

import torch
import torch.nn.functional as F
from torch import nn

from .distributed import note_traffic, number_of_ranks, sum_over_ranks


class GlobalBatchNorm(nn.Module):
    """Batch norm of `[rows, C]` over the rows of all ranks, without scale, shift or running statistics.

    Student and teacher alike are normalised by the batch they see, so there is no statistic to go stale, and the
    result does not depend on how the batch is spread over ranks (each rank must hold equally many rows).
    """

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if number_of_ranks() == 1:
            statistics = 2 * torch.float32.itemsize * rows.shape[1]  # mean and variance; in the backward pass two sums
            note_traffic(summed=statistics * (1 + rows.requires_grad))
            return F.batch_norm(rows, None, None, training=True, eps=self.eps)
        return _BatchNormOverRanks.apply(rows, self.eps)


class _BatchNormOverRanks(torch.autograd.Function):
    """Keeps the rows in their own precision for the backward pass, as one rank's batch norm does."""

    @staticmethod
    def forward(ctx, rows, eps):
        # sums, one after the other: of thousands of ranks they wait a fraction of what gathering both would
        mean = sum_over_ranks(rows.mean(0, dtype=torch.float32)) / number_of_ranks()
        centred = rows - mean
        var = sum_over_ranks(torch.linalg.vector_norm(centred, dim=0).square() / len(rows)) / number_of_ranks()
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(rows, mean, scale)
        return (centred * scale).to(rows.dtype)

    @staticmethod
    def backward(ctx, gradient):
        rows, mean, scale = ctx.saved_tensors
        gradient = gradient.float()
        normed = (rows - mean) * scale
        sums = torch.stack((gradient.mean(0), (gradient * normed).mean(0)))
        along_mean, along_normed = sum_over_ranks(sums) / number_of_ranks()
        return ((gradient - along_mean - normed * along_normed) * scale).to(rows.dtype), None


def projector(in_size: int, hidden_size: int, out_size: int) -> nn.Sequential:
    """Three linear layers, each followed by batch norm: `[rows, in_size]` -> `[rows, out_size]`."""
    layers = [nn.Linear(in_size, hidden_size), GlobalBatchNorm(), nn.SiLU()]
    layers += [nn.Linear(hidden_size, hidden_size), GlobalBatchNorm(), nn.SiLU()]
    layers += [nn.Linear(hidden_size, out_size), GlobalBatchNorm()]
    return _initialised(nn.Sequential(*layers))


def predictor(size: int, hidden_size: int) -> nn.Sequential:
    """The student's extra bottleneck, which keeps it from having to equal the teacher: `[rows, size]` -> the same."""
    layers = [nn.Linear(size, hidden_size), GlobalBatchNorm(), nn.SiLU(), nn.Linear(hidden_size, size)]
    return _initialised(nn.Sequential(*layers))


def _initialised(head: nn.Sequential) -> nn.Sequential:
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return head
