"""What is done of a preparation: a journal for each process that takes part, a manifest once nothing is left."""

import json
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from .files import has_no_locks
from .manifest import NAME, SCHEMA, Preparation, read_manifest, write_manifest
from .prepare_volume import Job
from .sources import LeftOut

JOURNALS = "rows"  # folder of what is done, a line a volume, until all is and the manifest is written
LEFT_BEHIND = 86400.0  # seconds after which nobody writes a file any more
TO_GO_ON = (  # what must be known of a volume to leave it as it is
    *("source", "source_bytes", "source_modified", "modality", "case", "reason"),
    *("file", "checksum", "bytes", "spacing", "label", "label_checksum", "label_values"),
)


class Journal:
    """What this process has done, a line a volume; a file of its own, so that others may do the same at once.

    It is `NAME.open` until it is closed, and then `NAME.jsonl`: others remove only what is closed.
    """

    def __init__(self, job: Job):
        self.path = job.folder / JOURNALS / f"{uuid.uuid4().hex}.open"
        self.facts = asdict(job.preparation)

    def __enter__(self):
        self.file = None
        return self

    def write(self, *rows: dict[str, Any]) -> None:
        if self.file is None:
            self.path.parent.mkdir(exist_ok=True)
            self.file = open(self.path, "w")  # noqa: SIM115, closed in __exit__
            self.file.write(json.dumps(self.facts) + "\n")
        for row in rows:
            self.file.write(json.dumps(row, default=lambda value: value.tolist()) + "\n")
        self.file.flush()

    def __exit__(self, *_):
        if self.file:
            self.file.close()
            self.path.rename(self.path.with_suffix(".jsonl"))


class Record(NamedTuple):
    rows: dict[str, dict[str, Any]]  # source -> row; of the manifest's `TO_GO_ON` alone
    new: set[str]  # sources whose rows are of journals, and not in the manifest
    finished: set[int]  # parts of a streamed data set
    table: pa.Table | None  # the manifest's
    journals: dict[Path, int]  # how many lines of each were read


def on_record(job: Job) -> Record:
    """What all journals and the manifest say.

    Raises:
        ValueError: if they are of volumes that were prepared otherwise than `job` asks.
    """
    found, journals = [], {journal: _lines(journal) for journal in _by_age(job.folder / JOURNALS)}
    rows, new, finished, table, known = {}, {}, set(), None, {}
    if (job.folder / NAME).exists():  # after the journals: they go when it is there
        manifest = read_manifest(job.folder)
        found.append(manifest.preparation)
        table, known = manifest.table, manifest.journals
        rows = {row["source"]: row for row in table.select(TO_GO_ON).to_pylist()}
        finished |= set(range(manifest.finished))
    for journal, lines in journals.items():
        with suppress(json.JSONDecodeError):  # what a disk without power or room made of it
            found += [Preparation(**json.loads(line)) for line in lines[:1]]
            for line in lines[known.get(journal.stem, 1) :]:  # the manifest has the others
                row = json.loads(line)
                if "finished" in row:
                    finished.add(row["finished"])
                else:
                    new[row["source"]] = row
    for preparation in found:
        if other := preparation.differences(job.preparation):
            raise ValueError(
                f"{job.folder} holds volumes prepared otherwise ({'; '.join(other)}): choose another folder"
            )
    return Record(rows | new, {*new}, finished, table, {journal: len(lines) for journal, lines in journals.items()})


def complete(job: Job, record: Record, paths: Collection[str], left_out: LeftOut, finished: int = 0) -> None:
    """Write the manifest, and remove what it makes superfluous.

    Args:
        paths: of the rows on record that belong there.
        left_out: what is not even prepared.
    """
    rows = [record.rows[path] for path in paths if path in record.new] + [rejected(*file) for file in left_out]
    tables = [pa.Table.from_pylist(rows, schema=SCHEMA)]
    if record.table is not None:
        old = pa.array([path for path in paths if path not in record.new], pa.string())
        tables.append(record.table.replace_schema_metadata().filter(pc.is_in(record.table["source"], value_set=old)))
    root = job.root if isinstance(job.root, str) else str(job.root.absolute())
    taken_up = {journal.stem: lines for journal, lines in record.journals.items()}
    write_manifest(job.folder, pa.concat_tables(tables).sort_by("source"), job.preparation, root, finished, taken_up)
    for journal in record.journals:
        if journal.suffix == ".jsonl" or _is_old(journal):
            journal.unlink(missing_ok=True)
    for kind in ("volumes", "labels"):
        for half_written in (job.folder / kind).glob("*/.*"):  # by what was killed since
            if _is_old(half_written):
                half_written.unlink(missing_ok=True)


def _is_old(file: Path) -> bool:
    try:
        return time.time() - file.stat().st_mtime > LEFT_BEHIND
    except FileNotFoundError:  # another process has put it in its place, or removed it
        return False


def rejected(path: str, reason: str) -> dict[str, Any]:
    return {"source": path, "reason": reason, "is_bad": False}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other preparations of a folder waiting, where the file system has locks; else they may do a thing twice."""
    lock = FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        if not has_no_locks(error):
            raise
    try:
        yield
    finally:
        lock.release()


def _by_age(folder: Path) -> list[Path]:
    ages = []
    for journal in (*folder.glob("*.jsonl"), *folder.glob("*.open")):
        try:
            ages.append((journal.stat().st_mtime, journal))
        except FileNotFoundError:  # another process has closed it, or completed the folder
            continue
    return [journal for _, journal in sorted(ages)]


def _lines(journal: Path) -> list[str]:
    """Those that are whole: a kill may cut off the last one."""
    for place in (journal, journal.with_suffix(".jsonl")):  # where it is once it is closed
        try:
            return place.read_text().split("\n")[:-1]
        except FileNotFoundError:
            continue
    return []  # the manifest has its rows by now
