"""The pictures of `report/`: how the losses went, what is reconstructed, what the two views share."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

from data.views import shared_box, to_crop

GREY = plt.get_cmap("gray").with_extremes(bad="#31506e")  # hidden voxels are blue
PLANES = (("sagittal", 0), ("coronal", 1), ("axial", 2))  # name and the axis it cuts, for RAS volumes


def draw_losses(records: list[dict[str, float]], path: Path) -> None:
    """Each part of the loss, and the collapse monitors, over the steps."""
    keys = ["loss", "reconstruction", "consistency", "contrastive", "contrastive_accuracy", "feature_std"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, constrained_layout=True)
    for key, axis in zip(keys, axes.flat):
        axis.plot([r["step"] for r in records], [r[key] for r in records], linewidth=1.2)
        axis.set_title(key.replace("_", " "))
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=min(0.0, min((r[key] for r in records), default=0.0)))
    for axis in axes[1]:
        axis.set_xlabel("step")
    _save(figure, path)


def draw_reconstruction(crop: torch.Tensor, mask: torch.Tensor, reconstruction: torch.Tensor, path: Path) -> None:
    """Input, what the student saw, and its reconstruction, in three planes through the middle.

    Args:
        crop, reconstruction: `[X, Y, Z]`.
        mask: `[X, Y, Z]`, True = hidden.
    """
    low, high = float(crop.min()), float(crop.max())
    hidden = crop.masked_fill(mask, float("nan"))
    filled = torch.where(mask, reconstruction, crop)
    columns = (("input", crop), ("masked input", hidden), ("reconstruction of the masked part", filled))
    figure, axes = plt.subplots(3, 3, figsize=(9, 9), constrained_layout=True)
    for row, (plane, axis) in zip(axes, PLANES):
        for cell, (title, volume) in zip(row, columns):
            _show(cell, volume.numpy(), axis, volume.shape[axis] // 2, low, high)
            cell.set_title(f"{title}, {plane}", fontsize=9)
    _save(figure, path)


def draw_views(views: torch.Tensor, affines: torch.Tensor, path: Path) -> None:
    """Two views in three planes through the centre of the region they share, which is framed.

    Args:
        views: `[2, X, Y, Z]`.
        affines: their `crop_to_volume`, `[2, 3, 4]`.
    """
    low, high = shared_box(affines, tuple(views.shape[1:]))
    corners = to_crop(affines, torch.stack((low, high), dim=1).repeat(2, 1, 1))  # [2 views, 2 corners, 3]
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), constrained_layout=True)
    for number, (row, view, ends) in enumerate(zip(axes, views, corners), start=1):
        first, last = ends.amin(0).numpy(), ends.amax(0).numpy()
        for cell, (plane, axis) in zip(row, PLANES):
            _show(
                cell,
                view.numpy(),
                axis,
                round(float(first[axis] + last[axis]) / 2),
                float(views.min()),
                float(views.max()),
            )
            u, v = (a for a in range(3) if a != axis)
            corner, width, height = (first[u], first[v]), last[u] - first[u], last[v] - first[v]
            cell.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="tab:orange", linewidth=2))
            cell.set_title(f"view {number}, {plane}", fontsize=9)
    figure.suptitle("two views of one volume; the frame is the region that they share", fontsize=10)
    _save(figure, path)


def _show(cell: plt.Axes, volume: np.ndarray, axis: int, index: int, low: float, high: float) -> None:
    plane = np.take(volume, index, axis=axis)
    cell.imshow(np.ma.masked_invalid(plane.T), cmap=GREY, origin="lower", vmin=low, vmax=high, interpolation="nearest")
    cell.set_axis_off()


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
