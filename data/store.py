"""The prepared volumes of a manifest, as runs read them: drawn, opened, read patiently."""

import errno
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .channels import channel_number
from .columns import codes, matrix
from .frames import Frames, read_frames
from .manifest import NAME, Manifest
from .prepare_volume import RETRIES, prepare_again
from .stored_volume import PACKED, Channels, Volume, open_volume
from .volume import NATIVE, BadVolume

Read = TypeVar("Read")


class UnreadableVolume(Exception):
    """A prepared volume that cannot be read now; the message names it and says why."""


class PreparedVolumes(Sequence):
    """The volumes of a manifest, opened when they are asked for; light enough to be in every loader's process.

    With `data.channels` a volume is what has some of them on one grid, and its files are its channels.

    Args:
        rows: numbers of `manifest.volumes`; None for all.
        draw: what is drawn with equal chances: one of the "volumes", "subjects" or "datasets", and then of its volumes.

    Raises:
        ValueError: if volumes are packed and blosc2 is not there to unpack them.
    """

    def __init__(self, manifest: Manifest, rows: Sequence[int] | None = None, draw: str = "volumes"):
        table = manifest.volumes if rows is None else manifest.volumes.take(pa.array(rows))
        self.manifest, self.rows = manifest, rows
        self.files = table["file"].combine_chunks()
        self.sources = table["source"].combine_chunks()
        if pc.any(pc.ends_with(self.files, PACKED)).as_py() and find_spec("blosc2") is None:
            raise ValueError(f"{manifest.folder} holds packed volumes: pip install blosc2")
        self.paddings = table["padding"].combine_chunks()
        self.thresholds = table["foreground_threshold"].combine_chunks()
        self.labels = table["label"].combine_chunks() if "label" in table.column_names else None
        self.spacings = matrix(table["spacing"], 3)
        fixed = manifest.preparation.spacing != NATIVE
        self.spacing = self.spacings[0].tolist() if fixed else NATIVE  # mm, of all
        self.channels = _channels(table, manifest.preparation.channels)
        first = self.channels.max(axis=1)  # a row of each volume
        names, of = manifest.subjects
        self.subjects = (of if rows is None else of[rows])[first]  # a number a volume
        self.several_subjects = len(names) > 1
        self.chances = None  # of each volume, added up
        if draw != "volumes":
            of = {"subjects": self.subjects, "datasets": codes(table["dataset"].fill_null(""))[first]}[draw]
            _, of, counts = np.unique(of, return_inverse=True, return_counts=True)
            self.chances = np.cumsum(1 / counts[of]) / len(counts)

    @cached_property
    def frames(self) -> Frames:
        """Of its rows.

        Raises:
            ValueError: if the file of frames is of other volumes.
        """
        found = read_frames(self.manifest)
        return found if self.rows is None else Frames(*(part[np.asarray(self.rows)] for part in found))

    def draw(self, rng: np.random.Generator) -> int:
        """The number of a volume."""
        if self.chances is None:
            return int(rng.integers(len(self)))
        return min(int(np.searchsorted(self.chances, rng.random(), side="right")), len(self) - 1)

    def __len__(self) -> int:
        return len(self.channels)

    def path(self, number: int) -> Path:
        """Of the first channel that is there."""
        return self._path(self.rows_of(number)[0])

    def name(self, number: int) -> str:
        """Of the same, the path of its source."""
        return self.sources[self.rows_of(number)[0]].as_py()

    def __getitem__(self, number: int) -> Volume:
        opened = [self._open(row) if row >= 0 else None for row in self.channels[number].tolist()]
        return opened[0] if len(opened) == 1 else Channels(opened)

    def rows_of(self, number: int) -> list[int]:
        """Of its channels that are there, among those that were chosen."""
        return [row for row in self.channels[number].tolist() if row >= 0]

    def _path(self, row: int) -> Path:
        return self.manifest.folder / self.files[row].as_py()

    def _open(self, row: int) -> Volume:
        try:
            numbers = self.paddings[row].as_py(), self.spacings[row].tolist(), self.thresholds[row].as_py()
            label = self.labels[row].as_py() if self.labels else None
            label_file = self.manifest.folder / label if label else None
            return open_volume(self._path(row), *numbers, partial(self._frame, row), label_file)
        except OSError as error:
            error.filename = self._path(row)
            raise

    def _frame(self, row: int) -> np.ndarray:
        return self.frames.volume_to_frame[row]

    def read(self, numbers: Sequence[int], use: Callable[[list[Volume]], Read]) -> Read:
        """What `use` returns of volumes. One that is gone or short is prepared again where its source is still there;
        a disk that fails is asked again, after a pause.

        Raises:
            UnreadableVolume: if all was in vain.
        """
        for pause in (*RETRIES, None):
            try:
                return use([self[number] for number in numbers])
            except OSError as error:
                why, of_the_file = error.strerror or str(error), error.errno in (None, errno.ENOENT)
                path = error.filename or " or ".join(dict.fromkeys(str(self.path(number)) for number in numbers))
            if any([self._restore(number) for number in numbers]):
                continue
            if pause is None or (of_the_file and (self.manifest.folder / NAME).exists()):  # the disk is there
                break
            time.sleep(pause)
        raise UnreadableVolume(f"{path} cannot be read ({why})")

    def _restore(self, number: int) -> bool:
        try:
            return any([prepare_again(self.manifest.folder, self.sources[row].as_py()) for row in self.rows_of(number)])
        except (OSError, BadVolume):
            return False


def _channels(table: pa.Table, names: tuple[str, ...]) -> np.ndarray:
    """The rows `[volumes, C]` that are the channels of each volume, -1 where one is missing."""
    if not names:
        return np.arange(len(table))[:, None]
    number = {modality: channel_number(names, modality) for modality in pc.unique(table["modality"]).to_pylist()}
    of = codes(table["case"])  # in the order of the rows
    rows = np.full((of.max() + 1, len(names)), -1)
    rows[of, [number[modality] for modality in table["modality"].to_pylist()]] = np.arange(len(table))
    return rows
