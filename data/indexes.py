"""Index files that list volumes: tables, and nnssl's `pretrain_data.json`."""

import csv
import json
import os
import re
from pathlib import Path

NNSSL_INDEX = "pretrain_data.json"
PATH_COLUMNS = (
    "path",
    "image_path",
    "image",
    "file",
)  # of a table (the second: OpenMind's); the first one there counts


def read_index(index: Path, labels: Path | None = None) -> list[dict[str, str]]:
    """Read what an index tells of each volume; whether the files are there is not asked.

    Args:
        index: a `.csv` or `.tsv` table, or a `.json` of nnssl's form.
        labels: the folder at which the paths in a table's column `label` start; without it, at the table's.

    Returns:
        For each volume the fields of a `Source`, in the order of the index. Paths in an index start at its folder.

    Raises:
        ValueError: if the index is not of its form, a label file is missing, or an environment variable is not set.
    """
    if index.suffix.lower() in {".csv", ".tsv"}:
        return _read_table(index, labels)
    if index.suffix.lower() == ".json":
        return _read_nnssl(index)
    raise ValueError(f"{index}: neither a folder nor a .csv, .tsv or .json file that lists volumes")


def read_json(file: Path) -> object:
    """The content of a JSON file; a ValueError names the file."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{file}: not a JSON file ({error})") from error


def below(root: Path, path: str) -> str:
    """A path below the root as one relative to it, with `/`; any other as an absolute one."""
    root = os.path.abspath(root)
    path = os.path.normpath(os.path.join(root, path))
    return path.removeprefix(os.path.join(root, "")).replace(os.sep, "/")


def _read_table(table: Path, labels: Path | None) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or ()]
            rows = [(reader.line_num, {name: (row[name] or "").strip() for name in columns}) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a table in UTF-8; save it as CSV UTF-8 ({error})") from error
    column = next((name for name in PATH_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(f"{table}: no column 'path' among its columns {', '.join(map(repr, columns)) or '(none)'}")
    volumes = []
    for line, row in rows:
        if not any(row.values()):  # spreadsheets end in such lines
            continue
        if not row[column]:
            raise ValueError(f"{table}: line {line} has no {column}")
        volume = {key: row.get(key, "") for key in ("dataset", "subject", "session", "modality", "label")}
        if volume["label"]:
            volume["label"] = below(labels or table.parent, volume["label"])
            if not os.path.isfile((labels or table.parent) / volume["label"]):
                raise ValueError(f"{table}: line {line}: no label file {volume['label']} in {labels or table.parent}")
        volumes.append({"path": below(table.parent, row[column]), **volume})
    return volumes


def _read_nnssl(index: Path) -> list[dict[str, str]]:
    volumes, content = [], read_json(index)
    try:
        for key, dataset in content["datasets"].items():
            for subject_id, subject in dataset["subjects"].items():
                for session_id, session in subject["sessions"].items():
                    for image in session["images"]:
                        volumes.append(
                            {
                                "path": below(index.parent, _expanded(image["image_path"], index)),
                                "dataset": str(dataset.get("name") or key),
                                "subject": subject_id.removeprefix("sub-"),
                                "session": session_id.removeprefix("ses-"),
                                "modality": str(image.get("modality") or ""),
                            }
                        )
    except (AttributeError, KeyError, TypeError) as error:
        form = "datasets > subjects > sessions > images > image_path"
        raise ValueError(f"{index}: not of the form of nnssl's {NNSSL_INDEX}, {form}") from error
    return volumes


def _expanded(path: str, index: Path) -> str:
    variable = re.match(r"\$\{?(\w+)\}?(?=/)", path)
    if variable is None:
        return path
    if variable[1] not in os.environ:
        raise ValueError(f"{index}: its paths begin with ${variable[1]}; set this environment variable")
    return os.environ[variable[1]] + path[variable.end() :]
