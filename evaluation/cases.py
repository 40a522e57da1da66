"""The scores of many cases, as a file and as lines to read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import write_whole

from .scores import mean_over_cases


class Scored(NamedTuple):
    """The scores of a case."""

    case: str
    group: str  # such as "test"
    scores: dict[str, list[float]]  # of each class but the background: Dice, NSD, HD95


def write_scores(scored: Sequence[Scored], names: Sequence[str], tolerance: float, path: Path) -> dict:
    """Write all scores and their means, and print these; returns what was written.

    Args:
        names: of the classes but the background.
        tolerance: mm, that of the NSD.
    """
    summary = summarise(scored, names)
    content = {"tolerance_mm": tolerance, "summary": summary, "cases": [one._asdict() for one in scored]}
    write_whole(path, lambda file: file.write_text(json.dumps(content, indent=1)))
    for group, rows in summary.items():
        for name, row in rows.items():
            words = ", ".join(f"{key} {value['value']:.3f}" for key, value in row.items() if key != "cases")
            print(f"{group:<11} {name}: {words} ({row['cases']} cases)")
    return content


def summarise(scored: Sequence[Scored], names: Sequence[str]) -> dict[str, dict[str, dict]]:
    """Group -> class, and `mean` over classes -> score -> its mean over cases, with a bootstrap interval."""
    summary: dict[str, dict[str, dict]] = {}
    for group in dict.fromkeys(one.group for one in scored):
        cases = [one.scores for one in scored if one.group == group]
        tables = {key: np.array([case[key] for case in cases], dtype=float) for key in cases[0]}  # [cases, classes]
        columns = {name: {key: table[:, n] for key, table in tables.items()} for n, name in enumerate(names)}
        if len(names) > 1:
            columns["mean"] = {key: mean_of_classes(table) for key, table in tables.items()}
        summary[group] = {
            name: {key: mean_over_cases(values)._asdict() for key, values in column.items()} | {"cases": len(cases)}
            for name, column in columns.items()
        }
    return summary


def mean_of_classes(table: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is there, without a warning; NaN where nothing is."""
    there = ~np.isnan(table)
    return np.where(there.any(-1), np.nansum(table, -1) / np.maximum(there.sum(-1), 1), np.nan)
