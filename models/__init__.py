"""The networks, and how a set of numbers becomes one of them."""

from inspect import signature
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from .architectures import (
    ARCHITECTURES,
    Architecture,
    architecture,
    classification_class,
    dense_features,
    fine_tuned,
    segmentation_class,
)
from .configuration_primus import PRIMUS_SIZES, PrimusConfig
from .configuration_primus_versions import PrimusV2Config, PrimusV3Config
from .configuration_resenc import ResEncConfig
from .modeling_classification import (
    ImageClassificationModel,
    PrimusForImageClassification,
    PrimusV2ForImageClassification,
    PrimusV3ForImageClassification,
    ResEncForImageClassification,
)
from .modeling_primus import PrimusModel
from .modeling_primus_versions import PrimusV2Model, PrimusV3Model
from .modeling_resenc import ResEncModel
from .modeling_segmentation import (
    PrimusForSegmentation,
    PrimusV2ForSegmentation,
    PrimusV3ForSegmentation,
    ResEncForSegmentation,
    SegmentationModel,
)
from .pretraining import Pretraining
from .warm_start import ENCODER_WEIGHTS
from .weight_files import read_json, read_weights

__all__ = [
    "ARCHITECTURES",
    "PRIMUS_SIZES",
    "Architecture",
    "ImageClassificationModel",
    "Pretraining",
    "PrimusConfig",
    "PrimusForImageClassification",
    "PrimusForSegmentation",
    "PrimusModel",
    "PrimusV2Config",
    "PrimusV2ForImageClassification",
    "PrimusV2ForSegmentation",
    "PrimusV2Model",
    "PrimusV3Config",
    "PrimusV3ForImageClassification",
    "PrimusV3ForSegmentation",
    "PrimusV3Model",
    "ResEncConfig",
    "ResEncForImageClassification",
    "ResEncForSegmentation",
    "ResEncModel",
    "SegmentationModel",
    "architecture",
    "build_encoder",
    "classification_class",
    "dense_features",
    "load_encoder",
    "load_fine_tuned",
    "load_segmentation",
    "segmentation_class",
]


def build_encoder(name: str, crop_size: tuple[int, ...], preprocessing: dict, **sizes) -> PreTrainedModel:
    """A fresh encoder. `name` is a row of `ARCHITECTURES`; `sizes` go to its configuration.

    Raises:
        ValueError: if there is no such row, or the configuration is not made for it.
    """
    row = architecture(name)
    ours = [kind for kind in row.config.mro() if issubclass(kind, PretrainedConfig) and kind is not PretrainedConfig]
    known = {name for kind in ours for name in signature(kind.__init__).parameters}
    if unknown := {"image_size", "num_channels", "preprocessing", *sizes} - known:  # transformers swallows them
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
    numbers, row = _read_config(folder)
    if model := fine_tuned(numbers):
        raise ValueError(f"{folder}: it is a {model.__name__}: give the encoder that it was fine-tuned from")
    return _load(folder, numbers, row.model)


def load_fine_tuned(folder: Path) -> PreTrainedModel:
    """The fine-tuned model in a folder that `from_pretrained` reads, with this project's code and not the folder's.

    Raises:
        ValueError: if the folder holds no fine-tuned model of ours, or a damaged one.
    """
    numbers, _ = _read_config(folder)
    model = fine_tuned(numbers)
    if model is None:
        raise ValueError(f"{folder}: it is an encoder, which answers nothing yet: fine-tune it with finetune.py")
    return _load(folder, numbers, model)


def load_segmentation(folder: Path) -> SegmentationModel:
    """The same, of a model that segments; ValueError if it does something else."""
    model = load_fine_tuned(folder)
    if not isinstance(model, SegmentationModel):
        raise ValueError(f"{folder}: it is a {type(model).__name__}, which segments nothing")
    return model


def _read_config(folder: Path) -> tuple[dict, Architecture]:
    numbers = read_json(folder / "config.json")
    model_type = numbers.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(f"{folder}: its config.json is of another kind of model ({model_type!r})")
    return numbers, ARCHITECTURES[model_type]


def _load(folder: Path, numbers: dict, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    try:
        config = model_class.config_class.from_dict(numbers)
    except TypeError as error:  # a number where a list belongs, a text where a number belongs
        raise ValueError(f"{folder}: config.json is damaged ({error})") from None
    model = model_class(config)
    index = folder / f"{ENCODER_WEIGHTS}.index.json"
    weights, _ = read_weights(index if index.is_file() else folder / ENCODER_WEIGHTS)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{folder}: the weights are not those of config.json ({reason})") from None
    return model
