"""How many directions the features of an encoder use."""

import torch

MOST_ROWS = 25_600  # as in the paper: more change the rank little


def rank_me(features: torch.Tensor) -> float:
    """The effective rank of features `[N, D]`, between 1, where all are one direction, and min(N, D).

    The exponential of the entropy of their singular values (RankMe, Garrido et al. 2023, arXiv 2210.02885, eq. 2). It
    says nothing alone: compare encoders of one width, on the same volumes. Of more rows than `MOST_ROWS` only every
    n-th is taken.

    Raises:
        ValueError: if all features are 0.
    """
    rows = features[:: -(-len(features) // MOST_ROWS)].double()
    values = torch.linalg.eigvalsh(rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T).clamp(min=0).sqrt()
    if not values.any():
        raise ValueError("all features are 0: this encoder has collapsed, or its volumes are empty")
    share = values / values.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))
