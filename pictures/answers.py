"""What was answered for whole volumes against what is known of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from training.pictures import save


def draw_answers(groups: Mapping[str, tuple[np.ndarray, np.ndarray]], names: Sequence[str], path: Path) -> None:
    """Predicted over true values, or the probability of each case's own class, by class; a colour a group.

    Args:
        groups: such as "test" -> what is true `[N]`, a number or the number of a class, and the answers `[N, K]`.
        names: of the classes, or of what is predicted.
    """
    figure, axis = plt.subplots(figsize=(4.5, 4), constrained_layout=True)
    for group, (true, answers) in groups.items():
        if len(names) == 1:
            axis.plot(true, answers[:, 0], "o", markersize=4, alpha=0.7, label=group)
        else:
            beside = np.random.default_rng(0).uniform(-0.2, 0.2, len(true))
            own = answers[np.arange(len(true)), true.astype(int)]
            axis.plot(true + beside, own, "o", markersize=4, alpha=0.7, label=group)
    if len(names) == 1:
        ends = axis.get_xlim()
        axis.plot(ends, ends, ":", color="grey")
        axis.set(xlabel=f"{names[0]}, true", ylabel="predicted")
    else:
        axis.set_xticks(range(len(names)), names)
        axis.set(xlabel="true class", ylabel="its probability", ylim=(-0.02, 1.02))
    axis.legend(fontsize=8)
    save(figure, path)
