"""Cutting views from volumes: one interpolation does crop, mirror, rotation and zoom together.

A loader reads the smallest block of the volume that a view needs (`read_block`), the device interpolates in it
(`cut_views`); nothing larger than that block is ever made.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import spline_filter

from .stored_volume import Volume

SPLINE_REACH = 12  # voxels after which a cubic spline has forgotten its neighbours, to 1e-6
SPLINE_EDGE = 2  # coefficients beyond the border that voxels within it need


def read_block(
    volume: Volume | np.ndarray,
    affine: np.ndarray,
    crop_size: tuple[int, ...],
    interpolation: str,
    padding: float | np.ndarray = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a volume that a view reads.

    Args:
        affine: its `crop_to_volume`, `[3, 4]`.
        interpolation: "linear", "cubic" for splines, whose coefficients the block then holds, or "nearest" for labels.
        padding: what is around the volume, of each channel; the block is counted from it, and has 0 there.

    Returns:
        The block `[C, x, y, z]` clipped to the volume, float32 or the labels' whole numbers, and the affine from crop
        voxel to block voxel.
    """
    half = (np.asarray(crop_size) - 1) / 2
    middle = affine[:, :3] @ half + affine[:, 3]
    spline = interpolation == "cubic" and not is_a_copy(affine)
    reach = np.abs(affine[:, :3]) @ half + (SPLINE_REACH if spline else 0)
    last = np.array(volume.shape) - 1
    low = np.clip(np.floor(middle - reach), 0, last).astype(int)
    high = np.clip(np.ceil(middle + reach), 0, last).astype(int)
    part = volume[tuple(slice(a, b + 1) for a, b in zip(low, high))]
    part = part.reshape(-1, *part.shape[-3:])
    if interpolation == "nearest":
        block = torch.from_numpy(part if part.dtype == np.uint8 else part.astype(np.int32))
        return block, torch.from_numpy(_moved(affine, low))
    # torch unpacks half precision 5 times faster than numpy
    block = torch.from_numpy(part).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if np.any(padding):
        block -= torch.from_numpy(np.float32(padding).reshape(-1, 1, 1, 1))
    if spline:
        filtered = np.stack([spline_filter(c, order=3, output=np.float32, mode="reflect") for c in block.numpy()])
        block = torch.from_numpy(np.pad(filtered, [(0, 0), *[(SPLINE_EDGE,) * 2] * 3], mode="symmetric"))
        low -= SPLINE_EDGE
    return block, torch.from_numpy(_moved(affine, low))


def _moved(affine: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The affine to a block that starts at `low`."""
    return np.column_stack([affine[:, :3], affine[:, 3] - low])


def is_a_copy(affine: np.ndarray) -> bool:
    """Whether a view is at most shifted by whole voxels, mirrored and its axes swapped: nothing is interpolated."""
    matrix = np.abs(affine[:, :3])
    moves = ((matrix == 0) | (matrix == 1)).all() and (matrix.sum(0) == 1).all() and (matrix.sum(1) == 1).all()
    return bool(moves) and np.array_equal(affine[:, 3], np.round(affine[:, 3]))


def cut_views(
    blocks: list[torch.Tensor], affines: torch.Tensor, crop_size: tuple[int, ...], interpolation: str
) -> torch.Tensor:
    """Views `[N, C, X, Y, Z]` from their blocks, int64 of labels; outside the volume they are 0.

    Blocks differ in size, so each view is one launch; at millions of voxels each, that fills any device.

    Args:
        blocks, affines: of `read_block`: `N` tensors on one device, and `[N, 3, 4]` on the CPU.
    """
    kind = torch.int64 if interpolation == "nearest" else blocks[0].dtype
    views = blocks[0].new_zeros(len(blocks), len(blocks[0]), *crop_size, dtype=kind)
    for view, block, affine in zip(views, blocks, affines.numpy()):
        if is_a_copy(affine):
            _paste(view, block, affine)
        elif interpolation == "cubic":
            _interpolate_spline(view, block, affine)
        else:
            _interpolate(view, block, affine, "nearest" if interpolation == "nearest" else "bilinear")
    return views


def _paste(view: torch.Tensor, block: torch.Tensor, affine: np.ndarray) -> None:
    """Along each axis crop voxel `i` is block voxel `origin + i`, or `origin - i` where it is mirrored."""
    order = np.abs(affine[:, :3]).argmax(axis=0).tolist()  # axis of the block along each axis of the crop
    block = block.permute(0, *(1 + axis for axis in order))
    place, mirrored = [slice(None)], []
    for axis, of_block in enumerate(order):
        origin, size, sign = int(affine[of_block, 3]), block.shape[1 + axis], affine[of_block, axis]
        if sign < 0:
            mirrored.append(1 + axis)
        first = origin - size + 1 if sign < 0 else -origin
        place.append(slice(first, first + size))
    view[tuple(place)] = block.flip(mirrored)


def _interpolate(view: torch.Tensor, block: torch.Tensor, affine: np.ndarray, mode: str) -> None:
    unit = 2 / np.array(block.shape[1:])  # grid_sample spans any block by [-1, 1]: voxel 0 is half a voxel above -1
    grid = _empty_grid(view)
    for axis, row in enumerate(affine):
        _fill(grid[:, 0, :, :, 2 - axis], row * unit[axis], unit[axis] / 2 - 1)  # which wants Z first
    view.copy_(_lookup(block.float(), grid, mode))  # which has all labels exactly


def _interpolate_spline(view: torch.Tensor, coefficients: torch.Tensor, affine: np.ndarray) -> None:
    """Cubic B-spline by 8 trilinear lookups (Sigg & Hadwiger 2005, GPU Gems 2, ch. 20)."""
    ends, inside = [], torch.ones_like(view[0])
    for row, size in zip(affine, coefficients.shape[1:]):
        position = _fill(torch.empty_like(view[0]), row)
        border = SPLINE_EDGE - 0.5
        inside.mul_((position >= border) & (position <= size - 1 - border))
        low = position.floor()
        t = position - low
        first, last = (1 - t) ** 3 / 6, t**3 / 6
        upper = (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6 + last  # weight of the two taps above
        lower = 1 - upper
        places = low - first / lower, low + 1 + last / upper
        ends.append([(weight, (p + 0.5) * (2 / size) - 1) for weight, p in zip((lower, upper), places)])
    grid = _empty_grid(view)
    for corner in itertools.product(*ends):
        weight = inside
        for axis, (share, place) in enumerate(corner):
            weight = weight * share
            grid[:, 0, :, :, 2 - axis] = place
        view.add_(weight * _lookup(coefficients, grid))


def _empty_grid(view: torch.Tensor) -> torch.Tensor:
    x, y, z = view.shape[1:]
    return torch.empty(x, 1, y, z, 3, device=view.device)


def _fill(out: torch.Tensor, row: np.ndarray, shift: float = 0.0) -> torch.Tensor:
    """One row of an affine at all crop voxels: `out` `[X, Y, Z]`."""
    a, b, c, origin = row.tolist()
    x, y, z = (torch.arange(n, dtype=torch.float32, device=out.device) for n in out.shape)
    return torch.add((a * x + (origin + shift))[:, None, None] + (b * y)[:, None], c * z, out=out)


def _lookup(block: torch.Tensor, grid: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """Trilinear interpolation of a block `[C, x, y, z]` at `[X, 1, Y, Z, 3]`, or the nearest: slabs along X, so that
    all threads of a CPU work."""
    source = block.expand(len(grid), -1, -1, -1, -1)
    return F.grid_sample(source, grid, mode, align_corners=False)[:, :, 0].movedim(0, 1)
