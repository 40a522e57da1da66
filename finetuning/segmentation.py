"""What fine-tuning to segment leaves behind: a model that anyone can load, its scores, its pictures."""

import warnings
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from data.labels import Classes
from data.store import PreparedVolumes
from evaluation.cases import Scored, write_scores
from evaluation.inference import class_probabilities
from evaluation.scores import segmentation_scores
from models import load_segmentation
from models.segmentation import model_to_save
from pictures.segmentation import Segmented, draw_segmentation
from training.export import FOR_SEGMENTATION, gather_weights
from training.pictures import planes_of
from training.run import Run

from .fine_tuned import from_all_ranks, keep_scores, volumes_to_score, whole, write_fine_tuned
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
    known = {"classes": dict(zip(classes.names, classes.values))}
    shown = [
        Segmented(f"crop {number + 1}", *(part.cpu() for part in parts))
        for number, parts in enumerate(zip(batch["views"][:SHOWN, 0], batch["labels"], outputs["logits"].argmax(dim=1)))
    ]
    picture, planes = run.folder.report / "held_out.png", planes_of(run.recipe.data.orientation)
    draw = partial(draw_segmentation, shown, classes.names[1:], picture, planes)
    write_fine_tuned(run, model, FOR_SEGMENTATION, step, known, segmentation_card, draw)


def evaluate(run: Run, classes: Classes, crop_size: Sequence[int], overlap: float, mirror: bool, tolerance: float):
    """Score the model in `model/` on whole volumes, into `scores.json`, with a picture; all ranks share the cases.

    Volumes are scored as they are prepared.
    """
    dist.barrier(run.group)  # the main rank has written the model
    model = load_segmentation(run.folder.model).to(run.device).eval()
    found, shown = [], []
    for split, volumes, number in volumes_to_score(run):
        volume, labels, spacing, padding = read_case(volumes, number, run.recipe.views.coarsest_last)
        true = classes.lookup()[labels.long()]
        where = volume.to(run.device), padding, crop_size, overlap, mirror
        predicted = class_probabilities(model, *where).argmax(dim=0).cpu()
        scores = segmentation_scores(predicted, true, len(classes.names), spacing, tolerance)
        found.append(Scored(volumes.name(number), split, {key: value.tolist() for key, value in scores.items()}))
        if len(shown) < SHOWN:
            shown.append(Segmented(f"{split} {volumes.name(number)}", volume[0], true, predicted))
    everyone = from_all_ranks(run, found)
    if not run.is_main:
        return
    scored = sorted(everyone, key=lambda one: (one.group, one.case))
    content = write_scores(scored, classes.names[1:], tolerance, run.folder.scores)
    keep_scores(run, model, {**content, "cases": len(scored)}, segmentation_card)
    draw_segmentation(shown, classes.names[1:], run.folder.report / "cases.png", planes_of(run.recipe.data.orientation))


def read_case(
    volumes: PreparedVolumes, number: int, coarsest_last: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...], list[float]]:
    """A whole volume `[C, X, Y, Z]`, its labels `[X, Y, Z]`, mm of a voxel, and what is around each channel."""

    def read(opened):
        (volume,) = opened
        voxels, order = whole(volume, coarsest_last)
        labels = np.asarray(volume.labels[:, :, :]).transpose(order)
        spacing = tuple(volume.spacing[axis] for axis in order)
        return voxels, torch.from_numpy(labels.astype(np.int32)), spacing, volume.padding

    *rest, padding = volumes.read([number], read)
    return *rest, np.atleast_1d(padding).tolist()
