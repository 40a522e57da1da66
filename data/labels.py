"""Maps of labels to learn from: which classes there are, what is wrong with them, and crops that show each class."""

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from .columns import codes
from .files import write_whole
from .indexes import read_json
from .manifest import Manifest
from .sources import NO_LABEL
from .stored_volume import Channels, HeldVolume, Volume, open_volume
from .views import centre_view, scatter_views

BACKGROUND = 0
DATASET = "dataset.json"
CLASSES = "classes.json"  # of a prepared folder: the names of its labels
MOST_PLACES = 10_000  # of a class in a map that are remembered
MOST_PLACES_OF_ALL = 50_000  # of all its classes: 300 kB


class Classes(NamedTuple):
    """What is told apart: class `i` has the name `names[i]`, and in label maps the number `values[i]`."""

    names: tuple[str, ...]
    values: tuple[int, ...]  # the background's first, which is 0

    def lookup(self) -> torch.Tensor:
        """`lookup[labels]` is the class of each label: int64 `[largest value + 1]`."""
        table = torch.zeros(max(self.values) + 1, dtype=torch.int64)
        table[list(self.values)] = torch.arange(len(self.values))
        return table


def read_classes(path: Path) -> Classes:
    """The classes that a `dataset.json` names: nnU-Net's `{name: number}` or Decathlon's `{number: name}`.

    Raises:
        ValueError: if it names none, or regions.
    """
    about = read_json(path)
    labels = about.get("labels") if isinstance(about, dict) else None
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f'{path}: it names no labels, as in "labels": {{"background": 0, "liver": 1}}')
    if regions := [name for name, value in labels.items() if isinstance(value, list)]:
        raise ValueError(f"{path}: {regions[0]} is a region of several labels, which is not supported: name each label")
    try:
        keys = [int(key) for key in labels]
        numbers = dict(zip(keys, map(str, labels.values())))
    except ValueError:
        if not all(isinstance(value, int) for value in labels.values()):
            raise ValueError(f"{path}: its labels must be whole numbers with a name each") from None
        numbers = {value: name for name, value in labels.items()}
    if len(numbers) < len(labels) or min(numbers) < 0:
        raise ValueError(f"{path}: two of its labels have one number, or one is negative")
    if "ignore" in numbers.values():
        raise ValueError(f"{path}: a label to be ignored is not supported: remove it there and from the maps")
    return _classes(numbers)


def find_dataset(source: Path, labels: Path) -> Path | None:
    """The `dataset.json` beside volumes, or beside the folder of their label maps, if there is one."""
    return next((place / DATASET for place in (source, labels.parent) if (place / DATASET).is_file()), None)


def keep_classes(source: Path, labels: Path, folder: Path) -> None:
    """Keep in a prepared folder what the `dataset.json` of its raw volumes calls their labels, if there is one."""
    found = find_dataset(source, labels)
    if found and isinstance(about := read_json(found), dict):
        folder.mkdir(parents=True, exist_ok=True)
        names = json.dumps({"labels": about.get("labels")}, indent=2)
        write_whole(folder / CLASSES, lambda file: file.write_text(names))


def labelled_rows(manifest: Manifest) -> np.ndarray:
    """Numbers of the `manifest.volumes` that have labels; of the columns `FOR_RUNS` and `LABELS`. Warns of others.

    Raises:
        ValueError: if there are none, or the folder was prepared before their values were noted.
    """
    again = f"run prepare_data.py --labels FOLDER again, into {manifest.folder}"
    volumes, rejected = manifest.volumes, manifest.rejected
    there = pc.is_valid(volumes["label"])
    if not pc.any(there).as_py():
        raise ValueError(f"{manifest.folder}: none of its {len(volumes)} volumes has labels; {again}")
    if pc.any(pc.is_null(volumes["label_values"].filter(there))).as_py():
        raise ValueError(f"{manifest.folder} was prepared before the values of labels were noted; {again}")
    unprepared = rejected["source"].filter(pc.equal(rejected["reason"], NO_LABEL)).to_pylist()
    if without := [*volumes["source"].filter(pc.invert(there)).to_pylist(), *unprepared]:
        warnings.warn(f"{len(without)} volumes have no labels and are left out, such as {without[0]}", stacklevel=2)
    return np.flatnonzero(there.combine_chunks().to_numpy(zero_copy_only=False))


def classes_of(manifest: Manifest, rows: Sequence[int]) -> Classes:
    """What the labels of a prepared folder are called; their numbers, where nothing tells.

    Raises:
        ValueError: if a map has labels that are not named.
    """
    volumes = manifest.volumes.take(pa.array(rows))
    found = pc.unique(pc.list_flatten(volumes["label_values"])).to_pylist()
    if not (manifest.folder / CLASSES).exists():
        return _classes({value: str(value) for value in found if value != BACKGROUND})
    classes = read_classes(manifest.folder / CLASSES)
    check_labels(manifest, rows, classes)
    return classes


def counts_in_words(manifest: Manifest, rows: Sequence[int], classes: Classes) -> str:
    """How many maps have each class, as a line; warns of classes that can hardly be learned from these."""
    volumes = manifest.volumes.take(pa.array(rows))
    _, first = np.unique(codes(volumes["label"]), return_index=True)  # channels of a sample share a map
    maps = [set(values) for values in volumes["label_values"].take(pa.array(first)).to_pylist()]
    there = Counter(value for values in maps for value in values)
    named = list(zip(classes.names, classes.values))[1:]
    if absent := [name for name, value in named if not there[value]]:
        warnings.warn(
            f"no training volume has {', '.join(absent)}: nothing can be learned of it; give more volumes", stacklevel=2
        )
    if rare := [name for name, value in named if there[value] == 1 < len(maps)]:
        warnings.warn(f"only one of {len(maps)} training volumes has {', '.join(rare)}", stacklevel=2)
    empty = sum(values <= {BACKGROUND} for values in maps)
    counts = ", ".join(f"{name} {there[value]}" for name, value in named)
    return f"{len(maps)} maps: {counts}" + (f"; {empty} empty" if empty else "")


def draw_labelled_view(
    rng: np.random.Generator,
    volumes: Sequence[Volume],
    shared: np.ndarray,
    own: Sequence[np.ndarray],
    crop_size: tuple[int, ...],
    foreground_share: float,
) -> np.ndarray:
    """`crop_to_volume` `[1, 3, 4]` of a crop that shows a class, each as often, or lies anywhere; a `Draw`.

    As nnU-Net's crops (Isensee et al. 2021, Nature Methods 18, 203): around a voxel of the class, and moved where it
    would leave the volume. As many random numbers are drawn whatever comes of them.

    Args:
        foreground_share: how often a class is chosen that the volume has; nnU-Net: 1/3.
    """
    (volume,) = volumes
    chance, which, where = rng.random(3)
    anywhere = scatter_views(rng, volume.shape, crop_size, 0.0, shared, own)
    if chance >= foreground_share or not (places := places_of(volume)):
        return anywhere
    of_class = places[int(which * len(places))]
    return centre_view(of_class[int(where * len(of_class))], volume.shape, crop_size, shared, own[0])[None]


def places_of(volume: Volume) -> list[np.ndarray]:
    """Voxels `[N, 3]` of each class but the background that a volume has, spread over all that it has; remembered."""
    first = volume.first if isinstance(volume, Channels) else volume
    return _places(first if isinstance(first, HeldVolume) else first.label_file)


@lru_cache(maxsize=4096)
def _places(volume: HeldVolume | Path) -> list[np.ndarray]:
    labels = volume.labels if isinstance(volume, HeldVolume) else open_volume(volume)[:, :, :]
    return find_places(labels)


def find_places(labels: np.ndarray) -> list[np.ndarray]:
    """Every n-th voxel of each class but the background, at most `MOST_PLACES` of each: uint16 `[N, 3]`, by class."""
    flat = np.ascontiguousarray(labels).reshape(-1)
    foreground = np.flatnonzero(flat).astype(np.int32)
    order = np.argsort(flat[foreground], kind="stable")  # by counting: of 16 bits at most it is linear
    sorted_labels = flat[foreground[order]]
    starts = np.flatnonzero(np.diff(sorted_labels, prepend=0))
    most = min(MOST_PLACES, MOST_PLACES_OF_ALL // max(1, len(starts)))
    chosen = [foreground[part[:: -(-len(part) // most)]] for part in np.split(order, starts)[1:]]
    return [np.stack(np.unravel_index(places, labels.shape), axis=1).astype(np.uint16) for places in chosen]


def _classes(names: Mapping[int, str]) -> Classes:
    names = {BACKGROUND: "background", **names}
    values = tuple(sorted(names))
    return Classes(tuple(names[value] for value in values), values)


def check_labels(manifest: Manifest, rows: Sequence[int], classes: Classes) -> None:
    """Raise ValueError if a map has a label that is none of the classes."""
    volumes = manifest.volumes.take(pa.array(rows))
    found = pc.unique(pc.list_flatten(volumes["label_values"])).to_pylist()
    if unknown := sorted(set(found) - set(classes.values)):
        is_in = [unknown[0] in values for values in volumes["label_values"].to_pylist()]
        first = volumes["source"][is_in.index(True)]
        raise ValueError(
            f"label {unknown[0]} of {first} is none of the classes ({', '.join(map(str, classes.values))}): "
            "name it in dataset.json (or data.classes), or mend the map, and prepare again"
        )
