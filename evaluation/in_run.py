"""Judges an encoder for the run that trains it, in a process of its own: a task in JSON on stdin, an answer on stdout.

See `training/evaluation.py`, which starts it. The untrained encoder and the voxels alone are judged once a run, and
stand beside every encoder of it.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
import torch

from data.files import write_whole
from data.manifest import FOR_RUNS, LABELS, read_manifest
from data.store import PreparedVolumes
from data.stored_volume import HeldVolume, Volume
from data.volume import axis_order
from models import load_encoder

from .curve import draw_curve
from .dense_probe import number_labels
from .judge import evaluate_encoder, table

SAMPLES = 32  # pairs of views, 64 places each, both ways
BUDGETS = (1, 5)  # labelled volumes
LARGEST = 1.5  # crops along an axis: of a larger volume its middle is looked at, since attention grows with the square


def hold(volumes: PreparedVolumes, number: int, most: Sequence[int], coarsest_last: bool) -> HeldVolume:
    """The middle of a volume in memory, `[C, X, Y, Z]`, and of its labels if any, the axes as those of crops.

    Args:
        most: voxels along each axis.
    """

    def read(opened: list[Volume]) -> HeldVolume:
        (volume,) = opened
        order = axis_order(volume.spacing, coarsest_last)
        sizes = [0, 0, 0]
        for axis, size in zip(order, most):
            sizes[axis] = min(size, volume.shape[axis])
        starts = [(have - size) // 2 for have, size in zip(volume.shape, sizes)]
        box = tuple(slice(start, start + size) for start, size in zip(starts, sizes))
        voxels = np.asarray(volume[box], np.float32).reshape(-1, *sizes).transpose(0, *(1 + axis for axis in order))
        labels = None if volume.labels is None else np.asarray(volume.labels[box]).transpose(order)
        spacing = [volume.spacing[axis] for axis in order]
        voxels = np.ascontiguousarray(voxels)
        return HeldVolume(voxels, volume.padding, spacing, volume.foreground_threshold, labels=labels)

    return volumes.read([number], read)


def labels_of(held: Sequence[HeldVolume]) -> list[torch.Tensor]:
    """Their labels, `[X, Y, Z]`, numbered from 0."""
    try:
        return number_labels([torch.from_numpy(np.ascontiguousarray(one.labels).astype(np.int64)) for one in held])
    except ValueError as error:
        raise ValueError(f"the middle of the labelled volumes: {error}") from None


def judge(task: dict) -> dict[str, dict[str, float]]:
    """The rows of `evaluate_encoder`; all but the encoder's from the last answer, if there is one."""
    encoder = load_encoder(Path(task["encoder"]))
    columns = (*FOR_RUNS, *LABELS) if task["labelled"] else FOR_RUNS
    volumes = PreparedVolumes(read_manifest(Path(task["folder"]), columns), task["rows"])
    most = [math.ceil(LARGEST * size) for size in encoder.config.image_size]
    coarsest_last = (encoder.config.preprocessing or {}).get("coarsest_last", False)
    held = [hold(volumes, number, most, coarsest_last) for number in range(len(volumes))]
    labels = labels_of(held) if task["labelled"] else None
    test = max(1, len(held) // 3)
    budgets = [budget for budget in BUDGETS if budget <= len(held) - test]
    known = task["known"][-1]["evaluation"]["rows"] if task["known"] else {}
    only = ("encoder",) if known else None
    found = evaluate_encoder(encoder, held, labels, samples=SAMPLES, budgets=budgets, test=test, only=only)
    rows = {name: {key: v for key, v in row.items() if math.isfinite(v)} for name, row in found.items()}
    return rows | {name: row for name, row in known.items() if name != "encoder"}


def report(records: Sequence[dict], folder: Path) -> None:
    """Write `evaluation.md` and `evaluation.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    last = records[-1]["evaluation"]
    over_steps = {f"step {record['step']}": record["evaluation"]["rows"]["encoder"] for record in records}
    text = f"Step {records[-1]['step']}, on {last['on']}\n\n{table(last['rows'])}\n\n{table(over_steps)}\n"
    write_whole(folder / "evaluation.md", lambda file: file.write_text(text))
    draw_curve(records, folder / "evaluation.png")


def end_with(parent: int) -> None:
    """End this process when its parent has."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    task = json.load(sys.stdin)
    threading.Thread(target=end_with, args=[task["parent"]], daemon=True).start()
    torch.set_num_threads(max(1, joblib.cpu_count() // 2))
    answer = {"on": task["on"], "rows": judge(task)}
    report([*task["known"], {"step": task["step"], "evaluation": answer}], Path(task["report"]))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
