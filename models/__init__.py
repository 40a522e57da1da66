"""The networks, and how a set of numbers becomes one of them."""

from collections.abc import Callable
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_primus import PRIMUS_SIZES, PrimusConfig
from .configuration_resenc import ResEncConfig
from .cva import ConsistentViewAlignment
from .masked_primus import MaskedPrimus
from .masked_resenc import DENSE_STRIDE, MaskedResEnc
from .modeling_primus import PrimusModel
from .modeling_resenc import ResEncModel

__all__ = [
    "DENSE_STRIDE",
    "PRIMUS_SIZES",
    "ConsistentViewAlignment",
    "PrimusConfig",
    "PrimusModel",
    "ResEncConfig",
    "ResEncModel",
    "build_cva",
    "build_encoder",
]


def build_encoder(architecture: str, crop_size: tuple[int, ...], preprocessing: dict, **sizes) -> PreTrainedModel:
    """A fresh encoder. `architecture` is "primus" or "resenc"; `sizes` go to its configuration."""
    config_class, model_class = {"primus": (PrimusConfig, PrimusModel), "resenc": (ResEncConfig, ResEncModel)}[
        architecture
    ]
    return model_class(config_class(image_size=crop_size, preprocessing=preprocessing, **sizes))


def build_cva(
    encoder: PreTrainedModel,
    objective: Callable,
    mask_ratio: float,
    decoder: dict[str, int],
    projector_size: int,
    predictor_size: int,
    precision: str,
    gradient_checkpointing: bool,
) -> ConsistentViewAlignment:
    """Put heads, teacher and objective around an encoder. `decoder` is for `MaskedPrimus`, empty for ResEnc."""
    if isinstance(encoder, PrimusModel):
        student = MaskedPrimus(encoder, mask_ratio, **decoder)
    else:
        student = MaskedResEnc(encoder, **decoder)
    model = ConsistentViewAlignment(student, objective, projector_size, predictor_size, precision)
    if gradient_checkpointing:
        for module in student.modules():  # the decoders too, which transformers' own switch does not reach
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return model
