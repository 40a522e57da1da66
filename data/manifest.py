"""The manifest of a folder of prepared volumes: `manifest.parquet`, a row a volume, the truth that runs go by."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import write_whole
from .normalisation import BOX, checked_rule

NAME = "manifest.parquet"
MEDIAN = "median"  # spacing of the data set's
SOURCE = "source.txt"  # beside it: the path of the raw volumes, which is not for others to know
FORMAT = 2  # of the rows and of what the numbers in them mean

SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # path below the folder of raw volumes
        ("source_bytes", pa.int64()),
        ("source_modified", pa.int64()),  # ns
        ("reason", pa.string()),  # why it is left out; null for a volume
        ("is_bad", pa.bool_()),  # whether for a fault of the file, not for being something else than an image
        ("dataset", pa.string()),
        ("subject", pa.string()),
        ("session", pa.string()),
        ("case", pa.string()),  # of data.channels: rows with the same are the channels of one sample; else null
        ("modality", pa.string()),  # "CT", too, where nothing was known and the values are those of a CT
        ("file", pa.string()),  # below the manifest's folder
        ("bytes", pa.int64()),
        ("checksum", pa.string()),  # SHA-256
        ("shape", pa.list_(pa.int32())),  # [3]
        ("spacing", pa.list_(pa.float64())),  # [3], mm
        ("source_shape", pa.list_(pa.int32())),  # [3]
        ("source_affine", pa.list_(pa.float64())),  # [4, 4], source voxel -> mm in the scanner
        ("prepared_to_source", pa.list_(pa.float64())),  # [3, 4], prepared voxel -> source voxel
        ("source_mean", pa.float64()),  # what was subtracted
        ("source_std", pa.float64()),  # what was then divided by
        ("source_percentiles", pa.list_(pa.float32())),  # [7], PERCENTILES of the box's voxels, as is
        ("padding", pa.float32()),  # what crops that reach beyond the volume have there
        ("foreground_threshold", pa.float32()),  # prepared voxels above are foreground
        ("foreground_share", pa.float32()),
        ("foreground_mean", pa.list_(pa.float64())),  # [3], of its voxels' places, in prepared voxels
        ("foreground_std", pa.list_(pa.float64())),
        ("label", pa.string()),  # the prepared map of labels, below the manifest's folder
        ("label_checksum", pa.string()),
        ("label_values", pa.list_(pa.int32())),  # that are in it, sorted
    ]
)


FOR_RUNS = (
    *("source", "reason", "is_bad", "dataset", "subject", "case", "modality"),
    *("file", "checksum", "shape", "spacing", "padding"),
    *("foreground_threshold", "foreground_mean", "foreground_std"),
)
LABELS = ("label", "label_checksum", "label_values")  # for runs that learn from them
LATER = "label_values"  # a column that folders may lack which were prepared before there was it: null


@dataclass(frozen=True)
class Preparation:
    """How volumes were prepared; two folders of one preparation hold the same numbers."""

    orientation: str
    spacing: tuple[float, float, float] | str  # mm; MEDIAN, or NATIVE: as it is
    precision: str = "float16"
    intensity: dict = field(default_factory=lambda: dict(BOX))  # the rule, see normalisation.py
    intensity_of_ct: dict | None = None  # None: as all others
    channels: tuple[str, ...] = ()  # modalities that make one sample together; none: each volume is one

    def __post_init__(self):  # one way to write each, for the fingerprint
        spacing = self.spacing if isinstance(self.spacing, str) else tuple(map(float, self.spacing))
        object.__setattr__(self, "spacing", spacing)
        object.__setattr__(self, "channels", tuple(self.channels))
        for key in ("intensity", "intensity_of_ct"):
            if (rule := getattr(self, key)) is not None:
                object.__setattr__(self, key, checked_rule(rule))

    def differences(self, other: "Preparation") -> list[str]:
        then, now = asdict(self), asdict(other)
        return [f"{key} {_plain(then[key])} is not {_plain(now[key])}" for key in then if then[key] != now[key]]


@dataclass(frozen=True)
class Manifest:
    folder: Path  # where it lies now
    table: pa.Table  # of SCHEMA, sorted by source
    preparation: Preparation
    root: str  # of the raw volumes, when they were prepared; "" where SOURCE is not there
    finished: int  # files of rows, of a streamed data set
    journals: dict[str, int] = field(default_factory=dict)  # of how many lines of each it has the rows

    @cached_property
    def volumes(self) -> pa.Table:
        """The rows that can be trained on."""
        return self.table.filter(self.table["reason"].is_null())

    @cached_property
    def rejected(self) -> pa.Table:
        return self.table.filter(self.table["reason"].is_valid())

    @cached_property
    def subjects(self) -> tuple[list[str], np.ndarray]:
        """Names (DATASET/SUBJECT, or a volume's own path where the subject is not known), and whose each volume is."""
        rows = self.volumes
        named = pc.binary_join_element_wise(rows["dataset"], rows["subject"], "/", null_handling="emit_null")
        files = pc.replace_substring_regex(rows["source"], r"#\d+$", "")  # volumes of a series are of one subject
        named = pc.coalesce(named, rows["subject"], files).combine_chunks().dictionary_encode()
        return named.dictionary.to_pylist(), named.indices.to_numpy()

    def fingerprint(self, labels: bool = False) -> str:
        """Of what there is to train on, with or without labels: the same after a move, a copy, or on another mount."""
        found = hashlib.sha256(json.dumps([FORMAT, asdict(self.preparation)]).encode())
        for column in ("checksum", "label_checksum")[: 1 + labels]:
            for checksums in self.volumes[column].chunks:
                found.update("".join(sum or "" for sum in checksums.to_pylist()).encode())
        return found.hexdigest()[:16]


def write_manifest(
    folder: Path,
    table: pa.Table,
    preparation: Preparation,
    root: str,
    finished: int = 0,
    journals: Mapping[str, int] | None = None,
) -> None:
    facts = {"format": FORMAT, "finished": finished, "journals": dict(journals or {}), **asdict(preparation)}
    table = table.replace_schema_metadata({"preparation": json.dumps(facts)})
    write_source(folder, root)
    write_whole(folder / NAME, lambda file: pq.write_table(table, file))


def write_source(folder: Path, root: str) -> None:
    write_whole(folder / SOURCE, lambda file: file.write_bytes(os.fsencode(root)))


def read_source(folder: Path) -> str:
    """The path of the raw volumes of a folder, or "" where it is not told."""
    return os.fsdecode((folder / SOURCE).read_bytes()) if (folder / SOURCE).exists() else ""


def read_manifest(folder: Path, columns: Sequence[str] | None = None) -> Manifest:
    """Open the manifest of a folder of prepared volumes.

    Args:
        columns: to read, such as `FOR_RUNS`; None for all.

    Raises:
        ValueError: if there is none, or it is damaged or of another version.
    """
    path = folder / NAME
    try:
        asked, there = SCHEMA.names if columns is None else columns, pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in asked if name in there or name != LATER])
        facts = json.loads(table.schema.metadata[b"preparation"])
        made_by, finished, journals = (facts.pop(key) for key in ("format", "finished", "journals"))
        if made_by == FORMAT:
            if LATER in asked and LATER not in there:
                table = table.append_column(LATER, pa.nulls(len(table), SCHEMA.field(LATER).type))
            return Manifest(folder, table, Preparation(**facts), read_source(folder), finished, journals)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run prepare_data.py until it says that all is prepared") from None
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged ({why}): remove it and run prepare_data.py again") from None
    raise ValueError(f"{path} is of another version of this project: run prepare_data.py again, into a new folder")


def _plain(value: Any) -> str:
    """As a recipe has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(part)}" for key, part in value.items()) + "}"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
