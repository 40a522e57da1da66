"""The recipe: every number that defines an experiment, read from YAML, typed and checked before anything starts."""

import difflib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from data.files import write_whole
from data.manifest import Manifest
from data.split import Split, split_by_subject
from models import ARCHITECTURES, architecture
from models.section import Section

from .recipe_sections import SGD, AdamW, Data, Intensity, Mask, Running, Train, Views

DOWNSTREAM = {"segmentation": "finetune.py", "whole_volumes": "finetune_volumes.py"}  # scripts of methods with labels
OF_STREAM = ("crop_size", "coarsest_last", "interpolation", "shared", "independent")
KINDS = ("architecture", "name", "rule")  # keys that say which kind of a section it is
TAGS = {  # what they may say, and which form a value has
    *ARCHITECTURES,
    *("adamw", "sgd", "cross_entropy", "mse", "smooth_l1"),
    *("box", "foreground", "window", "percentile", "numbers", "word"),
}

Model = Union[tuple(row.section for row in ARCHITECTURES.values())]  # noqa: UP007


class Recipe(Section):
    """What all recipes have, a field a section of the YAML; a method's own recipe inherits it."""

    method: str  # whose script reads it (`script_of`)
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]  # of folders too
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    data: Data
    views: Views
    intensity: Intensity
    model: Annotated[Model, Field(discriminator="architecture")]
    optimizer: Annotated[AdamW | SGD, Field(discriminator="name")]
    train: Train
    run: Running

    @property
    def couples_volumes(self) -> bool:
        """Whether the loss of a batch is more than the mean over its volumes: batch norm, negatives."""
        return True

    @property
    def uses_frames(self) -> bool:
        """Whether samples depend on the frames that patients share (`data/frames.py`)."""
        return False

    @property
    def uses_labels(self) -> bool:
        """Whether samples have label maps."""
        return False

    def split(self, manifest: Manifest, targets: Mapping[str, str] | None = None) -> Split:
        """Which of the volumes are trained on.

        Args:
            targets: what a table says of subjects, of methods that have one.
        """
        return split_by_subject(manifest, self.data.validation_share, self.data.leave_out)

    @property
    def hidden(self) -> str:
        """How much of a view is hidden, in words."""
        return ""

    def of_stream(self) -> dict[str, Any]:
        """What a `SampleStream` takes of the sections that all methods have."""
        return self.views.model_dump(include={*OF_STREAM}) | {"intensity": self.intensity.chances()}

    @model_validator(mode="after")
    def _combinations(self):
        self.model.check_crop(self.views.crop_size)
        if self.train.accumulate > 1 and self.couples_volumes:
            warnings.warn(
                f"train.accumulate={self.train.accumulate} is not the loss of {self.train.batch_size} volumes at once: "
                f"what couples volumes, as batch norm and negatives of heads do, sees "
                f"{self.train.batch_size // self.train.accumulate} of them at a time",
                stacklevel=2,
            )
        return self

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
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        write_whole(path, lambda file: file.write_text(text))


class PretrainingRecipe(Recipe):
    """Of a method that may hide parts of its views."""

    mask: Mask

    @property
    def _blocks(self) -> int:
        return math.prod(self.views.crop_size) // self.mask.block**3

    @property
    def hidden(self) -> str:
        hides = architecture(self.model.architecture).hides
        return f"; {self._blocks} {hides} a view, {int(self.mask.ratio * self._blocks)} of them masked"

    def of_stream(self) -> dict[str, Any]:
        return super().of_stream() | {"mask_block": self.mask.block, "mask_ratio": self.mask.ratio}

    @model_validator(mode="after")
    def _hides(self):
        self.model.check_mask(self.views.crop_size, self.mask.block)
        if self.mask.ratio and not int(self.mask.ratio * self._blocks):
            raise ValueError(
                f"mask.ratio={self.mask.ratio} of {self._blocks} blocks hides none: raise it, lower mask.block, "
                "or set 0"
            )
        return self


Kind = TypeVar("Kind", bound=Recipe)


def load_recipe(path: Path, overrides: list[str], kind: type[Kind]) -> Kind:
    """Read a recipe, apply `key.subkey=value` overrides (values in YAML), and check it.

    A recipe may name another one beside it as its `base`, and then holds only what differs; of a base of another method
    it has the keys that both methods know.

    Args:
        kind: the recipe of a method.

    Raises:
        ValueError: with one line that names the key and the remedy.
    """
    numbers = _read(path, kind)
    _override(numbers, overrides)
    if not {"method", "run"} & numbers.keys():
        raise ValueError(
            f"--recipe {path} was written for an earlier version of this project: it needs `method` and the section "
            "`run`, as the files of recipes/ have them"
        )
    (wanted,) = kind.model_fields["method"].annotation.__args__
    if (method := numbers.get("method", wanted)) != wanted:
        raise ValueError(
            f"--recipe {path} is of the method {method}, for {script_of(method)}: run that script, or choose a recipe "
            f"of the method {wanted}"
        )
    try:
        return kind.model_validate(numbers)
    except ValidationError as error:
        raise ValueError("; ".join(dict.fromkeys(_readable(e, kind) for e in error.errors()))) from None


def script_of(method: str) -> str:
    return DOWNSTREAM.get(method, f"train_{method}.py")


def load_data_section(path: Path, overrides: list[str]) -> Data:
    """The section `data` of a recipe of any method; otherwise as `load_recipe`."""
    if foreign := [override for override in overrides if not override.startswith("data.")]:
        raise ValueError(f"{foreign[0]}: only numbers of the section data matter here, such as data.spacing=[1,1,1]")
    numbers = _read(path, Recipe)
    _override(numbers, overrides)
    try:
        return _OnlyData.model_validate({"data": numbers.get("data")}).data
    except ValidationError as error:
        raise ValueError("; ".join(dict.fromkeys(_readable(e, _OnlyData) for e in error.errors()))) from None


class _OnlyData(Section):
    data: Data


def _override(numbers: dict, overrides: list[str]) -> None:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"cannot read the argument {override!r}: overrides are written key.subkey=value")
        *sections, last = key.split(".")
        place = numbers
        for section in sections:
            if isinstance(place, dict) and place.get(section) is None:  # absent, or switched off
                place[section] = {}
            place = place[section] if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ValueError(f"{key}: no such section in the recipe")
        try:
            value = yaml.safe_load(value)
            if last == "rule" and value != place.get(last):
                place.clear()  # the numbers are those of the other rule
            place[last] = value
        except yaml.YAMLError:
            raise ValueError(f"{key}: cannot read the value {value!r}") from None


def _read(path: Path, kind: type[Recipe], seen: tuple[Path, ...] = ()) -> dict:
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
    numbers_of_base = _read(path.parent / base, kind, (*seen, path.resolve()))
    if numbers.get("method", numbers_of_base.get("method")) != numbers_of_base.get("method"):
        numbers_of_base = _known(numbers_of_base, kind)
    return _merge(numbers_of_base, numbers)


def _known(numbers: dict, section: type[BaseModel]) -> dict:
    """Without the keys that a section, or one inside it, does not have."""
    known = {}
    for key, value in numbers.items():
        if key in section.model_fields:
            inner = _sections(section.model_fields[key].annotation)
            known[key] = _known(value, inner[0]) if isinstance(value, dict) and len(inner) == 1 else value
    return known


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _merge(base: dict, changes: dict) -> dict:
    """`changes` over `base`; a section that chooses another kind (optimizer.name, ...) replaces the whole one."""
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        if (
            isinstance(old, dict)
            and isinstance(value, dict)
            and not any(kind in value and value[kind] != old.get(kind) for kind in KINDS)
        ):
            value = _merge(old, value)
        merged[key] = value
    return merged


def _readable(error: dict, kind: type[Recipe]) -> str:
    names = [str(part) for part in error["loc"] if part not in TAGS]  # which are no keys
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key in a recipe" + _meant(key, _all_keys(kind))
    if error["type"] == "missing":
        return f"{key}: missing; add it to the recipe"
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        return f"{key}.{context['discriminator'].strip(chr(39))}={context['tag']}: there are {context['expected_tags']}"
    if error["type"] == "union_tag_not_found":
        return f"{key}.{error['ctx']['discriminator'].strip(chr(39))}: missing; add it to the recipe"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f", not {error['input']!r}"
    if message.startswith(f"{key}."):  # it names its key itself
        return message + got
    return (f"{key}: " if key else "") + message[0].lower() + message[1:] + got


def _meant(key: str, known: list[str]) -> str:
    """A key that it may be a slip of, rather one of the same section."""
    section, _, last = key.rpartition(".")
    close = difflib.get_close_matches(last, [other.rpartition(".")[2] for other in known if other != key], 1)
    same = [other for other in known if other.rpartition(".")[2] in close and other != key]
    return f"; did you mean {max(same, key=lambda other: other.rpartition('.')[0] == section)}?" if same else ""


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        for inner in _sections(field.annotation):
            keys += _all_keys(inner, f"{prefix}{name}.")
    return keys


def differences(recipe: Recipe, path: Path) -> list[str]:
    """The keys in which a saved recipe differs from this one, as `key: theirs there, ours here`; `run` may differ.

    Raises:
        ValueError: if it is damaged, or was saved by a version of this project that had other keys.
    """
    try:
        there = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        there = None
    if not isinstance(there, dict):
        raise ValueError(f"{path} is damaged: restore it, or choose another --output")
    if "run" not in there:
        raise ValueError(
            f"{path} was written by an earlier version of this project: go on with that version, or start anew with "
            "another --output"
        )
    saved, ours = (
        flatten({k: v for k, v in tree.items() if k != "run"}) for tree in (there, recipe.model_dump(mode="json"))
    )
    keys = [k for k in {**saved, **ours} if saved.get(k) != ours.get(k)]
    return [f"{k} is {saved.get(k)} there and {ours.get(k)} here" for k in keys]


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested keys as `section.key`."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
