"""What a masked reconstruction scores without having learned: a run that does not beat these has not begun to."""

import torch
import torch.nn.functional as F

from .reconstruction import counted_voxels, masked_huber

HALVINGS = 40  # of the range in which the best constant lies: to float32's rounding
REACH = 1.0  # blocks: standard deviation of the Gaussian by which visible blocks fill in hidden ones


@torch.no_grad()
def reconstruction_baselines(
    views: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, present: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The loss of three fillings that know nothing of anatomy, averaged exactly as the reconstruction term is.

    Compare them with that term on the same crops and masks, in evaluation mode: below `constant` the network has found
    the mean, below `visible_mean` how bright a crop is, below `interpolation` it begins to know what is hidden.

    Args:
        views: `[V, C, X, Y, Z]`, of which a student sees what is not masked.
        target: `[V, C, X, Y, Z]`, what it is to rebuild.
        mask: `[V, x, y, z]`, True = hidden; a block has `X / x`, `Y / y`, `Z / z` voxels, and may be a single one.
        present: `[V, C]`, whether there is such a channel.

    Returns:
        Three scalars on the device of the views: `constant`, of the one number that scores best over the whole batch,
        which is chosen with the target in view; `visible_mean`, of each crop's and channel's mean over its visible
        voxels; `interpolation`, of the means of visible blocks, smoothed over the grid by a Gaussian of `REACH` blocks
        that leaves hidden ones out, and interpolated linearly to voxels. A crop without a visible block is filled with
        0, the mean of a volume.
    """
    views, target = views.float(), target.float()
    size = views.shape[2:]
    hidden = mask[:, None]
    voxel_mask = F.interpolate(hidden.float(), size=size, mode="nearest").bool()
    seen = (~hidden).to(views.dtype)  # [V, 1, x, y, z]
    means = F.adaptive_avg_pool3d(views, mask.shape[1:]) * seen
    visible_mean = means.sum((2, 3, 4), keepdim=True) / seen.sum((2, 3, 4), keepdim=True).clamp(min=1)
    tiny = torch.finfo(views.dtype).tiny
    smooth = _spread(means) / _spread(seen).clamp(min=tiny)
    fillings = {
        "constant": best_constant(target, voxel_mask, present),
        "visible_mean": visible_mean,
        "interpolation": F.interpolate(smooth, size=size, mode="trilinear", align_corners=False),
    }
    return {
        name: masked_huber(filling.expand_as(target), target, voxel_mask, present) for name, filling in fillings.items()
    }


def reconstruction_levels(batch: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as `reconstruction_by_NAME`, of a batch whose masked voxels were rebuilt; nothing where none were."""
    if "reconstructed" not in outputs:
        return {}
    levels = reconstruction_baselines(batch["views"], batch["target"], batch["mask"], batch["present"])
    return {f"reconstruction_by_{name}": loss for name, loss in levels.items()}


def best_constant(target: torch.Tensor, voxel_mask: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """The number nearest to the masked voxels by `masked_huber`: a scalar.

    The slope of the loss, a clipped difference, only rises with the number: where it is 0 is found by halving.
    """
    weight = counted_voxels(voxel_mask, present).expand_as(target)
    low = target.masked_fill(~weight, float("inf")).amin()
    high = target.masked_fill(~weight, float("-inf")).amax()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rising = ((middle - target).clamp(-1, 1) * weight).sum() > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    return (low + high) / 2


def _spread(grid: torch.Tensor) -> torch.Tensor:
    """The sum over all blocks of `[V, C, x, y, z]`, weighted by a Gaussian of their distance."""
    for axis in (2, 3, 4):
        place = torch.arange(grid.shape[axis], device=grid.device, dtype=grid.dtype)
        weights = (-0.5 * ((place[:, None] - place) / REACH).square()).exp()
        grid = (grid.movedim(axis, -1) @ weights).movedim(-1, axis)
    return grid
