"""`report/` of a prepared folder: what was prepared, to be looked at before a run is spent on it."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import codes, matrix
from .copies import Copies, find_copies
from .files import write_whole
from .manifest import Manifest
from .preparation_pictures import SHOWN, draw_numbers, draw_volumes
from .volume import NATIVE

FOLDER = "report"
SMALL = 96  # voxels of an axis: less than the crop of the recipes
LISTED = 20  # rows of a table at most


def write_preparation_report(manifest: Manifest) -> Path:
    """Write `report/` beside the manifest: README.md, volumes.png, numbers.png; some volumes are read, never all.

    Returns:
        The folder.
    """
    folder, rows, unreadable = manifest.folder / FOLDER, manifest.volumes, {}
    folder.mkdir(exist_ok=True)
    copies = Copies(np.empty((0, 2), int), [], 0, 0)
    if len(rows):
        draw_volumes(manifest, unreadable, folder / "volumes.png")
        draw_numbers(manifest, folder / "numbers.png")
        copies = find_copies(manifest, unreadable)
    text = _page(manifest, rows, copies, unreadable)
    write_whole(folder / "README.md", lambda file: file.write_text(text, encoding="utf-8"))
    return folder


def _page(manifest: Manifest, rows: pa.Table, copies: Copies, unreadable: dict[str, str]) -> str:
    how, source = manifest.preparation, rows["source"]
    raw = Path(manifest.root)
    origin = raw.name if raw.is_absolute() else manifest.root  # the page may be published
    subjects = manifest.subjects[1]
    session = codes(pc.fill_null(rows["session"], ""))
    small = int((matrix(rows["shape"], 3) < SMALL).any(axis=1).sum())
    spacing = rows["spacing"][0].as_py() if len(rows) and how.spacing != NATIVE else []
    mm = " x ".join(f"{size:g}" for size in spacing) or "their own"
    facts = {
        "volumes": len(rows),
        "subjects": len(np.unique(subjects)),
        "sessions": len(np.unique(np.column_stack([subjects, session]), axis=0)),
        "data sets": len(pc.unique(pc.fill_null(rows["dataset"], ""))),
        "modalities": len(pc.unique(pc.fill_null(rows["modality"], ""))),
        "GB": f"{(pc.sum(rows['bytes']).as_py() or 0) / 1e9:.2f}",
        f"volumes smaller than {SMALL} voxels along an axis": small,
        "files left out": len(manifest.rejected),
    }
    lines = [
        "# What was prepared",
        f"From {_code(origin)}: axes {how.orientation}, voxels of {mm} mm, {how.precision}.",
        _table(("", "count"), facts.items()),
    ]
    if (manifest.folder / FOLDER / "volumes.png").exists() and len(rows):
        lines += [
            f"Middle slices of up to {SHOWN} volumes of all data sets and modalities, in mm, as radiologists look: the "
            "patient's right (R) is left, noses (A) point left in the last picture, heads are up. Black is the 1st, "
            "white the 99th percentile.",
            "![Middle slices](volumes.png)",
        ]
    if len(rows):
        lines += ["![Histograms](numbers.png)", "## Data sets", _data_sets(rows)]
    lines += ["## Left out", _left_out(manifest.rejected), "## Copies"]
    differ = int((subjects[copies.equal[:, 0]] != subjects[copies.equal[:, 1]]).sum())
    named = [(one, other, "equal") for one, other in copies.equal.tolist()]
    named += [(one, other, f"correlation {value:.4f}") for one, other, value in copies.near]
    near_differ = sum(subjects[one] != subjects[other] for one, other, _ in copies.near)
    lines.append(
        f"{len(copies.equal)} pairs of equal volumes, {differ} of them of different subjects. "
        f"{len(copies.near)} pairs of nearly equal ones, {near_differ} of them of different subjects "
        f"({copies.compared} of {copies.candidates} pairs with like statistics were compared). A scan under two "
        "subjects' names can be trained on and validated on at once."
    )
    if named:
        named.sort(key=lambda pair: subjects[pair[0]] == subjects[pair[1]])
        cells = [
            (*(_code(source[number].as_py()) for number in pair[:2]), pair[2], _differ(subjects, *pair[:2]))
            for pair in named[:LISTED]
        ]
        lines.append(_table(("volume", "and", "how alike", "subjects"), cells, len(named)))
    if unreadable:
        cells = [
            (_code(file), why.replace(str(manifest.folder), "")) for file, why in list(unreadable.items())[:LISTED]
        ]
        lines += [
            "## Could not be read",
            f"{len(unreadable)} of the prepared files that were looked at; prepare_data.py --verify mends them.",
            _table(("file", "why"), cells, len(unreadable)),
        ]
    return "\n\n".join(lines) + "\n"


def _differ(subjects: np.ndarray, one: int, other: int) -> str:
    return "the same" if subjects[one] == subjects[other] else "**different**"


def _data_sets(rows: pa.Table) -> str:
    keys = {key: pc.fill_null(rows[key], "") for key in ("dataset", "modality")}
    groups = (
        pa.table({**keys, "bytes": rows["bytes"]}).group_by(list(keys)).aggregate([("bytes", "sum"), ([], "count_all")])
    )
    groups = groups.sort_by([("count_all", "descending"), ("dataset", "ascending"), ("modality", "ascending")])
    cells = [
        (_code(one["dataset"]), _code(one["modality"]), one["count_all"], f"{one['bytes_sum'] / 1e9:.2f}")
        for one in groups.slice(0, 2 * LISTED).to_pylist()
    ]
    return _table(("data set", "modality", "volumes", "GB"), cells, len(groups))


def _left_out(rejected: pa.Table) -> str:
    """Reasons that differ only in numbers or names are one."""
    if not len(rejected):
        return "None."
    texts = rejected["reason"].combine_chunks().dictionary_encode()
    own = re.compile(r"\(.*\)|\[.*\]|\d[\d.]*|(?<=label map ).*?(?=: )")
    kinds = [own.sub("…", text) for text in texts.dictionary.to_pylist()]
    names, of_text = np.unique(np.asarray(kinds), return_inverse=True)
    kind = of_text[texts.indices.to_numpy()]
    counts = np.bincount(kind)
    cells = []
    for number in np.argsort(-counts, kind="stable")[:LISTED]:
        examples = [_code(rejected["source"][int(row)].as_py()) for row in np.flatnonzero(kind == number)[:3]]
        cells.append((counts[number], names[number], ", ".join(examples)))
    return _table(("files", "why", "such as"), cells, len(names))


def _table(head: tuple[str, ...], cells: Iterable[tuple], total: int = 0) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in cells]
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)]
    return "\n".join(lines) + (f"\n\nand {total - len(cells)} more" if total > len(cells) else "")


def _code(text: str) -> str:
    return f"`{text}`" if text else "unknown"
