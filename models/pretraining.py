"""What every method's composite is: student, teacher and objective in one module.

One module, because DeepSpeed and FSDP2 wrap exactly one, and because then a checkpoint holds the teacher too.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from .distributed import gather_with_gradient


class StudentOutput(NamedTuple):
    """What a student makes of masked crops; None for what it was not asked for."""

    reconstruction: torch.Tensor | None  # [B, C, X, Y, Z]
    dense: torch.Tensor | None  # [B, D, x, y, z]
    pooled: torch.Tensor | None  # [B, D]
    encoded: tuple[torch.Tensor, ...]  # what the encoder returned, which all of these come from


def masked_voxels(mask: torch.Tensor, crop_size: tuple[int, ...]) -> torch.Tensor:
    """Of a mask of cells `[B, x, y, z]`, the voxels `[B, 1, X, Y, Z]` that they cover."""
    for axis, (size, cells) in enumerate(zip(crop_size, mask.shape[1:]), start=1):
        mask = mask.repeat_interleave(size // cells, axis)
    return mask[:, None]


class Pretraining(nn.Module):
    """Base of the methods' composites: losses and their weights, gradient norms, finite crops, the teacher's average.

    A method builds its heads and, if it has one, `self.teacher`, frozen, and writes `outputs`. Others rely on the names
    `student.features.encoder`, `student.decoder` and `teacher.features.encoder`.

    Args:
        student: of a row of `ARCHITECTURES`.
        objective: what `outputs` returned and `gather_with_gradient` -> dict of scalars, the terms and what is watched.
        terms: name -> weight in the loss of each term that is trained.
        precision: "bf16" runs `outputs` under autocast; parameters stay float32, so the teacher's average is exact.
    """

    averaged: Mapping[str, str] = {}  # part of the teacher -> the module of this one that it follows

    def __init__(
        self,
        student: nn.Module,
        objective: Callable[..., dict[str, torch.Tensor]],
        terms: Mapping[str, float],
        precision: str,
    ):
        super().__init__()
        self.student = student
        self.teacher = None
        self.objective, self.terms, self.precision = objective, dict(terms), precision
        encoder = student.features.encoder
        self._no_split_modules = encoder._no_split_modules
        if not {type(module).__name__ for module in encoder.modules()} & set(self._no_split_modules or ()):
            raise ValueError(
                f"{type(encoder).__name__}._no_split_modules={self._no_split_modules} names no module of it: FSDP2 "
                "would have no unit to shard"
            )

    def train(self, mode: bool = True) -> "Pretraining":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()  # no drop-path in the teacher
        return self

    def parameter_groups(self) -> list[dict]:
        """What is trained, as an optimiser takes it; a group's `lr_scale`, if it has one, scales the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def outputs(self, views: torch.Tensor, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the networks on a batch: all that `objective` needs, and `encoded` (`StudentOutput`).

        Takes every key of the batch, `views` and `pair` among them; rows of each are the crops. Nothing may depend on
        values (`.item()`): the cost of a step is counted on fake tensors.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it computes: write its method `outputs`")

    def forward(
        self, *, return_outputs: bool = False, gradient_norms: bool = False, **batch: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The losses of a batch, `loss` being the one to minimise.

        With them `crop_is_finite` `[VB]`: whether the encoder's deepest features of each crop are; where a loss is not
        finite, this tells which samples it came from, since all others share their terms with them.

        Args:
            batch: of `outputs`.
            return_outputs: add what `outputs` returned.
            gradient_norms: add `gradient_of_TERM`, the norm over the whole batch of each term's gradient, as it is
                weighted in the loss, where it enters the encoder: what each term pulls with.
        """
        with torch.autocast(batch["views"].device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            outputs = self.outputs(**batch)
        losses = self.objective(outputs, gather_with_gradient)
        if missing := self.terms.keys() - losses.keys():
            raise ValueError(f"the objective returns no {', '.join(missing)}, which has a weight in the loss")
        terms = {name: weight * losses[name] for name, weight in self.terms.items()}
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
        ours = {part: self.get_submodule(name) for part, name in self.averaged.items()}
        split = [(parameter, *name.split(".", 1)) for name, parameter in self.teacher.named_parameters()]
        theirs = [parameter for parameter, *_ in split]
        torch._foreach_lerp_(
            [_owned(parameter) for parameter in theirs],
            [_owned(ours[part].get_parameter(name)) for _, part, name in split],
            1.0 - momentum,
        )
        if hasattr(theirs[0], "ds_tensor") and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # ZeRO-3 gathers on a stream of its own, which does not wait


def _owned(parameter: nn.Parameter) -> torch.Tensor:
    """The shard that ZeRO-3 updates, else the parameter itself (for FSDP2 a DTensor)."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def _gradient_norm(term: torch.Tensor, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
    gradients = torch.autograd.grad(term, encoded, retain_graph=True, allow_unused=True)
    square = sum(g.float().square().sum() for g in gradients if g is not None)
    per_rank = gather_with_gradient(square)
    return per_rank.sum().sqrt() / len(per_rank)  # each rank's loss is the batch's times the number of ranks
