"""The pictures of `report/`: losses, reconstruction, the places that are compared, and what the features see."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from .metrics import BOOKKEEPING

GREY = plt.get_cmap("gray").with_extremes(bad="#31506e")  # hidden voxels are blue
CELL_DEPTH = 4.0  # voxels: how far a centre may lie from the plane in which it is drawn
PLANE_NAMES = {"RL": "sagittal", "AP": "coronal", "SI": "axial"}


def planes_of(orientation: str) -> tuple[tuple[str, int], ...]:
    """Name of each plane and the axis that it cuts, for volumes of an orientation such as RAS."""
    names = [next(name for ends, name in PLANE_NAMES.items() if letter in ends) for letter in orientation]
    return tuple(zip(names, range(3)))


def draw_losses(
    records: list[dict[str, float]], terms: dict[str, str], path: Path, held_out: Sequence[dict[str, float]] = ()
) -> None:
    """The loss, its terms and all that was watched of them, over the steps.

    Args:
        records: of `metrics.jsonl`.
        terms: name of each term -> what it is.
        held_out: records of `held_out.jsonl`; what scores without learning is drawn as a level.
    """
    keys = dict.fromkeys(key for record in records for key in record)
    watched = (key for key in keys if not key.startswith("gradient_of_") and key not in (*BOOKKEEPING, "loss", *terms))
    names = ["loss", *(term for term in terms if term in keys), *watched]
    rows, columns = (2, -(-len(names) // 2)) if len(names) > 3 else (1, len(names))
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3 * rows), sharex=True, squeeze=False, constrained_layout=True
    )
    for name, axis in zip(names, axes.flat):
        steps, values = zip(*((r["step"], r[name]) for r in records if name in r)) if records else ((), ())
        axis.plot(steps, values, linewidth=1.2)
        if seen := [(record["step"], record[name]) for record in held_out if name in record]:
            axis.plot(*zip(*seen), "o", color="black", markersize=4, label="held out")
            levels = {k.removeprefix(f"{name}_by_"): v for k, v in held_out[-1].items() if k.startswith(f"{name}_by_")}
            for number, (what, level) in enumerate(levels.items()):
                axis.axhline(level, linestyle=":", color=f"C{number + 1}", label=what.replace("_", " "))
            axis.legend(fontsize=7)
            values = (*values, *levels.values())
        words = textwrap.fill(terms.get(name, ""), 44)
        axis.set_title(f"{name.replace('_', ' ')}\n{words}".strip(), fontsize=9)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=min(0.0, *values, 0.0))
    figure.supxlabel("step", fontsize=9)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    save(figure, path)


def draw_reconstruction(
    crop: torch.Tensor, mask: torch.Tensor, reconstruction: torch.Tensor, path: Path, planes: tuple
) -> None:
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
    for row, (plane, axis) in zip(axes, planes):
        for cell, (title, volume) in zip(row, columns):
            show(cell, volume.numpy(), axis, volume.shape[axis] // 2, low, high)
            cell.set_title(f"{title}, {plane}", fontsize=9)
    save(figure, path)


def draw_alignment(
    views: list[torch.Tensor],
    points: list[torch.Tensor],
    inside: list[torch.Tensor],
    path: Path,
    planes: tuple[tuple[str, int], ...],
    titles: tuple[str, ...] = ("",),
) -> None:
    """Pairs of views, a row each, with the centres of the cells that are compared: the same colour is the same place.

    Each picture shows the plane in which most centres lie, and the centres within a cell of it.

    Args:
        views: of each pair `[2, X, Y, Z]`.
        planes: those to draw, see `planes_of`.
        points, inside: of each pair `[2, P, S, 3]` and `[P]`, see `alignment_points`.
    """
    columns = 2 * len(planes)
    figure, axes = plt.subplots(
        len(views), columns, figsize=(3.1 * columns, 3.4 * len(views)), squeeze=False, constrained_layout=True
    )
    for row, pair, places, reached, title in zip(axes, views, points, inside, titles):
        low, high = (float(q) for q in np.quantile(pair.numpy(), (0.01, 0.999)))
        if not reached.any():
            row[0].set_title("the views share no cell", fontsize=9)
        centres = places[:, reached].mean(dim=2).numpy()  # [2, cells, 3]
        lowest, highest = (f(centres[0], axis=0, initial=s) for f, s in ((np.min, np.inf), (np.max, -np.inf)))
        colours = (0.15 + 0.85 * (centres[0] - lowest) / np.maximum(highest - lowest, 1e-6)).clip(0, 1)  # rounding
        pictures = [(plane, number) for plane in planes for number in (0, 1)]
        for cell, ((plane, axis), number) in zip(row, pictures):
            depth = centres[number][:, axis]
            middle = depth[np.abs(depth - np.median(depth)).argmin()] if len(depth) else pair.shape[1 + axis] / 2
            show(cell, pair[number].numpy(), axis, round(float(middle)), low, high)
            near = np.abs(depth - middle) < CELL_DEPTH
            u, v = (a for a in range(3) if a != axis)
            flat = centres[number][near]
            cell.scatter(flat[:, u], flat[:, v], c=colours[near], s=34, edgecolors="black", linewidths=0.7)
            cell.set_title(f"{title}view {number + 1}, {plane}", fontsize=9)
    save(figure, path)


def draw_features(views: torch.Tensor, dense: torch.Tensor, place: torch.Tensor, path: Path, planes: tuple) -> None:
    """Views and their dense features, the three main components of all together as red, green and blue.

    Where the features agree on what a place is, it has the same colour in all views.

    Args:
        views: `[V, X, Y, Z]`.
        dense: `[V, D, x, y, z]`.
        place: `[V, 3]`, the same place in voxels of each view; the planes go through it.
    """
    rows = torch.nn.functional.normalize(dense.movedim(1, -1).flatten(0, -2), dim=1)
    rows = rows - rows.mean(0)
    _, directions = torch.linalg.eigh(rows.T @ rows)  # ascending
    main = rows @ directions[:, -3:].flip(1)
    low, high = (torch.tensor(np.quantile(main.numpy(), q, axis=0)) for q in (0.02, 0.98))
    colours = ((main - low) / (high - low)).clamp(0, 1).view(len(views), *dense.shape[2:], 3).numpy()
    size = 15, 2.7 * len(views)
    figure, axes = plt.subplots(len(views), 6, figsize=size, squeeze=False, constrained_layout=True)
    for number, (row, view, colour) in enumerate(zip(axes, views, colours), start=1):
        for (plane, axis), left, right in zip(planes, row[::2], row[1::2]):
            index = min(max(round(float(place[number - 1, axis])), 0), view.shape[axis] - 1)
            show(left, view.numpy(), axis, index, float(views.min()), float(views.max()))
            left.set_title(f"view {number}, {plane}", fontsize=9)
            cells = np.take(colour, index * colour.shape[axis] // view.shape[axis], axis=axis)
            right_end, upper_end = (n for a, n in enumerate(view.shape) if a != axis)
            right.imshow(
                cells.swapaxes(0, 1), origin="lower", interpolation="nearest", extent=(0, right_end, 0, upper_end)
            )
            right.set_axis_off()
    save(figure, path)


def show(cell: plt.Axes, volume: np.ndarray, axis: int, index: int, low: float, high: float) -> None:
    plane = np.take(volume, index, axis=axis)
    cell.imshow(np.ma.masked_invalid(plane.T), cmap=GREY, origin="lower", vmin=low, vmax=high, interpolation="nearest")
    cell.set_axis_off()


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
