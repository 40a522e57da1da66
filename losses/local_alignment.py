"""Local alignment: the best match of each cell in a window of the other crop (SAL, arXiv 2406.15699).

Two crops show nearly the same place, and nobody says how far they are apart: each cell is to have a cell like it within
some cells of its own place. Cells come as `[N, x, y, z, D]`, those of view 1 before those of view 2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .ntxent import SIMILARITIES

Gather = Callable[[torch.Tensor], torch.Tensor]


def unit_length(cells: torch.Tensor, gather: Gather) -> torch.Tensor:
    """The source's: any constant is then its own best match."""
    return F.normalize(cells, dim=-1)


def centre_crop(cells: torch.Tensor, gather: Gather) -> torch.Tensor:
    """Each channel of a crop to mean 0 and variance 1 over its cells, then cells to length 1: a constant is 0.

    Cells are not lengthened: rounding alone would give those of a constant a direction.
    """
    variance, mean = torch.var_mean(cells, dim=(1, 2, 3), correction=0, keepdim=True)
    cells = (cells - mean) * torch.rsqrt(variance + 1e-5)
    return cells / cells.norm(dim=-1, keepdim=True).clamp(min=1)


def centre_batch(cells: torch.Tensor, gather: Gather) -> torch.Tensor:
    """`centre_crop` of what differs from the mean crop of all ranks: a code of the place in a crop is 0 too."""
    return centre_crop(cells - gather(cells.mean(0)).mean(0), gather)


NORMALISATIONS = {"length": unit_length, "crop": centre_crop, "batch": centre_batch}


@torch.no_grad()
def best_in_window(anchors: torch.Tensor, candidates: torch.Tensor, reach: int) -> torch.Tensor:
    """For each cell of a crop the one of the other with the largest product, at most `reach` cells away on each axis.

    Exact. Similarities are made for a few planes of anchors and the planes in their reach at a time, so memory does not
    grow with the square of the cells.

    Args:
        anchors, candidates: `[N, x, y, z, D]`.

    Returns:
        `[N, P]`, numbers of cells, of which there are `P = x * y * z`.
    """
    count, length, *rest = anchors.shape[:4]
    plane = rest[0] * rest[1]
    cells = places_of(anchors.shape[1:4], anchors.device)
    at_once = max(1, SIMILARITIES // (count * plane * plane * min(length, 2 * reach + 1)))
    best = []
    for first in range(0, length, at_once):
        last = min(first + at_once, length)
        low, high = max(0, first - reach), min(length, last + reach)
        similarity = anchors[:, first:last].flatten(1, 3) @ candidates[:, low:high].flatten(1, 3).mT
        apart = cells[first * plane : last * plane, None] - cells[low * plane : high * plane]
        similarity.masked_fill_(apart.abs().amax(-1) > reach, float("-inf"))
        best.append(similarity.argmax(-1) + low * plane)
    return torch.cat(best, dim=1)


def local_alignment(anchors: torch.Tensor, candidates: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """`mean(1 - cell . its match)`: the source's `|1 - max|`, of whichever cells were found, with gradients into both.

    Args:
        anchors, candidates: `[N, x, y, z, D]`, not longer than 1.
        best: `[N, P]`, of `best_in_window`.
    """
    anchors, candidates = anchors.flatten(1, 3), candidates.flatten(1, 3)
    found = candidates.gather(1, best[..., None].expand_as(candidates))
    return 1 - (anchors * found).sum(-1).mean()


def places_of(grid: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each cell is in its crop, in cells: `[P, 3]`."""
    return torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"), -1).flatten(0, 2)


def match_errors(
    best: torch.Tensor, grid: tuple[int, ...], place: torch.Tensor, cell: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far matches lie from the places that they are matched to, which the loss is not told.

    Args:
        best: `[N, P]`, cells of the other crop.
        place: `[N, 3]`, mm of the crops' centres; crops of a pair are not turned against each other.
        cell: `[N, 3]`, mm of a cell.

    Returns:
        The error `[N, P, 3]` in mm, and which cells the other crop shows `[N, P]`.
    """
    cells = places_of(grid, best.device)
    gap = (place - place.roll(len(place) // 2, dims=0))[:, None]
    cell = cell[:, None]
    true = cells + gap / cell
    shown = ((true >= -0.5) & (true <= cells[-1] + 0.5)).all(-1)
    return (cells[best] - true) * cell, shown


@torch.no_grad()
def watch_matches(
    cells: torch.Tensor, best: torch.Tensor, place: torch.Tensor, cell: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What tells a match from a trivial one; a small loss does not, nor does variance.

    Args:
        cells: `[N, x, y, z, D]`; the others as in `match_errors`.

    Returns:
        Of the cells that the other crop shows, in mm: `match_error`, the mean distance of a match from the true place;
        `shift`, the same if each cell was matched to itself; `shift_at_best`, if to the cell nearest to the true place.
        `matched`, the share of matches within a cell on each axis; `distinct`, different matches over cells;
        `feature_variance`, of unit-length cells: 1 = spread over the sphere, 0 = all one.
    """
    grid = cells.shape[1:4]
    error, shown = match_errors(best, grid, place, cell)
    itself, _ = match_errors(torch.arange(best.shape[1], device=best.device).expand_as(best), grid, place, cell)
    size = cell[:, None]
    nearest = itself - (itself / size).round() * size
    rows = F.normalize(cells.flatten(0, 3), dim=-1)
    return {
        "match_error": _mean(error.norm(dim=-1), shown),
        "shift": _mean(itself.norm(dim=-1), shown),
        "shift_at_best": _mean(nearest.norm(dim=-1), shown),
        "matched": _mean((error.abs() <= size).all(-1).float(), shown),
        "distinct": torch.zeros_like(best, dtype=torch.float32).scatter_(1, best, 1.0).mean(),
        "feature_variance": rows.var(dim=0, correction=0).sum(),
    }


def _mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    return (values * counted).sum() / counted.sum().clamp(min=1)
