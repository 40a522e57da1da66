"""The recipe: every number that defines an experiment, read from YAML, typed and checked before anything starts."""

import difflib
import math
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from data.views import least_shared
from models import DENSE_STRIDE, PRIMUS_SIZES

Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Size3 = tuple[PositiveInt, PositiveInt, PositiveInt]
PositiveFloat = Annotated[float, Field(gt=0)]


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


class Views(Section):
    crop_size: Size3  # voxels
    overlap: tuple[Share, Share]  # range of the shared fraction of a crop's volume
    mirror: Share  # probability an axis, both views together
    cells: Size3  # dense features are compared on this grid over the shared region
    samples_per_cell: PositiveInt  # an axis


class Mask(Section):
    ratio: Annotated[float, Field(gt=0, lt=1)]
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
    reconstruction_weight: Weight
    consistency: Literal["cosine"]
    consistency_weight: Weight
    contrastive_weight: Weight
    temperature: PositiveFloat


class Teacher(Section):
    momentum: Share


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
    precision: Literal["fp32", "bf16"]
    gradient_checkpointing: bool
    warmup_steps: Annotated[int, Field(ge=0)]
    decay_power: Weight  # lr * (1 - progress) ** power after the warm-up
    clip_norm: PositiveFloat
    log_every: PositiveInt
    checkpoint_every: PositiveInt


class Recipe(Section):
    """The whole recipe; a field a section of the YAML."""

    name: str
    seed: Annotated[int, Field(ge=0)]
    data: Data
    views: Views
    mask: Mask
    model: Annotated[Primus | ResEnc, Field(discriminator="architecture")]
    heads: Heads
    loss: Loss
    teacher: Teacher
    optimizer: Annotated[AdamW | SGD, Field(discriminator="name")]
    train: Train

    @model_validator(mode="after")
    def _combinations(self):
        crop, block = self.views.crop_size, self.mask.block
        if isinstance(self.model, Primus):
            token = self.model.patch_size
            _divides("views.crop_size", crop, token, "the token size model.patch_size")
            if block != token:
                raise ValueError(f"mask.block={block} must equal model.patch_size={token}: Primus hides whole tokens")
        else:
            total = math.prod(self.model.strides)
            _divides("views.crop_size", crop, total, "the encoder's total stride")
            _divides("views.crop_size", crop, DENSE_STRIDE, "the stride of the dense features")
            _divides("views.crop_size", crop, block, "mask.block")
            if min(crop) < 2 * total:
                raise ValueError(
                    f"views.crop_size={list(crop)} must be at least twice the encoder's total stride {total}"
                )
        stride = self.model.patch_size if isinstance(self.model, Primus) else DENSE_STRIDE
        if any(least_shared(size) <= stride for size in crop):
            raise ValueError(
                f"views.crop_size={list(crop)} is too small for dense features of stride {stride}: two views may share "
                f"{min(map(least_shared, crop))} voxels of an axis; use {3 * stride} or more"
            )
        blocks = crop[0] * crop[1] * crop[2] // block**3
        if not 0 < int(self.mask.ratio * blocks) < blocks:
            raise ValueError(
                f"mask.ratio={self.mask.ratio} of {blocks} blocks hides none; raise it or lower mask.block"
            )
        if self.views.overlap[0] > self.views.overlap[1] or self.views.overlap[0] == 0:
            raise ValueError(f"views.overlap={list(self.views.overlap)} must be [low, high] with 0 < low <= high")
        if self.train.batch_size == 1 and self.loss.contrastive_weight > 0:
            warnings.warn("train.batch_size=1 leaves the contrastive term without negatives: it stays 0", stacklevel=2)
        if self.train.checkpoint_every % self.train.log_every:
            better = -(-self.train.checkpoint_every // self.train.log_every) * self.train.log_every
            raise ValueError(
                f"train.checkpoint_every={self.train.checkpoint_every} is not a multiple of "
                f"train.log_every={self.train.log_every}: set train.checkpoint_every={better}"
            )
        if self.train.warmup_steps >= self.train.steps:
            raise ValueError(
                f"train.warmup_steps={self.train.warmup_steps} must be below train.steps={self.train.steps}"
            )
        return self

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError unless the global batch divides over the ranks."""
        batch = self.train.batch_size
        if batch % ranks:
            better = ranks * max(1, round(batch / ranks))
            raise ValueError(
                f"train.batch_size={batch} does not divide over {ranks} ranks: set train.batch_size={better}"
            )

    def save(self, path: Path) -> None:
        """Write all keys, at once or not at all."""
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
        temporary.replace(path)


def _divides(key: str, size: tuple[int, ...], unit: int, what: str) -> None:
    if any(s % unit for s in size):
        better = [max(unit, round(s / unit) * unit) for s in size]
        raise ValueError(
            f"{key}={list(size)} is not divisible by {what} ({unit}): set {key}={better}".replace(", ", ",")
        )


def load_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """Read a recipe, apply `key.subkey=value` overrides (values in YAML), and check it.

    Raises:
        ValueError: with one line that names the key and the remedy.
    """
    try:
        numbers = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"--recipe {path}: {error.strerror}; the recipes are in recipes/") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(numbers, dict):
        raise ValueError(f"--recipe {path} must hold keys and values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"cannot read the argument {override!r}: overrides are written key.subkey=value")
        *sections, last = key.split(".")
        place = numbers
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ValueError(f"{key}: no such section in the recipe")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{key}: cannot read the value {value!r}") from None
    try:
        return Recipe.model_validate(numbers)
    except ValidationError as error:
        raise ValueError("; ".join(dict.fromkeys(_readable(e) for e in error.errors()))) from None


def _readable(error: dict) -> str:
    names = [str(part) for part in error["loc"] if part not in ("primus", "resenc", "adamw", "sgd")]
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(names[-1], _all_keys(Recipe), 1)
        return f"{key}: no such key in a recipe" + (f"; did you mean {close[0]}?" if close else "")
    if error["type"] == "missing":
        return f"{key}: missing; add it to the recipe"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f", not {error['input']!r}"
    return (f"{key}: " if key else "") + message[0].lower() + message[1:] + got


def _all_keys(section: type[BaseModel]) -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        keys.append(name)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _all_keys(kind)
    return keys


RUN_ONLY = ("data.workers", "train.log_every", "train.checkpoint_every")  # may change on resume: results do not


def differences(recipe: Recipe, path: Path) -> list[str]:
    """The keys in which a saved recipe differs from this one, as `key: theirs there, ours here`."""
    try:
        there = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        raise ValueError(f"{path} is damaged: restore it, or choose another --output") from None
    saved, ours = flatten(there or {}), flatten(recipe.model_dump(mode="json"))
    keys = [k for k in {**saved, **ours} if k not in RUN_ONLY and saved.get(k) != ours.get(k)]
    return [f"{k} is {saved.get(k)} there and {ours.get(k)} here" for k in keys]


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested keys as `section.key`."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
