"""The spacing of a data set, from headers alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .nifti import read_spacing

LOOKED_AT = 1000  # volumes at most, spread evenly over the list: more do not move a median


def median_spacing(paths: Sequence[Path], orientation: str) -> tuple[float, float, float]:
    """The median of each axis, in mm: whoever has the same list finds the same.

    Args:
        orientation: of the axes.

    Raises:
        ValueError: if no header can be read.
        OSError: if the disk fails.
    """
    looked_at = paths[:: 1 + len(paths) // LOOKED_AT]
    found = [spacing for path in looked_at if (spacing := read_spacing(path, orientation)) is not None]
    if not found:
        raise ValueError(f"data.spacing=median: none of {len(looked_at)} headers can be read, such as {looked_at[0]}")
    return tuple(np.round(np.median(found, axis=0), 4).tolist())
