"""NT-Xent between student and teacher (Chen et al. 2020, SimCLR, eq. 1; as used by CVA, arXiv 2509.13846)."""

import torch
import torch.nn.functional as F


def nt_xent(
    student: torch.Tensor, teacher: torch.Tensor, volumes: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pull each student row to its teacher row, push all rows of other volumes away.

    Every row of both is an anchor; its positive is its partner, its negatives are the rows of all other volumes. With
    one volume there are no negatives, and the loss is 0.

    Args:
        student, teacher: `[N, D]`; teacher row `i` is the partner of student row `i` (the other view of its volume).
        volumes: `[N]`, which volume a row comes from.

    Returns:
        The loss averaged over the `2N` anchors, and the share of anchors whose positive is nearer than every negative.
    """
    rows = F.normalize(torch.cat((teacher, student)), dim=1)
    similarity = rows @ rows.T / temperature
    volumes = volumes.repeat(2)
    negatives = similarity.masked_fill(volumes[:, None] == volumes[None, :], float("-inf"))
    partner = torch.arange(len(rows), device=rows.device).roll(len(student))
    positive = similarity.gather(1, partner[:, None])
    loss = (torch.cat((positive, negatives), dim=1).logsumexp(dim=1) - positive[:, 0]).mean()
    accuracy = (positive > negatives).all(dim=1).float().mean()
    return loss, accuracy
