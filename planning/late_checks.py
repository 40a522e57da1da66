"""What would fail hours into a run, tried before it starts: each check is one line, with the remedy if it fails."""

import math
import os
import shutil
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from data.manifest import MEDIAN, read_manifest
from data.median_spacing import median_spacing
from data.prepare_volume import bytes_at_most, read_header
from data.sources import is_streamed
from data.stream import PREFETCHED
from training.checkpoints import KEEP, complete_checkpoints
from training.launch import Launch
from training.preparation import is_prepared, list_data, preparation
from training.recipe import Recipe
from training.run_folder import RunFolder

from .plan import Parts, Weight, checkpoint_bytes

SHOWN = 3  # bad files that are named


def check_late_failures(launch: Launch, recipe: Recipe, weights: list[Weight], memory: Parts, crops: int) -> bool:
    """Print one line a check, "ok ..." or "FAILS ..."; whether all passed.

    Args:
        memory: what `plan.memory` returned.
        crops: of a rank's micro-batch.
    """
    try:
        paths, missing = _raw_volumes(launch, recipe), ""
    except (ValueError, OSError) as error:
        paths, missing = [], str(error)
    checks: list[Callable[[], str]] = [
        lambda: check_batch(recipe, launch.ranks),
        lambda: _fail(missing) if missing else check_data(paths, recipe) if paths else check_source(launch, recipe),
        lambda: check_writable(launch.folder.path, "--output"),
        lambda: check_writable(launch.prepared, "--prepared"),
        lambda: check_disk(launch, paths, recipe, checkpoint_bytes(weights, recipe)),
        lambda: check_shared_memory(recipe, crops, ranks_here(launch.ranks)),
        lambda: check_tracker(launch.wandb),
        lambda: check_device_memory(memory),
        lambda: check_host_memory(memory, ranks_here(launch.ranks)),
    ]
    passed = True
    for check in checks:
        try:
            print(f"ok          {check()}")
        except (ValueError, OSError) as error:
            print(f"FAILS       {error}")
            passed = False
    return passed


def _fail(message: str) -> str:
    raise ValueError(message)


def check_batch(recipe: Recipe, ranks: int) -> str:
    recipe.check_ranks(ranks)
    return f"the batch of {recipe.train.batch_size} divides over {ranks} rank{'s' if ranks > 1 else ''}"


def _raw_volumes(launch: Launch, recipe: Recipe) -> list[Path]:
    """Those that the run would have to prepare: none of a prepared folder, nor of a data set of the Hub."""
    if is_prepared(launch.data) or (launch.data is not None and is_streamed(str(launch.data))):
        return []
    listing = list_data(launch.data, recipe.data)
    return [listing.root / source.path for source in listing.sources]


def check_source(launch: Launch, recipe: Recipe) -> str:
    """Of a data set of the Hub, or a prepared folder."""
    if not is_prepared(launch.data):
        from data.hub import open_dataset  # imports pandas, and much else

        return f"{open_dataset(str(launch.data), recipe.data.include, recipe.data.exclude).found} in {launch.data}"
    manifest = read_manifest(launch.data)
    if other := manifest.preparation.differences(preparation(recipe.data)):
        raise ValueError(f"{launch.data} was prepared otherwise than the recipe says: {'; '.join(other)}")
    return f"{len(manifest.volumes)} prepared volumes, {len(manifest.rejected)} left out"


def check_data(paths: list[Path], recipe: Recipe) -> str:
    """Open the header of every file; voxels are first read when the run prepares them."""
    bad = [path for path in paths if read_header(path) is None]
    named = ", ".join(str(path) for path in bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
    if len(bad) > recipe.data.max_bad_share * len(paths):
        raise ValueError(
            f"{len(bad)} of {len(paths)} files are not readable 3D volumes, more than data.max_bad_share="
            f"{recipe.data.max_bad_share:g}: mend or remove them, or raise data.max_bad_share ({named})"
        )
    return f"{len(paths)} headers read, {len(bad)} bad{f', left out: {named}' if bad else ''}"


def check_writable(folder: Path, argument: str) -> str:
    """Write a small file where the folder is or will be, and remove it."""
    place = _existing(folder)
    trial = place / f".trial-{uuid.uuid4().hex}"
    try:
        with open(trial, "wb") as stream:
            stream.write(b"\0" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ValueError(
            f"{argument} {folder} cannot be written ({error.strerror}): choose another folder, or mend its permissions"
        ) from None
    finally:
        trial.unlink(missing_ok=True) if place.is_dir() else None
    return f"{folder} can be written"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists: the disk it will be on."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def check_room(folder: RunFolder, checkpoint: int, more: float = 0) -> str:
    """Raise ValueError unless the disk holds the checkpoints of `checkpoint` bytes that a run keeps, and `more`."""
    free = shutil.disk_usage(_existing(folder.path)).free
    needed = checkpoint * (KEEP + 1 - len(complete_checkpoints(folder.checkpoints))) + more
    if free < needed:
        raise ValueError(
            f"--output {folder.path}: {free / 1e9:.1f} GB free on its disk, {needed / 1e9:.1f} GB needed: the run "
            f"keeps {KEEP} checkpoints of {checkpoint / 1e9:.1f} GB and writes the next before it removes one"
            f"{f', and prepares {more / 1e9:.1f} GB of volumes' if more else ''}; free some or choose another folder"
        )
    return f"{free / 1e9:.1f} GB free for {needed / 1e9:.1f} GB of checkpoints{' and volumes' if more else ''}"


def check_disk(launch: Launch, paths: list[Path], recipe: Recipe, checkpoint: int) -> str:
    folder, prepared = launch.folder, launch.prepared
    volumes = 0 if is_prepared(prepared) else _bytes_to_prepare(paths, recipe)
    if _existing(folder.path).stat().st_dev == _existing(prepared).stat().st_dev:
        return check_room(folder, checkpoint, volumes)
    free = shutil.disk_usage(_existing(prepared)).free
    if free < volumes:
        raise ValueError(
            f"--prepared {prepared}: {free / 1e9:.1f} GB free on its disk, {volumes / 1e9:.1f} GB needed for prepared "
            "volumes: free some or choose another folder"
        )
    return check_room(folder, checkpoint)


def _bytes_to_prepare(paths: list[Path], recipe: Recipe) -> float:
    how = preparation(recipe.data)
    spacing = median_spacing(paths, how.orientation) if paths and how.spacing == MEDIAN else how.spacing
    return sum(bytes_at_most(path, spacing, how.precision) for path in paths)


def check_shared_memory(recipe: Recipe, crops: int, ranks: int, place: Path = Path("/dev/shm")) -> str:
    """Raise ValueError if there is no room for what the loaders keep ready.

    Args:
        crops: of a rank's micro-batch.
        ranks: on this machine.
    """
    if not recipe.run.workers or not place.is_dir():
        return "the loader needs no shared memory"
    channels = recipe.data.num_channels
    needed = ranks * recipe.run.workers * PREFETCHED * crops * channels * 4 * math.prod(recipe.views.crop_size)
    room = shutil.disk_usage(place).total  # of others' files the run may outlive
    if room < needed:
        raise ValueError(
            f"{place} has {room / 1e6:,.0f} MB, the loaders of {ranks} rank{'s' if ranks > 1 else ''} need at least "
            f"{needed / 1e6:,.0f} MB: give it more (docker run --shm-size, or --ipc=host), or lower run.workers"
        )
    return f"{room / 1e6:,.0f} MB of shared memory for {needed / 1e6:,.0f} MB of crops that wait"


def check_tracker(wandb: bool) -> str:
    """Nothing is sent: the key is only looked for where wandb itself would look."""
    if not wandb:
        if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
            raise ValueError("TensorBoard is not installed: pip install tensorboard")
        return "TensorBoard is installed"
    if find_spec("wandb") is None:
        raise ValueError("--wandb: Weights & Biases is not installed: pip install wandb, or leave --wandb out")
    import wandb as library

    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"Weights & Biases is {os.environ['WANDB_MODE']}"
    if not library.api.api_key:
        raise ValueError("--wandb: no API key is found: run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
    return "Weights & Biases is installed and has an API key"


def check_device_memory(memory: Parts) -> str:
    if not torch.cuda.is_available():
        return f"{memory['total'] / 1e9:.2f} GB a rank; there is no GPU here to hold it against"
    there = torch.cuda.get_device_properties(0).total_memory
    if memory["total"] > there:
        raise ValueError(
            f"{memory['total'] / 1e9:.1f} GB a rank, the GPU has {there / 1e9:.1f}: set run.gradient_checkpointing="
            "true, raise train.accumulate, or take more ranks"
        )
    return f"{memory['total'] / 1e9:.1f} of the GPU's {there / 1e9:.1f} GB"


def ranks_here(ranks: int) -> int:
    """Of so many ranks, those that share a machine like this one."""
    return min(ranks, torch.cuda.device_count() or ranks)


def check_host_memory(memory: Parts, here: int) -> str:
    if not memory["host"]:
        return "nothing is offloaded to the host"
    needed, free = here * memory["host"], psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{needed / 1e9:.1f} GB of the host are needed to offload {here} ranks, {free / 1e9:.1f} GB are free: "
            "offload less in --config, or take more nodes"
        )
    return f"{needed / 1e9:.1f} GB offloaded, {free / 1e9:.1f} GB of the host are free"
