"""What a cell of one crop was matched with in the other, and where its place really is."""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from losses.local_alignment import best_in_window, match_errors, places_of
from training.pictures import save, show

ANCHORS = 12


class Match(NamedTuple):
    """Of the first sample of a batch, on the CPU; lengths in voxels of the crops unless they are in mm."""

    views: torch.Tensor  # [2, X, Y, Z]
    centre: torch.Tensor  # [P, 3], of each cell in its own crop
    found: torch.Tensor  # [P, 3], of its match in the other crop
    true: torch.Tensor  # [P, 3], its place in the other crop
    shown: torch.Tensor  # [P], whether the other crop shows it
    error: torch.Tensor  # [P], mm from the match to the place
    shift: torch.Tensor  # [P], mm from the place to the cell itself


def match_of(batch: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], reach: int) -> Match:
    """What `draw_matches` draws: the cells of view 1 of the first sample, and their matches in view 2."""
    rows = (batch["pair"] == batch["pair"][0]).nonzero().flatten()[:2]
    cells, place, size = (outputs[key][rows] for key in ("cells", "place", "cell_size"))
    best = best_in_window(cells, cells.flip(0), reach)
    grid = cells.shape[1:4]
    error, shown = match_errors(best, grid, place, size)
    channel = int(batch["present"][rows[0]].float().argmax())
    views = batch["views"][rows, channel]
    stride = torch.tensor([n / cells for n, cells in zip(views.shape[1:], grid)])
    centre = (places_of(grid, torch.device("cpu")) + 0.5) * stride - 0.5
    found, error = centre[best[0].cpu()], error[0].cpu()
    spacing = (batch["spacing"][rows[0]]).cpu()
    true = found - error / spacing
    shift = ((centre - true) * spacing).norm(dim=-1)
    views = views.float().to("cpu", copy=True)
    return Match(views, centre, found, true, shown[0].cpu(), error.norm(dim=-1), shift)


def draw_matches(match: Match, report: Path, planes: tuple[tuple[str, int], ...]) -> None:
    """Some cells of a plane of view 1, the match of each in view 2 as a ring, its place as a dot, and all distances."""
    name, axis = planes[-1]
    across = [a for a in range(3) if a != axis]
    layers = match.centre[:, axis].unique()
    layer = layers[len(layers) // 2]
    low, high = (float(q) for q in np.quantile(match.views.numpy(), (0.01, 0.999)))
    bright = match.views[0][tuple(match.centre.round().long().T)]
    candidates = ((match.centre[:, axis] == layer) & match.shown).nonzero().flatten()
    tissue = candidates[bright[candidates] > match.views[0].median()]
    candidates = tissue if len(tissue) >= ANCHORS else candidates
    chosen = candidates[torch.linspace(0, len(candidates) - 1, min(ANCHORS, len(candidates))).round().long()]
    colours = plt.get_cmap("hsv")(np.linspace(0, 1, len(chosen), endpoint=False))

    figure, axes = plt.subplots(
        2, 2, figsize=(11, 9.5), constrained_layout=True, gridspec_kw={"height_ratios": (2.4, 1)}
    )
    depth = float(layer), float(match.true[chosen, axis].mean()) if len(chosen) else float(layer)
    for cell, view, at in zip(axes[0], match.views, depth):
        index = min(max(round(at), 0), view.shape[axis] - 1)
        show(cell, view.numpy(), axis, index, low, high)
    axes[0, 0].set_title(f"view 1, {name}: cells", fontsize=10, pad=18)
    axes[0, 1].set_title(f"view 2, {name}: ring = match, dot = true place, mm between", fontsize=10, pad=18)
    for number, colour in zip(chosen.tolist(), colours):
        centre, true, found = (places[number, across].numpy() for places in (match.centre, match.true, match.found))
        dot = {"s": 60, "color": colour, "edgecolors": "black", "linewidths": 0.8, "zorder": 3}
        axes[0, 0].scatter(*centre, **dot)
        axes[0, 1].scatter(*true, **dot)
        axes[0, 1].scatter(*found, s=150, facecolors="none", edgecolors=colour, linewidths=2.2, zorder=2)
        axes[0, 1].plot(*zip(true, found), color=colour, linewidth=1.4, zorder=2)
        words = {"fontsize": 8, "color": "white", "zorder": 4, "ha": "left", "va": "bottom"}
        axes[0, 1].annotate(
            f"{match.error[number]:.0f}", true, xytext=(5, 4), textcoords="offset points", **words
        ).set_bbox({"facecolor": "black", "alpha": 0.55, "pad": 0.6, "linewidth": 0})
    error, shift = match.error[match.shown].numpy(), match.shift[match.shown].numpy()
    most = max(1.0, *error, *shift) if len(error) else 1.0
    for cell, values, title in zip(axes[1], (error, shift), ("match error", "shift: each cell matched to itself")):
        cell.hist(values, bins=np.linspace(0, most, 30), color="0.55")
        if len(values):
            cell.axvline(values.mean(), color="C3", label=f"mean {values.mean():.1f} mm")
            cell.legend(fontsize=9)
        cell.set_title(f"{title}, all cells that view 2 shows", fontsize=10)
        cell.set_xlabel("mm", fontsize=9)
    save(figure, report / "matches.png")
