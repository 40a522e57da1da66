"""What a table says of whole volumes: a class or a number for each subject."""

import csv
import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

SUBJECT_COLUMNS = ("subject", "path")  # of a table, the first one there counts


def read_targets(table: Path, column: str, subjects: Sequence[str]) -> dict[str, str]:
    """What a `.csv` or `.tsv` has in a column for each subject, of those that it lists; warns of those that are in one
    alone, the data or the table.

    Args:
        subjects: named as in `Manifest.subjects`; a table may leave out their data set.

    Raises:
        ValueError: if it is not of that form, a value is missing or NaN, a subject has two, or none is listed.
    """
    listed = read_column(table, column)
    last = Counter(subject.rpartition("/")[2] for subject in subjects)

    def name_of(subject: str) -> str | None:
        """In the table."""
        name = subject.rpartition("/")[2]
        return subject if subject in listed else name if name in listed and last[name] == 1 else None

    names = {subject: name for subject in subjects if (name := name_of(subject))}
    found = {subject: listed[name] for subject, name in names.items()}
    if not found:
        raise ValueError(f"{table} lists none of the {len(subjects)} subjects, such as {subjects[0]}")
    if without := [subject for subject in subjects if subject not in found]:
        say = f"{len(without)} of {len(subjects)} subjects are not in {table} and are left out, such as {without[0]}"
        warnings.warn(say, stacklevel=2)
    if unused := sorted(listed.keys() - names.values()):
        say = f"{len(unused)} of the {len(listed)} that {table} lists have no volume, such as {unused[0]}"
        warnings.warn(say, stacklevel=2)
    return found


def as_numbers(targets: Mapping[str, str]) -> dict[str, float]:
    """Of a regression.

    Raises:
        ValueError: if one is no number.
    """
    numbers = {}
    for subject, value in targets.items():
        try:
            numbers[subject] = float(value)
        except ValueError:
            raise ValueError(f"{subject} has {value!r}, which is no number: mend it, or train to classify") from None
        if not math.isfinite(numbers[subject]):
            raise ValueError(f"{subject} has {value!r}: remove it from the table or mend it")
    return numbers


def as_classes(targets: Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Of a classification: names of the classes in order, numbers as numbers, and which each subject is of.

    Raises:
        ValueError: if all are of one class, or a class has one subject, which cannot be trained on and tested.
    """
    counts = Counter(targets.values())
    names = tuple(sorted(counts, key=_order))
    if len(names) < 2:
        raise ValueError(f"all {len(targets)} subjects are of one class, {names[0]}: there is nothing to tell apart")
    if alone := [name for name in names if counts[name] == 1]:
        raise ValueError(
            f"class {alone[0]} has one subject of {len(targets)}: add some, or remove it; if the column has numbers to "
            "predict, train a regression"
        )
    return names, {subject: names.index(value) for subject, value in targets.items()}


def _order(name: str) -> tuple[bool, float, str]:
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name


def fingerprint(targets: Mapping[str, str]) -> str:
    """Of what a table says: the same in whatever order."""
    return hashlib.sha256(json.dumps(sorted(targets.items())).encode()).hexdigest()[:16]


def read_column(table: Path, column: str) -> dict[str, str]:
    """What a `.csv` or `.tsv` has in a column, by what it calls the subjects.

    Raises:
        ValueError: if it is not of that form, a value is missing or NaN, or a subject has two.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            rows = [(reader.line_num, {key: (row[key] or "").strip() for key in columns}) for row in reader]
    except FileNotFoundError:
        raise ValueError(f"{table}: no such table") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a table in UTF-8; save it as CSV UTF-8 ({error})") from error
    key = next((name for name in SUBJECT_COLUMNS if name in columns), None)
    for name, there in ((" or ".join(SUBJECT_COLUMNS), key), (column, column in columns)):
        if not there:
            raise ValueError(f"{table}: no column {name} among its columns {', '.join(columns) or '(none)'}")
    if not any(any(row.values()) for _, row in rows):
        raise ValueError(f"{table}: no line below its columns: list the subjects, one a line")
    found: dict[str, str] = {}
    for line, row in rows:
        if not any(row.values()):  # spreadsheets end in such lines
            continue
        subject, value = row[key], row[column]
        if not subject or value.lower() in ("", "nan", "na", "n/a"):
            raise ValueError(f"{table}: line {line} has no {column if subject else key}: fill it in or remove the line")
        if found.setdefault(subject, value) != value:
            raise ValueError(
                f"{table}: line {line}: {subject} has two values of {column}, {found[subject]} and {value}"
            )
    return found
