"""The networks, and how a set of numbers becomes one of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_primus import PRIMUS_SIZES, PrimusConfig
from .configuration_resenc import ResEncConfig
from .cva import ConsistentViewAlignment
from .features import DENSE_STRIDE, dense_features
from .masked_primus import MaskedPrimus
from .masked_resenc import MaskedResEnc
from .modeling_primus import PrimusModel
from .modeling_resenc import ResEncModel
from .warm_start import ENCODER_WEIGHTS
from .weight_files import read_json, read_weights

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
    "dense_features",
    "load_encoder",
]

ENCODERS = {"primus": (PrimusConfig, PrimusModel), "resenc": (ResEncConfig, ResEncModel)}


def build_encoder(architecture: str, crop_size: tuple[int, ...], preprocessing: dict, **sizes) -> PreTrainedModel:
    """A fresh encoder. `architecture` is "primus" or "resenc"; `sizes` go to its configuration."""
    config_class, model_class = ENCODERS[architecture]
    return model_class(config_class(image_size=crop_size, preprocessing=preprocessing, **sizes))


def load_encoder(folder: Path) -> PreTrainedModel:
    """The encoder in a folder that `from_pretrained` reads, with this project's code and not the folder's.

    Raises:
        ValueError: if the folder holds no encoder of ours, or a damaged one.
    """
    numbers = read_json(folder / "config.json")
    model_type = numbers.get("model_type")
    if not isinstance(model_type, str) or model_type not in ENCODERS:
        raise ValueError(f"{folder}: its config.json is of another kind of model ({model_type!r})")
    config_class, model_class = ENCODERS[model_type]
    try:
        config = config_class.from_dict(numbers)
    except TypeError as error:  # a number where a list belongs, a text where a number belongs
        raise ValueError(f"{folder}: config.json is damaged ({error})") from None
    encoder = model_class(config)
    index = folder / f"{ENCODER_WEIGHTS}.index.json"
    weights, _ = read_weights(index if index.is_file() else folder / ENCODER_WEIGHTS)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{folder}: the weights are not those of config.json ({reason})") from None
    return encoder


def build_cva(
    encoder: PreTrainedModel,
    objective: Callable,
    weights: dict[str, float],
    mask_ratio: float,
    decoder: dict[str, int],
    teacher: str | None,
    projector_size: int,
    predictor_size: int,
    precision: str,
    gradient_checkpointing: bool,
) -> ConsistentViewAlignment:
    """Put heads, teacher and objective around an encoder, as far as the weighted terms need them.

    Args:
        decoder: sizes for `MaskedPrimus`, empty for ResEnc.
        others: see `ConsistentViewAlignment`.
    """
    if isinstance(encoder, PrimusModel):
        student = MaskedPrimus(encoder, weights, mask_ratio, **decoder)
    else:
        student = MaskedResEnc(encoder, weights, **decoder)
    model = ConsistentViewAlignment(student, objective, weights, teacher, projector_size, predictor_size, precision)
    if gradient_checkpointing:
        for module in student.modules():  # the decoders too, which transformers' own switch does not reach
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return model
