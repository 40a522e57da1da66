"""The scores of what was answered for whole volumes, as a file and as lines to read."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import write_whole

from .scores import classification_scores, mean_over_cases, regression_scores


class Answered(NamedTuple):
    """What a model answered for a case."""

    case: str
    group: str  # such as "test"
    true: float  # the number of its class, or what was to be predicted
    answer: list[float]  # probabilities of the classes, or one number


def mean_by_case(answered: Sequence[Answered]) -> list[Answered]:
    """One answer a case, the mean over its volumes; sorted."""
    cases: dict[tuple[str, str], list[Answered]] = {}
    for one in answered:
        cases.setdefault((one.group, one.case), []).append(one)
    means = {key: np.mean([one.answer for one in found], axis=0).tolist() for key, found in cases.items()}
    return [cases[key][0]._replace(answer=means[key]) for key in sorted(cases)]


def write_answers(
    answered: Sequence[Answered], names: Sequence[str], path: Path, mean: float | None = None
) -> dict[str, dict]:
    """Write all answers and their scores, and print these; returns what was written.

    Args:
        names: of the classes, or of what was predicted.
        mean: of the targets that were trained on, of a regression; None of a classification.
    """
    summary = summarise_answers(answered, mean)
    cases = [
        {
            "case": one.case,
            "group": one.group,
            "true": names[int(one.true)],
            "probabilities": dict(zip(names, one.answer)),
        }
        if mean is None
        else {"case": one.case, "group": one.group, "true": one.true, "predicted": one.answer[0]}
        for one in answered
    ]
    content = {"names": list(names), "summary": summary, "cases": cases}
    if mean is None and len(names) == 2:
        content["positive"] = names[1]  # whose AUROC and average precision they are
    write_whole(path, lambda file: file.write_text(json.dumps(content, indent=1)))
    for group, row in summary.items():
        words = ", ".join(f"{key.replace('_', ' ')} {in_words(value)}" for key, value in row.items() if key != "cases")
        print(f"{group:<11} {words} ({row['cases']} subjects)")
    return content


def summarise_answers(answered: Sequence[Answered], mean: float | None) -> dict[str, dict]:
    """Group -> score -> its value with a bootstrap interval over cases, and `cases`, how many they are.

    Scores are those of `classification_scores`, or of `regression_scores` with `mae_of_mean`, that of always saying
    `mean`.
    """
    summary = {}
    for group, (true, answers) in by_group(answered).items():
        if mean is None:
            scores = classification_scores(answers, true.astype(int))
        else:
            scores = regression_scores(answers[:, 0], true) | {"mae_of_mean": mean_over_cases(np.abs(true - mean))}
        known = {key: score._asdict() for key, score in scores.items() if not math.isnan(score.value)}
        if missing := [key.replace("_", " ") for key in scores if key not in known]:
            print(f"{group:<11} no {', '.join(missing)}: too few subjects, or not of every class")
        summary[group] = known | {"cases": len(true)}
    return summary


def by_group(answered: Sequence[Answered]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Group -> what is true `[N]`, and the answers `[N, K]`."""
    groups: dict[str, list[Answered]] = {}
    for one in answered:
        groups.setdefault(one.group, []).append(one)

    def column(found: list[Answered], what: str) -> np.ndarray:
        return np.array([getattr(one, what) for one in found])

    return {group: (column(found, "true"), column(found, "answer")) for group, found in groups.items()}


def rows_done(file: Path, columns: Sequence[str]) -> set[str]:
    """The first cells of the rows of a table, which is begun if it is not there; a row cut off is removed.

    Raises:
        ValueError: if it is a table of something else.
    """
    if not file.exists():
        write_whole(file, lambda new: append_row(new, columns))
        return set()
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        write_whole(file, lambda new: new.write_bytes(whole))
    rows = list(csv.reader(whole.decode().splitlines()))
    if not rows or rows[0] != list(columns):
        raise ValueError(f"{file} holds something else than answers of this model: choose another --output")
    return {row[0] for row in rows[1:]}


def append_row(file: Path, row: Sequence[str | float]) -> None:
    """Add a row to a table, at once; numbers to float32's precision."""
    row = [f"{cell:.7g}" if isinstance(cell, float) else cell for cell in row]
    with file.open("a", newline="", encoding="utf-8") as lines:
        csv.writer(lines, lineterminator="\n").writerow(row)


def in_words(score: Mapping[str, float]) -> str:
    return f"{score['value']:.4g} [{score['low']:.4g}, {score['high']:.4g}]"
