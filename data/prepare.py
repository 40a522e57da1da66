"""Preparing a folder of volumes: in parallel, in shards, killed and started again at any moment, nothing done twice."""

import errno
import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from tqdm import tqdm

from .files import write_whole
from .manifest import NAME, Manifest, Preparation, read_manifest, write_manifest
from .nifti import read_image
from .sources import Listing, Source
from .volume import BadVolume, NotAnImage, is_label_map, prepare, prepare_labels

RETRIES = (1.0, 10.0)  # seconds after which a disk that failed is asked again
PERCENTILES = (0.0, 0.5, 5.0, 50.0, 95.0, 99.5, 100.0)
JOURNALS = "rows"  # folder of what is done, a line a volume, until all is and the manifest is written
MEMORY = 4e9  # bytes that a process needs for a CT of 512 x 512 x 600 voxels
EVERY = 3  # voxels of an axis that statistics of the foreground look at


@dataclass(frozen=True)
class Job:
    """What all volumes of a folder have in common when they are prepared."""

    folder: Path
    root: Path  # of the sources
    preparation: Preparation
    labels: Path | None = None  # folder of the maps of labels that go with the sources


def prepare_folder(
    listing: Listing, job: Job, workers: int, shard: tuple[int, int] = (0, 1), verify: bool = False
) -> int:
    """Prepare the volumes of a listing, or of a shard of it, unless they are in the folder already.

    Several processes may do so at once. When nothing is left to prepare, the one that notices writes the manifest.

    Args:
        workers: processes.
        shard: its number, from 0, and how many there are.
        verify: prepare again, too, what no longer has its checksum.

    Returns:
        How many volumes others still have to prepare.

    Raises:
        ValueError: if the folder holds other volumes, or volumes prepared otherwise.
        OSError: if the folder cannot be written, or a file not be read for reasons of the disk; what is in the folder
            stays valid.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    known = _rows_on_record(job)
    listed = {source.path for source in listing.sources}
    if known and not listed & known.keys():
        raise ValueError(f"{job.folder} holds volumes of another folder than {job.root}: choose another")
    number, shards = shard
    todo = [s for s in listing.sources[number::shards] if not _is_done(known.get(s.path), s, job, verify)]
    with _Journal(job) as journal:
        for row in _in_parallel(todo, job, workers):
            journal.write(row)
            known[row["source"]] = row
    with FileLock(job.folder / ".lock"):  # who comes last sees the rows of all
        known = _rows_on_record(job)
        if left := len(listed - known.keys()):
            return left
        rows = [known[path] for path in listed] + [_rejected(path, reason) for path, reason in listing.left_out]
        write_manifest(job.folder, rows, job.preparation, str(job.root.absolute()))
        for journal in (job.folder / JOURNALS).glob("*.jsonl"):
            journal.unlink()
    return 0


def prepare_again(manifest: Manifest, path: str) -> bool:
    """Prepare a volume of a manifest whose file is gone or short; whether its source is still what it was.

    Raises:
        BadVolume, OSError: as `prepare_one`.
    """
    if not (manifest.folder / NAME).exists():  # all is gone: a mount?
        return False
    (row,) = manifest.table.filter(pc.equal(manifest.table["source"], path)).to_pylist()
    raw, file = Path(manifest.root) / path, manifest.folder / row["file"]
    if not raw.is_file() or _stamp(raw) != (row["source_bytes"], row["source_modified"]):
        return False
    if file.exists() and file.stat().st_size >= row["bytes"]:
        return False
    source = Source(path, modality=row["modality"] or "")  # which says, too, whether it was taken for a CT
    again = prepare_one(source, Job(manifest.folder, Path(manifest.root), manifest.preparation))
    return again["checksum"] == row["checksum"]


def prepare_one(source: Source, job: Job, image: nib.Nifti1Image | None = None) -> dict[str, Any]:
    """Prepare one volume and its labels; its row of the manifest, with the reason if it cannot be used.

    Args:
        image: of the source, if it is not a file below `job.root`.
    """
    row = {"source": source.path, **{key: getattr(source, key) or None for key in Source._fields[1:5]}}
    try:
        if image is None:
            row |= dict(zip(("source_bytes", "source_modified"), _stamp(job.root / source.path)))
        return row | _prepared(source, job, job.root / source.path if image is None else image, row)
    except BadVolume as error:
        return row | {"reason": str(error), "is_bad": not isinstance(error, NotAnImage)}


def _prepared(source: Source, job: Job, where: Path | nib.Nifti1Image, row: dict[str, Any]) -> dict[str, Any]:
    """The rest of a row, and in it the modality, if the values alone tell it."""
    how = job.preparation
    image = _patiently(partial(read_image, where, how.orientation), source.path)
    if is_label_map(image.voxels):
        raise NotAnImage("a map of labels or a mask: few whole numbers, the same over whole regions")
    rules = how.intensity, how.intensity_of_ct, source.modality
    done = prepare(image.voxels, image.spacing, how.spacing, *rules)
    row["modality"] = source.modality or ("CT" if done.is_ct else None)
    box, voxels = image.voxels[done.box], done.voxels.astype(how.precision)
    start = np.array([part.start for part in done.box])
    to_image = np.column_stack([done.to_box[:, :3], done.to_box[:, 3] + start])
    to_source = image.to_file[:, :3] @ to_image + np.column_stack([np.zeros((3, 3)), image.to_file[:, 3]])
    name = _file_name(source.path, row, how)
    label = {}
    if source.label:
        label = dict(zip(("label", "label_checksum"), _prepare_label(source, job, image, done, name)))
    checksum, size = _save(voxels, job.folder / "volumes" / name)
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


def _prepare_label(source: Source, job: Job, image, done, name: str) -> tuple[str, str]:
    path = (job.labels or job.root) / source.label
    try:
        label = _patiently(partial(read_image, path, job.preparation.orientation), source.label)
        if label.shape != image.shape or not np.allclose(label.affine, image.affine, atol=1e-2):
            raise BadVolume(f"it has {label.shape} voxels placed otherwise than the image's {image.shape}")
        labels = prepare_labels(label.voxels, done.box, done.voxels.shape)
    except BadVolume as error:
        raise BadVolume(f"its label map {source.label}: {error}") from None
    return f"labels/{name}", _save(labels, job.folder / "labels" / name)[0]


def _save(array: np.ndarray, file: Path) -> tuple[str, int]:
    """Write an array whole or not at all; its checksum and size."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = []

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            np.save(stream, array)
        content = temporary.read_bytes()
        found.extend([hashlib.sha256(content).hexdigest(), len(content)])

    try:
        write_whole(file, fill)  # a killed run leaves no half-written volume behind
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no room for prepared volumes in {file.parent}: free some") from None
        raise
    return tuple(found)


def _patiently(read, name: str):
    for pause in (*RETRIES, None):
        try:
            return read()
        except OSError as error:
            if pause is None:
                why = error.strerror or str(error)
                raise OSError(error.errno, f"{name} cannot be read ({why}); it is not left out: try again") from None
            time.sleep(pause)


def _in_parallel(todo: list[Source], job: Job, workers: int) -> Iterator[dict[str, Any]]:
    if not todo:
        return
    rows = Parallel(n_jobs=min(workers, len(todo)), return_as="generator_unordered")(
        delayed(prepare_one)(source, job) for source in todo
    )
    yield from tqdm(rows, total=len(todo), desc="preparing volumes", unit="file", disable=len(todo) < 8)
    get_reusable_executor().shutdown()  # its processes would outlive a killed run by minutes


class _Journal:
    """What this process has done, a line a volume; a file of its own, so that others may do the same at once."""

    def __init__(self, job: Job):
        self.path = job.folder / JOURNALS / f"{uuid.uuid4().hex}.jsonl"
        self.facts = asdict(job.preparation)

    def __enter__(self):
        self.file = None
        return self

    def write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            self.path.parent.mkdir(exist_ok=True)
            self.file = open(self.path, "w")  # noqa: SIM115, closed in __exit__
            self.file.write(json.dumps(self.facts) + "\n")
        self.file.write(json.dumps(row, default=lambda value: value.tolist()) + "\n")
        self.file.flush()

    def __exit__(self, *_):
        if self.file:
            self.file.close()


def _rows_on_record(job: Job) -> dict[str, dict[str, Any]]:
    """Source -> row, of the manifest and of all journals.

    Raises:
        ValueError: if they were prepared otherwise than `job` asks.
    """
    found, rows = [], {}
    if (job.folder / NAME).exists():
        manifest = read_manifest(job.folder)
        found.append(manifest.preparation)
        rows = {row["source"]: row for row in manifest.table.to_pylist()}
    for journal in sorted((job.folder / JOURNALS).glob("*.jsonl")):
        facts, *lines = journal.read_text().splitlines() or [""]
        try:
            facts = json.loads(facts)
            found.append(Preparation(**{**facts, "spacing": tuple(facts["spacing"])}))
            for line in lines:
                row = json.loads(line)
                rows[row["source"]] = row
        except json.JSONDecodeError:
            continue  # a line that a kill cut off
    for preparation in found:
        if other := preparation.differences(job.preparation):
            raise ValueError(
                f"{job.folder} holds volumes prepared otherwise ({'; '.join(other)}): choose another folder"
            )
    return rows


def _is_done(row: dict[str, Any] | None, source: Source, job: Job, verify: bool) -> bool:
    if row is None or (row["source_bytes"], row["source_modified"]) != _stamp(job.root / source.path):
        return False
    if source.modality not in ("", row.get("modality")):  # which may call for another rule
        return False
    if row.get("reason"):
        return not source.label  # which may have been mended
    files = [(row["file"], row["checksum"], row["bytes"])]
    if source.label:
        files.append((row.get("label"), row.get("label_checksum"), 0))
    for name, checksum, size in files:
        file = job.folder / (name or "missing")
        if not file.is_file() or file.stat().st_size < size:
            return False
        if verify and hashlib.sha256(file.read_bytes()).hexdigest() != checksum:
            return False
    return True


def _rejected(path: str, reason: str) -> dict[str, Any]:
    return {"source": path, "reason": reason, "is_bad": False}


def _stamp(path: Path) -> tuple[int | None, int | None]:
    """Bytes and time of a file, by which a change of it is noticed."""
    try:
        stat = path.stat()
    except OSError:  # reading it will tell why
        return None, None
    return stat.st_size, stat.st_mtime_ns


def _file_name(path: str, row: dict[str, Any], how: Preparation) -> str:
    """Changes when the source or the preparation does; in one of 256 folders, which no file system minds."""
    facts = [path, *(row.get(key) for key in ("source_bytes", "source_modified", "modality")), asdict(how)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return f"{key[:2]}/{Path(path).name.split('.nii')[0][:60]}-{key}.npy"
