"""The SAL objective: local alignment + position + reconstruction (after arXiv 2406.15699, in 3D)."""

import torch

from .local_alignment import Gather, best_in_window, local_alignment, watch_matches
from .position_contrast import position_contrast
from .reconstruction import masked_huber

TERMS = ("local", "position", "reconstruction")


def sal_objective(
    outputs: dict[str, torch.Tensor], gather: Gather, reach: int, sigma: float, temperature: float
) -> dict[str, torch.Tensor]:
    """The terms that the outputs allow, both ways between the two views, and what tells matches from trivial ones.

    Args:
        outputs: see `SelfSupervisedAlignment.outputs`; rows are view-major, so half a roll is the other view.
        gather: `[...]` of this rank -> `[ranks, ...]`, with gradients.
        reach: cells, on each axis either way, within which a match is looked for.
        sigma: mm within which crops count as near.
        temperature: of the contrast of positions.

    Returns:
        `local`, `position` and `reconstruction`. With `local` also the monitors of `watch_matches`; with `position`
        `position_error`, mm from a crop to that of another sample which is most like it. Monitors are of this rank.
    """
    losses = {}
    if "cells" in outputs:
        cells = outputs["cells"]
        other = cells.roll(len(cells) // 2, dims=0)
        best = best_in_window(cells, other, reach)
        losses["local"] = local_alignment(cells, other, best)
        losses |= watch_matches(cells, best, outputs["place"], outputs["cell_size"])
    if "compared" in outputs:
        losses["position"], losses["position_error"] = position_contrast(
            outputs["compared"], outputs["place"], outputs["pair"], gather, sigma, temperature, reach
        )
    if "reconstructed" in outputs:
        losses["reconstruction"] = masked_huber(
            outputs["reconstructed"], outputs["target"], outputs["voxel_mask"], outputs["present"]
        )
    return losses
