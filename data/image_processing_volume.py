"""The preparation of volumes as a processor that is saved beside the encoder and loaded with `AutoImageProcessor`.

Needs nibabel, numpy, scipy, torch and transformers: this file, `nifti.py`, `volume.py`, `normalisation.py` and
`placement.py` are copied next to the weights.
"""

from collections.abc import Mapping

import nibabel as nib
import numpy as np
import torch
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin

from .nifti import Image, read_image
from .normalisation import BOX, checked_rule
from .placement import Placed
from .volume import NATIVE, PLAUSIBLE_SPACING, around, axis_order, own_box, prepare

MOST_VOXELS = 2048  # an axis; a configuration file that asks for more is damaged


class VolumeImageProcessor(ImageProcessingMixin):
    """Brings a volume to what the encoder saw in pretraining, with the code that prepared the training data.

    In this order: reorient, crop and scale by the rule of intensity, resample to `spacing`, with `coarsest_last` bring
    the coarsest axis last, cut the crop out of the middle (where the volume is smaller, the rule's padding is around
    it).

    Args:
        orientation: axes of the crop, such as "RAS".
        spacing: its voxel size in mm, (X, Y, Z), or "native": every volume keeps its own.
        crop_size: its size in voxels, (X, Y, Z).
        intensity: the rule, see `normalisation.py`; by default, crop to the non-zero box, subtract its mean and divide
            by its standard deviation.
        intensity_of_ct: the rule of CTs; None for that of all others.
        channels: modalities that the encoder reads together; images are then given as `{"T1w": ..., "FLAIR": ...}`, on
            one grid, cropped to one box, and one that is missing is 0.
        coarsest_last: whether crops have the volume's coarsest axis as their last, whichever it is (`axis_order`).
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        orientation="RAS",
        spacing=(1.0, 1.0, 1.0),
        crop_size=(160, 160, 160),
        intensity=BOX,
        intensity_of_ct=None,
        channels=(),
        coarsest_last=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if sorted("RLAPSI".find(letter) // 2 for letter in orientation) != [0, 1, 2]:
            raise ValueError(f"orientation {orientation!r} must name each axis once, such as RAS")
        sizes = [1.0] * 3 if spacing == NATIVE else spacing
        if len(sizes) != 3 or not all(PLAUSIBLE_SPACING[0] <= s <= PLAUSIBLE_SPACING[1] for s in sizes):
            raise ValueError(f"spacing {spacing} must be three sizes in mm, or {NATIVE!r}")
        self.orientation = orientation
        self.spacing = NATIVE if spacing == NATIVE else list(spacing)
        self.crop_size = voxels(crop_size)
        self.intensity = checked_rule(intensity)
        self.intensity_of_ct = None if intensity_of_ct is None else checked_rule(intensity_of_ct)
        self.channels, self.coarsest_last = list(channels), bool(coarsest_last)

    def prepare(self, image, spacing=None, modality=None):
        """The whole prepared volume, float32 `[X, Y, Z]`; sliding windows and random crops are cut from it.

        Args:
            image: path of a NIfTI file, a nibabel image, or an array or tensor `[X, Y, Z]`; with `channels` a dict of
                such, which gives `[C, X, Y, Z]`.
            spacing: voxel size of an array in mm, one number an axis. The array's axes must be those of `orientation`.
            modality: "CT", or another; None where it is not known, a CT is then told by its values.

        Raises:
            ValueError: if an array comes without its spacing, or the volume cannot be used; the message says why.
        """
        voxels = self.place(image, spacing, modality).voxels
        return voxels if self.channels else voxels[0]

    def place(self, image, spacing=None, modality=None):
        """The whole prepared volume with where it lies in its file, as `Placed`; `to_source_grid` of placement.py
        brings back what a network makes of it. Arguments and errors are those of `prepare`."""
        rules = self.intensity, self.intensity_of_ct
        if not self.channels:
            image = self._read(image, spacing)
            first = image
            volumes = [prepare(image.voxels, image.spacing, self.spacing, *rules, modality or "")]
        else:
            images = [None if one is None else self._read(one, spacing) for one in self._in_order(image)]
            named = [(one, name) for one, name in zip(images, self.channels) if one is not None]
            first, mm = named[0][0], named[0][0].spacing
            for one, _ in named:
                if one.shape != first.shape or not np.allclose(one.affine, first.affine, atol=1e-2):
                    raise ValueError("channels of one volume must be registered and on one grid: resample them to one")
            box = around([own_box(one.voxels, mm, *rules, name) for one, name in named])
            volumes = [
                None if one is None else prepare(one.voxels, mm, self.spacing, *rules, name, box)
                for one, name in zip(images, self.channels)
            ]
        there = next(filter(None, volumes))
        voxels = np.stack([np.zeros_like(there.voxels) if v is None else v.voxels for v in volumes])
        order = axis_order(there.spacing, self.coarsest_last)
        padding = [0.0 if v is None else v.padding for v in volumes]
        voxels = np.ascontiguousarray(voxels.transpose(0, *(1 + axis for axis in order)))
        to_image = there.to_box.copy()
        to_image[:, 3] += [part.start for part in there.box]
        to_source = first.to_file[:, :3] @ to_image
        to_source[:, 3] += first.to_file[:, 3]
        to_source = to_source[:, [*order, 3]]
        mm = tuple(there.spacing[axis] for axis in order)
        return Placed(voxels, padding, mm, to_source, tuple(first.shape), first.affine)

    def _read(self, image, spacing):
        """As an `Image`, reoriented; an array is taken to be so."""
        if isinstance(image, (str, nib.spatialimages.SpatialImage)) or hasattr(image, "__fspath__"):
            return read_image(image, self.orientation)
        if spacing is None:
            raise ValueError("an array needs its voxel size: processor(array, spacing=(1.0, 1.0, 1.0)), in mm")
        image = image.numpy(force=True) if isinstance(image, torch.Tensor) else np.asarray(image)
        mm = np.asarray(spacing, dtype=float)
        return Image(image.astype(np.float32), mm, np.eye(3, 4), np.diag([*mm, 1.0]), image.shape)

    def _in_order(self, images):
        """The image of each channel, None for one that is missing."""
        by_name = {name.lower(): image for name, image in images.items()} if isinstance(images, Mapping) else {}
        known = [name.lower() for name in self.channels]
        by_name = {name: one for name, one in by_name.items() if one is not None}
        if not by_name or not by_name.keys() <= set(known):
            example = ", ".join(f"{name!r}: ..." for name in self.channels)
            raise ValueError(f"this encoder reads channels: give {{{example}}}, of which some may be missing")
        return [by_name.get(name) for name in known]

    def __call__(self, images, spacing=None, crop_size=None, return_tensors="pt", modality=None):
        """Crops from the middle of one volume or of a list of volumes, as `pixel_values` `[B, C, X, Y, Z]`.

        Args:
            images: as for `prepare`, or a list of such.
            spacing: of arrays, in mm; the same for all of a list.
            crop_size: another size in voxels, or "whole" for all of one volume, which need not divide by the
                encoder's cells then.
            modality: as for `prepare`; the same for all of a list.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        volumes = [self.place(image, spacing, modality) for image in images]
        if isinstance(crop_size, str) and crop_size == "whole":
            size = volumes[0].voxels.shape[1:]
            if any(volume.voxels.shape[1:] != size for volume in volumes):
                raise ValueError("whole volumes of different sizes make no batch: give them one at a time")
        else:
            size = voxels(self.crop_size if crop_size is None else crop_size)
        crops = [[center_crop(c, size, p) for c, p in zip(v.voxels, v.padding)] for v in volumes]
        return BatchFeature({"pixel_values": np.stack(crops)}, tensor_type=return_tensors)


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
