"""NT-Xent between student and teacher (Chen et al. 2020, SimCLR, eq. 1; as used by CVA, arXiv 2509.13846)."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SIMILARITIES = 2**25  # how many are held at once, 134 MB in float32


def nt_xent(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    group: torch.Tensor,
    temperature: float,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pull each student row to its teacher row, push all rows of other groups away, on whatever rank they are.

    Every row of student and teacher is an anchor; its positive is its partner, its negatives are the rows of all other
    groups. Without other groups the loss is 0. Rows of this rank are contrasted with those of all ranks; the mean over
    ranks of the means of their rows is the loss of the whole batch. Similarities are made a tile at a time and again
    in the backward pass, so memory does not grow with the square of the rows; tiles are square where they can be, and
    so read each row as seldom as tiles of their size can.

    Args:
        student, teacher: `[N, D]`; teacher row `i` is the partner of student row `i`. Without a teacher (SimCLR) the
            student rows are `[view 1 of all, view 2 of all]`, and the partner is the other view.
        group: `[N]`, equal for rows that must not be each other's negatives; -1 leaves a row out of the negatives.
        gather: `[...]` -> `[ranks, ...]`, with gradients.

    Returns:
        For each student row the loss, averaged over the anchors of its pair, and whether the positive is nearer than
        every negative (a share, over the same anchors): `[N]` each.
    """
    student = F.normalize(student, dim=1)
    teacher = F.normalize(teacher, dim=1) if teacher is not None else None
    partner = teacher if teacher is not None else student.roll(len(student) // 2, dims=0)
    positive = (student * partner).sum(1) / temperature
    kinds = (student,) if teacher is None else (student, teacher)
    candidates = torch.cat([gather(rows).flatten(0, 1) for rows in kinds])  # one by one: a teacher needs no gradient
    candidate_groups = gather(group).flatten().repeat(len(kinds))
    tile = max(math.isqrt(SIMILARITIES), SIMILARITIES // len(candidates))  # anchors
    width = SIMILARITIES // min(tile, len(student))  # candidates
    contrast = _contrast
    if tile < len(kinds) * len(student) or width < len(candidates):
        contrast = partial(checkpoint, _contrast, use_reentrant=False, preserve_rng_state=False)
    tiles = list(zip(candidates.split(width), candidate_groups.split(width)))
    losses, nearest = [], []
    for rows in kinds:
        for anchors, near, groups in zip(rows.split(tile), positive.split(tile), group.split(tile)):
            parts = zip(*(contrast(anchors, groups, *others, temperature) for others in tiles))
            negatives, largest = (torch.stack(part) for part in parts)
            losses.append(torch.logaddexp(near, negatives.logsumexp(dim=0)) - near)
            nearest.append(near > largest.amax(dim=0))
    loss, nearest = (torch.cat(part).view(-1, len(student)) for part in (losses, nearest))
    return loss.mean(0), nearest.to(loss.dtype).mean(0)


def _contrast(anchors, groups, candidates, candidate_groups, temperature):
    """Of each anchor, logsumexp and maximum of its similarities to candidates of other groups."""
    similarity = (anchors @ candidates.T).div_(temperature)
    left_out = (groups[:, None] == candidate_groups) | (candidate_groups < 0)
    similarity.masked_fill_(left_out, torch.finfo(similarity.dtype).min)  # finite: a row may have no negative at all
    return similarity.logsumexp(dim=1), similarity.detach().amax(1)
