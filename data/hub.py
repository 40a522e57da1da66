"""Volumes of Hugging Face data sets, streamed: a volume is on the disk when it is prepared."""

import errno
import re
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import fsspec
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from .sources import LeftOut, Source, is_nifti, left_out_by_name, of_tree

COLUMNS = ("dataset", "subject", "session", "modality")
PART = 256  # files that a shard takes at once
HUB_FILE = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")  # data set, commit, path

datasets.disable_progress_bars()
disable_progress_bars()


def is_streamed(source: str) -> bool:
    """Whether a source is no file and no folder of NIfTI files: a name on the Hub, or a folder of parquet files."""
    if Path(source).exists():
        return any(any(Path(source).glob(place)) for place in ("*.parquet", "data/*.parquet"))
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None


def open_dataset(name: str) -> "HubDataset | HubFolder":
    """A data set of the Hub as a folder of NIfTI files, if it is nothing else; else as rows.

    Args:
        name: `ORG/NAME`, `ORG/NAME@REVISION`, or a folder of parquet files.

    Raises:
        ValueError: if there is no such data set, or no volumes in it.
    """
    if Path(name).exists():
        return HubDataset(name)
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
    return HubFolder(name, commit, volumes) if volumes and not has_rows else HubDataset(name)


class HubFolder:
    """The NIfTI files of a data set of the Hub without a table, in parts; paths tell what they do in any folder.

    `datasets` would deal them as one part, take BIDS for JSON by the files beside the volumes, and leave out all others
    where a path has `test` in it.
    """

    def __init__(self, name: str, commit: str, files: list[str]):
        self.root, self.name = name, name.partition("@")[0]
        self.place = f"hf://datasets/{self.name}@{commit}"
        self.left_out: LeftOut = [(file, why) for file in files if (why := left_out_by_name(file))]
        kept = sorted(set(files) - {file for file, _ in self.left_out})
        self.parts = [kept[start : start + PART] for start in range(0, len(kept), PART)]
        self.found = f"{len(kept)} volumes, {len(self.left_out)} files left out by name,"

    def __len__(self) -> int:
        return len(self.parts)

    def left(self, rows: Container[str], finished: set[int]) -> set[int]:
        """The parts of which not all files have a row; the list may have grown since parts were finished."""
        return {number for number, part in enumerate(self.parts) if any(path not in rows for path in part)}

    def read(self, number: int) -> Iterator[tuple[Source, Callable[[], bytes]]]:
        """The volumes of a part, what their paths tell, and what downloads each."""
        for path in self.parts[number]:
            yield of_tree(path, self.name), partial(_download, f"{self.place}/{path}")


class HubDataset:
    """The splits of a data set, one file of rows after the other.

    Args:
        name: `ORG/NAME`, `ORG/NAME@REVISION`, or a folder of parquet files.

    Raises:
        ValueError: if there is no such data set, or no column of volumes in it.
    """

    def __init__(self, name: str):
        folder = Path(name).absolute() if Path(name).exists() else None
        place, _, revision = (str(folder), "", "") if folder else name.partition("@")
        try:
            splits = datasets.load_dataset(place, streaming=True, revision=revision or None)
        except Exception as error:  # of the Hub, of the network, of the data set's own files
            raise ValueError(f"{name}: no data set can be read ({_first_line(error)})") from error
        self.root, self.name = (place, folder.name) if folder else (name, place)
        self.left_out: LeftOut = []
        self.files = []  # split, data set, number of a file in it
        for split, rows in splits.items():
            columns = [c for c, feature in (rows.features or {}).items() if isinstance(feature, datasets.Nifti)]
            if len(columns) != 1:
                raise ValueError(f"{name}: {len(columns)} columns of type Nifti in its split {split}; one is needed")
            self.column = columns[0]
            rows = rows.decode(False)
            self.files += [(split, rows, number) for number in range(rows.num_shards)]
        self.found = f"{len(self.files)} files of rows"

    def __len__(self) -> int:
        """How many files of rows."""
        return len(self.files)

    def left(self, rows: Container[str], finished: set[int]) -> set[int]:
        """The files of rows that are not finished."""
        return set(range(len(self))) - finished

    def read(self, number: int, skip: int = 0) -> Iterator[tuple[Source, Callable[[], bytes]]]:
        """The volumes of a file of rows, what other columns or else their paths tell of them, and what fetches each."""
        split, rows, shard = self.files[number]
        rows = rows.shard(rows.num_shards, shard)
        words = {key: kind.int2str for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
        for index, row in enumerate(rows.skip(skip) if skip else rows, start=skip):
            stored = row.pop(self.column)
            path = (stored["path"] or "volume").split("::")[-1]
            told = {key: words.get(key, str)(row[key]) for key in COLUMNS if row.get(key) is not None}
            source = of_tree(HUB_FILE.sub(r"\3", path), "")
            name = f"{split}/{shard:05}/{index:06}/{Path(path).name}"
            fetch = partial(_download, path) if stored["bytes"] is None else partial(bytes, stored["bytes"])
            yield source._replace(**{"dataset": self.name, **told, "path": name}), fetch


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


def _first_line(error: Exception) -> str:
    said = getattr(error, "server_message", None) or str(error)
    return (said.splitlines() or [type(error).__name__])[0]
