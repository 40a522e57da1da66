"""Preparing one volume: from its file to the store and to its row of the manifest."""

import errno
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import pyarrow.compute as pc

from .files import write_whole
from .manifest import NAME, Preparation, read_manifest
from .nifti import Image, image_of, read_image
from .series import file_of
from .sources import Source
from .stored_volume import PACKED, save_volume
from .volume import LARGEST_VOLUME, BadVolume, NotAnImage, Prepared, is_label_map, prepare, prepare_labels

RETRIES = (1.0, 10.0)  # seconds after which a disk that failed is asked again
PERCENTILES = (0.0, 0.5, 5.0, 50.0, 95.0, 99.5, 100.0)
EVERY = 3  # voxels of an axis that statistics of the foreground look at
Read = TypeVar("Read")


@dataclass(frozen=True)
class Job:
    """What all volumes of a folder have in common when they are prepared."""

    folder: Path
    root: Path | str  # of the sources: a folder, or the name of a streamed data set
    preparation: Preparation
    packed: bool = False  # a third smaller, slower to read
    labels: Path | None = None  # folder of the maps of labels that go with the sources


def read_header(path: Path) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Voxels and spacing in mm of a 3D volume, from its header; None if it is none."""
    try:
        header = nib.load(path).header
        shape = header.get_data_shape()
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        return (shape, header.get_zooms()[:3]) if len(shape) == 3 and min(shape) > 1 else None
    except Exception:  # nibabel, gzip and zlib each fail in their own way
        return None


def bytes_at_most(path: Path, how: Preparation) -> float:
    """Of a prepared volume, by its header: most are cropped to a box first. 0 if it cannot be prepared."""
    if (found := read_header(path)) is None:
        return 0.0
    voxels = np.prod([size * float(old) / new for size, old, new in zip(*found, how.spacing)])
    return np.dtype(how.precision).itemsize * float(voxels) if voxels <= LARGEST_VOLUME else 0.0


def prepare_one(source: Source, job: Job, fetch: Callable[[], bytes] | None = None) -> dict[str, Any]:
    """Prepare one volume and its labels; its row of the manifest, with the reason if it cannot be used.

    Args:
        fetch: gets the content of the NIfTI file, if it is not one below `job.root`.
    """
    row = {"source": source.path, **{key: getattr(source, key) or None for key in Source._fields[1:5]}}
    file, number = file_of(source.path)
    content = _patiently(fetch, source.path) if fetch else None
    known_by = (len(content), None) if content is not None else stamp(job.root / file)
    row |= dict(zip(("source_bytes", "source_modified"), known_by))
    try:
        where = job.root / file if content is None else image_of(content)
        return row | _prepared(source, job, partial(read_image, where, job.preparation.orientation, number), row)
    except BadVolume as error:
        return row | {"reason": str(error), "is_bad": not isinstance(error, NotAnImage)}


def prepare_again(folder: Path, path: str) -> bool:
    """Prepare a volume of a prepared folder whose file is gone or short; whether its source is still what it was.

    Raises:
        BadVolume, OSError: as `prepare_one`.
    """
    if not (folder / NAME).exists():  # all is gone: a mount?
        return False
    manifest = read_manifest(folder)
    if not manifest.root:
        return False
    (row,) = manifest.table.filter(pc.equal(manifest.table["source"], path)).to_pylist()
    raw, file = Path(manifest.root) / file_of(path)[0], manifest.folder / row["file"]
    if not raw.is_file() or stamp(raw) != (row["source_bytes"], row["source_modified"]):
        return False
    if file.exists() and file.stat().st_size >= row["bytes"]:
        return False
    source = Source(path, modality=row["modality"] or "")  # which says, too, whether it was taken for a CT
    again = prepare_one(source, Job(manifest.folder, Path(manifest.root), manifest.preparation, file.suffix == PACKED))
    return again["checksum"] == row["checksum"]


def _prepared(source: Source, job: Job, read: Callable[[], Image], row: dict[str, Any]) -> dict[str, Any]:
    """The rest of a row, and in it the modality, if the values alone tell it."""
    how = job.preparation
    image = _patiently(read, source.path)
    if is_label_map(image.voxels):
        raise NotAnImage("a map of labels or a mask: few whole numbers, the same over whole regions")
    rules = how.intensity, how.intensity_of_ct, source.modality
    done = prepare(image.voxels, image.spacing, how.spacing, *rules)
    row["modality"] = source.modality or ("CT" if done.is_ct else None)
    box, voxels = image.voxels[done.box], done.voxels.astype(how.precision)
    start = np.array([part.start for part in done.box])
    to_image = np.column_stack([done.to_box[:, :3], done.to_box[:, 3] + start])
    to_source = image.to_file[:, :3] @ to_image + np.column_stack([np.zeros((3, 3)), image.to_file[:, 3]])
    name = _file_name(source.path, row, job)
    label = {}
    if source.label:
        label = dict(zip(("label", "label_checksum"), _prepare_label(source, job, image, done, name)))
    checksum, size = _save(voxels, job.folder / "volumes" / name, job.packed)
    foreground = done.voxels[::EVERY, ::EVERY, ::EVERY] > done.foreground_threshold
    places = EVERY * np.argwhere(foreground if foreground.any() else ~foreground)
    ends = {0.0: box.min(), 100.0: box.max()}
    percentiles = np.percentile(box[::EVERY, ::EVERY, ::EVERY], PERCENTILES)
    return {
        "file": f"volumes/{name}",
        "bytes": size,
        "checksum": checksum,
        "shape": voxels.shape,
        "spacing": how.spacing,
        "source_shape": image.shape,
        "source_affine": image.affine.flatten(),
        "prepared_to_source": to_source.flatten(),
        "source_mean": done.mean,
        "source_std": done.std,
        "source_percentiles": [float(ends.get(q, value)) for q, value in zip(PERCENTILES, percentiles)],
        "padding": float(voxels.dtype.type(done.padding)),  # as the voxels of the background are kept
        "foreground_threshold": done.foreground_threshold,
        "foreground_share": foreground.mean(),
        "foreground_mean": places.mean(axis=0),
        "foreground_std": places.std(axis=0),
        **label,
    }


def _prepare_label(source: Source, job: Job, image: Image, done: Prepared, name: str) -> tuple[str, str]:
    path = (job.labels or job.root) / source.label
    try:
        label = _patiently(partial(read_image, path, job.preparation.orientation), source.label)
        if label.shape != image.shape or not np.allclose(label.affine, image.affine, atol=1e-2):
            raise BadVolume(f"it has {label.shape} voxels placed otherwise than the image's {image.shape}")
        labels = prepare_labels(label.voxels, done.box, done.voxels.shape)
    except BadVolume as error:
        raise BadVolume(f"its label map {source.label}: {error}") from None
    return f"labels/{name}", _save(labels, job.folder / "labels" / name, job.packed)[0]


def _save(array: np.ndarray, file: Path, packed: bool) -> tuple[str, int]:
    """Write an array whole or not at all; its checksum and size."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = []

    def fill(temporary: Path) -> None:
        save_volume(array, temporary, packed)
        content = temporary.read_bytes()
        found.extend([hashlib.sha256(content).hexdigest(), len(content)])

    try:
        write_whole(file, fill)  # a killed run leaves no half-written volume behind
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no room for prepared volumes in {file.parent}: free some") from None
        raise
    return tuple(found)


def _patiently(read: Callable[[], Read], name: str) -> Read:
    for pause in (*RETRIES, None):
        try:
            return read()
        except OSError as error:
            if pause is None:
                why = error.strerror or str(error)
                raise OSError(error.errno, f"{name} cannot be read ({why}); it is not left out: try again") from None
            time.sleep(pause)


def stamp(path: Path) -> tuple[int | None, int | None]:
    """Bytes and time of a file, by which a change of it is noticed."""
    try:
        stat = path.stat()
    except OSError:  # reading it will tell why
        return None, None
    return stat.st_size, stat.st_mtime_ns


def _file_name(path: str, row: dict[str, Any], job: Job) -> str:
    """Changes when the source or the preparation does; in one of 256 folders, which no file system minds."""
    facts = [path, *(row.get(key) for key in ("source_bytes", "source_modified", "modality")), asdict(job.preparation)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return f"{key[:2]}/{Path(path).name.split('.nii')[0][:60]}-{key}{PACKED if job.packed else '.npy'}"
