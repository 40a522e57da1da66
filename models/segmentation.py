"""Fine-tuning to segment: what is computed of labelled crops."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import segmentation_class
from .modeling_segmentation import SegmentationModel
from .pretraining import Pretraining


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


class Segmentation(Pretraining):
    """A network that gives each voxel a class.

    Args:
        model: a row's `segmentation`; its parts are trained, no copy of them.
        objective, terms, precision: see `Pretraining`.
        frozen: train the decoder alone, on what the encoder makes of the crops in evaluation mode.
    """

    def __init__(
        self,
        model: SegmentationModel,
        objective: Callable[..., dict[str, torch.Tensor]],
        terms: Mapping[str, float],
        precision: str = "fp32",
        frozen: bool = False,
    ):
        super().__init__(SegmentationStudent(model), objective, terms, precision)
        self.frozen = frozen
        if frozen:
            self.student.features.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "Segmentation":
        super().train(mode)
        if self.frozen:
            self.student.features.encoder.eval()
        return self

    def forward(self, *, gradient_norms: bool = False, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """As in `Pretraining`; no gradient enters a frozen encoder, so there are no norms of it."""
        return super().forward(gradient_norms=gradient_norms and not self.frozen, **batch)

    def outputs(self, views: torch.Tensor, labels: torch.Tensor, **_: torch.Tensor) -> dict[str, torch.Tensor]:
        """Segment crops `[B, C, X, Y, Z]` with `labels` `[B, X, Y, Z]`.

        Returns:
            `logits` `[B, K, X, Y, Z]`, `labels`, `encoded`.
        """
        logits, encoded = self.student(views)
        return {"logits": logits, "labels": labels, "encoded": encoded}


def model_to_save(config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The segmentation model in a composite's full state dict, whose tensors it shares; draws no random numbers.

    Args:
        config: of the composite's encoder.
    """
    with torch.device("meta"):
        model = segmentation_class(config.model_type)(config)
    parts = {"student.features.encoder.": "encoder.", "student.decoder.": "decoder."}
    ours = {b + n.removeprefix(a): w for n, w in weights.items() for a, b in parts.items() if n.startswith(a)}
    model.load_state_dict(ours, assign=True)
    return model.eval()
