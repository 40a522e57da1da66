"""What a run trains on: volumes of a manifest, prepared first where they are not, or a data set that is streamed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from data.manifest import FOR_RUNS, LABELS
from data.rows import subject_of
from data.split import is_left_out
from data.store import PreparedVolumes
from data.targets import fingerprint, read_targets

from .launch import Launch
from .preparation import open_manifest, prepare_data
from .recipe import Recipe
from .runtime import from_main_rank
from .streamed_data import StreamedData, lanes_of
from .summary import say_what_is_trained_on


class RunData(NamedTuple):
    volumes: Sequence  # for the script's stream; [None] where streamed, since lanes choose among theirs
    validation: PreparedVolumes | None
    left_out: PreparedVolumes | None
    streamed: StreamedData | None
    spacing: tuple[float, ...] | list[float] | str  # mm of a voxel, or "native"
    targets: dict[str, str] | None  # what the table of the launch says of subjects
    facts: dict  # for RunFacts


def open_data(
    launch: Launch, recipe: Recipe, group: torch.distributed.ProcessGroup, say: Callable[[str], None]
) -> RunData:
    """Prepare what is not, and keep some for validation; all ranks take part.

    Raises:
        ValueError, OSError: if there is nothing to train on.
    """
    if launch.streams:
        return _open_stream(launch, recipe, group, say)
    prepare = partial(prepare_data, launch.data, launch.prepared, recipe, launch.resume, launch.labels)
    manifest = open_manifest(from_main_rank(group, prepare), (*FOR_RUNS, *LABELS) if recipe.uses_labels else FOR_RUNS)
    targets = None
    if launch.targets:
        read = partial(read_targets, launch.targets, recipe.data.target, manifest.subjects[0])
        targets = from_main_rank(group, read)
    split = recipe.split(manifest, targets)
    volumes = PreparedVolumes(manifest, split.training, recipe.data.draw)
    kept = [PreparedVolumes(manifest, rows) if len(rows) else None for rows in (split.validation, split.left_out)]
    say_what_is_trained_on(split, volumes, say)
    data = manifest.fingerprint(recipe.uses_labels)
    if recipe.uses_frames:
        say(f"frames      {volumes.frames.words()}")
        data = f"{data} {volumes.frames.fingerprint()}"
    if targets:
        data = f"{data} {fingerprint(targets)}"
    facts = {"data": data, "volumes": len(volumes), "validation_subjects": split.subjects[1]}
    return RunData(volumes, *kept, None, volumes.spacing, targets, facts)


def _open_stream(
    launch: Launch, recipe: Recipe, group: torch.distributed.ProcessGroup, say: Callable[[str], None]
) -> RunData:
    from data.hub import open_dataset  # imports pandas, and much else

    chosen = recipe.data.include, recipe.data.exclude
    dataset = from_main_rank(group, lambda: open_dataset(str(launch.data), *chosen, fewest=lanes_of(recipe)))
    if dataset.volumes_a_row > 1:
        raise ValueError(f"--stream: {launch.data} has several volumes a row: run prepare_data.py on it first")
    subjects = {subject_of(source) for source in dataset.sources()}
    for pattern in recipe.data.leave_out:
        if subjects and not any(is_left_out(subject, [pattern]) for subject in subjects):
            raise ValueError(f"data.leave_out {pattern!r} fits none of the {len(subjects)} subjects of {launch.data}")
    streamed = StreamedData(dataset, recipe, torch.distributed.get_rank(), torch.distributed.get_world_size())
    say(f"stream      {streamed.words()}")
    say("            none are kept for validation: held out are other crops of the first volumes")
    facts = {"data": streamed.fingerprint(), "volumes": None, "validation_subjects": 0}
    return RunData([None], None, None, streamed, recipe.data.spacing, None, facts)
