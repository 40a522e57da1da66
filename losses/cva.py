"""The CVA objective: reconstruction + dense consistency + image-level contrast (arXiv 2509.13846)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from .cells import sample_cells
from .consistency import CONSISTENCIES, AlignedCells, Gather
from .ntxent import nt_xent
from .reconstruction import masked_huber

TERMS = ("reconstruction", "consistency", "contrastive")


def cva_objective(consistency: str, temperature: float) -> Callable[[dict[str, torch.Tensor], Gather], dict]:
    """The objective with this consistency, a row of `CONSISTENCIES`.

    Args:
        temperature: of the image-level NT-Xent and of C-CVA.

    Raises:
        ValueError: if there is no such consistency.
    """
    if consistency not in CONSISTENCIES:
        raise ValueError(f"{consistency!r} is no consistency: there are {', '.join(CONSISTENCIES)}")
    return partial(compute_terms, agree=CONSISTENCIES[consistency].function, temperature=temperature)


def compute_terms(
    outputs: dict[str, torch.Tensor], gather: Gather, agree: Callable[..., torch.Tensor] | None, temperature: float
) -> dict[str, torch.Tensor]:
    """The terms that the outputs allow, each symmetrised over the two views, and what tells of collapse and success.

    Args:
        outputs: see `ConsistentViewAlignment.outputs`; rows are view-major, so half a roll is the other view.
        gather: `[...]` of this rank -> `[ranks, ...]`, with gradients.
        agree: the consistency, a function of losses/consistency.py.

    Returns:
        `reconstruction`, `consistency` and `contrastive`. With the consistency, `feature_std`, the spread of the
        student's unit-length dense features per channel, times sqrt(D) (about 1 when healthy); `feature_variance`,
        their total variance (1 = spread over the sphere), both 0 when all features are one; `retrieval`, the share of
        cells whose nearest teacher cell of the other view is the same place. With the contrast, `contrastive_accuracy`
        and `embedding_variance`, the same of the embeddings. These monitors are of this rank's crops.
    """
    losses = {}
    if "reconstructed" in outputs:
        losses["reconstruction"] = masked_huber(
            outputs["reconstructed"], outputs["target"], outputs["voxel_mask"], outputs["present"]
        )
    if "student_dense" in outputs:
        crop_size = outputs["target"].shape[2:]
        student = sample_cells(outputs["student_dense"], outputs["points"], crop_size)
        teacher = sample_cells(outputs["teacher_dense"], outputs["points"], crop_size).roll(len(student) // 2, dims=0)
        cells = AlignedCells(student, teacher, outputs["inside"], outputs["pair"])
        losses["consistency"] = agree(cells, gather, temperature)
        losses |= watch_cells(student.detach(), teacher, cells.inside)
    if "student_embedding" in outputs:
        student, teacher = outputs["student_embedding"], outputs.get("teacher_embedding")
        teacher = teacher.roll(len(teacher) // 2, dims=0) if teacher is not None else None
        loss, nearest = nt_xent(student, teacher, outputs["group"], temperature, gather)
        variance = F.normalize(student.detach(), dim=1).var(dim=0, correction=0).sum()
        losses |= {
            "contrastive": loss.mean(),
            "contrastive_accuracy": nearest.mean(),
            "embedding_variance": variance,
        }
    return losses


@torch.no_grad()
def watch_cells(student: torch.Tensor, teacher: torch.Tensor, inside: torch.Tensor) -> dict[str, torch.Tensor]:
    """`feature_std`, `feature_variance` and `retrieval` of aligned cells `[N, P, D]`."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    share = (inside / inside.sum().clamp(min=1))[..., None]
    mean = (student * share).sum((0, 1))
    variance = ((student - mean).square() * share).sum((0, 1))
    return {
        "feature_std": variance.sqrt().mean() * len(variance) ** 0.5,
        "feature_variance": variance.sum(),
        "retrieval": cell_retrieval(student, teacher, inside),
    }


def cell_retrieval(student: torch.Tensor, teacher: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Share of cells inside whose nearest cell of the other view, by cosine, is the same place.

    Args:
        student, teacher: unit-length cells `[N, P, D]`.
        inside: `[N, P]`.
    """
    similarity = (student @ teacher.mT).masked_fill(~inside[:, None], float("-inf"))
    hits = similarity.argmax(-1) == torch.arange(inside.shape[1], device=inside.device)
    return (hits & inside).sum() / inside.sum().clamp(min=1)
