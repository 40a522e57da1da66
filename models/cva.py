"""Consistent View Alignment: student, EMA teacher and objective in one module (arXiv 2509.13846).

One module, because DeepSpeed and FSDP2 wrap exactly one, and because then a checkpoint holds the teacher too.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .distributed import gather_with_gradient
from .heads import predictor, projector


class StudentOutput(NamedTuple):
    """What a student makes of masked crops; None for what no term needs."""

    reconstruction: torch.Tensor | None  # [B, C, X, Y, Z]
    dense: torch.Tensor | None  # [B, D, x, y, z]
    pooled: torch.Tensor | None  # [B, D]
    encoded: tuple[torch.Tensor, ...]  # what the encoder returned, which all of these come from


class ConsistentViewAlignment(nn.Module):
    """A masked student learns to rebuild its crop and to agree with an unmasked teacher where two views overlap.

    Only what the trained terms need is built. The teacher is encoder and projector; a Primus student completes its
    tokens with a small feature decoder before the projector, which the teacher has only on request.

    Args:
        student: `MaskedPrimus` or `MaskedResEnc`; its `features` are what the teacher copies.
        objective: outputs of `forward_views` and `gather_with_gradient` -> dict of scalars, the terms among them.
        weights: of the terms "reconstruction", "consistency" and "contrastive"; those left out are not computed.
        teacher: "published" (no feature decoder), "same" (the student's path), or None: the student's own embeddings
            are contrasted with each other (SimCLR), without a predictor.
        projector_size, predictor_size: width of the heads.
        precision: "bf16" runs both networks under autocast, but for the heads of pooled features; parameters stay
            float32, so the teacher's average is exact.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Callable[..., dict[str, torch.Tensor]],
        weights: dict[str, float],
        teacher: str | None,
        projector_size: int,
        predictor_size: int,
        precision: str = "fp32",
    ):
        super().__init__()
        self.student = student
        self.projector = self.predictor = self.teacher = None
        if {"consistency", "contrastive"} & weights.keys():
            self.projector = projector(student.features.size, projector_size, projector_size)
            if teacher:
                self.predictor = predictor(projector_size, predictor_size)
                self.teacher = nn.ModuleDict(
                    {"features": student.teacher(teacher == "same"), "projector": copy.deepcopy(self.projector)}
                )
                self.teacher.requires_grad_(False).eval()
        assert self.teacher is not None or "consistency" not in weights
        self.weights = weights
        self.objective = objective
        self.precision = precision
        self._no_split_modules = student.features.encoder._no_split_modules

    def train(self, mode: bool = True) -> "ConsistentViewAlignment":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()  # no drop-path in the teacher
        return self

    def forward_views(
        self,
        views: torch.Tensor,
        mask: torch.Tensor,
        points: torch.Tensor,
        inside: torch.Tensor,
        pair: torch.Tensor,
        target: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Run student and teacher on the crops of `B` volumes, stacked `[view 1 of all, view 2 of all]`.

        Args:
            views: `[2B, C, X, Y, Z]`.
            mask: `[2B, x, y, z]`, True where a block is hidden from the student.
            points: `[2B, P, S, 3]`, where to compare dense features, `S` places for each of `P` cells, in voxels of
                each crop; those of the two views of a volume are the same places.
            inside: `[2B, P]`, whether both views reach a cell.
            pair: `[2B]`, a number that the two views of a sample share and no other sample of the batch has.
            target: `[2B, C, X, Y, Z]`, what to reconstruct.

        Returns:
            `target`, `points`, `inside`, `pair`, `voxel_mask` `[2B, 1, X, Y, Z]` and, as far as a term needs them,
            `reconstructed` `[2B, C, X, Y, Z]`, dense features `student_dense` and `teacher_dense` `[2B, D, x, y, z]`,
            and `student_embedding` and `teacher_embedding` `[2B, D]`; `encoded`, what the student's encoder returned.
        """
        voxel_mask = F.interpolate(mask[:, None].float(), size=views.shape[2:], mode="nearest").bool()
        outputs = {"target": target, "points": points, "inside": inside, "pair": pair, "voxel_mask": voxel_mask}
        with torch.autocast(views.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            seen = self.student(views, mask, voxel_mask)
            outputs["encoded"] = seen.encoded
            if "reconstruction" in self.weights:
                outputs["reconstructed"] = seen.reconstruction.float()
            heads = [head for head in (self.projector, self.predictor) if head is not None]
            outputs |= self._apply_heads("student", seen.dense, seen.pooled, heads)
            if self.teacher is not None:
                with torch.no_grad():
                    dense, pooled = self.teacher["features"](views)
                    outputs |= self._apply_heads("teacher", dense, pooled, [self.teacher["projector"]])
        return outputs

    def _apply_heads(self, who, dense, pooled, heads):
        outputs = {}
        if "consistency" in self.weights:
            outputs[f"{who}_dense"] = _per_cell(dense, heads)
        if "contrastive" in self.weights:
            with torch.autocast(pooled.device.type, enabled=False):  # a row a crop: full precision costs nothing
                pooled = pooled.float()
                for head in heads:
                    pooled = head(pooled)
            outputs[f"{who}_embedding"] = pooled
        return outputs

    def forward(
        self, *, return_outputs: bool = False, gradient_norms: bool = False, **batch: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The losses of `forward_views`' arguments, `loss` being the one to minimise.

        With them `crop_is_finite` `[2B]`: whether the encoder's deepest features of each crop are; where a loss is not
        finite, this tells which samples it came from, since all others share their terms with them.

        Args:
            return_outputs: add the outputs of `forward_views`.
            gradient_norms: add `gradient_of_TERM`, the norm over the whole batch of each term's gradient, as it is
                weighted in the loss, where it enters the encoder: what each term pulls with.
        """
        outputs = self.forward_views(**batch)
        losses = self.objective(outputs, gather_with_gradient)
        terms = {name: weight * losses[name] for name, weight in self.weights.items()}
        if gradient_norms:
            losses |= {f"gradient_of_{k}": _gradient_norm(term, outputs["encoded"]) for k, term in terms.items()}
        losses = {"loss": sum(terms.values()), **{name: value.detach() for name, value in losses.items()}}
        losses["crop_is_finite"] = outputs["encoded"][-1].detach().isfinite().flatten(1).all(dim=1)
        return outputs | losses if return_outputs else losses

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, in float32, on the piece this rank owns."""
        if self.teacher is None:
            return
        names = [name for name, _ in self.teacher.named_parameters()]
        ours = {"features": self.student.features, "projector": self.projector}
        pairs = [(self.teacher.get_parameter(name), ours[name.split(".")[0]], name) for name in names]
        torch._foreach_lerp_(
            [_owned(theirs) for theirs, _, _ in pairs],
            [_owned(module.get_parameter(name.split(".", 1)[1])) for _, module, name in pairs],
            1.0 - momentum,
        )
        if hasattr(pairs[0][0], "ds_tensor") and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # ZeRO-3 gathers on a stream of its own, which does not wait


def _owned(parameter: nn.Parameter) -> torch.Tensor:
    """The shard that ZeRO-3 updates, else the parameter itself (for FSDP2 a DTensor)."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def _per_cell(dense: torch.Tensor, heads: list[nn.Module]) -> torch.Tensor:
    """Apply heads that take rows to every cell of `[B, C, x, y, z]`."""
    rows = dense.movedim(1, -1)
    shape = rows.shape[:-1]
    rows = rows.flatten(0, -2)
    for head in heads:
        rows = head(rows)
    return rows.unflatten(0, shape).movedim(-1, 1)


def _gradient_norm(term: torch.Tensor, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
    gradients = torch.autograd.grad(term, encoded, retain_graph=True, allow_unused=True)
    square = sum(g.float().square().sum() for g in gradients if g is not None)
    per_rank = gather_with_gradient(square)
    return per_rank.sum().sqrt() / len(per_rank)  # each rank's loss is the batch's times the number of ranks
