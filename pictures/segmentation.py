"""True and predicted classes on planes of volumes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch

from training.pictures import save, show


class Segmented(NamedTuple):
    """A volume, all parts `[X, Y, Z]` on the CPU."""

    title: str
    volume: torch.Tensor
    true: torch.Tensor  # numbers of classes, 0 the background
    predicted: torch.Tensor


def draw_segmentation(cases: Sequence[Segmented], names: Sequence[str], path: Path, planes: tuple) -> None:
    """A row a volume, the planes with most of its true foreground: full lines are true, dashed ones predicted.

    Args:
        names: of the classes, without the background.
        planes: see `planes_of`.
    """
    colours = [
        plt.get_cmap("tab10" if len(names) <= 10 else "turbo")(n if len(names) <= 10 else n / len(names))
        for n in range(len(names))
    ]
    size = 3.4 * len(planes), 3.6 * len(cases) + 0.4
    figure, axes = plt.subplots(len(cases), len(planes), figsize=size, squeeze=False, constrained_layout=True)
    for row, case in zip(axes, cases):
        low, high = (float(q) for q in np.quantile(case.volume.numpy(), (0.01, 0.995)))
        for cell, (plane, axis) in zip(row, planes):
            foreground = (case.true > 0).movedim(axis, 0).flatten(1).sum(dim=1)
            index = int(foreground.argmax()) if foreground.any() else case.volume.shape[axis] // 2
            show(cell, case.volume.numpy(), axis, index, low, high)
            for labels, style in ((case.true, "solid"), (case.predicted, "dashed")):
                flat = labels.numpy().take(index, axis=axis).T
                for number, colour in enumerate(colours, start=1):
                    if (flat == number).any() and not (flat == number).all():
                        cell.contour(flat == number, [0.5], colors=[colour], linewidths=1.3, linestyles=style)
            cell.set_title(f"{case.title}, {plane}", fontsize=9)
    handles = [plt.Line2D([], [], color=colour, label=name) for name, colour in zip(names, colours)][:12]
    handles += [
        plt.Line2D([], [], color="grey", linestyle=style, label=word)
        for style, word in (("solid", "true"), ("dashed", "predicted"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), fontsize=8)
    save(figure, path)
