"""Dense consistency of two views where they overlap (CVA, arXiv 2509.13846)."""

import torch
import torch.nn.functional as F


def sample_cells(
    features: torch.Tensor, points: torch.Tensor, crop_size: tuple[int, ...], samples_per_cell: int
) -> torch.Tensor:
    """Read a dense feature map at places given in voxels of its crop, and average neighbouring places to cells.

    Voxel `i` of a crop of `n` voxels is centred at `i` and the crop spans `[-0.5, n - 0.5]`, whatever the stride of the
    feature map; feature cell `k` of stride `s` is centred at `s * k + (s - 1) / 2`.

    Args:
        features: `[B, C, x, y, z]`.
        points: `[B, p, q, r, 3]`, in (X, Y, Z) order, `samples_per_cell` of them a cell and axis.
        crop_size: voxels of the crop, (X, Y, Z).

    Returns:
        `[B, C, cells...]`, float32.
    """
    axes = [(points[..., axis] + 0.5) * (2 / crop_size[axis]) - 1 for axis in (2, 1, 0)]  # grid_sample wants Z first
    grid = torch.stack(axes, dim=-1)
    with torch.autocast(features.device.type, enabled=False):
        sampled = F.grid_sample(features.float(), grid.float(), padding_mode="border", align_corners=False)
        return F.avg_pool3d(sampled, samples_per_cell)


def cosine_consistency(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over crops and cells of `2 - 2 cos(student, teacher)`: 0 when they agree, 2 when they are unrelated.

    Args:
        student, teacher: `[B, C, cells...]`; row `b` of both is the same region, seen in different views.
    """
    return (2 - 2 * F.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()
