"""Volumes of Hugging Face data sets, streamed: a volume is on the disk when it is prepared."""

import errno
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import fsspec
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from pyarrow.dataset import ParquetFragmentScanOptions

from .prepare_volume import RETRIES
from .sources import LeftOut, Source, choose, is_nifti, left_out_by_name, of_tree

COLUMNS = ("dataset", "subject", "session", "modality")
PART = 256  # files that a shard takes at once
HUB_FILE = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")  # data set, commit, path
READING = ParquetFragmentScanOptions(use_buffered_stream=True, buffer_size=2**20, pre_buffer=False)

datasets.disable_progress_bars()
disable_progress_bars()

Streamed = Iterator[tuple[Source, Callable[[], bytes]]]  # volumes, and what gets the content of each


def open_dataset(
    name: str, include: Sequence[str] = (), exclude: Sequence[str] = (), fewest: int = 0
) -> "HubDataset | HubFolder":
    """A data set of the Hub as a folder of NIfTI files, if it is nothing else; else as rows.

    Args:
        name: `ORG/NAME`, `ORG/NAME@REVISION`, or a folder of parquet files.
        include, exclude: of files, see `find_sources`.
        fewest: parts that are wanted, as far as it can be cut into so many.

    Raises:
        ValueError: if there is no such data set, no volumes in it, or there are rows where files are to be chosen.
    """
    if Path(name).exists():
        return _as_rows(name, include, exclude, fewest)
    place, _, revision = name.partition("@")
    try:
        commit = HfApi().dataset_info(place, revision=revision or None).sha
        files = HfApi().list_repo_files(place, repo_type="dataset", revision=commit)
    except RepositoryNotFoundError:
        raise ValueError(f"{name}: no such folder or file, and no data set of the Hub that can be seen") from None
    except Exception as error:
        raise ValueError(f"{name}: the Hub does not list it ({_first_line(error)})") from error
    has_rows = any(re.search(r"\.parquet$|(^|/)metadata\.(csv|jsonl)$", file) for file in files)
    volumes = [file for file in files if is_nifti(file)]
    if has_rows or not volumes:
        return _as_rows(name, include, exclude, fewest)
    return HubFolder(name, commit, volumes, include, exclude, fewest)


def _as_rows(name: str, include: Sequence[str], exclude: Sequence[str], fewest: int) -> "HubDataset":
    if include or exclude:
        raise ValueError(f"{name} has rows, not files: leave data.include and data.exclude empty")
    return HubDataset(name, fewest)


class HubFolder:
    """The NIfTI files of a data set of the Hub without a table, in parts; paths tell what they do in any folder.

    `datasets` would deal them as one part, take BIDS for JSON by the files beside the volumes, and leave out all others
    where a path has `test` in it.
    """

    volumes_a_row = 1

    def __init__(
        self,
        name: str,
        commit: str,
        files: list[str],
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        fewest: int = 0,
    ):
        self.root, self.name = name, name.partition("@")[0]
        self.location = f"hf://datasets/{self.name}@{commit}"
        by_name: LeftOut = [(file, why) for file in files if (why := left_out_by_name(file))]
        found = [of_tree(file, self.name) for file in sorted(set(files) - {file for file, _ in by_name})]
        chosen, self.left_out = choose(found, by_name, include, exclude, name)
        key = {source.path: source[1:4] if not fewest else () for source in chosen}
        kept = sorted(key, key=lambda path: (key[path], path))  # those of a session in a row
        size = max(1, min(PART, len(kept) // max(1, fewest)))
        self.parts: list[list[str]] = []
        for _, session in groupby(kept, key=lambda path: key[path] or path):
            if not self.parts or len(self.parts[-1]) >= size:
                self.parts.append([])
            self.parts[-1].extend(session)
        self.found = f"{len(kept)} volumes, {len(self.left_out)} files left out,"
        self.fingerprint, self.state = _hash([self.location, kept]), ""  # a path is the same volume in any state

    def __len__(self) -> int:
        return len(self.parts)

    def left(self, rows: Container[str], finished: set[int]) -> set[int]:
        """The parts of which not all files have a row; the list may have grown since parts were finished."""
        return {number for number, part in enumerate(self.parts) if any(path not in rows for path in part)}

    def place(self, number: int, row: int) -> str:
        return self.parts[number][row]

    def sources(self) -> list[Source]:
        """What is known before anything is read."""
        return [of_tree(path, self.name) for part in self.parts for path in part]

    def read(self, number: int, wanted: Sequence[int] = range(sys.maxsize)) -> Streamed:
        """The volumes of a part and what their paths tell; `wanted` as of `HubDataset.read`."""
        for row in wanted:
            if row >= len(self.parts[number]):
                return
            path = self.parts[number][row]
            yield of_tree(path, self.name), partial(_download, f"{self.location}/{path}")


class HubDataset:
    """The splits of a data set, one file of rows after the other.

    Args:
        name: `ORG/NAME`, `ORG/NAME@REVISION`, or a folder of parquet files.
        fewest: files of rows that are wanted; if there are fewer, each group of rows of a parquet file counts as one.

    Raises:
        ValueError: if there is no such data set, or no column of volumes in it.
    """

    def __init__(self, name: str, fewest: int = 0):
        folder = Path(name).absolute() if Path(name).exists() else None
        place, _, revision = (str(folder), "", "") if folder else name.partition("@")
        try:
            builder = datasets.load_dataset_builder(place, revision=revision or None)
            if hasattr(builder.config, "fragment_scan_options"):  # of parquet: half the memory of a file that is read
                builder.config.fragment_scan_options = READING
            splits = builder.as_streaming_dataset()
            if sum(rows.num_shards for rows in splits.values()) < fewest:
                splits = {split: rows.reshard() for split, rows in splits.items()}
        except Exception as error:  # of the Hub, of the network, of the data set's own files
            raise ValueError(f"{name}: no data set can be read ({_first_line(error)})") from error
        self.root, self.name = (place, folder.name) if folder else (name, place)
        self.fingerprint = self.state = _hash(_files_of(builder.config.data_files or {}))
        self.left_out: LeftOut = []
        self.volumes_a_row = 1
        self.files = []  # split, data set, number of a file in it
        for split, rows in splits.items():
            if not _columns(rows):
                raise ValueError(f"{name}: no column of type Nifti in its split {split}")
            self.volumes_a_row = max(self.volumes_a_row, len(_columns(rows)))
            rows = rows.decode(False)
            self.files += [(split, rows, number) for number in range(rows.num_shards)]
        self.found = f"{len(self.files)} files of rows"

    def __len__(self) -> int:
        """How many files of rows."""
        return len(self.files)

    def left(self, rows: Container[str], finished: set[int]) -> set[int]:
        """The files of rows that are not finished."""
        return set(range(len(self))) - finished

    def sources(self) -> list[Source]:
        """What is known before anything is read: nothing."""
        return []

    def place(self, number: int, row: int) -> str:
        """Where a row is: in which split, in which file of it."""
        split, _, shard = self.files[number]
        return f"{split}/{shard:05}/{row:06}"

    def read(self, number: int, wanted: Sequence[int] = range(sys.maxsize)) -> Streamed:
        """The volumes of a file of rows, and what other columns or else their paths tell of them.

        Columns with several volumes in a row are modalities of one subject. What cannot be read is asked for again,
        after a pause.

        Args:
            wanted: numbers of rows, increasing, at least one.

        Raises:
            OSError: if all was in vain; it names the row.
        """
        rows, pauses = self.rows_from(number, wanted[0]), iter(RETRIES)
        while wanted:
            try:
                found = next(rows, None)
            except Exception as error:  # of the network, of one of the libraries between, of a damaged file
                if (pause := next(pauses, None)) is None:
                    place = f"{self.name}/{self.place(number, wanted[0])}"
                    raise OSError(f"{place} cannot be read ({_first_line(error)}): try again later") from error
                time.sleep(pause)
                rows = self.rows_from(number, wanted[0])
                continue
            if found is None:
                return
            index, row = found
            if index == wanted[0]:
                yield from self._volumes(number, index, row)
                wanted, pauses = wanted[1:], iter(RETRIES)

    def rows_from(self, number: int, start: int) -> Iterator[tuple[int, dict]]:
        """The rows of a file from one on, with their numbers."""
        _, rows, shard = self.files[number]
        rows = rows.shard(rows.num_shards, shard).skip(start).iter(1)  # iter: loaders' processes do not share it
        for index, row in zip(count(start), rows):
            yield index, {key: value for key, (value,) in row.items()}

    def _volumes(self, number: int, index: int, row: dict) -> Streamed:
        features, place = self.files[number][1].features, self.place(number, index)
        words = {key: kind.int2str for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
        told = {key: words.get(key, str)(row[key]) for key in COLUMNS if row.get(key) is not None}
        columns = _columns(self.files[number][1])
        for column in columns:
            if (stored := row[column]) is None:
                if len(columns) > 1:  # a contrast that is missing
                    continue
                stored = {"path": None, "bytes": b""}
            path = (stored["path"] or "volume").split("::")[-1]
            source = of_tree(HUB_FILE.sub(r"\3", path), "")
            known = {"dataset": self.name, **told, "path": f"{place}/{Path(path).name}"}
            if len(columns) > 1:
                name = f"{place}/{column}/{Path(path).name}"
                known |= {"subject": told.get("subject", place), "modality": column, "path": name}
            fetch = partial(_download, path) if stored["bytes"] is None else partial(bytes, stored["bytes"])
            yield source._replace(**known), fetch


def _columns(rows: datasets.IterableDataset) -> list[str]:
    return [column for column, feature in (rows.features or {}).items() if isinstance(feature, datasets.Nifti)]


def _download(url: str) -> bytes:
    """
    Raises:
        OSError: as of a disk that fails.
    """
    try:
        if not (of_hub := HUB_FILE.match(url)):
            with fsspec.open(url) as file:
                return file.read()
        name, commit, path = of_hub.groups()
        with TemporaryDirectory() as folder:  # not the cache, which would keep it
            file = hf_hub_download(name, path, repo_type="dataset", revision=commit, local_dir=folder)
            return Path(file).read_bytes()
    except Exception as error:  # also those of the client's connections, which are no OSErrors
        raise OSError(errno.EIO, _first_line(error)) from None


def _files_of(files: Mapping[str, Sequence[str]]) -> list:
    """Those of a data set: on the Hub they have their revision in their names, others a size."""
    return [
        [str(split), [(Path(file).name, Path(file).stat().st_size) if Path(file).exists() else file for file in of]]
        for split, of in files.items()
    ]


def _hash(facts: list) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    said = getattr(error, "server_message", None) or str(error)
    return (said.splitlines() or [type(error).__name__])[0]
