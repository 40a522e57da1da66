"""The CVA objective: reconstruction + dense consistency + image-level contrast (arXiv 2509.13846)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .consistency import sample_cells
from .ntxent import nt_xent
from .reconstruction import masked_huber


def cva_objective(
    outputs: dict[str, torch.Tensor],
    consistency_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    reconstruction_weight: float,
    consistency_weight: float,
    contrastive_weight: float,
    temperature: float,
    samples_per_cell: int,
) -> dict[str, torch.Tensor]:
    """Weighted sum of the three terms, each symmetrised over the two views.

    Args:
        outputs: see `ConsistentViewAlignment.forward_views`; rows are view-major, so half a roll is the other view.
        consistency_loss: of aligned student and teacher cells `[2B, D, cells...]`, such as `cosine_consistency`.

    Returns:
        `loss`, its parts `reconstruction`, `consistency` and `contrastive` (unweighted), and what tells of collapse:
        `contrastive_accuracy`; `feature_std`, the spread of the student's unit-length dense features per channel, times
        sqrt(D) (about 1 when healthy); `feature_variance`, the same features' total variance (1 = spread over the
        sphere). Both fall to 0 when all features become one.
    """
    crop_size = outputs["target"].shape[2:]
    student = sample_cells(outputs["student_dense"], outputs["points"], crop_size, samples_per_cell)
    teacher = sample_cells(outputs["teacher_dense"], outputs["points"], crop_size, samples_per_cell)
    teacher = teacher.roll(len(teacher) // 2, dims=0)
    embedding = outputs["student_embedding"]
    pairs = len(embedding) // 2
    volumes = torch.arange(pairs, device=embedding.device).repeat(2)

    reconstruction = masked_huber(outputs["reconstructed"], outputs["target"], outputs["voxel_mask"])
    consistency = consistency_loss(student, teacher)
    contrastive, accuracy = nt_xent(embedding, outputs["teacher_embedding"].roll(pairs, dims=0), volumes, temperature)
    with torch.no_grad():
        cells = F.normalize(student, dim=1).movedim(1, -1).flatten(0, -2)
        variance = cells.var(dim=0, correction=0)
    return {
        "loss": reconstruction_weight * reconstruction
        + consistency_weight * consistency
        + contrastive_weight * contrastive,
        "reconstruction": reconstruction.detach(),
        "consistency": consistency.detach(),
        "contrastive": contrastive.detach(),
        "contrastive_accuracy": accuracy,
        "feature_std": variance.sqrt().mean() * len(variance) ** 0.5,
        "feature_variance": variance.sum(),
    }
