"""The geometry of views: two that overlap (CVA, arXiv 2509.13846, made exact), or several anywhere in a volume.

A view is a crop plus `crop_to_volume`, a `[3, 4]` matrix from crop voxel index to volume voxel coordinate: place,
mirror, rotation and zoom in one. Everything else - the voxels, the points compared, the pictures - follows from it.
Coordinates are (X, Y, Z); voxel `i` is centred at `i`, and `n` voxels span `[-0.5, n - 0.5]`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .intensity import draw_around_one

TOLERANCE = 1e-3  # voxels: what rounding may move a point


def least_shared(crop_size: int) -> int:
    """The fewest voxels of an axis that two views share: 0.4 of the crop, rounded up to an even number."""
    return 2 * math.ceil(0.2 * crop_size)


def draw_turn(rng: np.random.Generator, chances: Mapping, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """A random mirror, rotation and zoom: the matrix `[3, 3]` from steps in a crop to steps in what it is cut from.

    As many random numbers are drawn whatever the chances are: changing one leaves those that follow as they were.

    Args:
        chances: `mirror`, the probability of reversing each axis; `rotation`, `probability` and largest `degrees` about
            each axis either way; `zoom`, `probability` and `range` of voxels a crop voxel covers, half of the draws
            below 1 and half above.
        spacing: mm of a voxel; rotations are rigid in mm.
    """
    rotation, zoom = chances["rotation"], chances["zoom"]
    sign = np.where(rng.random(3) < chances["mirror"], -1.0, 1.0)
    turned, angles = rng.random() < rotation["probability"], np.radians(rng.uniform(-1, 1, 3) * rotation["degrees"])
    zoomed, factor = rng.random() < zoom["probability"], draw_around_one(rng, *zoom["range"])
    matrix = np.diag(sign * (factor if zoomed else 1.0))
    return (_rotation(angles) * spacing / np.asarray(spacing)[:, None]) @ matrix if turned else matrix


def _rotation(angles: np.ndarray) -> np.ndarray:
    """About X, then Y, then Z, in radians: `[3, 3]`."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def sample_views(
    rng: np.random.Generator,
    volume_size: tuple[int, ...],
    crop_size: tuple[int, ...],
    overlap: tuple[float, float],
    overhang: float,
    shared: np.ndarray,
    own: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """`crop_to_volume` of two crops that share a random part of their volume: `[2, 3, 4]`.

    Both lie on the voxel grid of one frame, the volume turned by `shared`. The shared fraction of the crop's volume is
    `t ~ U(overlap)`, split over the axes as `t ** w` with `w ~ Dirichlet(1, 1, 1)`, rounded to an even number of
    voxels, at least 0.4 of each axis and as much as volume and `overhang` force; on each axis either view may be the
    lower one. The pair lies inside the volume where it fits, and is centred (to a voxel) along axes on which it does
    not: there, crops larger than the volume are equal but for the overhang. Then each view is turned about its own
    centre by its `own` matrix.

    Args:
        overhang: how far a pair may reach beyond the volume on each side, as a share of the crop, to overlap as asked.
        shared, own: `[3, 3]`, see `draw_turn`.
    """
    volume, crop = np.asarray(volume_size), np.asarray(crop_size)
    with np.errstate(divide="ignore"):
        room = (volume[:, None] / np.abs(shared)).min(0)  # the longest line along each axis of the frame that fits
    fraction = rng.uniform(*overlap) ** rng.dirichlet((1.0, 1.0, 1.0))
    forced = 2 * crop - np.maximum(room + 2 * overhang * crop, crop)
    least = np.maximum([least_shared(size) for size in crop_size], 2 * np.ceil(forced / 2))
    overlapping = np.minimum(np.maximum(2 * np.round(crop * fraction / 2), least), crop)
    shift = crop - overlapping
    first_is_low = rng.integers(0, 2, 3).astype(bool)
    starts = np.stack((np.where(first_is_low, 0, shift), np.where(first_is_low, shift, 0)))

    half = np.abs(shared) @ (crop + shift) / 2  # of the box around the pair
    free = volume - 2 * half
    low = np.where(free >= 0, rng.integers(0, np.maximum(np.floor(free + TOLERANCE), 0) + 1), np.ceil(free / 2))
    frame = _affine(shared, low - 0.5 + half - shared @ ((crop + shift - 1) / 2))
    centre = (crop - 1) / 2
    return np.stack([compose(frame, _affine(turn, start + centre - turn @ centre)) for start, turn in zip(starts, own)])


def scatter_views(
    rng: np.random.Generator,
    volume_size: tuple[int, ...],
    crop_size: tuple[int, ...],
    overhang: float,
    shared: np.ndarray,
    own: Sequence[np.ndarray],
) -> np.ndarray:
    """`crop_to_volume` of as many crops as there are `own`, anywhere in the volume: `[V, 3, 4]`.

    Each is drawn apart, turned by `shared`: the box around it lies uniformly, on whole voxels, where it is inside the
    volume, and is centred (to a voxel) along axes on which it does not fit. Then it is turned about its own centre by
    its `own` matrix.

    Args:
        overhang: how far a crop may reach beyond the volume on each side, as a share of the crop.
        shared, own: `[3, 3]`, see `draw_turn`.
    """
    crop = np.asarray(crop_size)
    half = np.abs(shared) @ crop / 2  # of the box around a crop
    beyond = np.floor(2 * overhang * half + TOLERANCE)
    free = np.asarray(volume_size) - 2 * half
    drawn = rng.integers(0, np.maximum(np.floor(free + 2 * beyond + TOLERANCE), 0) + 1, (len(own), 3))
    low = np.where(free + 2 * beyond >= 0, drawn - beyond, np.ceil(free / 2))
    turns = [shared @ turn for turn in own]
    return np.stack([_affine(turn, at - 0.5 + half - turn @ ((crop - 1) / 2)) for at, turn in zip(low, turns)])


def centre_view(
    centre: Sequence[int],
    volume_size: tuple[int, ...],
    crop_size: tuple[int, ...],
    shared: np.ndarray,
    own: np.ndarray,
) -> np.ndarray:
    """`crop_to_volume` `[3, 4]` of a crop around a voxel, placed as by `scatter_views`.

    The box around it is moved where it would leave the volume.
    """
    crop = np.asarray(crop_size)
    half = np.abs(shared) @ crop / 2
    free = np.asarray(volume_size) - 2 * half
    asked = np.asarray(centre, dtype=float) - np.floor(half + TOLERANCE)
    low = np.where(free >= 0, np.clip(asked, 0, np.maximum(np.floor(free + TOLERANCE), 0)), np.ceil(free / 2))
    turn = shared @ own
    return _affine(turn, low - 0.5 + half - turn @ ((crop - 1) / 2))


def freedom(volume_size: tuple[int, ...], crop_size: tuple[int, ...], overhang: float) -> np.ndarray:
    """Voxels `[3]` by which `scatter_views` can move a crop along each axis of a volume that is not turned."""
    crop = np.asarray(crop_size)
    return np.maximum(np.asarray(volume_size) + 2 * np.floor(overhang * crop) - crop, 0)


def voxel_spacing(affine: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """mm between neighbouring voxels of a crop along its axes `[3]`, from its `crop_to_volume` and the volume's own."""
    return np.linalg.norm(np.asarray(spacing)[:, None] * affine[:, :3], axis=0)


def place_in_volume(
    affine: np.ndarray, volume_size: tuple[int, ...], crop_size: tuple[int, ...], spacing: np.ndarray
) -> np.ndarray:
    """Where a crop's centre lies from the volume's centre, in mm along the axes that the crop shows: `[3]`.

    So mirrored volumes have mirrored places, as a network sees them. Of crops that are not turned one by one, the
    difference of two places is the gap between them, and what lies `o` voxels from a crop's centre is at
    `place + o * spacing`.

    Args:
        affine: `crop_to_volume` `[3, 4]`.
        spacing: of the crop, see `voxel_spacing`.
    """
    centre = affine[:, :3] @ ((np.asarray(crop_size) - 1) / 2) + affine[:, 3]
    return np.linalg.solve(affine[:, :3], centre - (np.asarray(volume_size) - 1) / 2) * spacing


def shared_box(
    affines: torch.Tensor, crop_size: tuple[int, ...], margin: tuple[float, ...] = (0.0, 0.0, 0.0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """The box along the axes of view 1 around what view 2 shares with it; empty where low > high.

    Args:
        affines: `crop_to_volume` of the two views, `[2, 3, 4]`.
        margin: voxels left out along the border of each view.

    Returns:
        Its low and high corners in voxels of view 1, `[3]` each.
    """
    size = torch.tensor(crop_size, dtype=affines.dtype)
    edge = torch.tensor(margin, dtype=affines.dtype) - 0.5
    low, high = edge, size - 1 - edge
    corners = torch.stack([torch.where(torch.tensor(c), high, low) for c in itertools.product((False, True), repeat=3)])
    corners = to_crop(affines[0], to_volume(affines[1], corners))
    return torch.maximum(low, corners.amin(0)), torch.minimum(high, corners.amax(0))


def alignment_points(
    affines: torch.Tensor,
    crop_size: tuple[int, ...],
    cells: tuple[int, ...],
    samples_per_cell: tuple[int, ...],
    feature_stride: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to read dense features so that equal cells of both views are the same place in the volume.

    The region compared is what the views share less half a feature cell along each view's border: between the centres
    of its outermost cells a feature map can be interpolated, beyond them it could only be extrapolated. The box around
    it is cut into `cells`, each cell into bins, `samples_per_cell` an axis; the points are the bin centres. Where one
    view is turned against the other the box has corners outside view 2: cells with a point there are not compared.

    Args:
        affines: `crop_to_volume` of the two views, `[2, 3, 4]`.
        feature_stride: voxels a cell of the feature map, (X, Y, Z).

    Returns:
        Points `[2, P, S, 3]` in voxels of each crop, for `P` cells of `S` samples, and whether a cell is inside `[P]`.
    """
    margin = tuple(stride / 2 for stride in feature_stride)
    low, high = shared_box(affines, crop_size, margin)
    axes = [
        ((torch.arange(n * s, dtype=affines.dtype) + 0.5) / (n * s)).view(n, s) for n, s in zip(cells, samples_per_cell)
    ]
    grid = torch.meshgrid(*(axis.flatten() for axis in axes), indexing="ij")
    unit = torch.stack(grid, dim=-1).view(*(n for axis in axes for n in axis.shape), 3)  # [x, sx, y, sy, z, sz, 3]
    unit = unit.permute(0, 2, 4, 1, 3, 5, 6).reshape(math.prod(cells), math.prod(samples_per_cell), 3)
    first = low + (high - low).clamp(min=0) * unit
    second = to_crop(affines[1], to_volume(affines[0], first))
    edge = torch.tensor(margin, dtype=affines.dtype) - 0.5 - TOLERANCE
    last = torch.tensor(crop_size, dtype=affines.dtype) - 1 - edge
    inside = ((second >= edge) & (second <= last)).all(-1).all(-1) & (low < high).all()
    return torch.stack((first, second)), inside


def to_volume(affine: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Voxels of a crop `[..., 3]` in voxels of the volume, by its `crop_to_volume` `[3, 4]`."""
    return points @ affine[:, :3].T + affine[:, 3]


def to_crop(affine: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_volume`."""
    return (points - affine[:, 3]) @ torch.linalg.inv(affine[:, :3]).T


def _affine(matrix: np.ndarray, origin: np.ndarray) -> np.ndarray:
    return np.concatenate((matrix, origin[:, None]), axis=1)


def compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The affine `[3, 4]` of first `inner`, then `outer`."""
    return _affine(outer[:, :3] @ inner[:, :3], outer[:, :3] @ inner[:, 3] + outer[:, 3])
