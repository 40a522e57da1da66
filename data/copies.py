"""Volumes of a prepared folder that are there twice: under two subjects' names, one is trained and validated on."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from .columns import codes, matrix
from .manifest import Manifest
from .stored_volume import open_volume

ALIKE = 0.02  # how far the statistics of two volumes may be apart for their voxels to be compared
COMPARED = 200  # pairs at most whose voxels are compared
STEP = 4  # every so many voxels of an axis are
SAME = 0.99  # correlation above which two volumes are one


class Copies(NamedTuple):
    equal: np.ndarray  # [pairs, 2], numbers of `manifest.volumes` whose files are the same
    near: list[tuple[int, int, float]]  # and of those whose voxels nearly are, with their correlation
    candidates: int  # pairs of like statistics
    compared: int  # of these


def find_copies(manifest: Manifest, unreadable: dict[str, str]) -> Copies:
    """Pairs of equal files, and of equal voxels up to noise; those of different subjects first. Of k copies, k - 1.

    Args:
        unreadable: takes the files that cannot be read -> why.
    """
    rows = manifest.volumes
    subjects = manifest.subjects[1]
    content = codes(rows["checksum"])
    order = np.lexsort((subjects, content))
    pairs = np.column_stack([order[:-1], order[1:]])[np.diff(content[order]) == 0]
    equal = pairs[np.argsort(subjects[pairs[:, 0]] == subjects[pairs[:, 1]], kind="stable")]
    candidates = _candidates(rows, content, subjects)
    kept: dict[int, np.ndarray | None] = {}
    near = []
    for one, other in candidates[:COMPARED].tolist():
        for number in {one, other} - kept.keys():
            kept[number] = _thinned(manifest.folder, rows["file"][number].as_py(), unreadable)
        if kept[one] is None or kept[other] is None:
            continue
        both = tuple(slice(n) for n in np.minimum(kept[one].shape, kept[other].shape))
        values = [kept[number][both].ravel() for number in (one, other)]
        if min(map(np.std, values)) > 0 and (correlation := np.corrcoef(values)[0, 1]) > SAME:
            near.append((one, other, float(correlation)))
    return Copies(equal, near, len(candidates), min(len(candidates), COMPARED))


def _candidates(rows: pa.Table, content: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Pairs `[pairs, 2]` whose statistics are nearly the same but whose files are not.

    Volumes are put into cells of their statistics, and those next to each other in a cell are compared; cells are laid
    several times, so that the border of one lies inside another.
    """
    columns = [matrix(rows[key], 3) for key in ("shape", "foreground_mean", "foreground_std")]
    values = np.column_stack([*columns, rows["foreground_share"].to_numpy()]).astype(float)
    places, rng = np.log(np.maximum(np.nan_to_num(values), 1e-3)), np.random.default_rng(0)
    first = np.unique(content, return_index=True)[1]  # of equal files one is enough
    found = [np.empty((0, 2), int)]
    for key in range(3, values.shape[1]):
        cells = np.floor(places[first] / (5 * ALIKE) + rng.random(values.shape[1])).astype(np.int64)
        cell = cells @ rng.integers(1, 2**62, values.shape[1])  # a hash of it: overflow does no harm
        order = np.lexsort((places[first, key], cell))
        for apart in (1, 2):
            same = cell[order[:-apart]] == cell[order[apart:]]
            found.append(np.column_stack([first[order[:-apart]], first[order[apart:]]])[same])
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    distance = np.abs(places[pairs[:, 0]] - places[pairs[:, 1]]).max(axis=1, initial=0)
    pairs, distance = pairs[distance < ALIKE], distance[distance < ALIKE]
    return pairs[np.lexsort((distance, subjects[pairs[:, 0]] == subjects[pairs[:, 1]]))]


def _thinned(folder: Path, file: str, unreadable: dict[str, str]) -> np.ndarray | None:
    """Every `STEP`th voxel; the planes between are not read."""
    try:
        volume = open_volume(folder / file)
        planes = [volume[x : x + 1, :, :][0, ::STEP, ::STEP] for x in range(0, volume.shape[0], STEP)]
        return np.stack(planes).astype(np.float32)
    except Exception as error:  # whatever a damaged file does
        unreadable[file] = str(error)
        return None
