"""NT-Xent between student and teacher (Chen et al. 2020, SimCLR, eq. 1; as used by CVA, arXiv 2509.13846)."""

from collections.abc import Callable

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
    ranks of the means of their rows is the loss of the whole batch. Similarities are made a block at a time and again
    in the backward pass, so memory does not grow with the square of the rows.

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
    block = max(1, SIMILARITIES // len(candidates))
    parts = []
    for rows in kinds:
        for part in zip(rows.split(block), positive.split(block), group.split(block)):
            arguments = (*part, candidates, candidate_groups, temperature)
            if block >= len(kinds) * len(student):
                parts.append(_contrast(*arguments))
            else:
                parts.append(checkpoint(_contrast, *arguments, use_reentrant=False, preserve_rng_state=False))
    loss, nearest = (torch.cat(part).view(-1, len(student)).mean(0) for part in zip(*parts))
    return loss, nearest


def _contrast(anchors, positive, groups, candidates, candidate_groups, temperature):
    similarity = (anchors @ candidates.T).div_(temperature)
    left_out = (groups[:, None] == candidate_groups) | (candidate_groups < 0)
    similarity.masked_fill_(left_out, torch.finfo(similarity.dtype).min)  # finite: a row may have no negative at all
    loss = torch.logaddexp(positive, similarity.logsumexp(dim=1)) - positive
    return loss, (positive > similarity.detach().amax(1)).to(loss.dtype)
