"""The table of encoders: all that the rest of the project knows of each. A new one is a modelling file and a row."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from . import nnunet_primus, nnunet_resenc
from .configuration_primus import PrimusConfig
from .configuration_primus_versions import PrimusV2Config, PrimusV3Config
from .configuration_resenc import ResEncConfig
from .features import primus_features, resenc_features
from .masked_primus import MaskedPrimus
from .masked_resenc import MaskedResEnc
from .model_sections import ModelSection, Primus, PrimusV2, PrimusV3, ResEnc
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
from .nnunet_names import NnunetNames


class FeatureMap(NamedTuple):
    """A stage that a user may start from, for the examples of the model card."""

    stage: str
    channels: int
    stride: int  # voxels a cell


class Architecture(NamedTuple):
    """A row; its key is the `model_type` of the configuration and `model.architecture` of a recipe."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    segmentation: type[SegmentationModel] | None  # the model with a decoder; None: it cannot be fine-tuned to segment
    classification: type[ImageClassificationModel] | None  # with a head for whole volumes; None: the same
    section: type[ModelSection]  # of a recipe: its numbers, what they ask of a crop, stride of the dense features
    student: Callable[..., nn.Module]  # (encoder, section, mask ratio, reconstructs=, dense=, pooled=)
    dense: Callable[[PreTrainedModel, torch.Tensor, int | None], torch.Tensor]  # see `dense_features`
    unit: Callable[[PretrainedConfig], tuple[int, ...]]  # voxels that must divide a crop, along each axis
    feature_map: Callable[[PretrainedConfig], FeatureMap]
    hides: str  # what a mask hides, in the plural
    input_weights: tuple[str, ...]  # the kernels that read the voxels; the first marks an encoder among others
    name: str
    kind: str
    paper: str
    output: str  # what `last_hidden_state` is
    nnunet: NnunetNames | None  # None: nnU-Net has no such network


PRIMUS = Architecture(
    config=PrimusConfig,
    model=PrimusModel,
    segmentation=PrimusForSegmentation,
    classification=PrimusForImageClassification,
    section=Primus,
    student=lambda encoder, section, mask_ratio, **wanted: MaskedPrimus(
        encoder,
        mask_ratio,
        **wanted,
        decoder_layers=section.decoder_layers,
        feature_decoder_heads=section.feature_decoder_heads,
    ),
    dense=primus_features,
    unit=lambda config: tuple(config.patch_size),
    feature_map=lambda config: FeatureMap(config.stage_names[-1], config.hidden_size, config.patch_size[0]),
    hides="tokens",
    input_weights=("patch_embed.weight",),
    name="Primus",
    kind="a vision transformer",
    paper="Wald et al. 2025, arXiv:2503.01835",
    output="tokens [1, N, C]",
    nnunet=nnunet_primus.PRIMUS,
)
PRIMUS_V2 = PRIMUS._replace(
    config=PrimusV2Config,
    model=PrimusV2Model,
    segmentation=PrimusV2ForSegmentation,
    classification=PrimusV2ForImageClassification,
    section=PrimusV2,
    input_weights=("patch_embed.stem.conv1.conv.weight", "patch_embed.stem.skip.conv.weight"),
    name="PrimusV2",
    kind="a vision transformer on tokens of residual convolutions",
    nnunet=nnunet_primus.PRIMUS_V2,
)
ARCHITECTURES = {
    "primus": PRIMUS,
    "primus_v2": PRIMUS_V2,
    "primus_v3": PRIMUS_V2._replace(
        config=PrimusV3Config,
        model=PrimusV3Model,
        segmentation=PrimusV3ForSegmentation,
        classification=PrimusV3ForImageClassification,
        section=PrimusV3,
        name="PrimusV3",
        paper=f"documentation/primus.md of nnU-Net, after {PRIMUS.paper}",
        nnunet=nnunet_primus.PRIMUS_V3,
    ),
    "resenc": Architecture(
        config=ResEncConfig,
        model=ResEncModel,
        segmentation=ResEncForSegmentation,
        classification=ResEncForImageClassification,
        section=ResEnc,
        student=lambda encoder, section, mask_ratio, **wanted: MaskedResEnc(encoder, **wanted),
        dense=resenc_features,
        unit=lambda config: (math.prod(config.strides),) * 3,
        feature_map=lambda config: _middle_stage(config),
        hides="blocks",
        input_weights=("stem.conv.weight",),
        name="ResEnc",
        kind="nnU-Net's residual CNN",
        paper="Isensee et al. 2024, arXiv:2404.09556",
        output="feature map of the deepest stage",
        nnunet=nnunet_resenc.RESENC,
    ),
}


def _middle_stage(config: ResEncConfig) -> FeatureMap:
    depth = min(4, len(config.depths))
    return FeatureMap(f"stage{depth}", config.hidden_sizes[depth - 1], math.prod(config.strides[:depth]))


def architecture(name: object) -> Architecture:
    """The row of this name.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{name!r} is no encoder of this project: there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def names_in_nnunet(model_type: str) -> NnunetNames:
    """What nnU-Net calls an architecture.

    Raises:
        ValueError: if nnU-Net has no such network.
    """
    names = architecture(model_type).nnunet
    if names is None:
        raise ValueError(f"nnU-Net and nnssl have no network like a {model_type}")
    return names


def segmentation_class(model_type: str) -> type[SegmentationModel]:
    """What an architecture is fine-tuned as to segment.

    Raises:
        ValueError: if nothing is written for it.
    """
    found = architecture(model_type).segmentation
    if found is None:
        raise ValueError(f"a {model_type} cannot be fine-tuned to segment: its row of ARCHITECTURES has no such model")
    return found


def classification_class(model_type: str) -> type[ImageClassificationModel]:
    """What an architecture is fine-tuned as to classify or regress whole volumes.

    Raises:
        ValueError: if nothing is written for it.
    """
    found = architecture(model_type).classification
    if found is None:
        raise ValueError(
            f"a {model_type} cannot be fine-tuned to classify or regress: its row of ARCHITECTURES has no such model"
        )
    return found


def fine_tuned(numbers: dict) -> type[PreTrainedModel] | None:
    """The class of the fine-tuned model that a config.json is of; None if it is of anything else."""
    classes = numbers.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    known = (model for row in ARCHITECTURES.values() for model in (row.segmentation, row.classification) if model)
    return next((model for model in known if model.__name__ == name), None)


def dense_features(encoder: PreTrainedModel, views: torch.Tensor, stride: int | None = None) -> torch.Tensor:
    """What an encoder makes of unmasked crops `[B, C, X, Y, Z]`, without anything of pretraining: `[B, D, x, y, z]`.

    Args:
        stride: voxels a cell and axis; None for the architecture's own.
    """
    return architecture(encoder.config.model_type).dense(encoder, views, stride)
