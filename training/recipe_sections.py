"""The sections of a recipe, typed: what each number is, and what it may be."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from models import PRIMUS_SIZES

Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Size3 = tuple[PositiveInt, PositiveInt, PositiveInt]
PositiveFloat = Annotated[float, Field(gt=0)]
Angle = Annotated[float, Field(ge=0, le=180)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Data(Section):
    orientation: str  # axes of the prepared volumes: RAS, or SAR for the order in which nnU-Net reads them
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat]  # mm
    max_bad_share: Share  # more unusable files than this stop the run
    workers: Annotated[int, Field(ge=0)]  # loader processes a rank

    @field_validator("orientation")
    @classmethod
    def _axes(cls, orientation: str) -> str:
        if sorted("RLAPSI".find(letter) // 2 for letter in orientation) != [0, 1, 2]:
            raise ValueError(f"{orientation!r} must name each axis once: R or L, A or P, S or I, such as RAS")
        return orientation


class Chance(Section):
    """A change that is made with this probability, by a factor or size drawn from this range."""

    probability: Share
    range: tuple[Weight, Weight]

    @model_validator(mode="after")
    def _ordered(self):
        if self.range[0] > self.range[1]:
            raise ValueError(f"range={list(self.range)} must be [low, high]")
        return self


class Rotation(Section):
    probability: Share
    degrees: tuple[Angle, Angle, Angle]  # at most, either way, about each axis


class Turn(Section):
    mirror: Share  # probability an axis
    rotation: Rotation
    zoom: Chance  # voxels that a voxel of the crop covers: above 1 sees more

    @model_validator(mode="after")
    def _zooms(self):
        if self.zoom.range[0] == 0:
            raise ValueError("zoom.range must be above 0")
        return self


class Views(Section):
    crop_size: Size3  # voxels
    overlap: tuple[Share, Share]  # range of the shared fraction of a crop's volume
    overhang: Annotated[
        float, Field(ge=0, le=0.5)
    ]  # how far views may reach beyond a small volume on each side to overlap so little, in crops
    interpolation: Literal["linear", "cubic"]  # of views that are rotated or zoomed
    shared: Turn  # both views together
    independent: Turn  # each view on its own, on top
    cells: Size3  # dense features are compared on this grid over the shared region
    samples_per_cell: Size3


class Intensity(Section):
    """Changes of each view, in this order; low resolution is drawn once for both."""

    low_resolution: Chance  # share of the resolution that is left
    noise: Chance  # variance; Gaussian or Rician, as often
    blur: Chance  # sigma in voxels
    brightness: Chance  # factor
    contrast: Chance  # factor, half of the draws below 1
    inverted_gamma: Chance  # exponent, half of the draws below 1
    gamma: Chance

    @model_validator(mode="after")
    def _possible(self):
        if self.blur.range[0] == 0:
            raise ValueError("blur.range must be above 0")
        if not 0 < self.low_resolution.range[0] <= self.low_resolution.range[1] <= 1:
            raise ValueError("low_resolution.range must be within (0, 1]")
        return self

    def chances(self) -> dict[str, tuple[float, tuple[float, float]]]:
        return {name: (chance.probability, chance.range) for name, chance in self}


class Mask(Section):
    ratio: BelowOne  # 0: an autoencoder
    block: PositiveInt  # voxels


class Primus(Section):
    architecture: Literal["primus"]
    size: Literal["S", "B", "M", "L"] | None = None  # or the three numbers that follow
    hidden_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    patch_size: PositiveInt  # voxels a token and axis
    drop_path_rate: BelowOne
    decoder_layers: PositiveInt  # of each of the two decoders that exist in pretraining only
    feature_decoder_heads: PositiveInt

    @model_validator(mode="after")
    def _sizes(self):
        given = {k: getattr(self, k) for k in PRIMUS_SIZES["M"]}
        if self.size and any(given.values()):
            raise ValueError(f"size={self.size} sets {', '.join(given)}; give either size or these three")
        if not self.size and not all(given.values()):
            raise ValueError(f"give size (S, B, M or L) or all of {', '.join(given)}")
        if self.patch_size & (self.patch_size - 1) or self.patch_size < 2:
            raise ValueError(f"patch_size={self.patch_size} must be a power of two, from 2 on")
        numbers = self.numbers()
        for heads in (numbers["num_attention_heads"], self.feature_decoder_heads):
            if numbers["hidden_size"] % (6 * heads):
                raise ValueError(f"hidden_size={numbers['hidden_size']} must be a multiple of 6 x heads = {6 * heads}")
        return self

    def numbers(self) -> dict[str, int]:
        return PRIMUS_SIZES[self.size] if self.size else {k: getattr(self, k) for k in PRIMUS_SIZES["M"]}

    def encoder_arguments(self) -> dict[str, Any]:
        sizes = {"patch_size": (self.patch_size,) * 3, "drop_path_rate": self.drop_path_rate}
        return {"architecture": "primus", **self.numbers(), **sizes}

    def decoder_arguments(self) -> dict[str, int]:
        return {"decoder_layers": self.decoder_layers, "feature_decoder_heads": self.feature_decoder_heads}


class ResEnc(Section):
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
        return self

    def encoder_arguments(self) -> dict[str, Any]:
        return self.model_dump()

    def decoder_arguments(self) -> dict[str, int]:
        return {}


class Heads(Section):
    projector_size: PositiveInt
    predictor_size: PositiveInt


class Loss(Section):
    target: Literal["augmented", "clean"]  # what to reconstruct: with or without the changes of intensity
    reconstruction_weight: Weight
    consistency: Literal["cosine", "c_cva", "gram", "none"]
    consistency_weight: Weight
    contrastive_weight: Weight  # 0 switches a term off, and nothing of it is built
    temperature: PositiveFloat  # of both contrasts

    @model_validator(mode="after")
    def _terms(self):
        if (self.consistency == "none") != (self.consistency_weight == 0):
            raise ValueError(
                f"consistency={self.consistency} with consistency_weight={self.consistency_weight:g}: "
                "set consistency=none and consistency_weight=0, or neither"
            )
        if not self.weights():
            raise ValueError("all weights are 0: nothing would be trained")
        return self

    def weights(self) -> dict[str, float]:
        """Of the terms that are trained."""
        terms = ("reconstruction", "consistency", "contrastive")
        return {term: weight for term in terms if (weight := getattr(self, f"{term}_weight"))}


class Teacher(Section):
    momentum: Share
    final_momentum: Share  # reached at the end, along a half cosine
    path: Literal["published", "same"]  # a Primus teacher without the student's feature decoder, or with it


class AdamW(Section):
    name: Literal["adamw"]
    learning_rate: PositiveFloat
    weight_decay: Weight
    betas: tuple[BelowOne, BelowOne]


class SGD(Section):
    name: Literal["sgd"]
    learning_rate: PositiveFloat
    weight_decay: Weight
    momentum: BelowOne  # Nesterov


class Train(Section):
    steps: PositiveInt
    batch_size: PositiveInt  # volumes a step over all ranks, two views each
    accumulate: PositiveInt  # micro-batches a step, one after the other
    precision: Literal["fp32", "bf16"]
    gradient_checkpointing: bool
    warmup_steps: Annotated[int, Field(ge=0)]
    decay_power: Weight  # lr * (1 - progress) ** power after the warm-up
    clip_norm: PositiveFloat
    log_every: PositiveInt
    log_gradients: bool  # with each log, how strongly each term pulls at the encoder
    max_skipped: PositiveInt  # steps in a row whose loss or gradient is not finite: so many stop the run
    checkpoint_every: PositiveInt  # steps
    checkpoint_minutes: Weight  # since the last checkpoint; 0: by steps alone
    checkpoint_in_background: bool  # training goes on while one is written; needs host memory for its share
    compile: bool  # the networks' blocks, by torch.compile
