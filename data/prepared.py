"""Volumes prepared once and kept as plain `.npy`, so that a random crop is a small read from a memory map."""

import errno
import hashlib
import json
import os
import socket
import time
from functools import partial
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from tqdm import tqdm

from .nifti import BadVolume, read_volume

RETRIES = (1.0, 10.0)  # seconds after which a disk that failed is asked again


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
        OSError: if the folder cannot be written, or a file not be read for reasons of the disk; what is in the folder
            stays valid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {path: prepared_file(path, folder, orientation, spacing) for path in paths}
    missing = [path for path, file in files.items() if not file.exists()]
    if missing:
        job = partial(_prepare, orientation=orientation, spacing=tuple(spacing))
        jobs = (delayed(job)(path, files[path]) for path in missing)
        reasons = Parallel(n_jobs=min(workers, len(missing)), return_as="generator")(jobs)
        bar = tqdm(reasons, total=len(missing), desc="preparing volumes", unit="file", disable=len(missing) < 8)
        reasons = dict(zip(missing, bar))
        get_reusable_executor().shutdown()  # its processes would outlive a killed run by minutes
    bad = [(path, reasons[path]) for path in missing if reasons[path] is not None]
    unusable = {path for path, _ in bad}
    return [file for path, file in files.items() if path not in unusable], bad


def prepared_file(path: Path, folder: Path, orientation: str, spacing: tuple[float, float, float]) -> Path:
    """Where `prepare_volumes` keeps a volume."""
    return folder / f"{path.name.split('.nii')[0]}-{_key(path, orientation, spacing)}.npy"


def _prepare(path: Path, file: Path, orientation: str, spacing: tuple) -> str | None:
    """Why a volume cannot be used, if so."""
    try:
        volume = _read_patiently(path, orientation, spacing)
    except BadVolume as error:
        return str(error)
    temporary = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            np.save(stream, volume)
            stream.flush()
            os.fsync(stream.fileno())  # a name without its content would be taken for prepared
        os.replace(temporary, file)  # a killed run leaves no half-written volume behind
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise OSError(
                error.errno, f"no room for prepared volumes in {file.parent}: free some or choose --prepared"
            ) from None
        raise
    return None


def _read_patiently(path: Path, orientation: str, spacing: tuple) -> np.ndarray:
    for pause in (*RETRIES, None):
        try:
            return read_volume(path, orientation, spacing)
        except OSError as error:
            if pause is None:
                why = error.strerror or str(error)
                raise OSError(error.errno, f"{path} cannot be read ({why}); it is not left out: try again") from None
            time.sleep(pause)


def _key(path: Path, orientation: str, spacing: tuple) -> str:
    """Changes when the file or the preparation does."""
    stat = path.stat()
    facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, orientation, [float(s) for s in spacing], 1]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
