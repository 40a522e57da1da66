"""Consistent View Alignment: what student and teacher compute (arXiv 2509.13846)."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .heads import predictor, projector
from .pretraining import Pretraining, masked_voxels


class ConsistentViewAlignment(Pretraining):
    """A masked student learns to rebuild its crop and to agree with an unmasked teacher where two views overlap.

    Only what the trained terms need is built. The teacher is encoder and projector; a Primus student completes its
    tokens with a small feature decoder before the projector, which the teacher has only on request.

    Args:
        student, objective, terms, precision: see `Pretraining`; the student has what the terms "reconstruction",
            "consistency" and "contrastive" need, and heads of pooled features run in float32.
        teacher: "published" (no feature decoder), "same" (the student's path), or None: the student's own embeddings
            are contrasted with each other (SimCLR), without a predictor.
        projector_size, predictor_size: width of the heads.
    """

    averaged = {"features": "student.features", "projector": "projector"}

    def __init__(
        self,
        student: nn.Module,
        objective: Callable[..., dict[str, torch.Tensor]],
        terms: Mapping[str, float],
        teacher: str | None,
        projector_size: int,
        predictor_size: int,
        precision: str = "fp32",
    ):
        super().__init__(student, objective, terms, precision)
        self.projector = self.predictor = None
        if {"consistency", "contrastive"} & terms.keys():
            self.projector = projector(student.features.size, projector_size, projector_size)
            if teacher:
                self.predictor = predictor(projector_size, predictor_size)
                self.teacher = nn.ModuleDict(
                    {"features": student.teacher(teacher == "same"), "projector": copy.deepcopy(self.projector)}
                )
                self.teacher.requires_grad_(False).eval()
        assert self.teacher is not None or "consistency" not in terms

    def outputs(
        self,
        views: torch.Tensor,
        mask: torch.Tensor,
        points: torch.Tensor,
        inside: torch.Tensor,
        present: torch.Tensor,
        pair: torch.Tensor,
        group: torch.Tensor,
        target: torch.Tensor,
        **_: torch.Tensor,  # spacing: nothing here is in mm
    ) -> dict[str, torch.Tensor]:
        """Run student and teacher on the crops of `B` volumes; the arguments are those of `data.stream.Batch`.

        Returns:
            `target`, `present`, `points`, `inside`, `pair`, `group`, `voxel_mask` `[2B, 1, X, Y, Z]`; as far as a term
            needs them, `reconstructed` `[2B, C, X, Y, Z]`, dense features `student_dense` and `teacher_dense`
            `[2B, D, x, y, z]`, and `student_embedding` and `teacher_embedding` `[2B, D]`; `encoded`, what the student's
            encoder returned.
        """
        voxel_mask = masked_voxels(mask, views.shape[2:])
        outputs = {"target": target, "present": present, "points": points, "inside": inside, "pair": pair}
        outputs |= {"group": group, "voxel_mask": voxel_mask}
        if self.teacher is not None:  # first: nothing of the student's waits in memory meanwhile
            with torch.no_grad():
                outputs |= self._apply_heads("teacher", *self.teacher["features"](views), [self.teacher["projector"]])
        seen = self.student(views, mask, voxel_mask)
        outputs["encoded"] = seen.encoded
        if "reconstruction" in self.terms:
            outputs["reconstructed"] = seen.reconstruction.float()
        heads = [head for head in (self.projector, self.predictor) if head is not None]
        return outputs | self._apply_heads("student", seen.dense, seen.pooled, heads)

    def _apply_heads(self, who, dense, pooled, heads):
        outputs = {}
        if "consistency" in self.terms:
            outputs[f"{who}_dense"] = _per_cell(dense, heads)
        if "contrastive" in self.terms:
            with torch.autocast(pooled.device.type, enabled=False):  # a row a crop: full precision costs nothing
                pooled = pooled.float()
                for head in heads:
                    pooled = head(pooled)
            outputs[f"{who}_embedding"] = pooled
        return outputs


def _per_cell(dense: torch.Tensor, heads: list[nn.Module]) -> torch.Tensor:
    """Apply heads that take rows to every cell of `[B, C, x, y, z]`."""
    rows = dense.movedim(1, -1)
    shape = rows.shape[:-1]
    rows = rows.flatten(0, -2)
    for head in heads:
        rows = head(rows)
    return rows.unflatten(0, shape).movedim(-1, 1)
