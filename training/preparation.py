"""Volumes made ready before the first step; what cannot be used is named and counted."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
import pyarrow.compute as pc

from data.channels import channel_number
from data.columns import matrix
from data.demo import demo_volume
from data.journals import JOURNALS
from data.labels import CLASSES, keep_classes, read_classes
from data.manifest import FOR_RUNS, NAME, Manifest, Preparation, read_manifest
from data.prepare_folder import prepare_folder, prepare_streamed
from data.prepare_volume import Job
from data.sources import Listing, Source, find_sources, is_streamed, only_labelled
from data.volume import axis_order

from .recipe import Recipe
from .recipe_sections import Data

SHOWN = 20  # files left out that are named


def preparation(data: Data) -> Preparation:
    return Preparation(data.orientation, data.spacing, **data.rules(), channels=data.channels)


def is_prepared(folder: Path | None) -> bool:
    return folder is not None and (folder / NAME).exists()


def open_manifest(folder: Path, columns: Sequence[str] = FOR_RUNS) -> Manifest:
    """What a run needs of the manifest that the first rank has seen; network disks show it to others later."""
    for _ in range(60):
        if is_prepared(folder):
            break
        time.sleep(1)
    return read_manifest(folder, columns)


def list_data(data: Path | None, numbers: Data, labels: Path | None = None) -> Listing:
    """The volumes below a folder, or in an index; None for the demo's.

    Args:
        labels: folder of their label maps; volumes without one are left out then.

    Raises:
        ValueError: if there are none.
    """
    if data is None:
        return Listing(demo_volume().parent, [Source(demo_volume().name)], [])
    if (data / JOURNALS).is_dir() and (data / "volumes").is_dir():
        raise ValueError(f"--data {data} is not complete: run prepare_data.py again, all shards, until it is")
    try:
        listing = find_sources(data, numbers.include, numbers.exclude, labels)
        return only_labelled(listing) if labels else listing
    except ValueError as error:
        raise ValueError(f"--data {error}") from None


def prepare_data(data: Path | None, folder: Path, recipe: Recipe, resumes: bool, labels: Path | None = None) -> Path:
    """The folder with the manifest to train on: `data`, if it is one; else `folder`, where `data` is prepared.

    Args:
        data: raw volumes, or a folder of `prepare_data.py`; None for the demo's.
        folder: of volumes that runs prepare themselves.
        resumes: what was once prepared is taken as it is, whether its source has changed or is gone.
        labels: folder of the label maps of raw volumes.

    Raises:
        ValueError: if too many files cannot be used, or they were prepared for another recipe.
    """
    if is_prepared(data):
        folder = data
    elif not (resumes and is_prepared(folder)):
        _prepare(data, folder, recipe, labels)
    manifest = read_manifest(folder, FOR_RUNS)
    raw = None if data is None or is_prepared(data) or is_streamed(str(data)) else data.absolute()
    if resumes and raw and manifest.root and Path(manifest.root) not in (raw, raw.parent):  # the latter of an index
        print(f"resume      on the volumes that {folder} has of {manifest.root}; --data {data} is not looked at")
    if other := manifest.preparation.differences(preparation(recipe.data)):
        raise ValueError(
            f"{folder} was prepared otherwise than the recipe says ({'; '.join(other)}): set these keys of "
            "data as they were, or prepare again into another folder"
        )
    _say_what_there_is(manifest, recipe)
    return folder


def _prepare(data: Path | None, folder: Path, recipe: Recipe, labels: Path | None) -> None:
    how, workers = preparation(recipe.data), joblib.cpu_count()
    if data is not None and is_streamed(str(data)):
        from data.hub import open_dataset  # imports pandas, and much else

        dataset = open_dataset(str(data), recipe.data.include, recipe.data.exclude)
        left = prepare_streamed(dataset, Job(folder, dataset.root, how), workers)
    else:
        listing = list_data(data, recipe.data, labels)
        if labels:
            keep_classes(listing.root, labels, folder)
            if (folder / CLASSES).exists():
                read_classes(folder / CLASSES)  # raises before the work is done
        left = prepare_folder(listing, Job(folder, listing.root, how, labels=labels), workers)
    assert not left


def _say_what_there_is(manifest: Manifest, recipe: Recipe) -> None:
    """Raise ValueError if too much is left out."""
    volumes, rejected = manifest.volumes, manifest.rejected.to_pylist()
    bad = [row for row in rejected if row["is_bad"]]
    for row in bad[:SHOWN]:
        print(f"left out    {row['source']}: {row['reason']}")
    if len(bad) > SHOWN:
        print(f"            and {len(bad) - SHOWN} more: {manifest.folder / NAME} has them all")
    if len(bad) > recipe.data.max_bad_share * (len(bad) + len(volumes)) or not len(volumes):
        raise ValueError(
            f"{len(bad)} of {len(bad) + len(volumes)} files cannot be used, more than data.max_bad_share="
            f"{recipe.data.max_bad_share:g}: mend or remove the files listed above, or raise data.max_bad_share"
        )
    others = f", {len(rejected) - len(bad)} that are no images" if len(bad) < len(rejected) else ""
    print(f"data        {len(volumes)} volume{'s' * (len(volumes) > 1)}, {len(bad)} left out{others}")
    if names := recipe.data.channels:
        there = Counter(channel_number(names, modality) for modality in volumes["modality"].to_pylist())
        counts = ", ".join(f"{there[number]} {name}" for number, name in enumerate(names))
        print(f"channels    {counts} of {len(pc.unique(volumes['case']))} samples")
    shapes = matrix(volumes["shape"], 3)
    if recipe.views.coarsest_last:
        orders = [axis_order(spacing, True) for spacing in matrix(volumes["spacing"], 3).tolist()]
        shapes = np.take_along_axis(shapes, np.array(orders), axis=1)
    small = np.flatnonzero((shapes < recipe.views.crop_size).any(axis=1))
    if len(small):
        first = volumes["source"][int(small[0])]
        print(f"small       {len(small)} are smaller than the crop and are padded, such as {first}")
