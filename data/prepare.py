"""Preparing a folder of volumes: in parallel, in shards, killed and started again at any moment, nothing done twice."""

import errno
import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import nibabel as nib
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from tqdm import tqdm

from .files import write_whole
from .manifest import NAME, Preparation, read_manifest, write_manifest
from .nifti import image_of, read_image
from .sources import Listing, Source
from .volume import BadVolume, NotAnImage, is_label_map, prepare, prepare_labels

if TYPE_CHECKING:
    from .hub import HubDataset  # imports pandas, and much else

RETRIES = (1.0, 10.0)  # seconds after which a disk that failed is asked again
PERCENTILES = (0.0, 0.5, 5.0, 50.0, 95.0, 99.5, 100.0)
JOURNALS = "rows"  # folder of what is done, a line a volume, until all is and the manifest is written
MEMORY = 4e9  # bytes that a process needs for a CT of 512 x 512 x 600 voxels
EVERY = 3  # voxels of an axis that statistics of the foreground look at


@dataclass(frozen=True)
class Job:
    """What all volumes of a folder have in common when they are prepared."""

    folder: Path
    root: Path | str  # of the sources: a folder, or the name of a streamed data set
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
    known = _on_record(job).rows
    listed = {source.path for source in listing.sources}
    if known and not listed & known.keys():
        raise ValueError(f"{job.folder} holds volumes of another folder than {job.root}: choose another")
    number, shards = shard
    todo = [s for s in listing.sources[number::shards] if not _is_done(known.get(s.path), s, job, verify)]
    with _Journal(job) as journal:
        for row in _in_parallel(((source, None) for source in todo), job, min(workers, len(todo)), len(todo)):
            journal.write(row)
    with FileLock(job.folder / ".lock"):  # who comes last sees the rows of all
        known = _on_record(job).rows
        if left := len(listed - known.keys()):
            return left
        _complete(job, [known[path] for path in listed] + [_rejected(*file) for file in listing.left_out])
    return 0


def prepare_streamed(dataset: "HubDataset", job: Job, workers: int, shard: tuple[int, int] = (0, 1)) -> int:
    """The same of a streamed data set; the files of its rows are dealt to the shards.

    Returns:
        How many files of rows others still have to prepare.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    record, (first, shards) = _on_record(job), shard
    with _Journal(job) as journal:
        for number in set(range(first, len(dataset), shards)) - record.finished:
            new = ((source, content) for source, content in dataset.read(number) if source.path not in record.rows)
            for row in _in_parallel(new, job, workers):
                journal.write(row)
            journal.write({"finished": number})
    with FileLock(job.folder / ".lock"):
        record = _on_record(job)
        if left := len(set(range(len(dataset))) - record.finished):
            return left
        _complete(job, list(record.rows.values()), finished=len(dataset))
    return 0


def _complete(job: Job, rows: list[dict[str, Any]], finished: int = 0) -> None:
    root = job.root if isinstance(job.root, str) else str(job.root.absolute())
    write_manifest(job.folder, rows, job.preparation, root, finished)
    for journal in (job.folder / JOURNALS).glob("*.jsonl"):
        journal.unlink()


def prepare_again(folder: Path, path: str) -> bool:
    """Prepare a volume of a prepared folder whose file is gone or short; whether its source is still what it was.

    Raises:
        BadVolume, OSError: as `prepare_one`.
    """
    if not (folder / NAME).exists():  # all is gone: a mount?
        return False
    manifest = read_manifest(folder)
    (row,) = manifest.table.filter(pc.equal(manifest.table["source"], path)).to_pylist()
    raw, file = Path(manifest.root) / path, manifest.folder / row["file"]
    if not raw.is_file() or _stamp(raw) != (row["source_bytes"], row["source_modified"]):
        return False
    if file.exists() and file.stat().st_size >= row["bytes"]:
        return False
    again = prepare_one(Source(path), Job(manifest.folder, Path(manifest.root), manifest.preparation))
    return again["checksum"] == row["checksum"]


def prepare_one(source: Source, job: Job, content: bytes | None = None) -> dict[str, Any]:
    """Prepare one volume and its labels; its row of the manifest, with the reason if it cannot be used.

    Args:
        content: of the NIfTI file, if it is not one below `job.root`.
    """
    row = {"source": source.path, **{key: getattr(source, key) or None for key in Source._fields[1:5]}}
    stamp = (len(content), None) if content is not None else _stamp(job.root / source.path)
    row |= dict(zip(("source_bytes", "source_modified"), stamp))
    try:
        return row | _prepared(source, job, job.root / source.path if content is None else image_of(content), row)
    except BadVolume as error:
        return row | {"reason": str(error), "is_bad": not isinstance(error, NotAnImage)}


def _prepared(source: Source, job: Job, where: Path | nib.Nifti1Image, row: dict[str, Any]) -> dict[str, Any]:
    how = job.preparation
    image = _patiently(partial(read_image, where, how.orientation), source.path)
    if is_label_map(image.voxels):
        raise NotAnImage("a map of labels or a mask: few whole numbers, the same over whole regions")
    done = prepare(image.voxels, image.spacing, how.spacing)
    box, voxels = image.voxels[done.box], done.voxels.astype(how.precision)
    start = np.array([part.start for part in done.box])
    to_image = np.column_stack([done.to_box[:, :3], done.to_box[:, 3] + start])
    to_source = image.to_file[:, :3] @ to_image + np.column_stack([np.zeros((3, 3)), image.to_file[:, 3]])
    name = _file_name(source.path, row, how)
    label = {}
    if source.label:
        label = dict(zip(("label", "label_checksum"), _prepare_label(source, job, image, done, name)))
    checksum, size = _save(voxels, job.folder / "volumes" / name)
    foreground = done.voxels[::EVERY, ::EVERY, ::EVERY] > 0
    places = EVERY * np.argwhere(foreground)
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
        "foreground_threshold": 0.0,
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


def _in_parallel(
    todo: Iterable[tuple[Source, bytes | None]], job: Job, workers: int, total: int | None = None
) -> Iterator[dict[str, Any]]:
    if total == 0:
        return
    shown = partial(tqdm, total=total, desc="preparing volumes", unit="file", disable=total is not None and total < 8)
    if workers == 1:
        yield from shown(prepare_one(source, job, content) for source, content in todo)
        return
    with Parallel(n_jobs=workers, return_as="generator_unordered", max_nbytes=None) as parallel:
        yield from shown(parallel(delayed(prepare_one)(source, job, content) for source, content in todo))
    get_reusable_executor(reuse=True).terminate()  # its processes would outlive a killed run by minutes


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


class _Record(NamedTuple):
    rows: dict[str, dict[str, Any]]  # source -> row
    finished: set[int]  # files of rows of a streamed data set


def _on_record(job: Job) -> _Record:
    """What the manifest and all journals say.

    Raises:
        ValueError: if they are of volumes that were prepared otherwise than `job` asks.
    """
    found, rows, finished = [], {}, set()
    if (job.folder / NAME).exists():
        manifest = read_manifest(job.folder)
        found.append(manifest.preparation)
        rows = {row["source"]: row for row in manifest.table.to_pylist()}
        finished = set(range(manifest.finished))
    for journal in sorted((job.folder / JOURNALS).glob("*.jsonl")):
        facts, *lines = journal.read_text().splitlines() or [""]
        try:
            facts = json.loads(facts)
            found.append(Preparation(**{**facts, "spacing": tuple(facts["spacing"])}))
            for line in lines:
                row = json.loads(line)
                if "finished" in row:
                    finished.add(row["finished"])
                else:
                    rows[row["source"]] = row
        except json.JSONDecodeError:
            continue  # a line that a kill cut off
    for preparation in found:
        if other := preparation.differences(job.preparation):
            raise ValueError(
                f"{job.folder} holds volumes prepared otherwise ({'; '.join(other)}): choose another folder"
            )
    return _Record(rows, finished)


def _is_done(row: dict[str, Any] | None, source: Source, job: Job, verify: bool) -> bool:
    if row is None or (row["source_bytes"], row["source_modified"]) != _stamp(job.root / source.path):
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
    facts = [path, row.get("source_bytes"), row.get("source_modified"), asdict(how)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return f"{key[:2]}/{Path(path).name.split('.nii')[0][:60]}-{key}.npy"
