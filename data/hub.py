"""Volumes of a Hugging Face data set with a `Nifti` column, streamed: a volume is on the disk when it is prepared."""

import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec

from .sources import Source

datasets.disable_progress_bars()


def is_streamed(source: str) -> bool:
    """Whether a source is no file and no folder of NIfTI files: a name on the Hub, or a folder of parquet files."""
    if Path(source).exists():
        return any(any(Path(source).glob(place)) for place in ("*.parquet", "data/*.parquet"))
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None


class HubDataset:
    """The splits of a data set, one file of rows after the other.

    Args:
        name: `ORG/NAME`, `ORG/NAME@REVISION`, or a folder of parquet files.

    Raises:
        ValueError: if there is no such data set, or no column of volumes in it.
    """

    def __init__(self, name: str):
        place, _, revision = name.partition("@") if not Path(name).exists() else (name, "", "")
        try:
            splits = datasets.load_dataset(place, streaming=True, revision=revision or None)
        except Exception as error:  # of the Hub, of the network, of the data set's own files
            raise ValueError(f"{name}: no data set can be read ({str(error).splitlines()[0]})") from error
        self.name = place
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

    def read(self, number: int, skip: int = 0) -> Iterator[tuple[Source, bytes]]:
        """The volumes of a file of rows, as they are stored, and what other columns tell of them."""
        split, rows, shard = self.files[number]
        rows = rows.shard(rows.num_shards, shard)
        for index, row in enumerate(rows.skip(skip) if skip else rows, start=skip):
            stored = row.pop(self.column)
            content = stored["bytes"] if stored["bytes"] is not None else fsspec.open(stored["path"]).open().read()
            told = {key: str(row[key]) for key in ("subject", "session", "modality") if row.get(key) is not None}
            name = Path(stored["path"] or "volume").name
            yield Source(f"{split}/{shard:05}/{index:06}/{name}", row.get("dataset") or self.name, **told), content
