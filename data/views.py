"""The geometry of two overlapping views (CVA, arXiv 2509.13846, with the corrections that make it exact).

A view is a crop plus `crop_to_volume`, a `[3, 4]` matrix from crop voxel index to volume voxel coordinate. Everything
else - the shared region, the points compared, the pictures - follows from that matrix. Coordinates are (X, Y, Z);
voxel `i` is centred at `i`, and `n` voxels span `[-0.5, n - 0.5]`.
"""

import math

import numpy as np
import torch


def least_shared(crop_size: int) -> int:
    """The fewest voxels of an axis that two views share: 0.4 of the crop, rounded up to an even number."""
    return 2 * math.ceil(0.2 * crop_size)


def sample_starts(
    rng: np.random.Generator, volume_size: tuple[int, ...], crop_size: tuple[int, ...], overlap: tuple[float, float]
) -> np.ndarray:
    """First voxels of two crops that share a random part of their volume: `[2, 3]` integers.

    The shared fraction of the crop's volume is `t ~ U(overlap)`, split over the axes as `t ** w` with
    `w ~ Dirichlet(1, 1, 1)`, rounded to an even number of voxels, at least 0.4 of each axis and as much as the volume
    forces. On each axis either view may be the lower one. A volume smaller than the crop is centred in it: the start is
    negative, and equal in both views.
    """
    volume, crop = np.asarray(volume_size), np.asarray(crop_size)
    fraction = rng.uniform(*overlap) ** rng.dirichlet((1.0, 1.0, 1.0))
    forced = 2 * crop - np.maximum(volume, crop)
    least = np.maximum([least_shared(size) for size in crop_size], 2 * np.ceil(forced / 2))
    shared = np.minimum(np.maximum(2 * np.round(crop * fraction / 2), least), crop).astype(int)
    shift = crop - shared
    low = rng.integers(0, np.maximum(volume - crop - shift, 0) + 1)
    low = np.where(volume < crop, -((crop - volume) // 2), low)
    first_is_low = rng.integers(0, 2, 3).astype(bool)
    return np.stack((np.where(first_is_low, low, low + shift), np.where(first_is_low, low + shift, low)))


def crop_to_volume(start: np.ndarray, crop_size: tuple[int, ...], mirror: np.ndarray) -> np.ndarray:
    """`[3, 4]` affine of a crop that begins at voxel `start` and is reversed on the axes where `mirror` is True."""
    sign = np.where(mirror, -1.0, 1.0)
    origin = start + np.where(mirror, np.asarray(crop_size) - 1, 0)
    return np.concatenate((np.diag(sign), origin[:, None]), axis=1).astype(np.float32)


def cut(volume: np.ndarray, start: np.ndarray, crop_size: tuple[int, ...], mirror: np.ndarray) -> np.ndarray:
    """The crop `[X, Y, Z]` itself, float32; outside the volume it is 0, the mean of a z-scored volume."""
    start, crop = np.asarray(start), np.asarray(crop_size)
    low, high = np.maximum(start, 0), np.minimum(start + crop, volume.shape)
    out = np.zeros(crop_size, np.float32)
    inside = tuple(slice(a, b) for a, b in zip(low - start, high - start))
    out[inside] = volume[tuple(slice(a, b) for a, b in zip(low, high))]
    return np.ascontiguousarray(out[tuple(slice(None, None, -1 if m else 1) for m in mirror)])


def shared_box(
    affines: torch.Tensor, crop_size: tuple[int, ...], margin: tuple[float, ...] = (0.0, 0.0, 0.0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """The box that two axis-aligned views share, in volume coordinates.

    Args:
        affines: `crop_to_volume` of the views, `[2B, 3, 4]`, view-major.
        margin: voxels left out along the border of each view.

    Returns:
        Its low and high corners, each `[B, 3]`.
    """
    size = torch.tensor(crop_size, dtype=affines.dtype, device=affines.device)
    edge = torch.tensor(margin, dtype=affines.dtype, device=affines.device) - 0.5
    corners = torch.stack((edge, size - 1 - edge))  # [2, 3]
    corners = _apply(affines, corners.expand(len(affines), -1, -1))
    low, high = corners.amin(1).unflatten(0, (2, -1)), corners.amax(1).unflatten(0, (2, -1))  # [2, B, 3]
    return low.amax(0), high.amin(0)


def alignment_points(
    affines: torch.Tensor,
    crop_size: tuple[int, ...],
    cells: tuple[int, ...],
    samples_per_cell: int,
    feature_stride: tuple[int, ...],
) -> torch.Tensor:
    """Where to read dense features so that equal positions of both views are the same place in the volume.

    The region compared is the shared box less half a feature cell along each view's border: between the centres of its
    outermost cells a feature map can be interpolated, beyond them it could only be extrapolated. That region is cut
    into `cells`, each cell into `samples_per_cell` bins an axis; the points are the bin centres.

    Args:
        affines: `crop_to_volume` of the views, `[2B, 3, 4]`, view-major.
        feature_stride: voxels a cell of the feature map, (X, Y, Z).

    Returns:
        `[2B, p, q, r, 3]` in voxels of each crop, with `p = cells[0] * samples_per_cell` and so on.
    """
    low, high = shared_box(affines, crop_size, tuple(stride / 2 for stride in feature_stride))
    counts = [n * samples_per_cell for n in cells]
    axes = [(torch.arange(n, device=affines.device, dtype=affines.dtype) + 0.5) / n for n in counts]
    unit = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # [p * q * r, 3]
    places = (low[:, None] + (high - low)[:, None] * unit).repeat(2, 1, 1)  # the same for both views
    return to_crop(affines, places).unflatten(1, counts)


def to_crop(affines: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Volume coordinates `[N, P, 3]` in voxels of each crop, by its `crop_to_volume` `[N, 3, 4]`."""
    return torch.linalg.solve(affines[:, :, :3], (points - affines[:, None, :, 3]).mT).mT


def _apply(affines: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """`[N, 3, 4]` on points `[N, P, 3]`."""
    return points @ affines[:, :, :3].mT + affines[:, None, :, 3]
