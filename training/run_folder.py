"""The folder of a run: what is where in it, and the care that two runs never share one."""

import itertools
import os
import socket
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from data.files import has_no_locks
from models.warm_start import RUN_WEIGHTS

from .metrics import read_metrics
from .recipe import Recipe, differences


class RunFolder:
    """Names of what a run leaves behind; nothing is made before it is written."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.held_out = path / "held_out.jsonl"  # losses of samples that are not trained on
        self.checkpoints = path / "checkpoints"
        self.encoder = path / "encoder"  # what `from_pretrained` reads
        self.model = path / "model"  # what `from_pretrained` reads of a fine-tuning
        self.scores = path / "scores.json"  # of the same, on whole volumes
        self.weights = path / RUN_WEIGHTS  # student, teacher and heads
        self.report = path / "report"
        self.evaluation = path / "evaluation"  # volumes of --evaluate-on, and what is being judged
        self.logs = path / "logs"  # of TensorBoard
        self.prepared = path / "prepared"  # volumes, unless they are kept elsewhere

    def lock(self, seconds: float = 20) -> FileLock:
        """Keep other runs out for as long as the returned lock lives; a killed process leaves none behind.

        Args:
            seconds: to wait for a run that is just ending; loaders outlive a kill by a few.

        Raises:
            ValueError: if another run has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(self.path / ".lock", fallback_to_soft=False), self.path / ".running"
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            by = holder.read_text() if holder.exists() else "another process"
            raise ValueError(
                f"--output {self.path} is in use by {by}: stop that run (kill -USR1 saves a checkpoint first), or "
                "choose another folder"
            ) from None
        except (NotImplementedError, OSError) as error:
            if not has_no_locks(error):
                raise
            warnings.warn(
                f"{self.path} is on a file system without locks: nothing keeps a second run out", stacklevel=2
            )
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        return lock


def choose_folder(asked: Path | None, recipe: Recipe, resume: bool) -> RunFolder:
    """The folder asked for, or the first free (to resume: the last taken) of runs/NAME, runs/NAME-2, ...

    Raises:
        ValueError: if the folder holds another run, or this one and it is not to be resumed.
    """
    if asked is not None:
        return _check(RunFolder(asked), recipe, resume)
    names = (f"{recipe.name}-{n}" if n > 1 else recipe.name for n in itertools.count(1))
    taken = list(itertools.takewhile(Path.exists, (Path("runs") / name for name in names)))
    if resume and taken:
        return _check(RunFolder(taken[-1]), recipe, resume)
    return RunFolder(Path("runs") / (f"{recipe.name}-{len(taken) + 1}" if taken else recipe.name))


def _check(folder: RunFolder, recipe: Recipe, resume: bool) -> RunFolder:
    output = folder.path
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: name a folder")
    if not folder.recipe.exists():
        if folder.checkpoints.exists() or folder.metrics.exists():
            raise ValueError(f"--output {output} holds a run without recipe.yaml: choose another folder")
        return folder
    if not folder.checkpoints.exists() and not read_metrics(folder.metrics):
        return folder  # a start that came to nothing
    if other := differences(recipe, folder.recipe):
        shown = "; ".join(other[:3]) + (f"; and {len(other) - 3} more" if len(other) > 3 else "")
        raise ValueError(f"--output {output} belongs to another recipe ({shown}): choose another folder")
    if not resume:
        raise ValueError(f"--output {output} holds a run of this recipe: add --resume auto to go on, or choose another")
    return folder
