"""The scores of a run's encoders over its steps, beside what has learned nothing."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

LEVELS = {"untrained": "--", "intensity": ":", "place": "-."}
OF_ONE_WIDTH = ("rank", "pooled_rank")  # which say nothing of features of another width


def draw_curve(records: Sequence[dict], path: Path) -> None:
    """A panel a score; what does not change with the steps is a level.

    Args:
        records: those of `metrics.jsonl` with `evaluation`, of the same volumes, by step.
    """
    steps, rows = [record["step"] for record in records], [record["evaluation"]["rows"] for record in records]
    names = list(rows[-1]["encoder"])
    lines = -(-len(names) // 3)
    columns = min(3, len(names))
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 2.8 * lines), sharex=True, squeeze=False, constrained_layout=True
    )
    for name, axis in zip(names, axes.flat):
        scores = [row["encoder"].get(name, math.nan) for row in rows]
        axis.plot(steps, scores, "o-", markersize=4, label="encoder")
        for number, (level, style) in enumerate(LEVELS.items(), start=1):
            if name in rows[-1].get(level, {}) and (level == "untrained" or name not in OF_ONE_WIDTH):
                scores.append(rows[-1][level][name])
                axis.axhline(scores[-1], linestyle=style, color=f"C{number}", label=level)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_ylim(0, 1.05 * np.nanmax(scores) or 1)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
