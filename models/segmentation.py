"""Fine-tuning to segment: what is computed of labelled crops."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import segmentation_class
from .fine_tuning import FineTuning, fill
from .modeling_segmentation import SegmentationModel


class SegmentationStudent(nn.Module):
    """The network of a segmentation model, its parts where warm starts look for them.

    Args:
        model: shares its parts.
    """

    def __init__(self, model: SegmentationModel):
        super().__init__()
        self.features = nn.Module()
        self.features.encoder, self.decoder = model.encoder, model.decoder
        self.encode, self.decode = model.encode, model.decode

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Crops `[B, C, X, Y, Z]` -> logits `[B, K, X, Y, Z]`, and the feature maps that they come from."""
        maps = self.encode(self.features.encoder, views)
        return self.decode(self.decoder, maps), maps


class Segmentation(FineTuning):
    """A network that gives each voxel a class.

    Args:
        model: a row's `segmentation`; its parts are trained, no copy of them.
        objective, terms, precision, frozen, layer_decay: see `FineTuning`.
    """

    def __init__(
        self,
        model: SegmentationModel,
        objective: Callable[..., dict[str, torch.Tensor]],
        terms: Mapping[str, float],
        precision: str = "fp32",
        frozen: bool = False,
        layer_decay: float = 1.0,
    ):
        super().__init__(SegmentationStudent(model), objective, terms, precision, frozen, layer_decay)


def model_to_save(config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The segmentation model in a composite's full state dict, see `fill`."""
    return fill(segmentation_class(config.model_type), config, weights, "decoder")
