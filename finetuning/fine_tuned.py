"""What all fine-tuning leaves behind: a model that anyone can load, scores of whole volumes, both on its card."""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from data.files import write_whole
from data.store import PreparedVolumes
from data.stored_volume import Volume
from data.volume import axis_order
from training.export import OF_FINE_TUNING, replace_folder, write_model
from training.metrics import read_held_out, read_metrics
from training.pictures import draw_losses
from training.run import Run

Card = Callable[[PreTrainedModel, dict, str], str]  # model, what is known of it, where it is -> text


def write_fine_tuned(
    run: Run, model: PreTrainedModel, auto: str, step: int, known: dict, card: Card, draw: Callable[[], None]
) -> None:
    """Write `model/` and the pictures in a thread, on the main rank, while training goes on.

    Args:
        known: what the run's own facts do not say.
        draw: further pictures; nothing there may draw random numbers.
    """
    facts = asdict(run.facts) | {"step": step, **known}
    facts.pop("init_from")  # a path of this machine
    folder, terms = run.folder, run.facts.method.terms

    def write() -> None:
        text = card(model, facts, str(folder.model))
        replace_folder(folder.model, partial(write_model, model, auto, OF_FINE_TUNING, facts, text))
        try:
            records = [record for record in read_metrics(folder.metrics) if "loss" in record]
            draw_losses(records, terms, folder.report / "losses.png", read_held_out(folder.held_out))
            draw()
        except Exception as error:  # no picture is worth a run
            warnings.warn(f"report/ could not be drawn: {type(error).__name__}: {error}", stacklevel=2)

    run.background.start(write)


def volumes_to_score(run: Run) -> list[tuple[str, PreparedVolumes, int]]:
    """This rank's share of them: of which set, and which of its volumes.

    Those are the subjects that were left out (test) and kept for validation; where there are none, those trained on.
    """
    sets: dict[str, Any] = {"test": run.data.left_out, "validation": run.data.validation}
    if not any(sets.values()):
        run.print("scores      of the volumes trained on: leave some out (data.leave_out) to know what it is worth")
        sets = {"training": run.volumes}
    all_of_them = [(name, volumes, n) for name, volumes in sets.items() if volumes for n in range(len(volumes))]
    return all_of_them[run.rank :: run.ranks]


def whole(volume: Volume, coarsest_last: bool) -> tuple[torch.Tensor, tuple[int, ...]]:
    """All voxels `[C, X, Y, Z]` of a stored volume, float32, with its axes as crops have them; and their order."""
    order = axis_order(volume.spacing, coarsest_last)
    voxels = np.asarray(volume[:, :, :], np.float32).reshape(-1, *volume.shape)
    return torch.from_numpy(np.ascontiguousarray(voxels.transpose(0, *(1 + axis for axis in order)))), order


def from_all_ranks(run: Run, found: list) -> list:
    """What all ranks have found, on each of them."""
    everyone = [found] * run.ranks
    dist.all_gather_object(everyone, found, group=run.group)
    return [one for rank in everyone for one in rank]


def keep_scores(run: Run, model: PreTrainedModel, scores: dict, card: Card) -> None:
    """Add scores to what is known of the model in `model/`, and to its card."""
    path = run.folder.model / OF_FINE_TUNING
    facts = json.loads(path.read_text()) | {"scores": scores}
    write_whole(path, lambda file: file.write_text(json.dumps(facts, indent=1)))
    ModelCard(card(model, facts, str(run.folder.model))).save(run.folder.model / "README.md")
