"""Volumes as they are kept on the disk: plain `.npy`, of which a crop reads the rows it needs, or packed `.b2nd`."""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from .moments import EVERY, frames_of_moments, moments

PACKED = ".b2nd"  # a quarter to a third smaller, several times slower to read; needs blosc2
CHUNK, BLOCK = 64, 32  # voxels an edge that are packed together, and that are unpacked at least

Read = TypeVar("Read")


def open_volume(
    path: Path,
    padding: float = 0.0,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    foreground_threshold: float = 0.0,
    find_frame: Callable[[], np.ndarray] | None = None,
    label_file: Path | None = None,
) -> "StoredVolume | PackedVolume":
    """A volume `[X, Y, Z]` of which indexing with three slices reads no more than it must.

    Args:
        padding: what is around it.
        spacing: mm of its voxels.
        foreground_threshold: voxels above are foreground.
        find_frame: finds its `volume_to_frame`, if that is asked for.
        label_file: of its map of labels, opened if `labels` is asked for.

    Raises:
        OSError: if it cannot be read, is no volume, or is shorter than it says; indexing, too.
    """
    volume = (PackedVolume if path.suffix == PACKED else StoredVolume)(path)
    volume.padding, volume.spacing = padding, tuple(spacing)
    volume.foreground_threshold, volume.find_frame = foreground_threshold, find_frame
    volume.label_file = label_file
    return volume


def save_volume(array: np.ndarray, file: Path, packed: bool) -> None:
    if not packed:
        with open(file, "wb") as stream:
            np.save(stream, array)
        return
    import blosc2  # only who asks for it needs it

    packing = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    chunks, blocks = (tuple(min(edge, n) for n in array.shape) for edge in (CHUNK, BLOCK))
    blosc2.asarray(array, chunks=chunks, blocks=blocks, cparams=packing, urlpath=str(file), mode="w")


class OnDisk:
    """What goes with a volume on the disk, looked up when it is asked for."""

    find_frame: Callable[[], np.ndarray]
    label_file: Path | None

    @property
    def volume_to_frame(self) -> np.ndarray:
        """`[3, 4]`, see `frames.py`."""
        return self.find_frame()

    @cached_property
    def labels(self) -> "StoredVolume | PackedVolume | None":
        """Its map of labels, whole numbers on the same grid."""
        try:
            return open_volume(self.label_file) if self.label_file else None
        except OSError as error:
            error.filename = self.label_file
            raise


class StoredVolume(OnDisk):
    """A `.npy` on the disk; see `open_volume`.

    Not a memory map: there, a disk that fails or a file that was cut short ends the process.

    Raises:
        OSError: if it cannot be read, is no `.npy`, or is shorter than it says.
    """

    def __init__(self, path: Path):
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


class PackedVolume(OnDisk):
    """The same of a `.b2nd`."""

    def __init__(self, path: Path):
        import blosc2

        if not path.is_file():  # blosc2 has an error of its own
            raise FileNotFoundError(2, os.strerror(2), str(path))
        self.array = _or_os_error(lambda: blosc2.open(str(path), mode="r", dparams={"nthreads": 1}))
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def __getitem__(self, box: tuple[slice, slice, slice]) -> np.ndarray:
        return _or_os_error(lambda: self.array[box])


class HeldVolume:
    """The same in memory, `[X, Y, Z]` or `[C, X, Y, Z]`, and labels `[X, Y, Z]`; `orientation` is that of its axes."""

    def __init__(
        self,
        voxels: np.ndarray,
        padding: float = 0.0,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        foreground_threshold: float = 0.0,
        orientation: str = "RAS",
        labels: np.ndarray | None = None,
    ):
        assert labels is None or labels.shape == voxels.shape[-3:]
        self.voxels, self.padding, self.spacing, self.labels = voxels, padding, tuple(spacing), labels
        self.foreground_threshold, self.orientation = foreground_threshold, orientation
        self.shape, self.dtype = voxels.shape[-3:], voxels.dtype

    @cached_property
    def volume_to_frame(self) -> np.ndarray:
        """Level 0, of its first channel: `[3, 4]`, see `frames.py`."""
        few = self.voxels.reshape(-1, *self.shape)[0, ::EVERY, ::EVERY, ::EVERY]
        return frames_of_moments(*moments(few > self.foreground_threshold, EVERY), self.orientation)

    def __getitem__(self, box: tuple[slice, slice, slice]) -> np.ndarray:
        return self.voxels[(..., *box)]


class Channels:
    """Volumes on one grid as the channels of one, `[C, X, Y, Z]`; those that are missing (None) are 0."""

    def __init__(self, volumes: "Sequence[StoredVolume | PackedVolume | HeldVolume | None]"):
        self.volumes = volumes
        self.present = np.array([volume is not None for volume in volumes])
        first = next(volume for volume in volumes if volume is not None)
        self.shape, self.dtype, self.spacing = first.shape, first.dtype, first.spacing
        self.padding = np.array([volume.padding if volume else 0.0 for volume in volumes])  # [C]
        self.foreground_threshold = np.array([volume.foreground_threshold if volume else np.inf for volume in volumes])
        self.first = first

    @property
    def volume_to_frame(self) -> np.ndarray:
        """Of the first channel that is there; all lie on one grid."""
        return self.first.volume_to_frame

    @property
    def labels(self) -> "StoredVolume | PackedVolume | np.ndarray | None":
        """Of the same: they have one map in common."""
        return self.first.labels

    def __getitem__(self, box: tuple[slice, slice, slice]) -> np.ndarray:
        size = [len(range(*part.indices(n))) for part, n in zip(box, self.shape)]
        out = np.zeros((len(self.volumes), *size), self.dtype)
        for channel, volume in zip(out, self.volumes):
            if volume is not None:
                channel[:] = volume[box]
        return out


Volume = StoredVolume | PackedVolume | HeldVolume | Channels


def _or_os_error(read: Callable[[], Read]) -> Read:
    try:
        return read()
    except (RuntimeError, ValueError, TypeError) as error:  # what blosc2 makes of damage
        raise OSError(f"no prepared volume ({str(error).splitlines()[0]})") from None
