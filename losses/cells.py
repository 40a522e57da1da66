"""Reading dense features at given places, averaged to cells."""

import itertools

import torch
import torch.nn.functional as F


def sample_cells(features: torch.Tensor, points: torch.Tensor, crop_size: tuple[int, ...]) -> torch.Tensor:
    """Interpolate a dense feature map at places given in voxels of its crop, and average the places of a cell.

    Voxel `i` of a crop of `n` voxels is centred at `i` and the crop spans `[-0.5, n - 0.5]`, whatever the stride of the
    feature map; feature cell `k` of stride `s` is centred at `s * k + (s - 1) / 2`. Trilinear; beyond the outermost
    centres the features are those of the border. Interpolation and average are one weighted sum a cell, so nothing of
    the size of all places is made; fastest where channels come last in memory, as after a linear layer.

    Args:
        features: `[N, D, x, y, z]`.
        points: `[N, P, S, 3]`, in (X, Y, Z) order: `S` places a cell.
        crop_size: voxels of the crop, (X, Y, Z).

    Returns:
        `[N, P, D]`, float32.
    """
    rows = features.movedim(1, -1)
    grid = rows.shape[1:4]
    lower, upper, share = [], [], []
    for axis, (cells, voxels) in enumerate(zip(grid, crop_size)):
        place = ((points[..., axis].float() + 0.5) * (cells / voxels) - 0.5).clamp(0, cells - 1)
        below = place.floor()
        lower.append(below.long())
        upper.append((below.long() + 1).clamp(max=cells - 1))
        share.append(place - below)
    first = torch.arange(len(rows), device=points.device).view(-1, 1, 1) * grid[0]
    index, weight = [], []
    for corner in itertools.product((False, True), repeat=3):
        x, y, z = (up if high else low for high, low, up in zip(corner, lower, upper))
        wx, wy, wz = (s if high else 1 - s for high, s in zip(corner, share))
        index.append(((first + x) * grid[1] + y) * grid[2] + z)
        weight.append(wx * wy * wz)
    bags = torch.stack(index, dim=-1).flatten(0, 1).flatten(1)  # [N * P, S * 8]
    weights = torch.stack(weight, dim=-1).flatten(0, 1).flatten(1) / points.shape[2]
    with torch.autocast(features.device.type, enabled=False):
        table = rows.flatten(0, 3)
        table = table.float() if table.dtype in (torch.float16, torch.bfloat16) else table
        cells = F.embedding_bag(bags, table, per_sample_weights=weights.to(table.dtype), mode="sum")
    return cells.unflatten(0, points.shape[:2])
