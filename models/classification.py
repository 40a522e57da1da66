"""Fine-tuning to classify or regress whole volumes: what is computed of their crops."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import classification_class
from .fine_tuning import FineTuning, fill
from .modeling_classification import ImageClassificationModel


class ClassificationStudent(nn.Module):
    """The network of a classification model, its parts where warm starts look for them.

    Args:
        model: shares its parts.
    """

    def __init__(self, model: ImageClassificationModel):
        super().__init__()
        self.features = nn.Module()
        self.features.encoder, self.head = model.encoder, model.head
        self.encode = model.encode

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Crops `[B, C, X, Y, Z]` -> logits `[B, K]`, and the cells that they come from."""
        cells = self.encode(self.features.encoder, views)
        return self.head(cells), (cells,)


class Classification(FineTuning):
    """A network that gives each crop what is known of its volume: a class, or a number.

    Args:
        model: a row's `classification`; its parts are trained, no copy of them.
        objective, terms, precision, frozen, layer_decay: see `FineTuning`.
    """

    def __init__(
        self,
        model: ImageClassificationModel,
        objective: Callable[..., dict[str, torch.Tensor]],
        terms: Mapping[str, float],
        precision: str = "fp32",
        frozen: bool = False,
        layer_decay: float = 1.0,
    ):
        super().__init__(ClassificationStudent(model), objective, terms, precision, frozen, layer_decay)

    def outputs(self, views: torch.Tensor, weights: torch.Tensor, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same with `weights` `[B]`, of each crop in the loss."""
        return super().outputs(views, **batch) | {"weights": weights}


def model_to_save(config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The classification model in a composite's full state dict, see `fill`."""
    return fill(classification_class(config.model_type), config, weights, "head")
