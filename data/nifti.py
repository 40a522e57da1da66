"""Reading NIfTI: find the files, refuse what cannot be trained on, bring the rest to one orientation and spacing."""

import errno
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import zoom

PLAUSIBLE_SPACING = (0.01, 50.0)  # mm; beyond, the header is wrong or in another unit
ANISOTROPIC = 3.0  # above this ratio of spacings the coarse axis is not interpolated (nnU-Net's rule)
LARGEST_VOLUME = 10**9  # voxels of a prepared one, 4 GB; a whole body at 1 mm has a fifth of them
NEGLIGIBLE = 1e-12  # of a spline's weights, which fall off for ever; denormal numbers are 10 times slower to multiply
OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG}


class BadVolume(ValueError):
    """A file that cannot be used for training; the message says why, in one line."""


def find_volumes(folder: Path) -> list[Path]:
    """All `.nii` and `.nii.gz` files below a folder, sorted; none whose name, or folder's, begins with a dot.

    Raises:
        ValueError: if the folder does not exist or holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    found = (p for p in folder.rglob("*") if p.name.endswith((".nii", ".nii.gz")) and p.is_file())
    paths = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not paths:
        raise ValueError(
            f"--data {folder}: no .nii or .nii.gz file in it or below it; convert DICOM with dcm2niix first"
        )
    return paths


def read_volume(
    source: str | Path | nib.spatialimages.SpatialImage, orientation: str, spacing: tuple[float, float, float]
) -> np.ndarray:
    """Read one volume as the encoders see it: reoriented, then as `prepare_array` does.

    Args:
        source: path of a NIfTI file, or a nibabel image.
        orientation: the axes of the result, such as "RAS" (first axis towards the patient's right, ...).
        spacing: voxel size of the result in mm, (X, Y, Z).

    Returns:
        float32 `[X, Y, Z]`.

    Raises:
        BadVolume: if the file is unreadable, not 3D, constant, or has NaN or infinite voxels.
        OSError: if the disk fails, which says nothing of the file.
    """
    try:
        image = source if isinstance(source, nib.spatialimages.SpatialImage) else nib.load(source)
    except Exception as error:  # nibabel, gzip and zlib each fail in their own way
        _raise_if_of_the_disk(error)
        raise BadVolume(f"not a readable NIfTI file ({_first_line(error)})") from error
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 2:
        kind = {2: "a 2D image", 4: "a 4D series; split it into one file a volume"}.get(len(shape), "not a 3D volume")
        raise BadVolume(f"shape {image.shape} is {kind if min(shape) > 1 else 'a 2D image'}")
    if (voxels := image.get_data_dtype().kind) not in "biuf":
        kinds = {"c": "complex numbers; save their magnitude", "V": "colours; save one channel"}
        raise BadVolume(f"its voxels are {kinds.get(voxels, 'not numbers')}")
    try:
        image = nib.as_closest_canonical(image.slicer[(..., *[0] * (image.ndim - 3))] if image.ndim > 3 else image)
        image = image.as_reoriented(
            nib.orientations.ornt_transform(
                nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
            )
        )
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is told below
            volume = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:
        _raise_if_of_the_disk(error)
        raise BadVolume(f"its voxels cannot be read; truncated or corrupt? ({_first_line(error)})") from error
    # not the header's zooms: the two can disagree
    return prepare_array(volume, nib.affines.voxel_sizes(image.affine), spacing)


def prepare_array(volume: np.ndarray, old_spacing: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Crop a volume to its non-zero box, z-score it, resample it: what is left to do once it is oriented.

    Args:
        volume: `[X, Y, Z]`, the axes as the encoder wants them.
        old_spacing: its voxel size in mm, (X, Y, Z).
        spacing: voxel size of the result in mm.

    Returns:
        float32 `[X, Y, Z]` of mean 0 and standard deviation 1 (before resampling).

    Raises:
        BadVolume: if it is not 3D, constant, of an impossible spacing or size, or has NaN or infinite voxels.
    """
    volume, old_spacing = np.asarray(volume, dtype=np.float32), np.asarray(old_spacing, dtype=float)
    if volume.ndim != 3 or min(volume.shape) < 2:
        raise BadVolume(f"shape {volume.shape} is not a 3D volume")
    if old_spacing.shape != (3,) or not all(PLAUSIBLE_SPACING[0] <= s <= PLAUSIBLE_SPACING[1] for s in old_spacing):
        raise BadVolume(f"its voxel size {old_spacing.tolist()} is not a size in mm; mend the header")
    if not np.isfinite(volume).all():
        raise BadVolume(f"{int((~np.isfinite(volume)).sum())} voxels are NaN or infinite")
    box = _nonzero_box(volume)
    volume = volume[box] if box else volume
    std = float(volume.std(dtype=np.float64))
    if std < 1e-8:
        raise BadVolume("all voxels are the same")
    volume = (volume - np.float32(volume.mean(dtype=np.float64))) / np.float32(std)
    return np.ascontiguousarray(_resample(volume, old_spacing, np.asarray(spacing)))


def _nonzero_box(volume: np.ndarray) -> tuple[slice, ...] | None:
    box = []
    for axis in range(3):
        used = np.flatnonzero(volume.any(axis=tuple(a for a in range(3) if a != axis)))
        if len(used) == 0:
            return None
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


def _resample(volume: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Cubic splines; the coarse axis of strongly anisotropic volumes takes the nearest slice.

    What `scipy.ndimage.zoom` does along an axis is linear, so its answer to unit vectors is a matrix, and the same
    numbers come from matrix products some 20 times sooner.
    """
    shape = np.maximum(np.round(volume.shape * old / new), 1).astype(int)
    if np.prod(shape, dtype=float) > LARGEST_VOLUME:
        raise BadVolume(
            f"it would have {' x '.join(map(str, shape))} voxels of {' x '.join(f'{s:g}' for s in new)} mm: are its "
            f"{' x '.join(f'{s:g}' for s in old)} mm right?"
        )
    orders = np.where(old / old.min() > ANISOTROPIC, 0, 3)
    volume = np.ascontiguousarray(volume)
    for axis in np.argsort(shape / volume.shape):  # first what makes it smaller
        size = volume.shape[axis]
        if shape[axis] == size:
            continue
        factors = (shape[axis] / size, 1)
        matrix = zoom(np.eye(size), factors, order=orders[axis], mode="nearest", grid_mode=True)
        matrix = np.where(np.abs(matrix) < NEGLIGIBLE, 0, matrix).astype(np.float32)
        if axis == 0:
            volume = (matrix @ volume.reshape(size, -1)).reshape(-1, *volume.shape[1:])
        else:
            volume = matrix @ volume if axis == 1 else volume @ matrix.T
    return volume


def _raise_if_of_the_disk(error: Exception) -> None:
    if isinstance(error, OSError) and error.errno not in {None, *OF_THE_FILE}:
        raise error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
