"""Dense consistency: what student and teacher should agree on where two views overlap (CVA, arXiv 2509.13846).

All take `AlignedCells`, `gather` (`[...]` -> `[ranks, ...]`, with gradients) and the recipe's `temperature`, and return
one number. Each crop counts the same, so the mean over ranks of their losses is the loss of the whole batch. A new one
is a function and a row of `CONSISTENCIES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .ntxent import nt_xent

Gather = Callable[[torch.Tensor], torch.Tensor]


class AlignedCells(NamedTuple):
    """Row `n` of student and teacher is the same region, seen in different views."""

    student: torch.Tensor  # [N, P, D]
    teacher: torch.Tensor  # [N, P, D]
    inside: torch.Tensor  # [N, P], False where a view does not reach
    pair: torch.Tensor  # [N], the sample that a crop belongs to


def cosine_consistency(cells: AlignedCells, gather: Gather, temperature: float) -> torch.Tensor:
    """`2 - 2 cos(student, teacher)`: 0 when they agree, 2 when they are unrelated ("CVA" of the paper's Table 1)."""
    return mean_inside(2 - 2 * F.cosine_similarity(cells.student, cells.teacher, dim=-1), cells.inside)


def cell_contrast(cells: AlignedCells, gather: Gather, temperature: float) -> torch.Tensor:
    """NT-Xent over cells ("C-CVA" of the paper's Table 1).

    The negatives of a cell are all other cells of the batch, those of its own crop among them; only the rows of the
    same place of the same volume are neither. Every rank contrasts its own cells with those of all ranks.
    """
    student, teacher, inside, pair = cells
    place = pair[:, None] * inside.shape[1] + torch.arange(inside.shape[1], device=pair.device)
    place = place.masked_fill(~inside, -1).flatten()
    loss, _ = nt_xent(student.flatten(0, 1), teacher.flatten(0, 1), place, temperature, gather)
    return mean_inside(loss.unflatten(0, inside.shape), inside)


def gram_consistency(cells: AlignedCells, gather: Gather, temperature: float) -> torch.Tensor:
    """Mean squared difference of the channel Gram matrices `[D, D]` of a crop.

    Insensitive to position: shuffling the cells changes nothing, so this aligns no places. It is what the published
    code has trained since September 2025, kept for comparison.
    """
    inside = cells.inside
    student, teacher = (F.normalize(rows, dim=-1) * inside[..., None] for rows in (cells.student, cells.teacher))
    difference = torch.baddbmm(teacher.mT @ teacher, student.mT, student, beta=-1)
    reached = inside.sum(1).clamp(min=1) / inside.shape[1]  # so that a crop counts the same however many cells it has
    return (difference.square().mean((1, 2)) / reached.square()).mean()


def mean_inside(values: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Mean over crops of the mean over their cells inside: `[N, P]` -> a number; a crop without any counts 0."""
    weights = inside.to(values.dtype)
    return ((values * weights).sum(1) / weights.sum(1).clamp(min=1)).mean()


class Consistency(NamedTuple):
    """A row of `CONSISTENCIES`."""

    function: Callable[[AlignedCells, Gather, float], torch.Tensor] | None
    words: str  # for model cards and pictures: "pretrained by ..."
    aligns: bool  # whether it compares the same places, which makes it a Consistent View Alignment


CONSISTENCIES = {
    "cosine": Consistency(cosine_consistency, "dense alignment of two overlapping views", aligns=True),
    "c_cva": Consistency(cell_contrast, "dense contrast of two overlapping views", aligns=True),
    "gram": Consistency(
        gram_consistency, "agreement of channel statistics between two overlapping views", aligns=False
    ),
    "none": Consistency(None, "", aligns=False),
}
