"""Volumes made ready before the first step; what cannot be used is named and counted."""

import hashlib
from pathlib import Path

import joblib
import numpy as np

from data.demo import demo_volume
from data.nifti import find_volumes
from data.prepared import prepare_volumes

from .recipe import Recipe


def prepare_data(data: Path | None, folder: Path, recipe: Recipe) -> tuple[list[Path], str]:
    """Prepared volumes, and a fingerprint of the files that they come from.

    Args:
        data: searched for volumes; None for the demo's.
        folder: of prepared volumes.

    Raises:
        ValueError: if too many files cannot be used.
    """
    paths, numbers = find_volumes(data) if data else [demo_volume()], recipe.data
    files, bad = prepare_volumes(paths, folder, numbers.orientation, numbers.spacing, joblib.cpu_count())
    for path, reason in bad:
        print(f"left out    {path}: {reason}")
    if len(bad) > numbers.max_bad_share * len(paths) or not files:
        raise ValueError(
            f"{len(bad)} of {len(paths)} files cannot be used, more than data.max_bad_share={numbers.max_bad_share:g}: "
            "mend or remove the files listed above, or raise data.max_bad_share"
        )
    small = [f for f in files if any(np.array(np.load(f, mmap_mode="r").shape) < recipe.views.crop_size)]
    print(f"data        {len(files)} volume{'s' if len(files) > 1 else ''}, {len(bad)} left out")
    if small:
        print(f"small       {len(small)} are smaller than the crop and are padded with 0, such as {small[0].name}")
    used = sorted(set(paths) - {path for path, _ in bad})
    facts = [f"{path.relative_to(data or path.parent)} {path.stat().st_size}" for path in used]
    return files, hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
