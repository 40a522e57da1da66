"""The folder of a run, and the care that two runs never share one."""

import itertools
from pathlib import Path

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
