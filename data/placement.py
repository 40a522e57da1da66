"""What was computed on a prepared volume, brought back onto the grid of its file. Goes to the Hub too."""

from typing import NamedTuple

import numpy as np
import torch


class Placed(NamedTuple):
    """A prepared volume, and where it lies in the file that it comes from."""

    voxels: np.ndarray  # float32 [C, X, Y, Z]
    padding: list[float]  # what is around it, of each channel
    spacing: tuple[float, ...]  # mm of its voxels, along its axes
    to_source: np.ndarray  # [3, 4], from its voxels to the file's: a scale an axis, axes may be swapped and mirrored
    shape: tuple[int, ...]  # of the file
    affine: np.ndarray  # [4, 4], from the file's voxels to mm in the scanner


def to_source_grid(scores: torch.Tensor, placed: Placed) -> torch.Tensor:
    """Scores of classes `[K, X, Y, Z]` on the prepared volume -> `[K, *placed.shape]` on the grid of the file.

    Linear interpolation; outside of the prepared volume, which was cropped to its foreground, class 0 has 1, all others
    0: give probabilities.
    """
    matrix, origin = placed.to_source[:, :3], placed.to_source[:, 3]
    order = np.abs(matrix).argmax(axis=1)  # the prepared axis along each axis of the file
    weights = [
        _weights(n, scores.shape[1 + axis], matrix[row, axis], origin[row]).to(scores)
        for row, (axis, n) in enumerate(zip(order, placed.shape))
    ]
    out = scores.permute(0, *(1 + int(axis) for axis in order))
    for axis in np.argsort([len(w) / w.shape[1] for w in weights]).tolist():  # first what makes it smaller
        out = torch.movedim(torch.movedim(out, 1 + axis, -1) @ weights[axis].T, -1, 1 + axis)
    inside = [w.sum(1) for w in weights]
    out[0] += 1 - inside[0][:, None, None] * inside[1][:, None] * inside[2]
    return out


def _weights(size: int, prepared: int, scale: float, origin: float) -> torch.Tensor:
    """Of linear interpolation along an axis, `[size, prepared]`; rows outside of the prepared volume are 0."""
    place = torch.from_numpy((np.arange(size) - origin) / scale)  # of the file's voxels, in prepared ones
    inside = (place > -0.5) & (place <= prepared - 0.5)
    place = place.clamp(0, prepared - 1)
    low = place.floor().long()
    share = place - low
    rows = torch.zeros(size, prepared, dtype=torch.float64)
    rows.scatter_add_(1, low[:, None], (1 - share)[:, None])
    rows.scatter_add_(1, (low + 1).clamp(max=prepared - 1)[:, None], share[:, None])
    return rows * inside[:, None]
