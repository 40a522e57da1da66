"""Reading NIfTI: refuse what cannot be trained on, bring the rest to one orientation."""

import errno
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from .normalisation import BOX, BadVolume
from .volume import prepare

OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG}


class Image(NamedTuple):
    """A volume as it was read, its axes as asked for."""

    voxels: np.ndarray  # float32 [X, Y, Z]
    spacing: np.ndarray  # mm of a voxel, (X, Y, Z)
    to_file: np.ndarray  # [3, 4], from its voxels to the file's
    affine: np.ndarray  # [4, 4], from the file's voxels to mm in the scanner
    shape: tuple[int, ...]  # of the file


def read_volume(
    source: str | Path | nib.spatialimages.SpatialImage,
    orientation: str,
    spacing: tuple[float, float, float] | str,
    intensity: Mapping = BOX,
    intensity_of_ct: Mapping | None = None,
    modality: str = "",
) -> np.ndarray:
    """Read one volume as the encoders see it: reoriented, then as `prepare` does.

    Args, Raises: of `read_image`.
        spacing: voxel size of the result in mm, (X, Y, Z), or `NATIVE`.
        intensity, intensity_of_ct, modality: see `prepare`.

    Returns:
        float32 `[X, Y, Z]`.
    """
    image = read_image(source, orientation)
    return prepare(image.voxels, image.spacing, spacing, intensity, intensity_of_ct, modality).voxels


def read_image(
    source: str | Path | nib.spatialimages.SpatialImage, orientation: str, number: int | None = None
) -> Image:
    """Read the voxels of one volume.

    Args:
        source: path of a NIfTI file, or a nibabel image.
        orientation: the axes of the result, such as "RAS" (first axis towards the patient's right, ...).
        number: of the volume in a 4D file, from 0.

    Raises:
        BadVolume: if the file is unreadable, not 3D, or not of plain numbers.
        OSError: if the disk fails, which says nothing of the file.
    """
    try:
        image = source if isinstance(source, nib.spatialimages.SpatialImage) else nib.load(source)
    except Exception as error:  # nibabel, gzip and zlib each fail in their own way
        _raise_if_of_the_disk(error)
        raise BadVolume(f"not a readable NIfTI file ({_first_line(error)})") from error
    if number is not None and image.ndim == 4 and number < image.shape[3]:
        image = image.slicer[..., number]
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 2:
        kind = {2: "a 2D image", 4: "a 4D series; prepare_data.py --split-series takes its volumes"}.get(
            len(shape), "not a 3D volume"
        )
        raise BadVolume(f"shape {image.shape} is {kind if min(shape) > 1 else 'a 2D image'}")
    if (kind := image.get_data_dtype().kind) not in "biuf":
        kinds = {"c": "complex numbers; save their magnitude", "V": "colours; save one channel"}
        raise BadVolume(f"its voxels are {kinds.get(kind, 'not numbers')}")
    try:
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
        )
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is told later
            stored = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
        voxels = nib.orientations.apply_orientation(stored, turn)
        to_file = nib.orientations.inv_ornt_aff(turn, shape)
    except Exception as error:
        _raise_if_of_the_disk(error)
        raise BadVolume(f"its voxels cannot be read; truncated or corrupt? ({_first_line(error)})") from error
    # not the header's zooms: the two can disagree
    spacing = nib.affines.voxel_sizes(image.affine @ to_file)
    return Image(voxels, spacing, to_file[:3], image.affine, shape)


def read_spacing(path: Path, orientation: str) -> np.ndarray | None:
    """mm of a voxel, `[3]`, along the axes of an orientation; None of what is no volume. Reads the header alone.

    Raises:
        OSError: if the disk fails.
    """
    try:
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
        )
        return nib.affines.voxel_sizes(image.affine @ nib.orientations.inv_ornt_aff(turn, image.shape[:3]))
    except Exception as error:  # nibabel, gzip and zlib each fail in their own way
        _raise_if_of_the_disk(error)
        return None


def image_of(content: bytes) -> nib.Nifti1Image:
    """The image in the bytes of a NIfTI file; BadVolume if it is none."""
    try:
        return nib.Nifti1Image.from_bytes(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except Exception as error:  # nibabel, gzip and zlib each fail in their own way
        raise BadVolume(f"not a readable NIfTI file ({_first_line(error)})") from error


def _raise_if_of_the_disk(error: Exception) -> None:
    if isinstance(error, OSError) and error.errno not in {None, *OF_THE_FILE}:
        raise error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
