"""Self-distillation over prototypes (Caron et al. 2021, DINO, eq. 2 and 4), as Alice uses it (arXiv 2302.05615)."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from .reconstruction import masked_huber

TERMS = ("reconstruction", "volume", "patch")
Gather = Callable[[torch.Tensor], torch.Tensor]


def alice_objective(temperature: float) -> Callable[[dict[str, torch.Tensor], Gather], dict]:
    """The objective with this temperature of the student; the teacher's comes with the outputs."""
    return partial(compute_terms, temperature=temperature)


def compute_terms(outputs: dict[str, torch.Tensor], gather: Gather, temperature: float) -> dict[str, torch.Tensor]:
    """The terms that the outputs allow, and what tells of collapse and success.

    `volume` asks one patient's crop for the prototypes of the other's; `patch` asks what a query reads in the masked
    crop for the prototypes of what it reads in the whole one. Nothing couples volumes but the centres, which the
    outputs bring along.

    Args:
        outputs: see `Alice.outputs`; rows are view-major, so half a roll is the other patient.
        gather: not needed.

    Returns:
        `reconstruction`, `volume` and `patch`. With a head, `prototype_use` (patch) and `volume_prototype_use`, and
        `teacher_entropy` and `volume_teacher_entropy`, see `watch_prototypes`; with `patch`, `feature_variance`, the
        total variance of the student's unit-length dense features (1 = spread over the sphere, 0 = all are one), and
        `attention_error` in mm; with `volume`, `patient_retrieval`. These monitors are of this rank's crops.
    """
    losses = {}
    if "reconstructed" in outputs:
        losses["reconstruction"] = masked_huber(
            outputs["reconstructed"], outputs["target"], outputs["voxel_mask"], outputs["present"]
        )
    if "student_volume" in outputs:
        target = prototype_target(outputs["teacher_volume"], outputs["volume_centre"], outputs["teacher_temperature"])
        losses["volume"] = distil(outputs["student_volume"], target.roll(len(target) // 2, dims=0), temperature)
        losses |= watch_prototypes(target, "volume_")
        losses["patient_retrieval"] = patient_retrieval(outputs["student_pooled"], outputs["teacher_pooled"])
    if "student_patch" in outputs:
        target = prototype_target(outputs["teacher_patch"], outputs["patch_centre"], outputs["teacher_temperature"])
        losses["patch"] = distil(outputs["student_patch"], target, temperature)
        losses |= watch_prototypes(target)
        losses["feature_variance"] = feature_variance(outputs["student_cells"].detach())
        losses["attention_error"] = attention_error(**attention_of(outputs))
    return losses


def prototype_target(logits: torch.Tensor, centre: torch.Tensor, temperature: float) -> torch.Tensor:
    """The teacher's distribution over prototypes, from its logits `[..., K]` and their running mean `[K]`."""
    return ((logits - centre) / temperature).softmax(-1)


def distil(student: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross entropy of the student's distribution, of logits `[..., K]`, under the target `[..., K]`: the mean."""
    return -(target * (student / temperature).log_softmax(-1)).sum(-1).mean()


@torch.no_grad()
def watch_prototypes(target: torch.Tensor, prefix: str = "") -> dict[str, torch.Tensor]:
    """`prototype_use` and `teacher_entropy` of distributions `[..., K]`, as shares of log K.

    The entropy of their mean: 0 where all crops get one prototype, and no more than that of as many prototypes as there
    are rows. The mean of their entropies: 1 where the teacher says nothing.
    """
    rows, most = target.flatten(0, -2), math.log(target.shape[-1])
    return {
        f"{prefix}prototype_use": torch.special.entr(rows.mean(0)).sum() / most,
        f"{prefix}teacher_entropy": torch.special.entr(rows).sum(-1).mean() / most,
    }


def feature_variance(cells: torch.Tensor) -> torch.Tensor:
    """The total variance of unit-length cells `[N, D, x, y, z]`."""
    return F.normalize(cells.float(), dim=1).transpose(0, 1).flatten(1).var(dim=1, correction=0).sum()


@torch.no_grad()
def patient_retrieval(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Share of first crops `[2B, D]` whose nearest second crop of the batch, by cosine, is their partner."""
    first, second = F.normalize(student.chunk(2)[0], dim=1), F.normalize(teacher.chunk(2)[1], dim=1)
    hits = (first @ second.T).argmax(1) == torch.arange(len(first), device=first.device)
    return hits.float().mean()


def attention_of(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: outputs[key] for key in ("teacher_attention", "cell_places", "query_places", "extent")}


@torch.no_grad()
def attention_error(
    teacher_attention: torch.Tensor, cell_places: torch.Tensor, query_places: torch.Tensor, extent: torch.Tensor
) -> torch.Tensor:
    """mm between where a query looks, the centre of mass of its attention, and where it comes from: the mean.

    Args:
        teacher_attention: `[N, Q, x, y, z]`, which sums to 1 over the cells.
        cell_places, query_places: `[3, x, y, z]` and `[N, Q, 3]`, 0 to 1 along each axis of a crop.
        extent: of each crop in mm, `[N, 3]`.
    """
    looked_at = teacher_attention.flatten(2) @ cell_places.flatten(1).T
    return ((looked_at - query_places) * extent[:, None]).norm(dim=-1).mean()


@torch.no_grad()
def chance(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the monitors score by chance: a partner drawn blindly, and attention to all cells alike."""
    scores = {}
    if "student_volume" in outputs:
        scores["patient_retrieval_by_chance"] = torch.tensor(2.0 / len(outputs["student_volume"]))
    if "teacher_attention" in outputs:
        given = attention_of(outputs)
        attention = given["teacher_attention"]
        given["teacher_attention"] = torch.full_like(attention, 1 / attention[0, 0].numel())
        scores["attention_error_by_chance"] = attention_error(**given)
    return scores
