"""Rules that bring the intensities of volumes onto one scale. Goes to the Hub with the processor.

A rule is a plain dict, as it stands in recipes and configuration files: `{"rule": "box"}`, `{"rule": "foreground"}`,
`{"rule": "window", "low": -1000, "high": 1000, "mean": 0, "std": 500}`, `{"rule": "percentile", "low": 0.5, "high":
99.5}`.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BOX = {"rule": "box"}
NUMBERS = {"box": set(), "foreground": set(), "window": {"low", "high", "mean", "std"}, "percentile": {"low", "high"}}
CT = {"ct", "cta"}  # in small letters; a PET/CT is not in HU
BELOW_ALL_BUT_CT = -500.0  # air has -1000 HU, and what is not CT is seldom negative at all
ZERO_SHARE = 0.25  # of voxels, from which on zeros are a background; a head fills half of its box
SPARSE = 4  # voxels of an axis, of which one is looked at for the most frequent value
BINS = 256


class BadVolume(ValueError):
    """A file that cannot be used for training; the message says why, in one line."""


Box = tuple[slice, slice, slice]


class Normalised(NamedTuple):
    voxels: np.ndarray  # float32, of the box
    box: Box
    mean: float  # what was subtracted
    std: float  # what was divided by
    padding: float  # what is around the volume, on the new scale
    threshold: float  # voxels above are foreground, on the new scale


def checked_rule(rule: object) -> dict:
    """A rule with its numbers as floats.

    Raises:
        ValueError: if it is none.
    """
    numbers = dict(rule) if isinstance(rule, Mapping) else {}
    name = numbers.pop("rule", None)
    plain = all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers.values())
    if not isinstance(name, str) or numbers.keys() != NUMBERS.get(name) or not plain:
        known = ", ".join(" with ".join([key, *([" ".join(sorted(n))] if n else [])]) for key, n in NUMBERS.items())
        raise ValueError(f"{rule!r} is no rule of intensity: there are {known}")
    if "low" in numbers and not numbers["low"] < numbers["high"]:
        raise ValueError(f"{rule!r}: low must be below high")
    if not numbers.get("std", 1) > 0:
        raise ValueError(f"{rule!r}: std must be above 0")
    if name == "percentile" and not 0 <= numbers["low"] < numbers["high"] <= 100:
        raise ValueError(f"{rule!r}: percentiles are from 0 to 100")
    return {"rule": name, **{key: float(numbers[key]) for key in ("low", "high", "mean", "std") if key in numbers}}


def is_ct(volume: np.ndarray, modality: str) -> bool:
    """Whether a volume is a CT: by its modality, or where that is not known ("") by values that only CTs have."""
    return modality.lower() in CT if modality else bool(volume.min() < BELOW_ALL_BUT_CT)


def window_threshold(rule: Mapping) -> float:
    """A quarter of the way up a window: of a CT's, -500 HU, between air with lungs in it, and fat."""
    return rule["low"] + (rule["high"] - rule["low"]) / 4


def box_of(volume: np.ndarray, rule: Mapping) -> Box:
    """What `normalise` crops a volume to.

    Raises:
        BadVolume: if it has no foreground.
    """
    if rule["rule"] == "box":
        return _box(volume != 0)
    return _box(volume > window_threshold(rule) if rule["rule"] == "window" else _foreground(volume)[0])


def normalise(volume: np.ndarray, rule: Mapping, box: Box | None = None) -> Normalised:
    """Crop a volume and bring it to the scale of a rule.

    `box` crops to the box of non-zero voxels and z-scores it, the others to the box of the foreground (`_foreground`).

    Args:
        volume: float32 `[X, Y, Z]`, all finite.
        rule: of `checked_rule`.
        box: to crop to, in place of that of the rule: contrasts of one patient have one.

    Raises:
        BadVolume: if it is constant, or has no foreground.
    """
    if rule["rule"] == "box":
        box = box or _box(volume != 0)
        voxels = volume[box]
        mean, std = _moments(voxels, "all voxels are the same")
        return Normalised(_scaled(voxels, mean, std), box, mean, std, 0.0, 0.0)
    if volume.min() == volume.max():
        raise BadVolume("all voxels are the same")
    if rule["rule"] == "window":
        return _in_window(volume, rule, box)
    foreground, background, threshold = _foreground(volume)
    voxels, box, same = volume[foreground], box or _box(foreground), "all voxels of the foreground are the same"
    volume = volume[box]
    if rule["rule"] == "percentile":
        _moments(voxels, same)
        low, high = (float(end) for end in np.percentile(voxels, (rule["low"], rule["high"])))
        volume, voxels = np.clip(volume, low, high), np.clip(voxels, low, high)
        background = min(max(background, low), high)
        same = f"all voxels of the foreground are the same between its percentiles {low:g} and {high:g}"
    mean, std = _moments(voxels, same)
    threshold = max(threshold, background + (mean - background) / 4)  # interpolated or clipped, none has a sharp edge
    return Normalised(_scaled(volume, mean, std), box, mean, std, (background - mean) / std, (threshold - mean) / std)


def _in_window(volume: np.ndarray, rule: Mapping, box: Box | None) -> Normalised:
    low, high, mean, std = (rule[key] for key in ("low", "high", "mean", "std"))
    threshold = window_threshold(rule)
    ask = "are data.intensity and data.intensity_of_ct right?"
    foreground = volume > threshold
    if not foreground.any():
        raise BadVolume(f"no voxel is above {threshold:g}: {ask}")
    box = box or _box(foreground)
    voxels = np.clip(volume[box], low, high)
    if voxels.min() == voxels.max():
        raise BadVolume(f"all voxels are the same between {low:g} and {high:g}: {ask}")
    return Normalised(_scaled(voxels, mean, std), box, mean, std, (low - mean) / std, (threshold - mean) / std)


def _foreground(volume: np.ndarray) -> tuple[np.ndarray, float, float]:
    """What is not background: the non-zero voxels of a volume that was masked, else what is brighter than Otsu's
    threshold, since air has noise in it that no fixed number is above.

    Returns:
        The mask, the background's value, and the threshold, if any (else -inf).
    """
    zeros = volume == 0
    if zeros.mean() >= ZERO_SHARE:
        values, counts = np.unique(volume[::SPARSE, ::SPARSE, ::SPARSE], return_counts=True)
        if values[counts.argmax()] == 0:
            return ~zeros, 0.0, -math.inf
    threshold = _otsu(volume)
    foreground = volume > threshold
    if not foreground.any():
        raise BadVolume(f"no foreground: nothing is above {threshold:g}")
    return foreground, float(np.median(volume[~foreground])), threshold


def _otsu(volume: np.ndarray) -> float:
    """The threshold with the most variance between the voxels below and above it (Otsu 1979)."""
    low, high = np.percentile(volume, (0.1, 99.9))
    if low == high:
        return float(low)
    counts, edges = np.histogram(volume, BINS, (low, high))
    values = (edges[1:] + edges[:-1]) / 2
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * values)
    above = counts.sum() - below
    apart = sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1 + np.argmax(below * above * apart**2)])


def _moments(voxels: np.ndarray, same: str) -> tuple[float, float]:
    mean, std = float(voxels.mean(dtype=np.float64)), float(voxels.std(dtype=np.float64))
    if std < 1e-8:
        raise BadVolume(same)
    return mean, std


def _scaled(volume: np.ndarray, mean: float, std: float) -> np.ndarray:
    return (volume - np.float32(mean)) / np.float32(std)


def _box(mask: np.ndarray) -> Box:
    """Of the voxels that are True; all of it where none is."""
    box = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, mask.shape[axis]))
    return tuple(box)
