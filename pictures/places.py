"""`report/places.png`: where crops of a volume lie, and where a Spatial-Aware network says that they lie, in mm."""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

from losses.places import gaps_between, similarity_of_places
from training.pictures import GREY

COLOURS = "#e69f00", "#56b4e9", "#e06fb0", "#3fbf8f", "#f0e442", "#d55e00", "#7aa2ff", "#cccccc"
BACKGROUND = "#101418"
DASHES = (0, (3, 2))
NUMBERS = "numbers: true | told, mm in three dimensions"
DRAWN = ("centres", "told_gaps", "told_places", "part_features", "part_centres")


def first_volume(
    batch: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], crops: int
) -> dict[str, torch.Tensor]:
    """What is drawn, on the CPU: the crops `[L, X, Y, Z]` of the first volume of a batch, and what was told of them.

    Args:
        batch: see `data.stream.Batch`.
        outputs: of `SpatialAware.outputs`.
    """
    views, spacing, present = (batch[key].unflatten(0, (crops, -1))[:, 0] for key in ("views", "spacing", "present"))
    channel = int(present[0].float().argmax())  # the first that is there
    seen = {"views": views[:, channel], "spacing": spacing, **{k: outputs[k][0] for k in DRAWN if k in outputs}}
    return {key: value.float().to("cpu", copy=True) for key, value in seen.items()}


def draw_places(
    seen: dict[str, torch.Tensor], report: Path, planes: tuple[tuple[str, int], ...], unit: float, kernel_width: float
) -> None:
    """Above, three planes: each crop where it lies, with its centre (dot), the place told (ring) and the gaps told.

    A place is known up to a shift that all crops share: those told are shifted to the mean of the true ones. A crop is
    shown by its middle plane; where crops lie behind each other, by the mean. Below, lengths of the gaps, true and
    told, and how alike the parts of the crops are, next to how alike they should be.

    Args:
        seen: of `first_volume`.
        report: folder.
        planes: see `planes_of`.
        unit, kernel_width: see `losses.places`.
    """
    centres = seen["centres"]
    gaps = gaps_between(centres)
    told_gaps = seen["told_gaps"] * unit if "told_gaps" in seen else None
    places = None
    if "told_places" in seen:
        places = seen["told_places"] * unit
        places = places + (centres - places).mean(dim=0)
        told_gaps = gaps_between(places) if told_gaps is None else told_gaps
    matrices = []
    if told_gaps is not None:
        lengths = [(f"{word} gaps, mm", of.norm(dim=-1)) for word, of in (("true", gaps), ("told", told_gaps))]
        matrices += [(title, of, "viridis", 0.0, float(lengths[0][1].max())) for title, of in lengths]
    if "part_features" in seen:
        alike = seen["part_features"] @ seen["part_features"].T
        should = similarity_of_places(seen["part_centres"], kernel_width)
        matrices += [("parts: as alike as they should be", should, "magma", 0.0, 1.0)]
        matrices += [("parts: as alike as their features are", alike, "magma", 0.0, 1.0)]
    if not matrices:
        return

    figure = plt.figure(figsize=(15, 9.4), constrained_layout=True)
    above, below = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    for cell, (plane, axis) in zip(above.subplots(1, 3), planes):
        _draw_plane(cell, seen, axis, places, told_gaps)
        cell.text(0.98, 0.98, plane, transform=cell.transAxes, color="white", fontsize=10, ha="right", va="top")
    mark = partial(plt.Line2D, [], [], color="grey")
    marks = [mark(marker="o", linestyle="", label="centre of a crop")]
    if places is not None:
        ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2}
        marks.append(mark(linestyle="", label="place told", **ring))
    if told_gaps is not None:
        marks += [mark(label="gap"), mark(linestyle=DASHES, label="gap told"), mark(linestyle="", label=NUMBERS)]
    above.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=9, frameon=False)
    for cell, (title, matrix, colours, low, high) in zip(below.subplots(1, len(matrices), squeeze=False)[0], matrices):
        image = cell.imshow(matrix.numpy(), cmap=colours, vmin=low, vmax=high)
        cell.set_title(title, fontsize=10)
        _label(cell, matrix, len(centres), high)
        if len(matrix) > len(centres):
            below.colorbar(image, ax=cell, shrink=0.8)
    figure.savefig(report / "places.png", dpi=110)
    plt.close(figure)


def _draw_plane(
    cell: plt.Axes,
    seen: dict[str, torch.Tensor],
    axis: int,
    places: torch.Tensor | None,
    told_gaps: torch.Tensor | None,
) -> None:
    u, v = (a for a in range(3) if a != axis)
    views, centres = seen["views"].numpy(), seen["centres"].numpy()
    dark, bright = np.quantile(views, (0.01, 0.995), axis=(1, 2, 3))[:, :, None, None, None]  # contrasts were changed
    views = ((views - dark) / np.maximum(bright - dark, 1e-6)).clip(0, 1)
    size = np.array(views.shape[1:]) * seen["spacing"].numpy()  # [L, 3], mm
    low, high = (centres - size / 2).min(axis=0), (centres + size / 2).max(axis=0)
    image, extent = _paste(np.take(views, views.shape[1 + axis] // 2, axis=1 + axis), seen, low, high, (u, v))
    cell.set_facecolor(BACKGROUND)
    cmap = GREY.with_extremes(bad=BACKGROUND)
    cell.imshow(image.T, cmap=cmap, origin="lower", extent=extent, vmin=0, vmax=1, interpolation="nearest")
    for number, (centre, box, colour) in enumerate(zip(centres, size, _colours(len(centres)))):
        corner = centre[[u, v]] - box[[u, v]] / 2
        cell.add_patch(Rectangle(corner, box[u], box[v], fill=False, edgecolor=colour, linewidth=1.8))
        at = corner + np.array((0.03, 0.97)) * box[[u, v]]
        cell.text(*at, f"{number + 1}", color=colour, fontsize=12, weight="bold", va="top")
    if told_gaps is not None:
        _draw_gaps(cell, centres, told_gaps.numpy(), (u, v))
    for number, (centre, colour) in enumerate(zip(centres, _colours(len(centres)))):
        cell.plot(*centre[[u, v]], "o", color=colour, markersize=8, markeredgecolor="black", zorder=5)
        if places is not None:
            place = places[number].numpy()[[u, v]]
            cell.plot(*place, "o", markersize=15, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=2.2)
    middle, reach = (low + high) / 2, 0.53 * (high - low).max()  # the same in all planes
    cell.set_xlim(middle[u] - reach, middle[u] + reach)
    cell.set_ylim(middle[v] - reach, middle[v] + reach)
    cell.set_aspect("equal")
    cell.tick_params(labelsize=8)
    cell.set_xlabel("mm from the middle of the volume", fontsize=8)


def _draw_gaps(cell: plt.Axes, centres: np.ndarray, told: np.ndarray, plane: tuple[int, int]) -> None:
    """Around all crops: arrows from each to the next, what was told dashed, with their lengths in three dimensions."""
    crops = len(centres)
    for start, colour in zip(range(crops if crops > 2 else 1), _colours(crops)):
        end = (start + 1) % crops
        first, last = centres[start][list(plane)], centres[end][list(plane)]
        tip = first + told[start, end][list(plane)]
        style = {"color": colour, "linewidth": 1.8, "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
        for to, line in ((last, "-"), (tip, DASHES)):
            arrow = {"arrowstyle": "-|>", "linestyle": line, **style}
            cell.annotate("", xy=to, xytext=first, arrowprops=arrow)
        true, guess = np.linalg.norm(centres[end] - centres[start]), np.linalg.norm(told[start, end])
        box = {"facecolor": BACKGROUND, "alpha": 0.75, "edgecolor": "none", "boxstyle": "round,pad=0.2"}
        words = f"{true:.0f} | {guess:.0f}"
        cell.text(*(first + last) / 2, words, color=colour, fontsize=8, ha="center", va="center", bbox=box, zorder=6)


def _paste(
    planes: np.ndarray, seen: dict[str, torch.Tensor], low: np.ndarray, high: np.ndarray, axes: tuple[int, int]
) -> tuple[np.ma.MaskedArray, tuple[float, ...]]:
    """Planes of crops `[L, U, V]` where they lie, on voxels as large as theirs; the mean where they overlap."""
    u, v = axes
    step, start = seen["spacing"][0].numpy()[[u, v]], low[[u, v]]
    size = np.ceil((high[[u, v]] - start) / step + 0.5).astype(int)
    total, count = np.zeros(size), np.zeros(size)
    for plane, centre in zip(planes, seen["centres"].numpy()[:, [u, v]]):
        first = np.round((centre - start) / step - np.array(plane.shape) / 2).astype(int)
        place = tuple(slice(at, at + n) for at, n in zip(first, plane.shape))
        total[place] += plane
        count[place] += 1
    end = start + size * step
    return np.ma.masked_where(count == 0, total / np.maximum(count, 1)), (start[0], end[0], start[1], end[1])


def _label(cell: plt.Axes, matrix: torch.Tensor, crops: int, high: float) -> None:
    """Name the crops along both axes; in a matrix of crops also its numbers, in one of parts lines between crops."""
    parts = len(matrix) // crops
    ticks, names = [parts * (number + 0.5) - 0.5 for number in range(crops)], range(1, crops + 1)
    cell.set_xticks(ticks, names, fontsize=9)
    cell.set_yticks(ticks, names, fontsize=9)
    for axis in (cell.xaxis, cell.yaxis):
        for tick, colour in zip(axis.get_ticklabels(), _colours(crops)):
            tick.set(color=colour, weight="bold")
    cell.tick_params(length=0)
    if parts == 1:
        for (row, column), value in np.ndenumerate(matrix.numpy()):
            shade = "black" if value > 0.6 * high else "white"
            cell.text(column, row, f"{value:.0f}", color=shade, ha="center", va="center", fontsize=11)
    else:
        for border in range(1, crops):
            cell.axhline(parts * border - 0.5, color="white", linewidth=1)
            cell.axvline(parts * border - 0.5, color="white", linewidth=1)


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
