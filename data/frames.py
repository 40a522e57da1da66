"""A frame that patients share: `volume_to_frame` `[3, 4]` carries a place from a volume's voxels to mm in it.

Where a place of one patient lies in another is then two matrix products. Level 0 needs no weights: the moments of the
foreground, which preparation has noted, are brought to the same place and extent in all. Level 1 is what
align_volumes.py finds by the features of an encoder and writes beside the manifest.
"""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .columns import matrix
from .files import write_whole
from .manifest import Manifest
from .moments import frames_of_moments
from .views import TOLERANCE, compose, scatter_views

if TYPE_CHECKING:
    from .stored_volume import Volume

NAME = "frames.npz"
TRIES = 10  # centres of a crop, of which the first in the foreground is taken
BEYOND = 1 / 6  # of an axis of a crop that may lie beyond the volume: three axes leave half of it inside


class Frames(NamedTuple):
    """Of all volumes of a manifest, in the order of its rows."""

    volume_to_frame: np.ndarray  # float64 [N, 3, 4]
    level: np.ndarray  # uint8 [N]

    def words(self) -> str:
        """How many are of which level."""
        aligned = int(self.level.sum())
        return f"{aligned} of {len(self.level)} volumes aligned by features" if aligned else "by moments"

    def fingerprint(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.volume_to_frame).tobytes()).hexdigest()[:16]


def frames_by_moments(manifest: Manifest) -> Frames:
    """Level 0; of the columns `FOR_RUNS`."""
    means, stds = (matrix(manifest.volumes[f"foreground_{what}"], 3) for what in ("mean", "std"))
    frames = frames_of_moments(means, stds, manifest.preparation.orientation)
    return Frames(frames, np.zeros(len(frames), np.uint8))


def read_frames(manifest: Manifest) -> Frames:
    """Level 1 where the folder was aligned, else level 0.

    Raises:
        ValueError: if the folder was aligned when it had other volumes, or the file is damaged.
    """
    path = manifest.folder / NAME
    if not path.exists():
        return frames_by_moments(manifest)
    again = "run align_volumes.py again, or remove it"
    try:
        with np.load(path, allow_pickle=False) as file:
            found, frames = str(file["manifest"]), Frames(file["volume_to_frame"], file["level"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): {again}") from None
    if found != manifest.fingerprint() or frames.volume_to_frame.shape != (len(manifest.volumes), 3, 4):
        raise ValueError(f"{path} is of other volumes than {manifest.folder} has now: {again}")
    return frames


def write_frames(manifest: Manifest, frames: Frames, **facts: np.ndarray | str) -> Path:
    """Write frames beside the manifest, whole or not at all."""

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, manifest=manifest.fingerprint(), **frames._asdict(), **facts)

    write_whole(manifest.folder / NAME, fill)
    return manifest.folder / NAME


def carry(affine: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Places `[..., 3]` by an affine `[3, 4]`."""
    return places @ affine[:, :3].T + affine[:, 3]


def inverse(affine: np.ndarray) -> np.ndarray:
    """`[3, 4]`."""
    back = np.linalg.inv(affine[:, :3])
    return np.column_stack((back, -back @ affine[:, 3]))


def pair_views(
    rng: np.random.Generator,
    volumes: "Sequence[Volume]",
    shared: np.ndarray,
    own: Sequence[np.ndarray],
    crop_size: tuple[int, ...],
    overhang: float,
    jitter: float,
) -> np.ndarray:
    """`crop_to_volume` of a crop of one volume and of one of the same place in another, `[2, 3, 4]`.

    The first is drawn as `scatter_views` does, up to `TRIES` times until its centre is in the foreground. The second
    has the same turn in mm; its centre is where the frames of the volumes carry the first's, up to `jitter`, rounded so
    that an unturned crop is on whole voxels, and moved so that at least half of a crop that fits lies in the volume.
    Then each is turned about its own centre by its `own` matrix.

    Args:
        volumes: of the first and of the second crop; a single one is taken for both.
        overhang: how far the first crop may reach beyond its volume on each side, as a share of the crop.
        shared, own: `[3, 3]`, see `draw_turn`.
        jitter: mm, deviation of the second centre along each axis.
    """
    first, second = volumes[0], volumes[-1]
    middle = (np.asarray(crop_size) - 1) / 2
    tries = scatter_views(rng, first.shape, crop_size, overhang, shared, [np.eye(3)] * TRIES)
    shift = rng.normal(0.0, jitter, 3) / second.spacing
    centres = tries[:, :, :3] @ middle + tries[:, :, 3]
    centre = next((place for place in centres if _in_foreground(first, place)), centres[-1])
    there = carry(compose(inverse(second.volume_to_frame), first.volume_to_frame), centre) + shift
    turn = shared * np.divide(first.spacing, second.spacing)[:, None]
    there = _inside(there, second.shape, np.abs(turn) @ np.asarray(crop_size))
    crops = ((shared @ own[0], centre), (turn @ own[1], there))
    return np.stack([np.column_stack((matrix, place - matrix @ middle)) for matrix, place in crops])


def _in_foreground(volume: "Volume", place: np.ndarray) -> bool:
    voxel = np.clip(np.round(place), 0, np.subtract(volume.shape, 1)).astype(int)
    value = volume[tuple(slice(n, n + 1) for n in voxel)]
    return bool((value.reshape(-1) > volume.foreground_threshold).any())


def _inside(centre: np.ndarray, volume_size: Sequence[int], box: np.ndarray) -> np.ndarray:
    """The centre nearest to this one of a box `[3]` of voxels whose low corner lies between two voxels, and which
    reaches beyond the volume by no more than `BEYOND` of it; centred along axes on which even so it does not fit."""
    beyond = np.floor(BEYOND * box)
    free = np.asarray(volume_size) - box
    highest = np.floor(free + beyond + TOLERANCE)
    low = np.where(highest >= -beyond, np.clip(np.round(centre - box / 2 + 0.5), -beyond, highest), np.ceil(free / 2))
    return low - 0.5 + box / 2
