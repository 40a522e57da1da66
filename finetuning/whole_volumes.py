"""Fine-tuning to classify or regress whole volumes: its targets, and what it leaves behind."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data.store import PreparedVolumes
from data.stored_volume import Volume
from data.targets import as_numbers
from evaluation.answers import Answered, by_group, mean_by_case, write_answers
from evaluation.inference import answer_of_volume
from models import load_fine_tuned
from models.classification import model_to_save
from pictures.answers import draw_answers
from training.export import FOR_WHOLE_VOLUMES, gather_weights
from training.run import Run

from .fine_tuned import from_all_ranks, keep_scores, volumes_to_score, whole, write_fine_tuned
from .whole_volume_card import whole_volume_card

TOO_LITTLE = 0.01  # of the true spread, in answers: a network that has collapsed


class Targets(NamedTuple):
    """What is known of subjects, by their numbers in `Manifest.subjects`."""

    labels: torch.Tensor  # [subjects] float32: numbers of classes, or standardised targets; NaN of others
    weights: torch.Tensor  # [subjects] float32, of their crops in the loss
    constant: torch.Tensor  # [K] float32, logits of who has learned nothing: shares of classes, or the mean
    mean: float = 0.0  # of the targets that are trained on, of a regression
    std: float = 1.0

    def to(self, device: torch.device) -> "Targets":
        labels, weights, constant, *rest = self
        return Targets(labels.to(device), weights.to(device), constant.to(device), *rest)


def class_targets(
    found: Mapping[str, str], classes: Sequence[str], volumes: PreparedVolumes, balanced: bool
) -> Targets:
    """Of a classification.

    Args:
        found: the class of each subject, by name.
        volumes: that are trained on.
        balanced: weigh classes so that all count alike, however often they are drawn; the mean weight is 1.

    Raises:
        ValueError: if a subject's class is none of the classes, or one has no volume to train on.
    """
    labels = _by_subject(numbers_of(found, classes), volumes)
    of_volumes = labels[torch.from_numpy(volumes.subjects).long()].long()
    chances = (
        np.full(len(volumes), 1 / len(volumes)) if volumes.chances is None else np.diff(volumes.chances, prepend=0)
    )
    share = torch.zeros(len(classes)).index_add_(0, of_volumes, torch.from_numpy(chances).float())
    if absent := [name for name, part in zip(classes, share.tolist()) if not part]:
        raise ValueError(
            f"no subject that is trained on is of class {absent[0]}: name data.classes without it, raise data.budget, "
            "change data.budget_seed, or leave out others"
        )
    weights = 1 / (len(classes) * share) if balanced else torch.ones(len(classes))
    return Targets(labels.float(), weights[labels.nan_to_num().long()], (weights * share).log())


def number_targets(found: Mapping[str, str], volumes: PreparedVolumes) -> Targets:
    """Of a regression, standardised by mean and standard deviation over the subjects that are trained on.

    Raises:
        ValueError: if one is no number, or all have the same.
    """
    labels = _by_subject(numbers_of(found, ()), volumes)
    trained = labels[torch.from_numpy(np.unique(volumes.subjects)).long()]
    mean, std = float(trained.mean()), float(trained.std(correction=0))
    if not std > 1e-12 * abs(mean):
        raise ValueError(f"all {len(trained)} subjects that are trained on have {mean:g}: there is nothing to learn")
    return Targets(((labels - mean) / std).float(), torch.ones(len(labels)), torch.zeros(1), mean, std)


def numbers_of(found: Mapping[str, str], classes: Sequence[str]) -> dict[str, float]:
    """The class of each subject by its number, or where there are no classes its number.

    Raises:
        ValueError: if it has none.
    """
    if not classes:
        return as_numbers(found)
    if unknown := [subject for subject, name in found.items() if name not in classes]:
        raise ValueError(
            f"{unknown[0]} has {found[unknown[0]]!r}, which is none of data.classes ({', '.join(map(repr, classes))}): "
            "mend the table, or name all classes, in quotation marks"
        )
    return {subject: classes.index(name) for subject, name in found.items()}


def _by_subject(numbers: Mapping[str, float], volumes: PreparedVolumes) -> torch.Tensor:
    names, _ = volumes.manifest.subjects
    return torch.tensor([numbers.get(name, float("nan")) for name in names], dtype=torch.float64)


def warn_of_collapse(step: int, means: dict[str, float]) -> None:
    """Say so if a network answers the same whatever it sees, as fine-tuned transformers are known to end."""
    if means.get("spread", 1.0) < TOO_LITTLE * means.get("true_spread", 0.0):
        warnings.warn(
            f"step {step}: all crops held out get the same answer: answers differ by {means['spread']:.2g}, what is "
            f"true by {means['true_spread']:.2g}. If it stays so, the network has collapsed: lower "
            "optimizer.learning_rate or train.clip_norm, or raise train.warmup_steps",
            stacklevel=2,
        )


def export_model(run: Run, step: int) -> None:
    """Write `model/` where it is due; all ranks take part in gathering weights."""
    if not run.export_is_due or (weights := gather_weights(run)) is None:
        return
    model = model_to_save(run.model.student.features.encoder.config, weights)
    write_fine_tuned(run, model, FOR_WHOLE_VOLUMES, step, {}, whole_volume_card, lambda: None)


def evaluate(run: Run, crop_size: Sequence[int], overlap: float, mirror: bool) -> None:
    """Score the model in `model/` on whole volumes, into `scores.json`, with a picture; all ranks share the volumes.

    A subject's answer is the mean over its volumes.
    """
    dist.barrier(run.group)  # the main rank has written the model
    model = load_fine_tuned(run.folder.model).to(run.device).eval()
    names, true = run.volumes.manifest.subjects[0], numbers_of(run.data.targets, run.recipe.data.classes)
    found = []
    for split, volumes, number in volumes_to_score(run):
        volume, padding = read_volume(volumes, number, run.recipe.views.coarsest_last)
        answer = answer_of_volume(model, volume.to(run.device), padding, crop_size, overlap, mirror).tolist()
        subject = names[volumes.subjects[number]]
        found.append(Answered(subject, split, true[subject], answer))
    everyone = from_all_ranks(run, found)
    if not run.is_main:
        return
    answered = mean_by_case(everyone)
    labels = [name for _, name in sorted(model.config.id2label.items())]
    content = write_answers(answered, labels, run.folder.scores, getattr(model.config, "target_mean", None))
    keep_scores(run, model, {**content, "cases": len(answered)}, whole_volume_card)
    draw_answers(by_group(answered), labels, run.folder.report / "answers.png")


def read_volume(volumes: PreparedVolumes, number: int, coarsest_last: bool) -> tuple[torch.Tensor, list[float]]:
    """A whole volume `[C, X, Y, Z]`, and what is around each channel."""

    def read(opened: list[Volume]) -> tuple[torch.Tensor, list[float]]:
        (volume,) = opened
        return whole(volume, coarsest_last)[0], np.atleast_1d(volume.padding).tolist()

    return volumes.read([number], read)
