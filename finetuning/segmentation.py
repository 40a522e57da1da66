"""What fine-tuning to segment leaves behind: a model that anyone can load, its scores, its pictures."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import ModelCard

from data.files import write_whole
from data.labels import Classes
from data.store import PreparedVolumes
from data.volume import axis_order
from evaluation.cases import Scored, write_scores
from evaluation.inference import class_probabilities
from evaluation.scores import segmentation_scores
from models import load_segmentation
from models.segmentation import model_to_save
from pictures.segmentation import Segmented, draw_segmentation
from training.export import FOR_SEGMENTATION, OF_FINE_TUNING, gather_weights, replace_folder, write_model
from training.metrics import read_held_out, read_metrics
from training.pictures import draw_losses, planes_of
from training.run import Run

from .segmentation_card import segmentation_card

SHOWN = 4  # cases in the picture
TOO_LITTLE = 0.01  # of the true foreground, predicted: a network that has collapsed


def warn_of_collapse(step: int, means: dict[str, float]) -> None:
    """Say so if a network takes all for background, as fine-tuned transformers are known to end."""
    if means["predicted_foreground"] < TOO_LITTLE * means["foreground"]:
        warnings.warn(
            f"step {step}: {means['predicted_foreground']:.2%} of the voxels held out are taken for foreground, "
            f"{means['foreground']:.2%} are. If it stays so, the network has collapsed: lower optimizer.learning_rate "
            "or train.clip_norm, or raise train.warmup_steps",
            stacklevel=2,
        )


def export_segmentation(
    run: Run, step: int, batch: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], classes: Classes
) -> None:
    """Write `model/` and the pictures where they are due; all ranks take part in gathering weights."""
    if not run.export_is_due or (weights := gather_weights(run)) is None:
        return
    model = model_to_save(run.model.student.features.encoder.config, weights)
    known = asdict(run.facts) | {"step": step, "classes": dict(zip(classes.names, classes.values))}
    known.pop("init_from")  # a path of this machine
    shown = [
        Segmented(f"crop {number + 1}", *(part.cpu() for part in parts))
        for number, parts in enumerate(zip(batch["views"][:SHOWN, 0], batch["labels"], outputs["logits"].argmax(dim=1)))
    ]
    folder, terms, planes = run.folder, run.facts.method.terms, planes_of(run.recipe.data.orientation)

    def write() -> None:
        card = segmentation_card(model, known, str(folder.model))
        fill = partial(write_model, model, FOR_SEGMENTATION, OF_FINE_TUNING, known, card)
        replace_folder(folder.model, fill)
        try:
            records = [record for record in read_metrics(folder.metrics) if "loss" in record]
            draw_losses(records, terms, folder.report / "losses.png", read_held_out(folder.held_out))
            draw_segmentation(shown, classes.names[1:], folder.report / "held_out.png", planes)
        except Exception as error:  # no picture is worth a run
            warnings.warn(f"report/ could not be drawn: {type(error).__name__}: {error}", stacklevel=2)

    run.background.start(write)


def evaluate(run: Run, classes: Classes, crop_size: Sequence[int], overlap: float, mirror: bool, tolerance: float):
    """Score the model in `model/` on whole volumes, into `scores.json`, with a picture; all ranks share the cases.

    Those are the subjects that were left out (test) and kept for validation; where there are none, those trained on.
    Volumes are scored as they are prepared.
    """
    sets = {"test": run.data.left_out, "validation": run.data.validation}
    if not any(sets.values()):
        run.print("scores      of the volumes trained on: leave some out (data.leave_out) to know what it is worth")
        sets = {"training": run.volumes}
    dist.barrier(run.group)  # the main rank has written the model
    model = load_segmentation(run.folder.model).to(run.device).eval()
    cases = [(split, volumes, number) for split, volumes in sets.items() if volumes for number in range(len(volumes))]
    found, shown = [], []
    for split, volumes, number in cases[run.rank :: run.ranks]:
        volume, labels, spacing, padding = read_case(volumes, number, run.recipe.views.coarsest_last)
        true = classes.lookup()[labels.long()]
        where = volume.to(run.device), padding, crop_size, overlap, mirror
        predicted = class_probabilities(model, *where).argmax(dim=0).cpu()
        scores = segmentation_scores(predicted, true, len(classes.names), spacing, tolerance)
        found.append(Scored(volumes.name(number), split, {key: value.tolist() for key, value in scores.items()}))
        if len(shown) < SHOWN:
            shown.append(Segmented(f"{split} {volumes.name(number)}", volume[0], true, predicted))
    everyone = [found] * run.ranks
    dist.all_gather_object(everyone, found, group=run.group)
    if not run.is_main:
        return
    scored = sorted((Scored(*one) for rank in everyone for one in rank), key=lambda one: (one.group, one.case))
    content = write_scores(scored, classes.names[1:], tolerance, run.folder.scores)
    facts = json.loads((run.folder.model / OF_FINE_TUNING).read_text()) | {"scores": {**content, "cases": len(scored)}}
    write_whole(run.folder.model / OF_FINE_TUNING, lambda file: file.write_text(json.dumps(facts, indent=1)))
    ModelCard(segmentation_card(model, facts, str(run.folder.model))).save(run.folder.model / "README.md")
    draw_segmentation(shown, classes.names[1:], run.folder.report / "cases.png", planes_of(run.recipe.data.orientation))


def read_case(
    volumes: PreparedVolumes, number: int, coarsest_last: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...], list[float]]:
    """A whole volume `[C, X, Y, Z]`, its labels `[X, Y, Z]`, mm of a voxel, and what is around each channel."""

    def read(opened):
        (volume,) = opened
        order = axis_order(volume.spacing, coarsest_last)
        voxels = np.asarray(volume[:, :, :], np.float32).reshape(-1, *volume.shape)
        labels = np.asarray(volume.labels[:, :, :]).transpose(order)
        placed = np.ascontiguousarray(voxels.transpose(0, *(1 + axis for axis in order)))
        spacing = tuple(volume.spacing[axis] for axis in order)
        return torch.from_numpy(placed), torch.from_numpy(labels.astype(np.int32)), spacing, volume.padding

    *rest, padding = volumes.read([number], read)
    return *rest, np.atleast_1d(padding).tolist()
