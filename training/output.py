"""The folder of a run, and the care that two runs never share one."""

import errno
import itertools
import os
import socket
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from .metrics import read_metrics
from .recipe import Recipe, differences


def choose_output(asked: Path | None, recipe: Recipe, resume: bool) -> Path:
    """The folder asked for, or the first free (to resume: the last taken) of runs/NAME, runs/NAME-2, ...

    Raises:
        ValueError: if the folder holds another run, or this one and it is not to be resumed.
    """
    if asked is not None:
        return _check(asked, recipe, resume)
    names = (f"{recipe.name}-{n}" if n > 1 else recipe.name for n in itertools.count(1))
    taken = list(itertools.takewhile(Path.exists, (Path("runs") / name for name in names)))
    if resume and taken:
        return _check(taken[-1], recipe, resume)
    return Path("runs") / (f"{recipe.name}-{len(taken) + 1}" if taken else recipe.name)


def _check(output: Path, recipe: Recipe, resume: bool) -> Path:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: name a folder")
    saved = output / "recipe.yaml"
    if not saved.exists():
        if (output / "checkpoints").exists() or (output / "metrics.jsonl").exists():
            raise ValueError(f"--output {output} holds a run without recipe.yaml: choose another folder")
        return output
    if not (output / "checkpoints").exists() and not read_metrics(output / "metrics.jsonl"):
        return output  # a start that came to nothing
    if other := differences(recipe, saved):
        shown = "; ".join(other[:3]) + (f"; and {len(other) - 3} more" if len(other) > 3 else "")
        raise ValueError(f"--output {output} belongs to another recipe ({shown}): choose another folder")
    if not resume:
        raise ValueError(f"--output {output} holds a run of this recipe: add --resume auto to go on, or choose another")
    return output


def lock_output(output: Path, seconds: float = 20) -> FileLock:
    """Keep other runs out of a folder for as long as the returned lock lives; a killed process leaves none behind.

    Args:
        seconds: to wait for a run that is just ending; loaders outlive a kill by a few.

    Raises:
        ValueError: if another run has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(output / ".lock", fallback_to_soft=False), output / ".running"
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        by = holder.read_text() if holder.exists() else "another process"
        raise ValueError(
            f"--output {output} is in use by {by}: stop that run (kill -USR1 saves a checkpoint first), or choose "
            "another folder"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"{output} is on a file system without locks: nothing keeps a second run out", stacklevel=2)
    holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock
