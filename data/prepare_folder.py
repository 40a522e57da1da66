"""Preparing a folder of volumes: in parallel, in shards, killed and started again at any moment, nothing done twice."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from tqdm import tqdm

from .channels import check_channels, group_channels, grouped
from .files import write_whole
from .journals import JOURNALS, Journal, Record, alone, complete, on_record, rejected
from .manifest import MEDIAN, read_source, write_source
from .median_spacing import median_spacing
from .prepare_volume import Job, bytes_at_most, case_of, prepare_case, stamp
from .series import file_of
from .sources import EXCLUDED, NOT_INCLUDED, LeftOut, Listing, Source

if TYPE_CHECKING:
    from .hub import HubDataset, HubFolder  # imports pandas, and much else

Fetch = Callable[[], bytes]  # gets the content of a volume
MEMORY = 4e9  # bytes that a process needs for a CT of 512 x 512 x 600 voxels


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
    cases, left_out = group_channels(listing.sources, job.preparation.channels)
    listed = {source.path for case in cases for source in case}
    job.folder.mkdir(parents=True, exist_ok=True)
    with alone(job.folder):
        known = on_record(job).rows
        job = _with_median(job, listing, known)
    if known and not listed & known.keys():
        raise ValueError(f"{job.folder} holds volumes of another folder than {job.root}: choose another")
    number, shards = shard
    todo = [case for case in cases[number::shards] if not _is_done(case, known, job, verify)]
    _check_room([source for case in todo for source in case], job)
    with Journal(job) as journal:
        for rows in _in_parallel(((case, None) for case in todo), job, min(workers, len(todo)), len(todo)):
            journal.write(*rows)
    with alone(job.folder):  # who comes last sees the rows of all
        record = on_record(job)
        if left := len(listed - record.rows.keys()):
            return left
        complete(job, record, listed, [*listing.left_out, *left_out])
    return 0


def prepare_streamed(dataset: "HubDataset | HubFolder", job: Job, workers: int, shard: tuple[int, int] = (0, 1)) -> int:
    """The same of a streamed data set; its parts are dealt to the shards.

    Returns:
        How many parts others still have to prepare.
    """
    if job.preparation.spacing == MEDIAN:
        raise ValueError(
            "data.spacing=median: headers of a streamed data set cannot be read first; set numbers, or native"
        )
    job.folder.mkdir(parents=True, exist_ok=True)
    with alone(job.folder):
        _check_state(dataset, job)
        known, finished = _known(record := on_record(job)), record.finished
    first, shards = shard
    with Journal(job) as journal:
        for number in dataset.left(known, finished) & set(range(first, len(dataset), shards)):
            left_out: LeftOut = []
            for rows in _in_parallel(_new_cases(dataset.read(number), known, job, left_out), job, workers):
                journal.write(*rows)
            journal.write(*(rejected(*file) for file in left_out), {"finished": number})
    with alone(job.folder):
        record = on_record(job)
        if left := len(dataset.left(_known(record), record.finished)):
            return left
        modalities = [row.get("modality") for row in record.rows.values() if row.get("file")]
        check_channels(modalities, job.preparation.channels)
        complete(job, record, record.rows.keys() - dict(dataset.left_out).keys(), dataset.left_out, len(dataset))
    return 0


def _check_state(dataset: "HubDataset | HubFolder", job: Job) -> None:
    """Raise ValueError if the folder holds volumes of another data set, or another state: their rows have the same
    names."""
    if (other := read_source(job.folder)) not in ("", job.root):
        raise ValueError(f"{job.folder} holds volumes of {other}: choose another folder")
    write_source(job.folder, str(job.root))
    if not dataset.state:
        return
    state = job.folder / JOURNALS / "data_set.txt"
    if state.exists() and state.read_text() != dataset.state:
        raise ValueError(
            f"{job.folder} holds volumes of {dataset.root} as it was before: choose another folder, or name that "
            f"revision, {dataset.name}@REVISION"
        )
    state.parent.mkdir(exist_ok=True)
    write_whole(state, lambda file: file.write_text(dataset.state))


def _known(record: Record) -> set[str]:
    """Volumes that need not be prepared; what was not chosen then may be now."""
    return {path for path, row in record.rows.items() if row.get("reason") not in (NOT_INCLUDED, EXCLUDED)}


def _new_cases(
    volumes: Iterable[tuple[Source, Fetch]], known: Container[str], job: Job, left_out: LeftOut
) -> Iterator[tuple[tuple[Source, ...], tuple[Fetch, ...]]]:
    """What is prepared together of volumes that come one after the other, those of a session in a row.

    Args:
        left_out: takes what belongs to no sample.
    """
    channels = job.preparation.channels

    def session_of(volume: tuple[Source, Fetch]) -> tuple[str, ...]:
        source, _ = volume
        return source[1:4] if channels and source.subject else (source.path,)

    for _, session in groupby(volumes, key=session_of):
        fetches = dict(session)
        cases, others = grouped([*fetches], channels) if channels else ([tuple(fetches)], [])
        left_out.extend(others)
        for case in cases:
            if any(source.path not in known for source in case):
                yield case, tuple(fetches[source] for source in case)


def _with_median(job: Job, listing: Listing, known: dict[str, dict[str, Any]]) -> Job:
    """The job with the spacing to resample to, if it is the data set's: what it was when the folder was begun."""
    if job.preparation.spacing != MEDIAN:
        return job
    place = job.folder / JOURNALS / "median.json"
    found = next((row["spacing"] for row in known.values() if row.get("spacing")), None)
    if found is None and place.exists():
        found = json.loads(place.read_text())
    if found is None:
        paths = [job.root / file_of(source.path)[0] for source in listing.sources]
        found = median_spacing(paths, job.preparation.orientation)
        place.parent.mkdir(exist_ok=True)
        write_whole(place, lambda file: file.write_text(json.dumps(found)))
    return replace(job, median=tuple(found))


def _check_room(todo: list[Source], job: Job) -> None:
    """Raise ValueError where there is room for less than half of what headers say, warn where not for all."""
    looked_at = todo[:: 1 + len(todo) // 100]
    how = job.spacing, job.preparation.precision
    sizes = [bytes_at_most(job.root / file_of(source.path)[0], *how) for source in looked_at]
    needed = len(todo) * sum(sizes) / max(1, len(sizes))
    free = shutil.disk_usage(job.folder).free
    if free < needed:
        say = (
            f"{job.folder}: {free / 1e9:.1f} GB free on its disk, up to {needed / 1e9:.1f} GB needed for prepared "
            "volumes (less where they have margins): free some, choose another folder, or a coarser data.spacing"
        )
        if free < needed / 2:
            raise ValueError(say)
        warnings.warn(say, stacklevel=2)


def _in_parallel(
    todo: Iterable[tuple[tuple[Source, ...], tuple[Fetch, ...] | None]],
    job: Job,
    workers: int,
    total: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    if total == 0:
        return
    unit = "sample" if job.preparation.channels else "file"
    shown = partial(tqdm, total=total, desc="preparing volumes", unit=unit, disable=total is not None and total < 8)
    if workers == 1:
        yield from shown(prepare_case(sources, job, fetches) for sources, fetches in todo)
        return
    with Parallel(n_jobs=workers, return_as="generator_unordered", max_nbytes=None) as parallel:
        try:
            yield from shown(parallel(delayed(prepare_case)(sources, job, fetches) for sources, fetches in todo))
        except OSError as error:  # a worker's words, without its traceback
            raise OSError(*error.args) from None
    get_reusable_executor(reuse=True).terminate()  # its processes would outlive a killed run by minutes


def _is_done(case: tuple[Source, ...], known: dict[str, dict[str, Any]], job: Job, verify: bool) -> bool:
    rows = [known.get(source.path) for source in case]
    if not all(_is_in_store(row, source, job, verify) for row, source in zip(rows, case)):
        return False
    return not job.preparation.channels or all(row["case"] == case_of(rows) for row in rows)


def _is_in_store(row: dict[str, Any] | None, source: Source, job: Job, verify: bool) -> bool:
    if row is None or (row["source_bytes"], row["source_modified"]) != stamp(job.root / file_of(source.path)[0]):
        return False
    if source.modality not in ("", row.get("modality")):  # which may call for another rule
        return False
    if row.get("reason"):
        return not source.label  # which may have been mended
    files = [(row["file"], row["checksum"], row["bytes"])]
    if source.label:
        if not row.get("label_values"):  # prepared before there was this column
            return False
        files.append((row.get("label"), row.get("label_checksum"), 0))
    for name, checksum, size in files:
        file = job.folder / (name or "missing")
        if not file.is_file() or file.stat().st_size < size:
            return False
        if verify and hashlib.sha256(file.read_bytes()).hexdigest() != checksum:
            return False
    return True
