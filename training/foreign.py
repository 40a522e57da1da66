"""Weights of others as an encoder of ours: how its volumes are prepared, and what may be said of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PreTrainedModel

from data.normalisation import checked_rule
from models import ARCHITECTURES
from models.adaptation_plans import Plan
from models.foreign import build, recognise
from models.section import Size3
from models.warm_start import AXES_OF_NNUNET, NNUNET_CHECKPOINT, configuration_of, find, origin
from models.weight_files import read_json

from .intensity_in_words import normalisation
from .recipe_sections import Orientation, Spacing
from .run_folder import RunFolder
from .student import preprocessing

ASKED = {
    "spacing": "--spacing X Y Z (mm along the axes of --orientation) or native",
    "orientation": f"--orientation AXES ({AXES_OF_NNUNET}: as nnU-Net reads a file that is stored as RAS)",
    "intensity": "--intensity RULE (box: z-score over the box of non-zero voxels; foreground, percentile and window as "
    "in recipes)",
}
CROP = "--crop-size X Y Z (voxels; unless a position embedding tells it)"
GIVEN = "who converted it"
PLANNED = {"spacing": "its plan", "orientation": "its plan, for files stored as RAS", "intensity": "its plan"}


class Told(NamedTuple):
    """How volumes are prepared, as it was given; None: not said."""

    spacing: Sequence[str] | None = None
    orientation: str | None = None
    intensity: Sequence[str] | None = None  # a rule and its numbers, such as `percentile low=0.5 high=99.5`
    crop_size: Sequence[str] | None = None


def foreign_file(source: Path) -> Path | None:
    """The weights of others that a source is or holds; None if it is of this project, or neither file nor Hub id.

    Raises:
        ValueError: if it is a file of an encoder of this project.
    """
    of_others = (source / NNUNET_CHECKPOINT).is_file() and not RunFolder(source).recipe.is_file()
    if source.is_dir() and not (of_others and configuration_of(source / NNUNET_CHECKPOINT) is None):
        return None
    file = find(str(source))
    beside = configuration_of(file)
    if beside and read_json(beside).get("model_type") in [*ARCHITECTURES]:
        raise ValueError(f"{source}: is of an encoder of this project: name its folder, {beside.parent}")
    return file


def convert(
    source: str, file: Path, told: Told, license: str, described: str | None = None, token_order: str | None = None
) -> tuple[PreTrainedModel, dict, dict | None, str]:
    """An encoder for `publish.py` with the weights of others.

    Args:
        source: as it was given.
        file: what `models.warm_start.find` found for it.
        license: of the weights.
        described: where they come from, for the model card.
        token_order: see `models.foreign.build`.

    Returns:
        The encoder, what is known of it, its U-Net decoder if it has one, and what was read, as text of a few lines.

    Raises:
        ValueError: if it holds no such encoder, or if something is not told.
    """
    crop_size = None if told.crop_size is None else _checked("--crop-size", Size3, told.crop_size)
    given = {
        "spacing": told.spacing and _spacing(told.spacing),
        "orientation": told.orientation and _checked("--orientation", Orientation, told.orientation),
        "intensity": told.intensity and _rule(told.intensity),
    }
    found = recognise(file)
    plan = found.plan
    steps, said_by = _prepared_as(file, plan, given, asks_for_crop=not (crop_size or plan.crops))
    foreign = build(found, token_order, crop_size)
    config = foreign.encoder.config
    config.preprocessing = preprocessing(crop_size=config.image_size, **steps)
    facts = {
        "converted": {
            "from": origin(source, file),
            "source": described,
            "license": license,
            "network": plan.network or None,
            "trainer": plan.trainer or None,
            "recommended_crop": plan.recommended and list(plan.recommended),
            "changed": foreign.changed,
            "said_by": said_by,
        }
    }
    if plan.citations:
        facts["method"] = {"name": "", "citation": "; ".join(plan.citations), "terms": {}}
    words = [foreign.report, *_in_words(steps, said_by), f"crop {' x '.join(map(str, config.image_size))}"]
    return foreign.encoder, facts, foreign.decoder, "\n            ".join(words)


def _prepared_as(
    file: Path, plan: Plan, given: dict[str, Any], asks_for_crop: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Spacing, orientation and intensity, and who says so; the command line's word counts more."""
    planned, unlike = _planned(plan)
    steps = {key: given[key] or planned.get(key) for key in ASKED}
    if missing := [asked for key, asked in ASKED.items() if not steps[key]]:
        why = f"; {unlike}" if unlike and not steps["intensity"] else ""
        missing += [CROP] * asks_for_crop
        raise ValueError(f"{file}: nothing tells how its volumes were prepared{why}: say {', '.join(missing)}")
    return steps, {key: GIVEN if given[key] else PLANNED[key] for key in ASKED}


def _planned(plan: Plan) -> tuple[dict[str, Any], str]:
    """What a plan says of the same, and what it says of intensities that is none of our rules."""
    steps, planned, unlike = plan.preparation, {}, ""
    if not steps:
        return planned, unlike
    if not plan.token_order:  # of ours no plan tells the axes
        planned["orientation"] = "".join(AXES_OF_NNUNET[axis] for axis in plan.axes)
    if "spacing" in steps:
        spacing = steps["spacing"]
        planned["spacing"] = "native" if spacing is None else _checked("the spacing of its plan,", Spacing, spacing)
    schemes, masks = steps.get("normalization_schemes") or [], steps.get("use_mask_for_norm")
    masked = any(masks) if isinstance(masks, list) else bool(masks)
    if schemes and all(scheme == "ZScoreNormalization" for scheme in schemes) and not masked:
        planned["intensity"] = {"rule": "box"}  # nnssl too crops to the box of non-zero voxels before
    elif schemes:
        how = ", ".join(dict.fromkeys(map(str, schemes))) + (" within a mask" if masked else "")
        unlike = f"its plan normalises by {how}, which is exactly none of our rules"
    return planned, unlike


def _spacing(words: Sequence[str]) -> tuple[float, ...] | str:
    if len(words) == 1:
        return _checked("--spacing", Literal["native"], words[0])
    return _checked("--spacing", Spacing, words)


def _rule(words: Sequence[str]) -> dict:
    name, *numbers = words
    try:
        values = {key: float(value) for key, _, value in (number.partition("=") for number in numbers)}
        return checked_rule({"rule": name, **values})
    except ValueError as error:
        raise ValueError(f"--intensity {' '.join(words)}: {error}") from None


def _checked(what: str, kind: Any, value: Any) -> Any:
    """A value as recipes would take it; ValueError that says `what` otherwise."""
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        said = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"{what} {said}: {reason[0].lower()}{reason[1:]}") from None


def _in_words(steps: dict[str, Any], said_by: dict[str, str]) -> list[str]:
    spacing = steps["spacing"]
    words = {
        "spacing": spacing if isinstance(spacing, str) else " x ".join(f"{mm:g}" for mm in spacing) + " mm",
        "orientation": steps["orientation"],
        "intensity": normalisation(steps["intensity"], None),
    }
    return [f"{key} {words[key]} ({said_by[key]})" for key in ASKED]
