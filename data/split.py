"""Which subjects are trained on: the same split in every run of a manifest."""

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from .manifest import Manifest

FEWEST = 20  # subjects that allow to keep some for validation
MOST = 200  # that are kept


class Split(NamedTuple):
    """Numbers of `manifest.volumes`."""

    training: np.ndarray
    validation: np.ndarray
    left_out: np.ndarray
    subjects: tuple[int, int, int]  # how many are trained on, kept for validation, and left out


def is_left_out(subject: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns fits a subject, named as in `Manifest.subjects`, or the last part of its name."""
    return any(fnmatchcase(subject, p) or fnmatchcase(subject.rpartition("/")[2], p) for p in patterns)


def choose_subjects(subjects: Sequence[str], budget: int, seed: int) -> list[str]:
    """As many subjects as the budget allows, by a hash of their names; of one seed, more hold all that fewer do.

    Raises:
        ValueError: if there are not as many.
    """
    names = sorted(set(subjects))
    if not 1 <= budget <= len(names):
        raise ValueError(f"a budget of {budget} subjects: choose from 1 to the {len(names)} that there are")
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:budget]


def split_by_subject(
    manifest: Manifest,
    validation_share: float,
    leave_out: Sequence[str],
    among: np.ndarray | None = None,
    budget: int | None = None,
    seed: int = 0,
) -> Split:
    """Keep some subjects for validation, chosen by a hash of their names, and leave others out altogether.

    A volume whose subject is not known is a subject of its own.

    Args:
        validation_share: of the subjects, `MOST` at most, at least one unless it is 0; none of fewer than `FEWEST`.
        leave_out: patterns of subjects, as SUBJECT or DATASET/SUBJECT, or of the paths of volumes.
        among: numbers of the volumes that there are to choose from; None for all.
        budget, seed: of `choose_subjects`, for those that are trained on; None for all.

    Raises:
        ValueError: if a pattern fits nothing, or nothing is left.
    """
    names, of = manifest.subjects
    there = np.arange(len(of)) if among is None else among
    has = set(of[there].tolist())
    matched = {
        pattern: {number for number, name in enumerate(names) if is_left_out(name, [pattern])} for pattern in leave_out
    }
    for pattern, found in matched.items():
        if not found:
            raise ValueError(f"data.leave_out {pattern!r} fits none of the {len(names)} subjects, such as {names[0]}")
    out = set().union(*matched.values())
    left = sorted((i for i in has if i not in out), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    if not left:
        raise ValueError(f"data.leave_out leaves none of the {len(names)} subjects")
    count = min(MOST, max(1, round(validation_share * len(left)))) if validation_share and len(left) >= FEWEST else 0
    training, validation = left[count:], left[:count]
    if budget is not None:
        chosen = set(choose_subjects([names[i] for i in training], budget, seed))
        training = [i for i in training if names[i] in chosen]
    out &= has
    rows = [there[np.isin(of[there], part)] for part in (training, validation, sorted(out))]
    return Split(*rows, (len(training), count, len(out)))
