"""What is done of a preparation: a journal for each process that takes part, a manifest once nothing is left."""

import json
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
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
LEFT_BEHIND = 3600.0  # seconds after which nobody writes a file any more
TO_GO_ON = (  # what must be known of a volume to leave it as it is
    *("source", "source_bytes", "source_modified", "modality", "case", "reason"),
    *("file", "checksum", "bytes", "spacing", "label", "label_checksum"),
)


class Journal:
    """What this process has done, a line a volume; a file of its own, so that others may do the same at once."""

    def __init__(self, job: Job):
        self.path = job.folder / JOURNALS / f"{uuid.uuid4().hex}.jsonl"
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


class Record(NamedTuple):
    rows: dict[str, dict[str, Any]]  # source -> row; of the manifest's `TO_GO_ON` alone
    new: set[str]  # sources whose rows are of journals
    finished: set[int]  # parts of a streamed data set
    table: pa.Table | None  # the manifest's


def on_record(job: Job) -> Record:
    """What all journals and the manifest say.

    Raises:
        ValueError: if they are of volumes that were prepared otherwise than `job` asks.
    """
    found, new, finished = [], {}, set()
    for journal in _by_age(job.folder / JOURNALS):
        try:
            facts, *lines = journal.read_text().splitlines() or [""]
            facts = json.loads(facts)
            found.append(Preparation(**facts))
            for line in lines:
                row = json.loads(line)
                if "finished" in row:
                    finished.add(row["finished"])
                else:
                    new[row["source"]] = row
        except (json.JSONDecodeError, FileNotFoundError):
            continue  # a line that a kill cut off; a journal whose rows the manifest has by now
    rows, table = {}, None
    if (job.folder / NAME).exists():  # after the journals: they go when it is there
        manifest = read_manifest(job.folder)
        found.append(manifest.preparation)
        table = manifest.table
        rows = {row["source"]: row for row in table.select(TO_GO_ON).to_pylist()}
        finished |= set(range(manifest.finished))
    for preparation in found:
        if other := preparation.differences(job.preparation):
            raise ValueError(
                f"{job.folder} holds volumes prepared otherwise ({'; '.join(other)}): choose another folder"
            )
    return Record(rows | new, {*new}, finished, table)


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
    write_manifest(job.folder, pa.concat_tables(tables).sort_by("source"), job.preparation, root, finished)
    for journal in (job.folder / JOURNALS).glob("*.jsonl"):
        journal.unlink(missing_ok=True)
    for half_written in job.folder.glob("*/*/.*"):  # by what was killed since
        if time.time() - half_written.stat().st_mtime > LEFT_BEHIND:
            half_written.unlink(missing_ok=True)


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
    for journal in folder.glob("*.jsonl"):
        try:
            ages.append((journal.stat().st_mtime, journal))
        except FileNotFoundError:  # another process has completed the folder
            continue
    return [journal for _, journal in sorted(ages)]
