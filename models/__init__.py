"""The networks, and how a set of numbers becomes one of them."""

from inspect import signature
from pathlib import Path

from transformers import PreTrainedModel

from .architectures import ARCHITECTURES, Architecture, architecture, dense_features
from .configuration_primus import PRIMUS_SIZES, PrimusConfig
from .configuration_resenc import ResEncConfig
from .modeling_primus import PrimusModel
from .modeling_resenc import ResEncModel
from .pretraining import Pretraining
from .warm_start import ENCODER_WEIGHTS
from .weight_files import read_json, read_weights

__all__ = [
    "ARCHITECTURES",
    "PRIMUS_SIZES",
    "Architecture",
    "Pretraining",
    "PrimusConfig",
    "PrimusModel",
    "ResEncConfig",
    "ResEncModel",
    "architecture",
    "build_encoder",
    "dense_features",
    "load_encoder",
]


def build_encoder(name: str, crop_size: tuple[int, ...], preprocessing: dict, **sizes) -> PreTrainedModel:
    """A fresh encoder. `name` is a row of `ARCHITECTURES`; `sizes` go to its configuration.

    Raises:
        ValueError: if there is no such row, or the configuration is not made for it.
    """
    row = architecture(name)
    known = signature(row.config.__init__).parameters
    if unknown := {"image_size", "num_channels", "preprocessing", *sizes} - known.keys():  # transformers swallows them
        raise ValueError(f"{row.config.__name__} does not take {', '.join(sorted(unknown))}")
    if row.config.model_type != name:
        raise ValueError(
            f"{row.config.__name__}.model_type={row.config.model_type!r} must be the key of its row, {name!r}"
        )
    return row.model(row.config(image_size=crop_size, preprocessing=preprocessing, **sizes))


def load_encoder(folder: Path) -> PreTrainedModel:
    """The encoder in a folder that `from_pretrained` reads, with this project's code and not the folder's.

    Raises:
        ValueError: if the folder holds no encoder of ours, or a damaged one.
    """
    numbers = read_json(folder / "config.json")
    model_type = numbers.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(f"{folder}: its config.json is of another kind of model ({model_type!r})")
    row = ARCHITECTURES[model_type]
    try:
        config = row.config.from_dict(numbers)
    except TypeError as error:  # a number where a list belongs, a text where a number belongs
        raise ValueError(f"{folder}: config.json is damaged ({error})") from None
    encoder = row.model(config)
    index = folder / f"{ENCODER_WEIGHTS}.index.json"
    weights, _ = read_weights(index if index.is_file() else folder / ENCODER_WEIGHTS)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{folder}: the weights are not those of config.json ({reason})") from None
    return encoder
