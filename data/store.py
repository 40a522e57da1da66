"""The prepared volumes of a manifest, as runs read them: drawn, opened, read patiently."""

import errno
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .manifest import NAME, Manifest
from .prepare_volume import RETRIES, prepare_again
from .stored_volume import PACKED, PackedVolume, StoredVolume, open_volume
from .volume import BadVolume

Read = TypeVar("Read")


class UnreadableVolume(Exception):
    """A prepared volume that cannot be read now; the message names it and says why."""


class PreparedVolumes(Sequence):
    """The volumes of a manifest, opened when they are asked for; light enough to be in every loader's process.

    Args:
        rows: numbers of `manifest.volumes`; None for all.
        draw: what is drawn with equal chances: one of the "volumes", "subjects" or "datasets", and then of its volumes.

    Raises:
        ValueError: if volumes are packed and blosc2 is not there to unpack them.
    """

    def __init__(self, manifest: Manifest, rows: Sequence[int] | None = None, draw: str = "volumes"):
        table = manifest.volumes if rows is None else manifest.volumes.take(pa.array(rows))
        self.manifest = manifest
        self.files = table["file"].combine_chunks()
        self.sources = table["source"].combine_chunks()
        if pc.any(pc.ends_with(self.files, PACKED)).as_py() and find_spec("blosc2") is None:
            raise ValueError(f"{manifest.folder} holds packed volumes: pip install blosc2")
        names, of = manifest.subjects
        self.subjects = of if rows is None else of[rows]  # a number a volume
        self.several_subjects = len(names) > 1
        self.paddings = table["padding"].combine_chunks()
        self.chances = None  # of each volume, added up
        if draw != "volumes":
            datasets = table["dataset"].combine_chunks().fill_null("").dictionary_encode().indices.to_numpy()
            of = {"subjects": self.subjects, "datasets": datasets}[draw]
            _, of, counts = np.unique(of, return_inverse=True, return_counts=True)
            self.chances = np.cumsum(1 / counts[of]) / len(counts)

    def draw(self, rng: np.random.Generator) -> int:
        """The number of a volume."""
        if self.chances is None:
            return int(rng.integers(len(self)))
        return min(int(np.searchsorted(self.chances, rng.random(), side="right")), len(self) - 1)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, number: int) -> Path:
        return self.manifest.folder / self.files[number].as_py()

    def __getitem__(self, number: int) -> StoredVolume | PackedVolume:
        return open_volume(self.path(number), self.paddings[number].as_py())

    def read(self, number: int, use: Callable[[StoredVolume | PackedVolume], Read]) -> Read:
        """What `use` returns of a volume. One that is gone or short is prepared again where its source is still there;
        a disk that fails is asked again, after a pause.

        Raises:
            UnreadableVolume: if all was in vain.
        """
        for pause in (*RETRIES, None):
            try:
                return use(self[number])
            except OSError as error:
                why, of_the_file = error.strerror or str(error), error.errno in (None, errno.ENOENT)
            if self._restore(number):
                continue
            if pause is None or (of_the_file and (self.manifest.folder / NAME).exists()):  # the disk is there
                break
            time.sleep(pause)
        raise UnreadableVolume(f"{self.path(number)} cannot be read ({why})")

    def _restore(self, number: int) -> bool:
        try:
            return prepare_again(self.manifest.folder, self.sources[number].as_py())
        except (OSError, BadVolume):
            return False
