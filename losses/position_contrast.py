"""Crops that lie near each other are to be alike (in place of SAL's unpublished global positional loss; ours)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .local_alignment import Gather, places_of
from .ntxent import SIMILARITIES

COARSE = 8  # cells of an axis at most, where crops are compared by their cells


def position_contrast(
    rows: torch.Tensor,
    place: torch.Tensor,
    pair: torch.Tensor,
    gather: Gather,
    sigma: float,
    temperature: float,
    reach: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE over the crops of all ranks, with soft targets: the nearer in the volume, the more alike.

    `w_ab = softmax_b(-|place_a - place_b|^2 / (2 sigma^2))`, loss `mean_a -sum_b w_ab log softmax_b(score_ab / t)`,
    b any crop but a. It takes the places of different volumes for the same ones. Anchors are this rank's crops.

    Args:
        rows: what crops are compared by: a unit vector each `[N, D]`, or their cells `[N, x, y, z, D]` (`cell_scores`).
        place: `[N, 3]` mm.
        pair: `[N]`, the sample of each crop, whose views are stacked `[view 1 of all, view 2 of all]`.
        reach: cells, of `cell_scores`.

    Returns:
        The loss, and the mean distance in mm from a crop to that of another sample with the highest score.
    """
    view = torch.arange(len(pair), device=pair.device) // (len(pair) // 2)
    crop = 2 * pair + view
    place_of_all, crop_of_all = gather(place).flatten(0, 1), gather(crop).flatten()
    if rows.ndim == 2:
        scores = rows @ gather(rows).flatten(0, 1).T
    else:
        coarse = _coarse(rows)
        reach = [max(1, round(reach * few / n)) for few, n in zip(coarse.shape[1:4], rows.shape[1:4])]
        scores = cell_scores(coarse, gather(coarse).flatten(0, 1), reach)
    distance = (place[:, None] - place_of_all).norm(dim=-1)
    itself, lowest = crop[:, None] == crop_of_all, torch.finfo(scores.dtype).min
    weight = (-distance.square() / (2 * sigma**2)).masked_fill(itself, lowest).softmax(1)
    loss = -(weight * (scores / temperature).masked_fill(itself, lowest).log_softmax(1)).masked_fill(itself, 0.0).sum(1)
    same_sample = pair[:, None] == crop_of_all // 2
    nearest = scores.detach().masked_fill(same_sample, lowest).argmax(1, keepdim=True)
    return loss.mean(), distance.gather(1, nearest).mean()


def cell_scores(anchors: torch.Tensor, candidates: torch.Tensor, reach: Sequence[int]) -> torch.Tensor:
    """How well the cells of one crop find their like in another: the mean of the best products in their windows.

    Similarities are made a block of crops at a time and again in the backward pass.

    Args:
        anchors, candidates: `[A, x, y, z, D]` and `[N, x, y, z, D]`.
        reach: cells on each axis.

    Returns:
        `[A, N]`.
    """
    cells = places_of(anchors.shape[1:4], anchors.device)
    apart = (cells[:, None] - cells).abs().unbind(-1)
    far = torch.stack([steps > most for steps, most in zip(apart, reach)]).any(0)
    anchors, candidates = anchors.flatten(1, 3), candidates.flatten(1, 3)
    across = min(len(candidates), max(1, SIMILARITIES // far.numel()))
    down = max(1, SIMILARITIES // (far.numel() * across))
    blocks = [[(a, c, far) for c in candidates.split(across)] for a in anchors.split(down)]
    if len(blocks) * len(blocks[0]) == 1:
        return _scores(anchors, candidates, far)
    again = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([torch.cat([checkpoint(_scores, *block, **again) for block in row], 1) for row in blocks])


def _scores(anchors, candidates, far):
    similarity = torch.einsum("apd,nqd->anpq", anchors, candidates)
    return similarity.masked_fill(far, float("-inf")).max(-1).values.mean(-1)


def _coarse(cells: torch.Tensor) -> torch.Tensor:
    """Averaged to at most `COARSE` cells an axis: these are gathered from all ranks, and compared all with all."""
    size = [min(n, COARSE) for n in cells.shape[1:4]]
    return F.adaptive_avg_pool3d(cells.movedim(-1, 1), size).movedim(1, -1)
