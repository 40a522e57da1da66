"""Preparing the volumes of one sample: from their files to the store and to their rows of the manifest."""

import errno
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import pyarrow.compute as pc

from .channels import channel_number
from .files import write_whole
from .manifest import MEDIAN, NAME, Preparation, read_manifest
from .moments import EVERY, moments
from .nifti import Image, image_of, read_image
from .series import file_of
from .sources import Source
from .stored_volume import PACKED, save_volume
from .volume import (
    LARGEST_VOLUME,
    MOST_LABELS,
    NATIVE,
    BadVolume,
    Box,
    NotAnImage,
    Prepared,
    around,
    is_label_map,
    own_box,
    prepare,
    prepare_labels,
)

RETRIES = (1.0, 10.0)  # seconds after which a disk that failed is asked again
PERCENTILES = (0.0, 0.5, 5.0, 50.0, 95.0, 99.5, 100.0)
Read = TypeVar("Read")


@dataclass(frozen=True)
class Job:
    """What all volumes of a folder have in common when they are prepared."""

    folder: Path
    root: Path | str  # of the sources: a folder, or the name of a streamed data set
    preparation: Preparation
    packed: bool = False  # a quarter to a third smaller, slower to read
    labels: Path | None = None  # folder of the maps of labels that go with the sources
    median: tuple[float, float, float] | None = None  # spacing in mm, where that is what volumes are resampled to

    @property
    def spacing(self) -> tuple[float, float, float] | str:
        """Of prepared volumes, in mm, or `NATIVE`."""
        return self.median or self.preparation.spacing


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


def bytes_at_most(path: Path, spacing: tuple[float, float, float] | str, precision: str) -> float:
    """Of a prepared volume, by its header: most are cropped to a box first. 0 if it cannot be prepared."""
    if (found := read_header(path)) is None:
        return 0.0
    shape, old = found
    finer = 1.0 if spacing == NATIVE else float(np.prod(old, dtype=float) / np.prod(spacing))
    voxels = float(np.prod(shape, dtype=float)) * finer
    return np.dtype(precision).itemsize * voxels if voxels <= LARGEST_VOLUME else 0.0


def prepare_case(
    sources: Sequence[Source], job: Job, fetches: Sequence[Callable[[], bytes]] | None = None
) -> list[dict[str, Any]]:
    """Prepare a volume, or the channels of a sample on one grid, and their labels.

    Args:
        fetches: get the contents of the NIfTI files, if they are not those below `job.root`.

    Returns:
        Their rows of the manifest; with the reason, where one cannot be used.
    """
    contents = [fetch and patiently(fetch, source.path) for source, fetch in zip(sources, fetches or repeat(None))]
    rows = [_row(source, job, content) for source, content in zip(sources, contents)]
    case = case_of(rows) if job.preparation.channels else None
    rules = job.preparation.intensity, job.preparation.intensity_of_ct
    images: dict[int, Image] = {}
    boxes: list[Box] = []
    for number, source in enumerate(sources):
        rows[number]["case"] = case
        try:
            image = _read(source, job, contents[number])
            first = images[min(images)] if images else image
            if image.shape != first.shape or not np.allclose(image.affine, first.affine, atol=1e-2):
                other = sources[min(images)].path
                raise BadVolume(f"it is not on the grid of {other}: channels of one sample must be registered")
            if len(sources) > 1:
                boxes.append(own_box(image.voxels, image.spacing, *rules, source.modality))
            images[number] = image
        except BadVolume as error:
            rows[number] |= _reason(error)
    labels: dict[str, dict[str, Any]] = {}  # channels of a sample have one in common
    for number, image in images.items():
        source, row, box = sources[number], rows[number], around(boxes) if boxes else None
        try:
            spacing = images[min(images)].spacing  # of all: what rounding tells apart must not end in other shapes
            done = prepare(image.voxels, spacing, job.spacing, *rules, source.modality, box)
            row["modality"] = source.modality or ("CT" if done.is_ct else None)  # if the values alone tell it
            name = _file_name(source.path, row, job)
            if source.label and source.label not in labels:
                labels[source.label] = _save_label(source, job, image, done, name)
            row |= _save_volume(job, image, done, name) | labels.get(source.label, {})
        except BadVolume as error:
            row |= _reason(error)
    return rows


def case_of(rows: Sequence[dict[str, Any]]) -> str:
    """A name for the channels of a sample, another one if one is added or changed: all are cropped to one box."""
    files = [(row["source"], row["source_bytes"], row["source_modified"]) for row in rows]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def prepare_again(folder: Path, path: str) -> bool:
    """Prepare a volume of a prepared folder whose file is gone or short; whether its source is still what it was.

    Raises:
        BadVolume, OSError: as `prepare_case`.
    """
    if not (folder / NAME).exists():  # all is gone: a mount?
        return False
    manifest = read_manifest(folder)
    if not manifest.root:
        return False
    (row,) = manifest.table.filter(pc.equal(manifest.table["source"], path)).to_pylist()
    file = manifest.folder / row["file"]
    if file.exists() and file.stat().st_size >= row["bytes"]:
        return False
    case = manifest.table.filter(pc.equal(manifest.table["case"], row["case"])).to_pylist() if row["case"] else [row]
    case.sort(key=lambda row: channel_number(manifest.preparation.channels, row["modality"]) or 0)
    root = Path(manifest.root)
    if any(stamp(root / file_of(r["source"])[0]) != (r["source_bytes"], r["source_modified"]) for r in case):
        return False
    sources = [Source(r["source"], modality=r["modality"] or "") for r in case]  # which tells, too, what was a CT
    packed, median = file.suffix == PACKED, tuple(row["spacing"]) if manifest.preparation.spacing == MEDIAN else None
    again = prepare_case(sources, Job(manifest.folder, root, manifest.preparation, packed, median=median))
    return any(r["source"] == path and r.get("checksum") == row["checksum"] for r in again)


def _row(source: Source, job: Job, content: bytes | None) -> dict[str, Any]:
    """What is known before the volume is read."""
    row = {"source": source.path, **{key: getattr(source, key) or None for key in Source._fields[1:5]}}
    known_by = stamp(job.root / file_of(source.path)[0]) if content is None else (len(content), None)
    return row | dict(zip(("source_bytes", "source_modified"), known_by))


def _reason(error: BadVolume) -> dict[str, Any]:
    return {"reason": str(error), "is_bad": not isinstance(error, NotAnImage)}


def _read(source: Source, job: Job, content: bytes | None) -> Image:
    file, number = file_of(source.path)
    where = job.root / file if content is None else image_of(content)
    image = patiently(partial(read_image, where, job.preparation.orientation, number), source.path)
    if is_label_map(image.voxels):
        raise NotAnImage("a map of labels or a mask: few whole numbers, the same over whole regions")
    return image


def _save_volume(job: Job, image: Image, done: Prepared, name: str) -> dict[str, Any]:
    """The rest of a row."""
    box, voxels = image.voxels[done.box], done.voxels.astype(job.preparation.precision)
    start = np.array([part.start for part in done.box])
    to_image = np.column_stack([done.to_box[:, :3], done.to_box[:, 3] + start])
    to_source = image.to_file[:, :3] @ to_image + np.column_stack([np.zeros((3, 3)), image.to_file[:, 3]])
    checksum, size = _save(voxels, job.folder / "volumes" / name, job.packed)
    foreground = done.voxels[::EVERY, ::EVERY, ::EVERY] > done.foreground_threshold
    mean, std = moments(foreground, EVERY)
    ends = {0.0: box.min(), 100.0: box.max()}
    percentiles = np.percentile(box[::EVERY, ::EVERY, ::EVERY], PERCENTILES)
    return {
        "file": f"volumes/{name}",
        "bytes": size,
        "checksum": checksum,
        "shape": voxels.shape,
        "spacing": done.spacing,
        "source_shape": image.shape,
        "source_affine": image.affine.flatten(),
        "prepared_to_source": to_source.flatten(),
        "source_mean": done.mean,
        "source_std": done.std,
        "source_percentiles": [float(ends.get(q, value)) for q, value in zip(PERCENTILES, percentiles)],
        "padding": float(voxels.dtype.type(done.padding)),  # as the voxels of the background are kept
        "foreground_threshold": done.foreground_threshold,
        "foreground_share": foreground.mean(),
        "foreground_mean": mean,
        "foreground_std": std,
    }


def _save_label(source: Source, job: Job, image: Image, done: Prepared, name: str) -> dict[str, Any]:
    path = (job.labels or job.root) / source.label
    try:
        label = patiently(partial(read_image, path, job.preparation.orientation), source.label)
        if label.shape != image.shape or not np.allclose(label.affine, image.affine, atol=1e-2):
            raise BadVolume(f"it has {label.shape} voxels placed otherwise than the image's {image.shape}")
        labels = prepare_labels(label.voxels, done.box, done.voxels.shape)
        if len(values := np.unique(labels)) > MOST_LABELS:
            raise BadVolume(f"it has {len(values)} different labels: is it an image?")
    except BadVolume as error:
        raise BadVolume(f"its label map {source.label}: {error}") from None
    return {
        "label": f"labels/{name}",
        "label_checksum": _save(labels, job.folder / "labels" / name, job.packed)[0],
        "label_values": values.tolist(),
    }


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


def patiently(read: Callable[[], Read], name: str) -> Read:
    """What `read` returns; a disk or a network that fails is asked again, after a pause.

    Raises:
        OSError: if all was in vain; it has the name.
    """
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
    known = (row.get(key) for key in ("source_bytes", "source_modified", "modality", "case"))
    facts = [path, *known, asdict(job.preparation), job.median]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return f"{key[:2]}/{Path(path).name.split('.nii')[0][:60]}-{key}{PACKED if job.packed else '.npy'}"
