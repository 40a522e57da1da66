"""What is done to a volume once it is read: crop, scale, resample. Goes to the Hub with the processor."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import zoom

from .normalisation import BOX, BadVolume, Box, box_of, checked_rule, is_ct, normalise

PLAUSIBLE_SPACING = (0.01, 50.0)  # mm; beyond, the header is wrong or in another unit
NATIVE = "native"  # spacing of volumes that are not resampled
ANISOTROPIC = 3.0  # above this ratio of spacings the coarse axis is interpolated linearly: splines overshoot there
LARGEST_VOLUME = 10**9  # voxels of a prepared one, 4 GB; a whole body at 1 mm has a fifth of them
NEGLIGIBLE = 1e-12  # of a spline's weights, which fall off for ever; denormal numbers are 10 times slower to multiply
MOST_LABELS = 1024  # different values; FreeSurfer's maps have some hundred
LARGEST_LABEL = 2**24 - 1  # up to which float32 has all whole numbers
ALIKE = 0.6  # share of neighbours of one value above which a volume is a map of labels


class NotAnImage(BadVolume):
    """A sound file of something else."""


class Prepared(NamedTuple):
    voxels: np.ndarray  # float32 [X, Y, Z]
    box: Box  # of the volume that it was cut from
    to_box: np.ndarray  # [3, 4], from its voxels to the box's
    spacing: tuple[float, float, float]  # mm
    mean: float  # what was subtracted from the box's voxels
    std: float  # what they were then divided by
    padding: float  # what crops that reach beyond the volume have there
    foreground_threshold: float  # voxels above are foreground
    is_ct: bool


def prepare(
    volume: np.ndarray,
    old_spacing: np.ndarray,
    spacing: tuple[float, float, float] | str,
    intensity: Mapping = BOX,
    intensity_of_ct: Mapping | None = None,
    modality: str = "",
    box: Box | None = None,
) -> Prepared:
    """Crop a volume and bring it to the scale of its rule, resample it: what is left to do once it is oriented.

    Args:
        volume: `[X, Y, Z]`, the axes as the encoder wants them.
        old_spacing: its voxel size in mm, (X, Y, Z).
        spacing: voxel size of the result in mm, or `NATIVE`: as it is.
        intensity: the rule, see `normalisation.py`.
        intensity_of_ct: the rule of a CT; None for that of all others.
        modality: of the volume; "" where it is not known, a CT is then told by its values.
        box: to crop to, in place of the rule's own.

    Raises:
        BadVolume: if it is not 3D, constant, of an impossible spacing or size, without foreground, or has NaN or
            infinite voxels.
        ValueError: if a rule is none.
    """
    volume, old_spacing = _checked(volume, old_spacing)
    rule, ct = _rule_of(volume, intensity, intensity_of_ct, modality)
    volume, box, mean, std, padding, threshold = normalise(volume, rule, box)
    spacing = tuple((old_spacing if spacing == NATIVE else np.asarray(spacing, dtype=float)).tolist())
    shape = _shape_at(volume.shape, old_spacing, np.asarray(spacing))
    scale = np.divide(volume.shape, shape)  # voxel i spans [i - .5, i + .5], so both grids begin at -.5
    to_box = np.column_stack([np.diag(scale), (scale - 1) / 2])
    voxels = np.ascontiguousarray(_resample(volume, old_spacing, shape))
    return Prepared(voxels, box, to_box, spacing, mean, std, padding, threshold, ct)


def own_box(
    volume: np.ndarray,
    spacing: np.ndarray,
    intensity: Mapping = BOX,
    intensity_of_ct: Mapping | None = None,
    modality: str = "",
) -> Box:
    """What `prepare` crops a volume to by its rule; arguments and errors are those of `prepare`."""
    volume, _ = _checked(volume, spacing)
    return box_of(volume, _rule_of(volume, intensity, intensity_of_ct, modality)[0])


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box around all."""
    return tuple(slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in zip(*boxes))


def axis_order(spacing: tuple[float, ...], coarsest_last: bool) -> tuple[int, int, int]:
    """The axis of a volume that lies along each axis of its crops: its own, or the coarsest one last.

    Spacings within a tenth of the coarsest are taken for as coarse; of those, the last axis stays last.
    """
    coarse = [axis for axis in range(3) if spacing[axis] > 0.9 * max(spacing)]
    last = coarse[-1] if coarsest_last else 2
    return (*(axis for axis in range(3) if axis != last), last)


def prepare_labels(labels: np.ndarray, box: Box, shape: tuple[int, ...]) -> np.ndarray:
    """A map of labels on the grid of its prepared volume: the nearest label, in the smallest integer type.

    Args:
        labels: `[X, Y, Z]`, the axes as the encoder wants them.
        box, shape: `Prepared.box` of the volume, and the shape of its voxels.

    Raises:
        BadVolume: if labels are not whole numbers, negative or too large.
    """
    if not np.array_equal(labels, np.round(labels)):
        raise BadVolume("its labels are not whole numbers")
    if labels.min() < 0 or labels.max() > LARGEST_LABEL:
        raise BadVolume(f"its labels go from {labels.min():g} to {labels.max():g}, not from 0 to {LARGEST_LABEL}")
    labels = labels[box]
    nearest = [np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1) for n, m in zip(shape, labels.shape)]
    labels = labels[np.ix_(*nearest)]
    return labels.astype(np.min_scalar_type(int(labels.max())))


def is_label_map(voxels: np.ndarray) -> bool:
    """Whether a volume is a mask or a map of labels: few whole numbers, and neighbours mostly the same."""
    few = voxels[::4, ::4, ::4]
    if not np.array_equal(few, np.round(few)) or len(np.unique(few)) > MOST_LABELS:
        return False
    slabs = voxels[::4]
    values, counts = np.unique(slabs, return_counts=True)
    if len(values) > MOST_LABELS or not np.array_equal(values, np.round(values)):
        return False
    inside = slabs != values[counts.argmax()]  # the background of an image is the same everywhere, too
    next_to = ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :, 1:], np.s_[:, :, :-1]))  # an image may repeat its slices
    pairs = [inside[one] & inside[other] for one, other in next_to]
    alike = [(slabs[one] == slabs[other]) & pair for (one, other), pair in zip(next_to, pairs)]
    return all(bool(same.sum() > ALIKE * pair.sum()) for same, pair in zip(alike, pairs))


def _checked(volume: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    volume, spacing = np.asarray(volume, dtype=np.float32), np.asarray(spacing, dtype=float)
    if volume.ndim != 3 or min(volume.shape) < 2:
        raise BadVolume(f"shape {volume.shape} is not a 3D volume")
    if spacing.shape != (3,) or not all(PLAUSIBLE_SPACING[0] <= s <= PLAUSIBLE_SPACING[1] for s in spacing):
        raise BadVolume(f"its voxel size {spacing.tolist()} is not a size in mm; mend the header")
    if not np.isfinite(volume).all():
        raise BadVolume(f"{int((~np.isfinite(volume)).sum())} voxels are NaN or infinite")
    return volume, spacing


def _rule_of(
    volume: np.ndarray, intensity: Mapping, intensity_of_ct: Mapping | None, modality: str
) -> tuple[dict, bool]:
    """The rule of a volume, and whether it is a CT."""
    rules = checked_rule(intensity), checked_rule(intensity if intensity_of_ct is None else intensity_of_ct)
    ct = is_ct(volume, modality)
    return rules[ct], ct


def _shape_at(shape: tuple[int, ...], old: np.ndarray, new: np.ndarray) -> tuple[int, ...]:
    resized = np.maximum(np.round(shape * old / new), 1).astype(int)
    if np.prod(resized, dtype=float) > LARGEST_VOLUME:
        raise BadVolume(
            f"it would have {' x '.join(map(str, resized))} voxels of {' x '.join(f'{s:g}' for s in new)} mm: are its "
            f"{' x '.join(f'{s:g}' for s in old)} mm right?"
        )
    return tuple(resized.tolist())


def _resample(volume: np.ndarray, old: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cubic splines; straight lines between the slices of strongly anisotropic volumes.

    What `scipy.ndimage.zoom` does along an axis is linear, so its answer to unit vectors is a matrix, and the same
    numbers come from matrix products some 20 times sooner.
    """
    orders = np.where(old / old.min() > ANISOTROPIC, 1, 3)
    volume = np.ascontiguousarray(volume)
    for axis in np.argsort(np.divide(shape, volume.shape)):  # first what makes it smaller
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
