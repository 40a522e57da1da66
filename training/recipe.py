"""The recipe: every number that defines an experiment, read from YAML, typed and checked before anything starts."""

import difflib
import itertools
import math
import operator
import warnings
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from data.views import least_shared
from models import DENSE_STRIDE

from .files import flush
from .recipe_sections import (
    SGD,
    AdamW,
    Data,
    Heads,
    Intensity,
    Loss,
    Mask,
    Primus,
    ResEnc,
    Section,
    Teacher,
    Train,
    Views,
)


class Recipe(Section):
    """The whole recipe; a field a section of the YAML."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]  # of folders too
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    data: Data
    views: Views
    intensity: Intensity
    mask: Mask
    model: Annotated[Primus | ResEnc, Field(discriminator="architecture")]
    heads: Heads
    loss: Loss
    teacher: Teacher | None  # null: the student's views are contrasted with each other (SimCLR)
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
            if any(
                DENSE_STRIDE % n and n % DENSE_STRIDE for n in itertools.accumulate(self.model.strides, operator.mul)
            ):
                raise ValueError(
                    f"model.strides={self.model.strides}: the stride of each stage must divide {DENSE_STRIDE}, that of "
                    "the dense features, or be a multiple of it"
                )
            _divides("views.crop_size", crop, DENSE_STRIDE, "the stride of the dense features")
            _divides("views.crop_size", crop, block, "mask.block")
            if math.prod(crop) <= total**3:
                raise ValueError(
                    f"views.crop_size={list(crop)} must exceed the encoder's total stride {total}: its deepest stage "
                    "would have a single cell, which instance norm sets to 0"
                )
        stride = self.model.patch_size if isinstance(self.model, Primus) else DENSE_STRIDE
        if any(least_shared(size) <= stride for size in crop):
            raise ValueError(
                f"views.crop_size={list(crop)} is too small for dense features of stride {stride}: two views may share "
                f"{min(map(least_shared, crop))} voxels of an axis; use {3 * stride} or more"
            )
        blocks = crop[0] * crop[1] * crop[2] // block**3
        if self.mask.ratio and not int(self.mask.ratio * blocks):
            raise ValueError(
                f"mask.ratio={self.mask.ratio} of {blocks} blocks hides none: raise it, lower mask.block, or set 0"
            )
        if not 0.4 <= self.views.overlap[0] <= self.views.overlap[1]:
            raise ValueError(f"views.overlap={list(self.views.overlap)} must be [low, high] with 0.4 <= low <= high")
        if self.loss.consistency != "none" and self.teacher is None:
            raise ValueError(f"loss.consistency={self.loss.consistency} needs a teacher: set teacher.momentum")
        self._check_batch()
        if self.train.warmup_steps >= self.train.steps:
            raise ValueError(
                f"train.warmup_steps={self.train.warmup_steps} must be below train.steps={self.train.steps}"
            )
        return self

    def _check_batch(self) -> None:
        batch, accumulate = self.train.batch_size, self.train.accumulate
        if batch % accumulate:
            raise ValueError(
                f"train.batch_size={batch} does not divide into train.accumulate={accumulate} micro-batches: "
                f"set train.batch_size={accumulate * max(1, round(batch / accumulate))}"
            )
        together = batch // accumulate
        if together == 1 and self.loss.contrastive_weight:
            warnings.warn(
                "one volume at a time leaves the contrastive term without negatives: it stays 0", stacklevel=2
            )
        if accumulate > 1 and self.loss.weights().keys() != {"reconstruction"}:
            warnings.warn(
                f"train.accumulate={accumulate} is not the loss of {batch} volumes at once: batch norm and negatives "
                f"of the heads see {together} at a time (only reconstruction is a plain mean over volumes)",
                stacklevel=2,
            )

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError unless each micro-batch divides over the ranks."""
        batch, unit = self.train.batch_size, ranks * self.train.accumulate
        if batch % unit:
            over = f"{ranks} ranks" + (f" x {self.train.accumulate} micro-batches" if self.train.accumulate > 1 else "")
            raise ValueError(
                f"train.batch_size={batch} does not divide over {over}: "
                f"set train.batch_size={unit * max(1, round(batch / unit))}"
            )

    def save(self, path: Path) -> None:
        """Write all keys, at once or not at all."""
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
        flush(temporary)
        temporary.replace(path)


def _divides(key: str, size: tuple[int, ...], unit: int, what: str) -> None:
    if any(s % unit for s in size):
        better = [max(unit, round(s / unit) * unit) for s in size]
        raise ValueError(
            f"{key}={list(size)} is not divisible by {what} ({unit}): set {key}={better}".replace(", ", ",")
        )


def load_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """Read a recipe, apply `key.subkey=value` overrides (values in YAML), and check it.

    A recipe may name another one beside it as its `base`, and then holds only what differs.

    Raises:
        ValueError: with one line that names the key and the remedy.
    """
    numbers = _read(path)
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


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """A recipe's keys and values over those of its base."""
    try:
        numbers = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"--recipe {path}: {error.strerror}; the recipes are in recipes/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(numbers, dict):
        raise ValueError(f"--recipe {path} must hold keys and values")
    base = numbers.pop("base", None)
    if base is None:
        return numbers
    if not isinstance(base, str) or path.resolve() in seen:
        raise ValueError(
            f"--recipe {path}: base={base} must be another recipe's file beside this one, without a circle"
        )
    return _merge(_read(path.parent / base, (*seen, path.resolve())), numbers)


def _merge(base: dict, changes: dict) -> dict:
    """`changes` over `base`; a section that chooses another kind (optimizer.name, ...) replaces the whole one."""
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        if (
            isinstance(old, dict)
            and isinstance(value, dict)
            and not any(kind in value and value[kind] != old.get(kind) for kind in ("architecture", "name"))
        ):
            value = _merge(old, value)
        merged[key] = value
    return merged


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


RUN_ONLY = (
    "data.workers",
    "train.log_every",
    "train.log_gradients",
    "train.max_skipped",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.checkpoint_in_background",
)  # may change on resume: results do not


def differences(recipe: Recipe, path: Path) -> list[str]:
    """The keys in which a saved recipe differs from this one, as `key: theirs there, ours here`."""
    try:
        there = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        raise ValueError(f"{path} is damaged: restore it, or choose another --output") from None
    if not isinstance(there, dict):
        raise ValueError(f"{path} is damaged: restore it, or choose another --output")
    saved, ours = flatten(there), flatten(recipe.model_dump(mode="json"))
    keys = [k for k in {**saved, **ours} if k not in RUN_ONLY and saved.get(k) != ours.get(k)]
    return [f"{k} is {saved.get(k)} there and {ours.get(k)} here" for k in keys]


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested keys as `section.key`."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
