"""Where the foreground of a volume lies, and the frame that follows from it: level 0 of `frames.py`."""

import numpy as np

EVERY = 3  # voxels of an axis that statistics of the foreground look at
EXTENT = {"R": 40.0, "A": 50.0, "S": 40.0}  # mm, deviation of the foreground's places in the frame; ours
OPPOSITE = {"L": "R", "P": "A", "I": "S"}
LEAST = 0.5  # voxels of deviation, so that a flat foreground has a frame too


def moments(foreground: np.ndarray, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the foreground's places in voxels, `[3]` each; of all places where there is none.

    Args:
        foreground: bool `[x, y, z]`, of every `every`-th voxel of a volume.
    """
    places = every * np.argwhere(foreground if foreground.any() else ~foreground)
    return places.mean(axis=0), places.std(axis=0)


def frames_of_moments(mean: np.ndarray, std: np.ndarray, orientation: str) -> np.ndarray:
    """`volume_to_frame` of level 0, `[..., 3, 4]`: mean 0 and deviation `EXTENT`.

    Args:
        mean, std: of the foreground's places in voxels, `[..., 3]`.
        orientation: of the volume's axes, such as "RAS"; the frame's axes are the same.
    """
    extent = np.array([EXTENT[OPPOSITE.get(axis, axis)] for axis in orientation])
    scale = extent / np.maximum(std, LEAST)
    return np.concatenate((np.eye(3) * scale[..., None], (-scale * mean)[..., None]), axis=-1)
