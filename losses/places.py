"""Where crops of one volume lie from each other (Spatial-Aware, arXiv 2509.05967, made exact and in mm).

The published route term is a constant multiple of its term for places: `cycle` takes its place. The published
similarity drives distant parts apart however far they are: here it is a kernel of their distance.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .reconstruction import masked_huber

TERMS = ("gap", "place", "cycle", "similarity", "reconstruction")
Gather = Callable[[torch.Tensor], torch.Tensor]


def compute_terms(
    outputs: dict[str, torch.Tensor], _: Gather, cycles: bool, unit: float, kernel_width: float
) -> dict[str, torch.Tensor]:
    """The terms that the outputs allow, means over volumes, and what tells of success. Nothing couples volumes.

    Args:
        outputs: see `SpatialAware.outputs`; `B` volumes, `L` crops of each.
        cycles: whether `cycle` is wanted.
        unit: mm that are 1 for the heads.
        kernel_width: of `similarity`, mm.

    Returns:
        `gap`, `place`, `cycle`, `similarity` and `reconstruction`. With the gap head `gap_error`, the mean length of
        what is wrong in a gap, `cycle_error`, of what a way around three crops leaves (both mm), and `gap_skill`, 1
        less the share of squared gaps that is missed: 0 for answering "here" always. With the place head `place_error`,
        of the gaps between its places. With the parts `part_variance`, the total variance of their unit-length
        features (1 = spread over the sphere, 0 = all are one).
    """
    losses, gaps = {}, gaps_between(outputs["centres"])
    if "told_gaps" in outputs:
        told = outputs["told_gaps"]
        losses |= {"gap": gap_loss(told, gaps / unit)} | ({"cycle": cycle_loss(told)} if cycles else {})
        losses |= watch_gaps(told.detach() * unit, gaps)
    if "told_places" in outputs:
        told = gaps_between(outputs["told_places"])
        losses |= {"place": gap_loss(told, gaps / unit), "place_error": gap_error(told.detach() * unit, gaps)}
    if "part_features" in outputs:
        features = outputs["part_features"]
        losses["similarity"] = similarity_loss(features, outputs["part_centres"], kernel_width)
        losses["part_variance"] = features.detach().flatten(0, 1).var(dim=0, correction=0).sum()
    if "reconstructed" in outputs:
        voxels = (outputs[key] for key in ("reconstructed", "target", "voxel_mask", "present"))
        losses["reconstruction"] = masked_huber(*voxels)
    return losses


def gaps_between(centres: torch.Tensor) -> torch.Tensor:
    """Centres of crops `[..., L, 3]` -> the way from crop i to crop j `[..., L, L, 3]`."""
    return centres.unsqueeze(-3) - centres.unsqueeze(-2)


def gap_loss(told: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
    """SmoothL1 averaged over the pairs of different crops, and axes; `[B, L, L, 3]` each, 0 between a crop and itself.

    The published one has the error of the lengths beside it, which adds no other minimum.
    """
    crops = gaps.shape[1]
    return F.smooth_l1_loss(told, gaps) * crops / (crops - 1)


def cycle_loss(told: torch.Tensor) -> torch.Tensor:
    """The squared length of `told_ij + told_jk + told_ki`, averaged over three different crops; 0 of two crops.

    Gaps `[B, L, L, 3]` are antisymmetric: with two crops the same a way around is 0, in any order it is as long.
    """
    return _of_three(around(told).square().sum(-1))


def around(told: torch.Tensor) -> torch.Tensor:
    """Gaps `[B, L, L, 3]` -> their sum on the way i, j, k, i `[B, L, L, L, 3]`."""
    return told[:, :, :, None] + told[:, None] - told[:, :, None]


def similarity_loss(features: torch.Tensor, centres: torch.Tensor, width: float) -> torch.Tensor:
    """Parts of a volume are as alike as they are near: `(u_a . u_b - exp(-d_ab^2 / (2 width^2)))^2`, mean over a != b.

    Args:
        features: of unit length, `[B, P, E]`.
        centres: mm, `[B, P, 3]`.
        width: mm.
    """
    parts = features.shape[1]
    error = features @ features.mT - similarity_of_places(centres, width)  # 0 of a part and itself
    return error.square().mean() * parts / (parts - 1)


def similarity_of_places(centres: torch.Tensor, width: float) -> torch.Tensor:
    """How alike parts should be `[..., P, P]`, from their centres `[..., P, 3]` in mm."""
    return (-0.5 * gaps_between(centres / width).square().sum(-1)).exp()


def gap_error(told: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
    """The length of what is wrong in a gap, averaged over pairs of different crops; `[B, L, L, 3]` each."""
    crops = gaps.shape[1]
    return (told - gaps).norm(dim=-1).mean() * crops / (crops - 1)


@torch.no_grad()
def watch_gaps(told: torch.Tensor, gaps: torch.Tensor) -> dict[str, torch.Tensor]:
    """`gap_error`, `gap_skill` and `cycle_error` of gaps `[B, L, L, 3]` in mm."""
    missed = (told - gaps).square().sum() / gaps.square().sum().clamp(min=torch.finfo(gaps.dtype).tiny)
    return {
        "gap_error": gap_error(told, gaps),
        "gap_skill": 1 - missed,
        "cycle_error": _of_three(around(told).norm(dim=-1)),
    }


@torch.no_grad()
def place_baselines(outputs: dict[str, torch.Tensor], unit: float, kernel_width: float) -> dict[str, torch.Tensor]:
    """What the terms and errors are without having learned: `TERM_by_WHAT`, for the outputs that there are.

    "here" is for every gap the answer 0; "one similarity" is for all parts the one that scores best.
    """
    gaps, levels = gaps_between(outputs["centres"]), {}
    here = torch.zeros_like(gaps)
    for name, told in (("gap", "told_gaps"), ("place", "told_places")):
        if told in outputs:
            levels[f"{name}_by_answering_here"] = gap_loss(here, gaps / unit)
            levels[f"{name}_error_by_answering_here"] = gap_error(here, gaps)
    if "part_centres" in outputs:
        wanted = similarity_of_places(outputs["part_centres"], kernel_width)
        others = ~torch.eye(wanted.shape[1], dtype=torch.bool, device=wanted.device)
        levels["similarity_by_one_similarity"] = wanted[:, others].var(correction=0)
    return levels


def _of_three(ways: torch.Tensor) -> torch.Tensor:
    """Mean of `[B, L, L, L]` over three different crops; the others are 0."""
    crops = ways.shape[1]
    return ways.sum() / (len(ways) * max(1, crops * (crops - 1) * (crops - 2)))
