"""Cutting views from volumes: one interpolation does crop, mirror, rotation and zoom together.

A loader reads the smallest block of the volume that a view needs (`read_block`), the device interpolates in it
(`cut_views`); nothing larger than that block is ever made.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import spline_filter

SPLINE_REACH = 12  # voxels after which a cubic spline has forgotten its neighbours, to 1e-6
SPLINE_EDGE = 2  # coefficients beyond the border that voxels within it need


def read_block(
    volume: np.ndarray, affine: np.ndarray, crop_size: tuple[int, ...], interpolation: str, padding: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a volume that a view reads.

    Args:
        affine: its `crop_to_volume`, `[3, 4]`.
        interpolation: "linear", or "cubic" for splines, whose coefficients the block then holds.
        padding: what is around the volume; the block is counted from it, and has 0 there.

    Returns:
        The block `[x, y, z]` float32, clipped to the volume, and the affine from crop voxel to block voxel.
    """
    half = (np.asarray(crop_size) - 1) / 2
    middle = affine[:, :3] @ half + affine[:, 3]
    spline = interpolation == "cubic" and not is_a_copy(affine)
    reach = np.abs(affine[:, :3]) @ half + (SPLINE_REACH if spline else 0)
    last = np.array(volume.shape) - 1
    low = np.clip(np.floor(middle - reach), 0, last).astype(int)
    high = np.clip(np.ceil(middle + reach), 0, last).astype(int)
    part = volume[tuple(slice(a, b + 1) for a, b in zip(low, high))]
    # torch unpacks half precision 5 times faster than numpy
    block = torch.from_numpy(part).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if padding:
        block -= padding
    if spline:
        filtered = spline_filter(block.numpy(), order=3, output=np.float32, mode="reflect")
        block = torch.from_numpy(np.pad(filtered, SPLINE_EDGE, mode="symmetric"))
        low -= SPLINE_EDGE
    moved = affine.copy()
    moved[:, 3] -= low
    return block, torch.from_numpy(moved)


def is_a_copy(affine: np.ndarray) -> bool:
    """Whether a view is at most shifted by whole voxels and mirrored, so that nothing is interpolated."""
    return np.array_equal(np.abs(affine[:, :3]), np.eye(3)) and np.array_equal(affine[:, 3], np.round(affine[:, 3]))


def cut_views(
    blocks: list[torch.Tensor], affines: torch.Tensor, crop_size: tuple[int, ...], interpolation: str
) -> torch.Tensor:
    """Views `[N, 1, X, Y, Z]` from their blocks; outside the volume they are 0.

    Blocks differ in size, so each view is one launch; at millions of voxels each, that fills any device.

    Args:
        blocks, affines: of `read_block`: `N` tensors on one device, and `[N, 3, 4]` on the CPU.
    """
    views = blocks[0].new_zeros(len(blocks), 1, *crop_size)
    for view, block, affine in zip(views[:, 0], blocks, affines.numpy()):
        if is_a_copy(affine):
            _paste(view, block, affine)
        elif interpolation == "cubic":
            _interpolate_spline(view, block, affine)
        else:
            _interpolate_linear(view, block, affine)
    return views


def _paste(view: torch.Tensor, block: torch.Tensor, affine: np.ndarray) -> None:
    """Crop voxel `i` is block voxel `origin + i`, or `origin - i` where the axis is mirrored."""
    place, mirrored = [], []
    for axis, size in enumerate(block.shape):
        origin = int(affine[axis, 3])
        if affine[axis, axis] < 0:
            mirrored.append(axis)
        first = origin - size + 1 if affine[axis, axis] < 0 else -origin
        place.append(slice(first, first + size))
    view[tuple(place)] = block.flip(mirrored)


def _interpolate_linear(view: torch.Tensor, block: torch.Tensor, affine: np.ndarray) -> None:
    unit = 2 / np.array(block.shape)  # grid_sample spans any block by [-1, 1]: voxel 0 is half a voxel above -1
    grid = torch.empty(view.shape[0], 1, *view.shape[1:], 3, device=view.device)
    for axis, row in enumerate(affine):
        _fill(grid[:, 0, :, :, 2 - axis], row * unit[axis], unit[axis] / 2 - 1)  # which wants Z first
    view.copy_(_lookup(block, grid))


def _interpolate_spline(view: torch.Tensor, coefficients: torch.Tensor, affine: np.ndarray) -> None:
    """Cubic B-spline by 8 trilinear lookups (Sigg & Hadwiger 2005, GPU Gems 2, ch. 20)."""
    ends, inside = [], torch.ones_like(view)
    for row, size in zip(affine, coefficients.shape):
        position = _fill(torch.empty_like(view), row)
        border = SPLINE_EDGE - 0.5
        inside.mul_((position >= border) & (position <= size - 1 - border))
        low = position.floor()
        t = position - low
        first, last = (1 - t) ** 3 / 6, t**3 / 6
        upper = (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6 + last  # weight of the two taps above
        lower = 1 - upper
        places = low - first / lower, low + 1 + last / upper
        ends.append([(weight, (p + 0.5) * (2 / size) - 1) for weight, p in zip((lower, upper), places)])
    grid = torch.empty(view.shape[0], 1, *view.shape[1:], 3, device=view.device)
    for corner in itertools.product(*ends):
        weight = inside
        for axis, (share, place) in enumerate(corner):
            weight = weight * share
            grid[:, 0, :, :, 2 - axis] = place
        view.add_(weight * _lookup(coefficients, grid))


def _fill(out: torch.Tensor, row: np.ndarray, shift: float = 0.0) -> torch.Tensor:
    """One row of an affine at all crop voxels: `out` `[X, Y, Z]`."""
    a, b, c, origin = row.tolist()
    x, y, z = (torch.arange(n, dtype=torch.float32, device=out.device) for n in out.shape)
    return torch.add((a * x + (origin + shift))[:, None, None] + (b * y)[:, None], c * z, out=out)


def _lookup(block: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Trilinear interpolation of a block at `[X, 1, Y, Z, 3]`: slabs along X, so that all threads of a CPU work."""
    source = block.expand(len(grid), 1, -1, -1, -1)
    return F.grid_sample(source, grid, align_corners=False)[:, 0, 0]
