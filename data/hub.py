"""Volumes of a Hugging Face data set with a `Nifti` column, streamed: a volume is on the disk when it is prepared."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import datasets
import fsspec
from pyarrow.dataset import ParquetFragmentScanOptions

from .sources import Source

datasets.disable_progress_bars()
READING = ParquetFragmentScanOptions(use_buffered_stream=True, buffer_size=2**20, pre_buffer=False)


def is_streamed(source: str) -> bool:
    """Whether a source is no file and no folder of NIfTI files: a name on the Hub, or a folder of parquet files."""
    if Path(source).exists():
        return any(any(Path(source).glob(place)) for place in ("*.parquet", "data/*.parquet"))
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None


class HubDataset:
    """The splits of a data set, one file of rows after the other.

    Args:
        name: `ORG/NAME`, `ORG/NAME@REVISION`, or a folder of parquet files.
        fewest: files of rows that are wanted; if there are fewer, each group of rows of a parquet file counts as one.

    Raises:
        ValueError: if there is no such data set, or no column of volumes in it.
    """

    def __init__(self, name: str, fewest: int = 0):
        place, _, revision = name.partition("@") if not Path(name).exists() else (name, "", "")
        try:
            builder = datasets.load_dataset_builder(place, revision=revision or None)
            if hasattr(builder.config, "fragment_scan_options"):  # of parquet: half the memory of a file that is read
                builder.config.fragment_scan_options = READING
            splits = builder.as_streaming_dataset()
            if sum(rows.num_shards for rows in splits.values()) < fewest:
                splits = {split: rows.reshard() for split, rows in splits.items()}
        except Exception as error:  # of the Hub, of the network, of the data set's own files
            raise ValueError(f"{name}: no data set can be read ({str(error).splitlines()[0]})") from error
        self.name = place
        self.fingerprint = _fingerprint(builder.config.data_files or {})
        self.files = []  # split, data set, number of a file in it
        for split, rows in splits.items():
            columns = [c for c, feature in (rows.features or {}).items() if isinstance(feature, datasets.Nifti)]
            if len(columns) != 1:
                raise ValueError(f"{name}: {len(columns)} columns of type Nifti in its split {split}; one is needed")
            self.column = columns[0]
            rows = rows.cast_column(self.column, datasets.Nifti(decode=False))
            self.files += [(split, rows, number) for number in range(rows.num_shards)]

    def __len__(self) -> int:
        """How many files of rows."""
        return len(self.files)

    def place(self, number: int, row: int) -> str:
        """Where a row is: in which split, in which file of it."""
        split, _, shard = self.files[number]
        return f"{split}/{shard:05}/{row:06}"

    def read(self, number: int, wanted: Sequence[int] = range(sys.maxsize)) -> Iterator[tuple[Source, bytes]]:
        """The volumes of a file of rows, as they are stored, and what other columns tell of them.

        Args:
            wanted: numbers of rows, increasing, at least one; volumes beside the file that others name are not fetched.
        """
        _, rows, shard = self.files[number]
        rows = rows.shard(rows.num_shards, shard).skip(wanted[0]).iter(1)  # iter: loaders' processes do not share it
        left = iter(wanted)
        following = next(left)
        for index, row in zip(count(wanted[0]), rows):
            if index != following:
                continue
            row = {key: value for key, (value,) in row.items()}
            stored = row.pop(self.column)
            content = stored["bytes"] if stored["bytes"] is not None else fsspec.open(stored["path"]).open().read()
            told = {key: str(row[key]) for key in ("subject", "session", "modality") if row.get(key) is not None}
            name = Path(stored["path"] or "volume").name
            yield Source(f"{self.place(number, index)}/{name}", row.get("dataset") or self.name, **told), content
            if (following := next(left, None)) is None:
                return


def _fingerprint(files: Mapping[str, Sequence[str]]) -> str:
    """Of the files of a data set: those on the Hub have their revision in their names, others a size."""
    facts = [
        [str(split), [(Path(file).name, Path(file).stat().st_size) if Path(file).exists() else file for file in of]]
        for split, of in files.items()
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
