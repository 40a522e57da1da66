"""The store of prepared volumes: plain `.npy` in half precision, of which a random crop reads the rows it needs."""

import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from .manifest import NAME, Manifest
from .prepare_volume import RETRIES, prepare_again
from .volume import BadVolume

Read = TypeVar("Read")


class UnreadableVolume(Exception):
    """A prepared volume that cannot be read now; the message names it and says why."""


class StoredVolume:
    """A `.npy` `[X, Y, Z]` on the disk; indexing it with three slices reads just the rows that these touch.

    Not a memory map: there, a disk that fails or a file that was cut short ends the process.

    Args:
        padding: what is around it.

    Raises:
        OSError: if it cannot be read, is no `.npy`, or is shorter than it says.
    """

    def __init__(self, path: Path, padding: float = 0.0):
        self.padding = padding
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115, it is read in `__getitem__`
        try:
            if np.lib.format.read_magic(self.file) != (1, 0):
                raise ValueError("another version of the format")
            self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(self.file)
            if self.dtype.hasobject:
                raise ValueError("no numbers")  # its bytes would be taken for addresses
        except ValueError as error:
            raise OSError(f"no prepared volume ({error})") from None
        self.start = self.file.tell()
        expected = self.start + int(np.prod(self.shape)) * self.dtype.itemsize
        if (found := os.fstat(self.file.fileno()).st_size) < expected:
            raise OSError(f"{found} of {expected} bytes are there")

    def __getitem__(self, box: tuple[slice, slice, slice]) -> np.ndarray:
        (x, last_x, _), (y, last_y, _), (z, last_z, _) = (part.indices(n) for part, n in zip(box, self.shape))
        rows = np.empty((last_x - x, last_y - y, self.shape[2]), self.dtype)
        for plane, number in zip(rows, range(x, last_x)):
            offset = self.start + (number * self.shape[1] + y) * self.shape[2] * self.dtype.itemsize
            left = memoryview(plane).cast("B")
            while left:
                if not (found := os.preadv(self.file.fileno(), [left], offset)):
                    raise OSError("it ends too early")
                left, offset = left[found:], offset + found
        return rows[:, :, z:last_z]

    def __del__(self):
        if hasattr(self, "file"):
            self.file.close()


class PreparedVolumes(Sequence):
    """The volumes of a manifest, opened when they are asked for; light enough to be in every loader's process.

    Args:
        rows: numbers of `manifest.volumes`; None for all.
        draw: what is drawn with equal chances: one of the "volumes", "subjects" or "datasets", and then of its volumes.
    """

    def __init__(self, manifest: Manifest, rows: Sequence[int] | None = None, draw: str = "volumes"):
        table = manifest.volumes if rows is None else manifest.volumes.take(pa.array(rows))
        self.manifest = manifest
        self.files = table["file"].combine_chunks()
        self.sources = table["source"].combine_chunks()
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

    def __getitem__(self, number: int) -> StoredVolume:
        return StoredVolume(self.path(number), self.paddings[number].as_py())

    def read(self, number: int, use: Callable[[StoredVolume], Read]) -> Read:
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
