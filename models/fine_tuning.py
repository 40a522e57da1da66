"""What all fine-tuning has in common: an encoder that learns slower towards its input, or not at all."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .pretraining import Pretraining

LAYER = re.compile(r"student\.features\.encoder\.(?:transformer\.blocks|stages)\.(\d+)\.")
FIRST = re.compile(r"student\.features\.encoder\.(?!transformer\.norm\.)")  # what is no block
LAST = 10**6  # deeper than any layer


class FineTuning(Pretraining):
    """A network that answers for labelled crops.

    Args:
        student: crops `[B, C, X, Y, Z]` -> logits, and the features that they come from; its `features.encoder` is
            trained as the two last arguments say.
        objective, terms, precision: see `Pretraining`.
        frozen: train the rest alone, on what the encoder makes of the crops in evaluation mode.
        layer_decay: factor of the learning rate from each block or stage of the encoder to the one before it (Bao et
            al. 2022, BEiT, arXiv:2106.08254); 1 for the same rate everywhere.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Callable[..., dict[str, torch.Tensor]],
        terms: Mapping[str, float],
        precision: str = "fp32",
        frozen: bool = False,
        layer_decay: float = 1.0,
    ):
        super().__init__(student, objective, terms, precision)
        self.frozen, self.layer_decay = frozen, layer_decay
        if frozen:
            self.student.features.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "FineTuning":
        super().train(mode)
        if self.frozen:
            self.student.features.encoder.eval()
        return self

    def parameter_groups(self) -> list[dict]:
        """One group a depth: what reads the voxels, each block or stage of the encoder, what comes after."""
        if self.layer_decay == 1.0:
            return super().parameter_groups()
        groups: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                layer, comes_first = LAYER.match(name), FIRST.match(name)
                depth = 1 + int(layer[1]) if layer else 0 if comes_first else LAST
                groups.setdefault(depth, []).append(parameter)
        depths = sorted(groups, reverse=True)
        return [{"params": groups[d], "lr_scale": self.layer_decay**n} for n, d in enumerate(depths)]

    def forward(self, *, gradient_norms: bool = False, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """As in `Pretraining`; no gradient enters a frozen encoder, so there are no norms of it."""
        return super().forward(gradient_norms=gradient_norms and not self.frozen, **batch)

    def outputs(self, views: torch.Tensor, labels: torch.Tensor, **_: torch.Tensor) -> dict[str, torch.Tensor]:
        """Answer for crops `[B, C, X, Y, Z]`.

        Returns:
            `logits`, `labels`, `encoded`.
        """
        logits, encoded = self.student(views)
        return {"logits": logits, "labels": labels, "encoded": encoded}


def fill(
    model_class: type[PreTrainedModel], config: PretrainedConfig, weights: dict[str, torch.Tensor], part: str
) -> PreTrainedModel:
    """The model in a composite's full state dict, whose tensors it shares; draws no random numbers.

    Args:
        config: of the composite's encoder.
        part: what the model has beside its `encoder`, the student too.
    """
    with torch.device("meta"):
        model = model_class(config)
    parts = {"student.features.encoder.": "encoder.", f"student.{part}.": f"{part}."}
    ours = {b + n.removeprefix(a): w for n, w in weights.items() for a, b in parts.items() if n.startswith(a)}
    model.load_state_dict(ours, assign=True)
    return model.eval()
