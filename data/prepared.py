"""Volumes prepared once and kept as plain `.npy`, so that a random crop is a small read from a memory map."""

import errno
import hashlib
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from tqdm import tqdm

from .nifti import BadVolume, read_volume


def prepare_volumes(
    paths: list[Path],
    folder: Path,
    orientation: str,
    spacing: tuple[float, float, float],
    workers: int,
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Prepare each volume into `folder`, unless it is there already; several processes may share the folder.

    Returns:
        The prepared files, in the order of `paths`, and for each file left out its path and why.

    Raises:
        OSError: if the folder cannot be written; what is in it stays valid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = partial(_prepare, folder=folder, orientation=orientation, spacing=tuple(spacing))
    results = Parallel(n_jobs=min(workers, len(paths)), return_as="generator")(delayed(job)(path) for path in paths)
    bar = tqdm(results, total=len(paths), desc="preparing volumes", unit="file", disable=len(paths) < 8)
    results = list(bar)
    good = [file for file, _ in results if file is not None]
    bad = [(path, reason) for path, (_, reason) in zip(paths, results) if reason is not None]
    return good, bad


def prepared_file(path: Path, folder: Path, orientation: str, spacing: tuple[float, float, float]) -> Path:
    """Where `prepare_volumes` keeps a volume."""
    return folder / f"{path.name.split('.nii')[0]}-{_key(path, orientation, spacing)}.npy"


def _prepare(path: Path, folder: Path, orientation: str, spacing: tuple) -> tuple[Path | None, str | None]:
    file = prepared_file(path, folder, orientation, spacing)
    if file.exists():
        return file, None
    try:
        volume = read_volume(path, orientation, spacing)
    except BadVolume as error:
        return None, str(error)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            np.save(stream, volume)
        os.replace(temporary, file)  # a killed run leaves no half-written volume behind
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise OSError(
                error.errno, f"no room for prepared volumes in {folder}: free some or choose --prepared"
            ) from None
        raise
    return file, None


def _key(path: Path, orientation: str, spacing: tuple) -> str:
    """Changes when the file or the preparation does."""
    stat = path.stat()
    facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, orientation, [float(s) for s in spacing], 1]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
