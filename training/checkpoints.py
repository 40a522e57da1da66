"""Checkpoints that are complete or do not count.

A checkpoint is written to `tmp-step_N`, closed with `meta.json`, and renamed to `step_N`; then old ones are removed.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

from accelerate import Accelerator

KEEP = 2
MARKER = "meta.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, meta: dict) -> Path:
    """Write `folder/step_N` with the state of model (teacher included), optimiser and random generators.

    Raises:
        OSError: if it cannot be written; earlier checkpoints are untouched.
    """
    final, temporary = folder / f"step_{step}", folder / f"tmp-step_{step}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 1e9
        raise OSError(
            f"checkpoint {final} could not be written ({str(error).splitlines()[0][:120]}; {free:.1f} GB free on the "
            "disk); earlier checkpoints are untouched, go on from them with --resume auto"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / MARKER).write_text(json.dumps({"step": step, **meta}, indent=1))
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        shutil.rmtree(final, ignore_errors=True)  # only a folder without marker can stand here
        os.rename(temporary, final)
        _flush(folder)
        for old in complete_checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    steps = [p for p in folder.glob("step_*") if (p / MARKER).is_file() and p.name[5:].isdigit()]
    return sorted(steps, key=lambda p: int(p.name[5:]))


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest complete checkpoint and its `meta.json`; warns of incomplete ones."""
    complete = complete_checkpoints(folder)
    for other in sorted(set(folder.glob("*step_*")) - set(complete)):
        warnings.warn(f"{other} is incomplete and is ignored (the run stopped while writing it)", stacklevel=2)
    return (complete[-1], json.loads((complete[-1] / MARKER).read_text())) if complete else None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
