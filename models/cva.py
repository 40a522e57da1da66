"""Consistent View Alignment: student, EMA teacher and objective in one module (arXiv 2509.13846).

One module, because DeepSpeed and FSDP2 wrap exactly one, and because then a checkpoint holds the teacher too.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .distributed import gather_with_gradient
from .heads import predictor, projector


class ConsistentViewAlignment(nn.Module):
    """A masked student learns to rebuild its crop and to agree with an unmasked teacher where two views overlap.

    The teacher is encoder and projector. A Primus student fills in its masked tokens with a small feature decoder
    before the projector; the teacher sees all tokens and has none, as published.

    Args:
        student: `MaskedPrimus` or `MaskedResEnc`; its `features` are what the teacher copies.
        objective: outputs of `forward_views` -> dict of scalars with the entry `loss`.
        projector_size, predictor_size: width of the heads.
        precision: "bf16" runs both networks under autocast; parameters stay float32, so the teacher's average is exact.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
        projector_size: int,
        predictor_size: int,
        precision: str = "fp32",
    ):
        super().__init__()
        self.student = student
        self.projector = projector(student.features.size, projector_size, projector_size)
        self.predictor = predictor(projector_size, predictor_size)
        self.teacher = copy.deepcopy(nn.ModuleDict({"features": student.features, "projector": self.projector}))
        self.teacher.requires_grad_(False).eval()
        self.objective = objective
        self.precision = precision
        self._no_split_modules = student.features.encoder._no_split_modules

    def train(self, mode: bool = True) -> "ConsistentViewAlignment":
        super().train(mode)
        self.teacher.eval()  # no drop-path in the teacher
        return self

    def forward_views(self, views: torch.Tensor, mask: torch.Tensor, points: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run student and teacher on the crops of `B` volumes, stacked `[view 1 of all, view 2 of all]`.

        Args:
            views: `[2B, C, X, Y, Z]`.
            mask: `[2B, x, y, z]`, True where a block is hidden from the student.
            points: `[2B, p, q, r, 3]`, where to compare dense features, in voxels of each crop; the points of the two
                views of a volume are the same places.

        Returns:
            `reconstructed` and `target` `[2B, C, X, Y, Z]`, `voxel_mask` `[2B, 1, X, Y, Z]`, `points`, dense features
            `student_dense` and `teacher_dense` `[2B, D, x, y, z]`, and `student_embedding` and `teacher_embedding`
            `[2 * global B, D]` of the crops of all ranks, view-major.
        """
        voxel_mask = F.interpolate(mask[:, None].float(), size=views.shape[2:], mode="nearest").bool()
        with torch.autocast(views.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            reconstruction, dense, pooled = self.student(views, mask, voxel_mask)
            student_dense = _per_cell(dense, self.projector, self.predictor)
            student_embedding = self.predictor(self.projector(pooled))
            with torch.no_grad():
                teacher_dense, pooled = self.teacher["features"](views)
                teacher_dense = _per_cell(teacher_dense, self.teacher["projector"])
                teacher_embedding = self.teacher["projector"](pooled)
        return {
            "reconstructed": reconstruction.float(),
            "target": views,
            "voxel_mask": voxel_mask,
            "points": points,
            "student_dense": student_dense,
            "teacher_dense": teacher_dense,
            "student_embedding": _gather_views(student_embedding.float()),
            "teacher_embedding": _gather_views(teacher_embedding.float()),
        }

    def forward(
        self, views: torch.Tensor, mask: torch.Tensor, points: torch.Tensor, return_outputs: bool = False
    ) -> dict[str, torch.Tensor]:
        """The losses of `forward_views`' arguments, `loss` being the one to minimise; the outputs too on request."""
        outputs = self.forward_views(views, mask, points)
        losses = self.objective(outputs)
        return outputs | losses if return_outputs else losses

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, in float32, on the piece this rank owns."""
        torch._foreach_lerp_(
            [_owned(p) for p in self.teacher.parameters()],
            [_owned(p) for m in (self.student.features, self.projector) for p in m.parameters()],
            1.0 - momentum,
        )


def _owned(parameter: nn.Parameter) -> torch.Tensor:
    """The shard that ZeRO-3 updates, else the parameter itself (for FSDP2 a DTensor)."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def _per_cell(dense: torch.Tensor, *heads: nn.Module) -> torch.Tensor:
    """Apply heads that take rows to every cell of `[B, C, x, y, z]`."""
    rows = dense.movedim(1, -1)
    shape = rows.shape[:-1]
    rows = rows.flatten(0, -2)
    for head in heads:
        rows = head(rows)
    return rows.unflatten(0, shape).movedim(-1, 1)


def _gather_views(embedding: torch.Tensor) -> torch.Tensor:
    """`[2b, D]` of each rank -> `[2B, D]` of all ranks, still view-major."""
    per_view = embedding.unflatten(0, (2, -1))  # [2, b, D]
    return gather_with_gradient(per_view).transpose(0, 1).flatten(0, 2)
