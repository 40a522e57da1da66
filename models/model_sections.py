"""The section `model` of a recipe, a class an architecture: its numbers, and what they ask of crop and mask."""

import itertools
import math
import operator
from abc import abstractmethod
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator
from transformers import PretrainedConfig

from .configuration_primus import PRIMUS_SIZES
from .features import DENSE_STRIDE
from .section import BelowOne, Section, check_divides


class ModelSection(Section):
    """What the section of every architecture has; `architecture` names a row of `ARCHITECTURES`."""

    architecture: str

    @property
    @abstractmethod
    def dense_stride(self) -> int:
        """Voxels a cell and axis of the dense features."""

    @abstractmethod
    def encoder_arguments(self) -> dict[str, Any]:
        """Of the configuration, but for crop and preprocessing."""

    @classmethod
    @abstractmethod
    def of_encoder(cls, config: PretrainedConfig) -> dict[str, Any]:
        """The section of a model that is built on an encoder, without what regularises pretraining."""

    @abstractmethod
    def check_crop(self, crop_size: tuple[int, ...]) -> None:
        """Raise ValueError, with the remedy, unless the network can read such crops."""

    @abstractmethod
    def check_mask(self, crop_size: tuple[int, ...], mask_block: int) -> None:
        """Raise ValueError, with the remedy, unless crops can be masked in such blocks."""


class Primus(ModelSection):
    architecture: Literal["primus"]
    size: Literal["S", "B", "M", "L"] | None = None  # or the three numbers that follow
    hidden_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    patch_size: PositiveInt  # voxels a token and axis
    drop_path_rate: BelowOne
    decoder_layers: NonNegativeInt  # of each of the two decoders that exist in pretraining only; 0: there are none, and
    # masked tokens enter the encoder too, as one learned embedding (SimMIM)
    feature_decoder_heads: PositiveInt | None = None  # null where there are no decoders

    @model_validator(mode="after")
    def _sizes(self):
        given = {k: getattr(self, k) for k in PRIMUS_SIZES["M"]}
        if self.size and any(given.values()):
            raise ValueError(f"size={self.size} sets {', '.join(given)}; give either size or these three")
        if not self.size and not all(given.values()):
            raise ValueError(f"give size (S, B, M or L) or all of {', '.join(given)}")
        if self.patch_size & (self.patch_size - 1) or self.patch_size < 2:
            raise ValueError(f"patch_size={self.patch_size} must be a power of two, from 2 on")
        if (self.decoder_layers == 0) != (self.feature_decoder_heads is None):
            raise ValueError(
                f"decoder_layers={self.decoder_layers} with feature_decoder_heads={self.feature_decoder_heads}: set "
                "decoder_layers=0 and feature_decoder_heads=null, or neither"
            )
        numbers = self.numbers()
        for heads in (numbers["num_attention_heads"], self.feature_decoder_heads or 1):
            if numbers["hidden_size"] % (6 * heads):
                raise ValueError(f"hidden_size={numbers['hidden_size']} must be a multiple of 6 x heads = {6 * heads}")
        return self

    def numbers(self) -> dict[str, int]:
        return PRIMUS_SIZES[self.size] if self.size else {k: getattr(self, k) for k in PRIMUS_SIZES["M"]}

    @property
    def dense_stride(self) -> int:
        return self.patch_size

    def encoder_arguments(self) -> dict[str, Any]:
        return {**self.numbers(), "patch_size": (self.patch_size,) * 3, "drop_path_rate": self.drop_path_rate}

    @classmethod
    def of_encoder(cls, config: PretrainedConfig) -> dict[str, Any]:
        sizes = {key: getattr(config, key) for key in PRIMUS_SIZES["M"]}
        rest = {"drop_path_rate": 0.0, "decoder_layers": 0, "feature_decoder_heads": None}
        return {"architecture": config.model_type, **sizes, "patch_size": config.patch_size[0], **rest}

    def check_crop(self, crop_size: tuple[int, ...]) -> None:
        check_divides("views.crop_size", crop_size, self.patch_size, "the token size model.patch_size")

    def check_mask(self, crop_size: tuple[int, ...], mask_block: int) -> None:
        token = self.patch_size
        if mask_block != token:
            raise ValueError(f"mask.block={mask_block} must equal model.patch_size={token}: Primus hides whole tokens")


class PrimusV2(Primus):
    architecture: Literal["primus_v2"]
    embed_widths: list[PositiveInt]  # channels of the tokenizer: of its stem and of each stage that halves the axes

    @model_validator(mode="after")
    def _stages(self):
        if self.patch_size != 2 ** (len(self.embed_widths) - 1):
            raise ValueError(
                f"embed_widths={self.embed_widths} with patch_size={self.patch_size}: "
                f"give {self.patch_size.bit_length()}, one for the stem and one for each halving of the axes"
            )
        return self

    def encoder_arguments(self) -> dict[str, Any]:
        return {**super().encoder_arguments(), "embed_widths": self.embed_widths}

    @classmethod
    def of_encoder(cls, config: PretrainedConfig) -> dict[str, Any]:
        return {**super().of_encoder(config), "embed_widths": list(config.embed_widths)}

    def check_crop(self, crop_size: tuple[int, ...]) -> None:
        super().check_crop(crop_size)
        if math.prod(crop_size) <= self.patch_size**3:
            raise ValueError(
                f"views.crop_size={list(crop_size)} must exceed model.patch_size={self.patch_size}: the last stage of "
                "the tokenizer would have a single cell, which instance norm sets to 0"
            )


class PrimusV3(PrimusV2):
    architecture: Literal["primus_v3"]


class ResEnc(ModelSection):
    architecture: Literal["resenc"]
    hidden_sizes: list[PositiveInt]  # channels a stage
    strides: list[PositiveInt]
    depths: list[PositiveInt]  # residual blocks a stage

    @model_validator(mode="after")
    def _stages(self):
        if not len(self.hidden_sizes) == len(self.strides) == len(self.depths) >= 2:
            raise ValueError("hidden_sizes, strides and depths must have one entry a stage, two stages at least")
        if self.strides[0] != 1:
            raise ValueError(f"strides={self.strides} must begin with 1: the decoder ends at the first stage")
        if any(DENSE_STRIDE % n and n % DENSE_STRIDE for n in itertools.accumulate(self.strides, operator.mul)):
            raise ValueError(
                f"strides={self.strides}: the stride of each stage must divide {DENSE_STRIDE}, that of the dense "
                "features, or be a multiple of it"
            )
        return self

    @property
    def dense_stride(self) -> int:
        return DENSE_STRIDE

    def encoder_arguments(self) -> dict[str, Any]:
        return self.model_dump(exclude={"architecture"})

    @classmethod
    def of_encoder(cls, config: PretrainedConfig) -> dict[str, Any]:
        sizes = {key: list(getattr(config, key)) for key in ("hidden_sizes", "strides", "depths")}
        return {"architecture": config.model_type, **sizes}

    def check_crop(self, crop_size: tuple[int, ...]) -> None:
        total = math.prod(self.strides)
        check_divides("views.crop_size", crop_size, total, "the encoder's total stride")
        check_divides("views.crop_size", crop_size, DENSE_STRIDE, "the stride of the dense features")
        if math.prod(crop_size) <= total**3:
            raise ValueError(
                f"views.crop_size={list(crop_size)} must exceed the encoder's total stride {total}: its deepest stage "
                "would have a single cell, which instance norm sets to 0"
            )

    def check_mask(self, crop_size: tuple[int, ...], mask_block: int) -> None:
        check_divides("views.crop_size", crop_size, mask_block, "mask.block")
