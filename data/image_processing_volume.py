"""The preparation of volumes as a processor that is saved beside the encoder and loaded with `AutoImageProcessor`.

Needs nibabel, numpy, scipy, torch and transformers: this file, `nifti.py`, `volume.py` and `normalisation.py` are
copied next to the weights.
"""

import nibabel as nib
import numpy as np
import torch
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin

from .nifti import read_image
from .normalisation import BOX, checked_rule
from .volume import PLAUSIBLE_SPACING, prepare

MOST_VOXELS = 2048  # an axis; a configuration file that asks for more is damaged


class VolumeImageProcessor(ImageProcessingMixin):
    """Brings a volume to what the encoder saw in pretraining, with the code that prepared the training data.

    In this order: reorient, crop and scale by the rule of intensity, resample to `spacing`, cut the crop out of the
    middle (where the volume is smaller, the rule's padding is around it).

    Args:
        orientation: axes of the crop, such as "RAS".
        spacing: its voxel size in mm, (X, Y, Z).
        crop_size: its size in voxels, (X, Y, Z).
        intensity: the rule, see `normalisation.py`; by default, crop to the non-zero box, subtract its mean and divide
            by its standard deviation.
        intensity_of_ct: the rule of CTs; None for that of all others.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        orientation="RAS",
        spacing=(1.0, 1.0, 1.0),
        crop_size=(160, 160, 160),
        intensity=BOX,
        intensity_of_ct=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if sorted("RLAPSI".find(letter) // 2 for letter in orientation) != [0, 1, 2]:
            raise ValueError(f"orientation {orientation!r} must name each axis once, such as RAS")
        if len(spacing) != 3 or not all(PLAUSIBLE_SPACING[0] <= s <= PLAUSIBLE_SPACING[1] for s in spacing):
            raise ValueError(f"spacing {spacing} must be three sizes in mm")
        self.orientation = orientation
        self.spacing = list(spacing)
        self.crop_size = voxels(crop_size)
        self.intensity = checked_rule(intensity)
        self.intensity_of_ct = None if intensity_of_ct is None else checked_rule(intensity_of_ct)

    def prepare(self, image, spacing=None, modality=None):
        """The whole prepared volume, float32 `[X, Y, Z]`; sliding windows and random crops are cut from it.

        Args:
            image: path of a NIfTI file, a nibabel image, or an array or tensor `[X, Y, Z]`.
            spacing: voxel size of an array in mm, one number an axis. The array's axes must be those of `orientation`.
            modality: "CT", or another; None where it is not known, a CT is then told by its values.

        Raises:
            ValueError: if an array comes without its spacing, or the volume cannot be used; the message says why.
        """
        return self._prepared(image, spacing, modality).voxels

    def _prepared(self, image, spacing, modality):
        if isinstance(image, (str, nib.spatialimages.SpatialImage)) or hasattr(image, "__fspath__"):
            image, spacing, *_ = read_image(image, self.orientation)
        if spacing is None:
            raise ValueError("an array needs its voxel size: processor(array, spacing=(1.0, 1.0, 1.0)), in mm")
        image = image.numpy(force=True) if isinstance(image, torch.Tensor) else image
        rules = self.intensity, self.intensity_of_ct, modality or ""
        return prepare(image, spacing, tuple(self.spacing), *rules)

    def __call__(self, images, spacing=None, crop_size=None, return_tensors="pt", modality=None):
        """Crops from the middle of one volume or of a list of volumes, as `pixel_values` `[B, 1, X, Y, Z]`.

        Args:
            images: as for `prepare`, or a list of such.
            spacing: of arrays, in mm; the same for all of a list.
            crop_size: another size in voxels, or "whole" for all of one volume, which need not divide by the
                encoder's cells then.
            modality: as for `prepare`; the same for all of a list.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        volumes = [self._prepared(image, spacing, modality) for image in images]
        if isinstance(crop_size, str) and crop_size == "whole":
            size = volumes[0].voxels.shape
            if any(volume.voxels.shape != size for volume in volumes):
                raise ValueError("whole volumes of different sizes make no batch: give them one at a time")
        else:
            size = voxels(self.crop_size if crop_size is None else crop_size)
        crops = [center_crop(volume.voxels, size, volume.padding) for volume in volumes]
        return BatchFeature({"pixel_values": np.stack(crops)[:, None]}, tensor_type=return_tensors)


def voxels(size):
    """`size` as a list of three numbers of voxels; ValueError if it is something else."""
    size = [int(n) if isinstance(n, (int, np.integer)) else 0 for n in np.ravel(size).tolist()]
    if len(size) != 3 or not all(0 < n <= MOST_VOXELS for n in size):
        raise ValueError(f"crop_size {size} must be three numbers of voxels, no more than {MOST_VOXELS}")
    return size


def center_crop(volume, size, padding=0.0):
    """The middle of `[X, Y, Z]`, with `padding` around a smaller volume."""
    out = np.full(size, padding, volume.dtype)
    source, target = [], []
    for have, want in zip(volume.shape, size):
        length = min(have, want)
        source.append(slice((have - length) // 2, (have - length) // 2 + length))
        target.append(slice((want - length) // 2, (want - length) // 2 + length))
    out[tuple(target)] = volume[tuple(source)]
    return out
