"""Alice's picture: the same places in crops of two patients, and where queries look."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from data.views import to_crop, to_volume
from training.pictures import save, show

DOTS = (0.3, 0.7)  # where in a crop they lie, along each axis of a plane
QUERIES = 4
SHOWN = ("views", "present", "crop_to_frame", "query_places", "student_attention", "teacher_attention")


def pair_of(batch: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is drawn, on the CPU: the two crops of the first sample, and where their queries look, if they do."""
    rows = (batch["pair"] == batch["pair"][0]).nonzero().flatten()[:2]
    both = batch | outputs
    return {key: both[key][rows].to("cpu", copy=True) for key in SHOWN if key in both}


def draw_patients(report: Path, planes: tuple[tuple[str, int], ...], pair: dict[str, torch.Tensor]) -> None:
    """Draw `patients.png`.

    Above, both crops in three planes: dots of one colour are one place in the frame that patients share. Those of the
    first crop lie in its middle planes; the second is cut where they are on average. Below, for a few queries of the
    first crop, where the student's and the teacher's attention go (red, summed through the crop), and the query's own
    place (ring), in whose plane the crop is shown.
    """
    channel = int(pair["present"][0].float().argmax())
    views = pair["views"][:, channel].float()
    attends = "query_places" in pair
    figure = plt.figure(figsize=(15, 9.2 if attends else 3.2), constrained_layout=True)
    above, *below = figure.subfigures(2, 1, height_ratios=(1, 2.0)) if attends else (figure,)
    above.suptitle("the same part of two patients: dots of one colour are one place in their frame", fontsize=10)
    _draw_places(above.subplots(1, 6), views, pair["crop_to_frame"], planes)
    if attends:
        below[0].suptitle(
            "where queries of the first crop look (red, summed through the crop), and where they come from (ring)",
            fontsize=10,
        )
        _draw_attention(below[0].subplots(2, QUERIES), views[0], pair, planes[-1])
    save(figure, report / "patients.png")


def _draw_places(cells, views, crop_to_frame, planes):
    size = torch.tensor(views.shape[1:])
    low, high = _window(views)
    colours = plt.get_cmap("tab10").colors
    for (plane, axis), pictures in zip(planes, cells.reshape(3, 2)):
        u, v = (a for a in range(3) if a != axis)
        places = (size - 1).float().div(2).repeat(len(DOTS) ** 2, 1)
        places[:, u], places[:, v] = (torch.cartesian_prod(*[torch.tensor(DOTS)] * 2) * (size[[u, v]] - 1)).T
        there = to_crop(crop_to_frame[1], to_volume(crop_to_frame[0], places))
        seen = ((there >= -0.5) & (there <= size - 0.5)).all(1)
        for name, cell, view, dots in (
            ("first", pictures[0], views[0], places),
            ("second", pictures[1], views[1], there),
        ):
            depth = dots[seen, axis].mean() if seen.any() else size[axis] / 2
            show(cell, view.numpy(), axis, int(depth.round().clamp(0, size[axis] - 1)), low, high)
            kept = seen if dots is there else torch.ones_like(seen)
            numbers = np.arange(len(dots))
            for number in numbers[kept.numpy()]:
                x, y = dots[number, [u, v]].tolist()
                cell.scatter(x, y, color=colours[number], s=60, edgecolors="white", linewidths=1)
            cell.set_title(f"{name} patient, {plane}", fontsize=9)


def _draw_attention(cells, view, pair, plane):
    (name, axis), size = plane, np.array(view.shape)
    u, v = (a for a in range(3) if a != axis)
    places = pair["query_places"][0].numpy()
    low, high = _window(view)
    for column, query in enumerate(np.linspace(0, len(places) - 1, QUERIES + 2).round().astype(int)[1:-1]):
        place = places[query]
        for cell, who in zip(cells[:, column], ("student", "teacher")):
            attention = pair[f"{who}_attention"][0, query].numpy()
            show(cell, view.numpy(), axis, int(place[axis] * size[axis]), low, high)
            along = attention.sum(axis).T
            red = np.zeros((*along.shape, 4))
            red[..., 0], red[..., 3] = 1.0, 0.7 * along / along.max()
            extent = (-0.5, size[u] - 0.5, -0.5, size[v] - 0.5)
            cell.imshow(red, origin="lower", extent=extent, interpolation="nearest")
            x, y = place[[u, v]] * size[[u, v]] - 0.5
            cell.scatter(x, y, s=90, facecolors="none", edgecolors="cyan", linewidths=2)
            strongest = attention.max() * attention.size
            cell.set_title(f"{who}, {name}: at most {strongest:.1f} x even", fontsize=9)


def _window(views: torch.Tensor) -> tuple[float, float]:
    return tuple(float(q) for q in np.quantile(views.numpy(), (0.01, 0.999)))
