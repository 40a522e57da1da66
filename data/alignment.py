"""Level 1 of the frames: an affine between two volumes, by cells of dense features that find each other."""

from typing import NamedTuple

import numpy as np
import torch

from .frames import carry

BLOCK = 1024  # cells compared with all candidates at once


class Cells(NamedTuple):
    """Cells of a volume's foreground."""

    features: torch.Tensor  # [N, D], of length 1
    places: np.ndarray  # float64 [N, 3], mm along the volume's axes


class Numbers(NamedTuple):
    """Of the search, for volumes of the size of a head; ours."""

    reach: float = 32.0  # mm from the place that level 0 expects, within which a cell is sought
    back: float = 12.0  # mm within which the way back must end
    scale: float = 8.0  # mm, residual that halves a match's weight
    rounds: int = 10  # of reweighting
    matches: int = 50  # fewest
    determinant: tuple[float, float] = (0.5, 2.0)

    def scaled(self, factor: float) -> "Numbers":
        """All lengths times a factor."""
        return self._replace(reach=factor * self.reach, back=factor * self.back, scale=factor * self.scale)


class Alignment(NamedTuple):
    affine: np.ndarray  # [3, 4], from mm of the volume to mm of the reference; the guess, if a reason speaks against it
    matches: int
    before: float  # mean residual of the matches in mm, by the guess; NaN without matches
    after: float  # by what was fitted
    reason: str  # why the guess is kept, or ""


def align(cells: Cells, reference: Cells, guess: np.ndarray, numbers: Numbers) -> Alignment:
    """The affine from a volume to the reference, by cells that are each other's most similar ones near the guess.

    Args:
        guess: `[3, 4]`, from mm of the volume to mm of the reference.
    """
    if min(len(cells.places), len(reference.places)) < numbers.matches:
        reason = f"{len(cells.places)} cells of foreground, and {len(reference.places)} of the reference: too few"
        return Alignment(guess, 0, np.nan, np.nan, reason)
    expected = carry(guess, cells.places)
    there, found = nearest(cells.features, expected, reference.features, reference.places, numbers.reach)
    back, returned = nearest(reference.features, reference.places, cells.features, expected, numbers.reach)
    gone = np.linalg.norm(cells.places[back[there]] - cells.places, axis=1)
    kept = found & returned[there] & (gone <= numbers.back)
    places, targets = cells.places[kept], reference.places[there[kept]]
    if len(places) < numbers.matches:
        reason = f"{len(places)} cells find each other, fewer than {numbers.matches}"
        return Alignment(guess, len(places), np.nan, np.nan, reason)
    affine = robust_affine(places, targets, numbers.scale, numbers.rounds)
    before, after = (float(np.linalg.norm(carry(a, places) - targets, axis=1).mean()) for a in (guess, affine))
    determinant, (low, high) = np.linalg.det(affine[:, :3]), numbers.determinant
    reason = ""
    if not low < determinant < high:
        reason = f"the determinant {determinant:.2f} is outside of {low:g} to {high:g}"
    elif after > before:
        reason = f"the mean residual would be {after:.1f} mm, above {before:.1f} mm"
    return Alignment(guess if reason else affine, len(places), before, after, reason)


def nearest(
    features: torch.Tensor, places: np.ndarray, others: torch.Tensor, places_of_others: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """The most similar of the others within `reach` mm of each place: its number `[N]`, and whether there is one `[N]`.

    Args:
        features, others: `[N, D]` and `[M, D]`, of length 1.
        places, places_of_others: `[N, 3]` and `[M, 3]` in mm.
    """
    here, there = (torch.from_numpy(p).to(others.device, torch.float32) for p in (places, places_of_others))
    numbers, found = [], []
    for some, near in zip(features.split(BLOCK), here.split(BLOCK)):
        exact = "donot_use_mm_for_euclid_dist"
        scores = (some @ others.T).masked_fill(torch.cdist(near, there, compute_mode=exact) > reach, -torch.inf)
        best = scores.max(dim=1)
        numbers.append(best.indices)
        found.append(best.values > -torch.inf)
    return torch.cat(numbers).cpu().numpy(), torch.cat(found).cpu().numpy()


def robust_affine(places: np.ndarray, targets: np.ndarray, scale: float, rounds: int) -> np.ndarray:
    """The affine `[3, 4]` of least squares, reweighted by `1 / (1 + (residual / scale)^2)` (Cauchy's weights).

    Args:
        places, targets: `[N, 3]` in mm.
    """
    known, weight = np.column_stack((places, np.ones(len(places)))), np.ones(len(places))
    for _ in range(rounds):
        root = np.sqrt(weight)[:, None]
        solution = np.linalg.lstsq(root * known, root * targets, rcond=None)[0]
        weight = 1 / (1 + (np.linalg.norm(known @ solution - targets, axis=1) / scale) ** 2)
    return solution.T
